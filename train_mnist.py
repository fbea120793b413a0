"""Train a diffusion model as a config says, MNIST by default."""

import sys
from pathlib import Path

from edm import config as configs
from edm.cli import Parser, command_to_resume, run
from edm.distributed import joined
from edm.errors import Stopped
from edm.training import train

FLAGS = {  # flags that stand for config entries
    "num_training_steps": "training.num_training_steps",
    "batch_size": "training.batch_size",
    "save_and_sample_every_n": "training.save_and_sample_every_n",
    "mixed_precision": "training.mixed_precision",
    "seed": "training.seed",
    "data_root": "data.root",
}


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replace any entry of the config")
    parser.add_argument("--config_path", default="configs/edm.yaml", help="the YAML config")
    for flag, entry in FLAGS.items():
        parser.add_argument(f"--{flag}", metavar="VALUE", help=f"short for {entry}=VALUE")
    parser.add_argument(
        "--resume_from", metavar="CHECKPOINT", help="go on from a checkpoint, or from the 'latest' of the run's folder"
    )
    parser.add_argument(
        "--load_model_weights_from_checkpoint", metavar="CHECKPOINT", help="start a new run with its averaged weights"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the checkpoints of an earlier run in the same folder")
    parser.add_argument("--device", help="cuda, mps or cpu; by default the first of them that there is")
    parser.add_argument("--output_dir", type=Path, default=Path("output"), help="where everything is written")
    args = parser.parse_intermixed_args()
    if args.resume_from and args.load_model_weights_from_checkpoint:
        parser.error("--resume_from goes on with its own weights; leave out --load_model_weights_from_checkpoint")

    flags = [f"{entry}={getattr(args, flag)}" for flag, entry in FLAGS.items() if getattr(args, flag) is not None]
    config = configs.load(args.config_path, [*args.overrides, *flags])
    with joined(args.device) as (device, processes):
        try:
            train(
                config,
                device,
                args.output_dir,
                resume_from=args.resume_from,
                weights_from=args.load_model_weights_from_checkpoint,
                overwrite=args.overwrite,
                processes=processes,
            )
        except Stopped as stop:
            print(f"Stopped after step {stop.step}. To go on:\n  {command_to_resume(sys.argv)}", flush=True)
            raise SystemExit(128 + stop.signum) from None


if __name__ == "__main__":
    run(main)
