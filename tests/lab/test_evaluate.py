"""`python -m lab.evaluate`: its table and figures, bits per dimension, the sweep, and what it refuses."""

import json
import math
import shutil

import pytest
import torch
from torch import nn

from edm.ddpm import make_chain
from edm.precond import EDMPreconditioning, PreconditionedDenoiser, iDDPMPreconditioning
from edm.schedule import iddpm_levels, ve_steps
from lab import bits, evaluate
from lab import config as configs
from lab.bits import dequantize
from lab.cli import UserError
from lab.data import to_uint8
from lab.distributed import World
from lab.generate import generate, load_denoiser
from lab.metrics import Classifier, Comparison
from lab.seeds import ImageNoise

CPU = torch.device("cpu")
IDDPM = ["preconditioning.formulation=improved_ddpm", "loss.noise_distribution=importance", "loss.objective=hybrid"]
IDDPM += ["loss.weighting=iddpm", "chain.num_timesteps=30", "chain.betas=cosine", "network.architecture=adm"]
IDDPM += ["sampler.solver=ancestral", "sampler.sampling_steps=5", "sampler.clip=true", "sampler.variance=learned_range"]


@pytest.fixture
def path(train, tiny_grey):
    """The checkpoint of Improved DDPM after one step."""
    return train(tiny_grey, *IDDPM, "training.num_training_steps=1") / "diffusion-1.pt"


@pytest.fixture
def run(script, tmp_path, monkeypatch):
    """run(checkpoint, *arguments) -> what it prints, and the figures it writes. Classifiers are trained for 5 steps."""
    monkeypatch.setattr("lab.metrics.MIN_STEPS", 5)

    def call(path, *arguments) -> tuple[str, dict]:
        code, out, err = script("lab/evaluate.py", "--checkpoint", path, "--json", "figures.json", *arguments)
        assert code == 0, err
        return out, json.loads((tmp_path / "figures.json").read_text())

    return call


def test_a_checkpoint_is_evaluated(path, run, start, tmp_path):
    """Samples beside real images, bits by ODE and bound, by two processes as by one. The classifier is trained once."""
    few = ("--num_samples", 8, "--num_images", 5)
    out, one = run(path, *few, "--batch_size", 2, "--ode_steps", 3)
    for text in ("8 samples", "Frechet distance", "precision", "recall", "share of class 1", "in 3 steps", "reconstruction"):
        assert text in out
    bound, ode = one["bits_per_dimension"]["bound"], one["bits_per_dimension"]["ode"]
    assert len(bound["terms"]) == 30
    assert (ode["images"], ode["steps"], one["step"], one["against"]) == (5, 3, 1, "one half of the images")
    assert (one["samples"]["images"], one["floor"]["images"]) == (8, 7)  # the other half of 13
    assert sum(one["samples"]["class_shares"]) == pytest.approx(1)
    before = [(file, file.read_bytes()) for file in (tmp_path / "output/classifier").glob("*.pt")]
    assert len(before) == 1

    process = start("lab/evaluate.py", "--checkpoint", path, *few, "--ode_steps", 3, "--json", "two.json", torchrun=2)
    options = ("--timesteps", 6, "sampler.variance=fixed_large", "--against", "train")
    _, again = run(path, *few, "--batch_size", 5, *options)
    assert len(again["bits_per_dimension"]["bound"]["terms"]) == again["floor"]["images"] == 6

    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert out.count("warning: distances of 8 samples differ by chance; compare 500 or more") == 1
    two = json.loads((tmp_path / "two.json").read_text())
    for part in ("samples", "floor"):
        for figure in one[part]:
            assert two[part][figure] == pytest.approx(one[part][figure], rel=0.02), figure  # a pixel may be a grey level away
    totals = [[figures["bits_per_dimension"][part]["total"] for part in ("ode", "bound")] for figures in (one, two)]
    assert totals[1] == pytest.approx(totals[0], rel=1e-5)
    assert all(file.read_bytes() == content for file, content in before)


def watch(monkeypatch, cls: type[nn.Module], action) -> None:
    """Call action(x) before each evaluation of a network of this class."""
    forward = cls.forward
    monkeypatch.setattr(cls, "forward", lambda net, x, *args, **options: (action(x), forward(net, x, *args, **options))[1])


