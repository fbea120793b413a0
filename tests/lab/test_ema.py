"""Snapshots of a run, and `python -m lab.ema`, which makes averages of other widths from them."""

import re

import pytest
import torch

from edm.ema import gamma_of
from lab import checkpoint
from lab.checkpoint import WIDTHS, saved_steps
from lab.learner import Learner

LAST_STEP = "--num_training_steps"
EVERY = "ema.snapshot_every_n"


def snapshots(folder) -> dict[int, dict]:
    return {step: checkpoint.load(folder / f"snapshot-{step}.pt") for step in saved_steps(folder, "snapshot")}


@pytest.fixture
def path_of_weights(monkeypatch):
    """The weights after each step of training, in float64."""
    path, optimizer_step = [], Learner.optimizer_step

    def step(learner: Learner, images_seen: int) -> None:
        optimizer_step(learner, images_seen)
        path.append({name: weight.detach().double() for name, weight in learner.net.named_parameters()})

    monkeypatch.setattr(Learner, "optimizer_step", step)
    return path


@pytest.mark.parametrize(("precision", "tolerance"), [("half", 3e-4), ("float32", 3e-5)])
def test_the_command_gives_the_average_that_training_would_have(
    train, tiny, script, path_of_weights, tmp_path, monkeypatch, precision, tolerance
):
    """Of a width that was not tracked, from 20 snapshots; weights count with the integral of the profile over their step."""
    if precision == "float32":
        monkeypatch.setattr(checkpoint, "halved", dict)
    folder = train(tiny, f"{EVERY}=2", LAST_STEP, 40, "--save_and_sample_every_n", 40)
    assert saved_steps(folder, "snapshot") == list(range(2, 41, 2))
    code, out, err = script("lab/ema.py", "--width", 0.07, folder, "--output", "x.pt")
    assert (code, err) == (0, "")
    assert out == "x.pt: the average of width 0.07 at step 40, from 20 snapshots up to step 40, residual 0.25%\n"

    average, power = checkpoint.load(tmp_path / "x.pt"), gamma_of(0.07) + 1
    counts = [(step / 40) ** power - ((step - 1) / 40) ** power for step in range(1, 41)]
    exact = {name: sum(count * net[name] for count, net in zip(counts, path_of_weights)) for name in path_of_weights[0]}
    off, other = (
        sum((weights[name] - exact[name]).square().sum() for name in exact) / sum(w.square().sum() for w in exact.values())
        for weights in (average["ema"], path_of_weights[-1])
    )
    assert off.sqrt() < tolerance < 0.2 * other.sqrt()
    assert average["step"] == 40
    assert script("sample.py", "--checkpoint", "x.pt", "--num_samples", 1)[0] == 0
    assert script("sample.py", "--checkpoint", folder / "snapshot-10.pt", "--num_samples", 1)[0] == 0


def test_a_snapshot_holds_both_averages_in_half_precision(train, tiny, same):
    folder = train(tiny, f"{EVERY}=4", "checkpoint.keep_last=1")
    assert saved_steps(folder, "snapshot") == [4, 6]  # the last step's too
    snapshot, whole = snapshots(folder)[6], checkpoint.load(folder / "diffusion-6.pt")
    assert list(snapshot["power_ema"]) == list(WIDTHS)
    for width in WIDTHS:
        assert same(snapshot["power_ema"][width], checkpoint.halved(whole["power_ema"][width]))
    assert same(snapshot["ema"], snapshot["power_ema"][0.05])
    assert {(w.ndim > 1, w.dtype) for w in snapshot["ema"].values()} == {(False, torch.float32), (True, torch.float16)}


def test_a_resumed_run_has_the_averages_and_snapshots_of_an_undisturbed_one(train, tiny, last, same):
    """After it was stopped between two snapshots; later ones of a run that is left are moved aside."""
    whole = train(tiny, f"{EVERY}=2", output="whole")
    folder = train(tiny, f"{EVERY}=2", output="parts")
    train(tiny, f"{EVERY}=2", "--resume_from", folder / "diffusion-3.pt", output="parts")
    assert same(last(whole)["power_ema"], last(folder)["power_ema"])
    assert same(snapshots(whole), snapshots(folder))
    assert {path.name for path in folder.glob("snapshot-*.old*")} == {"snapshot-4.pt.old", "snapshot-6.pt.old"}


