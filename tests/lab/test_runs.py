"""A run's folder: what it holds, how a run is resumed, and what is never overwritten."""

import itertools
import json
import math
import os
import re

import numpy as np
import pytest
import torch

from lab import checkpoint
from lab import config as configs
from lab.checkpoint import saved_steps
from lab.cli import UserError
from lab.device import explain_device_errors
from lab.distributed import World
from lab.losslog import LossLog

LAST_STEP = "--num_training_steps"
IMPORTANCE = ["preconditioning.formulation=improved_ddpm", "loss.objective=hybrid", "loss.noise_distribution=importance"]
IMPORTANCE += ["loss.weighting=iddpm", "chain.betas=cosine", "chain.num_timesteps=2", "training.batch_size=8"]
OUT_OF_MEMORY = [  # cuDNN's words, oneDNN's, C++'s, PyTorch's and matplotlib's
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "GET was unable to find an engine to execute this computation",
    "could not create a primitive",
    "std::bad_alloc",
    "unable to mmap 99 bytes from file <x>: Cannot allocate memory (12)",
    "Image size of 9x9000000 pixels is too large. It must be less than 2^23 in each direction.",
]
AUGMENTED = ["network.augment_dim=9", "data.augment_probability=0.5", "training.accumulation=2"]


def contents_of(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_run_leaves_its_pictures_record_and_checkpoints(trained):
    folder = trained.parent
    names = {"diffusion-3.pt", "diffusion-6.pt", "sample-3.png", "sample-6.png", "metrics.jsonl", "loss.png"}
    assert {path.name for path in folder.iterdir()} == names
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["images"]) for row in rows] == [(step, 4 * step) for step in range(1, 7)]
    losses = checkpoint.load(trained)["losses"].tolist()
    assert [[row["loss"], *row["by_noise_level"]] for row in rows] == [[None if x != x else x for x in row] for row in losses]


@pytest.mark.parametrize(
    ("options", "stop_at"), [([], 3), (AUGMENTED, 4), (IMPORTANCE, 4)], ids=["edm", "augmented", "importance"]
)
def test_a_resumed_run_equals_an_undisturbed_one(train, tiny, last, same, options, stop_at):
    """Bit for bit, with dropout and hidden labels: weights, average, Adam, what importance sampling has learned, the record."""
    whole = train(tiny, *options, output="whole")
    train(tiny, *options, LAST_STEP, stop_at, output="parts")
    parts = train(tiny, *options, "--resume_from", "latest", output="parts")
    assert last(whole)["step"] == 6
    assert same(last(whole), last(parts))
    assert (whole / "metrics.jsonl").read_text() == (parts / "metrics.jsonl").read_text()
    if options is IMPORTANCE:  # the draws did depend on the history when the run was stopped
        assert checkpoint.load(parts / "diffusion-4.pt")["noise_distribution"]["history"].isfinite().all()


def test_a_finished_run_gets_what_it_lacks_and_can_be_prolonged(train, tiny, steps_recorded, capsys):
    """Its record goes on where the checkpoint is: rows of steps that are done again, and half a row, are replaced."""
    folder = train(tiny, LAST_STEP, 3)
    before = contents_of(folder)
    for done in (0, 1):
        (folder / "sample-3.png").unlink()
        (folder / "metrics.jsonl").write_bytes(before["metrics.jsonl"] + b'{"step": 4}\n\xff{"st')
        train(tiny, LAST_STEP, 3 + done, "--resume_from", "latest")
        assert f"Done: {done} steps" in capsys.readouterr().out
        assert done or contents_of(folder) == before
        assert steps_recorded(folder) == [1, 2, 3, 4][: 3 + done]
    assert saved_steps(folder) == [3, 4]


def test_a_damaged_checkpoint_is_passed_over(train, tiny, last, same, capsys):
    folder = train(tiny)
    good = last(folder)
    path = folder / "diffusion-6.pt"
    path.write_bytes(path.read_bytes()[:-1000])
    train(tiny, "--resume_from", "latest")
    out = capsys.readouterr().out
    assert "diffusion-6.pt is damaged" in out
    assert f"Going on from {folder / 'diffusion-3.pt'}" in out
    assert same(last(folder), good)
    (folder / "diffusion-3.pt").write_bytes(b"damaged")
    (folder / "diffusion-6.pt").write_bytes(b"\x80\x04cos\n\x1b[31m\n.")  # which would colour the terminal
    with pytest.raises(UserError, match="has no whole checkpoint"):
        train(tiny, "--resume_from", "latest")
    assert "asks for os.?[31m, which" in capsys.readouterr().out


