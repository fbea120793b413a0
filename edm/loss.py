"""The training loss (the paper's Section 5, Eq. 8): a noise distribution, a weighting, and one expression.

E over y, sigma, n of  lambda(sigma) |D(y + n; sigma) - y|^2,   n ~ N(0, sigma^2 I)

A noise distribution maps draws of a simple kind, a tensor of any shape, to noise levels: `sigma(draw)`; and makes
(batch_size,) of them on the generator's device: `sample(batch_size, generator)`. One that learns from the losses what to draw
(`ddpm_training.ImportanceSampledTimesteps`) has a say in the other methods of `NoiseDistribution`, too.
"""

from dataclasses import dataclass

import torch

from edm.schedule import VP, iddpm_levels


class NoiseDistribution:
    """What training asks of it, beside `sample`."""

    def importance(self, sigma: torch.Tensor) -> torch.Tensor:
        """What makes the mean loss of such draws an estimate of the one that is to be minimised: sigma (B,) -> (B,)."""
        return torch.ones_like(sigma)

    def update(self, sigma: torch.Tensor, losses: torch.Tensor) -> None:
        """Learn from a whole batch's noise levels and losses, (B,) each."""

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What a checkpoint must hold of it."""
        return {}


@dataclass(frozen=True)
class LogNormal(NoiseDistribution):
    """EDM's distribution of training noise levels: ln(sigma) ~ N(P_mean, P_std^2) (Table 1)."""

    P_mean: float = -1.2
    P_std: float = 1.2

    def sigma(self, normal: torch.Tensor) -> torch.Tensor:
        return (self.P_mean + self.P_std * normal).exp()

    def sample(self, batch_size: int, generator: torch.Generator) -> torch.Tensor:
        return self.sigma(torch.randn(batch_size, generator=generator, device=generator.device))


class UniformDraws(NoiseDistribution):
    """Noise levels from draws that are uniform in [0, 1)."""

    def sample(self, batch_size: int, generator: torch.Generator) -> torch.Tensor:
        return self.sigma(torch.rand(batch_size, generator=generator, device=generator.device))


@dataclass(frozen=True)
class VPNoise(UniformDraws):
    """VP's: sigma(t) of the VP schedule at t ~ U(epsilon_t, 1)."""

    beta_d: float = 19.9
    beta_min: float = 0.1
    epsilon_t: float = 1e-5

    def sigma(self, uniform: torch.Tensor) -> torch.Tensor:
        return VP(self.beta_d, self.beta_min).sigma(1 + uniform * (self.epsilon_t - 1))


@dataclass(frozen=True)
class VENoise(UniformDraws):
    """VE's: ln(sigma) ~ U(ln(sigma_min), ln(sigma_max))."""

    sigma_min: float = 0.02
    sigma_max: float = 100.0

    def sigma(self, uniform: torch.Tensor) -> torch.Tensor:
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** uniform


@dataclass(frozen=True)
class iDDPMNoise(UniformDraws):
    """iDDPM's: one of its noise levels u_j, j ~ U{0, ..., M - 1}."""

    M: int = 1000
    C_1: float = 0.001
    C_2: float = 0.008

    def sigma(self, uniform: torch.Tensor) -> torch.Tensor:
        j = (uniform * self.M).long().clamp(max=self.M - 1)
        return iddpm_levels(self.M, self.C_1, self.C_2, uniform.dtype, uniform.device)[j]


def edm_weight(sigma: torch.Tensor, sigma_data: float) -> torch.Tensor:
    """EDM's lambda(sigma) = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 = 1 / c_out^2, which makes the loss start at 1
    for every pixel and noise level (Table 1)."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def inverse_variance(sigma: torch.Tensor, sigma_data: float) -> torch.Tensor:
    """lambda(sigma) = 1 / sigma^2, the square error of the noise, as VP, VE and iDDPM have it (Table 1)."""
    return 1 / sigma**2


NOISE_BANDS = (0.05, 0.2, 0.8, 3.2)  # the noise levels between which training's losses are recorded apart
NUM_BANDS = len(NOISE_BANDS) + 1


def by_noise_level(losses: torch.Tensor, sigma: torch.Tensor, importance: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
    """The mean loss of the images whose noise is below the first of the edges, between each two, and above the last.

    Args:
        losses, sigma, importance: (B,), of each image.
        edges: (K,), rising noise levels, on the same device.

    Returns:
        (K + 1,), nan where there are no images, and not finite where one of the losses is not.
    """
    among = torch.bucketize(sigma, edges)[:, None] == torch.arange(len(edges) + 1, device=sigma.device)
    weight = among * importance[:, None]
    return torch.where(among, weight * losses[:, None], 0).sum(dim=0) / weight.sum(dim=0)


NOISE_DISTRIBUTIONS = {"lognormal": LogNormal, "vp": VPNoise, "ve": VENoise, "iddpm": iDDPMNoise}
WEIGHTINGS = {"edm": edm_weight, "vp": inverse_variance, "ve": inverse_variance, "iddpm": inverse_variance}


def denoising_loss(
    denoiser,
    y: torch.Tensor,
    n: torch.Tensor,
    sigma: torch.Tensor,
    weight: torch.Tensor,
    **conditions: torch.Tensor,
) -> torch.Tensor:
    """lambda(sigma) |D(y + n; sigma) - y|^2, summed over channels and pixels.

    Args:
        denoiser: D(x, sigma, ...).
        y: (B, C, H, W), clean images in [-1, 1].
        n: (B, C, H, W), noise of standard deviation sigma.
        sigma, weight: (B,), noise level and lambda(sigma) of each image.
        conditions: what else D is told: `labels`, one-hot (B, K), and `augment_labels` (B, A).

    Returns:
        (B,), one loss an image.
    """
    error = denoiser(y + n, sigma, **conditions) - y
    return weight * error.square().sum(dim=(1, 2, 3))
