"""Measure training and sampling on a GPU, in one call; every part alone is a command as well.

    python benchmarks/gpu.py [--parts tests,speed,kernels,precisions] [--lesson] [options] [section.key=value ...]

tests       the tests that need a GPU
speed       training and sampling of each batch size and precision, eager and compiled, as in benchmarks/throughput.py;
            sampling takes two steps, unless sampler.sampling_steps is given; no TF32 in float32
kernels     what a training step spends its time on, at the first batch size in the config's own precision
precisions  short training runs: several seeds in the config's own precision, and seed 0 in each other one. Their figure is
            the mean loss of the last tenth of the steps. It is within the seeds' spread if it differs from that of seed 0
            in the config's own precision by max - min over the seeds or less
lesson      with --lesson: the whole training run of the config, its sample grid, and the distance of 1,000 samples

Everything is written to OUTPUT_DIR/report.json as soon as it is measured, and printed as a table at the end. What the report
holds is not measured again, except for what failed; to measure it again, delete its entry or the file. Training runs that were
stopped go on. So the same command can be repeated until it is done:

    timeout 540 python benchmarks/gpu.py --lesson
"""

import argparse
import itertools
import json
import math
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, supported_activities

sys.path.insert(0, str(Path(__file__).parents[1]))

import sample
import train_mnist
from benchmarks.throughput import FIXED, benchmark, clear, forward_flop, seconds, training_step
from lab import evaluate
from lab.checkpoint import checkpoint_path, saved_steps, write_atomically
from lab.cli import Parser, UserError, nearest, one_line, run_script, whole_number
from lab.config import Config, load
from lab.data import open_dataset
from lab.device import autocast_dtype, explain_device_errors, pick_device, wait_for

PARTS = ("tests", "speed", "kernels", "precisions", "lesson")
PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16, "float32": torch.float32}
MODES = ("eager", "compiled")
PROFILED_STEPS = 3


class Report:
    """The figures so far, {part: {name: row}}, and their file.

    Args:
        path: the JSON file, which may hold earlier figures.
        about: the machine and the config.

    Raises:
        UserError: the file's figures are of another machine or config.
    """

    def __init__(self, path: Path, about: dict[str, str | float], device: torch.device):
        self.path, self.about, self.device, self.parts = path, about, device, {}
        if path.exists():
            try:
                report = json.loads(path.read_text())
                old, self.parts = dict(report["about"]), dict(report["parts"])
            except (LookupError, TypeError, ValueError):
                raise UserError(f"{path} is not a report of this script; choose another --output_dir") from None
            changed = [f"{key} ({old.get(key)}, now {about[key]})" for key in about if old.get(key) != about[key]]
            if changed:
                raise UserError(f"{path} is of another {', '.join(changed)}; choose another --output_dir")

    def measure(self, part: str, name: str, compute: Callable[..., dict | None], *arguments: object) -> None:
        """Write the row of figures that `compute(*arguments)` returns, or why it failed. Do nothing if the row is known.

        Every row gets the minutes that it took, including failed and stopped attempts.
        """
        rows = self.parts.setdefault(part, {})
        old = rows.get(name, {"failed": "", "minutes": 0})
        if "failed" not in old:
            return
        print(f"{part}: {name}", flush=True)
        row, began = {"failed": "stopped"}, time.perf_counter()
        try:
            with explain_device_errors("it does not fit on this device"):
                row = compute(*arguments) or {}
        except UserError as error:
            row = {"failed": one_line(str(error))}
        except Exception as error:  # one row less: the others are wanted all the same
            traceback.print_exc()
            row = {"failed": one_line(f"{type(error).__name__}: {error}")}
        finally:
            rows[name] = {"minutes": old["minutes"] + (time.perf_counter() - began) / 60} | row
            self.write()
            clear(self.device)

    def was_stopped(self, part: str, name: str) -> bool:
        """Return whether the row was being measured when an earlier call was stopped."""
        return self.parts.get(part, {}).get(name, {}).get("failed") == "stopped"

    def write(self) -> None:
        """Write the file."""
        report = {"about": self.about, "parts": self.parts}
        write_atomically(self.path, lambda file: file.write(json.dumps(report, indent=1).encode()))

    def print(self) -> None:
        """Print a table of all rows, a block for each part."""
        print("\n" + "\n".join(f"{key}: {value}" for key, value in self.about.items()))
        for part, rows in self.parts.items():
            keys = list(dict.fromkeys(key for row in rows.values() for key in row if key not in ("failed", "kernels")))
            width = max(map(len, [part, *rows]))
            print(f"\n{part:<{width}}", *(f"{key:>{len(key) + 2}}" for key in keys))
            for name, row in rows.items():
                figures = [f"{text(row.get(key, '')):>{len(key) + 2}}" for key in keys]
                print(f"{name:<{width}}", *([figures[0], row["failed"]] if "failed" in row else figures))
                for kernel in row.get("kernels", []):
                    print(f"  {kernel['percent']:5.1f}% {kernel['calls']:7.1f} x  {kernel['name']:.100}")
        print(f"\nAll of it is in {self.path}", flush=True)


