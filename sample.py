"""Sample images from a checkpoint: a grid, and on request single PNGs and a GIF of the reverse process."""

import dataclasses
from pathlib import Path

from edm.cli import Parser, run, seed_list, whole_number
from edm.config import SamplerConfig
from edm.device import explain_out_of_memory
from edm.distributed import joined
from edm.generate import export, write_samples

SAMPLER_FLAGS = [field.name for field in dataclasses.fields(SamplerConfig) if field.name != "num_samples"]


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--checkpoint", type=Path, required=True, help="a diffusion-*.pt file")
    parser.add_argument("--config_path", type=Path, help="the YAML config (default: the one that the checkpoint carries)")
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
        help="the class of all images (default: all in turn)",
    )
    for name in SAMPLER_FLAGS:
        parser.add_argument(f"--{name}", metavar="VALUE", help=f"replaces the config's sampler.{name}")
    parser.add_argument(
        "--batch_size",
        type=lambda text: None if text == "auto" else whole_number(1)(text),
        default=64,
        help="images at a time, or auto: as many as there is memory for, up to 512 (default: 64)",
    )
    parser.add_argument("--save_images", action="store_true", help="also write every image as images/<seed>.png")
    parser.add_argument("--gif", action="store_true", help="also write the reverse process as reverse.gif")
    parser.add_argument("--output_dir", type=Path, help="where to (default: output/image/<dataset>/sample/<config name>)")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the first of them that there is)")
    parser.add_argument(
        "--mixed_precision",
        choices=["no", "auto", "fp16", "bf16"],
        default="no",
        help="the network's precision (default: no)",
    )
    parser.add_argument(
        "--compile",
        choices=["auto", "true", "false"],
        default="auto",
        help="compile the network; auto does on CUDA, where ten minutes of work are to come (default: auto)",
    )
    parser.add_argument(
        "--export",
        type=Path,
        metavar="FILE",
        help="write the averaged weights alone, in half precision, instead of sampling",
    )
    args = parser.parse_args()

    overrides = [f"sampler.{name}={getattr(args, name)}" for name in SAMPLER_FLAGS if getattr(args, name) is not None]
    if args.export:
        export(args.checkpoint, args.export)
        return
    advice = f"lower --batch_size (now {args.batch_size or 'auto'}), or choose fp16 or bf16 for --mixed_precision"
    with joined(args.device) as (device, processes), explain_out_of_memory(advice):
        write_samples(
            args.checkpoint,
            args.config_path,
            overrides,
            args.seeds or (list(range(args.num_samples)) if args.num_samples else None),
            device,
            batch_size=args.batch_size,
            mixed_precision=args.mixed_precision,
            class_index=args.class_index,
            output_dir=args.output_dir,
            save_images=args.save_images,
            gif=args.gif,
            compile=args.compile,
            processes=processes,
        )


if __name__ == "__main__":
    run(main)
