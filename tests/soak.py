"""What takes too long for the test suite: `python tests/soak.py [kills] [disks] [processes]` (all of them by default).

kills      runs killed with SIGKILL, at any time and at any write, and resumed until they finish: 50 kills, at least 20 of
           them while a checkpoint was being written; every run ends with the undisturbed run's weights, bit for bit
disks      a file system of every size that is too small for a run (Linux, as root): one line, and what is there is whole;
           with more room, the run goes on
processes  one against two processes over 50 steps of edm_small.yaml, and the samples of one against three
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from subprocess import PIPE

import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from edm import checkpoint  # noqa: E402

CONFIG = """
data: {dataset: image_folder, root: images, resolution: 8, channels: 1}
network: {model_channels: 8, channel_mult: [1, 2], num_blocks: 1, attn_resolutions: [4], dropout: 0.1, label_dim: 2}
loss: {label_dropout: 0.2}
training: {num_training_steps: 24, batch_size: 4, learning_rate: 1e-3, lr_rampup_images: 8, save_and_sample_every_n: 3}
ema: {halflife_images: 100}
checkpoint: {keep_last: 3}
sampler: {num_samples: 2, sampling_steps: 2}
"""
RUN = "image/image_folder/tiny"
STEPS = 24
TRAIN = ROOT / "train_mnist.py"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

# A run that kills itself at its n-th write, flush, renaming or deletion of a file in its folder.
KILLED = """
import os, pathlib, runpy, signal, sys
countdown = int(sys.argv.pop(1))

def counted(function):
    def call(*args, **kwargs):
        global countdown
        countdown -= 1
        if countdown == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call

from edm import checkpoint
places = [(checkpoint.Summed, "write"), (os, "fsync"), (os, "replace"), (pathlib.Path, "replace"), (pathlib.Path, "unlink")]
for place, name in places:
    setattr(place, name, counted(getattr(place, name)))
sys.argv[0] = "train_mnist.py"
runpy.run_path(TRAIN, run_name="__main__")
"""


def prepare() -> Path:
    """A folder with a config and a few images."""
    folder = Path(tempfile.mkdtemp(prefix="soak"))
    generator = torch.Generator().manual_seed(0)
    for index in range(13):
        (folder / "images" / "ab"[index % 2]).mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 255, (8, 8), generator=generator).byte()
        Image.fromarray(pixels.numpy()).save(folder / "images" / "ab"[index % 2] / f"{index}.png")
    (folder / "tiny.yaml").write_text(CONFIG)
    (folder / "killed.py").write_text(KILLED.replace("TRAIN", repr(str(TRAIN))))
    (folder / "output").mkdir()
    return folder


def command(*arguments: object) -> list[str]:
    return [sys.executable, *map(str, arguments), "--config_path", "tiny.yaml", "--device", "cpu"]


def run(folder: Path, *arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(command(*arguments), cwd=folder, env=ENVIRONMENT, capture_output=True, text=True)


def same(a: object, b: object) -> bool:
    """Whether two nests of dicts and tensors are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b


def undisturbed(folder: Path) -> dict:
    """The last checkpoint of a run that nothing disturbs."""
    assert run(folder, TRAIN).returncode == 0
    (folder / "output" / RUN / f"diffusion-{STEPS}.pt").rename(folder / "undisturbed.pt")
    shutil.rmtree(folder / "output" / "image")
    return checkpoint.read(folder / "undisturbed.pt")


def check(folder: Path, expected: dict) -> None:
    """Whether a finished run has left everything that it should, and nothing else."""
    left = folder / "output" / RUN
    assert same(checkpoint.read(left / f"diffusion-{STEPS}.pt"), expected)
    steps = [json.loads(line)["step"] for line in (left / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, STEPS + 1)), steps
    assert not [*left.glob(".*"), *left.glob("*.replaced*")]


def way_on(left: Path) -> list[str]:
    """What a user would say next: go on from what this run (seed 0) has saved, or else start it over another one's files."""
    newest = max(left.glob("diffusion-*.pt"), key=lambda path: int(path.stem.partition("-")[2]), default=None)
    if newest and checkpoint.read(newest)["config"]["training"]["seed"] == 0:
        return ["--resume_from", "latest"]
    return ["--overwrite"] if newest or list(left.glob("*.replaced*")) else []