def text(value: object) -> str:
    """Return a figure with four digits, or a text as it is."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def about(device: torch.device, args: argparse.Namespace, config: Config) -> dict[str, str | float]:
    """Return what all figures depend on: the machine, PyTorch and the config."""
    found = {"device": f"{device.type} with {torch.get_num_threads()} threads", "torch": torch.__version__}
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
        found["capability"] = "{}.{}".format(*torch.cuda.get_device_capability(device))
        found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return found | {"config": " ".join([args.config_path, *args.overrides]), "forward_gflop": forward_flop(config) / 1e9}


def tests(report: Report, args: argparse.Namespace) -> None:
    """Run the tests that need a GPU."""
    report.measure("tests", "pytest -m gpu", run_tests)


def run_tests() -> dict:
    """Run the tests that need a GPU, which are skipped without one; returns pytest's closing line."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-n", "0", "-q"]
    pytest = subprocess.run(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True)
    print(pytest.stdout)
    line = pytest.stdout.strip().rpartition("\n")[2]
    return {"failed": line or "pytest did not run"} if pytest.returncode else {"result": line}


def speed(report: Report, args: argparse.Namespace) -> None:
    """Time training and sampling in all cases."""
    for size, precision, mode in itertools.product(args.batch_sizes, args.precisions, args.modes):
        config = case(args, size, precision, mode)
        for what in ("training", "sampling"):
            report.measure("speed", f"{what}, batch {size}, {precision}, {mode}", speed_of, what, config, report, args.repeats)


def case(args: argparse.Namespace, size: int, precision: str, mode: str) -> Config:
    """Return the config of a case that is timed."""
    timed = [f"training.batch_size={size}", mixed_precision(precision), f"training.compile={mode == 'compiled'}"]
    return load(args.config_path, ["sampler.sampling_steps=2", *args.overrides, *FIXED, *timed])


def mixed_precision(precision: str) -> str:
    """Return the override that chooses a precision."""
    return f"training.mixed_precision={'no' if precision == 'float32' else precision}"


def speed_of(what: str, config: Config, report: Report, repeats: int) -> dict:
    """Return the figures of "training" or "sampling", from `benchmark`, in TFLOP/s."""
    row = benchmark(what, config, round(1e9 * report.about["forward_gflop"]), report.device, repeats)
    row["tflop_per_s"] = row["gflop_per_s"] / 1000
    columns = ("ms", "images_per_s", "tflop_per_s", "percent_of_matmul", "percent_of_conv", "peak_mb", "first_call_s")
    return {column: row[column] for column in columns}


def kernels(report: Report, args: argparse.Namespace) -> None:
    """Profile a training step."""
    size, precision = args.batch_sizes[0], own_precision(args, report.device)
    for mode in args.modes:
        config = case(args, size, precision, mode)
        report.measure("kernels", f"training, batch {size}, {precision}, {mode}", kernels_of, config, report.device)


def own_precision(args: argparse.Namespace, device: torch.device) -> str:
    """Return the name of the config's precision on this device."""
    dtype = autocast_dtype(load(args.config_path, args.overrides).training.mixed_precision, device)
    return next(name for name in PRECISIONS if PRECISIONS[name] == dtype)


