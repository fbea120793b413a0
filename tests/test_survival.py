"""What a run keeps, and what it does when memory or disk run out, or when it diverges."""

import math
import re
import resource
import signal
import time

import pytest
import torch
from conftest import send, steps_recorded, write_config
from test_training import CPU, same

from edm import checkpoint
from edm import config as configs
from edm.checkpoint import saved_steps
from edm.device import explain_out_of_memory
from edm.distributed import Processes
from edm.errors import Stopped, UserError
from edm.learner import Learner
from edm.losslog import LossLog
from edm.runfolder import RunFolder
from edm.training import train

RUN = "image/image_folder/tiny"


@pytest.fixture
def tiny(tmp_path, image_folder):
    return write_config(tmp_path, image_folder, channels=3)


def test_keeping_the_last_checkpoints_and_milestones(tiny, tmp_path):
    options = ["training.num_training_steps=9", "training.save_and_sample_every_n=1", "sampler.num_samples=1"]
    train(configs.load(tiny, [*options, "checkpoint.keep_last=2", "checkpoint.keep_every_n=3"]), CPU, tmp_path)
    assert saved_steps(tmp_path / RUN) == [3, 6, 8, 9]
    train(configs.load(tiny, [*options, "checkpoint.keep_last=1"]), CPU, tmp_path, overwrite=True)
    assert saved_steps(tmp_path / RUN) == [9]
    assert len(list((tmp_path / RUN).glob("*.replaced*"))) == 0


