"""Write a checkpoint with an average of the weights whose width is chosen after training, from the snapshots of a run."""

from pathlib import Path

from edm.ema import reconstruct
from lab import checkpoint
from lab.checkpoint import WIDTHS, check_name, checkpoint_path, saved_steps
from lab.cli import Parser, UserError, run_script, whole_number

MAX_RESIDUAL = 0.05  # of the profile; at 2.6% the weights were off by 0.1%


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("folder", type=Path, metavar="RUN_FOLDER", help="the run's folder, which holds snapshot-*.pt files")
    parser.add_argument(
        "--width", type=float, required=True, help="width of the average, relative to the training so far, such as 0.05"
    )
    parser.add_argument("--step", type=whole_number(1, 2**53), help="step of the average (default: that of the last snapshot)")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the checkpoint to write")
    args = parser.parse_args()
    check_name(args.output, "--output")
    contents, summary = average(args.folder, args.width, args.step)
    checkpoint.save(args.output, contents)
    print(f"{args.output}: {summary}")


def average(folder: Path, width: float, step: int | None = None) -> tuple[dict, str]:
    """Return the average of this width after a step (default: the last snapshot's) as a checkpoint, and what to print about it.

    Raises:
        UserError: a snapshot cannot be read or is of another network, or they are too few for this width or step.
    """
    saved = saved_steps(folder, "snapshot")
    step = step or max(saved, default=0)
    steps = [earlier for earlier in saved if 0 < earlier <= step]
    if not steps:
        up_to = f" up to step {step}" if saved else ""
        raise UserError(f"{folder} holds no snapshot-*.pt{up_to}; a run with ema.snapshot_every_n writes them")
    try:
        factors, residual = reconstruct([(earlier, known) for earlier in steps for known in WIDTHS], (step, width))
    except ValueError as error:
        raise UserError(f"--width: {error}") from None
    summary = f"{len(steps)} snapshot{'s' * (len(steps) > 1)} up to step {steps[-1]}, residual {residual:.2%}"
    if not residual <= MAX_RESIDUAL:
        raise UserError(
            f"{folder} cannot give an average of width {width:g} at step {step}: {summary}, of {MAX_RESIDUAL:.0%} allowed; "
            f"the widths {WIDTHS[0]:g} and {WIDTHS[1]:g} at the step of a snapshot are always possible"
        )
    weights = {}
    for earlier, pair in zip(steps, factors.view(-1, len(WIDTHS)).tolist()):
        path = checkpoint_path(folder, earlier, "snapshot")
        contents = checkpoint.load(path)
        for known, factor in zip(WIDTHS, pair):
            terms = contents.get("power_ema", {}).get(known, {})
            if contents["step"] != earlier or not terms or (weights and shapes(terms) != shapes(weights)):
                raise UserError(
                    f"{path} is not the snapshot of step {earlier}, or belongs to another network than that of step {steps[0]}"
                )
            if not all(tensor.isfinite().all() for tensor in terms.values()):
                raise UserError(f"the weights in {path} are not finite numbers")
            weights = {name: weights.get(name, 0) + factor * tensor.double() for name, tensor in terms.items()}
    ema = {name: tensor.float() for name, tensor in weights.items()}
    contents = {"step": step, "name": contents["name"], "config": contents["config"], "ema": ema}
    return contents, f"the average of width {width:g} at step {step}, from {summary}"


def shapes(weights: dict) -> dict:
    """Return the shape of each weight."""
    return {name: tensor.shape for name, tensor in weights.items()}


if __name__ == "__main__":
    run_script(main)
