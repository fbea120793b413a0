"""How close training and sampling come to what the machine can do:

    python benchmarks/throughput.py [--config_path configs/edm.yaml] [options] [section.key=value ...]

Rates are in FLOP/s, a multiply-add counted as two, a training step as three forward passes. They stand beside those of a large
matrix product and a large convolution (forward, and with both gradients) in the same precision, which are timed again in every
repeat, as machines change their pace. All figures are medians over the repeats.
"""

import contextlib
import gc
import json
import math
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median

try:
    import resource
except ImportError:  # Windows
    resource = None

BEGAN = time.perf_counter()
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from edm import config as configs  # noqa: E402
from edm.cli import Parser, run, whole_number  # noqa: E402
from edm.compiling import is_compiled  # noqa: E402
from edm.config import Config  # noqa: E402
from edm.data import batches, open_dataset  # noqa: E402
from edm.device import autocast_dtype, explain_out_of_memory, keep_memory, pick_device, wait_for  # noqa: E402
from edm.files import write_whole  # noqa: E402
from edm.generate import build_denoiser, generate  # noqa: E402
from edm.learner import Learner  # noqa: E402

IMPORTS = time.perf_counter() - BEGAN


def seconds(device: torch.device, action: Callable[[], object]) -> float:
    """How long an action takes on the device, by the GPU's own clock on CUDA."""
    wait_for(device)
    if device.type == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        action()
        events[1].record()
        wait_for(device)
        return events[0].elapsed_time(events[1]) / 1000
    began = time.perf_counter()
    action()
    wait_for(device)
    return time.perf_counter() - began


class Yardsticks:
    """A large matrix product and a large convolution, in the precision that is measured."""

    def __init__(self, device: torch.device, precision: torch.dtype):
        size, count = (8192, 512) if device.type == "cuda" else (2048, 64)
        a, b = (torch.randn(size, size, device=device, dtype=precision) for _ in range(2))
        x = torch.randn(count, 256, 16, 16, device=device, dtype=precision).contiguous(memory_format=torch.channels_last)
        convolution = torch.nn.Conv2d(256, 256, 3, padding=1, device=device, dtype=precision)
        convolution.to(memory_format=torch.channels_last)
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        inputs = [leaf, *convolution.parameters()]
        flops = 2 * x.numel() * 256 * 9
        self.device, self.precision = device, precision
        self.megabytes = torch.cuda.memory_allocated(device) / 1e6 if device.type == "cuda" else 0
        self.actions = {
            "matmul": (2 * size**3, lambda: a @ b),
            "convolution": (flops, torch.no_grad()(lambda: convolution(x))),
            "convolution and gradients": (3 * flops, lambda: torch.autograd.grad(convolution(leaf), inputs, x)),
        }

    def rates(self) -> dict[str, float]:
        """FLOP/s of each."""
        times = 10 if self.device.type == "cuda" else 1  # in a row, as launching one takes a while
        return {
            name: times * flops / seconds(self.device, lambda action=action: [action() for _ in range(times)])
            for name, (flops, action) in self.actions.items()
        }


def measured(action: Callable[[], object], flops: float, images: int, yardsticks: Yardsticks, repeats: int) -> dict:
    """A row of the table: what an action of so many FLOP on so many images achieves."""
    device = yardsticks.device
    reset_peak_memory(device)
    action()
    row = {"peak_mb": peak_memory(device) - yardsticks.megabytes}
    times, rates = [], []
    yardsticks.rates()
    for _ in range(repeats):
        rates.append(yardsticks.rates())
        times.append(seconds(device, action))
    row |= {"ms": 1000 * median(times), "images_per_s": images / median(times), "tflop_per_s": flops / median(times) / 1e12}
    for name in yardsticks.actions:
        peak, key = median(rate[name] for rate in rates), name.replace(" ", "_")
        row |= {f"{key}_tflop_per_s": peak / 1e12, f"percent_of_{key}": 100 * flops / median(times) / peak}
    return row


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the highest resident size


def peak_memory(device: torch.device) -> float:
    """In MB: on CUDA the most that tensors have taken up since the last reset, elsewhere the highest resident size of the whole
    process (since the last reset on Linux, ever on macOS; nan on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    if Path("/proc/self/status").exists():
        return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6 if resource else math.nan


def forget() -> None:
    """Let go of the networks before, and of what was compiled for them."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def forward_flops(config: Config) -> int:
    """Of one evaluation of the network on one image."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        build_denoiser(config)(torch.zeros(1, config.data.channels, *2 * [config.data.resolution]), 1.0)
    return counter.get_total_flops()


def training(config: Config, device: torch.device, yardsticks: Yardsticks, repeats: int) -> tuple[dict, dict]:
    """The row of training steps, and the parts' shares in one."""
    data, batch_size = config.data, config.training.batch_size
    if device.type == "cpu":
        keep_memory()
    dataset = open_dataset(data.dataset, data.root, data.resolution, data.channels, config.network.label_dim)
    stream = batches(dataset, batch_size, 0, 0, device, data.max_resident_mb)
    next(stream)
    forget()
    began, step = time.perf_counter(), 1
    learner = Learner(config, device)
    learner.compile(10**9, None)
    steps = 10 if device.type == "cuda" else 1  # in a row, as a GPU need not wait for Python between them

    def train() -> None:
        nonlocal step
        for _ in range(steps):
            step += 1
            learner.step(*next(stream), step)

    learner.step(*next(stream), 1)
    wait_for(device)
    first = time.perf_counter() - began
    row = measured(train, 3 * steps * batch_size * forward_flops(config), steps * batch_size, yardsticks, repeats)
    row = {"what": "training", "batch": batch_size, "compiled": is_compiled(learner.net.model), "first_s": first, **row}
    row["ms"] /= steps
    return row, shares(learner, stream, repeats)


