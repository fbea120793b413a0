"""DDPM (Ho et al., 2020, arXiv 2006.11239) and Improved DDPM (Nichol and Dhariwal, 2021, arXiv 2102.09672), as denoisers.

Equations of the two papers are cited as H4 and N15. A chain adds noise in T steps. Its image at timestep t = 0 .. T - 1 (the
papers count from 1) is

    x_t = sqrt(alpha_bar_t) y + sqrt(1 - alpha_bar_t) epsilon = s_t (y + sigma_t epsilon),
    s_t = sqrt(alpha_bar_t),  sigma_t = sqrt((1 - alpha_bar_t) / alpha_bar_t)

so x_t / s_t is an image with noise of standard deviation sigma_t, and a network that predicts epsilon is a denoiser at the
noise levels sigma_t (`precond.iDDPMPreconditioning` with `Chain.levels`). The variational bound is in bits per dimension,
for 8-bit images in [-1, 1].
"""

import copy
import functools
import math
from collections.abc import Callable, Iterator

import torch

from edm.precond import Denoiser, score
from edm.sampler import State
from edm.schedule import NoiseLevels, evenly_spaced, iddpm_levels


def linear_betas(num_timesteps: int) -> torch.Tensor:
    """Return DDPM's variances of the T steps, (T,): from 1e-4 to 0.02, times 1000 / T (H, Section 4)."""
    scale = 1000 / num_timesteps
    return torch.linspace(scale * 1e-4, scale * 0.02, num_timesteps, dtype=torch.float64)


def cosine_betas(num_timesteps: int) -> torch.Tensor:
    """Return Improved DDPM's variances of the T steps, (T,): computed from the noise levels u_j of EDM's Table 1 (N17)."""
    u = iddpm_levels(num_timesteps).flip(0)  # from u_T = 0 up
    return 1 - (1 + u[:-1] ** 2) / (1 + u[1:] ** 2)  # 1 - alpha_bar_t / alpha_bar_{t-1}


BETAS = {"linear": linear_betas, "cosine": cosine_betas}
VARIANCES = ("fixed_small", "fixed_large", "learned_range")


