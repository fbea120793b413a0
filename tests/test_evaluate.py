"""How good a checkpoint is: the command, the bits over a data set, the sweep, and what is refused."""

import json
import math
import sys

import pytest
import torch
import yaml
from conftest import ROOT, write_config
from test_distributed import torchrun
from test_lessons import IDDPM
from test_training import CPU
from torch.nn.functional import one_hot

from edm import checkpoint, evaluate
from edm import config as configs
from edm.bits import ode_levels
from edm.data import to_model_range
from edm.ddpm import make_chain, variational_bound
from edm.generate import build_denoiser
from edm.judge import real_images
from edm.likelihood import dequantize, log_density
from edm.precond import Denoiser, EDMPreconditioning, iDDPMPreconditioning
from edm.randomness import ImageNoise
from edm.sampler import clipped
from edm.schedule import iddpm_levels, ve_steps
from edm.sweep import HEUN
from edm.training import train


@pytest.fixture
def grey(tmp_path, image_folder, monkeypatch):
    """The tiny run's config, for what does not depend on the channels, and a classifier that is trained for 5 steps."""
    monkeypatch.setattr("edm.metrics.MIN_STEPS", 5)
    return write_config(tmp_path, image_folder, channels=1)


def call_evaluate(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, arguments)])
    code = 0
    try:
        evaluate.run(evaluate.main)
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def test_a_checkpoint_is_evaluated(grey, tmp_path, script, monkeypatch, capsys):
    """Samples beside real images, bits by the ODE and by the bound; the classifier is kept, and the terms make up the bound."""
    train(configs.load(grey, [*IDDPM, "training.num_training_steps=1"]), CPU, tmp_path / "output")
    path = tmp_path / "output/image/image_folder/tiny/diffusion-1.pt"
    few = ("--checkpoint", path, "--num_samples", 8, "--num_images", 5, "--device", "cpu", "--json", "figures.json")
    code, out, err = call_evaluate(monkeypatch, capsys, *few, "--batch_size", 2, "--ode_steps", 3)
    assert code == 0, err
    for text in (
        "8 samples",
        "Frechet distance",
        "precision",
        "recall",
        "share of class 1",
        "by the ODE in 3 steps",
        "reconstruction",
    ):
        assert text in out
    figures = json.loads((tmp_path / "figures.json").read_text())
    bound, ode = figures["bits_per_dimension"]["bound"], figures["bits_per_dimension"]["ode"]
    assert len(bound["terms"]) == 30
    assert sum(bound["terms"]) + bound["prior"] == pytest.approx(bound["total"])
    assert (ode["images"], ode["steps"]) == (5, 3)
    assert figures["samples"]["images"] == 8
    assert figures["floor"]["images"] == 7  # the other half of 13
    assert sum(figures["samples"]["class_shares"]) == pytest.approx(1)
    before = [(file, file.read_bytes()) for file in (tmp_path / "output/classifier").glob("*.pt")]
    assert len(before) == 1
    code, out, err = call_evaluate(
        monkeypatch, capsys, *few, "--batch_size", 5, "--timesteps", 6, "sampler.variance=fixed_large", "--against", "train"
    )
    assert code == 0, err
    again = json.loads((tmp_path / "figures.json").read_text())
    assert len(again["bits_per_dimension"]["bound"]["terms"]) == 6
    assert again["floor"]["images"] == 6
    assert all(file.read_bytes() == content for file, content in before)


def test_training_brings_the_samples_nearer_to_the_data(tmp_path, script, monkeypatch, capsys):
    """An untrained network is far from the digits, a briefly trained one nearer, and real digits nearest: by every figure."""
    overrides = ["data.resolution=8", "network.model_channels=8", "network.channel_mult=[1, 2]", "network.attn_resolutions=[4]"]
    overrides += ["sampler.num_samples=4", "sampler.sampling_steps=6", "training.lr_rampup_images=100"]
    found = {}
    for steps in (1, 180):
        config = configs.load(ROOT / "configs/quickstart.yaml", [*overrides, f"training.num_training_steps={steps}"])
        train(config, CPU, tmp_path / "output", overwrite=True)
        path = tmp_path / f"output/image/digits/quickstart/diffusion-{steps}.pt"
        arguments = ("--num_samples", 150, "--num_images", 10, "--ode_steps", 12, "--json", "x.json")
        code, _, err = call_evaluate(monkeypatch, capsys, "--checkpoint", path, *arguments)
        assert code == 0, err
        found[steps] = json.loads((tmp_path / "x.json").read_text())
    untrained, trained, floor = found[1]["samples"], found[180]["samples"], found[180]["floor"]
    assert untrained["frechet_distance"] > 3 * trained["frechet_distance"]
    assert trained["frechet_distance"] > 1.5 * floor["frechet_distance"]
    for figure in ("precision", "right_class"):
        assert 2 * untrained[figure] < trained[figure] < 0.7 * floor[figure]
    assert trained["class_distance"] < 0.6 * untrained["class_distance"]
    bits = [found[steps]["bits_per_dimension"]["ode"]["total"] for steps in (1, 180)]
    assert bits[0] > bits[1] + 1


