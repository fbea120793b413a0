"""Training in every column of Table 1, with augmentation, and the moving average of the weights.

The training loop is the paper's in a few lines; `train_mnist.py` has the same with all that a long run needs.
"""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import one_hot

from edm.augment import augment
from edm.ema import EMA
from edm.loss import WEIGHTINGS, LogNormal, UniformLevels, VENoise, VPNoise, squared_error
from edm.precond import EDMPreconditioning, VEPreconditioning, VPPreconditioning, iDDPMPreconditioning
from edm.precond import PreconditionedDenoiser as Denoiser
from edm.sampler import sample
from edm.schedule import edm_steps
from edm.unet import ADM, DDPMpp, NCSNpp
from lab.build import table_1

COLUMNS = {  # network, preconditioning, distribution of the noise levels, and the rows of Table 1 on sampling
    "edm": (DDPMpp, EDMPreconditioning(), LogNormal(), ("edm", "linear", "none"), "heun"),
    "vp": (DDPMpp, VPPreconditioning(), VPNoise(), ("vp", "vp", "vp"), "euler"),
    "ve": (NCSNpp, VEPreconditioning(), VENoise(), ("ve", "ve", "none"), "euler"),
    "iddpm": (ADM, iDDPMPreconditioning(), UniformLevels(iDDPMPreconditioning().levels), ("iddpm", "linear", "none"), "euler"),
}


def train(name: str, images: torch.Tensor, labels, noise_distribution, steps: int, augment_probability=0.0, **options):
    """Train a small network on images (N, 1, 8, 8) with labels (N, K); returns it with the averaged weights, and the losses."""
    torch.manual_seed(0)
    network, preconditioning, *_ = COLUMNS[name]
    sizes = {"model_channels": 16, "channel_mult": (1,), "num_blocks": 1, "attn_resolutions": (), "dropout": 0}
    net = Denoiser(network(8, 1, preconditioning.outputs, **sizes, **options), preconditioning)
    weighting, generator = partial(WEIGHTINGS[name], sigma_data=0.5), torch.Generator().manual_seed(1)
    optimizer, ema, losses = torch.optim.Adam(net.parameters(), lr=5e-3), EMA(net, halflife_images=500), []
    for step in range(1, steps + 1):
        index = torch.randint(0, len(images), (16,), generator=generator)
        y, augment_labels = augment(images[index], augment_probability, generator)
        sigma = noise_distribution.sample(16, generator)
        n = sigma[:, None, None, None] * torch.randn(y.shape, generator=generator)
        D = net(y + n, sigma, None if labels is None else labels[index], augment_labels)
        loss = (weighting(sigma) * squared_error(D, y)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update(step * 16, 16)
        losses.append(loss.item())
    return ema.net, losses


@pytest.mark.parametrize("name", COLUMNS)
@torch.no_grad()
def test_every_column_learns_and_samples_what_it_was_told(name, normal_noise, final):
    """One class is dark, the other bright, and the samples differ by the class alone. c_out multiplies the older networks'
    errors by sigma, which is why the paper replaced them: after a short training EDM is close to the data, they are not yet."""
    _, preconditioning, noise_distribution, choices, solver = COLUMNS[name]
    classes = torch.arange(14) % 2
    y = 1.3 * classes[:, None, None, None] - 1 + 0.3 * torch.rand(14, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = one_hot(classes, 2)
    with torch.enable_grad():
        net, losses = train(name, y, labels, noise_distribution, steps=80, label_dim=2)
    assert sum(losses[-20:]) < 0.6 * sum(losses[:20])

    for sigma in (0.3, 1.0):
        D = net(y + sigma * normal_noise(*y.shape)().float(), sigma, labels)
        assert (D - y).square().mean().sqrt() < 0.5 * min(
            sigma, y.std()
        )  # better than leaving the noise, and than the mean of all

    steps, schedule = table_1(20, *choices, sigma_max=5, supported=(preconditioning.sigma_min, preconditioning.sigma_max))
    options = {"schedule": schedule, "solver": solver, "round_sigma": net.round_sigma}
    latents = normal_noise(16, 1, 8, 8)()
    dark, bright = (final(sample(net, latents, steps, torch.eye(2)[k].expand(16, 2), **options)) for k in (0, 1))
    shift = (bright - dark).mean().item()  # 1.3 in the data
    assert shift > (1.1 if name == "edm" else 0.25)
    assert not torch.equal(dark[0], dark[1])


@torch.no_grad()
def test_augmentation_does_not_leak_into_the_samples(normal_noise, final):
    """One image, bright on the left: half of the training sees it mirrored, some of it turned, yet samples are not, unless the
    label of a flip asks for it (but for one in sixteen, since the network is hardly trained)."""
    image = torch.full((1, 1, 8, 8), -1.0)
    image[..., :4] = 1
    with torch.enable_grad():
        net, _ = train("edm", image, None, LogNormal(P_mean=0.0), steps=180, augment_probability=0.2, augment_dim=9)
    for flip, left in ((None, slice(0, 4)), (torch.eye(9)[:1], slice(4, 8))):
        x = final(sample(partial(net, augment_labels=flip), normal_noise(32, 1, 8, 8)(), edm_steps(18)))
        bright, mean = x[..., left].mean(dim=(1, 2, 3)), x.mean(dim=(1, 2, 3))
        assert ((bright > 0.2) & (2 * mean - bright < -0.2)).sum() >= 30


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