def test_the_network_runs_in_the_precision_asked_for_and_the_classifier_in_float32(path, run, monkeypatch):
    seen = {PreconditionedDenoiser: set(), Classifier: set()}
    for cls, precisions in seen.items():
        watch(monkeypatch, cls, lambda x, found=precisions: found.add((torch.ones(1, 1) @ torch.ones(1, 1)).dtype))
    few, found = ("--num_samples", 8, "--num_images", 3, "--ode_steps", 3), {}
    for name, option in (("float32", "no"), ("float16", "fp16")):
        _, found[name] = run(path, *few, "--mixed_precision", option)
        assert found[name]["network_precision"] == name
        assert [precisions.pop() for precisions in seen.values()] == [getattr(torch, name), torch.float32]
        assert not any(seen.values())
    single, half = found.values()
    assert single["floor"] == half["floor"]
    for part in ("ode", "bound"):
        totals = [figures["bits_per_dimension"][part]["total"] for figures in (single, half)]
        assert totals[1] == pytest.approx(totals[0], rel=0.01)
        assert totals[1] != totals[0]
    _, bf16 = run(path, *few, "--mixed_precision", "bf16")
    assert bf16["bits_per_dimension"] == single["bits_per_dimension"]  # in float32


def test_batches_that_do_not_fit_into_memory_are_computed_in_parts(path, run, script, monkeypatch):
    """With the same figures. The denoiser sees 2 images at most and the classifier 3; then the denoiser does not fit at all."""
    few = ("--num_samples", 7, "--num_images", 5, "--ode_steps", 3)
    _, whole = run(path, *few)
    fits, sizes = {PreconditionedDenoiser: 2, Classifier: 3}, {PreconditionedDenoiser: [], Classifier: []}

    def at_most(cls: type[nn.Module], x: torch.Tensor) -> None:
        sizes[cls].append(len(x))
        if len(x) > fits[cls]:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    for cls in fits:
        watch(monkeypatch, cls, lambda x, cls=cls: at_most(cls, x))
    _, parts = run(path, *few)
    assert {7, 5, 2, 1} <= set(sizes[PreconditionedDenoiser])
    assert {7, 6, 3} <= set(sizes[Classifier])
    for part in ("samples", "floor"):
        for figure in whole[part]:
            assert parts[part][figure] == pytest.approx(whole[part][figure], rel=0.02, abs=1e-6), figure
    totals = [[figures["bits_per_dimension"][part]["total"] for part in ("ode", "bound")] for figures in (whole, parts)]
    assert totals[1] == pytest.approx(totals[0], rel=1e-5)
    fits[PreconditionedDenoiser] = 0
    code, _, err = script("lab/evaluate.py", "--checkpoint", path, *few)
    assert code == 2
    assert "error: out of memory: lower --batch_size (now 100), or choose fp16 or bf16 for --mixed_precision" in err


@pytest.mark.parametrize(("label_dim", "count"), [(2, 500), (3, 499)])
def test_what_is_said_only_sometimes(label_dim, count, train, tiny_grey, run):
    """A warning about fewer than 500 samples; the share of the right class, if the data have all classes of the network."""
    path = train(tiny_grey, f"network.label_dim={label_dim}", "training.num_training_steps=1") / "diffusion-1.pt"
    fast = ("--num_images", 0, "--batch_size", 500, "sampler.sampling_steps=1")
    out, figures = run(path, "--num_samples", count, *fast)
    assert figures["samples"]["images"] == count
    assert ("warning" in out) == (count < 500)
    assert ("right_class" in figures["samples"]) == ("of the right class" in out) == (label_dim == 2)


REFUSED = {
    "--num_samples 3": "--num_samples: a comparison takes 4 or more samples",
    "--sweep --num_samples 0": "--num_samples: a comparison takes 4 or more samples",
    "--sweep --num_images 3": "--sweep computes no bits per dimension",
    "--num_samples 0 --num_images 0": "leaves nothing to evaluate",
    "--num_samples 0 --num_images 14": "--num_images: there are 6 images",
    "--num_samples 0 --timesteps 31": "the bound: sampler: the chain has 30 timesteps, too few for 31 steps",
    "--data_root nowhere": "data.root: 'nowhere' is not a folder",
    "chain.num_timesteps=31": "chain.num_timesteps=30, which cannot be changed",
    "--config_path grey/tiny.yaml": "which cannot be changed",
    "sampler.sampling_steps=31": "sampler: the chain has 30 timesteps, too few for 31 steps",
    "--json grey/tiny.yaml/x.json": "cannot write grey/tiny.yaml/x.json",
    "--json output": "cannot write output: it is not a regular file",
}


