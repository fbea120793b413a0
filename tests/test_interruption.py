"""Runs that are interrupted, killed, restarted or started twice: nothing is lost, and the result does not change."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, send, steps_recorded, wait_for, write_config
from test_training import CPU, same

from edm import checkpoint
from edm import config as configs
from edm.checkpoint import saved_steps
from edm.cli import command_to_resume
from edm.errors import Stopped
from edm.interrupt import Interruption
from edm.learner import Learner
from edm.training import train

RUN = "image/image_folder/tiny"


@pytest.fixture
def tiny(tmp_path, image_folder):
    return write_config(tmp_path, image_folder, channels=3)


@pytest.fixture(autouse=True)
def default_handlers():
    """Whatever the tests were started by: nohup ignores SIGHUP, and a run leaves it so."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_run_after_the_step_with_a_checkpoint(tiny, tmp_path, at_step, monkeypatch, number):
    config = configs.load(tiny)
    train(config, CPU, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", Learner.step)  # to be undone after
        at_step(4, send(number))
        with pytest.raises(Stopped) as stop:
            train(config, CPU, tmp_path / "parts")
    monkeypatch.undo()
    assert (stop.value.signum, stop.value.step) == (number, 4)
    assert saved_steps(tmp_path / "parts" / RUN) == [3, 4]
    train(config, CPU, tmp_path / "parts", resume_from="latest")
    whole, parts = (checkpoint.read(tmp_path / run / RUN / "diffusion-6.pt") for run in ("whole", "parts"))
    assert same(whole, parts)
    assert steps_recorded(tmp_path / "parts" / RUN) == [1, 2, 3, 4, 5, 6]


def test_a_signal_before_a_picture_is_due_keeps_it_for_the_resumed_run(tiny, tmp_path, at_step):
    at_step(3, send(signal.SIGTERM))
    with pytest.raises(Stopped):
        train(configs.load(tiny), CPU, tmp_path)
    assert saved_steps(tmp_path / RUN) == [3]
    assert not (tmp_path / RUN / "sample-3.png").exists()


def test_a_signal_while_drawing_drops_the_picture_and_the_resumed_run_draws_it(tiny, tmp_path, monkeypatch):
    drawn = []

    def drawing(*args, **kwargs):
        drawn.append(1)
        if len(drawn) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        return generate(*args, **kwargs)

    from edm.training import generate

    monkeypatch.setattr("edm.training.generate", drawing)
    began = time.monotonic()
    with pytest.raises(Stopped):
        train(configs.load(tiny), CPU, tmp_path)
    assert time.monotonic() - began < 5
    assert saved_steps(tmp_path / RUN) == [3]
    assert not (tmp_path / RUN / "sample-3.png").exists()
    train(configs.load(tiny), CPU, tmp_path, resume_from="latest")
    assert (tmp_path / RUN / "sample-3.png").exists()
    assert len(drawn) == 3
    (tmp_path / RUN / "sample-6.png").unlink()
    train(configs.load(tiny), CPU, tmp_path, resume_from="latest")  # a finished run only gets what it lacks
    assert (tmp_path / RUN / "sample-6.png").exists()


def test_handlers_are_those_of_before_when_the_run_is_over(tiny, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    train(configs.load(tiny, ["training.num_training_steps=1"]), CPU, tmp_path)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


def test_signals_at_the_same_time_are_one_and_a_later_one_ends_the_process(monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    now = [100.0]
    monkeypatch.setattr("edm.interrupt.time.monotonic", lambda: now[0])
    with Interruption(quiet=True) as interruption:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert (interruption.signum, ended) == (signal.SIGINT, [])
        now[0] += 1
        os.kill(os.getpid(), signal.SIGTERM)
        assert ended == [128 + signal.SIGTERM]


def start(tiny, tmp_path, *options) -> subprocess.Popen:
    call = [sys.executable, str(ROOT / "train_mnist.py"), "--config_path", str(tiny), "--device", "cpu", *options]
    return subprocess.Popen(call, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


LONG = ("--num_training_steps", "100000", "--save_and_sample_every_n", "10", "checkpoint.keep_last=2")


def test_the_command_that_is_printed_goes_on(tiny, tmp_path):
    """Signals from outside, exit codes, a second run in the same folder, a kill, and what they leave."""
    run = start(tiny, tmp_path, *LONG)
    folder = tmp_path / "output" / RUN
    wait_for(folder / "sample-10.png", run)
    second = start(tiny, tmp_path, *LONG, "--overwrite")
    out, err = second.communicate(timeout=120)
    assert second.returncode == 2
    assert err == (
        "error: another run is training in output/image/image_folder/tiny; "
        "wait for it, stop it, or give --output_dir another folder\n"
    )
    assert run.poll() is None
    run.send_signal(signal.SIGTERM)
    out, err = run.communicate(timeout=120)
    assert run.returncode == 143
    stopped = int(re.search(r"Stopped after step (\d+)", out)[1])
    assert saved_steps(folder)[-1] == stopped
    assert len(saved_steps(folder)) <= 3
    assert not list(folder.glob(".*"))

    command = out.splitlines()[-1].strip()
    assert shlex.split(command)[2:4] == ["--resume_from", "latest"]
    resumed = subprocess.Popen([sys.executable, *shlex.split(command)[1:]], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    wait_for(folder / f"sample-{(stopped // 10 + 2) * 10}.png", resumed)
    resumed.send_signal(signal.SIGKILL)
    resumed.communicate()
    (folder / ".diffusion-7.pt.99.tmp").write_bytes(b"half of it")
    last = start(tiny, tmp_path, *LONG, "--resume_from", "latest")  # the lock of a killed run holds nobody up
    time.sleep(0.5)
    wait_for(folder / f"sample-{(saved_steps(folder)[-1] // 10 + 1) * 10}.png", last)
    last.send_signal(signal.SIGINT)
    out, err = last.communicate(timeout=120)
    assert last.returncode == 130, err
    assert not list(folder.glob(".*"))
    assert steps_recorded(folder) == list(range(1, saved_steps(folder)[-1] + 1))


@pytest.mark.parametrize("gone", ["reader", "terminal"])
def test_a_run_whose_terminal_is_gone_is_saved(tiny, tmp_path, gone):
    """A pipe that nobody reads, as after Ctrl-C on `train_mnist.py 2>&1 | tee log`, and a pseudo-terminal that is closed."""
    mine, its = os.pipe() if gone == "reader" else os.openpty()
    call = [sys.executable, str(ROOT / "train_mnist.py"), "--config_path", str(tiny), "--device", "cpu", *LONG]
    run = subprocess.Popen(call, cwd=tmp_path, stdout=its, stderr=its, start_new_session=True)
    os.close(its)
    folder = tmp_path / "output" / RUN
    wait_for(folder / "sample-10.png", run)
    os.close(mine)
    time.sleep(1)
    assert run.poll() is None  # the progress bar alone ends no run
    known = saved_steps(folder)[-1]
    run.send_signal(signal.SIGHUP)
    assert run.wait(timeout=120) == 128 + signal.SIGHUP
    assert saved_steps(folder)[-1] >= known  # the same, if the signal came while its picture was drawn
    assert not list(folder.glob(".*"))


def test_the_command_to_resume_leaves_out_what_began_the_run():
    argv = [
        "train_mnist.py",
        "--config_path",
        "a b.yaml",
        "training.seed=3",
        "--overwrite",
        "--resume_from=x.pt",
        "--seed",
        "1",
    ]
    argv += ["--load_model_weights_from_checkpoint", "y.pt"]
    expected = "python train_mnist.py --resume_from latest --config_path 'a b.yaml' training.seed=3 --seed 1"
    assert command_to_resume(argv) == expected
