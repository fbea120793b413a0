"""The training loss (the paper's Section 5, Eq. 8): a noise distribution, a weighting, and one expression.

E over y, sigma, n of  lambda(sigma) |D(y + n; sigma) - y|^2,   n ~ N(0, sigma^2 I)
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LogNormal:
    """EDM's distribution of training noise levels: ln(sigma) ~ N(P_mean, P_std^2) (Table 1)."""

    P_mean: float = -1.2
    P_std: float = 1.2

    def sigma(self, normal: torch.Tensor) -> torch.Tensor:
        """Noise levels from standard normal draws of any shape."""
        return (self.P_mean + self.P_std * normal).exp()

    def sample(self, batch_size: int, generator: torch.Generator) -> torch.Tensor:
        """(batch_size,) noise levels, on the generator's device."""
        return self.sigma(torch.randn(batch_size, generator=generator, device=generator.device))


def edm_weight(sigma: torch.Tensor, sigma_data: float) -> torch.Tensor:
    """EDM's lambda(sigma) = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 = 1 / c_out^2, which makes the loss start at 1
    for every pixel and noise level (Table 1)."""
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


NOISE_DISTRIBUTIONS = {"lognormal": LogNormal}
WEIGHTINGS = {"edm": edm_weight}


def denoising_loss(
    denoiser,
    y: torch.Tensor,
    n: torch.Tensor,
    sigma: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor | None = None,
) -> torch.Tensor:
    """lambda(sigma) |D(y + n; sigma) - y|^2, summed over channels and pixels.

    Args:
        denoiser: D(x, sigma, labels).
        y: (B, C, H, W), clean images in [-1, 1].
        n: (B, C, H, W), noise of standard deviation sigma.
        sigma, weight: (B,), noise level and lambda(sigma) of each image.
        labels: one-hot (B, K) or None.

    Returns:
        (B,), one loss an image.
    """
    error = denoiser(y + n, sigma, labels) - y
    return weight * error.square().sum(dim=(1, 2, 3))
