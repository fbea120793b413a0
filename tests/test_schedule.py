"""Schedules, their inverses and derivatives, and the time discretisations of Table 1."""

import math

import pytest
import torch
from reference import assert_close

from edm.schedule import (
    DISCRETIZATIONS,
    RANGES,
    SCALINGS,
    SCHEDULES,
    VP,
    Schedule,
    edm_steps,
    iddpm_levels,
    iddpm_steps,
    table_1,
    ve_steps,
    vp_steps,
)


def named(schedule: str, scaling: str) -> Schedule:
    """A schedule and a scaling of Table 1, for VP with the betas of its paper."""
    return table_1(2, "vp", schedule, scaling)[1]


CLOSED_FORM = {  # sigma(t), sigma'(t)
    "linear": (lambda t: t, lambda t: 1.0),
    "ve": (lambda t: t**0.5, lambda t: 0.5 * t**-0.5),
    "vp": (
        lambda t: math.expm1(9.95 * t**2 + 0.1 * t) ** 0.5,
        lambda t: (19.9 * t + 0.1) * math.exp(9.95 * t**2 + 0.1 * t) / (2 * math.expm1(9.95 * t**2 + 0.1 * t) ** 0.5),
    ),
}


@pytest.mark.parametrize("t", [1e-3, 0.03, 0.4, 1.0])
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_values_derivatives_and_inverses(schedule, scaling, t):
    """Against the formulas of Table 1; s = (1 + sigma^2)^(-1/2) has s' = -sigma sigma' s^3."""
    chosen = named(schedule, scaling)
    sigma, dsigma = (function(t) for function in CLOSED_FORM[schedule])
    s = 1 if scaling == "none" else (1 + sigma**2) ** -0.5
    ds = 0 if scaling == "none" else -sigma * dsigma * s**3
    assert chosen.sigma(t) == pytest.approx(sigma, rel=1e-9)
    assert chosen.s(t) == pytest.approx(s, rel=1e-9)
    assert chosen.derivatives(t) == pytest.approx((dsigma, ds), rel=1e-9)
    assert chosen.t(sigma) == pytest.approx(t, rel=1e-9)
    assert Schedule(chosen.functions[0]).t(sigma) == pytest.approx(t, rel=1e-9)  # by bisection
    assert chosen.t(0.0) == 0


def test_derivatives_are_taken_in_spite_of_the_sampler_asking_for_none():
    with torch.no_grad():
        assert named("vp", "vp").derivatives(0.5)[0] > 1
    with torch.inference_mode():
        assert named("vp", "vp").derivatives(0.5)[0] > 1


@pytest.mark.parametrize(
    ("function", "target", "t"),
    [
        (lambda t: torch.exp(t), 0.002, math.log(0.002)),  # before t = 0
        (lambda t: torch.tan(math.pi / 2 * t), 80.0, 2 / math.pi * math.atan(80)),  # infinite at t = 1
        (lambda t: t if t < 1 else t**2, 80.0, 80**0.5),
        (lambda t: 1e-3 * t, 80.0, 80_000.0),
        (lambda t: torch.tan(t), 80.0, math.atan(80)),  # domains that end elsewhere
        (lambda t: torch.tan(4 * t), 80.0, math.atan(80) / 4),
        (lambda t: torch.tan(math.pi / 2000 * t), 80.0, 2000 / math.pi * math.atan(80)),
        (lambda t: t / (3 - t), 80.0, 240 / 81),
        (lambda t: torch.sqrt(t / (0.5 - t)), 80.0, 3200 / 6401),
        (lambda t: 90 * torch.asin(t / 0.8), 80.0, 0.8 * math.sin(8 / 9)),
        (lambda t: torch.log1p(t), 80.0, math.expm1(80)),
    ],
)
def test_bisection_finds_times_to_the_last_digits(function, target, t):
    assert Schedule(function).t(target) == pytest.approx(t, rel=1e-13)


@pytest.mark.parametrize(
    "function", [lambda t: 1 / (1 + t), lambda t: torch.tanh(t), lambda t: t * math.nan, lambda t: 9.0 * (t > 1)]
)
def test_a_noise_level_that_is_never_reached_is_an_error(function):
    with pytest.raises(ValueError, match="no time was found at which the noise level is 5"):
        Schedule(function).t(5.0)


