"""Evaluate a checkpoint: compare its samples with real images, and compute the likelihood of real images."""

import argparse
import functools
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import one_hot

from edm.ddpm import Chain
from edm.precond import PreconditionedDenoiser
from lab.bits import bound_bits, ode_bits, ode_levels
from lab.build import build_sampler, known_chain
from lab.checkpoint import write_atomically
from lab.cli import Parser, UserError, one_line, run_script, whole_number
from lab.config import Config, with_overrides
from lab.data import HAVE_TEST_SETS
from lab.device import autocast_dtype, explain_device_errors
from lab.distributed import World, distributed
from lab.generate import add_checkpoint_arguments, check_guide_is_used, class_labels, generate, load_denoiser, on_evaluation
from lab.metrics import MIN_IMAGES, Comparison, LabelledImages, real_images
from lab.pictures import check_writable, save_sweep

FEW_SAMPLES = 500  # distances of fewer samples say little

# The samplers of the sweep: overrides, and numbers of steps that take about 5, 10, 20 and 40 evaluations without guidance.
EDM = ["sampler.discretization=edm", "sampler.schedule=linear", "sampler.scaling=none"]
HEUN, HEUN_STEPS, STEPS = [*EDM, "sampler.solver=heun"], [3, 5, 10, 20], [5, 10, 20, 40]
SAMPLERS = {
    "ancestral": (STEPS, ["sampler.solver=ancestral"]),
    "ddim": (STEPS, ["sampler.solver=ddim"]),
    "euler": (STEPS, [*EDM, "sampler.solver=euler", "sampler.S_churn=0"]),
    "euler, S_churn 4": (STEPS, [*EDM, "sampler.solver=euler", "sampler.S_churn=4"]),
    "dpmpp_2m": (STEPS, [*EDM, "sampler.solver=dpmpp_2m", "sampler.S_churn=0"]),
    "heun": (HEUN_STEPS, [*HEUN, "sampler.S_churn=0"]),
    "heun, S_churn 4": (HEUN_STEPS, [*HEUN, "sampler.S_churn=4"]),
}
CHURN = [0, 1, 2, 4, 8]  # with Heun's method in 20 steps, where gamma reaches its limit, sqrt(2) - 1, at 8.3
SETS = 3  # sets of seeds; each gives a distance, and the picture shows their mean and standard deviation


def main() -> None:
    args = parse_arguments()
    num_samples, batch_size = args.num_samples, args.batch_size
    advice = f"lower --batch_size (now {batch_size}), or choose fp16 or bf16 for --mixed_precision"
    with distributed(args.device) as (device, world), explain_device_errors(advice):
        # First all that can fail because of the arguments; only one rank reports an error.
        first = world.rank_zero_first
        precision = world.common_precision(first(lambda: autocast_dtype(args.mixed_precision, device)))
        config, denoiser, step = first(lambda: load_denoiser(args.checkpoint, args.config_path, args.overrides, device))
        first(lambda: build_sampler(config))
        if not args.sweep:
            first(lambda: check_guide_is_used(config))
        train, held_out = first(lambda: real_images(config))
        real = held_out if args.against == "test" else train
        images, labels = first(lambda: first_images(real, args.num_images, config.network.label_dim))
        if len(images):
            levels = first(lambda: ode_levels(denoiser, config, args.ode_steps))
            chain = first(lambda: bound_chain(config, args.timesteps))

        against = reference_name(config, args.against)
        results = {"checkpoint": str(args.checkpoint), "step": step, "against": against}
        results["network_precision"] = str(precision).removeprefix("torch.")  # "precision" is another figure
        if num_samples:
            options = (args.output_dir / "classifier", args.against, args.features)
            comparison = on_first_rank(world, lambda: Comparison(config, train, held_out, device, *options))
            if num_samples < FEW_SAMPLES:
                print(f"warning: distances of {num_samples} samples differ by chance; compare {FEW_SAMPLES} or more")
        if args.sweep:
            picture = args.output_dir / "image" / config.data.dataset / "evaluate" / config.name / "sweep.png"
            results["sweep"] = sweep(denoiser, config, comparison, num_samples, device, batch_size, precision, world, picture)
        elif num_samples:
            samples = draw_samples(denoiser, config, num_samples, device, batch_size, precision, world)
            if comparison:
                results |= compare(comparison, samples, config.network.label_dim, against)
        if len(images):
            if precision == torch.bfloat16:  # too coarse for the divergence of the ODE
                precision = torch.float32
            bits_precision = str(precision).removeprefix("torch.")
            where = (images, labels, device, batch_size, precision, world)
            bits = results["bits_per_dimension"] = {"network_precision": bits_precision}
            bits["ode"] = ode_bits(denoiser, levels, *where)
            if chain:
                bits["bound"] = bound_bits(denoiser, config, chain, *where)
        if args.json and world.is_first:
            results = json.loads(json.dumps(results), parse_constant=lambda name: None)  # JSON has neither nan nor inf
            write_atomically(args.json, lambda file: file.write(json.dumps(results, indent=1).encode()))


