"""Denoisers in closed form: what a perfectly trained network would compute, so that theory can be tested without training."""

import math

import torch


class GaussianMixture:
    """The exact denoiser for data from a mixture of K Gaussians over images with D = C H W pixels.

    Args:
        means: (K, D).
        covariances: (K, D, D), symmetric and positive semidefinite.
        weights: (K,), above 0; they are scaled to the sum 1. By default all are equal.

    All computations are in float64, on the device of `means`.
    """

    def __init__(self, means: torch.Tensor, covariances: torch.Tensor, weights: torch.Tensor | None = None):
        self.means = means.double()
        self.eigenvalues, self.eigenvectors = torch.linalg.eigh(covariances.double())  # (K, D), (K, D, D)
        rounding = means.shape[1] * torch.finfo(torch.float64).eps * self.eigenvalues.amax(dim=1, keepdim=True)
        self.eigenvalues = torch.where(self.eigenvalues > rounding, self.eigenvalues, 0.0)  # smaller ones are rounding errors
        weights = torch.ones(len(means)) if weights is None else weights
        self.log_weights = weights.to(means.device).double().log().log_softmax(dim=0)

    def components(self, x: torch.Tensor, sigma: torch.Tensor | float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Evaluate every component with noise of level sigma, a scalar or (B,), at images x (B, ...).

        Returns:
            log(weight density) (B, K); and in the coordinates of the component's eigenvectors, x - mean (B, K, D) and the
            variances with noise (B, K, D).
        """
        x = x.double().flatten(1)
        sigma = torch.as_tensor(sigma, dtype=torch.float64, device=x.device).expand(len(x))
        variance = self.eigenvalues + sigma[:, None, None] ** 2
        z = torch.einsum("bkd,kde->bke", x[:, None] - self.means, self.eigenvectors)
        log_density = -((z**2 / variance) + (2 * math.pi * variance).log()).sum(dim=2) / 2
        return self.log_weights + log_density, z, variance

    def log_density(self, x: torch.Tensor, sigma: torch.Tensor | float) -> torch.Tensor:
        """Return log p(x; sigma), (B,), the density of data plus noise: x (B, ...), sigma a scalar or (B,)."""
        return self.components(x, sigma)[0].logsumexp(dim=1)

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor | float, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Return E[y | x]: the components' means mu + S (S + sigma^2)^-1 (x - mu), weighted by their probabilities given x.

        Takes x (B, C, H, W) and sigma above 0, a scalar or (B,); returns (B, C, H, W) in x's dtype. `labels` is ignored.
        """
        log_joint, z, variance = self.components(x, sigma)
        shrunk = torch.einsum("bke,kde->bkd", z * self.eigenvalues / variance, self.eigenvectors)
        posterior = log_joint.softmax(dim=1)
        return torch.einsum("bk,bkd->bd", posterior, self.means + shrunk).reshape(x.shape).to(x.dtype)

    def sample(self, num_samples: int, generator: torch.Generator) -> torch.Tensor:
        """Draw samples of the data, without noise: (num_samples, D) in float64."""
        k = torch.multinomial(self.log_weights.exp(), num_samples, replacement=True, generator=generator)
        normal = torch.randn(self.means[k].shape, generator=generator, dtype=torch.float64, device=k.device)
        return self.means[k] + torch.einsum("nde,ne->nd", self.eigenvectors[k], self.eigenvalues[k].sqrt() * normal)


class FiniteData:
    """The ideal denoiser for a finite data set (Appendix B.3): the mean of its images, weighted by their probabilities given x.

    Args:
        images: (N, C, H, W), in [-1, 1].
    """

    def __init__(self, images: torch.Tensor):
        self.images = images

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor | float, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Return sum_i y_i N(x; y_i, sigma^2) / sum_i N(x; y_i, sigma^2).

        Takes x (B, C, H, W) and sigma above 0, a scalar or (B,); returns (B, C, H, W) in x's dtype. `labels` is ignored.
        """
        images = self.images.to(x).flatten(1)
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(len(x))
        # With matrix products, the distance would be a small difference of large numbers.
        distances = torch.cdist(x.flatten(1), images, compute_mode="donot_use_mm_for_euclid_dist")
        posterior = (-((distances / sigma[:, None]) ** 2) / 2).softmax(dim=1)
        return (posterior @ images).reshape(x.shape)