def test_a_class_that_the_data_lack_is_never_right(grey, tmp_path, script, monkeypatch, capsys):
    """So nothing is said of the classes asked for, if the network knows more than the data have."""
    for label_dim in (2, 3):
        config = configs.load(grey, [f"network.label_dim={label_dim}", "training.num_training_steps=1"])
        train(config, CPU, tmp_path / "output", overwrite=True)
        path = tmp_path / "output/image/image_folder/tiny/diffusion-1.pt"
        arguments = ("--num_samples", 4, "--num_images", 0, "--json", "x.json")
        assert call_evaluate(monkeypatch, capsys, "--checkpoint", path, *arguments)[0] == 0
        assert ("right_class" in json.loads((tmp_path / "x.json").read_text())["samples"]) == (label_dim == 2)


def test_the_odes_noise_levels_are_the_samplers():
    config = configs.Config()
    denoiser = Denoiser(torch.nn.Identity(), EDMPreconditioning())
    levels = ode_levels(denoiser, config, 10)
    torch.testing.assert_close(levels, torch.logspace(math.log10(0.002), math.log10(80), 11, dtype=torch.float64))
    config = configs.from_dict({"sampler": {"sigma_min": 0.1, "sigma_max": 500}}, "edm", "here")
    assert ode_levels(denoiser, config, 10)[[0, -1]].tolist() == pytest.approx([0.1, 500])
    known = Denoiser(torch.nn.Identity(), iDDPMPreconditioning(M=20))
    assert set(ode_levels(known, configs.Config(), 100).tolist()) <= set(iddpm_levels(M=20).tolist())


def test_a_sweep_is_drawn(grey, tmp_path, script, monkeypatch, capsys):
    train(configs.load(grey, [*IDDPM, "training.num_training_steps=1"]), CPU, tmp_path / "output")
    path = tmp_path / "output/image/image_folder/tiny/diffusion-1.pt"
    sweep = ("--checkpoint", path, "--num_samples", 8, "--sweep", "--device", "cpu", "--json", "figures.json")
    code, _, err = call_evaluate(monkeypatch, capsys, *sweep)
    assert code == 0, err
    assert (tmp_path / "output/image/image_folder/evaluate/tiny/sweep.png").exists()
    found = json.loads((tmp_path / "figures.json").read_text())["sweep"]
    assert found["samplers"].keys() == {"ancestral", "ddim", "euler", "heun", "heun, S_churn 4"}
    assert [S_churn for S_churn, _ in found["churn"]] == [0, 1, 2, 4, 7]
    assert found["churn"][0][1] == found["samplers"]["heun"][-1][1]
    assert found["churn"][3][1] == found["samplers"]["heun, S_churn 4"][-1][1]
    assert len({distance for _, distance in found["churn"]}) > 2  # some churn is rounded to none, or to the next, by 30 levels


