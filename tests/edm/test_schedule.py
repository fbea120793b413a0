"""Noise schedules with their inverses and derivatives, the time steps of Table 1, and tables of noise levels."""

import math

import pytest
import torch

from edm.schedule import (
    RANGES,
    SCALINGS,
    SCHEDULES,
    VP,
    NoiseLevels,
    Schedule,
    edm_steps,
    iddpm_levels,
    iddpm_steps,
    ve_steps,
    vp_steps,
)
from lab.build import table_1


@pytest.mark.parametrize("t", [1e-3, 0.03, 0.4, 1.0])
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_inverses_and_derivatives(name, scaling, t):
    """Derivatives against differences. Samplers run without gradients of the network; sigma'(t) is needed all the same."""
    schedule, h = table_1(2, "vp", name, scaling)[1], 1e-5 * t  # for VP with the betas of Table 1
    sigma = schedule.sigma(t)
    assert schedule.t(sigma) == pytest.approx(t, rel=1e-9)
    assert Schedule(schedule.functions[0]).t(sigma) == pytest.approx(t, rel=1e-9)  # by bisection
    assert schedule.t(0.0) == 0
    expected = [(function(t + h) - function(t - h)) / (2 * h) for function in (schedule.sigma, schedule.s)]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert schedule.derivatives(t) == pytest.approx(expected, rel=1e-6, abs=1e-8)


