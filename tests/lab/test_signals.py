"""Runs that are asked to stop: nothing is lost, and the result does not change."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lab import checkpoint, generate, pictures
from lab.checkpoint import saved_steps
from lab.cli import UserError
from lab.distributed import World
from lab.run import command_to_resume

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP] if hasattr(signal, "SIGHUP") else [signal.SIGINT, signal.SIGTERM]
RUN = "image/image_folder/tiny"
LONG = ("--num_training_steps", 10**6, "--save_and_sample_every_n", 10, "checkpoint.keep_last=2")


@pytest.fixture(autouse=True)
def as_from_a_terminal():
    """Restore stdout and stderr, which a run closes at SIGHUP; and begin as if nohup had not started the tests."""
    before, streams = [(number, signal.getsignal(number)) for number in SIGNALS], (os.dup(1), os.dup(2))
    for number in SIGNALS[1:]:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number, handler in before:
        signal.signal(number, handler)
    for stream, descriptor in zip(streams, (1, 2)):
        os.dup2(stream, descriptor)
        os.close(stream)


def send(number: int):
    return lambda learner: os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "step"), [*zip(SIGNALS, (4, 3, 5))])
def test_a_signal_ends_a_run_after_the_step(train, tiny, tmp_path, trained, same, at_step, capsys, number, step):
    """With a checkpoint; a sample grid that was due is left to the run that goes on, whose result is an undisturbed run's."""
    at_step(step, send(number))
    with pytest.raises(SystemExit) as stop:
        train(tiny)
    assert stop.value.code == 128 + number
    output = tmp_path / "output"
    command = f"python train_mnist.py --resume_from latest --config_path {tiny} --output_dir {output}"
    assert f"Stopped after step {step}. To go on:\n  {command}\n" in capsys.readouterr().out
    folder = output / RUN
    assert saved_steps(folder) == sorted({3, step})
    assert (folder / "sample-3.png").exists() == (step > 3)
    at_step(step, lambda learner: pytest.fail("a step is done again"))
    train(tiny, "--resume_from", "latest")
    assert (folder / "sample-3.png").exists()
    assert same(checkpoint.load(folder / "diffusion-6.pt") | {"config": 0}, checkpoint.load(trained) | {"config": 0})
    assert (folder / "metrics.jsonl").read_text() == trained.with_name("metrics.jsonl").read_text()


def test_a_signal_that_comes_while_the_ranks_agree_ends_the_next_step(train, tiny, tmp_path, at_step, monkeypatch):
    def all_reduce_max(world: World, number: int) -> int:
        while signals:
            os.kill(os.getpid(), signals.pop())
        return number

    signals = []
    monkeypatch.setattr(World, "all_reduce_max", all_reduce_max)
    at_step(4, lambda learner: signals.append(signal.SIGTERM))
    with pytest.raises(SystemExit) as stop:
        train(tiny)
    assert stop.value.code == 143
    assert saved_steps(tmp_path / "output" / RUN) == [3, 5]


def test_a_second_signal_ends_the_process_at_once(train, tiny, tmp_path, at_step, monkeypatch):
    """Unless it comes together with the first: torchrun and timeout send a signal twice."""
    now = [100.0]
    monkeypatch.setattr("lab.run.time.monotonic", lambda: now[0])
    monkeypatch.setattr(os, "_exit", sys.exit)

    def signals(learner):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        now[0] += 1
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("the process goes on")

    at_step(2, signals)
    with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)):
        train(tiny)
    assert saved_steps(tmp_path / "output" / RUN) == []


