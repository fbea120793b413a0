"""How networks are trained on a chain of `ddpm.py`: timesteps drawn by importance, and losses that teach the variance.

DDPM itself needs nothing more than `loss.py`: its L_simple (H14) is the weight 1 / sigma^2 with `UniformLevels`.
Equations are cited as in `ddpm.py`: H for DDPM's, N for Improved DDPM's.
"""

import math

import torch
from torch import nn

from edm.ddpm import Chain, pixelwise
from edm.loss import NoiseDistribution, squared_error
from edm.precond import Denoiser
from edm.schedule import NoiseLevels


class ImportanceSampledTimesteps(nn.Module, NoiseDistribution):
    """Draws timesteps in proportion to the root mean square of their latest losses (N18).

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
        """Append the losses of a whole batch, (B,), in order, to the histories of the timesteps with noise levels (B,)."""
        t, losses = self.levels.nearest(sigma), losses.to(self.history.dtype)
        before = (t[:, None] == t).tril(-1).sum(dim=1)  # how many losses of the same timestep come first in the batch
        for turn in range(int(before.max()) + 1):
            now = before == turn
            self.history[t[now]] = torch.cat([self.history[t[now], 1:], losses[now, None]], dim=1)


def variational_loss(
    denoiser: Denoiser,
    y: torch.Tensor,
    n: torch.Tensor,
    sigma: torch.Tensor,
    weight: torch.Tensor,
    chain: Chain,
    hybrid: bool,
    **conditions,
) -> torch.Tensor:
    """Return the loss of each image, (B,), that teaches Improved DDPM its variance: L_hybrid or L_vlb.

    L_vlb (N, Section 3), in bits an image, is T times the bound's term at the image's timestep. Its mean over uniform timesteps
    is the sum of the bound's terms. L_hybrid = L_simple + 0.001 L_vlb (N16); D is detached in this L_vlb, which trains v alone.

    Args:
        denoiser: the network in training, called with `all_outputs`, as in `Chain.reverse`.
        y: (B, C, H, W), clean images.
        n: (B, C, H, W), noise of standard deviation sigma.
        sigma: (B,), noise levels of the chain.
        weight: (B,), the weight 1 / sigma^2 of L_simple; used for L_hybrid alone.
        chain: all its timesteps.
        hybrid: whether the loss is L_hybrid instead of L_vlb.
        conditions: further arguments of the denoiser: `labels`, `augment_labels`.
    """
    D, v = denoiser(y + n, sigma, all_outputs=True, **conditions).chunk(2, dim=1)
    chain, t = chain.like(y), chain.levels.nearest(sigma)
    x_t = pixelwise(chain.scale, t) * (y + n)
    mean = chain.posterior_mean(D.detach() if hybrid else D, x_t, t)
    L_vlb = len(chain) * y[0].numel() * chain.bound_term(y, x_t, t, mean, chain.learned_log_variance(v, t))
    return weight * squared_error(D, y) + 0.001 * L_vlb if hybrid else L_vlb
