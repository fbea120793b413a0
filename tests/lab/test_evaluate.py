"""`python -m lab.evaluate`: its table and figures, bits per dimension, the sweep, and what it refuses."""

import json
import math
import sys

import pytest
import torch
from torch import nn

from edm.ddpm import make_chain
from edm.likelihood import dequantize
from edm.precond import EDMPreconditioning, PreconditionedDenoiser, iDDPMPreconditioning
from edm.schedule import iddpm_levels, ve_steps
from lab import config as configs
from lab import evaluate
from lab.cli import UserError
from lab.data import to_uint8
from lab.distributed import World
from lab.seeds import ImageNoise

IDDPM = ["preconditioning.formulation=improved_ddpm", "loss.noise_distribution=importance", "loss.objective=hybrid"]
IDDPM += ["loss.weighting=iddpm", "chain.num_timesteps=30", "chain.betas=cosine", "network.architecture=adm"]
IDDPM += ["sampler.solver=ancestral", "sampler.sampling_steps=5", "sampler.clip=true", "sampler.variance=learned_range"]


@pytest.fixture
def path(train, tiny_grey, monkeypatch):
    """The checkpoint of Improved DDPM after one step; classifiers are trained for 5 steps."""
    monkeypatch.setattr("lab.metrics.MIN_STEPS", 5)
    return train(tiny_grey, *IDDPM, "training.num_training_steps=1") / "diffusion-1.pt"


@pytest.fixture
def run(script, tmp_path):
    """run(checkpoint, *arguments) -> what it prints, and the figures it writes: the command in this process."""

    def call(path, *arguments) -> tuple[str, dict]:
        code, out, err = script("lab/evaluate.py", "--checkpoint", path, "--json", "figures.json", *arguments)
        assert code == 0, err
        return out, json.loads((tmp_path / "figures.json").read_text())

    return call


# The command


def test_a_checkpoint_is_evaluated(path, run, tmp_path):
    """Samples beside real images, bits by the ODE and by the bound; the classifier is trained once."""
    few = ("--num_samples", 8, "--num_images", 5)
    out, figures = run(path, *few, "--batch_size", 2, "--ode_steps", 3)
    for text in ("8 samples", "Frechet distance", "precision", "recall", "share of class 1", "in 3 steps", "reconstruction"):
        assert text in out
    assert "warning: the Frechet distance of 8 samples says little; compare 500 or more" in out
    bound, ode = figures["bits_per_dimension"]["bound"], figures["bits_per_dimension"]["ode"]
    assert len(bound["terms"]) == 30
    assert sum(bound["terms"]) + bound["prior"] == pytest.approx(bound["total"])
    assert (ode["images"], ode["steps"]) == (5, 3)
    assert (figures["step"], figures["against"]) == (1, "one half of the images")
    assert figures["samples"]["images"] == 8
    assert figures["floor"]["images"] == 7  # the other half of 13
    assert sum(figures["samples"]["class_shares"]) == pytest.approx(1)
    before = [(file, file.read_bytes()) for file in (tmp_path / "output/classifier").glob("*.pt")]
    assert len(before) == 1
    options = ("--timesteps", 6, "sampler.variance=fixed_large", "--against", "train")
    _, again = run(path, *few, "--batch_size", 5, *options)
    assert len(again["bits_per_dimension"]["bound"]["terms"]) == 6
    assert again["floor"]["images"] == 6
    assert all(file.read_bytes() == content for file, content in before)


def test_five_hundred_samples_are_enough_for_no_warning(trained, run, monkeypatch):
    monkeypatch.setattr("lab.metrics.MIN_STEPS", 5)
    out, figures = run(trained, "--num_samples", 500, "--num_images", 0, "sampler.sampling_steps=2", "--batch_size", 500)
    assert "warning" not in out
    assert figures["samples"]["images"] == 500


@pytest.mark.parametrize("label_dim", [2, 3])
def test_right_class_is_left_out_if_the_network_knows_classes_that_the_data_lack(label_dim, train, tiny_grey, run, monkeypatch):
    monkeypatch.setattr("lab.metrics.MIN_STEPS", 5)
    path = train(tiny_grey, f"network.label_dim={label_dim}", "training.num_training_steps=1") / "diffusion-1.pt"
    out, figures = run(path, "--num_samples", 4, "--num_images", 0)
    assert ("right_class" in figures["samples"]) == ("of the right class" in out) == (label_dim == 2)