def parse_arguments() -> argparse.Namespace:
    """Return the command line's arguments, with defaults that depend on each other filled in.

    Raises:
        UserError: arguments that do not fit together, or a file that cannot be written.
    """
    parser = Parser(__doc__)
    add = parser.add_argument
    add("overrides", nargs="*", metavar="section.key=value", help="replace entries of the checkpoint's config")
    add_checkpoint_arguments(parser)
    add("--num_samples", type=whole_number(0), help="samples to compare (default: 1000; for --sweep 250, three times; 0: none)")
    add("--num_images", type=whole_number(0), help="real images for bits per dimension (default: 100; 0: no bits)")
    add("--ode_steps", type=whole_number(1, 10_000), default=64, help="steps of the ODE for bits per dimension (default: 64)")
    add(
        "--timesteps",
        type=whole_number(1),
        help="timesteps of the chain for the variational bound (default: all, of networks trained on a chain)",
    )
    add("--against", choices=["test", "train"], default="test", help="the real images to compare with (default: test)")
    add(
        "--features",
        choices=["classifier", "inception"],
        default="classifier",
        help="the features to compare (default: those of a small classifier, which is trained on first use)",
    )
    add("--sweep", action="store_true", help="instead, draw the distance against the number of evaluations and against S_churn")
    add("--batch_size", type=whole_number(1), default=100, help="images at a time (default: 100)")
    add("--data_root", help="short for data.root=VALUE")
    add("--output_dir", type=Path, default=Path("output"), help="folder of classifier and picture (default: output)")
    add("--json", type=Path, metavar="FILE", help="also write the figures to a file")
    args = parser.parse_intermixed_args()

    if args.num_samples == args.num_images == 0:
        raise UserError("--num_samples 0 --num_images 0 leaves nothing to evaluate")
    if args.sweep and (args.num_images is not None or args.timesteps):
        raise UserError("--sweep computes no bits per dimension; leave out --num_images and --timesteps")
    if args.num_samples is None:
        args.num_samples = 250 if args.sweep else 1000
    if args.num_samples < MIN_IMAGES and (args.sweep or args.num_samples):
        raise UserError(f"--num_samples: a comparison takes {MIN_IMAGES} or more samples")
    if args.sweep:
        args.num_images = 0
    if args.data_root:
        args.overrides.append(f"data.root={args.data_root}")
    if args.json:
        check_writable(args.json)
    return args


def reference_name(config: Config, against: str) -> str:
    """Return the name of the images that "test" or "train" stands for."""
    if config.data.dataset in HAVE_TEST_SETS:
        return {"test": "test images", "train": "training images"}[against]
    return {"test": "one half of the images", "train": "the other half of the images"}[against]


def bound_chain(config: Config, timesteps: int | None) -> Chain | None:
    """Return the chain for the variational bound.

    Args:
        timesteps: how many; None stands for all of them, or for no bound if the network was not trained on a chain.

    Raises:
        UserError: the network does not know the chain's noise levels, or the chain is shorter.
    """
    if not timesteps and config.preconditioning.formulation not in ("ddpm", "improved_ddpm"):
        return None
    try:
        return known_chain(config, timesteps or config.chain.num_timesteps)
    except UserError as error:
        raise UserError(f"the bound: {error}") from None


