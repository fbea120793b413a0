"""Several processes as one run. torchrun is called as a user calls it, on the CPU."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TINY, steps_recorded, wait_for
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from edm import config as configs
from edm.augment import augment
from edm.checkpoint import saved_steps
from edm.data import batches
from edm.distributed import Processes
from edm.errors import UserError
from edm.training import train

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="torchrun is for Linux and macOS")
RUN = "output/image/image_folder/tiny"


@pytest.fixture
def plain(tmp_path, image_folder):
    """The tiny run without dropout, the only draw that is a process's own, and with everything else."""
    text = (
        TINY.replace("ROOT", str(image_folder)).replace("CHANNELS", "3").replace("dropout: 0.1", "dropout: 0, augment_dim: 9")
    )
    text = text.replace("channels: 3", "channels: 3, augment_probability: 0.5").replace("batch_size: 4", "batch_size: 7")
    (tmp_path / "tiny.yaml").write_text(text)
    return tmp_path / "tiny.yaml"


def torchrun(processes: int, tmp_path, script, *arguments: object, options=(), **popen) -> subprocess.Popen:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *options]
    target = ["-m", script] if script == "edm.evaluate" else [str(ROOT / script)]
    call = [*launcher, *target, *map(str, arguments), "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        call, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **popen
    )


def losses(folder) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


DOUBLE = """
import runpy, sys, torch
torch.set_default_dtype(torch.float64)
sys.argv[0] = "train_mnist.py"
runpy.run_path(ROOT, run_name="__main__")
"""


@pytest.mark.parametrize(("script", "parts", "tolerance"), [("train_mnist.py", 1, 1e-5), ("double.py", 7, 1e-10)])
def test_two_processes_train_like_one(plain, tmp_path, script, parts, tolerance):
    """The same losses over 50 steps, with shares of 4 and 3 images, augmentation and label dropout; and the same pictures."""
    (tmp_path / "double.py").write_text(DOUBLE.replace("ROOT", repr(str(ROOT / "train_mnist.py"))))
    path = ROOT / script if script == "train_mnist.py" else tmp_path / script
    arguments = [
        "--config_path",
        plain,
        "--num_training_steps",
        50,
        "--save_and_sample_every_n",
        50,
        f"training.accumulation={parts}",
    ]
    pair = torchrun(2, tmp_path, path, *arguments, "--output_dir", "two")
    out, err = pair.communicate(timeout=300)
    assert pair.returncode == 0, err
    assert out.count("Done: 50 steps") == 1  # one process speaks
    call = [sys.executable, path, *arguments, "--device", "cpu", "--output_dir", "one"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([*map(str, call)], cwd=tmp_path, check=True, capture_output=True, env=environment)
    one, two = (tmp_path / run / "image/image_folder/tiny" for run in ("one", "two"))
    assert losses(two) == pytest.approx(losses(one), rel=tolerance, abs=0)
    assert losses(two) != losses(one)  # they did divide the work
    pictures = [pil_to_tensor(Image.open(folder / "sample-50.png")).int() for folder in (one, two)]
    assert (pictures[0] - pictures[1]).abs().max() <= 1


def test_three_processes_sample_like_one(plain, tmp_path, script):
    train(configs.load(plain, ["training.num_training_steps=1"]), torch.device("cpu"), tmp_path / "output")
    arguments = ("--checkpoint", tmp_path / RUN / "diffusion-1.pt", "--seeds", "9,0-6", "--S_churn", 5)
    arguments += ("--save_images", "--gif", "--guidance", 1.5, "--batch_size", 2)
    three = torchrun(3, tmp_path, "sample.py", *arguments, "--output_dir", "three")
    out, err = three.communicate(timeout=300)
    assert three.returncode == 0, err
    assert out.count("8 single images in three/images\n") == 1
    assert script("sample.py", *arguments, "--output_dir", "one")[0] == 0
    names = [str(path.relative_to(tmp_path / "one")) for path in (tmp_path / "one").rglob("*.*")]
    assert len(names) == 8 + 2
    for name in names:
        one, other = (pil_to_tensor(Image.open(tmp_path / run / name)).int() for run in ("one", "three"))
        assert (one - other).abs().max() <= 1


def workers(agent: int) -> list[int]:
    """The processes that torchrun has started, by rank."""
    listed = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(agent)], capture_output=True, text=True).stdout
    return [int(line.split()[0]) for line in listed.splitlines() if "train_mnist.py" in line]