def test_a_new_run_may_start_with_the_weights_of_another(train, tiny, trained, last, same, tmp_path):
    shared = tmp_path / "shared.safetensors"
    checkpoint.save(shared, checkpoint.load(trained))
    folder = train(tiny, LAST_STEP, 1, "training.learning_rate=1e-30", "--load_model_weights_from_checkpoint", shared)
    assert last(folder)["step"] == 1
    assert same(last(folder)["net"], checkpoint.load(trained)["ema"])


def test_resuming_says_what_differs_and_refuses_what_cannot_fit(train, tiny, capsys):
    folder = train(tiny, LAST_STEP, 1)
    train(tiny, LAST_STEP, 2, "training.learning_rate=1e-5", "network.dropout=0.3", "--resume_from", "latest")
    expected = "though with another network.dropout (0.1, now 0.3), training.learning_rate (0.001, now 1e-05)\n"
    assert expected in capsys.readouterr().out
    for change, difference in {
        "network.model_channels=16": r"network.model_channels \(8, now 16\)",
        "preconditioning.sigma_data=1": r"preconditioning.sigma_data \(0.5, now 1.0\)",
        "chain.betas=cosine": r"chain.betas \('linear', now 'cosine'\)",
    }.items():
        with pytest.raises(UserError, match=rf"no run can go on from .*diffusion-2.pt with another {difference}"):
            train(tiny, change, "--resume_from", "latest")
    assert saved_steps(folder) == [1, 2]


def test_a_new_run_touches_no_other_unless_asked_and_then_moves_it_aside(train, tiny, capsys):
    folder = train(tiny, LAST_STEP, 1)
    before = contents_of(folder)
    with pytest.raises(UserError, match=r"another run: .*--resume_from latest.*--overwrite \(.*diffusion-1\.pt\)"):
        train(tiny, "--seed", 1)
    assert contents_of(folder) == before
    for aside in ("tiny.old", "tiny.old1"):
        train(tiny, "--seed", 1, LAST_STEP, 2, "--overwrite")
        assert f"Moved the earlier run to {folder.with_name(aside)}\n" in capsys.readouterr().out
        assert saved_steps(folder) == [2]
    assert contents_of(folder.with_name("tiny.old")) == before
    assert saved_steps(folder.with_name("tiny.old1")) == [2]


def test_resuming_from_an_earlier_checkpoint_renames_the_later_ones(train, tiny, steps_recorded):
    """Otherwise "latest" would be a checkpoint of the run that was left; and it takes no name that is taken."""
    folder = train(tiny)
    old = (folder / "diffusion-6.pt").read_bytes()
    earlier = ("--resume_from", folder / "diffusion-3.pt")
    train(tiny, LAST_STEP, 4, *earlier)
    assert saved_steps(folder) == [3, 4]
    assert steps_recorded(folder) == [1, 2, 3, 4]
    train(tiny, *earlier)
    train(tiny, LAST_STEP, 4, *earlier)
    assert {path.name[10:] for path in folder.glob("*.old*")} == {"4.pt.old", "6.pt.old", "6.pt.old1"}
    assert (folder / "diffusion-6.pt.old").read_bytes() == old
    before = contents_of(folder)
    with pytest.raises(UserError, match="at step 3 already"):
        train(tiny, LAST_STEP, 2, *earlier)
    assert contents_of(folder) == before


def test_going_on_from_elsewhere_treats_the_folder_as_another_runs(train, tiny, trained, steps_recorded):
    """Its checkpoints of earlier steps included: they are not deleted by `keep_last`, and "latest" does not find them."""
    folder = train(tiny, "--seed", 1)
    before = contents_of(folder)
    longer = (LAST_STEP, 9, "--resume_from", trained, "checkpoint.keep_last=1")
    with pytest.raises(UserError, match=r"holds the checkpoints of another run: .*--overwrite"):
        train(tiny, *longer)
    assert contents_of(folder) == before
    train(tiny, *longer, "--overwrite")
    assert contents_of(folder.with_name("tiny.old")) == before
    assert saved_steps(folder) == [9]
    assert steps_recorded(folder) == list(range(1, 10))


