"""The folder of a run: which checkpoints it holds, keeps and sets aside, at every moment fit to be resumed from."""

import itertools
import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from edm import checkpoint
from edm.checkpoint import checkpoint_path, saved_steps
from edm.distributed import Processes
from edm.files import Hold, sync_folder, write_whole

OLD, REPLACED = ".old", ".replaced"  # suffixes of files that were set aside, for good and until a run has saved


class RunFolder:
    """What a run leaves behind; as a context, it waits for the last checkpoint's writing and lets the folder go.

    Args:
        path: the folder.
        processes: those of the run, the first of which writes.
        keep_last: how many checkpoints to keep, the newest; None for all.
        keep_every_n: besides, those of steps that this divides; None for none.
    """

    def __init__(self, path: Path, processes: Processes, keep_last: int | None = None, keep_every_n: int | None = None):
        self.path, self.processes, self.keep_last, self.keep_every_n = path, processes, keep_last, keep_every_n
        self.key = f"the step from which it began in {path}"
        self.held: Hold | None = None
        self.aside: list[tuple[Path, Path]] = []  # what was renamed, and to what
        self.writer = ThreadPoolExecutor(max_workers=1)
        self.writing: Future | None = None

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *error: object) -> None:
        self.writer.shutdown(wait=True)
        self.put_back()
        if self.held:
            self.held.release()

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def loss_curve(self) -> Path:
        return self.path / "loss.png"

    def picture(self, step: int) -> Path:
        return self.path / f"sample-{step}.png"

    def checkpoint(self, step: int) -> Path:
        return checkpoint_path(self.path, step)

    def steps(self) -> list[int]:
        """The steps of the checkpoints, rising."""
        return saved_steps(self.path)

    def newest_first(self) -> Iterator[Path]:
        return map(self.checkpoint, reversed(self.steps()))

    def hold(self) -> None:
        """Let no other run into the folder.

        Raises:
            UserError: there is one, or it cannot be written to.
        """
        self.held = self.held or Hold(self.path)

    def is_restarted(self) -> bool:
        """Whether torchrun has started a command line again that had come as far as a checkpoint."""
        began = self.processes.recall(self.key)
        return began is not None and any(step > began for step in self.steps())

    def contains(self, path: Path) -> bool:
        """Whether a file is one of the folder's, and not merely of the same name."""
        return path.resolve().parent == self.path.resolve()

    def begin(self, step: int, goes_on_here: bool, replace: bool) -> int:
        """Take possession for a run that goes on from a step. The checkpoints of another run are renamed, so that nothing
        takes them for this one's and nothing is lost.

        Args:
            step: the step that is done already; 0 in a new run.
            goes_on_here: it was done in this folder, whose checkpoints up to it are this run's.
            replace: let the first regular checkpoint, of this run or of one that goes on from it, delete them.

        Returns:
            How many were renamed.
        """
        self.hold()
        suffix = REPLACED if replace else OLD
        others = [self.checkpoint(other) for other in self.steps() if other > step or not goes_on_here]
        if others and self.metrics.exists():
            self.aside.append((self.metrics, unused(self.metrics, suffix)))
            write_whole(self.aside[0][1], lambda file: file.write(self.metrics.read_bytes()))
        for path in others:  # rising: until the last is gone, the newest is still the one to resume from
            self.aside.append((path, unused(path, suffix)))
            path.replace(self.aside[-1][1])
        sync_folder(self.path)
        self.processes.remember(self.key, step)
        return len(others)

    def put_back(self) -> None:
        """Undo the renaming, if the run has ended before it saved anything."""
        if self.aside:
            self.processes.remember(self.key, None)
        for path, renamed in reversed(self.aside):
            if renamed.exists():
                renamed.replace(path)

    def replaced(self) -> list[Path]:
        """The files of a run that is being replaced."""
        return sorted(self.path.glob(f"*{REPLACED}*"))

    def save(self, step: int, contents: dict, regular: bool = True, prune: bool = True) -> None:
        """Copy a checkpoint's contents and write them while the run goes on.

        Args:
            contents: what `checkpoint.write` takes, on any device.
            regular: then delete what it replaces.
            prune: then delete the checkpoints that are not to be kept.

        Raises:
            UserError: the checkpoint before could not be written.
        """
        self.wait()
        self.writing = self.writer.submit(self.write, step, copied(contents), regular, prune)

    def write(self, step: int, contents: dict, regular: bool, prune: bool) -> None:
        checkpoint.write(self.checkpoint(step), contents)
        self.aside = []  # which has become the past
        if prune and self.keep_last:
            for old in self.steps()[: -self.keep_last]:
                if not self.keep_every_n or old % self.keep_every_n:
                    self.checkpoint(old).unlink(missing_ok=True)
        for path in self.replaced() if regular else []:
            match = re.match(r"diffusion-(\d+)\.pt", path.name)
            if match and int(match[1]) != step:
                self.picture(int(match[1])).unlink(missing_ok=True)
            path.unlink(missing_ok=True)

    def look(self) -> None:
        """Raise what the writing of the last checkpoint has raised, if it is done."""
        if self.writing and self.writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the last checkpoint is written; raise what that raised."""
        if self.writing:
            self.writing.result()
            self.writing = None


def copied(value: object):
    """A nest of dicts and lists with every tensor copied to the CPU's memory."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: copied(entry) for key, entry in value.items()}
    return value


def unused(path: Path, suffix: str) -> Path:
    """The path with a suffix, and a number where something has that name."""
    names = (path.with_name(f"{path.name}{suffix}{number or ''}") for number in itertools.count())
    return next(name for name in names if not name.exists())
