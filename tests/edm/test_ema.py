"""The moving average of the weights."""

import pytest
from torch import nn

from edm.ema import EMA


def test_after_one_half_life_half_of_the_old_weight_is_left():
    """With constant weights w from the start, the average is w + (w_0 - w) prod(beta); beta = 0.5^(batch / half-life)."""
    net = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(net.weight)
    ema = EMA(net, halflife_images=1000, rampup_ratio=None)
    nn.init.ones_(net.weight)
    for step in range(1, 51):
        ema.update(images_seen=20 * step, batch_size=20)
    assert ema.net.weight.item() == pytest.approx(0.5, abs=1e-5)  # after 1000 images
    assert net.weight.item() == 1
    assert not ema.net.weight.requires_grad


def test_the_half_life_ramps_up_and_does_not_depend_on_the_batch_size():
    net = nn.Linear(1, 1)
    ema = EMA(net, halflife_images=500, rampup_ratio=0.05)
    assert ema.beta(images_seen=100, batch_size=10) == pytest.approx(0.5 ** (10 / 5))  # 5% of 100 images
    assert ema.beta(images_seen=10_000, batch_size=10) == pytest.approx(0.5 ** (10 / 500))
    assert ema.beta(images_seen=10**9, batch_size=10) == ema.beta(images_seen=10_000, batch_size=10)
    assert EMA(net, 500, None).beta(images_seen=100, batch_size=10) == pytest.approx(0.5 ** (10 / 500))
    assert ema.beta(10**9, 10) ** 8 == pytest.approx(ema.beta(10**9, 80))
