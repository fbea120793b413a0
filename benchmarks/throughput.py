"""Measure how fast training and sampling are, and what percentage of the machine's own speed they reach.

    python benchmarks/throughput.py [--config_path configs/edm.yaml] [options] [section.key=value ...]

A training step has the loss of Eq. 8, and neither augmentation nor accumulation. Its images are random, so no data is needed.
It counts as three forward passes, because the backward pass has two matrix products for each one of the forward pass.
The machine's own speed is that of a large matrix product and of a large convolution in the same precision. They are timed again
in every repeat, because machines change their pace. Times and speeds are medians over the repeats.
"""

import gc
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import nn
from torch.nn.functional import conv2d, one_hot

sys.path.insert(0, str(Path(__file__).parents[1]))

from edm.blocks import Block
from edm.loss import squared_error
from lab.build import build_network, build_weighting
from lab.checkpoint import write_atomically
from lab.cli import Parser, UserError, run_script, whole_number
from lab.config import Config, load
from lab.data import to_model_range
from lab.device import autocast, autocast_dtype, explain_device_errors, pick_device, wait_for
from lab.generate import generate
from lab.learner import Learner

COLUMNS = ("ms", "images_per_s", "gflop_per_s", "percent_of_matmul", "percent_of_conv", "peak_mb")  # of the printed table
FIXED = ["training.accumulation=1", "preconditioning.sigma_data=0.5"]  # "auto" would have to see the training images
FIXED += ["sampler.guide=null", "sampler.guidance_min=0", "sampler.guidance_max=inf"]  # the network itself, in all steps


