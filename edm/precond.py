"""Preconditioning: how a raw network F becomes a denoiser D (the paper's Section 5, Eq. 7; Table 1).

D(x; sigma) = c_skip(sigma) x + c_out(sigma) F(c_in(sigma) x; c_noise(sigma))
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from edm.schedule import VP, iddpm_levels


class Preconditioning:
    """A formulation: c_skip, c_out, c_in and c_noise, each of which maps sigma, a tensor of any shape, to one of that shape.

    A sampler keeps to the noise levels that the network knows: those from `sigma_min` to `sigma_max` that `round_sigma`
    leaves as they are. `outputs` is how many channels the network puts out for each of the image's; D uses the first.
    """

    sigma_min = 0.0
    sigma_max = math.inf
    outputs = 1

    def round_sigma(self, sigma: torch.Tensor) -> torch.Tensor:
        """The nearest noise level that the network knows."""
        return sigma


@dataclass(frozen=True)
class EDMPreconditioning(Preconditioning):
    """The EDM column, derived in Appendix B.6: the network's input and its training target have unit variance at every
    noise level, and c_skip makes c_out, by which the network's errors are amplified, as small as possible."""

    sigma_data: float = 0.5  # standard deviation of the data

    def c_skip(self, sigma: torch.Tensor) -> torch.Tensor:
        return self.sigma_data**2 / (sigma**2 + self.sigma_data**2)

    def c_out(self, sigma: torch.Tensor) -> torch.Tensor:
        return sigma * self.sigma_data / (sigma**2 + self.sigma_data**2).sqrt()

    def c_in(self, sigma: torch.Tensor) -> torch.Tensor:
        return 1 / (sigma**2 + self.sigma_data**2).sqrt()

    def c_noise(self, sigma: torch.Tensor) -> torch.Tensor:
        return sigma.log() / 4


@dataclass(frozen=True)
class VEPreconditioning(Preconditioning):
    """The VE column: the network sees the noisy image as it is and predicts the noise, negated, at unit variance."""

    sigma_min: float = 0.02
    sigma_max: float = 100.0

    def c_skip(self, sigma: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(sigma)

    def c_out(self, sigma: torch.Tensor) -> torch.Tensor:
        return sigma

    def c_in(self, sigma: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(sigma)

    def c_noise(self, sigma: torch.Tensor) -> torch.Tensor:
        return (sigma / 2).log()


@dataclass(frozen=True)
class VPPreconditioning(Preconditioning):
    """The VP column: the network sees the noisy image at unit variance and predicts the noise; its noise conditioning is
    the time t of the VP schedule, from 0 to M - 1."""

    beta_d: float = 19.9
    beta_min: float = 0.1
    M: int = 1000
    epsilon_t: float = 1e-5

    @property
    def schedule(self) -> VP:
        return VP(self.beta_d, self.beta_min)

    @property
    def sigma_min(self) -> float:
        return self.schedule.sigma(torch.tensor(self.epsilon_t, dtype=torch.float64)).item()

    @property
    def sigma_max(self) -> float:
        return self.schedule.sigma(torch.tensor(1.0, dtype=torch.float64)).item()

    def c_skip(self, sigma: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(sigma)

    def c_out(self, sigma: torch.Tensor) -> torch.Tensor:
        return -sigma

    def c_in(self, sigma: torch.Tensor) -> torch.Tensor:
        return 1 / (sigma**2 + 1).sqrt()

    def c_noise(self, sigma: torch.Tensor) -> torch.Tensor:
        return (self.M - 1) * self.schedule.inverse(sigma)


@dataclass(frozen=True)
class iDDPMPreconditioning(Preconditioning):
    """The iDDPM column: as VP, but the network knows M noise levels u_j alone, by their index M - 1 - j, and also puts
    out a variance, of which D has no use."""

    M: int = 1000
    C_1: float = 0.001
    C_2: float = 0.008

    outputs = 2
    c_skip, c_out, c_in = VPPreconditioning.c_skip, VPPreconditioning.c_out, VPPreconditioning.c_in

    @property
    def sigma_min(self) -> float:
        return iddpm_levels(self.M, self.C_1, self.C_2)[self.M - 1].item()

    @property
    def sigma_max(self) -> float:
        return iddpm_levels(self.M, self.C_1, self.C_2)[0].item()

    def nearest(self, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The index j of the nearest u_j, and u_j."""
        u = iddpm_levels(self.M, self.C_1, self.C_2, sigma.dtype, sigma.device)
        j = (sigma[..., None] - u).abs().argmin(dim=-1)
        return j, u[j]

    def c_noise(self, sigma: torch.Tensor) -> torch.Tensor:
        return (self.M - 1 - self.nearest(sigma)[0]).to(sigma.dtype)

    def round_sigma(self, sigma: torch.Tensor) -> torch.Tensor:
        return self.nearest(sigma)[1]


PRECONDITIONINGS = {
    "edm": EDMPreconditioning,
    "vp": VPPreconditioning,
    "ve": VEPreconditioning,
    "iddpm": iDDPMPreconditioning,
}


class Denoiser(nn.Module):
    """D(x; sigma), the estimate of the clean image (Eq. 7).

    Args:
        model: the raw network F(x, c_noise, labels, augment_labels), of `preconditioning.outputs` times the image's channels.
        preconditioning: the formulation's c_skip, c_out, c_in and c_noise.
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
        """Denoise, in the precision of the network's parameters (autocast reaches F alone).

        Args:
            x: (B, C, H, W), clean images in [-1, 1] plus noise of standard deviation sigma.
            sigma: the noise level, above 0: a scalar or (B,).
            labels: one-hot (B, K), or None for the zero vector (unconditional).
            augment_labels: (B, A), or None for zeros. Only the training loss passes them.
            all_outputs: put what else the network puts out (`outputs`) after D, along the channels.

        Returns:
            (B, C, H, W), the expected clean images.
        """
        dtype = next(self.model.parameters()).dtype
        x = x.to(dtype)
        if not isinstance(sigma, torch.Tensor):
            sigma = x.new_full((), sigma)  # unlike a copy of the number, this does not wait for a GPU
        sigma = sigma.to(x).expand(x.shape[0])
        c_skip, c_out, c_in = (
            c(sigma)[:, None, None, None]
            for c in (self.preconditioning.c_skip, self.preconditioning.c_out, self.preconditioning.c_in)
        )
        F = self.model(c_in * x, self.preconditioning.c_noise(sigma), labels, augment_labels)
        D = c_skip * x + c_out * F[:, : x.shape[1]].to(dtype)
        return torch.cat([D, F[:, x.shape[1] :].to(dtype)], dim=1) if all_outputs else D

    def round_sigma(self, sigma: float) -> float:
        """The nearest noise level that the network knows."""
        return self.preconditioning.round_sigma(torch.tensor(sigma, dtype=torch.float64)).item()
