"""How networks are trained on a chain of `ddpm.py`: which timesteps, all alike or by importance, and with which loss.

Equations are called as there: H for DDPM's, N for Improved DDPM's.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from edm.ddpm import Chain, make_chain, pixelwise
from edm.loss import NoiseDistribution, UniformDraws


@dataclass(frozen=True)
class UniformTimesteps(UniformDraws):
    """The chain's timesteps, all alike: with the weight 1 / sigma^2, DDPM's L_simple (H14)."""

    schedule: str = "linear"
    num_timesteps: int = 1000

    def sigma(self, uniform: torch.Tensor) -> torch.Tensor:
        t = (uniform * self.num_timesteps).long().clamp(max=self.num_timesteps - 1)
        return make_chain(self.schedule, self.num_timesteps, uniform.dtype, uniform.device).sigma[t]


class ImportanceSampledTimesteps(nn.Module, NoiseDistribution):
    """Timesteps drawn in proportion to the root mean square of their latest losses (N18); all alike until all have enough.

    Args:
        schedule, num_timesteps: of the chain.
        history_per_term: how many losses of each timestep are remembered.
        uniform_prob: the share of draws that are uniform, so that no timestep is forgotten.
    """

    def __init__(
        self, schedule: str = "linear", num_timesteps: int = 1000, history_per_term: int = 10, uniform_prob: float = 0.001
    ):
        super().__init__()
        self.schedule, self.uniform_prob = schedule, uniform_prob
        self.register_buffer("history", torch.full((num_timesteps, history_per_term), math.nan))  # newest last, nan: none yet

    def weights(self) -> torch.Tensor:
        """How likely each timestep is: (T,), of sum 1, or all 1 before all have a full history."""
        history = self.history / self.history.max()  # whose squares cannot overflow
        root_mean_square = history.square().mean(dim=1).sqrt()
        weights = root_mean_square / root_mean_square.sum()
        weights = (1 - self.uniform_prob) * weights + self.uniform_prob / len(weights)
        return torch.where(weights.isfinite().all(), weights, 1.0)

    def chain(self, like: torch.Tensor) -> Chain:
        return make_chain(self.schedule, len(self.history), like.dtype, like.device)

    def sample(self, batch_size: int, generator: torch.Generator) -> torch.Tensor:
        weights = self.weights()
        if weights.device.type != "mps":  # which has no float64
            weights = weights.double()
        reached = weights.cumsum(dim=0)
        uniform = torch.rand(batch_size, generator=generator, device=generator.device, dtype=weights.dtype)
        t = torch.searchsorted(reached, uniform * reached[-1], right=True).clamp(max=len(weights) - 1)
        return self.chain(self.history).sigma[t]

    def importance(self, sigma: torch.Tensor) -> torch.Tensor:
        """What makes the mean over draws that over all timesteps alike: 1 / (T p_t)."""
        weights = self.weights()
        return (weights.mean() / weights)[self.chain(sigma).nearest(sigma)].to(sigma.dtype)

    def update(self, sigma: torch.Tensor, losses: torch.Tensor) -> None:
        self.record(self.chain(sigma).nearest(sigma), losses)

    def record(self, t: torch.Tensor, losses: torch.Tensor) -> None:
        """Remember losses (B,) of the timesteps t (B,), of which one may occur several times, in their order."""
        size = self.history.shape[1]
        count = torch.zeros(len(self.history), dtype=torch.int64, device=t.device).index_add_(0, t, torch.ones_like(t))
        places = torch.arange(size, device=t.device) + count[:, None]
        self.history.copy_(self.history.gather(1, places.clamp(max=size - 1)))  # older losses move on, for as many as come
        t, order = t.sort(stable=True)
        to_come = torch.searchsorted(t, t, right=True) - torch.arange(len(t), device=t.device)  # of this timestep, and itself
        # A loss that is superseded in this very batch would be written where a later one is: let it be that one.
        last = order[torch.arange(len(t), device=t.device) + (to_come - 1) // size * size]
        self.history[t, size - 1 - (to_come - 1) % size] = losses.to(self.history.dtype)[last]


@dataclass(frozen=True)
class VariationalLoss:
    """The bound alone, L_vlb: T times the term of the image's timestep, whose mean over the timesteps is the bound's sum.

    Called like `loss.denoising_loss`; the network's variance is learned. `weight` has no part in it. (B,), in bits an image.
    """

    schedule: str = "linear"
    num_timesteps: int = 1000

    def __call__(self, denoiser, y, n, sigma, weight, **conditions) -> torch.Tensor:
        return self.terms(y, n, sigma, *outputs(denoiser, y + n, sigma, **conditions))

    def terms(self, y, n, sigma, denoised, v) -> torch.Tensor:
        chain = make_chain(self.schedule, self.num_timesteps, y.dtype, y.device)
        t = chain.nearest(sigma)
        x_t = pixelwise(chain.scale, t) * (y + n)
        term = chain.term(y, x_t, t, chain.posterior_mean(denoised, x_t, t), chain.learned_log_variance(v, t))
        return len(chain) * y[0].numel() * term


@dataclass(frozen=True)
class HybridLoss(VariationalLoss):
    """L_simple + 0.001 L_vlb (N16): the bound teaches the variance alone, its gradient being stopped at the mean."""

    def __call__(self, denoiser, y, n, sigma, weight, **conditions) -> torch.Tensor:
        denoised, v = outputs(denoiser, y + n, sigma, **conditions)
        simple = weight * (denoised - y).square().sum(dim=(1, 2, 3))
        return simple + 0.001 * self.terms(y, n, sigma, denoised.detach(), v)


def outputs(denoiser, x: torch.Tensor, sigma: torch.Tensor, **conditions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The denoised images and v, (B, C, H, W) each."""
    return denoiser(x, sigma, all_outputs=True, **conditions).chunk(2, dim=1)


TIMESTEPS = {"ddpm": UniformTimesteps, "importance": ImportanceSampledTimesteps}
OBJECTIVES = {"hybrid": HybridLoss, "vlb": VariationalLoss}
