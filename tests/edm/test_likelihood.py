"""The likelihood by the probability-flow ODE, against densities that are known."""

import math

import pytest
import torch

from edm.exact import GaussianMixture
from edm.likelihood import log_density
from edm.schedule import ve_steps
from lab.bits import bits_per_dimension, dequantize


def levels(number: int, sigma_min: float, sigma_max: float) -> torch.Tensor:
    """Return noise levels in geometric progression, rising."""
    return ve_steps(number, sigma_min, sigma_max)[:-1].flip(0)


@pytest.mark.parametrize("sigma_min", [0.002, 0.3])
def test_bits_of_a_gaussian_mixture(sigma_min, correlated, normal_noise):
    """Within 2 standard errors of the exact value: of these images, over Hutchinson's signs; and of all images, its entropy."""
    mixture = correlated(3, 4)

    def noisy_images(number: int, seed: int) -> torch.Tensor:
        y = mixture.sample(number, torch.Generator().manual_seed(seed)).view(-1, 1, 2, 2)
        return y + sigma_min * normal_noise(*y.shape, seed=seed + 1)()

    x = noisy_images(2000, seed=1)
    *_, estimate = log_density(mixture, x, levels(128, sigma_min, 80), normal_noise(*x.shape))
    bits, exact = (bits_per_dimension(log, 4) for log in (estimate, mixture.log_density(x, sigma_min)))
    difference = bits - exact
    assert abs(difference.mean()) < 2 * difference.std() / math.sqrt(len(x))
    assert difference.std() < 0.3 * exact.std()  # a far smaller error than that of the images
    entropy = bits_per_dimension(mixture.log_density(noisy_images(100_000, seed=3), sigma_min), 4).mean()
    assert abs(bits.mean() - entropy) < 2 * bits.std() / math.sqrt(len(x))


def test_order_of_convergence(normal_noise):
    """In one dimension v^2 = 1, so Hutchinson's estimate is exact, and the steps' error is left: of order 2. The label moves
    data and images alike."""
    mixture = GaussianMixture(torch.tensor([[-0.6], [0.1], [0.7]]), torch.tensor([0.04, 0.01, 0.09]).view(3, 1, 1))
    x = torch.linspace(-1.2, 1.2, 25, dtype=torch.float64).view(-1, 1, 1, 1)

    def estimate(steps: int) -> torch.Tensor:
        def conditional(x, sigma, labels):
            return mixture(x - labels, sigma) + labels

        sigma_steps, label = levels(steps + 1, 0.01, 800), torch.tensor(-0.06)
        return list(log_density(conditional, x + label, sigma_steps, normal_noise(*x.shape), label))[-1]

    coarse, middle, fine = (estimate(steps) for steps in (128, 256, 512))
    order = math.log2((middle - coarse).abs().max() / (fine - middle).abs().max())
    assert order == pytest.approx(2, abs=0.2)
    extrapolated = fine + (fine - middle) / 3
    assert (extrapolated - mixture.log_density(x, 0.01)).abs().max() < 5e-4  # half of it is the normal distribution's at 800


def test_grey_levels_tile_the_line_and_a_uniform_image_has_8_bits():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    low, high = (dequantize(images, torch.full((1, 1, 16, 16), edge, dtype=torch.float64)).flatten() for edge in (0, 1))
    torch.testing.assert_close(low[1:], high[:-1])
    torch.testing.assert_close(((low + high) / 2)[[0, 255]], torch.tensor([-1.0, 1.0], dtype=torch.float64))
    uniform = torch.tensor([-3 * math.log(256 * 2 / 255)], dtype=torch.float64)  # of 3 pixels, over all 256 intervals
    assert bits_per_dimension(uniform, 3).item() == pytest.approx(8)
