"""What the tests share. pytest imports test files on their own, so all of it is fixtures, many of them functions."""

import contextlib
import functools
import http.server
import itertools
import json
import math
import os
import runpy
import shutil
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # here and in every process that a test starts: several tests run at once
os.environ.pop("PYTHONUNBUFFERED", None)  # streams are buffered, as users' are

import pytest
import torch
from PIL import Image
from torch import nn

import train_mnist
from edm.ddpm import Chain
from edm.exact import GaussianMixture
from edm.precond import PreconditionedDenoiser, iDDPMPreconditioning
from edm.sampler import State
from lab import checkpoint
from lab.distributed import World
from lab.learner import Learner
from tests import pretended_gpu as pretended

ROOT = Path(__file__).parents[1]

TINY = """
data: {dataset: image_folder, root: ROOT, resolution: 8, channels: CHANNELS}
network: {model_channels: 8, channel_mult: [1, 2], num_blocks: 1, attn_resolutions: [4], dropout: 0.1, label_dim: 2}
loss: {label_dropout: 0.2}
training: {num_training_steps: 6, batch_size: 4, learning_rate: 1e-3, lr_rampup_images: 8, save_and_sample_every_n: 3}
ema: {halflife_images: 100}
sampler: {num_samples: 4, sampling_steps: 3}
"""


def shared(function):
    """Make a function of this file a fixture of its own name, for the tests that take it as an argument."""
    globals()[f"{function.__name__}_fixture"] = pytest.fixture(scope="session", name=function.__name__)(lambda: function)
    return function


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip the tests marked `gpu` where there is no GPU."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("there is no CUDA GPU")


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the repository."""
    return ROOT


def make_images(folder: Path) -> Path:
    """Write two classes of colour images of 10x12 pixels: seven dark ones, six light ones."""
    generator = torch.Generator().manual_seed(0)
    for index in range(13):
        name = "dark" if index < 7 else "light"
        (folder / name).mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(0, 40, (12, 10, 3), generator=generator) + (0 if index < 7 else 200)
        Image.fromarray(pixels.byte().numpy()).save(folder / name / f"{index:02d}.png")
    return folder


def make_config(folder: Path, images: Path, channels: int) -> Path:
    """Write the config of a run that takes a second: six steps, checkpoints and sample grids after 3 and 6."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tiny.yaml"
    path.write_text(TINY.replace("ROOT", str(images)).replace("CHANNELS", str(channels)))
    return path


@pytest.fixture
def image_folder(tmp_path) -> Path:
    """A folder of two classes of colour images, 7 in `dark` and 6 in `light`; a test may change it."""
    return make_images(tmp_path / "images")


@pytest.fixture
def tiny(tmp_path, image_folder) -> Path:
    """The config file of a run on `image_folder` in colour, which takes a second: tmp_path / "tiny.yaml"."""
    return make_config(tmp_path, image_folder, channels=3)


@pytest.fixture
def tiny_grey(tmp_path, image_folder) -> Path:
    """The same run in grey: tmp_path / "grey" / "tiny.yaml"."""
    return make_config(tmp_path / "grey", image_folder, channels=1)


@pytest.fixture
def mnist_folder(tmp_path) -> Path:
    """MNIST in a few bytes: 20 training images, image i an even grey of 10 i and of class i % 10; in reverse as test images."""
    folder = tmp_path / "mnist" / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for split, places in (("train", range(20)), ("t10k", range(19, -1, -1))):
        sizes = b"".join(size.to_bytes(4, "big") for size in (20, 28, 28))
        pixels = b"".join(bytes([10 * place]) * 28 * 28 for place in places)
        (folder / f"{split}-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03" + sizes + pixels)
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + sizes[:4] + bytes(place % 10 for place in places))
    return tmp_path / "mnist"


def train_in(output_dir: Path, config_path: Path, *arguments: object, world: World | None = None, device: str = "cpu") -> Path:
    """Call train_mnist.py's `main` on a device, as one process of `world`; returns the run's folder."""
    argv = ["train_mnist.py", "--config_path", config_path, "--output_dir", output_dir, *arguments]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(argument) for argument in argv])
        patch.setattr(train_mnist, "distributed", lambda name: contextlib.nullcontext((torch.device(device), world or World())))
        train_mnist.main()
    return next(Path(output_dir).glob(f"image/*/{Path(config_path).stem}"))


