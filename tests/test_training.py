"""The training step."""

import math

import pytest
import torch
from conftest import ROOT

from edm import config as configs
from edm.data import batches, open_dataset
from edm.errors import UserError
from edm.learner import Learner
from edm.loss import NOISE_BANDS

CPU = torch.device("cpu")


def trained(config, steps: int, learner: Learner | None = None) -> tuple[Learner, list[float]]:
    """A learner after some steps on the config's data, and its losses."""
    learner = learner or Learner(config, CPU)
    data = config.data
    dataset = open_dataset(data.dataset, data.root, data.resolution, data.channels, config.network.label_dim)
    stream = batches(dataset, config.training.batch_size, config.training.seed, 0, CPU, 1)
    return learner, [learner.step(*next(stream), step)[0].item() for step in range(1, steps + 1)]


def same(a: dict, b: dict) -> bool:
    """Whether two nests of dicts, lists, tensors and numbers are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_a_run_depends_on_its_seed(tiny):
    runs = [trained(configs.load(tiny, [f"training.seed={seed}"]), 2)[1] for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def test_accumulation_does_not_change_the_step(tiny):
    """Without dropout, four parts of one image give the losses and weights of one part of four."""
    options = ["network.dropout=0"]
    (whole, losses), (parts, parts_losses) = (
        trained(configs.load(tiny, [*options, f"training.accumulation={n}"]), 4) for n in (1, 4)
    )
    assert parts_losses == pytest.approx(losses, rel=1e-5)
    for a, b in zip(whole.net.parameters(), parts.net.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_training_learns_the_data(tiny):
    options = ["training.learning_rate=1e-2", "training.batch_size=16", "network.dropout=0"]
    _, losses = trained(configs.load(tiny, options), 100)
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20])


def test_the_loss_is_summed_over_pixels_and_averaged_over_the_batch(tiny):
    """A new network's D is c_skip x, so that the loss is lambda |c_skip (y + n) - y|^2: the same by other draws, to 3%."""
    config = configs.load(tiny, ["training.batch_size=2000"])
    learner = Learner(config, CPU)
    images = torch.randint(0, 256, (2000, config.data.channels, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    loss, *_ = learner.step(images, torch.zeros(2000, dtype=torch.int64), 1)
    y = images.double() / 127.5 - 1
    sigma = (-1.2 + 1.2 * torch.randn(2000, 1, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).exp()
    x = y + sigma * torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    weight = (sigma**2 + 0.25) / (0.5 * sigma) ** 2
    expected = (weight * (0.25 / (sigma**2 + 0.25) * x - y) ** 2).sum(dim=(1, 2, 3)).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=0.03)


def gradient_step(learner: Learner, value: float, images_seen: int = 1000) -> None:
    for parameter in learner.net.parameters():
        parameter.grad = torch.full_like(parameter, value)
    learner.update(images_seen, batch_size=4)


@pytest.mark.parametrize(("value", "mended"), [(math.nan, 0.0), (math.inf, 1e5), (-math.inf, -1e5), (3.0, 3.0)])
def test_non_finite_gradients_are_replaced(tiny, value, mended):
    learner = Learner(configs.load(tiny), CPU)
    gradient_step(learner, value)
    assert all((p.grad == mended).all() for p in learner.net.parameters())
    assert all(p.isfinite().all() for p in learner.net.parameters())


def test_the_scaler_still_sees_an_overflow(tiny):
    """fp16: a non-finite gradient skips the step and halves the scale, though the gradient is mended as well."""
    learner = Learner(configs.load(tiny, ["training.mixed_precision=fp16"]), CPU)
    learner.scaler.scale(torch.ones(()))  # as the loss is, in a training step
    before, scale = [p.clone() for p in learner.net.parameters()], learner.scaler.get_scale()
    gradient_step(learner, math.inf)
    assert all(torch.equal(a, b) for a, b in zip(before, learner.net.parameters()))
    assert learner.scaler.get_scale() == scale / 2
    gradient_step(learner, scale)
    assert not torch.equal(before[0], next(learner.net.parameters()))


def test_gradients_are_clipped_to_the_norm_asked_for(tiny):
    learner = Learner(configs.load(tiny, ["training.max_grad_norm=2"]), CPU)
    gradient_step(learner, 1.0)
    norm = torch.stack([p.grad.square().sum() for p in learner.net.parameters()]).sum().sqrt()
    assert norm.item() == pytest.approx(2, rel=1e-4)


def test_the_learning_rate_ramps_up(tiny):
    learner = Learner(configs.load(tiny, ["training.lr_rampup_images=100", "training.learning_rate=0.01"]), CPU)
    rates = []
    for images_seen in (4, 50, 100, 1000):
        gradient_step(learner, 1.0, images_seen)
        rates.append(learner.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.0004, 0.005, 0.01, 0.01])


def test_the_learning_rate_halves_whatever_the_length_of_the_run(tiny):
    """0.5^(images / half-life), so that a run can be prolonged, and stopped and resumed, without changing what came before."""
    options = ["training.lr_rampup_images=0", "training.learning_rate=0.01", "training.lr_halflife_images=1000"]
    for steps in (1, 1000):
        learner = Learner(configs.load(tiny, [*options, f"training.num_training_steps={steps}"]), CPU)
        for images_seen, rate in ((4, 0.01 * 0.5**0.004), (1000, 0.005), (3000, 0.00125)):
            gradient_step(learner, 1.0, images_seen)
            assert learner.optimizer.param_groups[0]["lr"] == pytest.approx(rate)


def test_label_dropout_hides_whole_labels(tiny, monkeypatch):
    seen = []

    def spy(denoiser, y, n, sigma, weight, labels):
        seen.append(labels)
        return sum(p.sum() for p in denoiser.parameters()) * torch.ones(len(y))

    monkeypatch.setattr("edm.choices.denoising_loss", spy)
    config = configs.load(tiny, ["loss.label_dropout=0.25", "training.batch_size=4000"])
    images = torch.zeros(4000, config.data.channels, 8, 8, dtype=torch.uint8)
    Learner(config, CPU).step(images, torch.ones(4000, dtype=torch.int64), 1)
    assert seen[0][:, 0].sum() == 0
    assert seen[0][:, 1].float().mean().item() == pytest.approx(0.75, abs=0.03)


@pytest.mark.parametrize(("before", "after"), [("fp16", "no"), ("no", "fp16")])
def test_a_checkpoint_moves_between_precisions_and_the_config_rules_the_optimizer(tiny, tmp_path, before, after):
    learner, _ = trained(configs.load(tiny, [f"training.mixed_precision={before}"]), 2)
    other = Learner(configs.load(tiny, [f"training.mixed_precision={after}", "training.adam_beta2=0.9"]), CPU)
    other.load_state_dict(learner.state_dict(), tmp_path)
    assert same(other.net.state_dict(), learner.net.state_dict())
    assert other.optimizer.param_groups[0]["betas"] == (0.9, 0.9)
    assert same(other.optimizer.state_dict()["state"], learner.optimizer.state_dict()["state"])


def test_every_step_draws_anew_and_the_same_step_draws_the_same(tiny, monkeypatch):
    seen = []

    def spy(denoiser, y, n, sigma, weight, labels):
        seen.append(torch.cat([sigma, n.flatten()]))
        return sum(p.sum() for p in denoiser.parameters()) * torch.ones(len(y))

    monkeypatch.setattr("edm.choices.denoising_loss", spy)
    learner = Learner(configs.load(tiny), CPU)
    images = torch.zeros(4, learner.config.data.channels, 8, 8, dtype=torch.uint8)
    for step in (1, 2, 1):
        learner.step(images, torch.zeros(4, dtype=torch.int64), step)
    assert torch.equal(seen[0], seen[2])
    assert (seen[0] != seen[1]).all()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_like_float32(tiny, precision):
    losses = [trained(configs.load(tiny, [f"training.mixed_precision={p}"]), 3)[1] for p in ("no", precision)]
    assert losses[1][0] == pytest.approx(losses[0][0], rel=0.005)
    assert losses[1] == pytest.approx(losses[0], rel=0.1)  # Adam's first steps magnify what rounding changes
    assert losses[1] != losses[0]


@pytest.mark.parametrize("damage", ["shape", "missing", "empty"])
def test_an_optimizer_of_another_network_is_refused(tiny, tmp_path, damage):
    """Before Adam writes past the end of its moments."""
    config = configs.load(tiny)
    learner, _ = trained(config, 1)
    state = learner.state_dict()
    if damage == "shape":
        state["optimizer"][0]["exp_avg"] = torch.zeros(3)
    elif damage == "missing":
        del state["optimizer"][1]["exp_avg_sq"]
    else:
        state["optimizer"] = {}
    with pytest.raises(UserError, match="does not fit its network"):
        Learner(config, CPU).load_state_dict(state, tmp_path / "x.pt")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_makes_a_network_that_takes_a_step(path):
    width = configs.load(path).network.model_channels
    slim = [f"network.model_channels={min(width, 16)}"]  # of the large networks, an eighth of the width
    config = configs.load(path, ["training.batch_size=2", *slim])
    images = torch.zeros(2, config.data.channels, *2 * [config.data.resolution], dtype=torch.uint8)
    assert Learner(config, CPU).step(images, torch.tensor([0, 1]), 1)[0].isfinite()


def test_a_step_tells_the_losses_of_its_noise_levels_apart(tiny):
    config = configs.load(tiny, ["network.dropout=0", "training.batch_size=32", "loss.P_std=2"])
    learner = Learner(config, CPU)
    shape = (32, config.data.channels, 8, 8)
    images = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)).byte()
    drawn = learner.draw(images, torch.zeros(32, dtype=torch.int64), 1)
    _, losses = learner.forward(learner.net, **drawn)
    loss, *bands = learner.step(images, torch.zeros(32, dtype=torch.int64), 1).tolist()
    assert loss == pytest.approx(losses.mean().item())
    for low, high, band in zip((0, *NOISE_BANDS), (*NOISE_BANDS, math.inf), bands, strict=True):
        within = [each for each, sigma in zip(losses.tolist(), drawn["sigma"].tolist()) if low < sigma <= high]
        assert band == pytest.approx(sum(within) / len(within))
