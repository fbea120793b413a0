"""Preconditioning: how a raw network F becomes a denoiser D (the paper's Section 5, Eq. 7).

D(x; sigma) = c_skip(sigma) x + c_out(sigma) F(c_in(sigma) x; c_noise(sigma))
"""

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class EDMPreconditioning:
    """The EDM column of Table 1, derived in Appendix B.6: the network's input and its training target have unit
    variance at every noise level, and c_skip makes c_out, by which the network's errors are amplified, as small as possible.

    Every method maps sigma, a tensor of any shape, to a tensor of that shape.
    """

    sigma_data: float = 0.5  # standard deviation of the data

    def c_skip(self, sigma: torch.Tensor) -> torch.Tensor:
        return self.sigma_data**2 / (sigma**2 + self.sigma_data**2)

    def c_out(self, sigma: torch.Tensor) -> torch.Tensor:
        return sigma * self.sigma_data / (sigma**2 + self.sigma_data**2).sqrt()

    def c_in(self, sigma: torch.Tensor) -> torch.Tensor:
        return 1 / (sigma**2 + self.sigma_data**2).sqrt()

    def c_noise(self, sigma: torch.Tensor) -> torch.Tensor:
        return sigma.log() / 4


PRECONDITIONINGS = {"edm": EDMPreconditioning}


class Denoiser(nn.Module):
    """D(x; sigma), the estimate of the clean image (Eq. 7).

    Args:
        model: the raw network F(x, c_noise, labels, augment_labels).
        preconditioning: the formulation's c_skip, c_out, c_in and c_noise.
    """

    def __init__(self, model: nn.Module, preconditioning: EDMPreconditioning):
        super().__init__()
        self.model = model
        self.preconditioning = preconditioning

    def forward(
        self,
        x: torch.Tensor,
        sigma: torch.Tensor | float,
        labels: torch.Tensor | None = None,
        augment_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Denoise, in the precision of the network's parameters (autocast reaches F alone).

        Args:
            x: (B, C, H, W), clean images in [-1, 1] plus noise of standard deviation sigma.
            sigma: the noise level, above 0: a scalar or (B,).
            labels: one-hot (B, K), or None for the zero vector (unconditional).
            augment_labels: (B, A), or None for zeros. Only the training loss passes them.

        Returns:
            (B, C, H, W), the expected clean images.
        """
        dtype = next(self.model.parameters()).dtype
        x = x.to(dtype)
        sigma = torch.as_tensor(sigma, dtype=dtype, device=x.device).expand(x.shape[0])
        c_skip, c_out, c_in = (
            c(sigma)[:, None, None, None]
            for c in (self.preconditioning.c_skip, self.preconditioning.c_out, self.preconditioning.c_in)
        )
        F = self.model(c_in * x, self.preconditioning.c_noise(sigma), labels, augment_labels)
        return c_skip * x + c_out * F.to(dtype)
