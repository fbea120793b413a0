"""The samplers as the paper prints them: equal to the general one, the authors' numbers, churn as an SDE.

Then what came after the paper: DPM-Solver++(2M) and guidance.
"""

import json
import math
from decimal import Decimal, localcontext
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from edm.exact import GaussianMixture
from edm.sampler import clipped, guided, heun_sampler, sample, stochastic_sampler
from edm.schedule import LINEAR, Schedule, edm_steps
from lab.build import table_1

OFFICIAL = json.loads(Path(__file__).parents[1].joinpath("reference", "official_edm.json").read_text())
PLAN = ("num_steps", "discretization", "schedule", "scaling", "sigma_min", "sigma_max", "rho")
TANGENT = Schedule(lambda t: torch.tan(t), lambda t: torch.cos(t))  # a schedule that is not in the paper
SCHEDULES = {"linear": LINEAR, "vp": table_1(2, "vp", "vp", "vp")[1], "ve": table_1(2, "ve", "ve")[1], "tangent": TANGENT}


@pytest.fixture
def conditional(two_peaks, wave):
    """Return a denoiser of curved solutions that depends on the labels, which move the two peaks; latents; and labels."""
    latents, labels = wave(3, 1, 2, 4, scale=1.4, frequency=2.3, phase=0.4), wave(3, 1, 1, 1, scale=1, frequency=1, phase=0)
    return lambda x, sigma, labels: two_peaks(x - labels, sigma) + labels, latents, labels


@pytest.mark.parametrize("name", SCHEDULES)
def test_algorithm_1_as_printed_is_the_general_sampler(name, conditional, final):
    """For every sigma(t) and s(t). The only difference: Algorithm 1 takes times, and the general sampler noise levels."""
    (denoiser, latents, labels), schedule, sigma_steps = conditional, SCHEDULES[name], edm_steps(18)
    t_steps = torch.tensor([schedule.t(sigma) for sigma in sigma_steps.tolist()], dtype=torch.float64)
    images = heun_sampler(denoiser, latents, t_steps, labels, schedule)
    expected = final(sample(denoiser, latents, sigma_steps, labels, schedule))
    torch.testing.assert_close(images, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "churn", [{"S_churn": 0.0}, {"S_churn": 5.0, "S_min": 0.1, "S_max": 20.0, "S_noise": 1.01}, {"S_churn": 1e9}]
)
def test_algorithm_2_as_printed_is_the_general_sampler_with_churn(churn, conditional, fresh_noise, final):
    """With the same noise, each of them asks for new noise once a step."""
    (denoiser, latents, labels), t_steps = conditional, edm_steps(18)
    images = stochastic_sampler(denoiser, latents, t_steps, fresh_noise(latents), **churn, labels=labels)
    expected = final(sample(denoiser, latents, t_steps, labels, noise=fresh_noise(latents), **churn))
    torch.testing.assert_close(images, expected, rtol=1e-12, atol=1e-12)
    deterministic = heun_sampler(denoiser, latents, t_steps, labels=labels)
    assert torch.allclose(images, deterministic, rtol=1e-12) == (churn["S_churn"] == 0)


@pytest.mark.parametrize(
    "case", OFFICIAL["sampler"] + OFFICIAL["ablation"], ids=lambda case: "-".join(map(str, case["options"].values()))
)
def test_the_general_sampler_agrees_with_the_authors(case, two_peaks, wave, fresh_noise, final, assert_close):
    """Their sampler of the paper's results, and the one behind Table 2, with the same number of evaluations (NFE)."""
    options = {"num_steps": 18, **case["options"]}
    steps, schedule = table_1(**{key: options.pop(key) for key in PLAN if key in options})
    latents, evaluations = wave(1, 1, 2, 4, scale=math.sqrt(2), frequency=2.3, phase=0.4), []

    def counted(*args):
        evaluations.append(args)
        return two_peaks(*args)

    x = final(sample(counted, latents, steps, schedule=schedule, noise=fresh_noise(latents), **options))
    assert_close(x.flatten(), case["out"])
    assert len(evaluations) == case["nfe"]


