"""Training in every column of Table 1, and with augmentation: it learns, and the samples are what was learned."""

import pytest
import torch
from test_training import CPU, trained
from torchvision.utils import save_image

from edm import checkpoint
from edm import config as configs
from edm.data import open_dataset, to_model_range
from edm.generate import generate
from edm.randomness import ImageNoise
from edm.sampler import sample
from edm.schedule import edm_steps
from edm.training import train

COLUMNS = {
    "edm": {},
    "vp": {"scaling": "vp", "schedule": "vp"},
    "ve": {"architecture": "ncsnpp", "schedule": "ve"},
    "iddpm": {"architecture": "adm"},
}
EULER = ["sampler.solver=euler", "sampler.sampling_steps=60"]


def column(name: str) -> list[str]:
    """The overrides that make the tiny config one of a column of Table 1."""
    if name == "edm":
        return ["sampler.sampling_steps=18"]
    chosen = [f"preconditioning.formulation={name}", f"loss.noise_distribution={name}", f"loss.weighting={name}"]
    sections = {"architecture": "network", "schedule": "sampler", "scaling": "sampler"}
    rest = [f"{sections[key]}.{key}={value}" for key, value in COLUMNS[name].items()]
    return [*chosen, f"sampler.discretization={name}", *EULER, *rest]


def rms(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item()


@pytest.mark.parametrize("tiny", [1], indirect=True, ids=["grey"])
@pytest.mark.parametrize("name", COLUMNS)
def test_every_column_learns_and_samples_what_it_was_told(name, tiny):
    """Of the tiny data set's two classes one is dark, the other bright. The older columns' errors are multiplied by sigma,
    which is why the paper replaced them; a short training is judged below a noise level of 5."""
    options = ["training.learning_rate=5e-3", "training.batch_size=16", "network.dropout=0", "loss.label_dropout=0"]
    config = configs.load(tiny, [*column(name), *options, "network.model_channels=16", "sampler.sigma_max=5"])
    learner, losses = trained(config, 160)
    assert sum(losses[-40:]) < 0.5 * sum(losses[:40])

    dataset = open_dataset("image_folder", config.data.root, 8, 1, 2)
    y, labels = to_model_range(torch.stack([image for image, _ in dataset])), torch.eye(2)[dataset.labels]
    for sigma in (0.3, 1.0):
        n = sigma * torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            error = rms(learner.ema.net(y + n, sigma, labels) - y)
        assert error < 0.5 * min(sigma, rms(y - y.mean()))  # better than leaving the noise, and than the mean of all

    (dark,), (bright,) = (generate(learner.ema.net, list(range(32)), config, CPU, 32, class_index=k) for k in (0, 1))
    assert bright.float().mean() - dark.float().mean() > 30
    assert not torch.equal(dark[:, 0], dark[:, 1])


@pytest.mark.parametrize("tiny", [3], indirect=True, ids=["colour"])
@pytest.mark.parametrize("name", COLUMNS)
def test_every_column_resumes_bit_for_bit(name, tiny, tmp_path):
    options = [*column(name), "sampler.sampling_steps=2", "data.augment_probability=0.3", "network.augment_dim=9"]
    train(configs.load(tiny, options), CPU, tmp_path / "whole")
    train(configs.load(tiny, [*options, "training.num_training_steps=3"]), CPU, tmp_path / "parts")
    train(configs.load(tiny, options), CPU, tmp_path / "parts", resume_from="latest")
    whole, parts = (
        checkpoint.read(tmp_path / run / "image/image_folder/tiny/diffusion-6.pt")["net"] for run in ("whole", "parts")
    )
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_every_sampler_runs_on_every_network(tiny):
    """Noise levels are clamped and rounded to what the network knows, so that its samples stay finite."""
    for name in COLUMNS:
        learner, _ = trained(configs.load(tiny, column(name)), 1)
        for other in COLUMNS:
            sampler = [option for option in column(other) if option.startswith("sampler.")]
            network = [option for option in column(name) if not option.startswith("sampler.")]
            config = configs.load(tiny, [*network, *sampler, "sampler.sampling_steps=4", "sampler.S_churn=3"])
            known, asked = learner.net.preconditioning, []
            hook = learner.ema.net.register_forward_pre_hook(lambda module, args, asked=asked: asked.append(args[1]))
            (frames,) = generate(learner.ema.net, [0, 1], config, CPU, batch_size=2)
            hook.remove()
            assert frames.dtype == torch.uint8
            lowest, highest = known.sigma_min * (1 - 1e-9), known.sigma_max * 2**0.5 * (1 + 1e-9)  # churn goes beyond
            assert all(lowest <= sigma <= highest for sigma in asked)
            assert all(learner.net.round_sigma(sigma) == pytest.approx(sigma, rel=1e-9) for sigma in asked)


def test_augmentation_does_not_leak_into_the_samples(tmp_path):
    """One image, bright on the left: half of the training sees it mirrored, some of it turned, yet samples are not, unless the
    label of a flip asks for it (but for one in sixteen, since the network is hardly trained)."""
    image = torch.zeros(1, 8, 8)
    image[:, :, :4] = 1
    (tmp_path / "one").mkdir()
    save_image(image, tmp_path / "one" / "image.png")
    network = {"model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [], "dropout": 0}
    sections = {
        "data": {"dataset": "image_folder", "root": str(tmp_path / "one"), "resolution": 8, "augment_probability": 0.2},
        "network": {**network, "augment_dim": 9},
        "loss": {"P_mean": 0.0},
        "training": {"batch_size": 32, "learning_rate": 5e-3, "lr_rampup_images": 500},
        "ema": {"halflife_images": 500},
    }
    net = trained(configs.from_dict(sections, "one", "test"), 250)[0].ema.net

    def samples(augment_labels: torch.Tensor | None) -> torch.Tensor:
        latents = ImageNoise(list(range(32)), (1, 8, 8), CPU, torch.float64)()
        with torch.no_grad():
            *_, last = sample(lambda x, sigma, labels: net(x, sigma, labels, augment_labels), latents, edm_steps(18))
        return last.x

    for augment_labels, left in ((None, slice(0, 4)), (torch.eye(9)[:1], slice(4, 8))):
        x = samples(augment_labels)
        bright, dark = x[..., left].mean(dim=(1, 2, 3)), x.mean(dim=(1, 2, 3)) * 2 - x[..., left].mean(dim=(1, 2, 3))
        assert ((bright > 0.2) & (dark < -0.2)).sum() >= 30
