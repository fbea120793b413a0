"""The likelihood by the probability-flow ODE, against densities that are known."""

import math

import pytest
import torch
from reference import wave
from test_exact import correlated

from edm.exact import GaussianMixture
from edm.likelihood import bits_per_dimension, dequantize, log_density, trace_estimate
from edm.schedule import ve_steps


def normal_noise(x: torch.Tensor, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(x.shape, generator=generator, dtype=x.dtype)


def levels(*arguments) -> torch.Tensor:
    """In geometric progression, rising."""
    return ve_steps(*arguments)[:-1].flip(0)


def last(states) -> torch.Tensor:
    *_, answer = states
    return answer


MIXTURE = correlated(3, 4)  # whose last component lies in a plane


@pytest.mark.parametrize("sigma_min", [0.002, 0.3])
def test_bits_of_a_gaussian_mixture(sigma_min):
    """Within 2 standard errors of the exact value: of these images, over Hutchinson's signs; and of all images, its entropy."""
    x = MIXTURE.sample(2000, torch.Generator().manual_seed(1)).view(-1, 1, 2, 2)
    x = x + sigma_min * normal_noise(x, seed=2)()
    estimate = last(log_density(MIXTURE, x, levels(128, sigma_min, 80), normal_noise(x)))
    bits, exact = (bits_per_dimension(log, 4) for log in (estimate, MIXTURE.log_density(x, sigma_min)))
    difference = bits - exact
    assert abs(difference.mean()) < 2 * difference.std() / math.sqrt(len(x))
    assert difference.std() < 0.3 * exact.std()  # a far smaller error than that of the images
    others = MIXTURE.sample(100_000, torch.Generator().manual_seed(3)).view(-1, 1, 2, 2)
    others = others + sigma_min * normal_noise(others, seed=4)()
    entropy = bits_per_dimension(MIXTURE.log_density(others, sigma_min), 4).mean()
    assert abs(bits.mean() - entropy) < 2 * bits.std() / math.sqrt(len(x))


def test_order_of_convergence():
    """In one dimension v^2 = 1, so Hutchinson's estimate is exact, and the steps' error is left: of order 2."""
    mixture = GaussianMixture(torch.tensor([[-0.6], [0.1], [0.7]]), torch.tensor([0.04, 0.01, 0.09]).view(3, 1, 1))
    x = torch.linspace(-1.2, 1.2, 25, dtype=torch.float64).view(-1, 1, 1, 1)
    coarse, middle, fine = (
        last(log_density(mixture, x, levels(steps + 1, 0.01, 800), normal_noise(x))) for steps in (128, 256, 512)
    )
    order = math.log2((middle - coarse).abs().max() / (fine - middle).abs().max())
    assert order == pytest.approx(2, abs=0.2)
    extrapolated = fine + (fine - middle) / 3
    assert (extrapolated - mixture.log_density(x, 0.01)).abs().max() < 5e-4  # half of it is the normal distribution's at 800


def test_hutchinsons_mean_is_the_trace():
    x = wave(2, 1, 2, 2, scale=1.0, frequency=1.3, phase=0.2)
    jacobian = torch.autograd.functional.jacobian(lambda x: MIXTURE(x, 0.5), x).view(2, 4, 2, 4)
    signs = torch.tensor([[1 if number >> place & 1 else -1 for place in range(4)] for number in range(16)]).double()
    estimates = [trace_estimate(MIXTURE, x, 0.5, None, v.expand(2, 4).reshape(x.shape))[1] for v in signs]
    exact = torch.stack([jacobian[index, :, index].trace() for index in range(2)])
    torch.testing.assert_close(torch.stack(estimates).mean(dim=0), exact)


def test_labels_are_handed_on():
    seen = []

    def denoiser(x, sigma, labels):
        seen.append((sigma, labels))
        return MIXTURE(x, sigma)

    x, labels = wave(2, 1, 2, 2, scale=1.0, frequency=1.3, phase=0.2), torch.eye(2)
    states = list(log_density(denoiser, x, torch.tensor([0.5, 1, 4]), normal_noise(x), labels))
    assert [sigma for sigma, _ in seen] == [0.5, 1, 1, 4]
    assert all(given is labels for _, given in seen)
    assert len(states) == 2


def test_a_grey_levels_interval():
    """Its 256 intervals tile the line from -1 to 1, and a uniform image has 8 bits."""
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    low, high = (dequantize(images, torch.full((1, 1, 16, 16), edge, dtype=torch.float64)).flatten() for edge in (0, 1))
    torch.testing.assert_close(low[1:], high[:-1])
    torch.testing.assert_close(((low + high) / 2)[[0, 255]], torch.tensor([-1.0, 1.0], dtype=torch.float64))
    uniform = torch.tensor([-3 * math.log(256 * 2 / 255)], dtype=torch.float64)  # of 3 pixels, over all intervals
    assert bits_per_dimension(uniform, 3).item() == pytest.approx(8)
