"""How likely images are under the deterministic sampler: its ODE (the paper's Eq. 1) as a continuous normalising flow, as in
Song et al., 2021 (arXiv 2011.13456, Section 4.3), with Hutchinson's estimate of the divergence."""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import torch


def dequantize(images: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """A point of each pixel's interval of grey levels: what makes the density of 8-bit images a likelihood.

    Args:
        images: (B, C, H, W) uint8.
        uniform: (B, C, H, W), draws from [0, 1).

    Returns:
        (B, C, H, W) in the draws' precision, in [-1, 1] but for half a level at the ends.
    """
    return (images - 0.5 + uniform) / 127.5 - 1


def bits_per_dimension(log_density: torch.Tensor, num_dimensions: int) -> torch.Tensor:
    """A log-density of dequantized images, in nats, as bits for each of their pixels and channels, of 2/255 each in width."""
    return -log_density / (num_dimensions * math.log(2)) + math.log2(127.5)


def trace_estimate(denoiser, x: torch.Tensor, sigma: float, labels: torch.Tensor | None, v: torch.Tensor):
    """D(x; sigma), and v^T (dD/dx) v of each image, (B,), whose mean over random signs v is the trace of dD/dx."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        D = denoiser(x, sigma, labels)
        (product,) = torch.autograd.grad(D, x, v.to(D.dtype))
    return D.detach().to(x.dtype), (product * v).flatten(1).sum(dim=1)


def log_density(
    denoiser,
    x: torch.Tensor,
    sigma_steps: torch.Tensor,
    noise: Callable[[], torch.Tensor],
    labels: torch.Tensor | None = None,
) -> Iterator[torch.Tensor]:
    """log p(x; sigma_min), in nats, by the way of every image up to sigma_max, where p is N(0, sigma_max^2 I).

    Along the solutions of dx/dsigma = (x - D(x; sigma)) / sigma the density of d pixels changes by
    d log p / d ln(sigma) = tr(dD/dx) - d. Heun's method follows x, the trapezoidal rule in ln(sigma) sums up the density.

    Args:
        denoiser: D(x, sigma, labels) -> (B, C, H, W), differentiable.
        x: (B, C, H, W); their precision is the ODE's.
        sigma_steps: (N + 1,), rising noise levels, above 0.
        noise: called before every evaluation for unit normal noise of x's shape, whose signs are Hutchinson's v.
        labels: one-hot (B, K) or None.

    Yields:
        After each of the N steps, of two evaluations with their gradients, log p(x; sigma_min), (B,), if p were
        N(0, sigma^2 I) at the noise level reached; the last one is the answer.
    """
    num_dimensions = x[0].numel()
    gained = torch.zeros(len(x), dtype=x.dtype, device=x.device)
    for sigma, sigma_next in pairwise(sigma_steps.tolist()):
        D, trace = trace_estimate(denoiser, x, sigma, labels, noise().sign())
        slope = (x - D) / sigma
        h = sigma_next - sigma
        D, trace_next = trace_estimate(denoiser, x + h * slope, sigma_next, labels, noise().sign())
        x = x + h * (slope + (x + h * slope - D) / sigma_next) / 2
        gained = gained + math.log(sigma_next / sigma) * (num_dimensions - (trace + trace_next) / 2)
        prior = -(x / sigma_next).square().flatten(1).sum(dim=1) / 2 - num_dimensions * math.log(
            sigma_next * math.sqrt(2 * math.pi)
        )
        yield prior + gained
