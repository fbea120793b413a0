"""Where EDM came from: DDPM (Ho et al., 2020; its equations are called H4 and so on) and Improved DDPM (Nichol and Dhariwal,
2021; N15).

A chain adds noise in T steps. Its image at timestep t = 0 .. T - 1 (the papers count from 1) is

    x_t = sqrt(abar_t) y + sqrt(1 - abar_t) epsilon = s_t (y + sigma_t epsilon),   sigma_t = sqrt((1 - abar_t) / abar_t)

so that a network trained on the chain is a denoiser, at the noise levels sigma_t: what predicts epsilon predicts y. The bound
is in bits per dimension, for 8-bit images in [-1, 1].
"""

import copy
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from edm.precond import Preconditioning, VPPreconditioning
from edm.sampler import State
from edm.schedule import fractions


def linear_betas(num_timesteps: int) -> torch.Tensor:
    """DDPM's variances of the steps, from 1e-4 to 0.02 in a straight line for T = 1000 (H, Section 4); of a chain of another
    length, scaled by 1000 / T."""
    scale = 1000 / num_timesteps
    return torch.linspace(scale * 1e-4, scale * 0.02, num_timesteps, dtype=torch.float64)


def cosine_betas(num_timesteps: int, s: float = 0.008) -> torch.Tensor:
    """Improved DDPM's: abar falls like the square of a cosine, no beta being above 0.999 (N17)."""
    time = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    alpha_bar = torch.cos((time + s) / (1 + s) * math.pi / 2).square()
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)


BETAS = {"linear": linear_betas, "cosine": cosine_betas}
VARIANCES = ("fixed_small", "fixed_large", "learned_range")