def test_a_signal_that_comes_while_samples_are_drawn_ends_the_drawing(train, tiny, tmp_path, trained, same, monkeypatch):
    """The run that goes on draws them, and its result is an undisturbed run's."""
    build_sampler, drawn, folder, resume = generate.build_sampler, [], tmp_path / "output" / RUN, ()

    def build(config):
        def sampler(*arguments):
            for state in build_sampler(config)(*arguments):
                drawn.append(state)
                if len(drawn) in (1, 2, 6):  # sampling steps; a grid takes three
                    os.kill(os.getpid(), signal.SIGTERM)
                yield state

        return sampler

    monkeypatch.setattr(generate, "build_sampler", build)
    for count, step in ((1, 3), (2, 3), (6, 6)):  # while a run draws, while it draws what was left to it, at its end
        with pytest.raises(SystemExit, match="143"):
            train(tiny, *resume)
        resume = ("--resume_from", "latest")
        assert (len(drawn), saved_steps(folder)[-1]) == (count, step)
        assert not (folder / f"sample-{step}.png").exists()
    train(tiny, *resume)
    assert len(drawn) == 9
    assert same(checkpoint.load(folder / "diffusion-6.pt") | {"config": 0}, checkpoint.load(trained) | {"config": 0})
    for name in ("sample-3.png", "sample-6.png", "metrics.jsonl"):
        assert (folder / name).read_bytes() == trained.with_name(name).read_bytes()


def test_ctrl_c_while_a_picture_is_drawn_waits_for_its_end():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # even if these tests were started with "&"
    drawn = []
    with pytest.raises(KeyboardInterrupt), pictures.style():
        with pictures.style():
            signal.raise_signal(signal.SIGINT)
        drawn.append("all of it")
    assert drawn == ["all of it"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("command", ["train_mnist.py", "sample.py", "-m lab.evaluate", "-m lab.gallery"])
def test_ctrl_c_while_modules_are_imported_is_no_traceback(command, root, tmp_path):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # even if these tests were started with "&"
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"}
    command = [sys.executable, *command.split()]
    ended = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (-signal.SIGINT, "")


def test_handlers_are_those_of_before_when_a_run_is_over_and_nohup_is_respected(train, tiny, at_step):
    signal.signal(SIGNALS[-1], signal.SIG_IGN)
    before = [signal.getsignal(number) for number in SIGNALS]
    at_step(1, send(SIGNALS[-1]))
    assert saved_steps(train(tiny)) == [3, 6]
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_the_command_to_resume_leaves_out_what_began_the_run():
    argv = ["train_mnist.py", "--config_path", "a b.yaml", "training.seed=3", "--overwrite", "--resume_from=x.pt"]
    argv += ["--seed", "1", "--load_model_weights_from_checkpoint", "y.pt"]
    expected = "python train_mnist.py --resume_from latest --config_path 'a b.yaml' training.seed=3 --seed 1"
    assert command_to_resume(argv) == expected


def wait_for(path: Path, process: subprocess.Popen) -> None:
    """Wait until a process has made a file, or fail with what it has said."""
    end = time.monotonic() + 120
    while not path.exists():
        if process.poll() is not None or time.monotonic() > end:
            process.terminate()
            pytest.fail(f"there is no {path}: {process.communicate(timeout=60)}")
        time.sleep(0.05)


def test_the_command_that_is_printed_goes_on(start, train, tiny, tmp_path, steps_recorded):
    """Processes as a user starts and stops them; and no second one trains in the same folder."""
    folder = tmp_path / "output" / RUN
    run = start("train_mnist.py", "--config_path", tiny, *LONG)
    wait_for(folder / "sample-10.png", run)
    with pytest.raises(UserError, match=r"another run is training in .*; wait for it, stop it, or"):
        train(tiny, "--overwrite")
    run.send_signal(signal.SIGTERM)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 143
    assert "Stopping after this step" in err
    stopped = int(re.search(r"Stopped after step (\d+)", out)[1])
    assert saved_steps(folder)[-1] == stopped

    # Ctrl-C on `... 2>&1 | tee log` ends the reader of the pipe as well, but what was trained is saved.
    reader, writer = os.pipe()
    python, name, *arguments = shlex.split(out.splitlines()[-1])
    assert (python, arguments[:2]) == ("python", ["--resume_from", "latest"])
    run = start(name, *arguments, stdout=writer, stderr=writer)
    os.close(writer)
    due = (stopped // 10 + 1) * 10
    wait_for(folder / f"sample-{due}.png", run)
    os.close(reader)
    run.send_signal(signal.SIGINT)
    assert run.wait(timeout=60) in (130, 141)  # 141: the last words could not be printed
    steps = steps_recorded(folder)
    assert steps == list(range(1, len(steps) + 1))
    assert saved_steps(folder)[-1] == len(steps) >= due
