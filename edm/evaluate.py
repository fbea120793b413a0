"""How good a checkpoint is: its samples beside real images, and the likelihood that it gives to real images."""

import argparse
import json
import os
from pathlib import Path

import torch

from edm import checkpoint, choices
from edm.bits import bound_bits, ode_bits
from edm.cli import Parser, run, whole_number
from edm.config import Config
from edm.ddpm import FORMULATIONS, Chain
from edm.device import autocast_dtype, explain_out_of_memory
from edm.distributed import Processes, joined
from edm.errors import UserError
from edm.files import write_whole
from edm.generate import build_denoiser, check_chain, class_labels, generate
from edm.judge import MIN_IMAGES, Judge, name_of, real_images
from edm.precond import Denoiser
from edm.sweep import save, sweep


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="replace any entry of the checkpoint's config"
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="a diffusion-*.pt file")
    parser.add_argument(
        "--num_samples", type=whole_number(0), help="to compare with real images (default: 1000, for --sweep 250; 0: without)"
    )
    parser.add_argument("--num_images", type=whole_number(0), help="for bits per dimension (default: 100; 0: without)")
    parser.add_argument("--ode_steps", type=whole_number(1, 10_000), default=64, help="for bits per dimension (default: 64)")
    parser.add_argument(
        "--timesteps", type=whole_number(1), help="of a chain, for its bound (default: all, of networks trained on a chain)"
    )
    parser.add_argument("--against", choices=["test", "train"], default="test", help="which real images (default: test)")
    parser.add_argument(
        "--features",
        choices=["classifier", "inception"],
        default="classifier",
        help="what images are compared in (default: a small classifier's, trained on first use)",
    )
    parser.add_argument(
        "--sweep", action="store_true", help="instead, draw the distance against the number of evaluations and S_churn"
    )
    parser.add_argument("--batch_size", type=whole_number(1), default=100, help="images at a time (default: 100)")
    parser.add_argument("--data_root", help="short for data.root=VALUE")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the first of them that there is)")
    parser.add_argument(
        "--output_dir", type=Path, default=Path("output"), help="of the classifier and the picture (default: output)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file, too")
    args = parser.parse_intermixed_args()
    if args.num_samples is None:
        args.num_samples = 250 if args.sweep else 1000
    if args.num_samples < MIN_IMAGES and (args.sweep or args.num_samples):
        parser.error(f"--num_samples: a comparison takes {MIN_IMAGES} or more samples")
    if args.num_samples == args.num_images == 0:
        parser.error("--num_samples 0 --num_images 0 leaves nothing to evaluate")
    if args.json:
        check_writable(args.json)
    if args.sweep and (args.num_images is not None or args.timesteps):
        parser.error("--sweep asks for no bits per dimension; leave out --num_images and --timesteps")
    with joined(args.device) as (device, processes), explain_out_of_memory(f"lower --batch_size (now {args.batch_size})"):
        results = evaluate(args, device, processes)
        if args.json and processes.is_first:
            write_whole(args.json, lambda file: file.write(json.dumps(results, indent=1).encode()))


