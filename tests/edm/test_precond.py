"""The columns of Table 1: the authors' numbers, and the properties that they were made for."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from edm import precond
from edm.loss import edm_weight, inverse_variance, squared_error
from edm.precond import EDMPreconditioning, PreconditionedDenoiser, iDDPMPreconditioning
from edm.schedule import iddpm_levels

OFFICIAL = json.loads(Path(__file__).parents[1].joinpath("reference", "official_edm.json").read_text())["preconditioning"]
COLUMNS = {name: getattr(precond, f"{name}itioning") for name in OFFICIAL}  # "VPPrecond": VPPreconditioning, and so on
SIGMAS = torch.tensor([0.002, 0.02, 0.3, 1.0, 7.0, 80.0], dtype=torch.float64)


class Network(nn.Module):
    """A raw network F given by a function of the input and of c_noise, in float64."""

    def __init__(self, function):
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x, c_noise, labels, augment_labels):
        return self.function(x, c_noise)


def batch(mean_square: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images y and noise n of every level in SIGMAS, (6, 1, 2, 2), whose means are as if over all y and n.

    The images are of one colour: their mean is not 0, and their mean square is exact. So is that of the noise, its product
    with the images has the mean 0.
    """
    signs = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    return torch.full((6, 1, 2, 2), mean_square**0.5, dtype=torch.float64), SIGMAS[:, None, None, None] * signs


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
    sigma = SIGMAS[:, None, None, None]

    def mean_square(images: torch.Tensor) -> torch.Tensor:
        return images.square().mean(dim=(1, 2, 3))

    assert_close(mean_square(p.c_in(sigma) * (y + n)), torch.ones(6))
    assert_close(mean_square((y - p.c_skip(sigma) * (y + n)) / p.c_out(sigma)), torch.ones(6))
    less, best, more = (mean_square(y - (p.c_skip(sigma) + change) * (y + n)) for change in (-0.01, 0, 0.01))
    assert (best < less).all()
    assert (best < more).all()


def test_the_initial_loss_of_a_pixel_is_1_if_sigma_data_is_the_datas_root_mean_square(assert_close):
    """A new network puts out F = 0. Images of MNIST in [-1, 1] have a mean square of 0.97^2, which is not 0.5^2: then the loss
    is still 1 at low noise levels, where the noise is what is left, but (0.97 / 0.5)^2 at high ones."""

    def initial_loss(sigma_data: float, mean_square: float) -> torch.Tensor:
        y, n = batch(mean_square)
        D = PreconditionedDenoiser(Network(lambda x, c_noise: 0 * x), EDMPreconditioning(sigma_data))(y + n, SIGMAS)
        return edm_weight(SIGMAS, sigma_data) * squared_error(D, y) / y[0].numel()

    assert_close(initial_loss(0.97, 0.97**2), torch.ones(6))
    loss = initial_loss(0.5, 0.97**2)
    assert loss[0].item() == pytest.approx(1, abs=1e-3)
    assert loss[-1].item() == pytest.approx((0.97 / 0.5) ** 2, rel=1e-3)
    assert (loss.diff() > 0).all()


@pytest.mark.parametrize("name", ["VPPrecond", "VEPrecond", "iDDPMPrecond"])
def test_the_older_networks_predict_the_noise(name, assert_close):
    """D is y where F is the noise at unit variance (for VE, its negative), and the loss is the square error of F. For data of
    variance 1, the input of VP's and iDDPM's networks has unit variance."""
    p, (y, n) = COLUMNS[name](), batch(1.0)
    epsilon, sign = n / SIGMAS[:, None, None, None], -1 if name == "VEPrecond" else 1

    def perfect(x, c_noise):
        if name != "VEPrecond":
            assert_close(x.square().mean(dim=(1, 2, 3)), torch.ones(6))
        return torch.cat([sign * epsilon, torch.full_like(x, 99)], dim=1)  # D makes no use of further outputs

    assert_close(PreconditionedDenoiser(Network(perfect), p)(y + n, SIGMAS), y)
    D = PreconditionedDenoiser(Network(lambda x, c_noise: 0.7 * x), p)(y + n, SIGMAS)
    F = 0.7 * (y + n) * p.c_in(SIGMAS)[:, None, None, None]
    assert_close(inverse_variance(SIGMAS, 0.5) * squared_error(D, y), squared_error(F, sign * epsilon), 1e-7)


def test_only_iddpm_rounds_noise_levels_and_knows_them_by_their_index():
    for name, preconditioning in COLUMNS.items():
        net = PreconditionedDenoiser(nn.Identity(), preconditioning())
        assert (net.round_sigma(3.21) == 3.21) == (name != "iDDPMPrecond")
    u, net = iddpm_levels().tolist(), PreconditionedDenoiser(nn.Identity(), iDDPMPreconditioning())
    middle = (u[400] + u[401]) / 2
    for sigma, nearest in ((1e9, u[0]), (middle * 1.0001, u[400]), (middle * 0.9999, u[401]), (1e-9, u[999])):
        assert net.round_sigma(sigma) == nearest
    assert iDDPMPreconditioning().c_noise(iddpm_levels()[:1000]).tolist() == list(range(999, -1, -1))