# DPM-Solver++(2M)


def test_dpmpp_2m_agrees_with_the_paper_that_it_comes_from_in_fifty_digits(final):
    """Algorithm 2 of Lu et al. with their alpha = 1 and lambda = ln(alpha / sigma), for data N(0, 1)."""
    with localcontext() as context:
        context.prec = 50
        levels = [Decimal(level) for level in ("80", "20", "6.5", "1.25", "0.5")]
        lambdas, before, x = [-level.ln() for level in levels], [], Decimal("0.75") * levels[0]
        for i, (sigma, sigma_next) in enumerate(pairwise(levels)):
            before.append(x / (1 + sigma**2))  # the exact denoiser
            h, D = lambdas[i + 1] - lambdas[i], before[-1]
            if i > 0:
                r = (lambdas[i] - lambdas[i - 1]) / h
                D = (1 + 1 / (2 * r)) * before[-1] - 1 / (2 * r) * before[-2]
            x = sigma_next / sigma * x - ((-h).exp() - 1) * D
        expected = float(x / (1 + levels[-1] ** 2))  # the last step, to noise level 0
    steps = torch.tensor([*map(float, levels), 0.0], dtype=torch.float64)
    latents = torch.full((1, 1, 1, 1), 0.75, dtype=torch.float64)
    found = final(sample(lambda x, sigma, labels: x / (1 + sigma**2), latents, steps, solver="dpmpp_2m"))
    assert found.item() == pytest.approx(expected, rel=1e-14)