def test_what_cannot_be_evaluated_is_one_line(path, script):
    for arguments, message in REFUSED.items():
        code, out, err = script("lab/evaluate.py", "--checkpoint", path, *arguments.split())
        assert (code, out) == (2, ""), arguments
        assert message in err.rpartition("\r")[2]
        assert err.count("\n") == 1


def test_a_network_that_knows_other_noise_levels_has_no_bound(trained, run, script):
    arguments = ("preconditioning.formulation=ve", "--num_samples", 0)
    out, figures = run(trained, *arguments, "--num_images", 3, "--ode_steps", 3)
    assert figures["bits_per_dimension"].keys() == {"network_precision", "ode"}
    assert "by the bound" not in out
    code, _, err = script("lab/evaluate.py", "--checkpoint", trained, *arguments, "--timesteps", 3)
    assert code == 2
    assert "error: the bound: sampler: the formulation ve does not know the noise levels of the chain" in err


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
    uniform, drawn = torch.special.ndtr(ImageNoise(range(40), (1, 4, 4), CPU, torch.float64)()), []
    monkeypatch.setattr(bits, "dequantize", lambda images, uniform: (drawn.append(uniform), dequantize(images, uniform))[1])
    x = dequantize(images, uniform)
    density = sum(torch.exp(-((x - mean) ** 2) / 0.08) for mean in (-0.5, 0.5)) / 2 / math.sqrt(2 * math.pi * 0.04)
    exact = -(density / 127.5).log2().mean(dim=(1, 2, 3))
    levels = ve_steps(257, 0.002, 80)[:-1].flip(0)
    for batch_size, labels in ((7, None), (40, torch.eye(2).repeat(20, 1))):
        found = bits.ode_bits(denoiser, levels, images, labels, CPU, batch_size, torch.float32, World())
        assert found["total"] == pytest.approx(exact.mean().item(), abs=2e-3)
        assert found["standard_error"] == pytest.approx(exact.std().item() / math.sqrt(40), rel=1e-2)
        torch.testing.assert_close(torch.cat(drawn), uniform)  # an image's noise depends on its number, not on its batch
        drawn.clear()


def test_the_bound_is_a_little_above_the_bits_of_the_mixture(mixture):
    """Which are -log2 of the probability of each pixel's grey level. It is clipped if samples are."""
    images, denoiser = mixture
    edges = [(images.double() + side) / 127.5 - 1 for side in (-0.5, 0.5)]
    low, high = (sum(torch.special.ndtr((edge - mean) / 0.2) for mean in (-0.5, 0.5)) / 2 for edge in edges)
    exact = -(high - low).log2().mean().item()

    def bound(D, chain, batch_size=40, **sampler) -> dict:
        config = configs.from_dict({"sampler": sampler}, "x", "x")
        return bits.bound_bits(D, config, chain, images, None, CPU, batch_size, torch.float32, World())

    long, short = make_chain("cosine", 1000), make_chain("linear", 30)
    found = bound(denoiser, long, variance="fixed_large")
    assert exact < found["total"] < exact + 0.1
    assert found["total"] == pytest.approx(found["prior"] + sum(found["terms"]))
    assert bound(denoiser, long)["total"] > found["total"] + 0.3

    def far(*args):
        return 4 * denoiser(*args)

    clipped = bound(far, short, clip=True)["total"]
    assert clipped == pytest.approx(bound(lambda *args: far(*args).clamp(-1, 1), short)["total"])
    assert clipped == pytest.approx(bound(far, short, batch_size=7, clip=True)["total"])
    assert clipped < bound(far, short)["total"]


def test_the_odes_noise_levels_are_the_samplers():
    def levels(preconditioning, steps: int, **sampler) -> torch.Tensor:
        config = configs.from_dict({"sampler": sampler}, "x", "x")
        return bits.ode_levels(PreconditionedDenoiser(nn.Identity(), preconditioning), config, steps)

    edm = EDMPreconditioning()
    torch.testing.assert_close(levels(edm, 10), torch.logspace(math.log10(0.002), math.log10(80), 11, dtype=torch.float64))
    assert levels(edm, 10, sigma_min=0.1, sigma_max=500)[[0, -1]].tolist() == pytest.approx([0.1, 500])
    assert set(levels(iDDPMPreconditioning(), 100).tolist()) <= set(iddpm_levels().tolist())
    with pytest.raises(UserError, match=r"the network does not know two noise levels from 90 to 80"):
        levels(edm, 10, sigma_min=90)


