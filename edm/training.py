"""The training run: the loop, its pictures, checkpoints and record, and how it goes on after whatever has stopped it."""

import contextlib
import shlex
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from edm import checkpoint, pictures
from edm.config import Config
from edm.data import batches, open_dataset
from edm.device import explain_out_of_memory, keep_memory
from edm.distributed import Processes
from edm.errors import Stopped, UserError, brief
from edm.generate import generate, grid_columns
from edm.interrupt import Interruption
from edm.learner import Learner
from edm.loss import NOISE_BANDS
from edm.losslog import LossLog
from edm.runfolder import RunFolder


def train(
    config: Config,
    device: torch.device,
    output_dir: Path,
    resume_from: str | None = None,
    weights_from: str | None = None,
    overwrite: bool = False,
    processes: Processes | None = None,
) -> None:
    """Train, writing samples and checkpoints to `output_dir`/image/<dataset>/<config name> on the way.

    Args:
        resume_from: a checkpoint to go on from exactly as if the run had never stopped, or "latest".
        weights_from: a checkpoint whose (averaged) weights a new run starts with.
        overwrite: let the first checkpoint replace all those of an earlier run in the folder.
        processes: those that train together, on this process's `device`; by default this one alone.

    Raises:
        UserError: whatever a person can mend.
        Stopped: SIGINT, SIGTERM or SIGHUP came; a checkpoint of the last step is written.
    """
    processes, training, data = processes or Processes(), config.training, config.data
    if training.batch_size < processes.size:
        raise UserError(
            f"training.batch_size: {training.batch_size} images cannot be divided between {processes.size} processes"
        )
    if device.type == "cpu":
        keep_memory()
    path = output_dir / "image" / data.dataset / config.name
    advice = (
        f"lower training.batch_size (now {training.batch_size}), raise training.accumulation (now {training.accumulation}) "
        f"or choose fp16 or bf16 for training.mixed_precision (now {training.mixed_precision})"
    )
    with (
        explain_out_of_memory(advice),
        RunFolder(path, processes, config.checkpoint.keep_last, config.checkpoint.keep_every_n) as folder,
    ):
        processes.from_first(lambda: path.is_dir() and folder.hold())  # before anything that takes long
        learner = Learner(config, device, processes)
        dataset = processes.in_turn(
            lambda: open_dataset(data.dataset, data.root, data.resolution, data.channels, config.network.label_dim)
        )
        contents = processes.from_first(lambda: begin(learner, folder, resume_from, weights_from, overwrite))
        if not processes.is_first:
            take_up(learner, contents, folder.path)
        first_step, records = contents.get("step", 0), contents.get("losses", torch.zeros(0)).clone()
        learner.compile(training.num_training_steps - first_step, contents.get("compiled", False if first_step else None))
        del contents  # its tensors are views of a file that may be deleted
        log = LossLog(
            folder.metrics if processes.is_first else None,
            first_step,
            records,
            training.batch_size,
            untrained_loss=data.channels * data.resolution**2,
        )
        millions = sum(parameter.numel() for parameter in learner.net.parameters()) / 1e6
        print(
            f"{config.name}: {millions:.2f} M parameters, {len(dataset):,} images of {data.dataset}, "
            f"on {f'{processes.size} x ' * (processes.size > 1)}{device} in {str(learner.precision).removeprefix('torch.')}, "
            f"to {folder.path}"
        )
        stream = batches(dataset, training.batch_size, training.seed, first_step, device, data.max_resident_mb, processes)
        with contextlib.closing(stream):
            run(learner, folder, log, stream, first_step)


