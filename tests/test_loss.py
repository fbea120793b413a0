"""The noise distribution, the weighting, the loss and the moving average."""

import math

import pytest
import torch
from reference import OFFICIAL, assert_close
from torch import nn

from edm.ema import EMA
from edm.loss import NOISE_DISTRIBUTIONS, WEIGHTINGS, LogNormal, by_noise_level, denoising_loss, edm_weight
from edm.precond import PRECONDITIONINGS
from edm.schedule import VP, iddpm_levels


@pytest.mark.parametrize(
    ("row", "distribution", "weighting"),
    [
        (row, distribution, weighting)
        for name, distribution, weighting in [("EDMLoss", "lognormal", "edm"), ("VPLoss", "vp", "vp"), ("VELoss", "ve", "ve")]
        for row in OFFICIAL["loss"][name]
    ],
)
def test_noise_levels_and_weights_agree_with_the_authors(row, distribution, weighting):
    sigma = NOISE_DISTRIBUTIONS[distribution]().sigma(torch.tensor(row["draw"], dtype=torch.float64))
    assert_close(torch.stack([sigma, WEIGHTINGS[weighting](sigma, 0.5)]), [row["sigma"], row["weight"]])


def test_iddpm_trains_at_all_its_levels_but_0_alike():
    u = iddpm_levels()
    j = torch.arange(1000, dtype=torch.float64)
    iddpm = NOISE_DISTRIBUTIONS["iddpm"]()
    assert torch.equal(iddpm.sigma((j + 0.5) / 1000), u[:1000])
    assert torch.equal(iddpm.sigma(torch.tensor([0.0, 1 - 1e-15, 1.0], dtype=torch.float64)), u[[0, 999, 999]])
    sigma = iddpm.sample(10**6, torch.Generator().manual_seed(0))
    counts = (sigma[:, None] == u[:1000:100].float()).sum(dim=0)
    assert counts.tolist() == pytest.approx([1000] * 10, abs=150)  # a standard deviation is 32
    assert_close(WEIGHTINGS["iddpm"](u[:1], 0.5), [u[0].item() ** -2])


@pytest.mark.parametrize(
    ("name", "uniform"),
    [
        ("vp", lambda sigma: (VP().inverse(sigma) - 1e-5) / (1 - 1e-5)),
        ("ve", lambda sigma: (sigma / 0.02).log() / math.log(5000)),
    ],
)
def test_what_should_be_uniform_is(name, uniform):
    """Kolmogorov and Smirnov's distance of 10^5 draws; a true one exceeds 0.0062 once in 1,000 times."""
    draws = NOISE_DISTRIBUTIONS[name]().sample(10**5, torch.Generator().manual_seed(0)).double()
    expected = (torch.arange(10**5) + 0.5) / 10**5
    assert (uniform(draws).sort().values - expected).abs().max() < 0.0062


@pytest.mark.parametrize("name", ["vp", "ve", "iddpm"])
def test_a_formulation_trains_at_noise_levels_that_it_knows_with_its_output_weighted_by_1(name):
    """With lambda = 1 / sigma^2 and c_out = +-sigma the loss is the square error of the network's own output."""
    p, generator = PRECONDITIONINGS[name](), torch.Generator().manual_seed(0)
    sigma = NOISE_DISTRIBUTIONS[name]().sample(10_000, generator)
    assert p.sigma_min * (1 - 1e-3) <= sigma.min()
    assert sigma.max() <= p.sigma_max * (1 + 1e-3)
    torch.testing.assert_close(WEIGHTINGS[name](sigma, 0.5) * p.c_out(sigma) ** 2, torch.ones(10_000))


def test_noise_levels_are_log_normal():
    log_sigma = LogNormal(-0.4, 1.7).sample(10**6, torch.Generator().manual_seed(0)).double().log()
    assert log_sigma.mean().item() == pytest.approx(-0.4, abs=0.01)
    assert log_sigma.std().item() == pytest.approx(1.7, abs=0.01)


def test_loss_is_the_weighted_square_summed_over_pixels_one_per_image():
    y, n = torch.full((2, 3, 4, 5), 0.5), torch.full((2, 3, 4, 5), 0.25)
    sigma, weight = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 10.0])
    seen = []

    def denoiser(x, sigma, labels):
        seen.append((sigma, labels))
        return x  # wrong by n

    labels = torch.eye(2)
    loss = denoising_loss(denoiser, y, n, sigma, weight, labels=labels)
    assert_close(loss, [60 * 0.0625, 10 * 60 * 0.0625])
    assert seen[0][0] is sigma
    assert seen[0][1] is labels


def test_best_denoiser_of_gaussian_data_has_the_loss_that_theory_gives():
    """For y ~ N(0, s^2), E|D - y|^2 = s^2 sigma^2 / (s^2 + sigma^2); with EDM's weighting at sigma_data = s that becomes 1."""
    generator = torch.Generator().manual_seed(0)
    y = 0.5 * torch.randn(1000, 1, 16, 16, generator=generator)
    sigma = LogNormal().sample(1000, generator)
    n = torch.randn(y.shape, generator=generator) * sigma[:, None, None, None]

    def ideal(x, sigma):
        return (0.25 / (0.25 + sigma**2))[:, None, None, None] * x

    loss = denoising_loss(ideal, y, n, sigma, edm_weight(sigma, 0.5)) / 256
    assert loss.mean().item() == pytest.approx(1, abs=0.01)


def test_ema_matches_its_closed_form():
    """With constant weights w from the start, the shadow is w + (w_0 - w) prod(beta); beta = 0.5^(batch / half-life)."""
    net = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(net.weight)
    ema = EMA(net, halflife_images=1000, rampup_ratio=1e9)
    nn.init.ones_(net.weight)
    for step in range(1, 51):
        ema.update(images_seen=20 * step, batch_size=20)
    assert ema.net.weight.item() == pytest.approx(0.5, abs=1e-5)  # 1000 images: one half-life
    assert net.weight.item() == 1
    assert not ema.net.weight.requires_grad


def test_ema_ramps_up_and_does_not_depend_on_the_batch_size():
    net = nn.Linear(1, 1)
    ema = EMA(net, halflife_images=500, rampup_ratio=0.05)
    assert ema.beta(images_seen=100, batch_size=10) == pytest.approx(0.5 ** (10 / 5))  # 5% of 100 images
    assert ema.beta(images_seen=10_000, batch_size=10) == pytest.approx(0.5 ** (10 / 500))
    assert ema.beta(images_seen=10**9, batch_size=10) == ema.beta(images_seen=10_000, batch_size=10)
    assert EMA(net, 500, None).beta(images_seen=100, batch_size=10) == pytest.approx(0.5 ** (10 / 500))
    assert ema.beta(10**9, 10) ** 8 == pytest.approx(ema.beta(10**9, 80))


def test_losses_by_noise_level():
    """The mean of each band's images, by their importance; nan where there are none."""
    sigma = torch.tensor([0.01, 0.04, 0.1, 0.5, 0.7, 100.0])
    losses = torch.tensor([1.0, 2.0, 4.0, 8.0, math.nan, 32.0])
    importance = torch.tensor([1.0, 3.0, 1.0, 1.0, 1.0, 0.5])
    found = by_noise_level(losses, sigma, importance, torch.tensor([0.05, 0.2, 0.8, 3.2]))
    torch.testing.assert_close(found, torch.tensor([1.75, 4.0, math.nan, math.nan, 32.0]), equal_nan=True)
