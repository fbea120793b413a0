"""How good a checkpoint is: the distance, its classifier, the bound over a data set, the sweep, and what is refused."""

import json
import sys

import pytest
import torch
import yaml
from conftest import write_config
from test_lessons import IDDPM
from test_training import CPU
from torch.nn.functional import one_hot
from torch.utils.data import TensorDataset

from edm import checkpoint, evaluate
from edm import config as configs
from edm.data import open_dataset, to_model_range, whole
from edm.ddpm import make_chain, variational_bound
from edm.digits import draw_digits
from edm.generate import build_denoiser
from edm.metrics import Classifier, accuracy, frechet_distance, train_classifier
from edm.randomness import ImageNoise
from edm.sampler import clipped
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
    """Distance and bound, on request the picture; the classifier is kept, and the terms make up the bound."""
    train(configs.load(grey, [*IDDPM, "training.num_training_steps=1"]), CPU, tmp_path / "output")
    path = tmp_path / "output/image/image_folder/tiny/diffusion-1.pt"
    few = ("--checkpoint", path, "--num_samples", 8, "--num_images", 5, "--device", "cpu", "--json", "figures.json")
    code, out, err = call_evaluate(monkeypatch, capsys, *few, "--batch_size", 2)
    assert code == 0, err
    assert "Frechet distance of 8 samples" in out and "reconstruction" in out and "timesteps" in out
    figures = json.loads((tmp_path / "figures.json").read_text())
    bits = figures["bits_per_dimension"]
    assert len(bits["terms"]) == 30
    assert sum(bits["terms"]) + bits["prior"] == pytest.approx(bits["total"])
    assert figures["distance"]["frechet_distance"] > 0
    classifier = (tmp_path / "output/classifier").glob("*.pt")
    before = [(file, file.read_bytes()) for file in classifier]
    assert len(before) == 1
    code, out, err = call_evaluate(
        monkeypatch, capsys, *few, "--batch_size", 5, "--timesteps", 6, "sampler.variance=fixed_large"
    )
    assert code == 0, err
    assert len(json.loads((tmp_path / "figures.json").read_text())["bits_per_dimension"]["terms"]) == 6
    assert all(file.read_bytes() == content for file, content in before)
    sweep = ("--checkpoint", path, "--num_samples", 8, "--sweep", "--device", "cpu", "--json", "figures.json")
    code, out, err = call_evaluate(monkeypatch, capsys, *sweep)
    assert code == 0, err
    assert (tmp_path / "output/image/image_folder/evaluate/tiny/sweep.png").exists()
    assert json.loads((tmp_path / "figures.json").read_text())["sweep"].keys() == {"ancestral", "ddim", "heun", "floor"}


@pytest.mark.parametrize(("clip", "label_dim"), [("true", 2), ("false", 2), ("true", 0)])
def test_the_bound_is_that_of_the_first_test_images(tmp_path, image_folder, script, monkeypatch, capsys, clip, label_dim):
    """With their labels, and clipped if samples are; noise belongs to an image's number."""
    path = write_config(tmp_path, image_folder, channels=3)
    options = [*IDDPM, f"sampler.clip={clip}", f"network.label_dim={label_dim}", "loss.label_dropout=0"]
    config = configs.load(path, [*options, "training.num_training_steps=5", "training.learning_rate=0.01"])
    train(config, CPU, tmp_path / "output")
    path = tmp_path / "output/image/image_folder/tiny/diffusion-5.pt"
    arguments = ("--checkpoint", path, "--num_samples", 0, "--num_images", 9, "--batch_size", 4, "--json", "x.json")
    assert call_evaluate(monkeypatch, capsys, *arguments)[0] == 0
    found = json.loads((tmp_path / "x.json").read_text())["bits_per_dimension"]
    images, labels = whole(open_dataset("image_folder", str(image_folder), 8, 3, label_dim))
    y, labels = to_model_range(images[:9]).double(), one_hot(labels[:9], 2) if label_dim else None
    denoiser = build_denoiser(config, checkpoint.read(path)["ema"]).eval()
    noise = ImageNoise(range(9), (3, 8, 8), CPU, torch.float64)
    chain = make_chain("cosine", 30)
    with torch.no_grad():
        terms = variational_bound(clipped(denoiser) if clip == "true" else denoiser, y, chain, noise, "learned_range", labels)
        total = sum(terms) + chain.prior_term(y)
    assert found["total"] == pytest.approx(total.mean().item(), rel=1e-5)
    assert found["standard_error"] == pytest.approx(total.std().item() / 3, rel=1e-4)


