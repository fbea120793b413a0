"""`python -m lab.why`: equal costs, distances that fall as the solvers' orders say, and samples drawn pixel by pixel."""

import json
import math
import shutil

import pytest
import torch
from PIL import Image
from torch import nn

from lab import config as configs
from lab import why
from lab.generate import generate, load_denoiser

CPU = torch.device("cpu")


class Judge:
    """Stands in for `Comparison` and keeps the images that it is given."""

    def __init__(self):
        self.seen = []

    def frechet_distance(self, images: torch.Tensor) -> float:
        self.seen.append(images)
        return float(len(self.seen))

    def mean_floor(self, count: int, sets: int, balanced: bool) -> float:
        return count + sets / 100 + balanced / 1000


@pytest.fixture
def measured(two_peaks, monkeypatch) -> tuple[dict, torch.Tensor]:
    """What is measured of a denoiser in closed form, on images of 8x8 pixels."""

    class ClosedForm(nn.Module):
        round_sigma = staticmethod(float)

        def forward(self, x: torch.Tensor, sigma: float, labels: torch.Tensor | None = None) -> torch.Tensor:
            return two_peaks(x, sigma)

    monkeypatch.setattr(why, "EVALUATIONS", [17, 35, 79])
    network = {"channel_mult": [1], "attn_resolutions": []}
    config = configs.from_dict({"data": {"dataset": "image_folder", "resolution": 8}, "network": network}, "x", "x")
    return why.measure(ClosedForm(), config, 12, Judge(), CPU, torch.float32)


def test_distances_from_the_exact_solution_fall_as_the_orders_say(measured):
    assert measured[0]["floor"] == 12 + why.FLOORS / 100  # without classes, no balance
    samplers = measured[0]["samplers"]
    for name, order in (("VP", 1), ("VE", 1), ("DDIM", 1), ("EDM", 2)):
        curve = samplers[name]
        assert curve["evaluations"] == (17, 35, 79)
        _, far, near = curve["rms_distance"]
        assert math.log(far / near) / math.log(79 / 35) == pytest.approx(order, abs=0.35), name
        assert curve["from_edm"] < 0.05 * near
    assert samplers["EDM"]["rms_distance"][-1] < samplers["DDIM"]["rms_distance"][-1]


def test_the_samples_are_drawn_at_twice_their_size(measured, tmp_path):
    figures, images = measured
    assert images.shape == (4, 4, why.NUM_SHOWN, 1, 8, 8)
    images = torch.randint(0, 256, images.shape, generator=torch.Generator().manual_seed(0)).byte()
    why.draw(tmp_path / "why.png", {"first.pt": figures, "second.pt": figures}, images)
    with Image.open(tmp_path / "why.png") as picture:
        for row, column, place in ((0, 0, 0), (3, 2, 1)):
            left, top = 70 + 2 * (3 + 19 * column + 8 * place), 70 + 2 * (3 + 11 * row)
            pixels = torch.tensor(list(picture.convert("L").crop((left, top, left + 16, top + 16)).tobytes())).view(16, 16)
            assert torch.equal(pixels[::2, ::2], images[row, column, place, 0].long())
            assert torch.equal(pixels[1::2, 1::2], pixels[::2, ::2])


def test_the_samples_are_those_that_the_samplers_generate(trained, monkeypatch):
    monkeypatch.setattr(why, "EVALUATIONS", [3, 5])
    monkeypatch.setattr(why, "EXACT", 9)
    monkeypatch.setattr(why, "BATCH_SIZE", 7)
    config, denoiser, _ = load_denoiser(trained, None, why.ODE, CPU)
    judge = Judge()
    _, images = why.measure(denoiser, config, 10, judge, CPU, torch.float32)
    edm = ["sampler.discretization=edm", "sampler.solver=heun", "sampler.sampling_steps=3"]
    vp = ["sampler.discretization=vp", "sampler.schedule=vp", "sampler.scaling=vp", "sampler.solver=euler"]
    for place, overrides in ((7, edm), (0, [*vp, "sampler.sampling_steps=3"])):
        config, _, _ = load_denoiser(trained, None, [*why.ODE, *overrides], CPU)
        expected = torch.cat(list(generate(denoiser, list(range(10)), config, CPU, 10, title=None)))
        assert (judge.seen[place].int() - expected.int()).abs().max() <= 1
        assert torch.equal(images.flatten(0, 1)[place + place // 2], judge.seen[place][: why.NUM_SHOWN])


def test_the_command_writes_a_picture_and_its_figures(trained, script, monkeypatch, tmp_path):
    """Guidance doubles the evaluations."""
    monkeypatch.setattr(why, "EVALUATIONS", [3, 5])
    monkeypatch.setattr(why, "EXACT", 9)
    monkeypatch.setattr("lab.metrics.MIN_STEPS", 5)
    monkeypatch.setattr("runpy.run_path", lambda *args, **options: why.main())  # it would read the constants anew
    shutil.copy(trained, tmp_path / "second.pt")
    arguments = ("--checkpoint", trained, "--second", "second.pt", "--samples", 10, "--output", "new/why.png")
    for guidance, costs in ((1, [3, 5]), (2, [6, 10])):
        code, out, err = script("lab/why.py", *arguments, *([f"sampler.guidance={guidance}"] if guidance > 1 else []))
        assert code == 0, err
        figures = json.loads((tmp_path / "new/why.json").read_text())
        assert [*figures] == [trained.stem, "second"]
        for found in figures.values():
            assert (found["guidance"], found["samples"]) == (guidance, 10)
            assert [curve["evaluations"] for curve in found["samplers"].values()] == [costs] * 4
            assert f"{found['samplers']['EDM']['rms_distance'][1]:.4f}" in out
        with Image.open(tmp_path / "new/why.png") as picture:
            assert picture.size[1] > 400


def test_what_cannot_be_drawn_is_one_line(trained, script):
    for arguments, message in (
        ("--samples 9", "'9' is not a whole number from 10"),
        ("--output .", "cannot write"),
        ("--second nowhere.pt", "nowhere.pt"),
        ("--data_root nowhere", "data.root: 'nowhere' is not a folder"),
    ):
        code, _, err = script("lab/why.py", "--checkpoint", trained, *arguments.split())
        assert (code, err.count("\n")) == (2, 1)
        assert message in err