def kernels_of(config: Config, device: torch.device) -> dict:
    """Return the time of a training step, and the kernels that take 2% of it or more, by torch.profiler.

    On a GPU, percentages are of the time of all kernels, and `busy_percent` is that time in percent of a step's without the
    profiler. On a CPU, or if the profiler does not see the GPU, they are of the time of PyTorch's operations on the CPU.
    """
    step = training_step(config, device)
    for _ in range(3):
        step()
    duration = seconds(step, device, PROFILED_STEPS)
    with profile(activities={ProfilerActivity.CPU, ProfilerActivity.CUDA} & supported_activities()) as profiler:
        for _ in range(PROFILED_STEPS):
            step()
        wait_for(device)
    events = profiler.key_averages()
    on_gpu = [event for event in events if event.device_type != DeviceType.CPU and not event.is_user_annotation]
    times = [(event.self_device_time_total if on_gpu else event.self_cpu_time_total, event) for event in on_gpu or events]
    total = sum(time for time, _ in times)  # in microseconds
    found = [{"name": event.key, "percent": 100 * time / total, "calls": event.count / PROFILED_STEPS} for time, event in times]
    return {
        "ms": 1000 * duration,
        "busy_percent": 100 * total / 1e6 / PROFILED_STEPS / duration if on_gpu else "unknown",
        "kernels": sorted((kernel for kernel in found if kernel["percent"] >= 2), key=lambda kernel: -kernel["percent"]),
    }


def precisions(report: Report, args: argparse.Namespace) -> None:
    """Compare the losses of short runs in all precisions."""
    own = own_precision(args, report.device)
    runs = [(own, seed) for seed in range(args.seeds)] + [(name, 0) for name in args.precisions if name != own]
    names = [f"{precision}, seed {seed}, {args.steps} steps" for precision, seed in runs]
    for name, (precision, seed) in zip(names, runs):
        short = [f"training.num_training_steps={args.steps}", f"training.save_and_sample_every_n={args.steps}"]
        short += [f"training.seed={seed}", "sampler.num_samples=1"]
        overrides = [*args.overrides, mixed_precision(precision), *short]
        folder = args.output_dir / "precisions" / f"{precision}-{seed}"
        resume = report.was_stopped("precisions", name)
        report.measure("precisions", name, loss_of, args.config_path, overrides, report.device, folder, resume)
    compare([report.parts["precisions"][name] for name in names], args.seeds)
    report.write()


def loss_of(config_path: str, overrides: list[str], device: torch.device, output_dir: Path, resume: bool) -> dict:
    """Train, and return the mean loss of the last tenth of the steps."""
    metrics = Path(train(config_path, overrides, device, output_dir, resume)["run"], "metrics.jsonl")
    losses = [json.loads(line)["loss"] for line in metrics.read_text().splitlines()]
    last = losses[-math.ceil(len(losses) / 10) :]
    return {"failed": "a loss is not finite"} if None in last else {"loss": sum(last) / len(last)}


def train(config_path: str, overrides: list[str], device: torch.device, output_dir: Path, resume: bool) -> dict[str, str]:
    """Train as train_mnist.py does, or go on with the run that is there; returns {"run": the run's folder}."""
    config = load(config_path, overrides)
    folder = output_dir / "image" / config.data.dataset / config.name
    how = ["--resume_from", "latest"] if resume and saved_steps(folder) else ["--overwrite"]
    options = ("--config_path", config_path, "--output_dir", output_dir, "--device", device)
    call(train_mnist.main, *options, *how, *overrides)
    return {"run": str(folder)}


def call(main: Callable[[], None], *arguments: object) -> None:
    """Call the main function of a script with these command-line arguments."""
    with mock.patch.object(sys, "argv", [f"{main.__module__}.py", *map(str, arguments)]):
        main()