def forward_flop(config: Config) -> int:
    """Return the floating-point operations of the network for one image; a multiply-add counts as two.

    Convolutions, linear layers and the matrix products of attention count; filters, normalizations and activations do not.
    """
    total = 0

    def count(layer: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        nonlocal total
        if isinstance(layer, nn.Linear):
            total += 2 * output.numel() * layer.in_features
        elif isinstance(layer, nn.Conv2d):  # of stride 1
            sides = zip(inputs[0].shape[2:], layer.padding, layer.kernel_size)
            total += 2 * layer.weight.numel() * math.prod(side + 2 * padding - size + 1 for side, padding, size in sides)
        elif isinstance(layer, Block) and layer.heads:  # two products: queries with keys, and their softmax with values
            total += 2 * 2 * output.shape[1] * output[0, 0].numel() ** 2  # channels of all heads, pixels squared

    net = build_network(config).eval()
    net.apply(lambda layer: layer.register_forward_hook(count))
    with torch.no_grad():
        net(torch.zeros(1, config.data.channels, config.data.resolution, config.data.resolution), 1.0)
    return total


def training_step(config: Config, device: torch.device) -> Callable:
    """Return a function that does one training step, like the loop in train_mnist.py."""
    batch_size, label_dim, size = config.training.batch_size, config.network.label_dim, config.data.resolution
    images = torch.randint(256, (batch_size, config.data.channels, size, size), dtype=torch.uint8, device=device)
    labels = one_hot(torch.arange(batch_size, device=device) % label_dim, label_dim) if label_dim else None
    learner, weighting, generator = Learner(config, device), build_weighting(config), torch.Generator(device)
    if learner.is_compiled != config.training.compile:
        raise UserError("torch.compile changes what the network computes, so this case is not timed")

    def step() -> None:
        y = to_model_range(images).contiguous(memory_format=torch.channels_last)
        sigma = learner.noise_distribution.sample(batch_size, generator)
        n = torch.randn(y.shape, generator=generator, device=device) * sigma[:, None, None, None]
        with autocast(device, learner.precision):
            loss = weighting(sigma) * squared_error(learner.net(y + n, sigma, labels), y)
        learner.scaler.scale(loss.sum() / batch_size).backward()
        learner.optimizer_step(10**6)  # the step of a run that has seen so many images
        learner.ema.update(10**6, batch_size)

    return step


def sampling_run(config: Config, device: torch.device) -> Callable:
    """Return a function that samples one batch."""
    net = build_network(config).to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    if config.training.compile:
        net.model.compile(dynamic=False)
    seeds, precision = list(range(config.training.batch_size)), autocast_dtype(config.training.mixed_precision, device)
    return lambda: list(generate(net, seeds, config, device, len(seeds), precision, title=None))


def make_references(device: torch.device, precision: torch.dtype) -> dict[str, tuple[int, Callable]]:
    """Return the large matrix product and the large convolution: the floating-point operations and the function of each."""
    size, count = (8192, 512) if device.type == "cuda" else (2048, 64)
    a, b = torch.randn(2, size, size, device=device, dtype=precision)
    x = torch.randn(count, 256, 16, 16, device=device, dtype=precision).to(memory_format=torch.channels_last)
    weight = torch.randn(256, 256, 3, 3, device=device, dtype=precision).to(memory_format=torch.channels_last)
    return {"matmul": (2 * size**3, lambda: a @ b), "conv": (2 * x.numel() * 256 * 9, lambda: conv2d(x, weight, padding=1))}


def seconds(action: Callable, device: torch.device, calls: int = 1) -> float:
    """Return the mean time of calls in a row. With enough of them, a GPU does not wait for Python."""
    wait_for(device)
    began = time.perf_counter()
    for _ in range(calls):
        action()
    wait_for(device)
    return (time.perf_counter() - began) / calls


def measure(action: Callable, flop: int, device: torch.device, precision: torch.dtype, repeats: int) -> dict[str, float]:
    """Return the time, speed and peak memory of an action that takes `flop` floating-point operations.

    Each of the `repeats` timings is one call, or on a GPU as many calls in a row as take half a second.
    """
    first_call = seconds(action, device)  # compiles the network, if it is to be compiled
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    once = {"action": seconds(action, device)}
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated(device)  # of all tensors
    else:
        import resource  # missing on Windows

        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # of the process so far, in kB; on macOS in bytes
        memory *= 1 if sys.platform == "darwin" else 1024
    actions = {**make_references(device, precision), "action": (flop, action)}
    for name in ("matmul", "conv"):
        actions[name][1]()  # the first call takes longer than the others
        once[name] = seconds(actions[name][1], device)
    calls = {name: 1 if device.type == "cpu" else math.ceil(0.5 / time) for name, time in once.items()}
    times = {name: [] for name in actions}
    for _ in range(repeats):
        for name, (_, call) in actions.items():
            times[name].append(seconds(call, device, calls[name]))
    speeds = {name: flop / median(times[name]) / 1e9 for name, (flop, _) in actions.items()}
    row = {"ms": 1000 * median(times["action"]), "gflop_per_s": speeds["action"], "peak_mb": memory / 1e6}
    for name in ("matmul", "conv"):
        row |= {f"{name}_gflop_per_s": speeds[name], f"percent_of_{name}": 100 * speeds["action"] / speeds[name]}
    return row | {"first_call_s": first_call}


def benchmark(what: str, config: Config, flop: int, device: torch.device, repeats: int) -> dict:
    """Return the figures of "training", a step of it, or of "sampling" one batch.

    Args:
        flop: the floating-point operations of the network for one image.
    """
    clear(device)
    began = time.perf_counter()
    size, sampler = config.training.batch_size, config.sampler
    if what == "training":
        action, passes = training_step(config, device), 3
    else:
        action = sampling_run(config, device)
        passes = 2 * sampler.sampling_steps - 1 if sampler.solver == "heun" else sampler.sampling_steps
        passes *= 1 if sampler.guidance == 1 else 2  # with and without the class
    construction = time.perf_counter() - began  # in which a network that is to be compiled is checked
    precision = autocast_dtype(config.training.mixed_precision, device)
    row = measure(action, passes * size * flop, device, precision, repeats)
    row["first_call_s"] += construction
    return {"what": what, "batch_size": size, "images_per_s": 1000 * size / row["ms"], **row}


def clear(device: torch.device) -> None:
    """Free the memory of earlier measurements, and what torch.compile knows: after eight networks it would compile no more."""
    gc.collect()
    torch.compiler.reset()
    torch.compiler.set_stance("default")
    if device.type == "cuda":
        torch.cuda.empty_cache()


def main() -> None:
    parser = Parser(__doc__.partition("\n")[0])
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replace any entry of the config")
    parser.add_argument("--config_path", default="configs/edm.yaml", help="the YAML config")
    parser.add_argument("--batch_sizes", help="such as 16,64 (default: the config's)")
    parser.add_argument("--compile", action="store_true", help="compile the network with torch.compile")
    parser.add_argument("--repeats", type=whole_number(1), default=5, help="how often everything is timed (default: 5)")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the first of them that this machine has)")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    args = parser.parse_intermixed_args()
    overrides = [*FIXED, f"training.compile={args.compile}"]
    config, device = load(args.config_path, [*args.overrides, *overrides]), pick_device(args.device)
    sizes = args.batch_sizes.split(",") if args.batch_sizes else [config.training.batch_size]
    cases = [load(args.config_path, [*args.overrides, *overrides, f"training.batch_size={size}"]) for size in sizes]
    precision, flop = autocast_dtype(config.training.mixed_precision, device), forward_flop(config)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device} with {torch.get_num_threads()} threads"
    report = {"config": " ".join([args.config_path, *args.overrides]), "device": name, "torch": torch.__version__}
    report |= {"precision": str(precision), "forward_gflop": flop / 1e9, "rows": []}
    print(*(f"{key}: {value}" for key, value in report.items() if key != "rows"), sep=", ")
    print("what       batch", *(f"{column:>17}" for column in COLUMNS), flush=True)
    for case in cases:
        size = case.training.batch_size
        for what in ("training", "sampling"):
            with explain_device_errors(f"leave out --batch_sizes {size}"):
                row = benchmark(what, case, flop, device, args.repeats)
            report["rows"].append(row)
            print(f"{what:<10} {size:>5}", *(f"{row[column]:>17.1f}" for column in COLUMNS), flush=True)
    if args.json:
        write_atomically(args.json, lambda file: file.write(json.dumps(report, indent=1).encode()))


if __name__ == "__main__":
    run_script(main)
