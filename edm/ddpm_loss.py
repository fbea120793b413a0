"""How networks are trained on a chain of `ddpm.py`: timesteps drawn by importance, and losses that teach the variance.

DDPM itself needs nothing more than `loss.py`: its L_simple (H14) is the weight 1 / sigma^2 with `UniformLevels`.
Equations are cited as in `ddpm.py`: H for DDPM's, N for Improved DDPM's.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from edm.ddpm import Chain, pixelwise
from edm.loss import NoiseDistribution, squared_error
from edm.precond import VarianceDenoiser
from edm.schedule import NoiseLevels


class ImportanceSampledTimesteps(nn.Module, NoiseDistribution):
    """Draws timesteps in proportion to the root mean square of their latest losses (N18).

    Until every timestep has a full history of losses, all are equally likely.

    Args:
        levels: the chain's noise levels.
        history_per_term: how many losses of each timestep are remembered.
        uniform_prob: the share of draws that are uniform, so that no timestep is forgotten.
    """

    def __init__(self, levels: NoiseLevels, history_per_term: int = 10, uniform_prob: float = 0.001):
        super().__init__()
        self.levels, self.uniform_prob = levels, uniform_prob
        self.register_buffer("history", torch.full((len(levels.sigma), history_per_term), math.nan))  # the newest last

    def weights(self) -> torch.Tensor:
        """Return the relative probability of each timestep, (T,): 1 for all until every timestep has a full history."""
        history = self.history / self.history.max()  # so that squares cannot overflow
        root_mean_square = history.square().mean(dim=1).sqrt()
        weights = root_mean_square / root_mean_square.sum()
        weights = (1 - self.uniform_prob) * weights + self.uniform_prob / len(weights)
        return torch.where(weights.isfinite().all(), weights, 1.0)

    def sample(self, batch_size: int, generator: torch.Generator) -> torch.Tensor:
        """Return noise levels (B,) of timesteps drawn by their weights."""
        weights = self.weights()
        if weights.device.type != "mps":  # which has no float64
            weights = weights.double()
        cumulative = weights.cumsum(dim=0)
        uniform = torch.rand(batch_size, generator=generator, device=generator.device, dtype=weights.dtype)
        t = torch.searchsorted(cumulative, uniform * cumulative[-1], right=True).clamp(max=len(weights) - 1)
        return self.levels.like(self.history)[t]

    def importance(self, sigma: torch.Tensor) -> torch.Tensor:
        """Return 1 / (T p_t) for noise levels (B,): losses times these weights average to the mean over uniform timesteps."""
        weights = self.weights()
        return (weights.mean() / weights)[self.levels.nearest(sigma)].to(sigma.dtype)

    def update(self, sigma: torch.Tensor, losses: torch.Tensor) -> None:
        """Remember the losses of a whole batch, (B,), by the timesteps of their noise levels (B,)."""
        self.record(self.levels.nearest(sigma), losses)

    def record(self, t: torch.Tensor, losses: torch.Tensor) -> None:
        """Append losses (B,) to the histories of the timesteps t (B,), in order; one timestep may occur several times."""
        size = self.history.shape[1]
        count = torch.zeros(len(self.history), dtype=torch.int64, device=t.device).index_add_(0, t, torch.ones_like(t))
        source = torch.arange(size, device=t.device) + count[:, None]
        self.history.copy_(self.history.gather(1, source.clamp(max=size - 1)))  # shift out as many as come in
        t, order = t.sort(stable=True)
        to_come = torch.searchsorted(t, t, right=True) - torch.arange(len(t), device=t.device)  # losses of this t from here on
        # If a batch has more than `size` losses of one timestep, several of them share a slot: write the latest there.
        last = order[torch.arange(len(t), device=t.device) + (to_come - 1) // size * size]
        self.history[t, size - 1 - (to_come - 1) % size] = losses.to(self.history.dtype)[last]


@dataclass(frozen=True)
class VariationalLoss:
    """The variational bound as a training loss, L_vlb (N, Section 3): T times the bound's term at each image's timestep.

    Its mean over uniform timesteps is the sum of the bound's terms. The network's variance is learned.
    """

    chain: Chain

    def __call__(
        self,
        denoiser: VarianceDenoiser,
        y: torch.Tensor,
        n: torch.Tensor,
        sigma: torch.Tensor,
        weight: torch.Tensor,
        **conditions,
    ) -> torch.Tensor:
        """Return the loss of each image, (B,), in bits an image.

        Args:
            denoiser: the network in training.
            y: (B, C, H, W), clean images.
            n: (B, C, H, W), noise of standard deviation sigma.
            sigma: (B,), noise levels of the chain.
            weight: (B,), used by `HybridLoss` alone.
            conditions: further arguments of the denoiser: `labels`, `augment_labels`.
        """
        return self.bound(y, n, sigma, *self.outputs(denoiser, y + n, sigma, **conditions))

    def outputs(
        self, denoiser: VarianceDenoiser, x: torch.Tensor, sigma: torch.Tensor, **conditions
    ) -> tuple[torch.Tensor, ...]:
        """Return the denoised images and the variance output v, (B, C, H, W) each."""
        return denoiser(x, sigma, all_outputs=True, **conditions).chunk(2, dim=1)

    def bound(self, y: torch.Tensor, n: torch.Tensor, sigma: torch.Tensor, D: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Return T times the bound's term at each image's timestep, (B,), in bits an image."""
        chain, t = self.chain.like(y), self.chain.levels.nearest(sigma)
        x_t = pixelwise(chain.scale, t) * (y + n)
        term = chain.bound_term(y, x_t, t, chain.posterior_mean(D, x_t, t), chain.learned_log_variance(v, t))
        return len(chain) * y[0].numel() * term


@dataclass(frozen=True)
class HybridLoss(VariationalLoss):
    """Improved DDPM's loss, L_simple + 0.001 L_vlb (N16). In L_vlb D is detached, so it trains v alone."""

    def __call__(
        self,
        denoiser: VarianceDenoiser,
        y: torch.Tensor,
        n: torch.Tensor,
        sigma: torch.Tensor,
        weight: torch.Tensor,
        **conditions,
    ) -> torch.Tensor:
        D, v = self.outputs(denoiser, y + n, sigma, **conditions)
        return weight * squared_error(D, y) + 0.001 * self.bound(y, n, sigma, D.detach(), v)
