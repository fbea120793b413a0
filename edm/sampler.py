"""Samplers: from noise to images along the probability-flow ODE, with or without added noise (Algorithms 1, 2 and 3).

`heun_sampler` and `stochastic_sampler` are Algorithms 1 and 2 as the paper prints them. `sample`, a generator, covers the rest
of the design space: any sigma(t) and s(t), every solver, churn, and networks that know only some noise levels.
"""

import functools
import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch

from edm.precond import Denoiser, score
from edm.schedule import LINEAR, Schedule

SOLVERS = ("heun", "euler", "dpmpp_2m")


def heun_sampler(
    D: Denoiser, latents: torch.Tensor, t_steps: torch.Tensor, labels: torch.Tensor | None = None, schedule: Schedule = LINEAR
) -> torch.Tensor:
    """Follow the ODE from noise to images with Heun's second-order method (Algorithm 1).

    Args:
        D: the denoiser.
        latents: (B, C, H, W), noise of unit variance.
        t_steps: (N + 1,), the times t_0 > ... > t_N; the noise level at t_N is 0.
        labels: one-hot (B, K) or None.
        schedule: sigma(t) and s(t).

    Returns:
        (B, C, H, W), the images.
    """
    sigma, s = schedule.sigma, schedule.s

    def dx_dt(x: torch.Tensor, t: float) -> torch.Tensor:
        dsigma, ds = schedule.derivatives(t)
        return (dsigma / sigma(t) + ds / s(t)) * x - dsigma * s(t) / sigma(t) * D(x / s(t), sigma(t), labels)

    t = t_steps.tolist()
    x = sigma(t[0]) * s(t[0]) * latents
    for t_i, t_next in pairwise(t):
        d = dx_dt(x, t_i)
        x_next = x + (t_next - t_i) * d  # Euler step
        if sigma(t_next) != 0:  # 2nd order correction
            d_prime = dx_dt(x_next, t_next)
            x_next = x + (t_next - t_i) * (d / 2 + d_prime / 2)
        x = x_next
    return x


