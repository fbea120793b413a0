"""The closed-form denoisers and the score, against definitions that do not share their code."""

import pytest
import torch

from edm.exact import FiniteData, GaussianMixture
from edm.precond import score


@pytest.mark.parametrize("sigma", [0.002, 0.3, 20.0])
def test_the_score_is_the_gradient_of_the_log_density(sigma, correlated, wave, assert_close):
    """(D(x; sigma) - x) / sigma^2 = grad log p(x; sigma) (Eq. 3), the gradient by automatic differentiation."""
    mixture = correlated(3, 4)
    x = wave(2, 1, 2, 2, scale=1.5, frequency=1.3, phase=0.2).requires_grad_()
    (gradient,) = torch.autograd.grad(mixture.log_density(x, sigma).sum(), x)
    assert_close(score(x, sigma, mixture(x, sigma)), gradient, 1e-8)


def test_the_density_is_that_of_pytorch_and_samples_have_its_moments(correlated, wave, assert_close):
    """For sigma as a number, and as one number for each image."""
    mixture, x = correlated(3, 4), wave(5, 1, 2, 2, scale=1.5, frequency=1.3, phase=0.2)
    covariances = mixture.eigenvectors @ torch.diag_embed(mixture.eigenvalues) @ mixture.eigenvectors.mT
    for sigma in (0.7, torch.tensor([0.1, 0.5, 1, 3, 9], dtype=torch.float64)):
        noise = torch.as_tensor(sigma, dtype=torch.float64).expand(5).square()[:, None, None, None]
        noisy = torch.distributions.MultivariateNormal(mixture.means, covariances + noise * torch.eye(4))
        expected = (mixture.log_weights + noisy.log_prob(x.flatten(1)[:, None])).logsumexp(dim=1)
        assert_close(mixture.log_density(x, sigma), expected)

    y, weights = mixture.sample(200_000, torch.Generator().manual_seed(1)), mixture.log_weights.exp()
    mean = weights @ mixture.means
    second = torch.einsum("k,kde->de", weights, covariances + mixture.means[:, :, None] * mixture.means[:, None])
    torch.testing.assert_close(y.mean(dim=0), mean, atol=0.02, rtol=0)
    torch.testing.assert_close(y.mT.cov(), second - mean[:, None] * mean, atol=0.03, rtol=0)


def test_a_singular_covariance_leaves_no_freedom_across_it():
    """Data on a line: at little noise, D is the nearest point of the line, however little."""
    direction = torch.tensor([0.6, 0.8], dtype=torch.float64)
    line = GaussianMixture(torch.zeros(1, 2), torch.outer(direction, direction)[None])
    x = torch.tensor([1.0, 2.0], dtype=torch.float64).reshape(1, 1, 1, 2)
    for sigma in (1e-3, 1e-6, 1e-8):
        torch.testing.assert_close(line(x, sigma).flatten(), direction * 2.2, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
def test_the_ideal_denoiser_is_the_mixture_of_points(dtype, tolerance, wave, assert_close):
    """Appendix B.3: N images are a mixture of N Gaussians of no width."""
    images = wave(6, 1, 2, 3, scale=1, frequency=0.9, phase=0.3)
    ideal, points = FiniteData(images), GaussianMixture(images.flatten(1), torch.zeros(6, 6, 6))
    sigma = torch.tensor([0.1, 0.5, 3.0], dtype=torch.float64)
    x = (images[:3] + wave(3, 1, 2, 3, scale=1, frequency=2.1, phase=0) * sigma[:, None, None, None]).to(dtype)
    assert ideal(x, sigma).dtype == points(x, sigma).dtype == dtype
    for level in (sigma, 0.5):
        assert_close(ideal(x, level), points(x.double(), level), tolerance)


def test_the_ideal_denoiser_ends_at_the_images_and_begins_at_their_mean(wave, assert_close):
    images = wave(6, 1, 2, 3, scale=1, frequency=0.9, phase=0.3)
    ideal = FiniteData(images)
    assert_close(ideal(images + 0.001, 0.002), images, 1e-6)
    assert_close(ideal(images, 1e4), images.mean(dim=0).expand(6, -1, -1, -1), 1e-6)
