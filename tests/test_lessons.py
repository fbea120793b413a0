"""The lessons of DDPM and Improved DDPM, from the config to the picture: training, its checkpoint, samples."""

import subprocess
import sys

import pytest
import torch
from conftest import ROOT, write_config
from PIL import Image
from test_distributed import losses, torchrun
from test_training import CPU, same, trained

from edm import checkpoint, choices
from edm import config as configs
from edm.ddpm import ancestral, ddim, make_chain
from edm.ddpm_training import ImportanceSampledTimesteps
from edm.errors import UserError
from edm.learner import Learner
from edm.sampler import clipped, guided, sample
from edm.training import train

DDPM = ["preconditioning.formulation=ddpm", "loss.noise_distribution=ddpm", "loss.weighting=iddpm", "chain.num_timesteps=30"]
DDPM += ["sampler.solver=ancestral", "sampler.sampling_steps=5", "sampler.clip=true"]
IDDPM = [*DDPM, "preconditioning.formulation=improved_ddpm", "loss.objective=hybrid", "chain.schedule=cosine"]
IDDPM += ["sampler.variance=learned_range", "network.architecture=adm", "loss.noise_distribution=importance"]
VLB = [*IDDPM, "loss.objective=vlb"]
FEW = ["chain.num_timesteps=4", "sampler.sampling_steps=2"]  # so that all of them soon have a full history


@pytest.fixture
def colour(tmp_path, image_folder):
    """The tiny run's config, in colour."""
    return write_config(tmp_path, image_folder, channels=3)


@pytest.mark.parametrize("lesson", [DDPM, IDDPM, VLB], ids=["ddpm", "hybrid", "vlb"])
def test_the_losses_fall(colour, lesson):
    fast = ["training.learning_rate=1e-2", "training.batch_size=16", "network.dropout=0", "training.max_grad_norm=1"]
    _, losses = trained(configs.load(colour, [*lesson, *fast]), 120)
    assert sum(losses[-40:]) < 0.7 * sum(losses[:40])


@pytest.mark.parametrize("lesson", [DDPM, IDDPM], ids=["ddpm", "iddpm"])
def test_a_resumed_lesson_equals_one_never_stopped(colour, tmp_path, lesson):
    """The importance sampler's history included: 4 timesteps, 12 steps of 4 images."""
    options = [*lesson, "training.num_training_steps=12", "chain.schedule=cosine", *FEW]
    folder = "image/image_folder/tiny"
    train(configs.load(colour, options), CPU, tmp_path / "whole")
    train(configs.load(colour, [*options, "training.num_training_steps=10"]), CPU, tmp_path / "parts")
    train(configs.load(colour, options), CPU, tmp_path / "parts", resume_from="latest")
    whole, parts = (checkpoint.read(tmp_path / run / folder / "diffusion-12.pt") for run in ("whole", "parts"))
    assert same(whole, parts)
    if lesson is IDDPM:
        assert whole["noise_distribution"]["history"].isfinite().sum() > 20


def test_the_learner_remembers_every_loss_of_the_batch(colour):
    """However many parts it is computed in: those of the images, not weighted by their importance."""
    histories = []
    for parts in (1, 4):
        config = configs.load(colour, [*IDDPM, *FEW, "network.dropout=0", f"training.accumulation={parts}"])
        learner, _ = trained(config, 15)
        assert isinstance(learner.noise_distribution, ImportanceSampledTimesteps)
        histories.append(learner.noise_distribution.history)
    assert histories[0].isfinite().sum() >= 36  # of 40, after 60 losses
    torch.testing.assert_close(histories[0], histories[1], rtol=1e-3, atol=1e-4, equal_nan=True)


