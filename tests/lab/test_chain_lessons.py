"""The lessons of DDPM and Improved DDPM, from the config to the picture: training, its checkpoint, samples."""

import copy
import itertools

import pytest
import torch
from PIL import Image
from torch.nn.functional import one_hot
from torchvision.transforms.functional import pil_to_tensor

from edm.ddpm import ancestral, ddim, make_chain
from edm.ddpm_loss import variational_loss
from edm.sampler import clipped, guided, sample
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


def test_a_step_by_importance_by_hand(train, tiny, at_step, last):
    """After the history is full, each loss is divided by T p_t, so that the mean is over all timesteps."""
    seen = {}

    def remember(learner):
        seen["gradients"] = [parameter.grad.clone() for parameter in learner.net.parameters()]
        seen["learner"] = copy.deepcopy(learner)

    at_step(2, remember)
    options = [*IDDPM, *FEW, "network.dropout=0", "loss.label_dropout=0", "training.batch_size=64", "--num_training_steps", 2]
    newest = last(train(tiny, *options))["noise_distribution"]["history"]
    learner, history = seen["learner"], seen["learner"].noise_distribution.history
    root_mean_square = history.square().mean(dim=1).sqrt()
    p = 0.999 * root_mean_square / root_mean_square.sum() + 0.001 / 4
    images, classes = as_tensors(open_dataset(learner.config))
    _, index = itertools.islice(shuffled_batches(len(images), 64, seed=0), 2)
    generator, y = generator_for(0, "step", 2), images[index] / 127.5 - 1
    t = (torch.rand(64, generator=generator, dtype=torch.float64)[:, None] >= p.double().cumsum(dim=0)).sum(dim=1)
    chain = make_chain("cosine", 4)
    sigma = chain.like(y).sigma[t]
    n = sigma.view(-1, 1, 1, 1) * torch.randn(y.shape, generator=generator)
    losses = variational_loss(learner.net, y, n, sigma, 1 / sigma**2, chain, hybrid=True, labels=one_hot(classes[index], 2))
    importance = 1 / (4 * p[t])
    assert importance.std() > 0.1
    gradients = torch.autograd.grad((importance * losses).mean(), list(learner.net.parameters()))
    torch.testing.assert_close(seen["gradients"], list(gradients), rtol=1e-3, atol=1e-4)
    for place in range(4):  # the history takes the losses as they are
        expected = losses[t == place][-10:].detach()
        torch.testing.assert_close(newest[place, -len(expected) :], expected, rtol=1e-4, atol=1e-4)


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
        end = last(train(tiny, *after, "--num_training_steps", 3, "--resume_from", "latest", output=name))
        assert ("history" in end["noise_distribution"], end["step"]) == (name == "begin", 3)


class Network:
    """A denoiser whose images, and v, depend on the labels."""

    def __call__(self, x, sigma, labels=None, all_outputs=False):
        D = 0.9 * torch.tanh(2 * x) + (0 if labels is None else labels.sum(dim=1)[:, None, None, None])
        return torch.cat([D, 0.3 * D], dim=1) if all_outputs else D

    def round_sigma(self, sigma: float) -> float:
        return 1.01 * sigma


@pytest.mark.parametrize("clip", ["true", "false"])
@pytest.mark.parametrize("solver", ["fixed_small", "fixed_large", "learned_range", "ddim", "heun"])
def test_the_sampler_is_made_of_the_configs_choices(solver, clip):
    """The first three are variances of the ancestral sampler."""
    variance = f"sampler.variance={solver if '_' in solver else 'fixed_small'}"
    entries = [*IDDPM, "network.label_dim=2", "sampler.guidance=1.5", variance, f"sampler.clip={clip}"]
    entries += [f"sampler.solver={'ancestral' if '_' in solver else solver}"]
    config = configs.from_dict({}, "x", "x", entries)
    latents = torch.randn(3, 1, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels, chain = torch.eye(3, dtype=torch.float64)[:, :2], make_chain("cosine", 30).strided(5)
    denoiser = guided(Network(), lambda x, sigma, labels: Network()(x, sigma), 1.5)
    denoiser = clipped(denoiser) if clip == "true" else denoiser
    if solver == "heun":
        expected = sample(denoiser, latents, sampling_plan(config)[0], labels, round_sigma=Network().round_sigma)
    elif solver == "ddim":
        expected = ddim(denoiser, latents, chain, labels)
    else:
        expected = ancestral(denoiser, latents, chain, lambda: latents.flip(0), solver, labels)
    found = build_sampler(config)(Network(), latents, labels, lambda: latents.flip(0))
    assert [(state.x.tolist(), state.sigma) for state in found] == [(state.x.tolist(), state.sigma) for state in expected]


@pytest.mark.parametrize("solver", ["ancestral", "ddim", "heun"])
def test_a_chains_network_is_sampled_by_every_sampler_whatever_the_batch(train, tiny, tmp_path, script, solver):
    options = ["chain.num_timesteps=200", "--num_training_steps", 1, "sampler.num_samples=1"]
    path = train(tiny, *IDDPM, *options) / "diffusion-1.pt"
    grids = []
    for batch_size in (1, 5):
        options = ("--solver", solver, "--seeds", "0-4", "--guidance", 2, "--batch_size", batch_size, "--output_dir", "x")
        code, _, err = script("sample.py", "--checkpoint", path, *options)
        assert code == 0, err
        grids.append(pil_to_tensor(Image.open(tmp_path / "x/grid.png")).int())
    assert (grids[0] - grids[1]).abs().max() <= 1
    assert grids[0].float().std() > 10
    if solver == "ancestral":
        assert script("sample.py", "--checkpoint", path, "--sampling_steps", 200, "--gif", "--output_dir", "x")[0] == 0
        with Image.open(tmp_path / "x/reverse.gif") as gif:
            assert 30 < gif.n_frames <= 40


def test_an_edm_network_knows_every_chain_and_an_iddpm_network_its_own():
    for solver in ("ancestral", "ddim"):
        for other in ("chain.betas=cosine", "chain.betas=linear", "preconditioning.formulation=iddpm"):
            build_sampler(configs.from_dict({}, "x", "x", [f"sampler.solver={solver}", other]))