def shares(learner: Learner, stream: Iterable, repeats: int) -> dict:
    """What part of a training step each of its parts takes, in percent, when they wait for each other."""
    device, batch_size, now = learner.device, learner.config.training.batch_size, {}
    parts = {
        "data": lambda: now.update(batch=next(stream)),
        "draws": lambda: now.update(drawn=learner.parts(learner.draw(*now["batch"], 1))),
        "forward": lambda: now.update(loss=learner.forward(learner.net, **now["part"])[0]),
        "backward": lambda: learner.scaler.scale(now["loss"]).backward(),
        "optimizer": lambda: learner.update(10**6, batch_size),
        "ema": lambda: learner.ema.update(10**6, batch_size),
    }
    times = {name: [] for name in parts}
    for _ in range(repeats):
        learner.optimizer.zero_grad(set_to_none=True)
        took = {name: seconds(device, parts[name]) for name in ("data", "draws")} | {"forward": 0.0, "backward": 0.0}
        for part in now["drawn"]:
            now["part"] = part
            for name in ("forward", "backward"):
                took[name] += seconds(device, parts[name])
        took |= {name: seconds(device, parts[name]) for name in ("optimizer", "ema")}
        took["optimizer"] = max(took["optimizer"] - took["ema"], 0)  # which it was timed with
        for name, value in took.items():
            times[name].append(value)
    typical = {name: median(values) for name, values in times.items()}
    return {name: 100 * value / sum(typical.values()) for name, value in typical.items()}


def sampling(config: Config, device: torch.device, yardsticks: Yardsticks, repeats: int) -> dict:
    """The row of sampling one batch, from noise to images."""
    sampler, batch_size, precision = config.sampler, config.training.batch_size, yardsticks.precision
    forget()
    began = time.perf_counter()
    net = build_denoiser(config).to(device, memory_format=torch.channels_last).eval()

    def sample() -> None:
        list(generate(net, list(range(batch_size)), config, device, batch_size, precision, compile=config.training.compile))

    sample()
    wait_for(device)
    first = time.perf_counter() - began
    evaluations = (2 * sampler.sampling_steps - 1 if sampler.solver == "heun" else sampler.sampling_steps) * (
        1 if sampler.guidance == 1 else 2
    )
    row = measured(sample, evaluations * batch_size * forward_flops(config), batch_size, yardsticks, repeats)
    return {"what": "sampling", "batch": batch_size, "compiled": is_compiled(net.model), "first_s": first, **row}


COLUMNS = {
    "what": "{:<9}",
    "batch": "{:>6}",
    "compiled": "{!s:>9}",
    "first_s": "{:>8.1f}",
    "ms": "{:>10.1f}",
    "images_per_s": "{:>13.1f}",
    "tflop_per_s": "{:>12.3f}",
    "percent_of_matmul": "{:>9.0f}%",
    "percent_of_convolution": "{:>7.0f}%",
    "percent_of_convolution_and_gradients": "{:>11.0f}%",
    "peak_mb": "{:>9.0f}",
}
HEADING = "what       batch  compiled  first s         ms      images/s    TFLOP/s  of matmul  of conv  conv+grads  peak MB"


def main() -> None:
    parser = Parser(__doc__.partition(":")[0])
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replace any entry of the config")
    parser.add_argument("--config_path", default="configs/edm.yaml", help="the YAML config")
    parser.add_argument("--batch_sizes", help="such as 16,64 (default: the config's)")
    parser.add_argument(
        "--compile",
        choices=["auto", "true", "false", "both"],
        help="measure the compiled network (default: as in the config)",
    )
    parser.add_argument("--repeats", type=whole_number(1), default=5, help="how often each is timed (default: 5)")
    parser.add_argument("--device", help="cuda, mps or cpu; by default the first of them that there is")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    args = parser.parse_intermixed_args()
    config = configs.load(args.config_path, args.overrides)
    sizes = args.batch_sizes.split(",") if args.batch_sizes is not None else [config.training.batch_size]
    choices = ["false", "true"] if args.compile == "both" else [args.compile or config.training.compile]
    runs = [
        configs.load(args.config_path, [*args.overrides, f"training.batch_size={size}", f"training.compile={choice}"])
        for size in sizes
        for choice in choices
    ]
    device = pick_device(args.device)
    precision = autocast_dtype(config.training.mixed_precision, device)
    yardsticks = Yardsticks(device, precision)
    machine = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "precision": str(precision).removeprefix("torch."),
        "imports_s": IMPORTS,
        "forward_gflop": forward_flops(config) / 1e9,
    }
    rows = []

    def save() -> None:
        if args.json:
            report = {"machine": machine, "config": config.to_dict(), "rows": rows}
            write_whole(args.json, lambda file: file.write(json.dumps(report, indent=1).encode()))

    save()  # or say at once that it cannot be
    print(json.dumps(machine))
    print(HEADING, flush=True)
    for case in runs:
        with explain_out_of_memory(f"leave out --batch_sizes {case.training.batch_size}"):
            row, parts = training(case, device, yardsticks, args.repeats)
            show(row)
            print("  of a step: " + ", ".join(f"{name} {share:.1f}%" for name, share in parts.items()))
            rows += [{**row, "shares": parts}, sampling(case, device, yardsticks, args.repeats)]
            show(rows[-1])
            save()


def show(row: dict) -> None:
    print(" ".join(form.format(row[name]) for name, form in COLUMNS.items()), flush=True)


if __name__ == "__main__":
    run(main)