def test_a_sweep_is_drawn_and_counts_the_networks_evaluations(path, run, tmp_path, monkeypatch):
    """Twice as many with guidance, by the network itself or another; what a sampler cannot do is left out."""
    heun, churned = evaluate.HEUN, [*evaluate.HEUN, "sampler.S_churn=4"]
    samplers = {"ancestral": ([2, 31], ["sampler.solver=ancestral"]), "heun": ([3, 20], heun), "churn": ([20], churned)}
    monkeypatch.setattr(evaluate, "SAMPLERS", samplers)
    monkeypatch.setattr(evaluate, "CHURN", [0, 4])
    monkeypatch.setattr("runpy.run_path", lambda *args, **options: evaluate.main())  # it would read the samplers anew
    other = shutil.copy(path, tmp_path / "other.pt")
    for guidance, guide in ((1, "null"), (2, "null"), (2, other)):
        options = (f"sampler.guidance={guidance}", f"sampler.guide={guide}")
        out, figures = run(path, "--num_samples", 4, "--sweep", "--batch_size", 3, *options)
        assert "ancestral at 31 steps is left out: sampler: the chain has 30 timesteps" in out
        found = figures["sweep"]["samplers"]
        counts = {name: [evaluations for evaluations, *_ in curve] for name, curve in found.items()}
        assert counts == {"ancestral": [2 * guidance], "heun": [5 * guidance, 39 * guidance], "churn": [39 * guidance]}
        assert figures["sweep"]["churn"] == [[0, *found["heun"][-1][1:]], [4, *found["churn"][-1][1:]]]
        assert found["heun"][-1][1] != found["churn"][-1][1]
        assert figures["sweep"]["floor"] > 0
    assert (tmp_path / "output/image/image_folder/evaluate/tiny/sweep.png").stat().st_size > 10_000


def test_a_point_of_the_sweep_is_the_mean_of_three_sets_of_seeds(path, run, monkeypatch):
    ddim = ["sampler.solver=ddim", "sampler.sampling_steps=2"]
    monkeypatch.setattr(evaluate, "SAMPLERS", {"ddim": ([2], ddim[:1])})
    monkeypatch.setattr(evaluate, "CHURN", [0])
    monkeypatch.setattr("runpy.run_path", lambda *args, **options: evaluate.main())
    seen = []
    monkeypatch.setattr(Comparison, "frechet_distance", lambda _, images: seen.append(images) or 2.0 ** len(seen))
    _, figures = run(path, "--num_samples", 4, "--sweep")
    assert figures["sweep"]["samplers"]["ddim"] == [[2, pytest.approx(14 / 3), pytest.approx((28 / 3) ** 0.5)]]  # 2, 4, 8
    config, denoiser, _ = load_denoiser(path, None, ddim, CPU)
    assert torch.equal(torch.cat(seen[:3]), torch.cat(list(generate(denoiser, list(range(12)), config, CPU, 12))))


def test_two_processes_sweep_as_one(path, run, start, tmp_path):
    few = ("--sweep", "--num_samples", 4)
    _, one = run(path, *few)
    process = start("lab/evaluate.py", "--checkpoint", path, *few, "--json", "two.json", torchrun=2)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    two = json.loads((tmp_path / "two.json").read_text())["sweep"]
    assert two["samplers"].keys() == evaluate.SAMPLERS.keys() and two["floor"] == one["sweep"]["floor"]
    for name, curve in one["sweep"]["samplers"].items():
        assert two["samplers"][name] == [pytest.approx(point, rel=0.02, abs=0.01) for point in curve]


def test_figures_that_are_not_finite_are_null(path, run, monkeypatch):
    """JSON has no nan."""
    monkeypatch.setattr("lab.metrics.frechet_distance", lambda *args: math.nan)
    _, figures = run(path, "--num_samples", 8, "--num_images", 0)
    assert figures["samples"]["frechet_distance"] is None