@pytest.mark.parametrize(("clip", "label_dim"), [("true", 2), ("false", 2), ("true", 0)])
def test_the_bits_are_those_of_the_first_images_held_back(tmp_path, image_folder, script, monkeypatch, capsys, clip, label_dim):
    """With their labels; noise belongs to an image's number. The bound is clipped if samples are, the ODE is not."""
    path = write_config(tmp_path, image_folder, channels=3)
    options = [*IDDPM, f"sampler.clip={clip}", f"network.label_dim={label_dim}", "loss.label_dropout=0"]
    config = configs.load(path, [*options, "training.num_training_steps=5", "training.learning_rate=0.01"])
    train(config, CPU, tmp_path / "output")
    path = tmp_path / "output/image/image_folder/tiny/diffusion-5.pt"
    arguments = ("--num_samples", 0, "--num_images", 5, "--ode_steps", 4, "--batch_size", 4, "--json", "x.json")
    assert call_evaluate(monkeypatch, capsys, "--checkpoint", path, *arguments)[0] == 0
    found = json.loads((tmp_path / "x.json").read_text())["bits_per_dimension"]
    _, (images, labels) = real_images(config, CPU)
    images, labels = images[:5], one_hot(labels[:5], 2) if label_dim else None
    y, denoiser = to_model_range(images).double(), build_denoiser(config, checkpoint.read(path)["ema"]).eval()
    noise, chain = ImageNoise(range(5), (3, 8, 8), CPU, torch.float64), make_chain("cosine", 30)
    with torch.no_grad():
        terms = variational_bound(clipped(denoiser) if clip == "true" else denoiser, y, chain, noise, "learned_range", labels)
        bound = sum(terms) + chain.prior_term(y)
    noise = ImageNoise(range(5), (3, 8, 8), CPU, torch.float64)
    x, levels = dequantize(images, torch.special.ndtr(noise())), denoiser.preconditioning
    sigma_steps = ve_steps(5, max(levels.sigma_min, 0.002), min(levels.sigma_max, 80))[:-1].flip(0)
    *_, log = log_density(denoiser, x, levels.round_sigma(sigma_steps), noise, labels)
    for name, bits in (("bound", bound), ("ode", -log.detach() / math.log(2) / 192 + math.log2(127.5))):
        assert found[name]["total"] == pytest.approx(bits.mean().item(), rel=1e-5), name
        assert found[name]["standard_error"] == pytest.approx(bits.std().item() / math.sqrt(5), rel=1e-3), name


def test_the_sweep_counts_the_networks_evaluations(grey, tmp_path, script, monkeypatch, capsys):
    """Twice as many with guidance; what a sampler cannot do is left out."""
    train(configs.load(grey, [*IDDPM, "training.num_training_steps=1"]), CPU, tmp_path / "output")
    path = tmp_path / "output/image/image_folder/tiny/diffusion-1.pt"
    monkeypatch.setattr("edm.sweep.SAMPLERS", {"ancestral": ([2, 31], ["sampler.solver=ancestral"]), "heun": ([3], HEUN)})
    monkeypatch.setattr("edm.sweep.CHURN", [])
    for guidance, factor in ((1, 1), (2, 2)):
        arguments = ("--checkpoint", path, "--sweep", "--num_samples", 5, "--batch_size", 2, "--json", "x.json")
        code, out, err = call_evaluate(monkeypatch, capsys, *arguments, f"sampler.guidance={guidance}")
        assert code == 0, err
        assert "ancestral at 31 steps is left out" in out
        sweep = json.loads((tmp_path / "x.json").read_text())["sweep"]
        assert [evaluations for evaluations, _ in sweep["samplers"]["ancestral"]] == [2 * factor]
        assert [evaluations for evaluations, _ in sweep["samplers"]["heun"]] == [5 * factor]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_samples", 3], "--num_samples: a comparison takes 4 or more samples"),
        (["--sweep", "--num_samples", 0], "--num_samples: a comparison takes 4 or more samples"),
        (["--sweep", "--num_images", 3], "--sweep asks for no bits per dimension"),
        (["--num_samples", 0, "--timesteps", 31], "the bound: the chain has 30 timesteps, too few for 31 steps"),
        (["chain.num_timesteps=31"], "chain.num_timesteps=30, which cannot be replaced"),
        (["--num_samples", 0, "--num_images", 0], "leaves nothing to evaluate"),
        (["--json", "tiny.yaml/x.json"], "--json: cannot write tiny.yaml/x.json: "),
        (["--json", "output"], "--json: cannot write output: it is a folder"),
        (["sampler.solvr=ddim"], "unknown key; did you mean 'sampler.solver'"),
    ],
)
def test_what_cannot_be_evaluated(grey, tmp_path, script, monkeypatch, capsys, arguments, message):
    train(configs.load(grey, [*IDDPM, "training.num_training_steps=1"]), CPU, tmp_path / "output")
    path = tmp_path / "output/image/image_folder/tiny/diffusion-1.pt"
    capsys.readouterr()
    code, _, err = call_evaluate(monkeypatch, capsys, "--checkpoint", path, *arguments)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


def test_a_chains_network_is_not_taken_for_one_of_another_chain(grey, tmp_path, script):
    train(configs.load(grey, [*IDDPM, "training.num_training_steps=1"]), CPU, tmp_path / "output")
    path, other = tmp_path / "output/image/image_folder/tiny/diffusion-1.pt", tmp_path / "other.yaml"
    for old, new in (("cosine", "linear"), ("improved_ddpm", "iddpm")):
        text = yaml.safe_dump(configs.load(grey, [*IDDPM, "sampler.solver=heun", "loss.objective=denoising"]).to_dict())
        other.write_text(text.replace(old, new).replace("learned_range", "fixed_small"))
        code, _, err = script("sample.py", "--checkpoint", path, "--config_path", other)
        assert code == 2
        assert "was trained with preconditioning.formulation=improved_ddpm chain.schedule=cosine chain.num_timesteps=30" in err


