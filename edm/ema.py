"""The exponential moving average of the weights, from which samples are drawn (the paper's Appendix F)."""

import copy

import torch
from torch import nn


class EMA:
    """A shadow of `net`, its half-life counted in images so that it does not depend on the batch size.

    Args:
        net: the network in training.
        halflife_images: images after which a weight's share has halved.
        rampup_ratio: early in training, the half-life is at most this share of the images seen; None for no ramp-up.
    """

    def __init__(self, net: nn.Module, halflife_images: float, rampup_ratio: float | None = 0.05):
        self.net = copy.deepcopy(net).eval().requires_grad_(False)
        self.shadow, self.weights = list(self.net.parameters()), list(net.parameters())
        self.halflife_images = halflife_images
        self.rampup_ratio = rampup_ratio

    def beta(self, images_seen: int, batch_size: int) -> float:
        """What the shadow keeps of itself at an update: 0.5^(batch_size / half-life)."""
        halflife = self.halflife_images
        if self.rampup_ratio is not None:
            halflife = min(halflife, self.rampup_ratio * images_seen)
        return 0.5 ** (batch_size / halflife)

    @torch.no_grad()
    def update(self, images_seen: int, batch_size: int) -> None:
        """Move the shadow towards the network, after the optimizer's step.

        Args:
            images_seen: images of the whole run so far, this step's included.
            batch_size: images of this step.
        """
        torch._foreach_lerp_(self.shadow, self.weights, 1 - self.beta(images_seen, batch_size))