@pytest.mark.parametrize(
    ("function", "target", "t"),
    [
        (lambda t: torch.exp(t), 0.002, math.log(0.002)),  # before t = 0
        (lambda t: torch.tan(math.pi / 2 * t), 80.0, 2 / math.pi * math.atan(80)),  # infinite at t = 1
        (lambda t: t if t < 1 else t**2, 80.0, 80**0.5),
        (lambda t: torch.tan(t), 80.0, math.atan(80)),  # domains that end elsewhere
        (lambda t: torch.tan(math.pi / 2000 * t), 80.0, 2000 / math.pi * math.atan(80)),
        (lambda t: t / (3 - t), 80.0, 240 / 81),
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
    """These sigma(t) fall, stay below 5, are nan, or jump over 5."""
    with pytest.raises(ValueError, match="no time at which the noise level is 5"):
        Schedule(function).t(5.0)


@pytest.mark.parametrize("function", [lambda t: t * math.sqrt(t), lambda t: torch.tensor(t.item()), lambda t: t.detach()])
def test_a_function_that_leaves_pytorch_is_an_error_and_not_a_wrong_derivative(function):
    assert Schedule(function).sigma(4.0) > 0
    with pytest.raises(TypeError, match=r"use torch\.sqrt"):
        Schedule(function).derivatives(4.0)


def test_sigma_must_rise_and_s_may_be_constant():
    assert Schedule(lambda t: t, lambda t: 2).derivatives(4.0) == (1, 0)
    with pytest.raises(ValueError, match=r"sigma\(t\) must rise with t; at 4 its derivative is -1"):
        Schedule(lambda t: 9 - t).derivatives(4.0)


# Time steps


def test_edm_steps_are_equation_5(assert_close):
    """Noise levels to the power 1 / rho are evenly spaced, and both ends are exact for any rho."""
    for rho in (0.1, 0.2, 1, 2, 7, 1000):
        steps = edm_steps(18, rho=rho)
        assert steps.dtype == torch.float64
        assert steps[[0, -2]].tolist() == pytest.approx([80, 0.002], rel=1e-9)
        assert_close((steps[:-1] / 80) ** (1 / rho), torch.linspace(1, (0.002 / 80) ** (1 / rho), 18, dtype=torch.float64))
    assert_close(edm_steps(5, 1.0, 5.0, rho=1), [5.0, 4.0, 3.0, 2.0, 1.0, 0.0])
    assert_close(edm_steps(3, 1.0, 9.0, rho=2), [9.0, 4.0, 1.0, 0.0])


def test_vp_steps_are_evenly_spaced_in_time_and_ve_steps_in_the_logarithm(assert_close):
    steps = vp_steps(5, *RANGES["vp"])
    assert_close(VP().inverse(steps[:-1]), torch.linspace(1, 1e-3, 5, dtype=torch.float64))
    assert_close(ve_steps(4, 0.1, 100), [100.0, 10.0, 1.0, 0.1, 0.0])


def test_iddpm_levels_follow_the_cosine_schedule_and_its_steps_are_some_or_all_of_them(assert_close):
    """u_j^2 = (1 - abar_j) / abar_j with abar of the cosine schedule, but for the noisiest step, whose beta is clipped."""
    u, j = iddpm_levels(), torch.arange(1001, dtype=torch.float64)
    alpha_bar = torch.sin(math.pi / 2 * j / 1008).square() / math.sin(math.pi / 2 * 1000 / 1008) ** 2
    assert_close(u[1:].square(), ((1 - alpha_bar) / alpha_bar)[1:])
    assert (u[0] ** 2 + 1).item() == pytest.approx(1000 * (u[1] ** 2 + 1).item())  # clipped at C_1
    inside = u[(u >= 0.002) & (u <= 81)]
    assert torch.equal(iddpm_steps(len(inside))[:-1], inside)
    assert torch.equal(iddpm_steps(12)[:-1], inside[[round(i * (len(inside) - 1) / 11) for i in range(12)]])
    with pytest.raises(ValueError, match="too few for 2000 steps"):
        iddpm_steps(2000)


@pytest.mark.parametrize("name", RANGES)
def test_steps_fall_from_end_to_end_of_the_range_asked_for(name):
    for num_steps in (1, 2, 40):
        steps, _ = table_1(num_steps, name)
        assert len(steps) == num_steps + 1
        assert steps[-1] == 0
        assert (steps.diff() < 0).all()
    slack = 5 if name == "iddpm" else 1e-9  # its own levels, those inside the range
    assert steps[0].item() == pytest.approx(RANGES[name][1], rel=slack)
    assert steps[-2].item() == pytest.approx(RANGES[name][0], rel=slack)
    clamped, _ = table_1(40, name, sigma_min=0.01, sigma_max=50, supported=(0.03, 40))  # to what the denoiser knows
    assert 35 < clamped[0] <= 40 + 1e-9
    assert 0.03 - 1e-9 <= clamped[-2] < 0.04


def test_vp_betas_are_solved_for_the_range_and_impossible_ranges_are_errors(assert_close):
    """Table 1's range, 1e-3 and 1 as times, has the betas of Table 1."""
    table = VP.between(*RANGES["vp"])
    assert (table.beta_d, table.beta_min) == pytest.approx((19.9, 0.1))
    assert_close(VP.between(0.002, 80).sigma(torch.tensor([1e-3, 1.0], dtype=torch.float64)), [0.002, 80.0])
    with pytest.raises(ValueError, match="no VP schedule rises from 20 to 80"):
        VP.between(20, 80)
    with pytest.raises(ValueError, match="sigma_min 3 must be below sigma_max 2; the denoiser knows 0 to 2"):
        table_1(5, sigma_min=3, supported=(0, 2))


# Tables of noise levels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_nearest_level_minimises_the_distance(dtype):
    """Against brute force, for levels far below, far above, between, and exactly on those of the table."""
    levels = NoiseLevels(iddpm_levels(50)[:-1].flip(0))
    table = levels.like(torch.zeros((), dtype=dtype))
    assert table.dtype == dtype
    draws = torch.randn(40, 25, generator=torch.Generator().manual_seed(0), dtype=dtype).mul(3).exp().T
    for sigma in (draws, table, torch.tensor([[0.0], [1e9]], dtype=dtype), (table[1:] + table[:-1])[7] / 2):
        assert torch.equal(levels.nearest(sigma), (sigma[..., None] - table).abs().argmin(dim=-1))
