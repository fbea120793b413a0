"""A training run's folder, record and signals: how it starts, goes on after an interruption, and ends."""

import argparse
import contextlib
import itertools
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import filelock
import torch
import torch.distributed as dist
from tqdm import tqdm

from lab import checkpoint, pictures
from lab.checkpoint import NOISE_BANDS, checkpoint_path, saved_steps
from lab.cli import UserError, brief, one_line
from lab.config import Config, Network
from lab.distributed import World
from lab.learner import Learner
from lab.losslog import LossLog

# If a BREAKING entry differs, a run cannot be resumed: its weights would define another function. FREE entries may differ.
BREAKING = (
    *(f"network.{name} " for name in Network.model_fields if name != "dropout"),
    *("data.resolution ", "data.channels ", "preconditioning.", "chain."),
)
FREE = ("training.num_training_steps", "training.save_and_sample_every_n", "data.root", "data.max_resident_mb")


class Run:
    """A run in its folder: checkpoints, sample grids, `metrics.jsonl` and `loss.png`. Rank 0 alone writes.

    As a context it locks the folder, so that no second run trains in it, and lets SIGINT, SIGTERM and SIGHUP end the run after
    the current step; a second signal ends it at once.

    Args:
        path: the folder.
        config: the run.
        world: the processes of the run.
    """

    def __init__(self, path: Path, config: Config, world: World):
        self.path, self.config, self.world = path, config, world
        self.lock = filelock.FileLock(path.with_name(f".{path.name}.lock"), timeout=0)
        self.signum = 0  # the signal that this rank was sent
        self.agreed = 0  # the highest signal that any rank was sent, after all ranks have exchanged it
        self.stopping = False
        self.began = time.monotonic()

    def __enter__(self) -> "Run":
        self.world.broadcast(self.acquire)
        self.handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, *SIGHUP)}
        for number, handler in self.handlers.items():
            if handler is not signal.SIG_IGN or number == signal.SIGINT:  # nohup ignores SIGHUP; "&" in a script, SIGINT
                signal.signal(number, self.on_signal)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)
        self.lock.release()

    def acquire(self) -> None:
        """Lock the folder, and delete what a killed run left half written.

        Raises:
            UserError: another run holds it, or it cannot be written to.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.lock.acquire()
            for leftover in self.path.glob(".*.tmp"):
                leftover.unlink()
        except filelock.Timeout:
            raise UserError(
                f"another run is training in {self.path}; wait for it, stop it, or choose another --output_dir"
            ) from None
        except OSError as error:
            raise UserError(f"cannot write to {self.path}: {error.strerror or error}") from None

    def on_signal(self, signum: int, frame: object) -> None:
        """Ask the run to stop after this step; end the process at once if a second signal comes half a second later or more."""
        now = time.monotonic()
        if self.signum and now > self.asked + 0.5:  # torchrun and timeout send the same signal twice
            os._exit(128 + signum)
        if not self.signum:
            self.signum, self.asked = signum, now
            if signum in SIGHUP:  # the terminal is gone: what is printed from now on goes nowhere
                for descriptor in (1, 2):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
            if self.world.is_first:
                with contextlib.suppress(OSError):  # os.write, as print must not interrupt another print
                    os.write(2, b"\nStopping after this step; once more to stop at once.\n")

    def is_asked_to_stop(self) -> bool:
        """Return whether this rank was sent a signal."""
        return self.signum > 0

    # How a run starts

    def start(self, learner: Learner, resume_from: str | None, weights_from: str | None, overwrite: bool) -> int:
        """Load the state to go on from, or the weights to start with, and claim the folder.

        Args:
            resume_from: a checkpoint, or "latest": the newest whole one of the folder.
            weights_from: a checkpoint whose averaged weights a new run starts with.
            overwrite: move the folder of an earlier run aside.

        Returns:
            The step that is already done; 0 for a new run.

        Raises:
            UserError: the checkpoint does not fit or is damaged, or the folder holds another run.
        """
        contents = self.world.broadcast(lambda: self.load_and_claim(learner, resume_from, weights_from, overwrite))
        if not self.world.is_first and "net" in contents:
            learner.load_state_dict(contents, self.path)
        elif not self.world.is_first and contents:
            learner.load_weights(contents["ema"], self.path)
        self.log = LossLog(self.path / "metrics.jsonl" if self.world.is_first else None, self.config, contents)
        return contents.get("step", 0)

    def load_and_claim(self, learner: Learner, resume_from: str | None, weights_from: str | None, overwrite: bool) -> dict:
        """Load the checkpoint or the weights on rank 0, if any; then refuse checkpoints of other runs, or move them aside.

        Returns:
            What the other ranks must load: a checkpoint's contents, {"ema": weights} or {}.
        """
        for named in (resume_from, weights_from):
            if named not in (None, "latest"):
                checkpoint.check_exists(named)
        key = f"started in {self.path}"  # after a crash, torchrun starts the same command again: then go on
        if self.world.has_started(key) and saved_steps(self.path):
            resume_from, overwrite = "latest", False
        goes_on_here = resume_from == "latest" or (
            resume_from is not None and Path(resume_from).resolve().parent == self.path.resolve()
        )
        others = [] if goes_on_here else saved_steps(self.path)
        if others and not overwrite:
            raise UserError(
                f"{self.path} holds the checkpoints of another run: go on from the last one with --resume_from latest, "
                f"or move them aside with --overwrite ({checkpoint_path(self.path, others[-1])})"
            )
        if resume_from is not None:
            contents = self.resume(learner, resume_from)
        elif weights_from is not None:
            contents = {"ema": checkpoint.load(weights_from)["ema"]}
            learner.load_weights(contents["ema"], weights_from)
        else:
            contents = {}
        first_step = contents.get("step", 0)
        if first_step > self.config.training.num_training_steps:
            raise UserError(f"the run is at step {first_step} already; ask for more with --num_training_steps")
        if others:
            aside = unused(self.path.with_name(f"{self.path.name}.old"))
            self.path.rename(aside)
            self.path.mkdir()
            print(f"Moved the earlier run to {aside}")
        for kind in ("diffusion", "snapshot"):
            for later in [step for step in saved_steps(self.path, kind) if step > first_step]:
                path = checkpoint_path(self.path, later, kind)  # this run will make another one of that step
                aside = path.rename(unused(path.with_name(f"{path.name}.old")))
                print(f"Renamed {path} to {aside.name}")
        self.world.mark_started(key)
        return contents

    def resume(self, learner: Learner, resume_from: str) -> dict:
        """Load the named checkpoint into the learner, or the newest one that is not damaged; returns its contents."""
        latest = resume_from == "latest"
        paths = [checkpoint_path(self.path, step) for step in reversed(saved_steps(self.path))] if latest else [resume_from]
        for path in paths:
            try:
                contents = checkpoint.load(path)
                changed = differences(checkpoint.read_config(contents, path), self.config)
                breaking = [entry for entry in changed if entry.startswith(BREAKING)]
                if not breaking:
                    learner.load_state_dict(contents, path)
            except UserError as error:
                if not latest:
                    raise
                print(f"{one_line(str(error))}; trying the one before it")
                continue
            if breaking:
                raise UserError(f"no run can go on from {path} with another {', '.join(breaking)}")
            print(f"Going on from {path}" + (f", though with another {', '.join(changed)}" if changed else ""))
            return contents
        raise UserError(f"--resume_from latest: {self.path} has no whole checkpoint; leave the option out to start a new run")

    def announce(self, learner: Learner, num_images: int, device: torch.device) -> None:
        """Print what is trained, on what, and where everything is written."""
        millions = sum(parameter.numel() for parameter in learner.net.parameters()) / 1e6
        devices = f"{self.world.size} x {device}" if self.world.size > 1 else str(device)
        precision = str(learner.precision).removeprefix("torch.")
        print(
            f"{self.config.name}: {millions:.2f} M parameters, {num_images:,} images of {self.config.data.dataset}, "
            f"on {devices} in {precision}, to {self.path}"
        )

    # What a run writes

    @property
    def loss_curve(self) -> Path:
        """Return the path of the loss curve."""
        return self.path / "loss.png"

    def grid(self, step: int) -> Path:
        """Return the path of the sample grid of a step."""
        return self.path / f"sample-{step}.png"

    def is_due(self, step: int) -> bool:
        """Return whether a checkpoint and a sample grid are due after this step."""
        training = self.config.training
        return step > 0 and (step % training.save_and_sample_every_n == 0 or step == training.num_training_steps)

    def is_snapshot_due(self, step: int) -> bool:
        """Return whether a snapshot of the averages is due after this step."""
        every_n = self.config.ema.snapshot_every_n
        return every_n is not None and (step % every_n == 0 or step == self.config.training.num_training_steps)

    def lacks_grid(self, step: int) -> bool:
        """Return whether the sample grid of this step is due and missing: the run was stopped before it was drawn."""
        return self.world.broadcast(lambda: self.is_due(step) and not self.grid(step).exists())

    def steps(self, first: int) -> Iterator[int]:
        """Yield the number of every step after `first`, with a progress bar, until the last one or until the run must stop."""
        last = self.config.training.num_training_steps
        options = {"unit": "step", "mininterval": 0.5, "disable": not self.world.is_first}
        with tqdm(desc=self.config.name, initial=first, total=last, **options) as self.bar:
            for step in range(first, last + 1):
                if step > first:
                    yield step
                if self.is_due(step):  # a signal may have ended the drawing of samples
                    self.agreed = self.world.all_reduce_max(self.signum)
                if self.stopping or self.agreed:
                    return

    def record(self, loss: torch.Tensor, sigma: torch.Tensor, importance: torch.Tensor) -> None:
        """Record the mean loss of a step, in all and by noise level, and set `stopping` if a signal or divergence ends the run.

        Args:
            loss, sigma, importance: (batch_size,), one for each image of the batch of all ranks.
        """
        self.log.add(loss, sigma, importance)
        self.agreed = self.world.all_reduce_max(self.signum)  # a signal that comes meanwhile ends the next step
        # Not after a signal: the reader of the bar, such as `tee`, may have exited.
        if not self.signum and self.bar.update():  # redrawn: only then are the losses fetched from the device
            self.log.flush()
            rate = (self.bar.format_dict["rate"] or 0) * self.config.training.batch_size
            self.bar.set_postfix_str(f"loss {self.log.mean():.1f}, {rate:.0f} images/s")
        self.stopping = self.world.all_reduce_max(self.agreed > 0 or self.log.has_diverged()) > 0

    def save(self, step: int, learner: Learner) -> None:
        """Write the checkpoint of a step, delete old ones beyond `keep_last`, and draw the loss curve.

        Raises:
            UserError: the run has diverged, or the checkpoint cannot be written.
        """
        self.log.flush()
        self.world.broadcast(lambda: self.write(step, learner))

    def write(self, step: int, learner: Learner) -> None:
        """Do what `save` says, on rank 0."""
        if self.log.has_diverged():
            steps = saved_steps(self.path)
            kept = f"the last checkpoint is {checkpoint_path(self.path, steps[-1])}" if steps else "nothing was saved yet"
            raise UserError(
                f"the run has diverged at step {step}: most of the last losses are not finite, or above {self.log.limit:,.0f}; "
                f"try a lower training.learning_rate, more training.lr_rampup_images or training.max_grad_norm=1 ({kept})"
            )
        losses = self.log.table()
        contents = {"step": step, "name": self.config.name, "config": self.config.to_dict(), "losses": losses}
        checkpoint.save(checkpoint_path(self.path, step), contents | learner.state_dict())
        keep = self.config.checkpoint
        if keep.keep_last and not any(self.log.exploded()):
            for old in saved_steps(self.path)[: -keep.keep_last]:
                if not keep.keep_every_n or old % keep.keep_every_n:
                    checkpoint_path(self.path, old).unlink(missing_ok=True)
        pictures.save_loss_curve(self.loss_curve, self.log.steps, losses, NOISE_BANDS)

    def save_snapshot(self, step: int, learner: Learner) -> None:
        """Write the averages of a step in half precision, for `lab.ema`. No snapshot is ever deleted.

        Raises:
            UserError: it cannot be written.
        """
        averages = {width: checkpoint.halved(average.net.state_dict()) for width, average in learner.power_ema.items()}
        contents = {"step": step, "name": self.config.name, "config": self.config.to_dict()}
        contents |= {"ema": averages[min(averages)], "power_ema": averages}
        self.world.broadcast(lambda: checkpoint.save(checkpoint_path(self.path, step, "snapshot"), contents))

    def finish(self, first_step: int, step: int) -> None:
        """Print where everything is and what to do next.

        Raises:
            SystemExit: a signal stopped the run (exit code 128 + signal); the command that goes on is printed.
        """
        if self.agreed:
            print(f"Stopped after step {step}. To go on:\n  {command_to_resume(sys.argv)}", flush=True)
            raise SystemExit(128 + self.agreed)
        path, count = checkpoint_path(self.path, step), self.config.sampler.num_samples
        more = "" if step > first_step else " Ask for more with --num_training_steps."
        print(
            f"Done: {step - first_step} steps in {(time.monotonic() - self.began) / 60:.1f} minutes.{more}\n"
            f"  samples     {self.grid(step)}\n"
            f"  checkpoint  {path}\n"
            f"  losses      {self.loss_curve}, {self.log.path}\n"
            f"Next: python sample.py --checkpoint {shlex.quote(str(path))} --num_samples {count} --gif"
        )


SIGHUP = [signal.SIGHUP] if hasattr(signal, "SIGHUP") else []  # Windows has none


def differences(old: Config, new: Config) -> list[str]:
    """Return the entries that matter for training and differ, such as "training.seed (0, now 1)"."""
    old, new = old.to_dict(), new.to_dict()
    entries = [(section, key) for section in old if section not in ("sampler", "checkpoint") for key in old[section]]
    return [
        f"{section}.{key} ({brief(old[section][key])}, now {brief(new[section][key])})"
        for section, key in entries
        if old[section][key] != new[section][key] and f"{section}.{key}" not in FREE
    ]


def unused(path: Path) -> Path:
    """Return the path, with a number appended if something has that name."""
    names = (path.with_name(f"{path.name}{number or ''}") for number in itertools.count())
    return next(name for name in names if not name.exists())


def command_to_resume(argv: list[str]) -> str:
    """Return the command line that goes on with the run which this one started."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume_from")
    parser.add_argument("--load_model_weights_from_checkpoint")
    parser.add_argument("--overwrite", action="store_true")
    kept = parser.parse_known_args(argv[1:])[1]
    program = ["python"]
    if dist.is_torchelastic_launched():
        local_size, size = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
        program = ["torchrun", f"--nproc_per_node={local_size}"]
        program += [f"--nnodes={size // local_size}"] if size > local_size else []
    return shlex.join([*program, argv[0], "--resume_from", "latest", *kept])