def stochastic_sampler(
    D: Denoiser,
    latents: torch.Tensor,
    t_steps: torch.Tensor,
    noise: Callable[[], torch.Tensor],
    S_churn: float,
    S_min: float = 0.0,
    S_max: float = math.inf,
    S_noise: float = 1.0,
    labels: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sample with churn (Algorithm 2): add some noise before every step, then step back from the higher noise level.

    The exchange of old noise for new corrects errors made in earlier steps. With small steps it follows the SDE (Eq. 6; dt is
    negative on the way from noise to images, and sigma(t) = t here):

        dx = - sigma'(t) sigma(t) score(x; sigma(t)) dt    the ODE (Eq. 1)
             - beta(t) sigma(t)^2 score(x; sigma(t)) dt    removes noise
             + sqrt(2 beta(t)) sigma(t) dw                 adds as much new noise

    A step of length h has beta = gamma / h, where gamma = S_churn / N, but at most sqrt(2) - 1. S_churn = 0 leaves the ODE.

    Args:
        D, latents, t_steps, labels: as in `heun_sampler`.
        noise: called once a step; returns noise of unit variance of the latents' shape.
        S_churn: the total amount of churn, spread over the N steps. Each step multiplies the noise level by 1 + gamma.
        S_min, S_max: the noise levels between which it is added.
        S_noise: standard deviation of the added noise; slightly above 1 makes up for detail that D removes.

    Returns:
        (B, C, H, W), the images.
    """
    t = t_steps.tolist()
    x = t[0] * latents
    for t_i, t_next in pairwise(t):
        gamma = min(S_churn / (len(t) - 1), math.sqrt(2) - 1) if S_min <= t_i <= S_max else 0.0
        t_hat = t_i + gamma * t_i
        x_hat = x + math.sqrt(t_hat**2 - t_i**2) * S_noise * noise()
        d = (x_hat - D(x_hat, t_hat, labels)) / t_hat
        x = x_hat + (t_next - t_hat) * d
        if t_next != 0:
            d_prime = (x - D(x, t_next, labels)) / t_next
            x = x_hat + (t_next - t_hat) * (d / 2 + d_prime / 2)
    return x


class State(NamedTuple):
    """What a sampler yields after each step."""

    x: torch.Tensor  # (B, C, H, W), images plus noise of standard deviation sigma (the scaling divided out)
    sigma: float
    denoised: torch.Tensor  # (B, C, H, W), the estimate of the clean images at the start of the step


def sample(
    denoiser: Denoiser,
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
    """Yield the states of a sampler with any sampling choice of Table 1, with or without churn; by default Algorithm 1's.

    Without churn this solves the ODE (Eq. 4), where the score is that of the unscaled images x / s:

        dx/dt = s'(t) / s(t) x - s(t) sigma'(t) sigma(t) score(x / s(t); sigma(t))

    (The paper has s(t)^2, and the gradient of log p(x / s) with respect to x, which is the score divided by s.)

    Args:
        denoiser: D(x, sigma, labels).
        latents: (B, C, H, W), noise of unit variance. The sampler works in their precision, float64 in the paper.
        sigma_steps: (N + 1,), the noise levels sigma(t_i), falling, the last one 0.
        labels: one-hot (B, K) or None.
        schedule: sigma(t) and s(t); the steps of dpmpp_2m do not depend on it.
        solver: "heun" (2nd order, 2N - 1 evaluations), "euler" (1st order, N) or "dpmpp_2m" (2nd order, N, without churn).
        alpha: where in a step the second evaluation lies (Algorithm 3), in (0, 1]: 1 is Heun's method, 1/2 the midpoint
            method, 2/3 Ralston's.
        S_churn, S_min, S_max, S_noise: as in `stochastic_sampler`.
        noise: called once a step if S_churn > 0; returns noise of unit variance of the latents' shape.
        round_sigma: returns the nearest noise level that the denoiser knows. By default it knows all.

    Yields:
        The state after each of the N steps; the last one's x holds the images.

    Raises:
        ValueError: an unknown solver, churn without noise or with dpmpp_2m, a noise level that the schedule does not reach.
    """
    if solver not in SOLVERS or (S_churn > 0 and (noise is None or solver == "dpmpp_2m")):
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}; S_churn above 0 needs noise, and heun or euler")
    sigma_steps = [*map(round_sigma, sigma_steps[:-1].tolist()), 0.0]
    x = latents * sigma_steps[0]
    if solver == "dpmpp_2m":
        yield from dpmpp_2m(denoiser, x, sigma_steps, labels)
        return

    schedule_at = functools.cache(lambda t: (schedule.sigma(t), schedule.s(t), *schedule.derivatives(t)))  # steps share ends

    def dx_dt(x: torch.Tensor, t: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the slope of the ODE (Eq. 4) and the denoised images."""
        sigma, s, dsigma, ds = schedule_at(t)
        denoised = denoiser(x / s, sigma, labels).to(x.dtype)
        return ds / s * x - s * dsigma * sigma * score(x / s, sigma, denoised), denoised

    for sigma, sigma_next in pairwise(sigma_steps):
        gamma = min(S_churn / (len(sigma_steps) - 1), math.sqrt(2) - 1) if S_min <= sigma <= S_max else 0.0
        sigma_hat = max(sigma, round_sigma(sigma + gamma * sigma)) if gamma > 0 else sigma
        if S_churn > 0:  # raise the noise level, as Algorithm 2 does
            x = x + math.sqrt(sigma_hat**2 - sigma**2) * (S_noise * noise())

        t, t_next = schedule.t(sigma_hat), schedule.t(sigma_next)
        h = t_next - t
        x = x * schedule.s(t)
        d, denoised = dx_dt(x, t)
        if solver == "heun" and sigma_next > 0:  # Algorithm 3: a second slope at t + alpha h. At noise level 0 there is none.
            d_prime, _ = dx_dt(x + alpha * h * d, (1 - alpha) * t + alpha * t_next)
            d = (1 - 1 / (2 * alpha)) * d + 1 / (2 * alpha) * d_prime
        # If sigma(t) never reaches 0, the last step is infinitely long in t. Along sigma it ends at the denoised image.
        x = (x + h * d) / schedule.s(t_next) if math.isfinite(h) else denoised
        yield State(x, sigma_next, denoised)


def dpmpp_2m(denoiser: Denoiser, x: torch.Tensor, sigmas: list[float], labels: torch.Tensor | None) -> Iterator[State]:
    """Follow the ODE with DPM-Solver++(2M) (Lu et al., 2022, arXiv 2211.01095): second order with one evaluation a step.

    Without the scaling, Eq. 4 is dx/dsigma = (x - D) / sigma for any sigma(t), that is d(x / sigma) = -D / sigma^2 dsigma. With
    a constant D* for D, x_{i+1} = sigma_{i+1} / sigma_i x_i + (1 - sigma_{i+1} / sigma_i) D* solves it exactly. The step is of
    second order if D* is D in its middle, extrapolated linearly in lambda = -ln(sigma) from this step and the one before:

        D* = D_i + h_i / (2 h_{i-1}) (D_i - D_{i-1}),  where h_i = lambda_{i+1} - lambda_i = ln(sigma_i / sigma_{i+1})

    D* is D_i in the first step, and in the last one, which ends at D. x has the noise level sigmas[0]; the rest as in `sample`.
    """
    h_before = D_before = 0.0
    for sigma, sigma_next in pairwise(sigmas):
        D = denoiser(x, sigma, labels).to(x.dtype)
        h = math.log(sigma / sigma_next) if sigma_next > 0 else 0.0
        extrapolated = D + h / (2 * h_before) * (D - D_before) if h_before > 0 else D
        x = sigma_next / sigma * x + (1 - sigma_next / sigma) * extrapolated
        h_before, D_before = h, D
        yield State(x, sigma_next, D)


def guided(D: Denoiser, guide: Denoiser, weight: float, interval: tuple[float, float] = (0.0, math.inf)) -> Denoiser:
    """Return a denoiser with guidance: D_guide + weight (D - D_guide) at noise levels in the interval, and D alone outside.

    In classifier-free guidance (Ho and Salimans, 2022, arXiv 2207.12598) the guide is D without labels; in autoguidance (Karras
    et al., 2024, arXiv 2406.02507), a worse network with the same labels. Further outputs (`all_outputs`) are those of D.

    Args:
        weight: 0 is the guide, 1 is D, more exaggerates the difference.
        interval: the lowest and highest noise level with guidance (arXiv 2404.07724). Elsewhere the guide is not evaluated.
    """
    if weight == 1:
        return D
    low, high = interval

    def guided_denoiser(x, sigma, labels=None, **options):
        outputs = D(x, sigma, labels, **options)
        is_inside = (low <= sigma) & (sigma <= high)  # a bool, or one for each image
        if not (is_inside.any() if isinstance(is_inside, torch.Tensor) else is_inside):
            return outputs
        D_x, others = outputs.tensor_split([x.shape[1]], dim=1)
        D_guide = guide(x, sigma, labels)
        D_guided = D_guide + weight * (D_x - D_guide)
        if isinstance(is_inside, torch.Tensor):
            D_guided = torch.where(is_inside.view(-1, 1, 1, 1), D_guided, D_x)
        return torch.cat([D_guided, others], dim=1)

    return guided_denoiser


def clipped(denoiser: Denoiser) -> Denoiser:
    """Return a denoiser whose images are clipped to [-1, 1], the range of the data, as DDPM's sampler does."""

    def clipped_denoiser(x, sigma, labels=None, **options):
        D, others = denoiser(x, sigma, labels, **options).tensor_split([x.shape[1]], dim=1)
        return torch.cat([D.clamp(-1, 1), others], dim=1)

    return clipped_denoiser
