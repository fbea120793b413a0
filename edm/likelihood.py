"""The log-likelihood of images under the probability flow ODE (the paper's Eq. 1).

The ODE is a continuous normalizing flow (Song et al., 2021, arXiv 2011.13456, Section 4.3). Its divergence is estimated with
random signs (Hutchinson's estimate).
"""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import torch

from edm.precond import Denoiser, score


def denoise_with_trace(
    denoiser: Denoiser, x: torch.Tensor, sigma: float, labels: torch.Tensor | None, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return D(x; sigma) and v^T (dD/dx) v, (B,), which estimates the trace of dD/dx if v (B, C, H, W) are random signs."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        D = denoiser(x, sigma, labels)
        (product,) = torch.autograd.grad(D, x, v.to(D.dtype))
    return D.detach().to(x.dtype), (product * v).flatten(1).sum(dim=1)


def log_density(
    denoiser: Denoiser,
    x: torch.Tensor,
    sigma_steps: torch.Tensor,
    noise: Callable[[], torch.Tensor],
    labels: torch.Tensor | None = None,
) -> Iterator[torch.Tensor]:
    """Estimate log p(x; sigma_min), in nats, by following the ODE from sigma_min up to sigma_max, where p is almost Gaussian.

    Along the solutions of dx/dsigma = -sigma score(x; sigma) (Eq. 1), d log p / d ln(sigma) = tr(dD/dx) - d for d pixels.
    Heun's method integrates x, the trapezoidal rule in ln(sigma) integrates log p.

    Args:
        denoiser: differentiable.
        x: (B, C, H, W); the ODE is solved in its dtype.
        sigma_steps: (N + 1,), rising noise levels, above 0.
        noise: returns new unit normal noise of x's shape, for the signs in Hutchinson's estimate; called once per evaluation.
        labels: one-hot (B, K) or None.

    Yields:
        After each of the N steps an estimate of log p(x; sigma_min), (B,), assuming that the density at the current noise level
        is N(0, sigma^2 I). The last one is the answer. A step costs two evaluations with their gradients.
    """
    d = x[0].numel()
    change = torch.zeros(len(x), dtype=x.dtype, device=x.device)  # of log p, from sigma_min to sigma
    for sigma, sigma_next in pairwise(sigma_steps.tolist()):
        D, trace = denoise_with_trace(denoiser, x, sigma, labels, noise().sign())
        slope = -sigma * score(x, sigma, D)
        x_euler = x + (sigma_next - sigma) * slope
        D, trace_next = denoise_with_trace(denoiser, x_euler, sigma_next, labels, noise().sign())
        slope_next = -sigma_next * score(x_euler, sigma_next, D)
        x = x + (sigma_next - sigma) * (slope + slope_next) / 2
        change = change + math.log(sigma_next / sigma) * ((trace + trace_next) / 2 - d)
        log_normal = -(x / sigma_next).square().flatten(1).sum(dim=1) / 2 - d * math.log(sigma_next * math.sqrt(2 * math.pi))
        yield log_normal - change