def test_dpmpp_2m_is_of_second_order_on_a_mixture_with_one_evaluation_a_step(conditional):
    denoiser, latents, labels = conditional
    asked = []

    def counted(x, sigma, labels):
        asked.append(sigma)
        return denoiser(x, sigma, labels)

    def at_sigma_min(num_steps: int, **options) -> torch.Tensor:
        asked.clear()
        *_, state, last = sample(counted, latents, edm_steps(num_steps), labels, **options)
        assert options == {} or (len(asked) == num_steps and torch.equal(last.x, last.denoised))
        return state.x

    exact = at_sigma_min(4000)
    coarse, fine = ((at_sigma_min(N, solver="dpmpp_2m") - exact).abs().max() for N in (128, 256))
    assert math.log2(coarse / fine) == pytest.approx(2, abs=0.15)
    first, euler = (next(sample(denoiser, latents, edm_steps(9), labels, solver=name)) for name in ("dpmpp_2m", "euler"))
    torch.testing.assert_close(first.x, euler.x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_sigma_and_s_of_t_cancel_out_in_dpmpp_2m(name, conditional, final):
    denoiser, latents, labels = conditional
    plain, found = (
        final(sample(denoiser, latents, edm_steps(9), labels, schedule, solver="dpmpp_2m"))
        for schedule in (LINEAR, SCHEDULES[name])
    )
    assert torch.equal(plain, found)


def test_dpmpp_2m_takes_rounded_steps_even_of_no_length(two_peaks):
    """A step that stays at its noise level changes nothing, and the next one extrapolates from nothing."""
    latents, states = torch.ones(1, 1, 1, 1, dtype=torch.float64), []
    for levels in ([20, 10, 10, 1, 0], [19.6, 10.4, 9.8, 1.2, 0]):
        steps = torch.tensor(levels, dtype=torch.float64)
        rounded = sample(two_peaks, latents, steps, solver="dpmpp_2m", round_sigma=lambda sigma: float(round(sigma)))
        states.append([(state.sigma, state.x.item()) for state in rounded])
    assert states[0] == states[1]
    assert states[0][0][1] == states[0][1][1] and all(math.isfinite(x) for _, x in states[0])


# Churn


def test_a_small_step_with_churn_is_a_step_of_the_sde(correlated, wave):
    """Eq. 6 on the way from noise to images, at sigma(t) = t = 1: in a step of length h the ODE contributes h score, the
    removal of noise beta h score, and new noise has the variance 2 beta h, where beta = gamma / h and gamma = S_churn / N."""
    h, beta, data = 1e-5, 3.0, correlated(3, 4)
    x = wave(2, 1, 2, 2, scale=1.2, frequency=1.3, phase=0.2)
    score = data(x, 1.0) - x
    epsilon = wave(2, 1, 2, 2, scale=1, frequency=0.9, phase=0.5)
    steps = torch.tensor([1, 1 - h, 0], dtype=torch.float64)  # two steps, of which the first is looked at

    def step(noise: torch.Tensor) -> torch.Tensor:
        return next(sample(data, x, steps, S_churn=2 * beta * h, noise=lambda: noise)).x - x

    drift = step(torch.zeros_like(x))
    torch.testing.assert_close(drift, h * (1 + beta) * score, rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(step(epsilon) - drift, math.sqrt(2 * beta * h) * epsilon, rtol=1e-3, atol=1e-6)


def test_churn_keeps_the_covariance_of_the_data_to_second_order(impulses):
    """The exact covariance of the samples of Gaussian data, at sigma_min: doubling the steps divides its error by four."""
    covariance = torch.tensor([[0.36, 0.1], [0.1, 0.05]], dtype=torch.float64)
    data, errors = GaussianMixture(torch.zeros(1, 2), covariance[None]), []
    for num_steps in (100, 200):
        noise = impulses(num_steps + 1, 2)
        *_, state, _ = sample(data, noise(), edm_steps(num_steps), S_churn=40, noise=noise)
        x = state.x.flatten(1)
        errors.append((x.T @ x - covariance - 0.002**2 * torch.eye(2)).abs().max().item())
    assert errors[1] < 4e-3
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.3)


def test_samplers_ask_at_levels_that_the_denoiser_knows_and_churn_stays_within_its_bounds():
    """Churn lies between S_min and S_max, and gamma is sqrt(2) - 1 at most. With whole numbers as noise levels, the steps are
    rounded, and so are the churned levels."""
    asked, latents = [], torch.zeros(1, 1, 1, 1, dtype=torch.float64)

    def denoiser(x, sigma, labels=None):
        asked.append(sigma)
        return torch.zeros_like(x)

    def levels(steps: torch.Tensor, **options) -> tuple[list[float], list[float]]:
        """Return the levels at which the denoiser was asked, and those of the states."""
        asked.clear()
        states = [state.sigma for state in sample(denoiser, latents, steps, noise=lambda: latents, **options)]
        return asked, states

    steps = edm_steps(10)
    t = steps[:-1].tolist()
    churned, _ = levels(steps, solver="euler", S_churn=2, S_min=0.1, S_max=20)
    assert churned == pytest.approx([level * 1.2 if 0.1 <= level <= 20 else level for level in t])
    assert levels(steps, solver="euler", S_churn=1e9)[0] == pytest.approx([math.sqrt(2) * level for level in t])
    steps, churn = torch.tensor([40.3, 20.2, 9.6, 1.1, 0.0], dtype=torch.float64), {"S_churn": 1.0, "S_min": 5}
    for schedule in (SCHEDULES["vp"], Schedule(lambda t: t)):
        found, states = levels(steps, schedule=schedule, round_sigma=lambda sigma: float(round(sigma)), **churn)
        assert found == pytest.approx([50, 20, 25, 10, 12, 1, 1])
        assert states == [20, 10, 1, 0]


def smirnov(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the largest difference between the empirical distribution functions of two samples of n numbers."""
    order = torch.cat([a, b]).argsort()
    return torch.where(order < len(a), 1.0, -1.0).cumsum(0).abs().max().item() / len(a)


@pytest.mark.parametrize(("name", "S_churn"), [("tangent", 0.0), ("vp", 30.0), ("ve", 30.0)])
def test_samples_have_the_distribution_of_the_data(name, S_churn, correlated, normal_noise, final):
    """Two samples of 5,000, projected in five directions. Those of one distribution differ by more than 0.039 once in 1,000
    times (Smirnov)."""
    data, noise = correlated(3, 4, seed=1), normal_noise(5000, 1, 2, 2)
    x = final(sample(data, noise(), edm_steps(100), schedule=SCHEDULES[name], S_churn=S_churn, noise=noise)).flatten(1)
    y = data.sample(5000, torch.Generator().manual_seed(2))
    directions = torch.cat([torch.eye(4), torch.ones(1, 4)]).double()
    assert all(smirnov(x @ direction, y @ direction) < 0.039 for direction in directions)
    assert smirnov(x[:, 0], y[:, 0] + 0.2) > 0.039  # the test can tell


def test_bad_calls_are_errors(two_peaks):
    message = "solver must be one of heun, euler, dpmpp_2m; S_churn above 0 needs noise, and heun or euler"
    for options in ({"solver": "Heun"}, {"S_churn": 1.0}, {"S_churn": 1.0, "solver": "dpmpp_2m", "noise": lambda: 0}):
        with pytest.raises(ValueError, match=message):
            next(sample(two_peaks, torch.zeros(1, 1, 2, 2), edm_steps(3), **options))


# Guidance and clipping


def test_guidance_extrapolates_from_the_guide_and_clipping_comes_last():
    """Both leave the network's further outputs alone; those of a guided pair are D's."""

    def denoiser(x, sigma, labels=None, all_outputs=False):
        D = x + (0 if labels is None else 3)
        return torch.cat([D, torch.full_like(x, 0 if labels is None else 7)], dim=1) if all_outputs else D

    def without_labels(x, sigma, labels):
        return denoiser(x, sigma)

    x, labels = torch.full((2, 3, 4, 4), 0.25), torch.ones(2, 1)
    for weight in (0.0, 0.5, 3.0):
        assert torch.equal(guided(denoiser, without_labels, weight)(x, 1.0, labels), x + 3 * weight)
    for weight, image in ((-0.75, -1), (0.2, 0.85), (2, 1)):
        outputs = clipped(guided(denoiser, without_labels, weight))(x, 1.0, labels, all_outputs=True)
        assert outputs.shape == (2, 6, 4, 4)
        torch.testing.assert_close(outputs[:, :3], torch.full_like(x, image))
        assert torch.equal(outputs[:, 3:], torch.full_like(x, 7))


def test_a_worse_network_guides_within_an_interval_and_is_not_evaluated_elsewhere(correlated, wave):
    """The interval holds its ends; noise levels may be one number, or one for each image."""
    x, asked = wave(3, 1, 2, 4, scale=1.4, frequency=2.3, phase=0.4), []

    def worse(x, sigma, labels):
        asked.append((sigma, labels))
        return 0.9 * mixture(x, 1.1 * sigma) + labels

    def D(x, sigma, labels):
        return mixture(x, sigma)

    mixture, labels, low, high = correlated(3, 8), torch.ones(3, 1, 1, 1), 0.3, 2.0
    assert guided(D, worse, 1.0, (low, high)) is D
    assert torch.equal(guided(D, worse, 0.0, (low, high))(x, 1.0, labels), worse(x, 1.0, labels))
    pair = guided(D, worse, 2.5, (low, high))
    for sigma in (low, 1.0, high):
        expected = worse(x, sigma, labels) + 2.5 * (D(x, sigma, labels) - worse(x, sigma, labels))
        torch.testing.assert_close(pair(x, sigma, labels), expected, rtol=1e-14, atol=0)
    asked.clear()
    for sigma in (0.299, 2.001, 80.0):
        assert torch.equal(pair(x, sigma, labels), D(x, sigma, labels))
    assert asked == []
    for sigmas in ([0.1, 1.0, 3.0], [0.3, 0.5, 2.0], [3.0, 4.0, 5.0]):
        together = pair(x, torch.tensor(sigmas, dtype=torch.float64), labels)
        alone = [pair(image[None], sigma, label[None]) for image, sigma, label in zip(x, sigmas, labels)]
        torch.testing.assert_close(together, torch.cat(alone), rtol=1e-12, atol=1e-12)
