"""The exponential moving average (EMA) of the weights, from which samples are drawn (the paper's Appendix F)."""

import copy

import torch
from torch import nn


class EMA:
    """Holds the moving average of a network's weights, as a second network `net`.

    Args:
        net: the network in training.
        halflife_images: number of training images after which the contribution of a weight has halved.
        rampup_ratio: early in training, the half-life is at most this fraction of the images seen; None for no ramp-up.
    """

    def __init__(self, net: nn.Module, halflife_images: float, rampup_ratio: float | None = 0.05):
        self.net = copy.deepcopy(net).eval().requires_grad_(False)
        self.weights, self.averages = list(net.parameters()), list(self.net.parameters())
        self.halflife_images = halflife_images
        self.rampup_ratio = rampup_ratio

    def beta(self, images_seen: int, batch_size: int) -> float:
        """Return the decay of one update, 0.5^(batch_size / half-life)."""
        halflife = self.halflife_images
        if self.rampup_ratio is not None:
            halflife = min(halflife, self.rampup_ratio * images_seen)
        return 0.5 ** (batch_size / halflife)

    @torch.no_grad()
    def update(self, images_seen: int, batch_size: int) -> None:
        """Update the average after a step of the optimizer; `images_seen` includes the `batch_size` images of this step."""
        beta = self.beta(images_seen, batch_size)
        torch._foreach_lerp_(self.averages, self.weights, 1 - beta)  # average = beta average + (1 - beta) weight
