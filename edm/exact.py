"""Denoisers in closed form: what a network would be after perfect training, so that theory can be tested."""

import math

import torch


class GaussianMixture:
    """The exact denoiser of data from a mixture of K Gaussians over images of D = C H W pixels.

    Args:
        means: (K, D).
        covariances: (K, D, D), symmetric; singular ones are allowed.
        weights: (K,), positive, of any sum; by default equal.

    Computes in float64, on the CPU or wherever the arguments are.
    """

    def __init__(self, means: torch.Tensor, covariances: torch.Tensor, weights: torch.Tensor | None = None):
        self.means = means.double()
        self.eigenvalues, self.eigenvectors = torch.linalg.eigh(covariances.double())  # (K, D), (K, D, D)
        rounding = means.shape[1] * torch.finfo(torch.float64).eps * self.eigenvalues.amax(dim=1, keepdim=True)
        self.eigenvalues = torch.where(self.eigenvalues > rounding, self.eigenvalues, 0.0)  # the others are 0 but for rounding
        weights = torch.ones(len(means)) if weights is None else weights
        self.log_weights = weights.to(means.device).double().log().log_softmax(dim=0)

    def components(self, x: torch.Tensor, sigma: torch.Tensor | float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Every component's view of x (B, ...) at noise level sigma: log(weight density) (B, K), x relative to the mean in
        the eigenvectors' coordinates (B, K, D), and the variances there, noise included, (B, K, D)."""
        x = x.double().flatten(1)
        sigma = torch.as_tensor(sigma, dtype=torch.float64, device=x.device).expand(len(x))
        variance = self.eigenvalues + sigma[:, None, None] ** 2
        z = torch.einsum("bkd,kde->bke", x[:, None] - self.means, self.eigenvectors)
        log_density = -((z**2 / variance) + (2 * math.pi * variance).log()).sum(dim=2) / 2
        return self.log_weights + log_density, z, variance

    def log_density(self, x: torch.Tensor, sigma: torch.Tensor | float) -> torch.Tensor:
        """log p(x; sigma), the density of data plus noise: (B, ...) -> (B,)."""
        return self.components(x, sigma)[0].logsumexp(dim=1)

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor | float, labels: torch.Tensor | None = None) -> torch.Tensor:
        """E[y | x]: every component's posterior mean, mu + S (S + sigma^2)^-1 (x - mu), by its probability given x.

        Args:
            x: (B, C, H, W).
            sigma: a scalar or (B,), above 0.
            labels: ignored.

        Returns:
            (B, C, H, W) in x's precision.
        """
        log_joint, z, variance = self.components(x, sigma)
        shrunk = torch.einsum("bke,kde->bkd", z * self.eigenvalues / variance, self.eigenvectors)
        posterior = log_joint.softmax(dim=1)
        return torch.einsum("bk,bkd->bd", posterior, self.means + shrunk).reshape(x.shape).to(x.dtype)

    def sample(self, number: int, generator: torch.Generator) -> torch.Tensor:
        """(number, D) draws of the data, in float64."""
        k = torch.multinomial(self.log_weights.exp(), number, replacement=True, generator=generator)
        normal = torch.randn(number, self.means.shape[1], generator=generator, dtype=torch.float64, device=self.means.device)
        return self.means[k] + torch.einsum("nde,ne->nd", self.eigenvectors[k], self.eigenvalues[k].sqrt() * normal)


class FiniteData:
    """The ideal denoiser of a finite data set (Appendix B.3): the mean of its images, each weighted by the probability that
    x came from it.

    Args:
        images: (N, C, H, W), in [-1, 1].
    """

    def __init__(self, images: torch.Tensor):
        self.images = images

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor | float, labels: torch.Tensor | None = None) -> torch.Tensor:
        """sum_i y_i N(x; y_i, sigma^2) / sum_i N(x; y_i, sigma^2).

        Args:
            x: (B, C, H, W).
            sigma: a scalar or (B,), above 0.
            labels: ignored.

        Returns:
            (B, C, H, W) in x's precision.
        """
        images = self.images.to(x).flatten(1)
        sigma = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).expand(len(x))
        # Matrix products would find the distance as a difference of large numbers.
        distances = torch.cdist(x.flatten(1), images, compute_mode="donot_use_mm_for_euclid_dist")
        posterior = (-((distances / sigma[:, None]) ** 2) / 2).softmax(dim=1)
        return (posterior @ images).reshape(x.shape)