def check_writable(path: Path) -> None:
    """Refuse, with a `UserError`, a file that could not be written after all the work."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise OSError("it is a folder, or in one that is not to be written to")
    except OSError as error:
        raise UserError(f"--json: cannot write {path}: {error.strerror or error}") from None


def evaluate(args: argparse.Namespace, device: torch.device, processes: Processes) -> dict:
    """What the arguments ask for, printed, and, in the first process, as plain values."""
    config, step, weights, chain = processes.from_first(lambda: read(args))
    denoiser = build_denoiser(config, weights, args.checkpoint).to(device, memory_format=torch.channels_last)
    denoiser.eval().requires_grad_(False)
    seeds, precision = list(range(args.num_samples)), autocast_dtype("no", device)
    judge = None  # but in the first process

    def appoint() -> None:
        nonlocal judge
        judge = Judge(config, device, args.output_dir, args.against, args.features)

    if args.num_samples:
        processes.from_first(appoint)

    def draw(config: Config) -> torch.Tensor | None:
        """(num_samples, C, H, W) uint8, from seeds 0, 1, 2, ..., in the first process."""
        batches = generate(denoiser, seeds, config, device, args.batch_size, precision, processes=processes)
        images = [batch[-1] for batch in batches]
        return torch.cat(images) if images else None

    results = {"checkpoint": str(args.checkpoint), "step": step, "against": name_of(config, args.against)}
    if args.sweep:
        results["sweep"] = sweep(denoiser, config, draw, judge, args.num_samples, processes)
        if processes.is_first:
            folder = args.output_dir / "image" / config.data.dataset / "evaluate" / config.name
            save(folder / "sweep.png", results["sweep"], args.num_samples)
        return results
    if args.num_samples:
        images = draw(config)
        if judge:
            meant = class_labels(seeds, judge.num_classes) if config.network.label_dim == judge.num_classes else None
            results["samples"] = judge.quality(images, meant if meant is None else meant.argmax(dim=1))
            results["floor"] = judge.floor(len(images))
            print_table(results["samples"], results["floor"], results["against"])
    if args.num_images != 0:
        results.update(bits(denoiser, config, chain, args, device, processes))
    return results


def read(args: argparse.Namespace) -> tuple[Config, int, dict, Chain | None]:
    """The config, a checkpoint's step and averaged weights, and the chain of which the bound is to be computed."""
    overrides = [*args.overrides, *([f"data.root={args.data_root}"] if args.data_root else [])]
    contents = checkpoint.read(args.checkpoint)
    config = checkpoint.read_config(contents, args.checkpoint, overrides)
    check_chain(config, checkpoint.read_config(contents, args.checkpoint), args.checkpoint)
    chain = asked_chain(config, args.timesteps) if args.num_images != 0 and not args.sweep else None
    return config, contents["step"], contents["ema"], chain


def asked_chain(config: Config, timesteps: int | None) -> Chain | None:
    """As many of its timesteps as asked for, or all, if the network was trained on a chain; None for other networks."""
    if not timesteps and config.preconditioning.formulation not in FORMULATIONS:
        return None
    try:
        return choices.known_chain(config, timesteps or config.chain.num_timesteps)
    except ValueError as error:
        raise UserError(f"the bound: {error}") from None


def bits(
    denoiser: Denoiser,
    config: Config,
    chain: Chain | None,
    args: argparse.Namespace,
    device: torch.device,
    processes: Processes,
) -> dict:
    """Bits per dimension of the first of the real images, by the ODE and by the chain's bound, if there is a chain."""
    train, test = processes.in_turn(lambda: real_images(config, device))
    images, labels = test if args.against == "test" else train

    def count_images() -> int:
        if args.num_images and args.num_images > len(images):
            raise UserError(f"--num_images: there are {len(images):,} images")
        return args.num_images or min(100, len(images))

    count = processes.from_first(count_images)
    images, labels = images[:count], labels[:count]
    found = {"ode": ode_bits(denoiser, config, images, labels, args.ode_steps, args.batch_size, processes)}
    if chain:
        found["bound"] = bound_bits(denoiser, config, chain, images, labels, args.batch_size, processes)
    return {"bits_per_dimension": found}


def print_table(samples: dict, floor: dict, against: str) -> None:
    """The samples' figures beside those of real images."""
    columns = (f"{samples['images']:,} samples", f"{floor['images']:,} real images")
    print(f"{f'Against {against}:':<34}{columns[0]:>16}{columns[1]:>20}")
    rows = [("Frechet distance", "frechet_distance", ".1f"), ("precision", "precision", ".3f"), ("recall", "recall", ".3f")]
    rows += [("of the right class", "right_class", ".1%"), ("class balance is off by", "class_distance", ".1%")]
    for title, key, form in rows:
        if key in samples:
            print(f"  {title:<32}{samples[key]:>16{form}}{floor[key]:>20{form}}")
    for index, shares in enumerate(zip(samples.get("class_shares", []), floor.get("class_shares", []))):
        print(f"  {f'share of class {index}':<32}{shares[0]:>16.1%}{shares[1]:>20.1%}")


if __name__ == "__main__":
    run(main)
