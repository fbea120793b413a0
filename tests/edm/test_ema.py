"""Power-function averages of the weights, and those of other widths that follow from them."""

import math

import numpy
import pytest
import torch
from torch import nn

from edm.ema import PowerEMA, gamma_of, reconstruct, sigma_rel_of

NODES, NODE_WEIGHTS = numpy.polynomial.legendre.leggauss(100)  # of Gauss-Legendre quadrature, on [-1, 1]


def profile(tau, t: float, gamma: float):
    return (gamma + 1) * tau**gamma / t ** (gamma + 1) * (tau <= t)


def test_the_width_is_the_standard_deviation_of_the_profile():
    for sigma_rel in (0.01, 0.05, 0.10, 0.25):
        p = NODE_WEIGHTS / 2 * profile(tau := (1 + NODES) / 2, 1, gamma_of(sigma_rel))
        assert (p @ (tau - p @ tau) ** 2) ** 0.5 == pytest.approx(sigma_rel, rel=1e-6)
        assert sigma_rel_of(gamma_of(sigma_rel)) == pytest.approx(sigma_rel, rel=1e-12)
    for sigma_rel in (-0.1, 0, 12**-0.5, 0.29, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"above 0 and below 0\.288675, not"):
            gamma_of(sigma_rel)


def test_the_average_of_weights_on_a_polynomial_path_is_that_of_the_formula(assert_close):
    """After step k of N the weights are k and k^2. They count with the integral of p over the step, (k^2 - (k - 1)^2) / N^2 for
    gamma 1 and (k^3 - (k - 1)^3) / N^3 for gamma 2; sums of powers have closed forms. The initial weights count nothing.
    """
    N = 50
    S1, S2, S3 = N * (N + 1) / 2, N * (N + 1) * (2 * N + 1) / 6, (N * (N + 1) / 2) ** 2
    S4 = S2 * (3 * N**2 + 3 * N - 1) / 5
    expected = {
        1: [(2 * S2 - S1) / N**2, (2 * S3 - S2) / N**2],
        2: [(3 * S3 - 3 * S2 + S1) / N**3, (3 * S4 - 3 * S3 + S2) / N**3],
    }
    for gamma, means in expected.items():
        net = nn.Linear(2, 1, bias=False, dtype=torch.float64)
        average = PowerEMA(net, sigma_rel_of(gamma))
        for k in range(1, N + 1):
            nn.init.constant_(net.weight, k)
            net.weight.data[0, 1] = k**2
            average.update(images_seen=16 * k, batch_size=16)
        assert_close(average.net.weight[0], means, 1e-9)


def test_the_residual_is_that_of_the_integrals():
    """With one average alone, which gets the factor 1; the quadrature is exact for polynomials."""
    unit, weights = (1 + NODES) / 2, NODE_WEIGHTS / 2
    for s, gamma, t, delta in ((6, 2, 10, 3), (10, 5, 10, 1), (12, 4, 10, 2)):
        a, b = min(s, t), max(s, t)
        tau = numpy.concatenate([a * unit, a + (b - a) * unit])  # one profile ends at a
        weight = numpy.concatenate([a * weights, (b - a) * weights])
        known, wanted = profile(tau, s, gamma), profile(tau, t, delta)
        x, residual = reconstruct([(s, sigma_rel_of(gamma))], (t, sigma_rel_of(delta)))
        assert x.tolist() == [1]
        assert residual**2 == pytest.approx(weight @ (known - wanted) ** 2 / (weight @ wanted**2), rel=1e-9)


def test_reconstruction_is_exact_for_weights_on_a_polynomial_path(assert_close):
    """theta = 3 + 4 (tau / 8)^3 - 8 (tau / 8)^7 is a constant and the difference of two known profiles.

    The least-squares error is orthogonal to such differences, so its integral with theta is 0 though the profile is off.
    """

    def average(t: float, sigma_rel: float) -> float:
        gamma = gamma_of(sigma_rel)
        return 3 + sum(c * (gamma + 1) / (gamma + n + 1) * (t / 8) ** n for c, n in ((4, 3), (-8, 7)))

    known = [(t, sigma_rel_of(gamma)) for t in range(1, 9) for gamma in (3, 7)]
    averages = torch.tensor([average(*pair) for pair in known], dtype=torch.float64)
    for target in ((8, 0.03), (8, 0.08), (8, 0.2), (5.5, 0.1)):
        x, residual = reconstruct(known, target)
        assert residual > 1e-3
        assert_close(x.sum(), 1)
        assert_close(x @ averages, average(*target))


def test_known_averages_are_found_again_and_more_snapshots_give_more_widths(assert_close):
    residuals = []
    for count in (5, 10, 20, 40):
        known = [(step, sigma_rel) for step in range(1, count + 1) for sigma_rel in (0.05, 0.10)]
        x, residual = reconstruct(known, known[-2])
        assert_close(x, [0.0] * (len(known) - 2) + [1, 0])
        assert residual < 1e-6
        residuals.append(reconstruct(known, (count, 0.07))[1])
    assert residuals == pytest.approx([0.027, 0.0091, 0.0025, 0.00063], rel=0.02)