@pytest.fixture
def train(tmp_path, monkeypatch):
    """train(config_path, *arguments, output="output", world=World(), device="cpu") -> the run's folder, in tmp_path / output.

    Errors of train_mnist.py are raised. Drawing loss.png takes longer than all the rest, so it is a stand-in.
    """
    monkeypatch.setattr("lab.run.pictures.save_loss_curve", lambda path, *losses: path.write_bytes(b"a curve"))

    return lambda config_path, *arguments, output="output", **where: train_in(
        tmp_path / output, config_path, *arguments, **where
    )


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """The checkpoint `diffusion-6.pt` of the `tiny` run (colour, two classes), beside all else that the run left. Read-only."""
    folder = tmp_path_factory.mktemp("trained")
    config_path = make_config(folder, make_images(folder / "images"), channels=3)
    return train_in(folder / "output", config_path) / "diffusion-6.pt"


@shared
def last(folder: Path) -> dict:
    """Return the contents of a run's newest checkpoint."""
    return checkpoint.load(checkpoint.checkpoint_path(folder, checkpoint.saved_steps(folder)[-1]))


@shared
def steps_recorded(folder: Path) -> list[int]:
    """Return the steps in a run's metrics.jsonl."""
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@shared
def same(a: object, b: object) -> bool:
    """Return whether two nests of dicts, lists, tensors and numbers are equal bit for bit; nan equals nan."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.fixture
def at_step(monkeypatch):
    """at_step(3, action) calls action(learner) in training step 3, when the gradients are known and the weights still old."""

    def plan(when: int, action) -> None:
        optimizer_step = Learner.optimizer_step

        def step(learner: Learner, images_seen: int) -> None:
            if images_seen == when * learner.config.training.batch_size:
                action(learner)
            optimizer_step(learner, images_seen)

        monkeypatch.setattr(Learner, "optimizer_step", step)

    return plan


@pytest.fixture
def script(tmp_path, monkeypatch, capsys):
    """script("sample.py", "--seeds", 0) -> (exit code, stdout, stderr): a script, called here in the folder tmp_path.

    Modules go by their files, such as "lab/evaluate.py". There is no GPU, so that images can be compared bit for bit.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", functools.cache(lambda: False))  # torch._dynamo looks into it

    def call(name: str, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            runpy.run_path(str(ROOT / name), run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def start(tmp_path):
    """start("train_mnist.py", *arguments, torchrun=2) -> a `Popen` in the folder tmp_path, without GPUs; it ends with the test.

    `torchrun` is the number of processes, 0 to start the script itself; `options` are torchrun's own.
    """
    processes = []

    def call(name: str, *arguments: object, torchrun: int = 0, options: tuple[str, ...] = (), **popen) -> subprocess.Popen:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={torchrun}", *options]
        command = [sys.executable, *launcher * bool(torchrun), str(ROOT / name), *map(str, arguments)]
        popen = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **popen}
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
        processes.append(subprocess.Popen(command, cwd=tmp_path, env=environment, **popen))
        return processes[-1]

    yield call
    for process in processes:
        process.terminate()  # torchrun ends its workers
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=30)
        process.kill()
        process.communicate()


# Browsers. Their fixtures end with a file of tests, as nothing that runs an event loop of its own can run beside Playwright.


