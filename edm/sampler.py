"""Sampling (the paper's Algorithms 1, 2 and 3): from noise to images along the probability-flow ODE, with or without churn."""

import functools
import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch

from edm.schedule import LINEAR, Schedule

SOLVERS = ("heun", "euler")


class State(NamedTuple):
    """Where the sampler stands after a step."""

    x: torch.Tensor  # (B, C, H, W), images plus noise of standard deviation sigma (the scaling divided out)
    sigma: float
    denoised: torch.Tensor  # (B, C, H, W), the step's first estimate of the clean images


def sample(
    denoiser,
    latents: torch.Tensor,
    sigma_steps: torch.Tensor,
    labels: torch.Tensor | None = None,
    schedule: Schedule = LINEAR,
    solver: str = "heun",
    alpha: float = 1.0,
    S_churn: float = 0.0,
    S_min: float = 0.0,
    S_max: float = math.inf,
    S_noise: float = 1.0,
    noise: Callable[[], torch.Tensor] | None = None,
    round_sigma: Callable[[float], float] = lambda sigma: sigma,
) -> Iterator[State]:
    """Algorithm 2 for any sigma(t) and s(t). By default that is sigma(t) = t and s(t) = 1, and, as S_churn is 0, Algorithm 1.

    Args:
        denoiser: D(x, sigma, labels) -> (B, C, H, W).
        latents: (B, C, H, W), unit normal. Their precision is the sampler's: float64 in the paper's experiments.
        sigma_steps: (N + 1,) noise levels sigma(t_i), falling, the last one 0.
        labels: one-hot (B, K) or None.
        schedule: sigma(t) and s(t).
        solver: "heun" (second order, 2N - 1 evaluations) or "euler" (first order, N evaluations).
        alpha: where in a step, above 0 and up to 1, the second evaluation is (Algorithm 3): 1 is Heun's method, 1/2 the
            midpoint method, 2/3 Ralston's.
        S_churn: how much noise is added and removed again over all the steps.
        S_min, S_max: the noise levels between which it is.
        S_noise: standard deviation of the added noise.
        noise: called once a step, where S_churn > 0, for unit normal noise of the latents' shape.
        round_sigma: the nearest noise level that the denoiser knows; by default it knows all.

    Yields:
        The state after each of the N steps; the last one's x holds the images.

    Raises:
        ValueError: an unknown solver, churn without noise, a noise level that the schedule does not reach.
    """
    if solver not in SOLVERS or (S_churn > 0 and noise is None):
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, and S_churn above 0 needs noise")

    @functools.cache  # Heun's step ends where the next one begins
    def moment(t: float) -> tuple[float, ...]:
        return schedule.sigma(t), schedule.s(t), *schedule.derivatives(t)

    def slope(x: torch.Tensor, t: float) -> tuple[torch.Tensor, torch.Tensor]:
        """dx/dt (Eq. 4) at x, images and noise scaled by s(t); and the denoised images."""
        sigma, s, dsigma, ds = moment(t)
        denoised = denoiser(x / s, sigma, labels).to(x.dtype)
        return (dsigma / sigma + ds / s) * x - dsigma * s / sigma * denoised, denoised

    sigma_steps = [*map(round_sigma, sigma_steps[:-1].tolist()), 0.0]
    num_steps = len(sigma_steps) - 1
    x = latents * sigma_steps[0]
    for sigma, sigma_next in pairwise(sigma_steps):
        sigma_hat = sigma
        if S_churn > 0:
            epsilon = S_noise * noise()
            if S_min <= sigma <= S_max:  # raise the noise level
                sigma_hat = max(sigma, round_sigma(sigma * (1 + min(S_churn / num_steps, math.sqrt(2) - 1))))
                x = x + math.sqrt(sigma_hat**2 - sigma**2) * epsilon

        t, t_next = schedule.t(sigma_hat), schedule.t(sigma_next)
        h = t_next - t
        x = x * schedule.s(t)
        d, denoised = slope(x, t)
        if solver == "heun" and sigma_next > 0:  # at 0 the slope is undefined
            d_prime, _ = slope(x + alpha * h * d, (1 - alpha) * t + alpha * t_next)
            d = (1 - 1 / (2 * alpha)) * d + 1 / (2 * alpha) * d_prime
        # Where sigma(t) never reaches 0, its last step goes along sigma itself instead of t.
        x = (x + h * d) / schedule.s(t_next) if math.isfinite(h) else denoised
        yield State(x, sigma_next, denoised)


def guided(denoiser, guidance: float):
    """Classifier-free guidance (Ho and Salimans, 2022): D(x; sigma) + guidance (D(x; sigma, labels) - D(x; sigma)).

    Args:
        denoiser: a conditional denoiser, trained with label dropout.
        guidance: 0 ignores the labels, 1 is plain conditional sampling (the denoiser itself), more exaggerates the class.

    What else the network puts out (`all_outputs`), its variance, is the conditional one's.
    """
    if guidance == 1:
        return denoiser

    def guided_denoiser(x, sigma, labels=None, **options):
        unconditional, conditional = denoiser(x, sigma), denoiser(x, sigma, labels, **options)
        D, others = conditional.tensor_split([x.shape[1]], dim=1)
        return torch.cat([unconditional + guidance * (D - unconditional), others], dim=1)

    return guided_denoiser


def clipped(denoiser):
    """The denoiser with its images clipped to the data's range, [-1, 1], as DDPM's sampler has them."""

    def clipped_denoiser(x, sigma, labels=None, **options):
        D, others = denoiser(x, sigma, labels, **options).tensor_split([x.shape[1]], dim=1)
        return torch.cat([D.clamp(-1, 1), others], dim=1)

    return clipped_denoiser
