"""The lessons of DDPM and Improved DDPM, from the config to the picture: training, its checkpoint, samples."""

import copy

import pytest
import torch
from PIL import Image
from torch.nn.functional import one_hot
from torchvision.transforms.functional import pil_to_tensor

from edm.ddpm import ancestral, ddim, make_chain
from edm.ddpm_loss import ImportanceSampledTimesteps
from edm.sampler import clipped, guided, sample
from lab import checkpoint
from lab import config as configs
from lab.build import build_sampler, sampling_plan
from lab.cli import UserError
from lab.data import as_tensors, open_dataset, shuffled_batches
from lab.learner import Learner
from lab.seeds import generator_for

CPU = torch.device("cpu")
DDPM = ["preconditioning.formulation=ddpm", "loss.noise_distribution=ddpm", "loss.weighting=iddpm", "chain.num_timesteps=30"]
DDPM += ["sampler.solver=ancestral", "sampler.sampling_steps=5", "sampler.clip=true"]
IDDPM = [*DDPM, "preconditioning.formulation=improved_ddpm", "loss.objective=hybrid", "chain.betas=cosine"]
IDDPM += ["sampler.variance=learned_range", "network.architecture=adm", "loss.noise_distribution=importance"]
VLB = [*IDDPM, "loss.objective=vlb"]
FEW = ["chain.num_timesteps=4", "sampler.sampling_steps=2"]  # so that all of them soon have a full history


@pytest.mark.parametrize("lesson", [[], IDDPM, VLB], ids=["edm", "hybrid", "vlb"])
def test_the_losses_fall(train, tiny_grey, last, lesson):
    fast = ["training.learning_rate=1e-2", "network.dropout=0", "training.max_grad_norm=1", "--batch_size", 16]
    folder = train(tiny_grey, *lesson, *fast, "--num_training_steps", 40, "--save_and_sample_every_n", 40)
    losses = last(folder)["losses"][:, 0]
    assert losses[-15:].mean() < 0.7 * losses[:15].mean()


# Timesteps drawn by importance


def test_a_step_by_importance_by_hand(train, tiny, at_step):
    """The gradient of a step after the history is full: each loss divided by T p_t, so that the mean is over all timesteps."""
    options = [*IDDPM, *FEW, "network.dropout=0", "loss.label_dropout=0", "training.batch_size=64"]
    seen = {}

    def remember(learner):
        seen["gradients"] = [parameter.grad.clone() for parameter in learner.net.parameters()]
        seen["learner"] = copy.deepcopy(learner)

    at_step(2, remember)
    folder = train(tiny, *options, "--num_training_steps", 2)
    learner, history = seen["learner"], seen["learner"].noise_distribution.history
    assert isinstance(learner.noise_distribution, ImportanceSampledTimesteps)

    root_mean_square = history.square().mean(dim=1).sqrt()
    p = 0.999 * root_mean_square / root_mean_square.sum() + 0.001 / 4
    images, classes = as_tensors(open_dataset(learner.config))
    index = list(zip(range(2), shuffled_batches(len(images), 64, seed=0)))[1][1]
    generator = generator_for(0, "step", 2)
    y = images[index] / 127.5 - 1
    t = (torch.rand(64, generator=generator, dtype=torch.float64)[:, None] >= p.double().cumsum(dim=0)).sum(dim=1)
    chain = make_chain("cosine", 4).like(y)
    sigma = chain.sigma[t]
    n = sigma.view(-1, 1, 1, 1) * torch.randn(y.shape, generator=generator)
    D, v = learner.net(y + n, sigma, one_hot(classes[index], 2), all_outputs=True).chunk(2, dim=1)
    x_t = chain.scale[t].view(-1, 1, 1, 1) * (y + n)
    term = chain.bound_term(y, x_t, t, chain.posterior_mean(D.detach(), x_t, t), chain.learned_log_variance(v, t))
    losses = (D - y).square().sum(dim=(1, 2, 3)) / sigma**2 + 0.001 * 4 * y[0].numel() * term
    importance = 1 / (4 * p[t])
    assert importance.std() > 0.1
    gradients = torch.autograd.grad((importance * losses).mean(), list(learner.net.parameters()))
    torch.testing.assert_close(seen["gradients"], list(gradients), rtol=1e-3, atol=1e-4)

    # The history takes the losses as they are.
    history = checkpoint.load(folder / "diffusion-2.pt")["noise_distribution"]["history"]
    for place in range(4):
        newest = losses[t == place][-10:].detach()
        torch.testing.assert_close(history[place, -len(newest) :], newest, rtol=1e-4, atol=1e-4)


def test_the_history_is_that_of_the_whole_batch_however_many_parts_it_is_computed_in(train, tiny, last):
    options = [*IDDPM, *FEW, "network.dropout=0", "--num_training_steps", 3, "training.batch_size=16"]
    histories = []
    for parts in (1, 4):
        folder = train(tiny, *options, f"training.accumulation={parts}", output=f"{parts}")
        histories.append(last(folder)["noise_distribution"]["history"])
    assert histories[0].isfinite().sum() >= 36  # of 40, after 48 losses
    torch.testing.assert_close(histories[0], histories[1], rtol=1e-3, atol=1e-4, equal_nan=True)