def begin(learner: Learner, folder: RunFolder, resume_from: str | None, weights_from: str | None, overwrite: bool) -> dict:
    """Take up an old run or prepare a new one, and take possession of the folder.

    Returns:
        What the other processes are to take up.
    """
    if folder.is_restarted():
        resume_from = "latest"
    goes_on_here = resume_from == "latest" or (resume_from is not None and folder.contains(Path(resume_from)))
    others = [] if goes_on_here else [*folder.newest_first(), *folder.replaced()]
    if others and not overwrite:
        raise UserError(
            f"{folder.path} holds the checkpoints of another run: go on from the last one with --resume_from latest, "
            f"or replace them with --overwrite ({others[0]})"
        )
    if resume_from is not None:
        contents = resume(learner, folder, resume_from)
    else:
        contents = {"ema": checkpoint.read(weights_from)["ema"]} if weights_from else {}
        take_up(learner, contents, weights_from)
    step = contents.get("step", 0)
    if renamed := folder.begin(step, goes_on_here, replace=overwrite):
        print(f"Renamed {renamed} other checkpoints to *.pt.{'replaced, until this run has saved' if overwrite else 'old'}")
    return contents


def take_up(learner: Learner, contents: dict, path: str | Path) -> None:
    """A run's state, or a new run's first weights, or nothing."""
    if "step" in contents:
        learner.load_state_dict(contents, path)
    elif contents:
        for net in (learner.net, learner.ema.net):
            checkpoint.load_weights(net, contents["ema"], path)


def resume(learner: Learner, folder: RunFolder, resume_from: str) -> dict:
    """Take up a checkpoint: the one named, or the newest whole one, every damaged one being named and passed over."""
    for path in folder.newest_first() if resume_from == "latest" else [Path(resume_from)]:
        try:
            contents = checkpoint.read(path)
            changed = differences(checkpoint.read_config(contents, path), learner.config)
            breaking = [
                change for change in changed if change.startswith(BREAKING) and not change.startswith("network.dropout")
            ]
            if not breaking:
                learner.load_state_dict(contents, path)
        except UserError as error:
            if resume_from != "latest":
                raise
            print(f"{error}; trying the one before it")
            continue
        if breaking:
            raise UserError(f"no run can go on from {path} with another {', '.join(breaking)}")
        print(f"Going on from {path}" + (f", though with another {', '.join(changed)}" if changed else ""))
        return contents
    raise UserError(
        f"--resume_from latest: there is no whole checkpoint in {folder.path}"
        f"{f' (but {folder.replaced()[0]})' if folder.replaced() else ''}; leave the option out to start a new run"
    )


# What makes another function of the weights, and what has no part in the course of training.
BREAKING = ("network.", "data.resolution", "data.channels", "preconditioning.", "chain.")
FREE = ("training.num_training_steps", "training.save_and_sample_every_n", "data.root", "data.max_resident_mb")


def differences(old: Config, new: Config) -> list[str]:
    """The entries that bear on the course of training and differ, such as "training.seed (0, now 1)"."""
    old, new = old.to_dict(), new.to_dict()
    entries = [(section, key) for section in old if section not in ("sampler", "checkpoint") for key in old[section]]
    return [
        f"{section}.{key} ({brief(old[section][key])}, now {brief(new[section][key])})"
        for section, key in entries
        if old[section][key] != new[section][key] and f"{section}.{key}" not in FREE
    ]


DIVERGED = 1000  # a reason to stop that is above all signals


