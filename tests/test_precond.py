"""The formulations of Table 1: the authors' numbers, the variances they are made for, the noise levels they know."""

import math

import pytest
import torch
from reference import OFFICIAL, assert_close
from torch import nn

from edm.precond import PRECONDITIONINGS, Denoiser, EDMPreconditioning, iDDPMPreconditioning
from edm.schedule import iddpm_levels


@pytest.mark.parametrize("name", ["EDM", "VP", "VE", "iDDPM"])
def test_preconditioning_agrees_with_the_authors(name):
    p = PRECONDITIONINGS[name.lower()]()
    for row in OFFICIAL["preconditioning"][f"{name}Precond"]:
        sigma = torch.tensor(row["sigma"], dtype=torch.float64)
        assert_close(
            torch.stack([p.c_skip(sigma), p.c_out(sigma), p.c_in(sigma), p.c_noise(sigma)]),
            [row[key] for key in ("c_skip", "c_out", "c_in", "c_noise")],
        )


@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
@pytest.mark.parametrize("sigma", [0.002, 0.3, 1.0, 80.0])
def test_input_and_target_of_the_network_have_unit_variance(sigma, sigma_data):
    """Appendix B.6, by Monte Carlo: 10^6 draws, whose variance is known to 0.15% (a standard deviation)."""
    p, sigma = EDMPreconditioning(sigma_data), torch.tensor(sigma, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    y = sigma_data * torch.randn(10**6, generator=generator, dtype=torch.float64)
    n = sigma * torch.randn(10**6, generator=generator, dtype=torch.float64)
    target = (y - p.c_skip(sigma) * (y + n)) / p.c_out(sigma)
    assert (p.c_in(sigma) * (y + n)).var().item() == pytest.approx(1, abs=0.01)
    assert target.var().item() == pytest.approx(1, abs=0.01)
    # Appendix B.6: no other c_skip leaves less for the network to get wrong.
    less, best, more = ((y - (p.c_skip(sigma) + change * p.c_in(sigma)) * (y + n)).var() for change in (-0.05, 0, 0.05))
    assert best < less
    assert best < more


@pytest.mark.parametrize("name", ["vp", "iddpm"])
def test_the_older_networks_predict_the_noise(name):
    """D = x - sigma F is y where F is the noise at unit variance; the second half of iDDPM's output is not looked at."""
    y, n, sigma = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4), 7.0

    class Network(nn.Linear):
        def forward(self, x, c_noise, labels, augment_labels):
            assert_close(x, ((y + sigma * n) / 50**0.5).tolist(), 1e-6)
            return torch.cat([n, torch.full_like(n, 99.0)], dim=1)

    assert_close(Denoiser(Network(1, 1), PRECONDITIONINGS[name]())(y + sigma * n, sigma), y.tolist(), 1e-5)


def test_the_noise_levels_that_a_formulation_knows():
    known = {name: (made().sigma_min, made().sigma_max) for name, made in PRECONDITIONINGS.items()}
    assert known["edm"] == (0, math.inf)
    assert known["ve"] == (0.02, 100)
    assert known["vp"] == pytest.approx((1e-6**0.5, math.expm1(10.05) ** 0.5), rel=1e-3)
    assert known["iddpm"] == (iddpm_levels()[999].item(), iddpm_levels()[0].item())


def test_only_iddpm_rounds_noise_levels():
    for name, made in PRECONDITIONINGS.items():
        net = Denoiser(nn.Identity(), made())
        assert (net.round_sigma(3.21) == 3.21) == (name != "iddpm")
    u = iddpm_levels()
    for j in (0, 3, 500, 999, 1000):
        assert net.round_sigma(u[j].item() * 1.001) == u[j].item()
    middle = (u[400] + u[401]).item() / 2
    assert net.round_sigma(middle * 1.0001) == u[400].item()
    assert net.round_sigma(middle * 0.9999) == u[401].item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_iddpm_knows_every_level_by_its_index(dtype):
    c_noise = iDDPMPreconditioning().c_noise(iddpm_levels()[:1000].to(dtype))
    assert_close(c_noise, torch.arange(999, -1, -1.0).tolist())
