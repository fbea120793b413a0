"""Which noise levels are drawn in training, how they are weighted, and what theory says of the loss."""

import json
import math
from pathlib import Path

import pytest
import torch

from edm.loss import WEIGHTINGS, LogNormal, UniformLevels, VENoise, VPNoise, edm_weight, squared_error
from edm.precond import EDMPreconditioning, VEPreconditioning, VPPreconditioning, iDDPMPreconditioning
from edm.schedule import VP, iddpm_levels

OFFICIAL = json.loads(Path(__file__).parents[1].joinpath("reference", "official_edm.json").read_text())["loss"]
LEVELS = iDDPMPreconditioning().levels
COLUMNS = {  # distribution of the noise levels, preconditioning, and what is uniform from 0 to 1
    "edm": (LogNormal(-0.4, 1.7), EDMPreconditioning(), lambda sigma: torch.special.ndtr((sigma.log() + 0.4) / 1.7)),
    "vp": (VPNoise(), VPPreconditioning(), lambda sigma: (VP().inverse(sigma) - 1e-5) / (1 - 1e-5)),
    "ve": (VENoise(), VEPreconditioning(), lambda sigma: (sigma / 0.02).log() / math.log(5000)),
    "iddpm": (UniformLevels(LEVELS), iDDPMPreconditioning(), lambda sigma: (LEVELS.nearest(sigma) + 0.5) / 1000),
}


@pytest.mark.parametrize(
    ("name", "distribution", "weighting"),
    [("EDMLoss", LogNormal(), "edm"), ("VPLoss", VPNoise(), "vp"), ("VELoss", VENoise(), "ve")],
)
def test_noise_levels_and_weights_agree_with_the_authors(name, distribution, weighting, assert_close):
    for row in OFFICIAL[name]:
        sigma = distribution.sigma(torch.tensor(row["draw"], dtype=torch.float64))
        assert_close(torch.stack([sigma, WEIGHTINGS[weighting](sigma, 0.5)]), [row["sigma"], row["weight"]])


def test_iddpm_trains_at_all_its_levels_but_0():
    u, iddpm = iddpm_levels(), UniformLevels(LEVELS)
    assert torch.equal(iddpm.sigma((torch.arange(1000) + 0.5).double() / 1000), u[:1000].flip(0))
    assert torch.equal(iddpm.sigma(torch.tensor([0.0, 1 - 1e-15, 1.0], dtype=torch.float64)), u[[999, 0, 0]])


@pytest.mark.parametrize("name", COLUMNS)
def test_draws_have_the_distributions_of_table_1_and_every_column_weights_the_networks_own_error_by_1(name):
    """Kolmogorov and Smirnov's distance of 10^5 draws, turned into uniform ones, exceeds 0.0062 once in 1,000 times. All are
    levels that the network knows, and lambda(sigma) c_out(sigma)^2 = 1: the loss is the square error of F at each of them."""
    distribution, preconditioning, uniform = COLUMNS[name]
    sigma = distribution.sample(10**5, torch.Generator().manual_seed(0))
    assert (uniform(sigma.double()).sort().values - (torch.arange(10**5) + 0.5) / 10**5).abs().max() < 0.0062
    assert preconditioning.sigma_min * (1 - 1e-3) <= sigma.min()
    assert sigma.max() <= preconditioning.sigma_max * (1 + 1e-3)
    torch.testing.assert_close(WEIGHTINGS[name](sigma, 0.5) * preconditioning.c_out(sigma) ** 2, torch.ones(10**5))


def test_best_denoiser_of_gaussian_data_has_the_loss_that_theory_gives():
    """For y ~ N(0, s^2), E|D - y|^2 = s^2 sigma^2 / (s^2 + sigma^2) in every pixel; with EDM's weighting at sigma_data = s that
    is 1. No scaling of x does better."""
    generator = torch.Generator().manual_seed(0)
    y = 0.5 * torch.randn(1000, 1, 16, 16, generator=generator)
    sigma = LogNormal().sample(1000, generator)
    n = torch.randn(y.shape, generator=generator) * sigma[:, None, None, None]
    ideal = (0.25 / (0.25 + sigma**2))[:, None, None, None]
    losses = [edm_weight(sigma, 0.5) * squared_error((ideal + change) * (y + n), y) / 256 for change in (-0.05, 0, 0.05)]
    less, best, more = (loss.mean().item() for loss in losses)
    assert losses[1].shape == (1000,)
    assert best == pytest.approx(1, abs=0.01)
    assert best < min(less, more)