def test_the_sweep_counts_the_networks_evaluations(grey, tmp_path, script, monkeypatch, capsys):
    """Twice as many with guidance; what a sampler cannot do is left out."""
    train(configs.load(grey, [*IDDPM, "training.num_training_steps=1"]), CPU, tmp_path / "output")
    path = tmp_path / "output/image/image_folder/tiny/diffusion-1.pt"
    monkeypatch.setattr("edm.evaluate.SWEEP", {"ancestral": ([2, 31], []), "heun": ([3], ["sampler.discretization=edm"])})
    for guidance, factor in ((1, 1), (2, 2)):
        arguments = ("--checkpoint", path, "--sweep", "--num_samples", 5, "--batch_size", 2, "--json", "x.json")
        code, out, err = call_evaluate(monkeypatch, capsys, *arguments, f"sampler.guidance={guidance}")
        assert code == 0, err
        assert "ancestral at 31 steps is left out" in out
        sweep = json.loads((tmp_path / "x.json").read_text())["sweep"]
        assert [evaluations for evaluations, _ in sweep["ancestral"]] == [2 * factor]
        assert [evaluations for evaluations, _ in sweep["heun"]] == [5 * factor]


def test_the_classifier_learns_the_digits_and_its_distance_tells_noise_from_them():
    images, labels = draw_digits(16, num_images=1500)
    net = train_classifier(images[:1000], labels[:1000])
    assert accuracy(net, images[1000:], labels[1000:]) > 0.9
    digits, noisy = images[:500], (images[:500] + 150 * torch.rand(500, 1, 16, 16)).clamp(max=255).byte()
    assert frechet_distance(net, digits, digits) == pytest.approx(0, abs=1e-3)
    assert frechet_distance(net, digits, images[1000:]) < 0.3 * frechet_distance(net, digits, noisy)


def test_the_distance_is_frechets():
    """Of all images: |difference of the means|^2 + tr(A + B - 2 (A B)^(1/2)) of the features."""
    net = Classifier(1, 2).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    sets = [torch.randint(0, high, (number, 1, 8, 8), generator=generator).byte() for high, number in ((256, 1200), (100, 700))]
    means, covariances = zip(*((f.mean(dim=0), f.T.cov()) for f in (net(images).double() for images in sets)))
    root = torch.linalg.eigvals(covariances[0] @ covariances[1]).real.clamp(min=0).sqrt().sum()
    expected = (means[0] - means[1]).square().sum() + covariances[0].trace() + covariances[1].trace() - 2 * root
    assert frechet_distance(net, *sets) == pytest.approx(expected.item(), rel=1e-3)


def test_it_is_the_test_set_that_samples_are_compared_with(grey, tmp_path, script, monkeypatch, capsys):
    """And the training set that the classifier learns and the floor is taken from; another data set gets another classifier."""
    config = configs.load(grey)

    def split(dataset, root, resolution, channels, label_dim, test=False):
        images = torch.full((20, channels, 8, 8), 200 if test else 10, dtype=torch.uint8)
        images[::2] += torch.randint(0, 50, images[::2].shape).byte()
        return TensorDataset(images, torch.arange(20) % 2)

    judges = [evaluate.Judge(config, CPU, tmp_path / "j")]
    monkeypatch.setattr("edm.evaluate.open_dataset", split)
    judges.append(evaluate.Judge(config, CPU, tmp_path / "j"))
    assert judges[1].real.min() >= 200
    assert judges[1].train.max() < 60
    assert len(list((tmp_path / "j/classifier").iterdir())) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_samples", 1], "--num_samples: a distance takes 2 or more samples"),
        (["--sweep", "--num_samples", 0], "--num_samples: a distance takes 2 or more samples"),
        (["--sweep", "--num_images", 3], "--sweep draws no bound"),
        (["--num_samples", 0, "--timesteps", 31], "the bound: the chain has 30 timesteps, too few for 31 steps"),
        (["chain.num_timesteps=31"], "chain.num_timesteps=30, which cannot be replaced"),
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
        totals.append(json.loads((tmp_path / "x.json").read_text())["bits_per_dimension"]["total"])
    assert totals[0] == pytest.approx(totals[1], rel=1e-5)
    code, _, err = call_evaluate(monkeypatch, capsys, "--checkpoint", path, "--num_samples", 0, "--num_images", 14)
    assert code == 2
    assert err.endswith("\rerror: --num_images: there are 13 images\n")


def test_what_has_no_bound_and_no_judge(grey, tmp_path, script, monkeypatch, capsys):
    train(configs.load(grey, ["preconditioning.formulation=ve", "training.num_training_steps=1"]), CPU, tmp_path / "output")
    path = tmp_path / "output/image/image_folder/tiny/diffusion-1.pt"
    capsys.readouterr()
    code, out, err = call_evaluate(monkeypatch, capsys, "--checkpoint", path, "--num_samples", 3)
    assert code == 0, err
    assert "No bound: the formulation ve knows other noise levels" in out
    code, _, err = call_evaluate(monkeypatch, capsys, "--checkpoint", path, "--num_samples", 3, "--num_images", 3)
    assert code == 2
    assert err.startswith("error: the bound: the formulation ve knows other noise levels")
    assert err.count("\n") == 1
    for name in ("dark", "light"):
        for file in (tmp_path / "images" / name).iterdir():
            file.rename(tmp_path / "images" / f"{name}{file.name}")
    code, _, err = call_evaluate(monkeypatch, capsys, "--checkpoint", path)
    assert code == 2
    assert "image_folder has one class" in err