def test_the_bound_does_not_depend_on_the_batch(grey, tmp_path, script, monkeypatch, capsys):
    train(configs.load(grey, [*IDDPM, "training.num_training_steps=1"]), CPU, tmp_path / "output")
    path, totals = tmp_path / "output/image/image_folder/tiny/diffusion-1.pt", []
    for batch_size in (1, 5):
        arguments = (
            "--checkpoint",
            path,
            "--num_samples",
            0,
            "--num_images",
            5,
            "--batch_size",
            batch_size,
            "--json",
            "x.json",
        )
        assert call_evaluate(monkeypatch, capsys, *arguments)[0] == 0
        totals.append(json.loads((tmp_path / "x.json").read_text())["bits_per_dimension"]["ode"]["total"])
    assert totals[0] == pytest.approx(totals[1], rel=1e-5)
    code, _, err = call_evaluate(monkeypatch, capsys, "--checkpoint", path, "--num_samples", 0, "--num_images", 14)
    assert code == 2
    assert err.endswith("\rerror: --num_images: there are 6 images\n")


def test_what_has_no_bound_and_no_judge(grey, tmp_path, script, monkeypatch, capsys):
    train(configs.load(grey, ["preconditioning.formulation=ve", "training.num_training_steps=1"]), CPU, tmp_path / "output")
    path = tmp_path / "output/image/image_folder/tiny/diffusion-1.pt"
    capsys.readouterr()
    few = ("--checkpoint", path, "--num_samples", 4, "--num_images", 3, "--ode_steps", 3)
    code, out, err = call_evaluate(monkeypatch, capsys, *few)
    assert code == 0, err
    assert "by the ODE" in out
    assert "by the bound" not in out
    code, _, err = call_evaluate(monkeypatch, capsys, *few, "--timesteps", 3)
    assert code == 2
    assert err.startswith("error: the bound: the formulation ve knows other noise levels")
    assert err.count("\n") == 1
    for arguments in (["sampler.sigma_min=90"], ["sampler.sigma_min=1", "sampler.sigma_max=1"]):
        code, _, err = call_evaluate(monkeypatch, capsys, *few[:2], "--num_samples", 0, *arguments, "sampler.solver=ancestral")
        assert code == 2
        assert err.count("\n") == 1
    for name in ("dark", "light"):
        for file in (tmp_path / "images" / name).iterdir():
            file.rename(tmp_path / "images" / f"{name}{file.name}")
    code, _, err = call_evaluate(monkeypatch, capsys, "--checkpoint", path)
    assert code == 2
    assert "image_folder has one class" in err


def test_an_evaluation_does_not_depend_on_the_processes(tmp_path, image_folder, monkeypatch, capsys):
    """Samples, floor, the ODE's bits and the bound, of 5 images between two."""
    monkeypatch.chdir(tmp_path)
    config = configs.load(write_config(tmp_path, image_folder, channels=1), [*IDDPM, "training.num_training_steps=1"])
    train(config, CPU, tmp_path / "output")
    arguments = [
        "--checkpoint",
        tmp_path / "output/image/image_folder/tiny" / "diffusion-1.pt",
        "--num_samples",
        6,
        "--num_images",
        5,
        "--ode_steps",
        4,
    ]
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, arguments), "--device", "cpu", "--json", "one.json"])
    evaluate.main()
    process = torchrun(2, tmp_path, "edm.evaluate", *arguments, "--json", "two.json")
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert out.count("Frechet distance") == 1
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    for part in ("samples", "floor"):
        for figure in one[part]:
            assert two[part][figure] == pytest.approx(one[part][figure], rel=0.02), figure  # a pixel may be a grey level away
    for part in ("ode", "bound"):
        assert two["bits_per_dimension"][part]["total"] == pytest.approx(one["bits_per_dimension"][part]["total"], rel=1e-5)
    process = torchrun(2, tmp_path, "edm.evaluate", *arguments[:2], "--num_samples", 0, "--data_root", "nowhere")
    out, err = process.communicate(timeout=240)
    assert process.returncode != 0
    assert err.count("error: ") == err.count("error: data.root: 'nowhere' is not a folder") == 1