def test_torchrun_resumes_what_it_restarts_and_nothing_else(train, tiny, at_step, last, same):
    """It calls the same command again after a crash, `--overwrite` included; its store outlives the processes."""
    folder = train(tiny, LAST_STEP, 1)
    command = (tiny, "--seed", 1, LAST_STEP, 5, "--overwrite")
    undisturbed = train(*command, output="undisturbed")
    early, late = iter([True, False]), iter([True, False])
    at_step(2, lambda learner: next(early) and 1 / 0)
    at_step(4, lambda learner: next(late) and 1 / 0)
    world = World(store=torch.distributed.HashStore())
    for saved in ([], [3]):
        with pytest.raises(ZeroDivisionError):
            train(*command, world=world)
        assert saved_steps(folder) == saved
    train(*command, world=world)
    assert same(last(folder), last(undisturbed))
    assert sorted(path.name for path in folder.parent.iterdir() if path.is_dir()) == ["tiny", "tiny.old"]
    with pytest.raises(UserError, match="holds the checkpoints of another run"):  # another torchrun knows nothing of it
        train(tiny, world=World(store=torch.distributed.HashStore()))


def test_only_the_last_checkpoints_and_milestones_are_kept(train, tiny):
    every = (LAST_STEP, 9, "--save_and_sample_every_n", 1, "sampler.num_samples=1", "sampler.sampling_steps=1")
    folder = train(tiny, *every, "checkpoint.keep_last=2", "checkpoint.keep_every_n=3")
    assert saved_steps(folder) == [3, 6, 8, 9]