REFUSED = {
    "--num_samples 3": "--num_samples: a comparison takes 4 or more samples",
    "--sweep --num_samples 0": "--num_samples: a comparison takes 4 or more samples",
    "--sweep --num_images 3": "--sweep computes no bits per dimension",
    "--num_samples 0 --num_images 0": "leaves nothing to evaluate",
    "--num_samples 0 --num_images 14": "--num_images: there are 6 images",
    "--num_samples 0 --timesteps 31": "the bound: sampler: the chain has 30 timesteps, too few for 31 steps",
    "--num_samples 0 sampler.sigma_min=1 sampler.sigma_max=1.001 sampler.solver=ancestral": "two noise levels from 1 to 1.001",
    "--data_root nowhere": "data.root: 'nowhere' is not a folder",
    "chain.num_timesteps=31": "chain.num_timesteps=30, which cannot be changed",
    "sampler.solvr=ddim": "unknown key; did you mean 'sampler.solver'",
    "sampler.sampling_steps=31": "sampler: the chain has 30 timesteps, too few for 31 steps",
    "--json grey/tiny.yaml/x.json": "cannot write grey/tiny.yaml/x.json",
    "--json output": "cannot write output: it is a folder",
    "--against tests": "invalid choice: 'tests'",
}


def test_what_cannot_be_evaluated_is_one_line(path, script):
    for arguments, message in REFUSED.items():
        code, out, err = script("lab/evaluate.py", "--checkpoint", path, *arguments.split())
        assert (code, out) == (2, ""), arguments
        assert message in err.rpartition("\r")[2]
        assert err.count("\n") == 1


def test_a_network_that_knows_other_noise_levels_has_no_bound(train, tiny_grey, run, script):
    path = train(tiny_grey, "preconditioning.formulation=ve", "training.num_training_steps=1") / "diffusion-1.pt"
    out, figures = run(path, "--num_samples", 0, "--num_images", 3, "--ode_steps", 3)
    assert figures["bits_per_dimension"].keys() == {"ode"}
    assert "by the bound" not in out
    code, _, err = script("lab/evaluate.py", "--checkpoint", path, "--num_samples", 0, "--timesteps", 3)
    assert code == 2
    assert "error: the bound: sampler: the formulation ve does not know the noise levels of the chain" in err


def test_an_evaluation_does_not_depend_on_the_number_of_processes(path, run, start, tmp_path):
    """Samples, floor, the ODE's bits and the bound, of 5 images between two."""
    arguments = ("--num_samples", 6, "--num_images", 5, "--ode_steps", 4)
    _, one = run(path, *arguments)
    process = start("lab/evaluate.py", "--checkpoint", path, *arguments, "--json", "two.json", torchrun=2)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert out.count("Frechet distance of 6 samples says little") == 1
    two = json.loads((tmp_path / "two.json").read_text())
    for part in ("samples", "floor"):
        for figure in one[part]:
            assert two[part][figure] == pytest.approx(one[part][figure], rel=0.02), figure  # a pixel may be a grey level away
    for part in ("ode", "bound"):
        assert two["bits_per_dimension"][part]["total"] == pytest.approx(one["bits_per_dimension"][part]["total"], rel=1e-5)


# Bits per dimension


@pytest.fixture
def mixture(two_peaks):
    """40 images of 16 pixels, each drawn from N(+-0.5, 0.2^2), and the exact denoiser."""
    generator = torch.Generator().manual_seed(0)
    shape = (40, 1, 4, 4)
    signs = torch.randint(0, 2, shape, generator=generator) - 0.5

    def denoiser(x, sigma, labels=None):
        assert labels is None or labels.shape == (len(x), 2)
        return two_peaks(x, torch.as_tensor(sigma, dtype=x.dtype).view(-1, 1, 1, 1))

    return to_uint8(signs + 0.2 * torch.randn(shape, generator=generator)), denoiser


def test_the_odes_bits_are_those_of_the_mixture(mixture, monkeypatch):
    """-log2 of its density at the points to which the images are moved, in intervals of a grey level."""
    images, denoiser = mixture
    uniform, drawn = torch.special.ndtr(ImageNoise(range(40), (1, 4, 4), torch.device("cpu"), torch.float64)()), []
    monkeypatch.setattr(evaluate, "dequantize", lambda images, uniform: (drawn.append(uniform), dequantize(images, uniform))[1])
    x = dequantize(images, uniform)
    density = sum(torch.exp(-((x - mean) ** 2) / 0.08) for mean in (-0.5, 0.5)) / 2 / math.sqrt(2 * math.pi * 0.04)
    bits = -(density / 127.5).log2().mean(dim=(1, 2, 3))
    levels = ve_steps(257, 0.002, 80)[:-1].flip(0)
    for batch_size, labels in ((7, None), (40, torch.eye(2).repeat(20, 1))):
        found = evaluate.ode_bits(denoiser, levels, images, labels, batch_size, World())
        assert found["total"] == pytest.approx(bits.mean().item(), abs=2e-3)
        assert found["standard_error"] == pytest.approx(bits.std().item() / math.sqrt(40), rel=1e-2)
        torch.testing.assert_close(torch.cat(drawn), uniform)  # an image's noise depends on its number, not on its batch
        drawn.clear()


