"""The closed-form denoisers, against definitions that do not share their code."""

import pytest
import torch
from reference import assert_close, two_peaks, wave

from edm.exact import FiniteData, GaussianMixture


def correlated(k: int, d: int, seed: int = 0) -> GaussianMixture:
    """A mixture of k Gaussians of d pixels with covariances of any shape, the last of them singular."""
    generator = torch.Generator().manual_seed(seed)
    factors = 0.5 * torch.randn(k, d, d, generator=generator, dtype=torch.float64)
    factors[-1, :, 0] = 0
    means = torch.randn(k, d, generator=generator, dtype=torch.float64)
    return GaussianMixture(means, factors @ factors.mT, torch.rand(k, generator=generator) + 0.5)


@pytest.mark.parametrize("sigma", [0.002, 0.3, 20.0])
def test_the_denoiser_follows_the_score_of_the_density(sigma):
    """D(x; sigma) = x + sigma^2 grad log p(x; sigma) (Eq. 3), the gradient by automatic differentiation."""
    mixture = correlated(3, 4)
    sigma = torch.tensor([sigma, 2 * sigma], dtype=torch.float64)
    x = wave(2, 1, 2, 2, scale=1.5, frequency=1.3, phase=0.2).requires_grad_()
    (score,) = torch.autograd.grad(mixture.log_density(x, sigma).sum(), x)
    assert_close(mixture(x, sigma), (x + sigma[:, None, None, None] ** 2 * score).tolist())


def test_the_density_is_that_of_pytorch():
    mixture = correlated(3, 4)
    cov = mixture.eigenvectors @ torch.diag_embed(mixture.eigenvalues) @ mixture.eigenvectors.mT
    noisy = torch.distributions.MultivariateNormal(mixture.means, cov + 0.49 * torch.eye(4, dtype=torch.float64))
    x = wave(5, 1, 2, 2, scale=1.5, frequency=1.3, phase=0.2)
    expected = (mixture.log_weights + noisy.log_prob(x.flatten(1)[:, None])).logsumexp(dim=1)
    assert_close(mixture.log_density(x, 0.7), expected.tolist())


def test_a_singular_covariance_leaves_no_freedom_across_it():
    """Data on a line: at little noise, D is the nearest point of the line, however little."""
    direction = torch.tensor([0.6, 0.8], dtype=torch.float64)
    line = GaussianMixture(torch.zeros(1, 2), torch.outer(direction, direction)[None])
    x = torch.tensor([1.0, 2.0], dtype=torch.float64).reshape(1, 1, 1, 2)
    for sigma in (1e-3, 1e-6, 1e-8):
        torch.testing.assert_close(line(x, sigma).flatten(), direction * 2.2, atol=1e-5, rtol=0)


def test_the_mixture_of_the_reference_numbers():
    """Every pixel is N(+-0.5, 0.2^2): a mixture of one pixel, applied to each pixel on its own."""
    mixture = GaussianMixture(torch.tensor([[-0.5], [0.5]]), torch.full((2, 1, 1), 0.2, dtype=torch.float64) ** 2)
    x = wave(8, 1, 1, 1, scale=2, frequency=2.3, phase=0.4)
    assert_close(mixture(x, 0.3), two_peaks(x, 0.3).tolist())


def test_samples_have_the_means_and_covariances_of_the_mixture():
    mixture = correlated(2, 3)
    y = mixture.sample(200_000, torch.Generator().manual_seed(1))
    weights = mixture.log_weights.exp()
    mean = weights @ mixture.means
    cov = mixture.eigenvectors @ torch.diag_embed(mixture.eigenvalues) @ mixture.eigenvectors.mT
    second = torch.einsum("k,kde->de", weights, cov + mixture.means[:, :, None] * mixture.means[:, None])
    torch.testing.assert_close(y.mean(dim=0), mean, atol=0.02, rtol=0)
    torch.testing.assert_close(y.mT.cov(), second - mean[:, None] * mean, atol=0.03, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ideal_denoiser_is_the_mixture_of_points(dtype):
    """Appendix B.3: N images are a mixture of N Gaussians of no width."""
    images = wave(6, 1, 2, 3, scale=1, frequency=0.9, phase=0.3)
    ideal = FiniteData(images)
    points = GaussianMixture(images.flatten(1), torch.zeros(6, 6, 6))
    sigma = torch.tensor([0.1, 0.5, 3.0], dtype=torch.float64)
    x = (images[:3] + wave(3, 1, 2, 3, scale=1, frequency=2.1, phase=0) * sigma[:, None, None, None]).to(dtype)
    assert ideal(x, sigma).dtype == dtype
    assert_close(ideal(x, sigma), points(x.double(), sigma).tolist(), 1e-9 if dtype == torch.float64 else 1e-5)
    assert_close(ideal(x, 0.5), points(x.double(), 0.5).tolist(), 1e-9 if dtype == torch.float64 else 1e-5)


def test_the_ideal_denoiser_ends_at_the_images_and_begins_at_their_mean():
    images = wave(6, 1, 2, 3, scale=1, frequency=0.9, phase=0.3)
    ideal = FiniteData(images)
    assert_close(ideal(images + 0.001, 0.002), images.tolist(), 1e-6)
    assert_close(ideal(images, 1e4), images.mean(dim=0).expand(6, -1, -1, -1).tolist(), 1e-6)