def first_images(real: LabelledImages, count: int | None, label_dim: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the first `count` images, and their labels as one-hot (count, label_dim), or None if label_dim is 0.

    Args:
        count: None stands for 100, or for all images if there are fewer.

    Raises:
        UserError: there are fewer than `count`.
    """
    total = len(real.images)
    if count and count > total:
        raise UserError(f"--num_images: there are {total:,} images")
    chosen = slice(min(100, total) if count is None else count)
    return real.images[chosen], one_hot(real.labels[chosen], label_dim) if label_dim else None


def on_first_rank(world: World, compute: Callable[[], object]):
    """Return the result of `compute` on rank 0, and None on the others. A `UserError` ends all ranks."""
    results = []
    world.broadcast(lambda: results.append(compute()))
    return results[0] if results else None


def draw_samples(
    denoiser: PreconditionedDenoiser,
    config: Config,
    count: int,
    device: torch.device,
    batch_size: int,
    precision: torch.dtype,
    world: World,
    title: str = "sampling",
) -> torch.Tensor | None:
    """Return the samples of seeds 0, 1, 2, ..., (count, C, H, W) uint8, on rank 0, and None on the others."""
    images = list(generate(denoiser, list(range(count)), config, device, batch_size, precision, world=world, title=title))
    return torch.cat(images) if images else None


def compare(comparison: Comparison, samples: torch.Tensor, label_dim: int, against: str) -> dict:
    """Return the figures of the samples and of as many real images, and print them in a table.

    Args:
        samples: (N, C, H, W) uint8, of seeds 0 to N - 1.
        label_dim: the number of classes that the network knows.
        against: the name of the images that they are compared with.
    """
    labels = class_labels(list(range(len(samples))), label_dim) if label_dim == comparison.num_classes else None
    found = comparison.quality(samples, labels if labels is None else labels.argmax(dim=1))
    floor = comparison.floor(len(samples))
    columns = (f"{found['images']:,} samples", f"{floor['images']:,} real images")
    print(f"{f'Compared with {against}:':<42}{columns[0]:>16}{columns[1]:>20}")
    rows = [
        ("Frechet distance", "frechet_distance", ".1f"),
        ("precision", "precision", ".3f"),
        ("recall", "recall", ".3f"),
        ("of the right class", "right_class", ".1%"),
        ("class balance is off by", "class_distance", ".1%"),
    ]
    for title, key, form in rows:
        if key in found:
            print(f"  {title:<40}{found[key]:>16{form}}{floor[key]:>20{form}}")
    for index, shares in enumerate(zip(found.get("class_shares", []), floor.get("class_shares", []))):
        print(f"  {f'share of class {index}':<40}{shares[0]:>16.1%}{shares[1]:>20.1%}")
    return {"samples": found, "floor": floor}


def sweep(
    denoiser: PreconditionedDenoiser,
    config: Config,
    comparison: Comparison | None,
    count: int,
    device: torch.device,
    batch_size: int,
    precision: torch.dtype,
    world: World,
    picture: Path,
) -> dict | None:
    """Return the Frechet distance of `count` samples for several samplers and numbers of network evaluations per image (the
    paper's Figures 2 and 4), and for several S_churn (Figure 5c). Prints each one, and draws them all.

    Each distance is the mean over `SETS` sets of seeds, and has their standard deviation.

    Args:
        denoiser: its evaluations are counted, and those of its guide.
        comparison: None on all ranks but the first.
        picture: the PNG file to write.

    Returns:
        "samplers": {name: [(evaluations, distance, deviation), ...]}; "churn": [(S_churn, distance, deviation), ...];
        "floor", the mean distance of as many real images. On rank 0; None on the others.
    """
    world.broadcast(lambda: check_writable(picture))

    @functools.cache  # the sweep over S_churn repeats some points
    def measure(*overrides: str) -> tuple[float, ...]:
        varied, rows = with_overrides(config, overrides, "the sweep"), []
        title = f"{varied.sampler.solver}, {varied.sampler.sampling_steps} steps"
        with on_evaluation(denoiser, rows.append):
            images = draw_samples(denoiser, varied, SETS * count, device, batch_size, precision, world, title)
        evaluations = sum(world.gather(sum(rows))) / (SETS * count)
        if not comparison:
            return (evaluations,)
        distances = torch.tensor([comparison.frechet_distance(part) for part in images.split(count)], dtype=torch.float64)
        return evaluations, distances.mean().item(), distances.std().item()

    def point(name: str, overrides: list[str], steps: int) -> list[tuple[float, ...]]:
        """Return [(evaluations, distance, deviation)] of a sampler, or [] if the network does not support it."""
        try:
            found = measure(*overrides, f"sampler.sampling_steps={steps}")
        except UserError as error:
            print(f"{name} at {steps} steps is left out: {one_line(str(error))}")
            return []
        if comparison:
            print("{:<30} {:5.0f} evaluations: {:8.1f} ± {:.1f}".format(f"{name}, {steps} steps", *found), flush=True)
        return [found]

    curves = {
        name: [found for steps in numbers for found in point(name, overrides, steps)]
        for name, (numbers, overrides) in SAMPLERS.items()
    }
    churn = [
        (S_churn, *found)
        for S_churn in CHURN
        for _, *found in point(f"heun, S_churn {S_churn}", [*HEUN, f"sampler.S_churn={S_churn}"], HEUN_STEPS[-1])
    ]
    if not comparison:
        return None
    floor = comparison.mean_floor(count, SETS, balanced=config.network.label_dim > 0)
    print(f"{'as many real images':<30} {'':5}              {floor:8.1f}")
    save_sweep(picture, curves, churn, floor, f"Frechet distance of {count:,} samples")
    print(f"the picture is {picture}")
    return {"samplers": curves, "churn": churn, "floor": floor}


if __name__ == "__main__":
    run_script(main)