def test_the_bound_is_a_little_above_the_bits_of_the_mixture(mixture):
    """Which are -log2 of the probability of each pixel's grey level."""
    images, denoiser = mixture
    edges = [(images.double() + side) / 127.5 - 1 for side in (-0.5, 0.5)]
    low, high = (sum(torch.special.ndtr((edge - mean) / 0.2) for mean in (-0.5, 0.5)) / 2 for edge in edges)
    bits = -(high - low).log2().mean().item()
    config, chain = configs.from_dict({"sampler": {"variance": "fixed_large"}}, "x", "x"), make_chain("cosine", 1000)
    found = evaluate.bound_bits(denoiser, config, chain, images, None, 40, World())
    assert bits < found["total"] < bits + 0.1
    assert found["total"] == pytest.approx(found["prior"] + sum(found["terms"]))
    assert evaluate.bound_bits(denoiser, configs.Config(), chain, images, None, 40, World())["total"] > found["total"] + 0.3


def test_the_bound_is_clipped_if_the_samples_are_and_does_not_depend_on_the_batch(mixture):
    images, denoiser = mixture

    def total(D, clip: bool, batch_size: int = 40) -> float:
        config = configs.from_dict({"sampler": {"clip": clip}}, "x", "x")
        return evaluate.bound_bits(D, config, make_chain("linear", 30), images, None, batch_size, World())["total"]

    def far(*args):
        return 4 * denoiser(*args)

    assert total(far, clip=True) == pytest.approx(total(lambda *args: far(*args).clamp(-1, 1), clip=False))
    assert total(far, clip=True) < total(far, clip=False)
    assert total(far, clip=True) == pytest.approx(total(far, clip=True, batch_size=7))


def test_the_odes_noise_levels_are_the_samplers():
    denoiser = PreconditionedDenoiser(nn.Identity(), EDMPreconditioning())
    levels = evaluate.ode_levels(denoiser, configs.Config(), 10)
    torch.testing.assert_close(levels, torch.logspace(math.log10(0.002), math.log10(80), 11, dtype=torch.float64))
    config = configs.from_dict({"sampler": {"sigma_min": 0.1, "sigma_max": 500}}, "edm", "here")
    assert evaluate.ode_levels(denoiser, config, 10)[[0, -1]].tolist() == pytest.approx([0.1, 500])
    known = PreconditionedDenoiser(nn.Identity(), iDDPMPreconditioning())
    assert set(evaluate.ode_levels(known, configs.Config(), 100).tolist()) <= set(iddpm_levels().tolist())
    with pytest.raises(UserError, match=r"the network does not know two noise levels from 90 to 80"):
        evaluate.ode_levels(denoiser, configs.from_dict({"sampler": {"sigma_min": 90}}, "edm", "here"), 10)


# The sweep


def test_a_sweep_is_drawn_and_counts_the_networks_evaluations(path, script, tmp_path, monkeypatch, capsys):
    """Twice as many with guidance; what a sampler cannot do is left out."""
    HEUN, churn = evaluate.HEUN, ["sampler.S_churn=4"]
    samplers = {"ancestral": ([2, 31], ["sampler.solver=ancestral"]), "heun": ([3, 18], HEUN), "churn": ([18], [*HEUN, *churn])}
    monkeypatch.setattr(evaluate, "SAMPLERS", samplers)
    monkeypatch.setattr(evaluate, "CHURN", [0, 4])
    for guidance in (1, 2):
        arguments = ["--num_samples", "4", "--sweep", "--batch_size", "3", "--json", "x.json", f"sampler.guidance={guidance}"]
        monkeypatch.setattr(sys, "argv", ["evaluate", "--checkpoint", str(path), *arguments])
        evaluate.main()
        assert "ancestral at 31 steps is left out: sampler: the chain has 30 timesteps" in capsys.readouterr().out
        figures = json.loads((tmp_path / "x.json").read_text())["sweep"]
        counts = {name: [evaluations for evaluations, _ in curve] for name, curve in figures["samplers"].items()}
        assert counts == {"ancestral": [2 * guidance], "heun": [5 * guidance, 35 * guidance], "churn": [35 * guidance]}
        assert figures["churn"] == [[0, figures["samplers"]["heun"][-1][1]], [4, figures["samplers"]["churn"][-1][1]]]
        assert figures["churn"][0][1] != figures["churn"][1][1]
        assert figures["floor"] > 0
    assert (tmp_path / "output/image/image_folder/evaluate/tiny/sweep.png").stat().st_size > 10_000


def test_the_sweeps_samplers_fit_each_other():
    """The solvers' points lie at about the same numbers of evaluations; S_churn below the point where gamma is limited."""
    counts = {name: steps for name, (steps, _) in evaluate.SAMPLERS.items()}
    assert counts["euler"] == [2 * steps - 1 for steps in counts["heun"]]
    for name, (_, overrides) in evaluate.SAMPLERS.items():
        sampler = configs.from_dict({}, "x", "x", overrides).sampler
        assert sampler.solver == name.partition(",")[0]
        assert sampler.S_churn == (4 if name.endswith("S_churn 4") else 0)
    assert max(evaluate.CHURN) / evaluate.HEUN_STEPS[-1] < math.sqrt(2) - 1