class Chain:
    """A chain of N timesteps: a table (N,) of each quantity, in float64 on the CPU unless it is `like` something else.

    Args:
        alpha_bar: (N,), abar_t, falling (H4).
        timesteps: (N,), what the network calls these timesteps.

    Below, x_t and y are (B, C, H, W), and t (B,) says at which places of the chain.
    """

    def __init__(self, alpha_bar: torch.Tensor, timesteps: torch.Tensor):
        previous = torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
        beta = 1 - alpha_bar / previous
        small = beta * (1 - previous) / (1 - alpha_bar)  # the posterior's variance (H7)
        small[0] = small[1] if len(small) > 1 else beta[0]  # for 0, whose logarithm would be infinite
        self.timesteps, self.alpha_bar, self.beta = timesteps, alpha_bar, beta
        self.sigma, self.scale = ((1 - alpha_bar) / alpha_bar).sqrt(), alpha_bar.sqrt()
        self.mean_of_y = previous.sqrt() * beta / (1 - alpha_bar)  # the share of y in the posterior's mean (H7)
        self.mean_of_x = (1 - beta).sqrt() * (1 - previous) / (1 - alpha_bar)
        # Logarithms of variances:
        self.log_beta, self.fixed_small, self.fixed_large = beta.log(), small.log(), torch.cat([small[:1], beta[1:]]).log()

    def __len__(self) -> int:
        return len(self.timesteps)

    def strided(self, num_steps: int) -> "Chain":
        """The chain of num_steps of these timesteps, evenly spaced from the first to the last. Its betas follow from their abar
        (N19); the network still knows them by their own number.

        Raises:
            ValueError: the chain is shorter.
        """
        if num_steps > len(self):
            raise ValueError(f"the chain has {len(self)} timesteps, too few for {num_steps} steps")
        places = fractions(num_steps, whole=len(self) - 1).round().long() if num_steps > 1 else torch.tensor([len(self) - 1])
        return Chain(self.alpha_bar[places], self.timesteps[places])

    def like(self, x: torch.Tensor) -> "Chain":
        """A copy in the precision and on the device of x."""
        moved = copy.copy(self)
        for name, table in vars(self).items():  # first the precision, as Apple GPUs have no float64
            setattr(moved, name, (table.to(x.dtype) if table.is_floating_point() else table).to(x.device))
        return moved

    def nearest(self, sigma: torch.Tensor) -> torch.Tensor:
        """The places whose noise levels are nearest to sigma, a tensor of any shape."""
        above = torch.searchsorted(self.sigma, sigma.contiguous())
        below, above = (above - 1).clamp(min=0), above.clamp(max=len(self) - 1)
        return torch.where(sigma - self.sigma[below] <= self.sigma[above] - sigma, below, above)

    def diffuse(self, y: torch.Tensor, t: torch.Tensor, epsilon: torch.Tensor) -> torch.Tensor:
        """A draw of q(x_t | y) from unit normal noise (H4)."""
        return pixelwise(self.scale, t) * (y + pixelwise(self.sigma, t) * epsilon)

    def posterior_mean(self, y: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The mean of q(x_{t-1} | x_t, y) (H7); the logarithm of its variance is `fixed_small`."""
        return pixelwise(self.mean_of_y, t) * y + pixelwise(self.mean_of_x, t) * x_t

    def learned_log_variance(self, v: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Between the logarithms of the smallest and the largest sensible variance (N15), which v from -1 to 1 stands for."""
        fraction = (v + 1) / 2
        return fraction * pixelwise(self.log_beta, t) + (1 - fraction) * pixelwise(self.fixed_small, t)

    def reverse(self, denoiser, x_t: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None, variance: str):
        """The step p(x_{t-1} | x_t) that a denoiser takes (H11, N13).

        Args:
            denoiser: D(x, sigma, labels); for the learned variance also D(x, sigma, labels, all_outputs=True), v after D.
            variance: fixed_small, the posterior's; fixed_large, beta; or learned_range, between them as the network says.

        Returns:
            The denoised images, the mean of x_{t-1}, and its log-variance, which broadcasts to x_t's shape.

        Raises:
            ValueError: there is no such variance.
        """
        if variance not in VARIANCES:
            raise ValueError(f"variance must be one of {', '.join(VARIANCES)}")
        x, sigma = x_t / pixelwise(self.scale, t), self.sigma[t]
        if variance == "learned_range":
            denoised, v = denoiser(x, sigma, labels, all_outputs=True).to(x.dtype).chunk(2, dim=1)
            log_variance = self.learned_log_variance(v, t)
        else:
            denoised = denoiser(x, sigma, labels).to(x.dtype)
            log_variance = pixelwise(getattr(self, variance), t)
        return denoised, self.posterior_mean(denoised, x_t, t), log_variance

    def term(
        self, y: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor, mean: torch.Tensor, log_variance: torch.Tensor
    ) -> torch.Tensor:
        """One term of the variational bound for the step p(x_{t-1} | x_t): L_{t-1}, and at t = 0 the reconstruction L_0 (H5).

        Returns:
            (B,), in bits per dimension.
        """
        divergence = normal_divergence(self.posterior_mean(y, x_t, t), pixelwise(self.fixed_small, t), mean, log_variance)
        reconstruction = -discretized_log_likelihood(y, mean, log_variance / 2)
        return bits(torch.where(pixelwise(t, slice(None)) == 0, reconstruction, divergence))

    def prior_term(self, y: torch.Tensor) -> torch.Tensor:
        """L_T, which nothing is learned from: what the most noisy images still tell of y (H5). (B,), in bits per dimension."""
        t = torch.full((len(y),), len(self) - 1, device=y.device)
        mean, log_variance = pixelwise(self.scale, t) * y, pixelwise(1 - self.alpha_bar, t).log()
        return bits(normal_divergence(mean, log_variance, torch.zeros_like(y), torch.zeros_like(y)))


def pixelwise(table: torch.Tensor, t: torch.Tensor | slice) -> torch.Tensor:
    """A table's entries (B,), as (B, 1, 1, 1)."""
    return table[t][:, None, None, None]


def bits(nats: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) -> (B,), the mean in bits."""
    return nats.mean(dim=(1, 2, 3)) / math.log(2)


def normal_divergence(
    mean: torch.Tensor, log_variance: torch.Tensor, other_mean: torch.Tensor, other_log_variance: torch.Tensor
) -> torch.Tensor:
    """Kullback and Leibler's divergence of one normal distribution from another, for each element."""
    difference = log_variance - other_log_variance
    return (difference.exp() - 1 - difference + (mean - other_mean) ** 2 / other_log_variance.exp()) / 2


def discretized_log_likelihood(y: torch.Tensor, mean: torch.Tensor, log_scale: torch.Tensor) -> torch.Tensor:
    """The log-probability of 8-bit values under a normal distribution, of which each has the part that is nearest to it; those
    at the ends, -1 and 1, have all that is beyond them (H13)."""

    def cdf(z: torch.Tensor) -> torch.Tensor:  # of the unit normal distribution, nearly
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    above, below = (cdf((y - mean + half) * (-log_scale).exp()) for half in (1 / 255, -1 / 255))
    above, below = torch.where(y > 0.999, 1.0, above), torch.where(y < -0.999, 0.0, below)
    return (above - below).clamp(min=1e-12).log()


@functools.cache
def make_chain(
    schedule: str = "linear",
    num_timesteps: int = 1000,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> Chain:
    """The chain of all T timesteps.

    Args:
        schedule: linear or cosine.

    Raises:
        ValueError: the betas are not all below 1.
    """
    beta = BETAS[schedule](num_timesteps)
    if not beta.max() < 1:
        raise ValueError(f"{num_timesteps} are too few for the {schedule} schedule, which takes more than 20")
    chain = Chain((1 - beta).cumprod(dim=0), torch.arange(num_timesteps))
    return chain.like(torch.empty(0, dtype=dtype, device=device))


@dataclass(frozen=True)
class ChainPreconditioning(Preconditioning):
    """A network that predicts the noise epsilon (H, Section 3.2) of a chain's x_t, told t, as a denoiser."""

    schedule: str = "linear"
    num_timesteps: int = 1000

    c_skip, c_out, c_in = VPPreconditioning.c_skip, VPPreconditioning.c_out, VPPreconditioning.c_in

    @property
    def sigma_min(self) -> float:
        return make_chain(self.schedule, self.num_timesteps).sigma[0].item()

    @property
    def sigma_max(self) -> float:
        return make_chain(self.schedule, self.num_timesteps).sigma[-1].item()

    def c_noise(self, sigma: torch.Tensor) -> torch.Tensor:
        return make_chain(self.schedule, self.num_timesteps, sigma.dtype, sigma.device).nearest(sigma).to(sigma.dtype)

    def round_sigma(self, sigma: torch.Tensor) -> torch.Tensor:
        chain = make_chain(self.schedule, self.num_timesteps, sigma.dtype, sigma.device)
        return chain.sigma[chain.nearest(sigma)]


@dataclass(frozen=True)
class LearnedVariancePreconditioning(ChainPreconditioning):
    """The same with v, which the variance is made from, as a second output (N15)."""

    outputs = 2


def ancestral(
    denoiser,
    latents: torch.Tensor,
    chain: Chain,
    noise: Callable[[], torch.Tensor],
    variance: str = "fixed_small",
    labels: torch.Tensor | None = None,
) -> Iterator[State]:
    """DDPM's sampler (H, Algorithm 2): a draw of every p(x_{t-1} | x_t) in turn. It clips no images: see `sampler.clipped`.

    Args:
        denoiser, variance: as in `Chain.reverse`.
        latents: (B, C, H, W), unit normal: x_T.
        chain: all timesteps, or some (`Chain.strided`).
        noise: called once a step for unit normal noise of the latents' shape.
        labels: one-hot (B, K) or None.

    Yields:
        The state after each step; the last one's x holds the images.
    """
    levels, scales = [0.0, *chain.sigma.tolist()], [1.0, *chain.scale.tolist()]
    chain, x = chain.like(latents), latents
    for place in reversed(range(len(chain))):
        t = torch.full((len(x),), place, device=x.device)
        denoised, mean, log_variance = chain.reverse(denoiser, x, t, labels, variance)
        epsilon = noise()
        x = mean + (log_variance / 2).exp() * epsilon if place > 0 else mean
        yield State(x / scales[place], levels[place], denoised)


def ddim(denoiser, latents: torch.Tensor, chain: Chain, labels: torch.Tensor | None = None) -> Iterator[State]:
    """DDIM (Song et al., 2021; Eq. 12 with no noise): from one timestep to the next with the noise epsilon that is predicted.
    It is Euler's method along sigma. Arguments and states are those of `ancestral`."""
    levels, scales = [0.0, *chain.sigma.tolist()], [1.0, *chain.scale.tolist()]
    x = latents
    for place in reversed(range(len(chain))):
        denoised = denoiser(x / scales[place + 1], levels[place + 1], labels).to(x.dtype)
        epsilon = (x / scales[place + 1] - denoised) / levels[place + 1]
        x = scales[place] * (denoised + levels[place] * epsilon)
        yield State(x / scales[place], levels[place], denoised)


def variational_bound(
    denoiser,
    y: torch.Tensor,
    chain: Chain,
    noise: Callable[[], torch.Tensor],
    variance: str = "fixed_small",
    labels: torch.Tensor | None = None,
) -> Iterator[torch.Tensor]:
    """The bound on the negative log-likelihood of images (H5), term by term; `Chain.prior_term` is the rest of it.

    Args:
        y: (B, C, H, W), 8-bit images in [-1, 1]. Their precision is the computation's.
        The others are those of `ancestral`.

    Yields:
        (B,) in bits per dimension for every timestep, the most noisy one first; the last is the reconstruction.
    """
    chain = chain.like(y)
    for place in reversed(range(len(chain))):
        t = torch.full((len(y),), place, device=y.device)
        x_t = chain.diffuse(y, t, noise())
        _, mean, log_variance = chain.reverse(denoiser, x_t, t, labels, variance)
        yield chain.term(y, x_t, t, mean, log_variance)


FORMULATIONS = {"ddpm": ChainPreconditioning, "improved_ddpm": LearnedVariancePreconditioning}
