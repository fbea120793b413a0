"""Sample images from a checkpoint: a grid, and on request single images and an animation of the first ones."""

# First, as from here on Ctrl-C ends without a traceback.
from lab.cli import Parser, UserError, run_script, seed_list, whole_number

# isort: split
import argparse
from pathlib import Path

import torch

from lab import gallery, pictures
from lab.build import build_sampler
from lab.config import Sampler
from lab.device import autocast_dtype, explain_device_errors
from lab.distributed import distributed
from lab.generate import (
    add_checkpoint_arguments,
    check_guide_is_used,
    export,
    generate,
    grid_columns,
    load_denoiser,
    networks,
)

FLAGS = [name for name in Sampler.model_fields if name != "num_samples"]  # each replaces an entry of the config's sampler
MAX_ANIMATED = 10  # images in the animation
MAX_GRID = 2500  # images in the grid; further ones are written as single files alone


def main() -> None:
    args = parse_arguments()
    overrides = [f"sampler.{name}={getattr(args, name)}" for name in FLAGS if getattr(args, name) is not None]
    if args.export:
        export(args.checkpoint, args.export, args.config_path, overrides)
        return
    advice = f"lower --batch_size (now {args.batch_size}), or choose fp16 or bf16 for --mixed_precision"
    with distributed(args.device) as (device, world), explain_device_errors(advice):
        config, denoiser, _ = load_denoiser(args.checkpoint, args.config_path, overrides, device, world)
        label_dim, class_index = config.network.label_dim, args.class_index
        if class_index is not None and class_index >= label_dim:
            known = f"its classes are 0 to {label_dim - 1}" if label_dim else "the network is unconditional"
            raise UserError(f"--class: {class_index} is not a class of {args.checkpoint}: {known}")
        seeds = args.seeds or list(range(args.num_samples or config.sampler.num_samples))
        build_sampler(config)  # raises now if its choices do not fit together, before anything is written
        check_guide_is_used(config)
        folder = args.output_dir or Path("output/image") / config.data.dataset / "sample" / config.name
        pictures.check_writable(folder / "grid.png")
        if args.compile:
            for network in networks(denoiser):
                network.model.compile(dynamic=False)

        precision = world.common_precision(autocast_dtype(args.mixed_precision, device))
        kept, done = [], 0
        for images in generate(denoiser, seeds, config, device, args.batch_size, precision, class_index, world=world):
            for seed, image in zip(seeds[done:], images) if args.save_images else ():
                pictures.save_image(folder / "images" / f"{seed:06d}.png", image)
            if done < MAX_GRID:
                kept.append(images)
            done += len(images)

        if world.is_first:
            columns = grid_columns(seeds, label_dim, class_index)
            pictures.save_image(folder / "grid.png", pictures.grid(torch.cat(kept)[:MAX_GRID], columns))
            print(f"{min(len(seeds), MAX_GRID)} images of {len(seeds)} in {folder / 'grid.png'}")
            if args.save_images:
                print(f"{len(seeds)} single images in {folder / 'images'}")
            if args.gif:
                animated = seeds[: min(MAX_ANIMATED, args.batch_size)]
                gallery.animation(folder / "reverse.gif", denoiser, config, device, precision, animated, class_index)
                print(f"the reverse process in {folder / 'reverse.gif'}")


def parse_arguments() -> argparse.Namespace:
    parser = Parser(__doc__)
    add_checkpoint_arguments(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--num_samples", type=whole_number(1), help="how many images, from seeds 0, 1, 2, ... (default: the config's)"
    )
    which.add_argument("--seeds", type=seed_list, help="which images, such as 0-63,100; an image depends on its seed alone")
    parser.add_argument(
        "--class",
        type=whole_number(0),
        dest="class_index",
        metavar="K",
        help="the class of all images (default: all classes in turn)",
    )
    for name in FLAGS:
        value = "CHECKPOINT" if name == "guide" else "VALUE"
        parser.add_argument(f"--{name}", metavar=value, help=f"short for sampler.{name}={value}")
    parser.add_argument("--batch_size", type=whole_number(1), default=64, help="images at a time (default: 64)")
    parser.add_argument("--save_images", action="store_true", help="also write every image as images/<seed>.png")
    parser.add_argument("--gif", action="store_true", help="also write the way from noise to the first images as reverse.gif")
    parser.add_argument("--output_dir", type=Path, help="where to (default: output/image/<data set>/sample/<config name>)")
    parser.add_argument("--compile", action="store_true", help="compile the network with torch.compile")
    parser.add_argument(
        "--export",
        type=Path,
        metavar="FILE.safetensors",
        help="write the averaged weights alone, in half precision, instead of sampling",
    )
    return parser.parse_args()


if __name__ == "__main__":
    run_script(main)