def test_importance_changes_the_draws_and_not_what_is_minimised(colour):
    config = configs.load(
        colour, [*IDDPM, *FEW, "training.batch_size=2000", "training.learning_rate=1e-12", "network.dropout=0"]
    )
    learner = Learner(config, CPU)
    images = torch.randint(0, 256, (2000, config.data.channels, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    labels = torch.zeros(2000, dtype=torch.int64)
    alike = [learner.step(images, labels, step)[0].item() for step in (1,)]
    weights = learner.noise_distribution.weights()
    assert weights.max() > 1.5 * weights.min()
    drawn = learner.draw(images, labels, 2)
    t = make_chain("cosine", 4, torch.float32).nearest(drawn["sigma"])
    assert t.bincount(minlength=4).tolist() == pytest.approx((2000 * weights).tolist(), abs=100)
    assert learner.step(images, labels, 2)[0].item() == pytest.approx(alike[0], rel=0.03)


def test_importance_weighs_the_gradients_and_the_history_takes_the_losses_as_they_are(colour):
    config = configs.load(colour, [*IDDPM, *FEW, "training.batch_size=200", "network.dropout=0"])
    learner = Learner(config, CPU)
    images = torch.randint(0, 256, (200, config.data.channels, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    labels = torch.zeros(200, dtype=torch.int64)
    learner.step(images, labels, 1)
    drawn = learner.draw(images, labels, 2)
    importance, others = drawn["importance"], {key: drawn[key] for key in drawn.keys() - {"importance"}}
    assert importance.std() > 0.1
    losses = learner.objective(learner.net, **others)
    expected = torch.autograd.grad((importance * losses).mean(), learner.parameters)
    learner.step(images, labels, 2)
    for parameter, gradient in zip(learner.parameters, expected):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)
    t = make_chain("cosine", 4, torch.float32).nearest(drawn["sigma"])
    for place in range(4):
        newest = losses[t == place][-10:].detach()
        torch.testing.assert_close(learner.noise_distribution.history[place, -len(newest) :], newest, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("damage", [{"history": torch.zeros(3, 10)}, {"others": torch.zeros(4, 10)}, {"history": 1}, [1], 3])
def test_a_damaged_history_is_refused(colour, tmp_path, damage):
    config = configs.load(colour, [*IDDPM, *FEW])
    state = {**Learner(config, CPU).state_dict(), "noise_distribution": damage}
    trained_once, _ = trained(config, 1)
    state["optimizer"] = trained_once.state_dict()["optimizer"]
    with pytest.raises(UserError, match="the noise distribution's state in"):
        Learner(config, CPU).load_state_dict(state, tmp_path / "x.pt")


def test_a_run_may_begin_or_stop_to_sample_by_importance(colour, tmp_path):
    uniform, importance = (
        configs.load(colour, [*IDDPM, *FEW, f"loss.noise_distribution={name}"]) for name in ("ddpm", "importance")
    )
    for before, after in ((uniform, importance), (importance, uniform)):
        learner, _ = trained(before, 2)
        other = Learner(after, CPU)
        other.load_state_dict(learner.state_dict(), tmp_path)
        assert all(table.isnan().all() for table in other.noise_distribution.state_dict().values())


def test_a_run_does_not_go_on_with_another_chain(colour, tmp_path):
    train(configs.load(colour, [*IDDPM, "training.num_training_steps=1"]), CPU, tmp_path)
    for change in ("chain.schedule=linear", "chain.num_timesteps=31"):
        with pytest.raises(UserError, match=f"no run can go on from .* with another {change.partition('=')[0]}"):
            train(configs.load(colour, [*IDDPM, change]), CPU, tmp_path, resume_from="latest")


def test_two_processes_share_the_history(tmp_path, image_folder):
    """50 steps of 7 images by importance: the losses, and the history in the checkpoint, of one process."""
    path = write_config(tmp_path, image_folder, channels=3)
    arguments = ["--config_path", path, *IDDPM, *FEW, "network.dropout=0", "training.batch_size=7"]
    arguments += ["--num_training_steps", 50, "--save_and_sample_every_n", 50]
    pair = torchrun(2, tmp_path, "train_mnist.py", *arguments, "--output_dir", "two")
    _, err = pair.communicate(timeout=300)
    assert pair.returncode == 0, err
    call = [sys.executable, ROOT / "train_mnist.py", *arguments, "--device", "cpu", "--output_dir", "one"]
    subprocess.run([*map(str, call)], cwd=tmp_path, check=True, capture_output=True)
    one, two = (tmp_path / run / "image/image_folder/tiny" for run in ("one", "two"))
    assert losses(two) == pytest.approx(losses(one), rel=1e-3)
    histories = [checkpoint.read(run / "diffusion-50.pt")["noise_distribution"]["history"] for run in (one, two)]
    assert histories[0].isfinite().all()
    torch.testing.assert_close(*histories, rtol=1e-3, atol=1e-4)


class Network:
    """A denoiser whose images, and v, depend on the labels."""

    def __call__(self, x, sigma, labels=None, all_outputs=False):
        D = 0.9 * torch.tanh(2 * x) + (0 if labels is None else labels.sum(dim=1)[:, None, None, None])
        return torch.cat([D, 0.3 * D], dim=1) if all_outputs else D

    def round_sigma(self, sigma: float) -> float:
        return 1.01 * sigma


@pytest.mark.parametrize("clip", ["true", "false"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_the_sampler_is_made_of_the_configs_choices(variance, clip):
    entries = [*IDDPM, "network.label_dim=2", "sampler.guidance=1.5", f"sampler.variance={variance}", f"sampler.clip={clip}"]
    latents = torch.randn(3, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels, chain = torch.eye(3, dtype=torch.float64)[:, :2], make_chain("cosine", 30).strided(5)
    guided_network = guided(Network(), 1.5)
    denoiser = clipped(guided_network) if clip == "true" else guided_network
    levels = choices.sampling_plan(configs.from_dict({}, "x", "x", entries))[0]
    expected = {
        "ancestral": ancestral(denoiser, latents, chain, lambda: latents.flip(0), variance, labels),
        "ddim": ddim(denoiser, latents, chain, labels),
        "heun": sample(denoiser, latents, levels, labels, round_sigma=Network().round_sigma),
    }
    for solver, states in expected.items():
        config = configs.from_dict({}, "x", "x", [*entries, f"sampler.solver={solver}"])
        found = choices.sampler(config)(Network(), latents, labels, lambda: latents.flip(0))
        for one, other in zip(found, states, strict=True):
            assert torch.equal(one.x, other.x)
            assert one.sigma == other.sigma


@pytest.mark.parametrize("solver", ["ancestral", "ddim", "heun"])
def test_a_chains_network_is_sampled_by_every_sampler(colour, tmp_path, script, solver):
    train(configs.load(colour, [*IDDPM, "training.num_training_steps=1"]), CPU, tmp_path / "output")
    path = tmp_path / "output/image/image_folder/tiny/diffusion-1.pt"
    arguments = ("--checkpoint", path, "--solver", solver, "--seeds", "0-4", "--gif", "--sampling_steps", 30, "--guidance", 2)
    for batch_size in (1, 5):
        code, _, err = script("sample.py", *arguments, "--batch_size", batch_size, "--output_dir", f"b{batch_size}")
        assert code == 0, err
    grids = [
        torch.frombuffer(bytearray(Image.open(tmp_path / run / "grid.png").tobytes()), dtype=torch.uint8)
        for run in ("b1", "b5")
    ]
    assert (grids[0].int() - grids[1].int()).abs().max() <= 1
    assert grids[0].float().std() > 10


def test_a_gif_of_a_long_chain_has_64_frames(colour, tmp_path, script):
    options = [*DDPM, "chain.num_timesteps=300", "training.num_training_steps=1"]
    train(configs.load(colour, options), CPU, tmp_path / "output")
    path = tmp_path / "output/image/image_folder/tiny/diffusion-1.pt"
    assert script("sample.py", "--checkpoint", path, "--sampling_steps", 300, "--gif", "--output_dir", "g")[0] == 0
    with Image.open(tmp_path / "g/reverse.gif") as gif:
        assert 50 < gif.n_frames <= 64  # like frames are merged


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (
            ["loss.objective=hybrid"],
            "loss.objective: hybrid teaches a variance; it needs preconditioning.formulation improved_ddpm",
        ),
        (
            ["loss.objective=vlb", "preconditioning.formulation=improved_ddpm"],
            "loss.noise_distribution must be ddpm or importance",
        ),
        (["loss.objective=hybird"], "did you mean 'hybrid'"),
        (["chain.schedule=linear", "chain.num_timesteps=20"], "chain.num_timesteps: 20 are too few for the linear schedule"),
        (
            ["sampler.solver=ancestral", "sampler.sampling_steps=1001"],
            "sampler: the chain has 1000 timesteps, too few for 1001",
        ),
        (["sampler.solver=ddim", "preconditioning.formulation=vp"], "sampler: the formulation vp knows other noise levels"),
        (["sampler.solver=ancestral", "preconditioning.formulation=iddpm"], "the solvers heun and euler need none"),
        (["sampler.solver=ancestral", "sampler.variance=learned_range"], "variance can be fixed_small or fixed_large"),
        (["sampler.clip=yes"], "unknown choice"),
    ],
)
def test_what_does_not_fit_together(entries, message):
    with pytest.raises(UserError) as error:
        configs.from_dict({}, "x", "x", entries)
    assert message in str(error.value)


def test_an_edm_network_knows_every_chain():
    for solver in ("ancestral", "ddim"):
        configs.from_dict({}, "x", "x", [f"sampler.solver={solver}", "chain.schedule=cosine"])
