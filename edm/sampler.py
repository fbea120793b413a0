"""Sampling (the paper's Algorithms 1 and 2): from noise to images along the probability-flow ODE, with or without churn."""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch


class State(NamedTuple):
    """Where the sampler stands after a step."""

    x: torch.Tensor  # (B, C, H, W), images plus noise of standard deviation sigma
    sigma: float
    denoised: torch.Tensor  # (B, C, H, W), the step's first estimate of the clean images


def edm_sampler(
    denoiser,
    latents: torch.Tensor,
    t_steps: torch.Tensor,
    labels: torch.Tensor | None = None,
    solver: str = "heun",
    S_churn: float = 0.0,
    S_min: float = 0.0,
    S_max: float = math.inf,
    S_noise: float = 1.0,
    noise: Callable[[], torch.Tensor] | None = None,
) -> Iterator[State]:
    """Algorithm 2 with sigma(t) = t and s(t) = 1; at S_churn = 0 it is Algorithm 1, the deterministic sampler.

    Args:
        denoiser: D(x, sigma, labels) -> (B, C, H, W).
        latents: (B, C, H, W), unit normal. Their precision is the sampler's: float64 in the paper's experiments.
        t_steps: (N + 1,) noise levels, falling, the last one 0.
        labels: one-hot (B, K) or None.
        solver: "heun" (second order, 2N - 1 evaluations) or "euler" (first order, N evaluations).
        S_churn: how much noise is added and removed again over all the steps.
        S_min, S_max: the noise levels between which it is.
        S_noise: standard deviation of the added noise.
        noise: called once a step, where S_churn > 0, for unit normal noise of the latents' shape.

    Yields:
        The state after each of the N steps; the last one's x holds the images.
    """
    t_steps = t_steps.tolist()
    num_steps = len(t_steps) - 1
    x = latents * t_steps[0]
    for t, t_next in pairwise(t_steps):
        t_hat = t
        if S_churn > 0:
            epsilon = S_noise * noise()
            if S_min <= t <= S_max:  # raise the noise level from t to t_hat
                t_hat = t * (1 + min(S_churn / num_steps, math.sqrt(2) - 1))
                x = x + math.sqrt(t_hat**2 - t**2) * epsilon

        denoised = denoiser(x, t_hat, labels).to(x.dtype)
        slope = (x - denoised) / t_hat  # dx/dt at t_hat (Eq. 3)
        x_next = x + (t_next - t_hat) * slope
        if solver == "heun" and t_next > 0:  # the trapezoidal rule; at 0 the slope is undefined
            slope_next = (x_next - denoiser(x_next, t_next, labels).to(x.dtype)) / t_next
            x_next = x + (t_next - t_hat) * (slope + slope_next) / 2
        x = x_next
        yield State(x, t_next, denoised)


def guided(denoiser, guidance: float):
    """Classifier-free guidance (Ho and Salimans, 2022): D(x; sigma) + guidance (D(x; sigma, labels) - D(x; sigma)).

    Args:
        denoiser: a conditional denoiser, trained with label dropout.
        guidance: 0 ignores the labels, 1 is plain conditional sampling (the denoiser itself), more exaggerates the class.
    """
    if guidance == 1:
        return denoiser

    def guided_denoiser(x, sigma, labels=None):
        unconditional = denoiser(x, sigma)
        return unconditional + guidance * (denoiser(x, sigma, labels) - unconditional)

    return guided_denoiser
