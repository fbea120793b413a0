"""The columns of Table 1: the authors' numbers, and the properties that they were made for."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from edm import precond
from edm.precond import EDMPreconditioning, PreconditionedDenoiser, iDDPMPreconditioning
from edm.schedule import iddpm_levels

OFFICIAL = json.loads(Path(__file__).parents[1].joinpath("reference", "official_edm.json").read_text())["preconditioning"]
COLUMNS = {name: getattr(precond, f"{name}itioning") for name in OFFICIAL}  # "VPPrecond": VPPreconditioning, and so on
SIGMAS = torch.tensor([0.002, 0.02, 0.3, 1.0, 7.0, 80.0], dtype=torch.float64)[:, None, None, None]


def batch(mean_square: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images y and noise n of every level in SIGMAS, (6, 1, 2, 2), whose means are as if over all y and n.

    The images are of one colour: their mean is not 0, and their mean square is exact. So is that of the noise, its product
    with the images has the mean 0.
    """
    signs = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    return torch.full((6, 1, 2, 2), mean_square**0.5, dtype=torch.float64), SIGMAS * signs


def mean_square(images: torch.Tensor) -> torch.Tensor:
    return images.square().mean(dim=(1, 2, 3))


@pytest.mark.parametrize("name", COLUMNS)
def test_preconditioning_agrees_with_the_authors(name, assert_close):
    p = COLUMNS[name]()
    for row in OFFICIAL[name]:
        sigma = torch.tensor(row["sigma"], dtype=torch.float64)
        for c in ("c_skip", "c_out", "c_in", "c_noise"):
            assert_close(getattr(p, c)(sigma), row[c])


@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_input_and_target_of_the_network_have_mean_square_1(sigma_data, assert_close):
    """Appendix B.6. And no other c_skip leaves a smaller target, which is what c_out amplifies the network's errors by."""
    p, (y, n) = EDMPreconditioning(sigma_data), batch(sigma_data**2)
    assert_close(mean_square(p.c_in(SIGMAS) * (y + n)), torch.ones(6))
    assert_close(mean_square((y - p.c_skip(SIGMAS) * (y + n)) / p.c_out(SIGMAS)), torch.ones(6))
    less, best, more = (mean_square(y - (p.c_skip(SIGMAS) + change) * (y + n)) for change in (-0.01, 0, 0.01))
    assert (best < less).all()
    assert (best < more).all()


def test_the_older_networks_predict_the_noise(assert_close):
    """D is y where F is the noise at unit variance (for VE, its negative). For data of variance 1, the input of VP's and
    iDDPM's networks has unit variance."""
    y, n = batch(1.0)
    for name, sign in (("VPPrecond", 1), ("iDDPMPrecond", 1), ("VEPrecond", -1)):
        p = COLUMNS[name]()
        assert_close(p.c_skip(SIGMAS) * (y + n) + p.c_out(SIGMAS) * sign * n / SIGMAS, y)
        assert name == "VEPrecond" or mean_square(p.c_in(SIGMAS) * (y + n)).tolist() == pytest.approx([1] * 6)


def test_only_iddpm_rounds_noise_levels_and_knows_them_by_their_index():
    for name, preconditioning in COLUMNS.items():
        net = PreconditionedDenoiser(nn.Identity(), preconditioning())
        assert (net.round_sigma(3.21) == 3.21) == (name != "iDDPMPrecond")
    u, net = iddpm_levels().tolist(), PreconditionedDenoiser(nn.Identity(), iDDPMPreconditioning())
    middle = (u[400] + u[401]) / 2
    for sigma, nearest in ((1e9, u[0]), (middle * 1.0001, u[400]), (middle * 0.9999, u[401]), (1e-9, u[999])):
        assert net.round_sigma(sigma) == nearest
    assert iDDPMPreconditioning().c_noise(iddpm_levels()[:1000]).tolist() == list(range(999, -1, -1))
