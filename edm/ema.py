"""Averages of the weights, from which samples are drawn: the paper's (Appendix F), and one whose width is chosen after training
(Karras et al., 2023, arXiv 2312.02696, Section 3)."""

import copy
import math

import torch
from torch import nn

from edm.schedule import bisect


class Average:
    """Holds an average of the weights of a network in training, as a second network `net`. Subclasses define its `beta`."""

    def __init__(self, net: nn.Module):
        self.net = copy.deepcopy(net).eval().requires_grad_(False)
        self.weights, self.averages = list(net.parameters()), list(self.net.parameters())

    @torch.no_grad()
    def update(self, images_seen: int, batch_size: int) -> None:
        """Update the average after a step of the optimizer; `images_seen` includes the `batch_size` images of this step."""
        beta = self.beta(images_seen, batch_size)
        torch._foreach_lerp_(self.averages, self.weights, 1 - beta)  # average = beta average + (1 - beta) weight


class EMA(Average):
    """The exponential moving average.

    Args:
        net: the network in training.
        halflife_images: number of training images after which the contribution of a weight has halved.
        rampup_ratio: early in training, the half-life is at most this fraction of the images seen; None for no ramp-up.
    """

    def __init__(self, net: nn.Module, halflife_images: float, rampup_ratio: float | None = 0.05):
        super().__init__(net)
        self.halflife_images, self.rampup_ratio = halflife_images, rampup_ratio

    def beta(self, images_seen: int, batch_size: int) -> float:
        """Return the decay of one update, 0.5^(batch_size / half-life)."""
        halflife = self.halflife_images
        if self.rampup_ratio is not None:
            halflife = min(halflife, self.rampup_ratio * images_seen)
        return 0.5 ** (batch_size / halflife)


class PowerEMA(Average):
    """The integral of p(tau) theta(tau) from 0 to t, with the profile p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1).

    Args:
        net: the network in training, of weights theta.
        sigma_rel: the width of the average, which decides gamma: the standard deviation of tau / t under p.
    """

    def __init__(self, net: nn.Module, sigma_rel: float):
        super().__init__(net)
        self.gamma = gamma_of(sigma_rel)

    def beta(self, images_seen: int, batch_size: int) -> float:
        """Return the decay of one update: exactly the integral of p up to the start of the step, as theta is constant in it."""
        return (1 - batch_size / images_seen) ** (self.gamma + 1)


def sigma_rel_of(gamma: float) -> float:
    """Return the width of an average: under p, tau / t has the distribution Beta(gamma + 1, 1)."""
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def gamma_of(sigma_rel: float) -> float:
    """Return the gamma of a width; a ValueError says which widths there are."""
    if not 0 < sigma_rel < sigma_rel_of(0):
        raise ValueError(f"the width of an average is above 0 and below {sigma_rel_of(0):.6f}, not {sigma_rel:g}")
    return bisect(lambda gamma: -sigma_rel_of(gamma), -sigma_rel)


def reconstruct(averages: list[tuple[float, float]], target: tuple[float, float]) -> tuple[torch.Tensor, float]:
    """Return the factors x_i of the sum of known averages that comes nearest to a wanted one, and how far off it is.

    |sum x_i p_i - p| is minimal for profiles p_i and p under sum x_i = 1. For p_i at time s with the exponent h - 1, and p at
    time t with g - 1, the integral of p_i p is g h / (s^h t^g) m^(g + h - 1) / (g + h - 1), where m = min(s, t).

    Args:
        averages: (s, sigma_rel) of each: at which step it was taken, and its width.
        target: (t, sigma_rel) of the one that is wanted.

    Returns:
        x, (len(averages),) in float64, and the residual |sum x_i p_i - p| / |p|.
    """
    t, g = torch.tensor([(step, gamma_of(sigma_rel) + 1) for step, sigma_rel in (*averages, target)], dtype=torch.float64).T
    t = t / t[-1]
    s, h = t[:, None], g[:, None]  # all pairs of averages, the wanted one last
    m = torch.minimum(s, t)
    products = g / (g + h - 1) * h * (m / t) ** g * (m / s) ** h / m
    A, b = products[:-1, :-1], products[:-1, -1]
    x, ones = torch.linalg.solve(A, torch.stack([b, torch.ones_like(b)], dim=1)).unbind(1)
    x = x + (1 - x.sum()) / ones.sum() * ones  # by Lagrange's multiplier of the constraint
    difference = torch.cat([x, -torch.ones_like(x[:1])])
    return x, ((difference @ products @ difference).clamp(min=0) / products[-1, -1]).sqrt().item()