@pytest.fixture(scope="module")
def browser():
    """A Chromium that Playwright drives."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("there is no Chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        """Print nothing."""


@pytest.fixture(scope="module")
def serve():
    """serve(folder): the address of a web server of this folder."""
    with contextlib.ExitStack() as servers:

        def serve(folder: Path) -> str:
            handler = functools.partial(QuietHandler, directory=folder)
            server = servers.enter_context(http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler))
            servers.callback(server.shutdown)
            threading.Thread(target=server.serve_forever, daemon=True).start()
            return f"http://127.0.0.1:{server.server_port}/"

        yield serve


@pytest.fixture
def pretended_gpu():
    """pretended_gpu((7, 5)) -> a context in which there is a CUDA GPU of this compute capability (tests/pretended_gpu.py)."""
    if not pretended.SUPPORTED:
        pytest.skip(f"PyTorch {torch.__version__} cannot pretend that there is a GPU")
    return pretended.pretended_gpu


@shared
def assert_close(actual: torch.Tensor, expected: torch.Tensor | list | float, tolerance: float = 1e-9) -> None:
    """Assert that |difference| <= tolerance (1 + |expected|), element by element."""
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


@shared
def wave(*shape: int, scale: float, frequency: float, phase: float) -> torch.Tensor:
    """Return scale sin(frequency i + phase) over the elements i of a float64 tensor."""
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    return (scale * torch.sin(frequency * i + phase)).reshape(shape)


@shared
@torch.no_grad()
def fill(net: nn.Module) -> nn.Module:
    """Give every parameter the value that follows from its name and shape, and return the network, now in float64."""
    net.double()
    frequencies = [(name, buffer) for name, buffer in net.named_buffers() if name.endswith("freqs")]
    for name, parameter in [*net.named_parameters(), *frequencies]:
        s = wave(*parameter.shape, scale=1, frequency=0.61803398875, phase=(zlib.crc32(name.encode()) % 10007) / 100)
        matrix = math.sqrt(2 * parameter.shape[0] / parameter.numel()) * s
        vector = 2 * s if name.endswith("freqs") else 0.1 * s if name.endswith("bias") else 1 + 0.1 * s
        value = vector if parameter.ndim == 1 else matrix
        parameter.copy_(value.float())
    return net


@shared
def two_peaks(x: torch.Tensor, sigma: float, labels: torch.Tensor | None = None) -> torch.Tensor:
    """Return the exact D(x; sigma) for data that is N(+-0.5, 0.2^2) in every pixel."""
    q = 0.04 + sigma**2
    return 0.04 / q * x + sigma**2 / q * 0.5 * torch.tanh(0.5 * x / q)


@shared
def fresh_noise(like: torch.Tensor):
    """Return noise(), whose k-th call returns sqrt(2) sin(0.9 i + 1.3 k)."""
    calls = itertools.count(1)
    return lambda: wave(*like.shape, scale=math.sqrt(2), frequency=0.9, phase=1.3 * next(calls))


class StandIn(nn.Module):
    """The network behind improved_ddpm.json: it returns epsilon, and for two outputs v."""

    def __init__(self, outputs: int):
        super().__init__()
        self.outputs, self.weight = outputs, nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x, t, labels=None, augment_labels=None):
        t = t[:, None, None, None] / 1000
        epsilon = 0.9 * x * (0.2 + t) + 0.1 * torch.sin(3 * x)
        return self.weight * torch.cat([epsilon, torch.tanh(0.5 * x + t)], dim=1)[:, : self.outputs]


@shared
def stand_in(chain: Chain, outputs: int = 2) -> PreconditionedDenoiser:
    """Return the stand-in network as a denoiser on a chain."""
    return PreconditionedDenoiser(StandIn(outputs), iDDPMPreconditioning(chain.levels, outputs))


@shared
def final(states: Iterator[State]) -> torch.Tensor:
    """Return the images that a sampler ends with."""
    *_, state = states
    return state.x


@shared
def normal_noise(*shape: int, seed: int = 0):
    """Return noise(), which returns new float64 noise of unit variance."""
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(shape, generator=generator, dtype=torch.float64)


@shared
def impulses(calls: int, size: int):
    """Return noise(), from which the covariance of a sampler's images follows exactly, without a random number.

    With the exact denoiser of Gaussian data of mean 0 the images are linear in all noise, the latents included. In a batch of
    calls x size images of `size` pixels in a row, each number that the calls return for one image is 1 in one image and 0 in
    the others. The images x (B, size) of noise of unit variance have the covariance x^T x.
    """
    numbers = iter(torch.eye(calls * size, dtype=torch.float64).view(calls * size, calls, 1, 1, size).unbind(dim=1))
    return lambda: next(numbers)


@shared
def correlated(k: int, d: int, seed: int = 0) -> GaussianMixture:
    """Return a mixture of k Gaussians of d pixels with covariances of any shape, the last of them singular."""
    generator = torch.Generator().manual_seed(seed)
    factors = 0.5 * torch.randn(k, d, d, generator=generator, dtype=torch.float64)
    factors[-1, :, 0] = 0
    means = torch.randn(k, d, generator=generator, dtype=torch.float64)
    return GaussianMixture(means, factors @ factors.mT, torch.rand(k, generator=generator) + 0.5)