def test_a_function_that_leaves_pytorch_is_an_error_and_not_a_wrong_derivative():
    for function in (
        lambda t: math.sqrt(t),
        lambda t: t * math.sqrt(t),
        lambda t: torch.tensor(t.item()),
        lambda t: t.detach(),
    ):
        assert Schedule(function).sigma(4.0) > 0
        with pytest.raises(TypeError, match=r"use torch\.sqrt"):
            Schedule(function).derivatives(4.0)
    assert Schedule(lambda t: t, lambda t: 2).derivatives(4.0) == (1, 0)
    with pytest.raises(ValueError, match=r"sigma\(t\) must rise with t; at 4 its derivative is -1"):
        Schedule(lambda t: 9 - t).derivatives(4.0)


def test_edm_steps_are_equation_5():
    steps = edm_steps(18)
    assert steps.dtype == torch.float64
    assert steps[0].item() == pytest.approx(80)
    assert steps[-2].item() == pytest.approx(0.002)
    assert (steps.diff() < 0).all()
    assert_close(edm_steps(5, 1.0, 5.0, rho=1), [5.0, 4.0, 3.0, 2.0, 1.0, 0.0])
    assert_close(edm_steps(3, 1.0, 9.0, rho=2), [9.0, 4.0, 1.0, 0.0])
    for rho in (0.1, 0.2, 0.4, 1000):
        assert edm_steps(18, rho=rho)[-2].item() == pytest.approx(0.002, rel=1e-9)


def test_vp_steps_are_evenly_spaced_in_time_and_ve_steps_in_the_logarithm():
    steps = vp_steps(5, *RANGES["vp"])
    assert_close(VP().inverse(steps[:-1]), torch.linspace(1, 1e-3, 5, dtype=torch.float64).tolist())
    assert_close(ve_steps(4, 0.1, 100), [100.0, 10.0, 1.0, 0.1, 0.0])


def test_iddpm_levels_follow_the_cosine_schedule():
    """u_j^2 = (1 - abar_j) / abar_j with abar of the cosine schedule, but for the noisiest step, whose beta is clipped."""
    u = iddpm_levels()
    j = torch.arange(1001, dtype=torch.float64)
    alpha_bar = torch.sin(math.pi / 2 * j / 1008).square()
    alpha_bar = alpha_bar / alpha_bar[-1]
    assert u[1000] == 0
    assert_close(u[1:].square(), ((1 - alpha_bar) / alpha_bar)[1:].tolist(), 1e-9)
    assert (u[0] ** 2 + 1).item() == pytest.approx(1000 * (u[1] ** 2 + 1).item())  # clipped at C_1


def test_iddpm_steps_are_levels_evenly_spaced_and_can_be_all_of_them():
    u = iddpm_levels()
    inside = u[(u >= 0.002) & (u <= 81)]
    assert torch.equal(iddpm_steps(len(inside))[:-1], inside)
    some = iddpm_steps(12)
    assert some[0] == inside[0]
    assert some[-2] == inside[-1]
    index = [(inside == sigma).nonzero().item() for sigma in some[:-1]]
    assert index == [round(i * (len(inside) - 1) / 11) for i in range(12)]
    with pytest.raises(ValueError, match="too few for 2000 steps"):
        iddpm_steps(2000)


@pytest.mark.parametrize("name", DISCRETIZATIONS)
def test_steps_fall_from_end_to_end_of_the_range_asked_for(name):
    for num_steps in (1, 2, 40):
        steps, _ = table_1(num_steps, name)
        assert len(steps) == num_steps + 1
        assert steps[-1] == 0
        assert (steps.diff() < 0).all()
    slack = 5 if name == "iddpm" else 1e-9  # its own levels, those inside the range
    assert steps[0].item() == pytest.approx(RANGES[name][1], rel=slack)
    assert steps[-2].item() == pytest.approx(RANGES[name][0], rel=slack)
    other, _ = table_1(40, name, sigma_min=0.01, sigma_max=50, supported=(0.03, 40))
    assert 35 < other[0] <= 40 + 1e-9
    assert 0.03 - 1e-9 <= other[-2] < 0.04


def test_vp_betas_are_solved_for_the_range():
    assert VP.between(*RANGES["vp"]).beta_d == pytest.approx(19.9)
    assert VP.between(*RANGES["vp"]).beta_min == pytest.approx(0.1)
    schedule = VP.between(0.002, 80)
    assert_close(schedule.sigma(torch.tensor([1e-3, 1.0], dtype=torch.float64)), [0.002, 80.0])
    with pytest.raises(ValueError, match="no VP schedule rises from 20 to 80"):
        VP.between(20, 80)
    with pytest.raises(ValueError, match="sigma_min 3 must be below sigma_max 2; the denoiser knows 0 to 2"):
        table_1(5, sigma_min=3, supported=(0, 2))
