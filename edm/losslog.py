"""The record of a run's losses, `metrics.jsonl`: one line a step, written when somebody looks."""

import json
import math
from pathlib import Path

import torch

from edm.errors import UserError
from edm.files import write_whole
from edm.loss import NUM_BANDS

RECENT = 10  # steps whose losses tell whether a run has diverged
EXPLODED = 100  # times the untrained network's loss


class LossLog:
    """Losses wait on the device until `flush` fetches them together, so that a training step never waits for its number.

    Args:
        path: the file, written anew from the losses so far; None keeps the losses without writing them.
        step: the step that is done already; 0 in a new run.
        records: those of the steps up to it, (steps, 1 + bands) or, of older runs, (steps,): from its checkpoint.
        batch_size: images of a step.
        untrained_loss: about what the loss of an untrained network is.
    """

    def __init__(self, path: Path | None, step: int, records: torch.Tensor, batch_size: int, untrained_loss: float):
        self.path, self.batch_size, self.untrained_loss = path, batch_size, untrained_loss
        self.pending: list[torch.Tensor] = []
        if records.ndim == 1:
            records = torch.cat([records[:, None], torch.full((len(records), NUM_BANDS), math.nan)], dim=1)
        self.records: list[list[float]] = records.tolist()
        self.first_step = step - len(records) + 1  # 1, but for a checkpoint that lacks its losses
        if path:
            write_whole(path, lambda file: file.write(self.lines(0).encode()))

    @property
    def steps(self) -> range:
        """The steps whose losses are known."""
        return range(self.first_step, self.first_step + len(self.records))

    def add(self, record: torch.Tensor) -> None:
        """Note the next step's loss and those of its noise levels, (1 + bands,) on any device."""
        self.pending.append(record)

    def lines(self, start: int) -> str:
        """The file's lines from the `start`-th loss on."""
        lines = []
        for step, record in zip(self.steps[start:], self.records[start:]):
            loss, *bands = (number if math.isfinite(number) else None for number in record)  # JSON has no others
            lines.append(json.dumps({"step": step, "images": step * self.batch_size, "loss": loss, "by_noise_level": bands}))
        return "".join(line + "\n" for line in lines)

    def flush(self) -> None:
        """Fetch the losses that are pending, and write them. (What a power cut takes of the file is in the checkpoint.)"""
        known = len(self.records)
        if self.pending:
            self.records += torch.stack(self.pending).tolist()
            self.pending.clear()
        if self.path:
            try:
                with open(self.path, "a") as file:
                    file.write(self.lines(known))
            except OSError as error:
                raise UserError(f"cannot write {self.path}: {error.strerror}") from None

    def table(self) -> torch.Tensor:
        """The records (steps, 1 + bands) in float64."""
        return torch.tensor(self.records, dtype=torch.float64).view(-1, 1 + NUM_BANDS)

    def mean(self) -> float:
        """Of the latest 100 steps."""
        recent = [record[0] for record in self.records[-100:]]
        return sum(recent) / max(len(recent), 1)

    def limit(self) -> float:
        """A loss beyond anything that training begins with."""
        return EXPLODED * max(self.untrained_loss, *(record[0] for record in self.records[:1] if math.isfinite(record[0])), 0)

    def exploded(self) -> list[bool]:
        """Which of the most recent losses are beyond the limit, or not finite."""
        return [not record[0] <= self.limit() for record in self.records[-RECENT:]]

    def has_diverged(self) -> bool:
        """Whether most of the recent losses have exploded: a single one can be bad luck, or an overflow that fp16 mends."""
        exploded = self.exploded()
        return sum(exploded) > len(exploded) / 2