KILLED = """
import itertools, os, signal, sys
import train_mnist
from lab import checkpoint, pictures
from pathlib import Path

pictures.save_loss_curve = lambda path, *losses: checkpoint.write_atomically(path, lambda file: file.write(b"a curve"))
sys.argv = "train_mnist.py --config_path tiny.yaml --num_training_steps 2 --save_and_sample_every_n 1".split()
sys.argv += ["checkpoint.keep_last=1", "sampler.num_samples=1", "--output_dir"]

def train(output, *options, kill_at=0):
    # In a child process, which is killed when it is about to create, rename or delete a file for the n-th time, from 1.
    if (child := os.fork()) > 0:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    changes = itertools.count(1)
    def watch(event, arguments):
        writes = event == "open" and isinstance(arguments[1], str) and arguments[1][0] in "aw"
        if (writes or event in ("os.rename", "os.remove")) and output in str(arguments[0]) and next(changes) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(watch)
    sys.argv += [output, *options]
    train_mnist.main()
    os._exit(0)

assert train("undisturbed") == 0
for kill_at in itertools.count(1, 4):  # there are three changes for each file
    output = f"killed-{kill_at}"
    if train(output, kill_at=kill_at) == 0:
        break
    saved = any(Path(output, "image/image_folder/tiny").glob("diffusion-*.pt"))
    assert train(output, *["--resume_from", "latest"] * saved) == 0
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_killed_run_can_always_go_on(start, tiny, tmp_path, same):
    """Killed at every fourth of the moments at which it changes a file: the result is that of an undisturbed run."""
    (tmp_path / "killed.py").write_text(KILLED)
    driver = start(tmp_path / "killed.py")
    out, err = driver.communicate(timeout=300)
    assert driver.returncode == 0, out + err
    undisturbed, *others = sorted(tmp_path.glob("*/image/image_folder/tiny"), reverse=True)
    assert len(others) > 5
    names = {path.name for path in undisturbed.iterdir()}
    for folder in others:
        assert {path.name for path in folder.iterdir()} - {"diffusion-1.pt"} == names  # which step 3 would delete
        assert (folder / "metrics.jsonl").read_bytes() == (undisturbed / "metrics.jsonl").read_bytes()
        assert same(*(checkpoint.load(path / "diffusion-2.pt") for path in (folder, undisturbed)))


def test_a_full_disk_is_one_line_whatever_it_is_that_does_not_fit(script, train, tiny, steps_recorded):
    """A limit on the size of files, so that record, pictures and checkpoints fail in turn; what was there stays whole."""
    resource = pytest.importorskip("resource")  # Windows has none
    folder = train(tiny, LAST_STEP, 3)
    before = contents_of(folder)
    failed, unlimited = [], resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (0, len(before["metrics.jsonl"]) + 10, 30_000, len(before["diffusion-3.pt"]) - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1]))
        try:
            code, _, err = script("train_mnist.py", "--config_path", tiny, "--resume_from", "latest")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        assert code == 2, limit
        message = err.replace("\r", "\n").strip().splitlines()[-1]
        failed.append(re.fullmatch(r"error: cannot write .*/([\w.-]+): File too large", message)[1])
        assert "Traceback" not in err
        assert contents_of(folder) | {"metrics.jsonl": 0} == before | {"metrics.jsonl": 0}
    assert failed == ["metrics.jsonl", "metrics.jsonl", "diffusion-6.pt", "diffusion-6.pt"]
    train(tiny, "--resume_from", "latest")
    assert steps_recorded(folder) == [1, 2, 3, 4, 5, 6]


def test_a_run_that_diverges_stops_and_keeps_its_last_good_checkpoint(train, tiny, last, same):
    folder = train(tiny)
    good = last(folder)
    options = (LAST_STEP, 2000, "training.learning_rate=1e6", "--save_and_sample_every_n", 20, "--resume_from", "latest")
    with pytest.raises(UserError, match=r"has diverged at step \d+: .*training\.learning_rate.*diffusion-6\.pt\)"):
        train(tiny, *options)
    assert saved_steps(folder) == [3, 6]
    assert same(last(folder), good)


@pytest.mark.parametrize(
    ("losses", "diverged"),
    [
        ([100.0] * 50 + [math.nan] * 3, False),  # an overflow or two, as fp16 has them
        ([100.0] * 50 + [math.nan] * 6, True),
        ([100.0] * 50 + [math.inf, math.nan, 1e9] * 2, True),
        ([100.0] * 50 + [9_000.0] * 20, False),  # bad, but no worse than where training can begin
        ([100.0] * 50 + [20_000.0] * 6, True),
        ([1e9] + [2e9] * 30, False),  # odd settings begin as high
        ([100.0, 1e9], False),
        ([100.0, 1e9, 1e9], True),
        ([math.nan], True),
    ],
)
def test_divergence(tiny, losses, diverged):
    log = LossLog(None, configs.load(tiny), {"step": len(losses), "losses": torch.tensor(losses)[:, None]})
    assert log.has_diverged() == diverged


def test_a_suspicious_loss_deletes_no_checkpoint(train, tiny, monkeypatch):
    """One that is not finite, which an overflow in fp16 may explain, or the beginning of the end."""
    add, steps = LossLog.add, itertools.count(1)
    monkeypatch.setattr(LossLog, "add", lambda log, loss, *rest: add(log, loss * math.nan if next(steps) == 5 else loss, *rest))
    assert saved_steps(train(tiny, "checkpoint.keep_last=1")) == [3, 6]


def test_running_out_of_memory_and_a_failed_compilation_are_one_line(train, tiny, at_step):
    def fail(learner):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nMore.")

    at_step(2, fail)
    message = r"out of memory: lower training\.batch_size .*accumulation .*mixed_precision.*\(CUDA out of memory.*GiB\.\)$"
    with pytest.raises(UserError, match=message):
        train(tiny)
    with pytest.raises(UserError, match=r"out of memory: less \("), explain_device_errors("less"):
        torch.empty(2**50)
    for words in OUT_OF_MEMORY:
        with pytest.raises(UserError, match=rf"^out of memory: less \({re.escape(words)}"), explain_device_errors("less"):
            raise RuntimeError(words)
    with pytest.raises(UserError, match=r"^out of memory: less \(array is too big"), explain_device_errors("less"):
        np.empty(2**62)
    with pytest.raises(UserError, match=r"^torch\.compile failed, .* \(no such op\)$"), explain_device_errors("less"):
        raise torch._dynamo.exc.Unsupported("no such op\nMore.")
    with pytest.raises(RuntimeError, match="shapes"), explain_device_errors("less"):
        torch.ones(2, 3) @ torch.ones(2, 3)
