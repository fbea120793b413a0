"""The training step: by hand and in the loop, its draws, its losses, and how it updates the weights."""

import copy
import itertools
import math
from functools import partial

import pytest
import torch
from torch.nn.functional import one_hot

from edm.loss import edm_weight, squared_error
from edm.precond import EDMPreconditioning
from edm.unet import DDPMpp
from lab import config as configs
from lab.checkpoint import NOISE_BANDS
from lab.cli import UserError
from lab.data import as_tensors, open_dataset, shuffled_batches
from lab.distributed import World
from lab.learner import Learner
from lab.losslog import by_noise_level
from lab.seeds import generator_for, seed_for

CPU = torch.device("cpu")
LAST_STEP = "--num_training_steps"
AUGMENTED = ["network.augment_dim=9", "data.augment_probability=0.5"]
IMPORTANCE = ["preconditioning.formulation=improved_ddpm", "loss.objective=hybrid", "loss.noise_distribution=importance"]
IMPORTANCE += ["chain.betas=cosine", "chain.num_timesteps=4", "loss.weighting=iddpm", "training.batch_size=16"]


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_three_steps_by_hand(train, tiny, last, same, precision):
    """The paper's training, written down once more without the code under test: every bit of the result is the same."""
    half = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16")  # for F alone, and not for the gradients
    seed, P_mean, P_std, sigma_data, batch_size, label_dim = 0, -1.2, 1.2, 0.5, 4, 2

    torch.manual_seed(seed_for(seed, "initial weights"))
    F = DDPMpp(8, 3, label_dim=2, model_channels=8, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,), dropout=0.1)
    F = F.to(memory_format=torch.channels_last)  # the layout decides in which order sums are rounded
    average = copy.deepcopy(F)
    adam = torch.optim.Adam(F.parameters(), betas=(0.9, 0.999), eps=1e-8, fused=True)
    images, classes = as_tensors(open_dataset(configs.load(tiny)))
    expected_losses = []

    for step, index in zip((1, 2, 3), shuffled_batches(len(images), batch_size, seed)):
        # Draw y, sigma and n (Eq. 8), and hide a fifth of the labels.
        generator = generator_for(seed, "step", step)
        y = (images[index] / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        sigma = (P_mean + P_std * torch.randn(batch_size, generator=generator)).exp()
        n = sigma.view(-1, 1, 1, 1) * torch.randn(y.shape, generator=generator)
        shown = torch.rand(batch_size, generator=generator) >= 0.2
        labels = one_hot(classes[index], label_dim) * shown.view(-1, 1)
        # The denoiser of Table 1's EDM column: D(x; sigma) = c_skip x + c_out F(c_in x; c_noise) (Eq. 7).
        s = sigma.view(-1, 1, 1, 1)
        c_skip = sigma_data**2 / (s**2 + sigma_data**2)
        c_out = s * sigma_data / (s**2 + sigma_data**2).sqrt()
        c_in = 1 / (s**2 + sigma_data**2).sqrt()
        c_noise = sigma.log() / 4
        torch.manual_seed(seed_for(seed, "dropout", step))
        with half:
            D = c_skip * (y + n) + c_out * F(c_in * (y + n), c_noise, labels).float()
        # lambda(sigma) |D(y + n; sigma) - y|^2, averaged over the batch.
        weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
        loss = (weight * (D - y).square().sum(dim=(1, 2, 3))).mean()
        expected_losses.append(loss.item())
        # Adam, with the learning rate rising over 8 images; then the average of the weights.
        images_seen = step * batch_size
        adam.param_groups[0]["lr"] = 1e-3 * min(images_seen / 8, 1)
        adam.zero_grad()
        loss.backward()
        adam.step()
        halflife = min(100, 0.05 * images_seen)
        with torch.no_grad():
            for mean, weight in zip(average.parameters(), F.parameters()):
                mean.lerp_(weight, 1 - 0.5 ** (batch_size / halflife))

    trained = last(train(tiny, LAST_STEP, 3, "--mixed_precision", precision))
    assert trained["losses"][:, 0].tolist() == expected_losses
    assert same(trained["net"], {f"model.{name}": weight for name, weight in F.state_dict().items()})
    assert same(trained["ema"], {f"model.{name}": weight for name, weight in average.state_dict().items()})
    assert same(trained["optimizer"], adam.state_dict()["state"])
    other = last(train(tiny, LAST_STEP, 3, "--seed", 1, output="another seed"))
    assert (other["losses"][:, 0] != trained["losses"][:, 0]).all()


def test_the_initial_loss_is_one_for_each_pixel(train, tiny, last):
    """A new network puts out nearly 0, so D is c_skip x, and EDM's weight makes a loss of 1 of it for data of sigma_data."""
    trained = last(train(tiny, "preconditioning.sigma_data=auto", "--batch_size", 500, LAST_STEP, 1))
    assert trained["losses"][0, 0] == pytest.approx(3 * 8 * 8, rel=0.03)
    sigma, signs = torch.tensor([0.002, 0.3, 7, 80])[:, None, None, None], torch.tensor([1, -1])
    for brightness, expected in ((0.5, [1, 1, 1, 1]), (0.97, [1, 1.73, 3.75, 3.76])):  # images of one colour: exact means
        y = torch.full((4, 1, 1, 2), brightness)
        D = EDMPreconditioning(0.5).c_skip(sigma) * (y + sigma * signs)
        losses = edm_weight(sigma.flatten(), 0.5) * squared_error(D, y) / 2
        assert losses.tolist() == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("options", [[], AUGMENTED, IMPORTANCE], ids=["plain", "augmented", "importance"])
def test_accumulation_does_not_change_the_step(train, tiny, last, options):
    """Without dropout, parts of one or a few images give the gradients, and so the weights, of one part of all."""
    options = ["network.dropout=0", LAST_STEP, 3, *options]
    whole, *others = (last(train(tiny, *options, f"training.accumulation={parts}", output=f"{parts}")) for parts in (1, 2, 4))
    close = partial(torch.testing.assert_close, rtol=1e-3, atol=1e-4, equal_nan=True)
    for other in others:
        close(other["losses"], whole["losses"], rtol=1e-4)
        close(other["net"], whole["net"], atol=1e-5)
        close(other["noise_distribution"], whole["noise_distribution"])
    if "history" in whole["noise_distribution"]:
        assert whole["noise_distribution"]["history"].isfinite().sum() >= 36  # of 40, after 48 losses


def test_losses_are_recorded_by_noise_level(train, tiny, last):
    """Weighted by how many images a band has, the bands' mean losses give the batch's; a band without images has none."""
    losses = last(train(tiny, "--batch_size", 32, "loss.P_std=2", LAST_STEP, 3))["losses"]
    for step, (loss, bands) in enumerate(zip(losses[:, 0], losses[:, 1:]), start=1):
        sigma = (-1.2 + 2 * torch.randn(32, generator=generator_for(0, "step", step))).exp()
        counts = torch.bucketize(sigma, torch.tensor(NOISE_BANDS)).bincount(minlength=len(NOISE_BANDS) + 1)
        assert torch.equal(bands.isnan(), counts == 0)
        assert (counts * bands).nansum().item() / 32 == pytest.approx(loss.item(), rel=1e-5)


def test_losses_by_noise_level_are_means_by_importance():
    """nan where there are no images; a loss that is nan spoils its own band alone."""
    sigma = torch.tensor([0.01, 0.04, 0.1, 0.5, 0.7, 100.0])
    losses = torch.tensor([1.0, 2.0, 4.0, 8.0, math.nan, 32.0])
    importance = torch.tensor([1.0, 3.0, 1.0, 1.0, 1.0, 0.5])
    found = by_noise_level(losses, sigma, importance, torch.tensor([0.05, 0.2, 0.8, 3.2]))
    torch.testing.assert_close(found, torch.tensor([1.75, 4.0, math.nan, math.nan, 32.0]), equal_nan=True)


def gradient_step(learner: Learner, value: float, images_seen: int = 1000) -> torch.Tensor:
    """Take a step with all gradients equal to `value`; returns the gradient that Adam was given, if this is its first step."""
    scale = learner.scaler.scale(torch.ones(())).item()
    for parameter in learner.net.parameters():
        parameter.grad = torch.full_like(parameter, scale * value)
    learner.optimizer_step(images_seen)
    beta1 = learner.config.training.adam_beta1
    averages = [state["exp_avg"].flatten() for state in learner.optimizer.state_dict()["state"].values()]
    return torch.cat(averages) / (1 - beta1) if averages else torch.zeros(0)


def test_ranks_train_in_one_precision(tiny, monkeypatch):
    """A GPU that chooses bf16 uses fp16 beside one that chooses fp16."""
    monkeypatch.setattr(World, "all_reduce_max", lambda world, number: max(number, 1))
    config = configs.load(tiny, ["training.mixed_precision=bf16"])
    assert Learner(config, CPU, World()).precision == torch.float16


def test_the_gradient_is_clipped(tiny):
    clipped = gradient_step(Learner(configs.load(tiny, ["training.max_grad_norm=2"]), CPU), 1.0)
    assert clipped.norm().item() == pytest.approx(2, rel=1e-4)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_step_whose_gradients_are_not_finite_is_left_out(tiny, precision, bad):
    """In fp16 the scale of the loss is halved, as an overflow may have been the cause."""
    learner = Learner(configs.load(tiny, [f"training.mixed_precision={precision}"]), CPU)
    before = copy.deepcopy(learner.net.state_dict())
    gradient_step(learner, bad)
    assert all(torch.equal(weight, before[name]) for name, weight in learner.net.state_dict().items())
    assert learner.scaler.get_scale() == (2**15 if precision == "fp16" else 1)
    gradient = gradient_step(learner, 3.0)
    torch.testing.assert_close(gradient, torch.full_like(gradient, 3.0))


def test_the_learning_rate_depends_on_the_images_seen_and_not_on_the_length_of_the_run(tiny):
    """So that a run can be prolonged, or stopped and resumed, without changing what came before."""
    rates = {"null": {4: 0.0004, 50: 0.005, 100: 0.01, 1000: 0.01}, "1000": {50: 0.005 * 0.5**0.05, 1000: 0.005, 3000: 0.00125}}
    for steps, halving in itertools.product((1, 1000), rates):
        entries = ["lr_rampup_images=100", "learning_rate=0.01", f"num_training_steps={steps}", f"lr_halflife_images={halving}"]
        learner = Learner(configs.load(tiny, [f"training.{entry}" for entry in entries]), CPU)
        for images_seen, rate in rates[halving].items():
            gradient_step(learner, 1.0, images_seen)
            assert learner.optimizer.param_groups[0]["lr"] == pytest.approx(rate)


@pytest.mark.parametrize(("before", "after"), [("fp16", "no"), ("no", "fp16")])
def test_a_run_may_change_its_precision_and_its_settings_of_adam(tiny, same, before, after):
    one = Learner(configs.load(tiny, [f"training.mixed_precision={before}"]), CPU)
    other = Learner(configs.load(tiny, [f"training.mixed_precision={after}", "training.adam_beta2=0.9"]), CPU)
    gradient_step(one, 3.0)
    other.load_state_dict(one.state_dict(), "x.pt")
    assert other.optimizer.param_groups[0]["betas"] == (0.9, 0.9)
    for part in (lambda learner: learner.net.state_dict(), lambda learner: learner.optimizer.state_dict()["state"]):
        assert same(part(other), part(one))


def test_an_optimizer_of_another_network_is_refused(tiny):
    """Before Adam writes past the end of its moments."""
    learner = Learner(configs.load(tiny), CPU)
    gradient_step(learner, 1.0)
    good = learner.state_dict()
    moments = good["optimizer"]
    for damaged in (moments | {0: moments[0] | {"exp_avg": torch.zeros(3)}}, moments | {1: {"step": 1}}, {}):
        with pytest.raises(UserError, match=r"optimizer in x\.pt is damaged, or belongs to another network"):
            learner.load_state_dict({**good, "optimizer": damaged}, "x.pt")