@pytest.mark.skipif(sys.platform == "darwin", reason="ps has other options")
def test_a_worker_that_dies_and_signals(plain, tmp_path):
    """torchrun restarts the run, --overwrite and all, from its last checkpoint; SIGTERM, to one process or to torchrun, stops
    them all after the same step, with another one."""
    arguments = ["--config_path", plain, "--num_training_steps", 10**6, "--save_and_sample_every_n", 20, "--overwrite"]
    train(configs.load(plain, ["training.seed=5"]), torch.device("cpu"), tmp_path / "output")  # to be overwritten
    run = torchrun(2, tmp_path, "train_mnist.py", *arguments, options=["--max_restarts=2"])
    folder = tmp_path / RUN
    wait_for(folder / "sample-20.png", run)  # and now it steps on
    for number in (signal.SIGKILL, signal.SIGTERM):
        os.kill(workers(run.pid)[1], number)
        time.sleep(1)
        wait_for(folder / f"sample-{(saved_steps(folder)[-1] // 20 + 3) * 20}.png", run)
    run.send_signal(signal.SIGTERM)
    out, err = run.communicate(timeout=120)
    assert run.returncode != 0  # torchrun's own word for a signal
    assert err.count("process 0 of 2 has lost the others") == 1, err
    assert out.count("Going on from output/image/image_folder/tiny/diffusion-") == 2
    assert out.count("Stopped after step") == 2
    assert "torchrun --nproc_per_node=2 " in out
    assert not list(folder.glob("*.replaced*"))
    steps = steps_recorded(folder)
    assert steps == list(range(1, len(steps) + 1))
    assert (folder / f"diffusion-{len(steps)}.pt").exists()


def test_what_is_wrong_is_said_once(plain, tmp_path):
    run = torchrun(2, tmp_path, "train_mnist.py", "--config_path", plain, "--resume_from", "none.pt")
    _, err = run.communicate(timeout=120)
    assert run.returncode != 0
    assert err.count("error: ") == err.count("error: there is no checkpoint none.pt\n") == 1
    assert 'train_mnist.py", line' not in err


def test_shares_are_a_partition_of_the_batch():
    for size in (1, 2, 3, 7):
        for count in range(size, 20):
            shares = [range(count)[Processes(rank, size).share(count)] for rank in range(size)]
            assert [place for share in shares for place in share] == list(range(count))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_batches_and_augmentation_are_divided_by_place(image_folder):
    from edm.data import open_dataset

    dataset = open_dataset("image_folder", str(image_folder), 8, 3, 2)

    def batch(processes, megabytes):
        return next(batches(dataset, 7, 0, 3, torch.device("cpu"), megabytes, processes))

    whole = batch(None, 1)
    for megabytes in (1, 0):
        parts = [batch(Processes(rank, 3), megabytes) for rank in range(3)]
        assert all(torch.equal(torch.cat(ours), theirs) for ours, theirs in zip(zip(*parts), whole))
    images = whole[0].float() / 127.5 - 1

    def augmented(part, **place):
        return augment(part, 0.9, torch.Generator().manual_seed(0), **place)

    expected = augmented(images)
    shares = [Processes(rank, 3).share(7) for rank in range(3)]
    parts = [augmented(images[share], batch_size=7, mine=share) for share in shares]
    for ours, theirs in zip(zip(*parts), expected):
        torch.testing.assert_close(torch.cat(ours), theirs)


def test_fewer_images_than_processes_are_refused(plain, tmp_path):
    with pytest.raises(UserError, match="7 images cannot be divided between 8 processes"):
        train(configs.load(plain), torch.device("cpu"), tmp_path, processes=Processes(0, 8))


def test_gpus_are_one_for_each_process(monkeypatch):
    from edm.distributed import own_gpu

    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", lambda device: None)
    assert own_gpu("cuda", local_rank=1, local_size=2) == torch.device("cuda", 1)
    with pytest.raises(UserError, match="3 processes are more than this machine's 2 GPUs"):
        own_gpu(None, local_rank=0, local_size=3)
    with pytest.raises(UserError, match="'cuda:1' cannot be one for all"):
        own_gpu("cuda:1", local_rank=0, local_size=2)