def kills() -> None:
    folder = prepare()
    expected, rng = undisturbed(folder), random.Random(0)
    assert run(folder, TRAIN, "--seed", 1, "--num_training_steps", 30).returncode == 0
    (folder / "output").rename(folder / "another")
    left = folder / "output" / RUN
    killed = saving = finished = 0
    while killed < 50 or saving < 20 or left.exists():
        if not left.exists() and finished % 2:
            shutil.copytree(folder / "another", folder / "output")
        if killed % 2:
            code = run(folder, "killed.py", int(10 ** rng.uniform(0, 4)), *way_on(left)).returncode
        else:
            process = subprocess.Popen(command(TRAIN, *way_on(left)), cwd=folder, env=ENVIRONMENT, stdout=PIPE, stderr=PIPE)
            try:
                process.communicate(timeout=rng.uniform(2, 12))
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
            code = process.returncode
        assert code in (0, -signal.SIGKILL), code
        if code:
            killed += 1
            saving += any(left.glob(".diffusion*.tmp"))
        else:
            check(folder, expected)
            finished += 1
            shutil.rmtree(folder / "output")
        print(
            f"kills: {killed}, {saving} of them while a checkpoint was written; {finished} runs ended as if undisturbed",
            flush=True,
        )
    shutil.rmtree(folder)


def disks() -> None:
    if sys.platform != "linux" or os.geteuid() != 0:
        print("disks: not done; to mount small file systems takes Linux, and root")
        return
    folder = prepare()
    expected, messages, size = undisturbed(folder), {}, 4
    while True:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "none", folder / "output"], check=True)
        try:
            result = run(folder, TRAIN)
            if result.returncode == 0:
                break
            last = result.stderr.replace("\r", "\n").strip().splitlines()[-1]
            assert result.returncode == 2, result.stderr
            assert last.startswith("error: cannot write"), last
            assert "Traceback" not in result.stderr
            messages[re.sub(r"\d+", "N", last)] = size
            left = sorted((folder / "output" / RUN).glob("diffusion-*.pt"))
            for path in left:
                checkpoint.read(path)
            subprocess.run(["mount", "-o", "remount,size=100m", folder / "output"], check=True)
            again = run(folder, TRAIN, *(["--resume_from", "latest"] if left else []))
            assert again.returncode == 0, again.stderr
            check(folder, expected)
        finally:
            subprocess.run(["umount", folder / "output"], check=True)
        size += max(4, size // 3 // 4 * 4)
    print(f"disks: up to {size} kB, every one too small said so in one line and went on with more room:")
    print("\n".join(f"  {message} ({kilobytes} kB and less)" for message, kilobytes in messages.items()))
    shutil.rmtree(folder)


def processes() -> None:
    folder = prepare()
    train = ["--config_path", ROOT / "configs/edm_small.yaml", "data.dataset=digits", "network.dropout=0", "--device", "cpu"]
    train += ["--num_training_steps", 50, "sampler.num_samples=10"]

    def call(count: int, script: str, *arguments: object) -> None:
        launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={count}"] if count > 1 else []
        whole = [sys.executable, *launcher, ROOT / script, *arguments]
        subprocess.run([*map(str, whole)], cwd=folder, env=ENVIRONMENT, check=True, capture_output=True)

    losses = {}
    for count in (1, 2):
        call(count, "train_mnist.py", *train, "--output_dir", f"trained{count}")
        record = (folder / f"trained{count}/image/digits/edm_small/metrics.jsonl").read_text()
        losses[count] = [json.loads(line)["loss"] for line in record.splitlines()]
    difference = max(abs(a / b - 1) for a, b in zip(losses[1], losses[2], strict=True))
    print(f"processes: losses of 1 and 2 differ by {difference:.1e} at most over {len(losses[1])} steps")
    assert difference < 1e-5
    for count in (1, 3):
        seeds = ["--seeds", "0-49", "--save_images", "--device", "cpu", "--output_dir", f"sampled{count}"]
        call(count, "sample.py", "--checkpoint", ROOT / "assets/edm_small.pt", *seeds)
    images = [
        torch.stack([pil_to_tensor(Image.open(folder / f"sampled{count}/images/{seed:06d}.png")).int() for seed in range(50)])
        for count in (1, 3)
    ]
    grey_levels = (images[0] - images[1]).abs().max().item()
    print(f"processes: samples of 1 and 3 differ by {grey_levels} grey levels at most")
    assert grey_levels <= 1
    shutil.rmtree(folder)


if __name__ == "__main__":
    for name in sys.argv[1:] or ["kills", "disks", "processes"]:
        {"kills": kills, "disks": disks, "processes": processes}[name]()