class Chain:
    """A chain of N timesteps: a table (N,) of each quantity, in float64 on the CPU until `like` moves it.

    In the methods, x_t and y are (B, C, H, W), and t (B,) holds indices into the tables.

    Args:
        alpha_bar: (N,), alpha_bar_t, falling (H4).
        timesteps: (N,), the number by which the network knows each of them.
    """

    def __init__(self, alpha_bar: torch.Tensor, timesteps: torch.Tensor):
        previous = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
        beta = 1 - alpha_bar / previous
        small = beta * (1 - previous) / (1 - alpha_bar)  # the posterior's variance (H7)
        small[0] = small[1] if len(small) > 1 else beta[0]  # it is 0, and its logarithm would be infinite
        self.timesteps, self.alpha_bar, self.beta = timesteps, alpha_bar, beta
        self.sigma, self.scale = ((1 - alpha_bar) / alpha_bar).sqrt(), alpha_bar.sqrt()
        self.y_coefficient = previous.sqrt() * beta / (1 - alpha_bar)  # of the posterior's mean (H7)
        self.x_coefficient = (1 - beta).sqrt() * (1 - previous) / (1 - alpha_bar)
        self.log_beta, self.log_small, self.log_large = beta.log(), small.log(), torch.cat([small[:1], beta[1:]]).log()
        self.levels = NoiseLevels(self.sigma)
        self.copies: dict[tuple, Chain] = {}

    def __len__(self) -> int:
        return len(self.timesteps)

    def strided(self, num_steps: int) -> "Chain":
        """Return the chain of num_steps of these timesteps, evenly spaced from the first to the last (N19).

        Its betas follow from their alpha_bar; the network still knows the timesteps by their own numbers.

        Raises:
            ValueError: the chain is shorter.
        """
        if num_steps > len(self):
            raise ValueError(f"the chain has {len(self)} timesteps, too few for {num_steps} steps")
        last = len(self) - 1
        index = evenly_spaced(num_steps, last).round().long() if num_steps > 1 else torch.tensor([last])
        return Chain(self.alpha_bar[index], self.timesteps[index])

    def like(self, x: torch.Tensor) -> "Chain":
        """Return the chain with its tables in the precision and on the device of x."""
        key = x.dtype, x.device
        if key not in self.copies:
            moved = self.copies[key] = copy.copy(self)
            for name, table in vars(self).items():
                if isinstance(table, torch.Tensor):  # first the precision, as Apple GPUs have no float64
                    setattr(moved, name, (table.to(x.dtype) if table.is_floating_point() else table).to(x.device))
        return self.copies[key]

    def diffuse(self, y: torch.Tensor, t: torch.Tensor, epsilon: torch.Tensor) -> torch.Tensor:
        """Return x_t, a draw of q(x_t | y), for noise epsilon of unit variance (H4)."""
        return pixelwise(self.scale, t) * (y + pixelwise(self.sigma, t) * epsilon)

    def posterior_mean(self, y: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Return the mean of q(x_{t-1} | x_t, y) (H7). The logarithm of its variance is `log_small`."""
        return pixelwise(self.y_coefficient, t) * y + pixelwise(self.x_coefficient, t) * x_t

    def learned_log_variance(self, v: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Return the log-variance that the network's second output v in [-1, 1] stands for (N15).

        It lies between the logarithms of the posterior's variance (v = -1) and of beta (v = 1).
        """
        fraction = (v + 1) / 2
        return fraction * pixelwise(self.log_beta, t) + (1 - fraction) * pixelwise(self.log_small, t)

    def reverse(
        self, denoiser: Denoiser, x_t: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None, variance: str
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the reverse step p(x_{t-1} | x_t), a normal distribution (H11, N13).

        Args:
            denoiser: D(x, sigma, labels); for the learned variance with `all_outputs`, as `precond.PreconditionedDenoiser`.
            variance: fixed_small, the posterior's; fixed_large, beta; or learned_range, between them as the network says.

        Returns:
            The denoised images, the mean of x_{t-1}, and its log-variance, which broadcasts to x_t's shape.

        Raises:
            KeyError: there is no such variance.
        """
        x, sigma = x_t / pixelwise(self.scale, t), self.sigma[t]
        if variance == "learned_range":
            denoised, v = denoiser(x, sigma, labels, all_outputs=True).to(x.dtype).chunk(2, dim=1)
            log_variance = self.learned_log_variance(v, t)
        else:
            denoised = denoiser(x, sigma, labels).to(x.dtype)
            log_variance = pixelwise({"fixed_small": self.log_small, "fixed_large": self.log_large}[variance], t)
        return denoised, self.posterior_mean(denoised, x_t, t), log_variance

    def bound_term(
        self, y: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor, mean: torch.Tensor, log_variance: torch.Tensor
    ) -> torch.Tensor:
        """Return the variational bound's term for the reverse step at t (H5): (B,), in bits per dimension.

        It is L_{t-1}, a divergence of two normal distributions, or at t = 0 the reconstruction L_0.
        """
        divergence = normal_divergence(self.posterior_mean(y, x_t, t), pixelwise(self.log_small, t), mean, log_variance)
        reconstruction = -discretized_log_likelihood(y, mean, log_variance / 2)
        return mean_bits(torch.where(t[:, None, None, None] == 0, reconstruction, divergence))

    def prior_term(self, y: torch.Tensor) -> torch.Tensor:
        """Return L_T (H5), the divergence of q(x_T | y) from N(0, I): (B,), in bits per dimension. It depends on no network."""
        t = torch.full((len(y),), len(self) - 1, device=y.device)
        mean, log_variance = pixelwise(self.scale, t) * y, pixelwise(1 - self.alpha_bar, t).log()
        return mean_bits(normal_divergence(mean, log_variance, torch.zeros_like(y), torch.zeros_like(y)))


@functools.cache
def make_chain(betas: str = "linear", num_timesteps: int = 1000) -> Chain:
    """Return the chain of all T timesteps, with linear or cosine betas.

    Raises:
        ValueError: not every beta is below 1.
    """
    beta = BETAS[betas](num_timesteps)
    if not beta.max() < 1:
        raise ValueError(f"{num_timesteps} are too few for the {betas} schedule, which takes more than 20")
    return Chain((1 - beta).cumprod(dim=0), torch.arange(num_timesteps))


def pixelwise(table: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Return the table's entries at t, (B,), as (B, 1, 1, 1)."""
    return table[t][:, None, None, None]


def mean_bits(nats: torch.Tensor) -> torch.Tensor:
    """Return the mean over each image, in bits: (B, C, H, W) -> (B,)."""
    return nats.mean(dim=(1, 2, 3)) / math.log(2)


def normal_divergence(
    mean: torch.Tensor, log_variance: torch.Tensor, other_mean: torch.Tensor, other_log_variance: torch.Tensor
) -> torch.Tensor:
    """Return the Kullback-Leibler divergence of one normal distribution from another, elementwise, in nats."""
    difference = log_variance - other_log_variance
    return (difference.exp() - 1 - difference + (mean - other_mean) ** 2 / other_log_variance.exp()) / 2


def discretized_log_likelihood(y: torch.Tensor, mean: torch.Tensor, log_std: torch.Tensor) -> torch.Tensor:
    """Return the log-probability of 8-bit values under a normal distribution, elementwise (H13).

    Each value has the probability of the interval of width 2/255 around it; those at -1 and 1 have the tails as well.
    """

    def cdf(z: torch.Tensor) -> torch.Tensor:  # of the standard normal distribution, approximately
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    above, below = (cdf((y - mean + half) * (-log_std).exp()) for half in (1 / 255, -1 / 255))
    above, below = torch.where(y > 0.999, 1.0, above), torch.where(y < -0.999, 0.0, below)
    return (above - below).clamp(min=1e-12).log()


def ancestral(
    denoiser: Denoiser,
    latents: torch.Tensor,
    chain: Chain,
    noise: Callable[[], torch.Tensor],
    variance: str = "fixed_small",
    labels: torch.Tensor | None = None,
) -> Iterator[State]:
    """Sample as DDPM does: draw x_{t-1} from p(x_{t-1} | x_t), from the last timestep to the first (H, Algorithm 2).

    DDPM also clips the denoised images: see `sampler.clipped`.

    Args:
        denoiser, variance: as in `Chain.reverse`.
        latents: (B, C, H, W), noise of unit variance: x_T.
        chain: all timesteps, or some (`Chain.strided`).
        noise: called once a step; returns noise of unit variance of the latents' shape.
        labels: one-hot (B, K) or None.

    Yields:
        The state after each step; the last one's x holds the images.
    """
    sigma, scale = [0.0, *chain.sigma.tolist()], [1.0, *chain.scale.tolist()]  # [0]: clean images; [i + 1]: timestep i
    chain, x = chain.like(latents), latents
    for index in reversed(range(len(chain))):
        t = torch.full((len(x),), index, device=x.device)
        denoised, mean, log_variance = chain.reverse(denoiser, x, t, labels, variance)
        epsilon = noise()
        x = mean + (log_variance / 2).exp() * epsilon if index > 0 else mean
        yield State(x / scale[index], sigma[index], denoised)


def ddim(denoiser: Denoiser, latents: torch.Tensor, chain: Chain, labels: torch.Tensor | None = None) -> Iterator[State]:
    """Sample with DDIM (Song et al., 2021, arXiv 2010.02502, Eq. 12 without noise): keep the predicted noise between timesteps.

    This is Euler's method with sigma(t) = t. Arguments and states are those of `ancestral`.
    """
    sigma, scale = [0.0, *chain.sigma.tolist()], [1.0, *chain.scale.tolist()]  # [0]: clean images; [i + 1]: timestep i
    x = latents / scale[-1]
    for index in reversed(range(len(chain))):
        denoised = denoiser(x, sigma[index + 1], labels).to(x.dtype)
        epsilon = -sigma[index + 1] * score(x, sigma[index + 1], denoised)
        x = denoised + sigma[index] * epsilon
        yield State(x, sigma[index], denoised)


def variational_bound(
    denoiser: Denoiser,
    y: torch.Tensor,
    chain: Chain,
    noise: Callable[[], torch.Tensor],
    variance: str = "fixed_small",
    labels: torch.Tensor | None = None,
) -> Iterator[torch.Tensor]:
    """Compute the terms of the bound on the negative log-likelihood of images (H5), all but `Chain.prior_term`.

    Args:
        y: (B, C, H, W), 8-bit images in [-1, 1]. The computation has their precision.
        denoiser, chain, noise, variance, labels: as in `ancestral`.

    Yields:
        A term (B,) in bits per dimension for each timestep, from the last to the first; the final one is L_0.
    """
    chain = chain.like(y)
    for index in reversed(range(len(chain))):
        t = torch.full((len(y),), index, device=y.device)
        x_t = chain.diffuse(y, t, noise())
        _, mean, log_variance = chain.reverse(denoiser, x_t, t, labels, variance)
        yield chain.bound_term(y, x_t, t, mean, log_variance)
