"""What the tests share: a tiny data set, a tiny run, and a way to call the scripts as a user does."""

import functools
import json
import os
import runpy
import subprocess
import sys
import time
import types
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # here and in every script that a test starts: several tests run at once
os.environ.pop("PYTHONUNBUFFERED", None)  # streams are buffered, as users' are

import pytest
import torch
from PIL import Image

from edm.learner import Learner

ROOT = Path(__file__).parents[1]

TINY = """
data: {dataset: image_folder, root: ROOT, resolution: 8, channels: CHANNELS}
network: {model_channels: 8, channel_mult: [1, 2], num_blocks: 1, attn_resolutions: [4], dropout: 0.1, label_dim: 2}
loss: {label_dropout: 0.2}
training: {num_training_steps: 6, batch_size: 4, learning_rate: 1e-3, lr_rampup_images: 8, save_and_sample_every_n: 3}
ema: {halflife_images: 100}
sampler: {num_samples: 4, sampling_steps: 3}
"""


@pytest.fixture
def image_folder(tmp_path) -> Path:
    """Two classes of colour images: seven dark ones, six bright ones."""
    generator = torch.Generator().manual_seed(0)
    for index in range(13):
        folder = tmp_path / "images" / ("dark" if index < 7 else "light")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 40, (12, 10, 3), generator=generator) + (0 if index < 7 else 200)
        Image.fromarray(pixels.byte().numpy()).save(folder / f"{index:02d}.png")
    return tmp_path / "images"


@pytest.fixture(params=[1, 3], ids=["grey", "colour"])
def tiny(request, tmp_path, image_folder) -> Path:
    """The config file of a run that takes a second."""
    return write_config(tmp_path, image_folder, channels=request.param)


def write_config(tmp_path, image_folder, channels: int) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY.replace("ROOT", str(image_folder)).replace("CHANNELS", str(channels)))
    return path


@pytest.fixture
def script(tmp_path, monkeypatch, capsys):
    """Call a script in a folder of its own: script("sample.py", "--seeds", "0") -> (exit code, stdout, stderr).
    Everything runs on the CPU unless the call says otherwise, so that images can be compared bit for bit."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", functools.cache(lambda: False))  # torch._dynamo looks into it

    def call(name: str, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        code = 0
        try:
            runpy.run_path(str(ROOT / name), run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def authors_module(monkeypatch):
    """The module that the authors' pickles name; the reader must not import it."""
    from authors import reconstruct

    module = types.ModuleType("torch_utils.persistence")
    reconstruct.__module__, reconstruct.__qualname__ = "torch_utils.persistence", "_reconstruct_persistent_obj"
    module._reconstruct_persistent_obj = reconstruct
    monkeypatch.setitem(sys.modules, "torch_utils", types.ModuleType("torch_utils"))
    monkeypatch.setitem(sys.modules, "torch_utils.persistence", module)


@pytest.fixture
def at_step(monkeypatch):
    """at_step(3, action) has a run do something at the end of a training step."""

    def plan(when: int, action) -> None:
        step_of = Learner.step

        def step(learner, images, labels, number):
            loss = step_of(learner, images, labels, number)
            return action(loss) if number == when else loss

        monkeypatch.setattr(Learner, "step", step)

    return plan


def send(number: int):
    """An action: send this process a signal."""

    def action(loss):
        os.kill(os.getpid(), number)
        return loss

    return action


def wait_for(path: Path, process: subprocess.Popen, seconds: float = 120) -> None:
    """Wait until a process has made a file; if it does not, end it, and fail with what it has said."""
    end = time.monotonic() + seconds
    while not path.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    if not path.exists():
        process.terminate()
        pytest.fail(f"there is no {path}: {process.communicate(timeout=60)}")


def steps_recorded(folder) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
