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


# lambda(sigma)


def edm_weight(sigma: torch.Tensor, sigma_data: float) -> torch.Tensor:
    """Return EDM's lambda(sigma) = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 = 1 / c_out(sigma)^2 (Table 1).

    The initial loss of a pixel is then 1 at every noise level, if the data's mean square is sigma_data^2.
    """
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def inverse_variance(sigma: torch.Tensor, sigma_data: float) -> torch.Tensor:
    """Return lambda(sigma) = 1 / sigma^2 of VP, VE and iDDPM (Table 1): the loss is the square error of the noise."""
    return 1 / sigma**2


WEIGHTINGS = {"edm": edm_weight, "vp": inverse_variance, "ve": inverse_variance, "iddpm": inverse_variance}


# The distribution of sigma


class NoiseDistribution:
    """The base of the noise distributions. Each has `sample(batch_size, generator)`, which draws noise levels (B,).

    The methods below are for a distribution that learns from the losses which noise levels to draw
    (`ddpm_loss.ImportanceSampledTimesteps`); for all others they do nothing.
    """

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
    """EDM's distribution: ln(sigma) ~ N(P_mean, P_std^2) (Table 1)."""

    P_mean: float = -1.2
    P_std: float = 1.2

    def sigma(self, normal: torch.Tensor) -> torch.Tensor:
        """Return the noise levels for draws from N(0, 1), a tensor of any shape."""
        return (self.P_mean + self.P_std * normal).exp()

    def sample(self, batch_size: int, generator: torch.Generator) -> torch.Tensor:
        return self.sigma(torch.randn(batch_size, generator=generator, device=generator.device))


class UniformDraws(NoiseDistribution):
    """The base of the distributions that turn uniform draws from [0, 1) into noise levels: `sigma(uniform)`."""

    def sample(self, batch_size: int, generator: torch.Generator) -> torch.Tensor:
        return self.sigma(torch.rand(batch_size, generator=generator, device=generator.device))


@dataclass(frozen=True)
class VPNoise(UniformDraws):
    """VP's distribution: sigma(t) of the VP schedule, t ~ U(epsilon_t, 1) (Table 1)."""

    beta_d: float = 19.9
    beta_min: float = 0.1
    epsilon_t: float = 1e-5

    def sigma(self, uniform: torch.Tensor) -> torch.Tensor:
        """Return the noise levels for draws from U(0, 1), a tensor of any shape."""
        return VP(self.beta_d, self.beta_min).sigma(1 + uniform * (self.epsilon_t - 1))


@dataclass(frozen=True)
class VENoise(UniformDraws):
    """VE's distribution: ln(sigma) ~ U(ln(sigma_min), ln(sigma_max)) (Table 1)."""

    sigma_min: float = 0.02
    sigma_max: float = 100.0

    def sigma(self, uniform: torch.Tensor) -> torch.Tensor:
        """Return the noise levels for draws from U(0, 1), a tensor of any shape."""
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** uniform


@dataclass(frozen=True)
class UniformLevels(UniformDraws):
    """iDDPM's distribution: each of a network's noise levels with equal probability (Table 1); on DDPM's chain, L_simple."""

    levels: NoiseLevels

    def sigma(self, uniform: torch.Tensor) -> torch.Tensor:
        """Return the noise levels for draws from U(0, 1), a tensor of any shape."""
        levels = self.levels.like(uniform)
        return levels[(uniform * len(levels)).long().clamp(max=len(levels) - 1)]


# Where the loss falls (Figure 5a)

NOISE_BANDS = (0.05, 0.2, 0.8, 3.2)  # noise levels that divide the record of the training loss into bands
NUM_BANDS = len(NOISE_BANDS) + 1


def by_noise_level(losses: torch.Tensor, sigma: torch.Tensor, importance: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
    """Return the mean loss in each band of noise levels: below the first edge, between each two, above the last.

    Args:
        losses, sigma, importance: (B,), one for each image.
        edges: (K,), rising noise levels, on the same device.

    Returns:
        (K + 1,); nan for a band without images.
    """
    in_band = torch.bucketize(sigma, edges)[:, None] == torch.arange(len(edges) + 1, device=sigma.device)
    weight = in_band * importance[:, None]
    return torch.where(in_band, weight * losses[:, None], 0).sum(dim=0) / weight.sum(dim=0)
