"""What a denoiser is, and how a raw network F becomes one (the paper's Sections 2 and 5, Eq. 3 and 7, Table 1).

D(x; sigma) = c_skip(sigma) x + c_out(sigma) F(c_in(sigma) x; c_noise(sigma))
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from edm.schedule import VP, NoiseLevels, iddpm_levels


class Denoiser(Protocol):
    """Any callable that estimates clean images from noisy ones: a trained network, a closed form, a guided pair.

    Samplers, losses, guidance and likelihood know this contract alone, so each of them works with every denoiser.
    """

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor | float, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Return D(x; sigma), the estimate of the clean images.

        Args:
            x: (B, C, H, W), clean images in [-1, 1] plus noise of standard deviation sigma.
            sigma: the noise level, above 0: a number, a scalar tensor or (B,).
            labels: one-hot classes (B, K), or None for no class.

        Returns:
            (B, C, H, W).
        """


def score(x: torch.Tensor, sigma: torch.Tensor | float, denoised: torch.Tensor) -> torch.Tensor:
    """Return the score, the gradient of log p(x; sigma) with respect to x: (D(x; sigma) - x) / sigma^2 (Eq. 3).

    Takes noisy images x (B, C, H, W), their noise level, which broadcasts to x, and D(x; sigma), (B, C, H, W).
    """
    return (denoised - x) / sigma**2


class Preconditioning:
    """The base of the columns of Table 1.

    Each of c_skip, c_out, c_in and c_noise maps a tensor of noise levels to a tensor of the same shape.

    Attributes:
        sigma_min, sigma_max: the lowest and the highest noise level that the network is trained for.
        outputs: the number of the network's output channels for each image channel. D uses the first C of images with C.
    """

    sigma_min = 0.0
    sigma_max = math.inf
    outputs = 1

    def c_skip(self, sigma: torch.Tensor) -> torch.Tensor:
        """Return 1, as in all columns but EDM's."""
        return torch.ones_like(sigma)

    def round_sigma(self, sigma: torch.Tensor) -> torch.Tensor:
        """Return the nearest noise level that the network knows; here it knows all."""
        return sigma


@dataclass(frozen=True)
class EDMPreconditioning(Preconditioning):
    """The EDM column, derived in Appendix B.6.

    The network's input and its training target have mean square 1 at every noise level, and c_skip makes c_out, which
    amplifies the network's errors, as small as possible. Both hold for data whose mean square is sigma_data^2.

    Args:
        sigma_data: standard deviation of the data; of data whose mean is not 0, the root mean square.
    """

    sigma_data: float = 0.5

    def c_skip(self, sigma: torch.Tensor) -> torch.Tensor:
        return self.sigma_data**2 / (sigma**2 + self.sigma_data**2)

    def c_out(self, sigma: torch.Tensor) -> torch.Tensor:
        return sigma * self.sigma_data / (sigma**2 + self.sigma_data**2).sqrt()

    def c_in(self, sigma: torch.Tensor) -> torch.Tensor:
        return 1 / (sigma**2 + self.sigma_data**2).sqrt()

    def c_noise(self, sigma: torch.Tensor) -> torch.Tensor:
        return sigma.log() / 4