def test_an_older_run_goes_on_with_averages_from_then_on(train, tiny, last, capsys):
    """As if its weights had been the same all along: beta old + (1 - beta) new after one more step."""
    old = last(train(tiny, LAST_STEP, 3))
    del old["power_ema"], old["config"]["ema"]["snapshot_every_n"]
    folder = train(tiny, LAST_STEP, 3, output="older")
    checkpoint.save(folder / "diffusion-3.pt", old)
    new = last(train(tiny, f"{EVERY}=1", LAST_STEP, 4, "--resume_from", "latest", output="older"))
    assert "though with another ema.snapshot_every_n (nothing, now 1)\n" in capsys.readouterr().out
    for width in WIDTHS:
        beta = (3 / 4) ** (gamma_of(width) + 1)
        for name, weight in old["net"].items():
            torch.testing.assert_close(new["power_ema"][width][name], beta * weight + (1 - beta) * new["net"][name])


def test_what_cannot_be_made_is_refused_in_one_line(train, tiny, script, tmp_path, trained):
    def refusal(*arguments: object) -> str:
        code, out, err = script("lab/ema.py", *arguments, "--output", "x.pt")
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert not (tmp_path / "x.pt").exists()
        return err

    assert f"{trained.parent} holds no snapshot-*.pt; a run with {EVERY}" in refusal(trained.parent, "--width", 0.07)
    folder = train(tiny, f"{EVERY}=1")
    for width in (-1, 0, 0.2887, "nan"):
        assert "--width: the width of an average is above 0 and below 0.288675, not" in refusal(folder, f"--width={width}")
    for options in (("--width", 0.01), ("--width", 0.25), ("--width", 0.07, "--step", 9)):
        expected = r"6 snapshots up to step 6, residual \d+\.\d\d%, of 5% allowed; the widths 0\.05 and 0\.1 at the step"
        assert re.search(expected, refusal(folder, *options))
    for name in ("snapshot-2.pt", "snapshot-99.pt", "diffusion-6.pt"):
        before = (folder / name).exists() and (folder / name).read_bytes()
        code, _, err = script("lab/ema.py", folder, "--width", 0.07, "--output", folder / name)
        assert code == 2 and f"a training run gives its own files names such as {name}; choose another" in err
        assert ((folder / name).exists() and (folder / name).read_bytes()) == before
    (folder / "snapshot-1.pt").unlink()
    assert "holds no snapshot-*.pt up to step 1;" in refusal(folder, "--width", 0.07, "--step", 1)

    path = folder / "snapshot-4.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1000])
    assert "snapshot-4.pt is damaged" in refusal(folder, "--width", 0.07)
    other = train(tiny, f"{EVERY}=4", "network.model_channels=16", LAST_STEP, 4, output="other") / "snapshot-4.pt"
    for source in (other, trained, folder / "snapshot-5.pt"):
        path.write_bytes(source.read_bytes())
        assert "snapshot-4.pt is not the snapshot of step 4, or belongs to another network than that of step 2" in refusal(
            folder, "--width", 0.07
        )
    contents = checkpoint.load(folder / "snapshot-6.pt")
    for weights in contents["power_ema"].values():
        next(iter(weights.values())).fill_(torch.nan)
    checkpoint.save(path, contents | {"step": 4})
    assert "the weights in" in (error := refusal(folder, "--width", 0.07)) and "snapshot-4.pt are not finite numbers" in error
    contents = checkpoint.load(folder / "snapshot-6.pt")
    for averages in ([], {0.05: contents["ema"]}, {0.05: contents["ema"], 0.1: {"x": 3}}):
        checkpoint.save(path, contents | {"power_ema": averages})
        assert "snapshot-4.pt is damaged, or not a checkpoint" in refusal(folder, "--width", 0.07)