def test_a_damaged_history_is_refused(train, tiny, last):
    folder = train(tiny, *IDDPM, *FEW, "--num_training_steps", 1)
    learner = Learner(configs.load(tiny, [*IDDPM, *FEW]), CPU)
    learner.load_state_dict(last(folder), "x.pt")
    for damage in ({"history": torch.zeros(3, 10)}, {"others": torch.zeros(4, 10)}, {"history": 1}, [1], 3):
        with pytest.raises(UserError, match=r"x\.pt is damaged"):
            learner.load_state_dict(last(folder) | {"noise_distribution": damage}, "x.pt")


def test_a_run_may_begin_or_stop_to_sample_by_importance(train, tiny, last):
    uniform, importance = ([*IDDPM, *FEW, f"loss.noise_distribution={name}"] for name in ("ddpm", "importance"))
    for name, before, after in (("begin", uniform, importance), ("stop", importance, uniform)):
        train(tiny, *before, "--num_training_steps", 2, output=name)
        folder = train(tiny, *after, "--num_training_steps", 3, "--resume_from", "latest", output=name)
        assert ("history" in last(folder)["noise_distribution"]) == (name == "begin")
        assert last(folder)["step"] == 3


# Sampling


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
    denoiser = guided(Network(), 1.5)
    denoiser = clipped(denoiser) if clip == "true" else denoiser
    levels, _ = sampling_plan(configs.from_dict({}, "x", "x", entries))
    expected = {
        "ancestral": ancestral(denoiser, latents, chain, lambda: latents.flip(0), variance, labels),
        "ddim": ddim(denoiser, latents, chain, labels),
        "heun": sample(denoiser, latents, levels, labels, round_sigma=Network().round_sigma),
    }
    for solver, states in expected.items():
        config = configs.from_dict({}, "x", "x", [*entries, f"sampler.solver={solver}"])
        found = build_sampler(config)(Network(), latents, labels, lambda: latents.flip(0))
        for one, other in zip(found, states, strict=True):
            assert torch.equal(one.x, other.x)
            assert one.sigma == other.sigma


@pytest.mark.parametrize("solver", ["ancestral", "ddim", "heun"])
def test_a_chains_network_is_sampled_by_every_sampler_whatever_the_batch(train, tiny, tmp_path, script, solver):
    path = train(tiny, *IDDPM, "--num_training_steps", 1, "sampler.num_samples=1") / "diffusion-1.pt"
    grids = []
    for batch_size in (1, 5):
        options = ("--solver", solver, "--seeds", "0-4", "--guidance", 2, "--batch_size", batch_size, "--output_dir", "x")
        code, _, err = script("sample.py", "--checkpoint", path, *options)
        assert code == 0, err
        grids.append(pil_to_tensor(Image.open(tmp_path / "x/grid.png")).int())
    assert (grids[0] - grids[1]).abs().max() <= 1
    assert grids[0].float().std() > 10


def test_a_gif_of_a_long_chain_has_64_frames(train, tiny, tmp_path, script):
    options = ["chain.num_timesteps=200", "--num_training_steps", 1, "sampler.num_samples=1"]
    path = train(tiny, *DDPM, *options) / "diffusion-1.pt"
    assert script("sample.py", "--checkpoint", path, "--sampling_steps", 200, "--gif", "--output_dir", "g")[0] == 0
    with Image.open(tmp_path / "g/reverse.gif") as gif:
        assert 50 < gif.n_frames <= 64  # frames that are alike are merged


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (["loss.objective=hybrid"], "loss.objective: hybrid teaches a variance; it needs preconditioning.formulation=improved"),
        (
            ["loss.objective=vlb", "preconditioning.formulation=improved_ddpm"],
            "loss.objective: vlb needs the timesteps of a chain: loss.noise_distribution ddpm or importance",
        ),
        (["loss.objective=hybird"], "did you mean 'hybrid'"),
        (["loss.noise_distribution=ddpm", "chain.num_timesteps=20"], "chain.num_timesteps: 20"),
        (["sampler.solver=ancestral", "sampler.sampling_steps=1001"], "sampler: "),
        (
            ["sampler.solver=ddim", "preconditioning.formulation=vp"],
            "sampler: the formulation vp does not know the noise",
        ),
        (["sampler.solver=ancestral", "sampler.variance=learned_range"], "has learned no variance; choose fixed_small or"),
    ],
)
def test_what_does_not_fit_together_is_refused_before_training(train, tiny, tmp_path, entries, message):
    with pytest.raises(UserError) as error:
        train(tiny, *entries)
    assert message in str(error.value)
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_an_edm_network_knows_every_chain_and_an_iddpm_network_its_own():
    for solver in ("ancestral", "ddim"):
        for other in ("chain.betas=cosine", "chain.betas=linear", "preconditioning.formulation=iddpm"):
            build_sampler(configs.from_dict({}, "x", "x", [f"sampler.solver={solver}", other]))