def test_overwriting_loses_nothing_before_the_new_run_has_saved(tiny, tmp_path, at_step):
    """Stopped by an error, everything is as it was; stopped by a signal, the old run's files are set aside, until the run, or
    the one that goes on from it, has saved a regular checkpoint."""
    folder = tmp_path / RUN
    train(configs.load(tiny), CPU, tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    other = configs.load(tiny, ["training.seed=1"])

    def fail(loss):
        raise UserError("the disk is full")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "step", lambda *args: fail(0))
        with pytest.raises(UserError, match="disk is full"):
            train(other, CPU, tmp_path, overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    at_step(2, send(signal.SIGINT))
    with pytest.raises(Stopped):
        train(other, CPU, tmp_path, overwrite=True)
    assert saved_steps(folder) == [2]
    for name in ("diffusion-3.pt", "diffusion-6.pt", "metrics.jsonl"):
        assert (folder / f"{name}.replaced").read_bytes() == before[name]
    (folder / "diffusion-2.pt").unlink()
    with pytest.raises(UserError, match=r"another run.*--overwrite \(.*diffusion-3\.pt\.replaced\)"):
        train(other, CPU, tmp_path)
    with pytest.raises(Stopped):
        train(other, CPU, tmp_path, overwrite=True)
    train(other, CPU, tmp_path, resume_from="latest")
    assert not list(folder.glob("*.replaced*"))
    assert {path.name for path in folder.iterdir()} == before.keys() | {"diffusion-2.pt"}


def test_going_on_from_elsewhere_treats_the_folder_as_another_run_s(tiny, tmp_path):
    """Earlier checkpoints in it included: no pruning deletes them, and `latest` does not take them for this run's."""
    folder = tmp_path / RUN
    train(configs.load(tiny, ["training.seed=1"]), CPU, tmp_path / "elsewhere")
    brought = str(tmp_path / "elsewhere" / RUN / "diffusion-6.pt")
    train(configs.load(tiny), CPU, tmp_path)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    longer = configs.load(tiny, ["training.seed=1", "training.num_training_steps=9", "checkpoint.keep_last=1"])
    with pytest.raises(UserError, match=r"holds the checkpoints of another run: .*--overwrite"):
        train(longer, CPU, tmp_path, resume_from=brought)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    with pytest.MonkeyPatch.context() as patch:  # killed
        patch.setattr(RunFolder, "put_back", lambda folder: None)
        patch.setattr(Learner, "step", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(longer, CPU, tmp_path, resume_from=brought, overwrite=True)
    assert (saved_steps(folder), len(list(folder.glob("*.pt.replaced")))) == ([], 2)
    train(longer, CPU, tmp_path, resume_from=brought, overwrite=True)
    assert saved_steps(folder) == [9]
    assert steps_recorded(folder) == list(range(1, 10))
    train(longer, CPU, tmp_path / "elsewhere", resume_from="latest")
    assert same(*(checkpoint.read(path / RUN / "diffusion-9.pt") for path in (tmp_path, tmp_path / "elsewhere")))


def test_what_was_set_aside_is_not_written_over(tiny, tmp_path):
    folder = tmp_path / RUN
    train(configs.load(tiny), CPU, tmp_path)
    for _ in range(2):
        train(configs.load(tiny), CPU, tmp_path, resume_from=str(folder / "diffusion-3.pt"))
    names = {"diffusion-6.pt.old", "diffusion-6.pt.old1", "metrics.jsonl.old", "metrics.jsonl.old1"}
    assert {path.name for path in folder.glob("*.old*")} == names


def test_torchrun_resumes_what_it_restarts_and_nothing_else(tiny, tmp_path):
    """The same command line again, --overwrite included; the store is what outlives the processes."""
    old = configs.load(tiny)
    train(old, CPU, tmp_path)
    folder = tmp_path / RUN
    new = configs.load(tiny, ["training.seed=1", "training.num_training_steps=5"])
    train(new, CPU, tmp_path / "undisturbed")
    processes = Processes(store=torch.distributed.HashStore())
    with pytest.MonkeyPatch.context() as patch:  # failed before it had saved: the old run's checkpoints are back
        patch.setattr(Learner, "step", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(new, CPU, tmp_path, overwrite=True, processes=processes)
    assert saved_steps(folder) == [3, 6]
    with pytest.MonkeyPatch.context() as patch:  # killed before it had saved: the old run's checkpoints are not its own
        patch.setattr(RunFolder, "put_back", lambda folder: None)
        patch.setattr(Learner, "step", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(new, CPU, tmp_path, overwrite=True, processes=processes)
    assert saved_steps(folder) == []
    step_of = Learner.step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "step", lambda *args: step_of(*args) if args[3] < 5 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(new, CPU, tmp_path, overwrite=True, processes=processes)
    assert saved_steps(folder) == [3]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "step", lambda *args: step_of(*args) if args[3] > 3 else 1 / 0)
        train(new, CPU, tmp_path, overwrite=True, processes=processes)
    ours, theirs = (checkpoint.read(path / RUN / "diffusion-5.pt") for path in (tmp_path, tmp_path / "undisturbed"))
    assert same(ours, theirs)
    with pytest.raises(UserError, match="holds the checkpoints of another run"):  # another torchrun knows nothing of it
        train(new, CPU, tmp_path, processes=Processes(store=torch.distributed.HashStore()))


def test_a_checkpoint_that_cannot_be_written_ends_the_run(tiny, tmp_path, monkeypatch):
    """Though it is written beside the training; the one before it is whole."""
    write = checkpoint.write

    def failing(path, contents):
        if contents["step"] == 6:
            raise UserError(f"cannot write {path}: No space left on device")
        write(path, contents)

    monkeypatch.setattr("edm.runfolder.checkpoint.write", failing)
    options = ["training.num_training_steps=1000", "sampler.num_samples=1"]
    with pytest.raises(UserError, match=r"diffusion-6.pt: No space left"):
        train(configs.load(tiny, options), CPU, tmp_path)
    assert saved_steps(tmp_path / RUN) == [3]
    assert len(list((tmp_path / RUN).glob("sample-*"))) < 5


def test_a_checkpoint_holds_the_step_it_was_asked_for(tiny, tmp_path):
    """Though the run goes on while it is written."""
    folder, learner = RunFolder(tmp_path, Processes()), Learner(configs.load(tiny), CPU)
    weight = next(learner.net.parameters())
    with folder:
        folder.writer.submit(time.sleep, 0.3)
        folder.save(1, {"step": 1, "name": "x", "config": {}, **learner.state_dict()})
        before = weight.detach().clone()
        weight.data += 1
    assert torch.equal(checkpoint.read(tmp_path / "diffusion-1.pt")["net"]["model." + first_name(learner)], before)


def first_name(learner: Learner) -> str:
    return next(learner.net.model.named_parameters())[0]


def test_a_run_that_diverges_stops_and_keeps_its_last_good_checkpoint(tiny, tmp_path, capsys):
    train(configs.load(tiny), CPU, tmp_path)
    good = checkpoint.read(tmp_path / RUN / "diffusion-6.pt")
    options = ["training.num_training_steps=2000", "training.learning_rate=1e6", "training.save_and_sample_every_n=50"]
    with pytest.raises(
        UserError, match=r"has diverged at step \d+: \d+ of the last \d+ losses .*learning_rate.*diffusion-6\.pt\)"
    ):
        train(configs.load(tiny, options), CPU, tmp_path, resume_from="latest")
    assert saved_steps(tmp_path / RUN) == [3, 6]
    assert same(checkpoint.read(tmp_path / RUN / "diffusion-6.pt"), good)
    assert re.search("diverged at step|diverged", capsys.readouterr().out) is None


@pytest.mark.parametrize(
    ("losses", "diverged"),
    [
        ([100.0] * 50, False),
        ([100.0] * 50 + [math.nan] * 3, False),  # an overflow or two, as fp16 has them
        ([100.0] * 50 + [1e9] * 4 + [100.0] * 2, False),
        ([100.0] * 50 + [math.nan] * 6, True),
        ([100.0] * 50 + [math.inf, math.nan, 1e9] * 2, True),
        ([100.0] * 50 + [9_000.0] * 20, False),  # bad, but no worse than where training can begin
        ([100.0] * 50 + [11_000.0] * 6, True),
        ([1e9] + [2e9] * 30, False),  # odd settings begin as high
        ([100.0, 1e9], False),
        ([100.0, 1e9, 1e9], True),
        ([math.nan], True),
        ([], False),
    ],
)
def test_divergence(losses, diverged):
    assert LossLog(None, len(losses), torch.tensor(losses), batch_size=4, untrained_loss=64).has_diverged() == diverged


def test_a_suspicious_loss_saves_but_deletes_nothing(tiny, tmp_path, at_step):
    at_step(5, lambda loss: loss * math.nan)
    train(configs.load(tiny, ["checkpoint.keep_last=1"]), CPU, tmp_path)
    assert saved_steps(tmp_path / RUN) == [3, 6]


def test_running_out_of_memory_is_explained(tiny, tmp_path, monkeypatch):
    def step(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nMore.")

    monkeypatch.setattr(Learner, "step", step)
    message = r"out of memory: lower training\.batch_size.*accumulation.*mixed_precision .*\(CUDA out of memory.*GiB\.\)$"
    with pytest.raises(UserError, match=message):
        train(configs.load(tiny), CPU, tmp_path)
    with pytest.raises(UserError, match=r"out of memory: less \("), explain_out_of_memory("less"):
        torch.empty(2**50)
    with pytest.raises(RuntimeError, match="shapes"), explain_out_of_memory("less"):
        torch.ones(2, 3) @ torch.ones(2, 3)


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="no limits on file sizes")
def test_a_full_disk_is_one_line_whatever_it_is_that_does_not_fit(script, tiny, tmp_path):
    """A limit on the size of files, so that pictures, record and checkpoints fail in turn, and what was there stays whole."""
    folder = tmp_path / "output" / RUN
    first = ("train_mnist.py", "--config_path", tiny, "--num_training_steps", 3)
    assert script(*first)[0] == 0
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    failed, unlimited = set(), resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (0, 50, 100, 200, 400, 1000, 3000, 30_000, 300_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1]))
        try:
            code, _, err = script("train_mnist.py", "--config_path", tiny, "--resume_from", "latest")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        assert code == 2, limit
        message = err.replace("\r", "\n").strip().splitlines()[-1]
        assert message.startswith("error: cannot write"), message
        assert "Traceback" not in err
        failed.add(re.search(r"cannot write .*/([a-z]+)", message)[1])
        assert all((folder / name).read_bytes() == data for name, data in before.items() if name.startswith("diffusion"))
        assert not list(folder.glob(".*"))
    assert {"metrics", "diffusion", "loss"} <= failed
    assert script("train_mnist.py", "--config_path", tiny, "--resume_from", "latest")[0] == 0
    assert steps_recorded(folder) == [1, 2, 3, 4, 5, 6]
    call = ("sample.py", "--checkpoint", folder / "diffusion-6.pt", "--seeds", "0-3", "--save_images", "--gif")
    assert script(*call, "--output_dir", "whole")[0] == 0
    for name in ("images/000000.png", "grid.png", "reverse.gif"):
        size = (tmp_path / "whole" / name).stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, unlimited[1]))
        try:
            code, _, err = script(*call, "--output_dir", "partial")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        assert code == 2
        assert err.endswith(f"error: cannot write partial/{name}: File too large\n")
        assert not (tmp_path / "partial" / name).exists()
