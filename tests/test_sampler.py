"""Algorithms 1 and 2 at their default point, sigma(t) = t: the authors' numbers, the exact path, churn, guidance."""

import math

import pytest
import torch
from reference import OFFICIAL, assert_close, fresh_noise, two_peaks, wave

from edm.randomness import ImageNoise
from edm.sampler import guided, sample
from edm.schedule import edm_steps

STEP_OPTIONS = ("num_steps", "rho", "sigma_min", "sigma_max")


def last(states) -> torch.Tensor:
    *_, state = states
    return state.x


@pytest.mark.parametrize("case", OFFICIAL["sampler"])
def test_sampler_agrees_with_the_authors(case):
    steps = edm_steps(**{key: value for key, value in case["options"].items() if key in STEP_OPTIONS})
    churn = {key: value for key, value in case["options"].items() if key not in STEP_OPTIONS}
    latents = wave(1, 1, 2, 4, scale=math.sqrt(2), frequency=2.3, phase=0.4)
    evaluations = 0

    def counted(*args):
        nonlocal evaluations
        evaluations += 1
        return two_peaks(*args)

    x = last(sample(counted, latents, steps, noise=fresh_noise(latents), **churn))
    assert_close(x.flatten(), case["out"])
    assert evaluations == case["nfe"]


def gaussian(mean: float, std: float):
    """The exact denoiser of N(mean, std^2), and the exact solution of its ODE from (x, sigma) to another sigma."""

    def denoiser(x, sigma, labels=None):
        return (std**2 * x + sigma**2 * mean) / (std**2 + sigma**2)

    def solution(x, sigma, sigma_next):
        return mean + (x - mean) * math.sqrt((std**2 + sigma_next**2) / (std**2 + sigma**2))

    return denoiser, solution


def test_one_state_a_step_each_closer_to_the_exact_path():
    denoiser, solution = gaussian(0.3, 0.6)
    latents = wave(2, 1, 4, 4, scale=1, frequency=1.7, phase=0.1)
    states = list(sample(denoiser, latents, edm_steps(200)))
    assert len(states) == 200
    assert states[-1].sigma == 0
    for state in states[::20]:
        torch.testing.assert_close(state.x, solution(80.0 * latents, 80.0, state.sigma), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(states[-1].denoised, states[-1].x, atol=1e-6, rtol=0)


@pytest.mark.parametrize("S_churn", [0.0, 40.0])
def test_samples_have_the_distribution_of_the_data(S_churn):
    """40,000 pixels, N(0.3, 0.6^2): their mean is known to 0.003, their deviation to 0.002 (a standard deviation)."""
    denoiser, _ = gaussian(0.3, 0.6)
    generator = torch.Generator().manual_seed(0)

    def noise():
        return torch.randn(2, 1, 100, 200, generator=generator, dtype=torch.float64)

    x = last(sample(denoiser, noise(), edm_steps(256), S_churn=S_churn, noise=noise))
    assert x.mean().item() == pytest.approx(0.3, abs=0.012)
    assert x.std().item() == pytest.approx(0.6, abs=0.01)


def test_churn_stays_between_S_min_and_S_max():
    seen = []

    def denoiser(x, sigma, labels=None):
        seen.append(sigma)
        return torch.zeros_like(x)

    latents = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    steps = edm_steps(10)
    last(sample(denoiser, latents, steps, solver="euler", S_churn=2, S_min=0.1, S_max=20, noise=lambda: latents))
    for t, t_hat in zip(steps.tolist(), seen):
        assert t_hat == pytest.approx(t * 1.2 if 0.1 <= t <= 20 else t)
    seen.clear()
    last(sample(denoiser, latents, steps, solver="euler", S_churn=1e9, noise=lambda: latents))
    assert seen[0] == pytest.approx(80 * math.sqrt(2))  # gamma is at most sqrt(2) - 1


def test_bad_calls_are_errors():
    for options in ({"solver": "Heun"}, {"S_churn": 1.0}):
        with pytest.raises(ValueError, match="solver must be one of heun, euler, and S_churn above 0 needs noise"):
            next(sample(two_peaks, torch.zeros(1, 1, 2, 2), edm_steps(3), **options))


def test_an_image_depends_on_its_seed_alone():
    latents = ImageNoise([3, 5, 7], (1, 4, 4), torch.device("cpu"), torch.float64)
    alone = ImageNoise([5], (1, 4, 4), torch.device("cpu"), torch.float64)
    for _ in range(3):
        together = latents()
        assert torch.equal(together[1:2], alone())
        assert not torch.equal(together[0], together[2])


def test_guidance_extrapolates_from_unconditional_to_conditional():
    def denoiser(x, sigma, labels=None):
        return torch.zeros_like(x) if labels is None else labels.sum() * torch.ones_like(x)

    x, labels = torch.zeros(1, 1, 2, 2), torch.eye(3)[:1]
    assert guided(denoiser, 1) is denoiser
    for guidance in (0.0, 0.5, 3.0):
        assert_close(guided(denoiser, guidance)(x, 1.0, labels), (guidance * torch.ones_like(x)).tolist())