class VEPreconditioning(Preconditioning):
    """The VE column: the network sees the noisy image as it is, and predicts the negated noise at unit variance."""

    sigma_min, sigma_max = 0.02, 100.0

    def c_out(self, sigma: torch.Tensor) -> torch.Tensor:
        return sigma

    def c_in(self, sigma: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(sigma)

    def c_noise(self, sigma: torch.Tensor) -> torch.Tensor:
        return (sigma / 2).log()


class NoisePrediction(Preconditioning):
    """What VP and iDDPM share: for data of variance 1 the network sees unit variance, and it predicts the noise."""

    def c_out(self, sigma: torch.Tensor) -> torch.Tensor:
        return -sigma

    def c_in(self, sigma: torch.Tensor) -> torch.Tensor:
        return 1 / (sigma**2 + 1).sqrt()


class VPPreconditioning(NoisePrediction):
    """The VP column: the network is told the time t of the VP schedule, from 1e-5 (epsilon_t) to 1, times M - 1 = 999."""

    sigma_min, sigma_max = VP().sigma(torch.tensor([1e-5, 1.0], dtype=torch.float64)).tolist()

    def c_noise(self, sigma: torch.Tensor) -> torch.Tensor:
        return 999 * VP().inverse(sigma)


class iDDPMPreconditioning(NoisePrediction):
    """The iDDPM column: the network knows M noise levels alone, and is told the index of the nearest one.

    Args:
        levels: the noise levels, rising; by default Table 1's u_j above 0. Those of DDPM's chains fit as well (`ddpm.py`).
        outputs: 2 if the network also puts out a variance, of which D makes no use, else 1.
    """

    def __init__(self, levels: NoiseLevels | None = None, outputs: int = 2):
        self.levels = levels or NoiseLevels(iddpm_levels()[:-1].flip(0))
        self.outputs = outputs
        self.sigma_min, self.sigma_max = self.levels.sigma[[0, -1]].tolist()

    def c_noise(self, sigma: torch.Tensor) -> torch.Tensor:
        """Return the index of the nearest level, from 0 for the lowest (M - 1 - j in Table 1).

        Below half of the lowest level it is -1, because u_M = 0 is nearer.
        """
        is_nearest_to_0 = sigma < self.levels.like(sigma)[0] / 2
        return torch.where(is_nearest_to_0, -1, self.levels.nearest(sigma)).to(sigma.dtype)

    def round_sigma(self, sigma: torch.Tensor) -> torch.Tensor:
        return self.levels.like(sigma)[self.levels.nearest(sigma)]


class PreconditionedDenoiser(nn.Module):
    """A network as a denoiser (Eq. 7).

    Args:
        model: the raw network F(x, c_noise, labels, augment_labels), with `preconditioning.outputs` times the image's channels.
        preconditioning: gives c_skip, c_out, c_in and c_noise.
    """

    def __init__(self, model: nn.Module, preconditioning: Preconditioning):
        super().__init__()
        self.model = model
        self.preconditioning = preconditioning

    def forward(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor | float,
        labels: torch.Tensor | None = None,
        augment_labels: torch.Tensor | None = None,
        all_outputs: bool = False,
    ) -> torch.Tensor:
        """Return D(x; sigma), in the precision of the network's parameters. Autocast affects F alone.

        Args:
            x, sigma, labels: as `Denoiser` says.
            augment_labels: (B, A), how the clean images were augmented (Appendix F.2), or None for zeros: not at all.
            all_outputs: append the network's further outputs (`Preconditioning.outputs`) to D, along the channels.

        Returns:
            (B, C, H, W), the expected clean images; with `all_outputs` (B, outputs C, H, W).
        """
        p, dtype, channels = self.preconditioning, next(self.model.parameters()).dtype, x.shape[1]
        x = x.to(dtype)
        if not isinstance(sigma, torch.Tensor):
            sigma = x.new_full((), sigma)  # on the GPU, without waiting for it as a copy of a number would
        sigma = sigma.to(x).expand(x.shape[0])
        per_image = sigma[:, None, None, None]
        F = self.model(p.c_in(per_image) * x, p.c_noise(sigma), labels, augment_labels).to(dtype)
        D = p.c_skip(per_image) * x + p.c_out(per_image) * F[:, :channels]
        return torch.cat([D, F[:, channels:]], dim=1) if all_outputs else D

    def round_sigma(self, sigma: float) -> float:
        """Return the nearest noise level that the network knows."""
        return self.preconditioning.round_sigma(torch.tensor(sigma, dtype=torch.float64)).item()
