"""The lessons of DDPM and Improved DDPM, from the config to the picture: training, its checkpoint, samples, the bound."""

import json
import subprocess
import sys

import pytest
import torch
import yaml
from conftest import ROOT, write_config
from PIL import Image
from test_distributed import losses, torchrun
from test_training import CPU, same, trained
from torch.nn.functional import one_hot
from torch.utils.data import TensorDataset

from edm import checkpoint, choices, evaluate
from edm import config as configs
from edm.data import open_dataset, to_model_range, whole
from edm.ddpm import ancestral, ddim, make_chain, variational_bound
from edm.ddpm_training import ImportanceSampledTimesteps
from edm.digits import draw_digits
from edm.errors import UserError
from edm.generate import build_denoiser
from edm.learner import Learner
from edm.metrics import Classifier, accuracy, frechet_distance, train_classifier
from edm.randomness import ImageNoise
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
def test_the_losses_fall(tiny, lesson):
    fast = ["training.learning_rate=1e-2", "training.batch_size=16", "network.dropout=0", "training.max_grad_norm=1"]
    _, losses = trained(configs.load(tiny, [*lesson, *fast]), 150)
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
    alike = [learner.step(images, labels, step).item() for step in (1,)]
    weights = learner.noise_distribution.weights()
    assert weights.max() > 1.5 * weights.min()
    drawn = learner.draw(images, labels, 2)
    t = make_chain("cosine", 4, torch.float32).nearest(drawn["sigma"])
    assert t.bincount(minlength=4).tolist() == pytest.approx((2000 * weights).tolist(), abs=100)
    assert learner.step(images, labels, 2).item() == pytest.approx(alike[0], rel=0.03)


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
