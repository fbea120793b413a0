"""The training loss (the paper's Section 5): which noise levels are drawn, and how they are weighted.

Eq. 2   E over y, n of  |D(y + n; sigma) - y|^2,   n ~ N(0, sigma^2 I)         is smallest for the ideal denoiser
Eq. 8   E over sigma, y, n of  lambda(sigma) |D(y + n; sigma) - y|^2           is what training minimises

The loop in `train_mnist.py` puts the parts together: sigma from a noise distribution, lambda from a weighting, and
`weight * squared_error(D, y)`. DDPM's and Improved DDPM's further losses are in `ddpm_loss.py`.
"""

from dataclasses import dataclass

import torch

from edm.schedule import VP, NoiseLevels


def squared_error(D: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Return |D - y|^2, summed over channels and pixels: (B, C, H, W) twice -> (B,)."""
    return (D - y).square().sum(dim=(1, 2, 3))


def edm_weight(sigma: torch.Tensor, sigma_data: float) -> torch.Tensor:
    """Return EDM's lambda(sigma) = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 = 1 / c_out(sigma)^2 (Table 1).

    The initial loss of a pixel is then 1 at every noise level, if the data's mean square is sigma_data^2.
    """
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def inverse_variance(sigma: torch.Tensor, sigma_data: float) -> torch.Tensor:
    """Return lambda(sigma) = 1 / sigma^2 of VP, VE and iDDPM (Table 1): the loss is the square error of the noise."""
    return 1 / sigma**2


WEIGHTINGS = {"edm": edm_weight, "vp": inverse_variance, "ve": inverse_variance, "iddpm": inverse_variance}


class NoiseDistribution:
    """The base of the noise distributions. `sigma` turns uniform draws from [0, 1), of any shape, into noise levels.

    The methods after `sample` are for a distribution that learns from the losses which noise levels to draw
    (`ddpm_loss.ImportanceSampledTimesteps`); for all others they do nothing.
    """

    def sample(self, batch_size: int, generator: torch.Generator) -> torch.Tensor:
        """Draw noise levels, (batch_size,), on the generator's device."""
        return self.sigma(torch.rand(batch_size, generator=generator, device=generator.device))

    def importance(self, sigma: torch.Tensor) -> torch.Tensor:
        """Return the importance weights p(sigma) / q(sigma), (B,): the intended density over that of the draws."""
        return torch.ones_like(sigma)

    def update(self, sigma: torch.Tensor, losses: torch.Tensor) -> None:
        """Learn from the noise levels and losses of a whole batch, (B,) each."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return what has been learned, for a checkpoint."""
        return {}


@dataclass(frozen=True)
class LogNormal(NoiseDistribution):
    """EDM's distribution: ln(sigma) ~ N(P_mean, P_std^2) (Table 1). Its `sigma` turns draws from N(0, 1) into noise levels."""

    P_mean: float = -1.2
    P_std: float = 1.2

    def sigma(self, normal: torch.Tensor) -> torch.Tensor:
        return (self.P_mean + self.P_std * normal).exp()

    def sample(self, batch_size: int, generator: torch.Generator) -> torch.Tensor:
        return self.sigma(torch.randn(batch_size, generator=generator, device=generator.device))


class VPNoise(NoiseDistribution):
    """VP's distribution: sigma(t) of the VP schedule, t ~ U(epsilon_t, 1), where epsilon_t = 1e-5 (Table 1)."""

    def sigma(self, uniform: torch.Tensor) -> torch.Tensor:
        return VP().sigma(1 + uniform * (1e-5 - 1))


class VENoise(NoiseDistribution):
    """VE's distribution: ln(sigma) ~ U(ln(0.02), ln(100)) (Table 1)."""

    def sigma(self, uniform: torch.Tensor) -> torch.Tensor:
        return 0.02 * (100 / 0.02) ** uniform


@dataclass(frozen=True)
class UniformLevels(NoiseDistribution):
    """iDDPM's distribution: each of a network's noise levels with equal probability (Table 1); on DDPM's chain, L_simple."""

    levels: NoiseLevels

    def sigma(self, uniform: torch.Tensor) -> torch.Tensor:
        levels = self.levels.like(uniform)
        return levels[(uniform * len(levels)).long().clamp(max=len(levels) - 1)]