def run(
    learner: Learner,
    folder: RunFolder,
    log: LossLog,
    stream: Iterator[tuple[torch.Tensor, torch.Tensor]],
    first_step: int,
) -> None:
    """The loop. Every so often it saves and draws; a signal, or a loss that explodes, ends it between two steps."""
    training, processes = learner.config.training, learner.processes
    last_step, every_n, began = training.num_training_steps, training.save_and_sample_every_n, time.monotonic()
    if first_step > last_step:
        raise UserError(f"the run is at step {first_step} already; ask for more with --num_training_steps")
    stop, step = 0, first_step
    with (
        Interruption(quiet=not processes.is_first) as interruption,
        tqdm(
            desc=learner.config.name,
            initial=first_step,
            total=last_step,
            unit="step",
            mininterval=0.5,
            disable=not processes.is_first,
        ) as bar,
    ):
        due = first_step > 0 and (first_step % every_n == 0 or first_step == last_step)
        if processes.from_first(lambda: due and not folder.picture(first_step).exists()):  # the run was stopped before it
            with interruption.abandoning(processes.size == 1):
                draw(learner, log, folder, first_step)
            stop = processes.highest(interruption.signum)
        for step in range(first_step + 1, last_step + 1) if not stop else []:
            log.add(learner.step(*next(stream), step))
            if bar.update():  # the bar was due to be drawn: the one time that losses are fetched
                log.flush()
                folder.look()
                rate = (bar.format_dict["rate"] or 0) * training.batch_size
                bar.set_postfix_str(f"loss {log.mean():.1f}, {rate:.0f} images/s")
                stop = DIVERGED if log.has_diverged() else 0
            due = step % every_n == 0 or step == last_step
            stop = processes.highest(max(stop, interruption.signum))
            if due or stop:
                save(learner, log, folder, step, regular=due)
            if due and not stop:
                with interruption.abandoning(processes.size == 1):
                    draw(learner, log, folder, step)
                stop = processes.highest(interruption.signum)
            if stop:
                break
        folder.wait()
    if stop:
        raise Stopped(stop, step)
    say_goodbye(folder, step - first_step, step, time.monotonic() - began, learner.config.sampler.num_samples)


def save(learner: Learner, log: LossLog, folder: RunFolder, step: int, regular: bool) -> None:
    """Write the checkpoint of a step, unless the run has diverged."""
    log.flush()
    learner.processes.from_first(lambda: check_health(log, folder, step))
    if learner.processes.is_first:
        contents = {
            "step": step,
            "name": learner.config.name,
            "config": learner.config.to_dict(),
            **learner.state_dict(),
            "losses": log.table(),
        }
        folder.save(step, contents, regular, prune=not any(log.exploded()))


def check_health(log: LossLog, folder: RunFolder, step: int) -> None:
    """Stop a run that has diverged."""
    if log.has_diverged():
        folder.wait()
        kept = f"the last checkpoint is {folder.checkpoint(folder.steps()[-1])}" if folder.steps() else "nothing was saved yet"
        exploded = log.exploded()
        raise UserError(
            f"the run has diverged at step {step}: {sum(exploded)} of the last {len(exploded)} losses are not finite or above "
            f"{log.limit():,.0f}; try a lower training.learning_rate, more training.lr_rampup_images or "
            f"training.max_grad_norm=1 ({kept})"
        )


def draw(learner: Learner, log: LossLog, folder: RunFolder, step: int) -> None:
    """The loss curve so far, and samples of the averaged weights."""
    config, processes = learner.config, learner.processes
    if processes.is_first:
        pictures.save_loss_curve(folder.loss_curve, log.steps, log.table(), NOISE_BANDS)
    seeds = list(range(config.sampler.num_samples))
    batch_size = 4 * config.training.batch_size  # without gradients there is room for more
    frames = generate(learner.ema.net, seeds, config, learner.device, batch_size, learner.precision, processes=processes)
    images = [batch[-1] for batch in frames]
    if processes.is_first:
        columns = grid_columns(seeds, config.network.label_dim)
        pictures.save_image(folder.picture(step), pictures.grid(torch.cat(images), columns=columns))


def say_goodbye(folder: RunFolder, steps: int, step: int, seconds: float, num_samples: int) -> None:
    """Tell where things are, and what to do next."""
    path = folder.checkpoint(step)
    print(
        f"Done: {steps} steps in {seconds / 60:.1f} minutes.{'' if steps else ' Ask for more with --num_training_steps.'}\n"
        f"  samples     {folder.picture(step)}\n"
        f"  checkpoint  {path}\n"
        f"  losses      {folder.loss_curve}, {folder.metrics}\n"
        f"Next: python sample.py --checkpoint {shlex.quote(str(path))} --num_samples {num_samples} --gif"
    )