def compare(rows: list[dict], seeds: int) -> None:
    """Add to each row how far its loss is from that of seed 0, and to later rows whether that is within the seeds' spread.

    Args:
        rows: those of the seeds first.
        seeds: the number of seeds.
    """
    losses = [row["loss"] for row in rows[:seeds] if "loss" in row]
    if len(losses) < seeds:
        return
    for index, row in enumerate(rows):
        if "loss" in row:
            row["difference"], row["spread"] = row["loss"] - losses[0], max(losses) - min(losses)
            if index >= seeds:
                row["within_spread"] = "yes" if abs(row["difference"]) <= row["spread"] else "no"


def lesson(report: Report, args: argparse.Namespace) -> None:
    """Train the lesson, draw its grid and measure the distance of its samples."""
    device, folder = report.device, args.output_dir / "lesson"
    overrides = ["checkpoint.keep_last=2", *args.overrides]
    resume = report.was_stopped("lesson", "training")
    report.measure("lesson", "training", train, args.config_path, overrides, device, folder, resume)
    run = report.parts["lesson"]["training"].get("run")
    if run:
        checkpoint = checkpoint_path(Path(run), saved_steps(Path(run))[-1])
        options = ("--checkpoint", checkpoint, "--device", device, "--output_dir", folder)
        report.measure("lesson", "grid", call, sample.main, *options)
        report.measure("lesson", "distance", distance_of, folder / "evaluation.json", *options)


def distance_of(file: Path, *options: object) -> dict:
    """Return the Frechet distance of 1,000 samples, and that of as many real images, from the JSON file of `lab.evaluate`."""
    call(evaluate.main, *options, "--num_images", 0, "--mixed_precision", "auto", "--json", file)
    found = json.loads(file.read_text())
    return {part: found[part]["frechet_distance"] for part in ("samples", "floor")}


def main() -> None:
    args = parse_arguments()
    device, config = pick_device(args.device), load(args.config_path, args.overrides)
    if {"precisions", "lesson"} & {*args.parts}:
        open_dataset(config)  # raises now if the images are missing
    report = Report(args.output_dir / "report.json", about(device, args, config), device)
    try:
        for part in (tests, speed, kernels, precisions, lesson):
            if part.__name__ in args.parts:
                part(report, args)
    finally:
        report.print()


def some_of(*allowed: str) -> Callable[[str], list[str]]:
    """Return an argparse type that accepts some of the names, such as "speed,kernels"."""

    def parse(text: str) -> list[str]:
        for name in text.split(","):
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"unknown {name!r}; {nearest(name, allowed)}")
        return text.split(",")

    return parse


def numbers(text: str) -> list[int]:
    """Convert "64,512" to [64, 512] (an argparse type)."""
    return [whole_number(1)(size) for size in text.split(",")]


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__.partition("\n")[0])
    add = parser.add_argument
    add("overrides", nargs="*", metavar="section.key=value", help="replace any entry of the config")
    add("--parts", type=some_of(*PARTS), default=list(PARTS[:4]), help=f"some of {','.join(PARTS)} (default: all but lesson)")
    add("--lesson", action="store_true", help="also train the whole lesson, or go on with it, and evaluate it")
    add("--config_path", default="configs/edm.yaml", help="the YAML config")
    add("--batch_sizes", type=numbers, default=[64, 512], help="batch sizes that are timed (default: 64,512)")
    add("--precisions", type=some_of(*PRECISIONS), default=list(PRECISIONS), help="some of fp16,bf16,float32 (default: all)")
    add("--modes", type=some_of(*MODES), default=list(MODES), help="some of eager,compiled (default: both)")
    add("--repeats", type=whole_number(1), default=3, help="how often every speed is timed (default: 3)")
    add("--steps", type=whole_number(1), default=1000, help="steps of the runs that compare precisions (default: 1000)")
    add("--seeds", type=whole_number(2), default=3, help="seeds of the runs that compare precisions (default: 3)")
    add("--data_root", help="short for data.root=VALUE")
    add("--device", help="cuda, mps or cpu (default: the first of them that this machine has)")
    add("--output_dir", type=Path, default=Path("output/gpu"), help="where everything is written (default: output/gpu)")
    args = parser.parse_intermixed_args()
    args.parts += ["lesson"] * args.lesson
    args.overrides += [f"data.root={args.data_root}"] * bool(args.data_root)
    return args


if __name__ == "__main__":
    run_script(main)
