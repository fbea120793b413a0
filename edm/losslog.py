"""The record of a run's losses, `metrics.jsonl`: one line a step, written when somebody looks."""

import json
from pathlib import Path

import torch

from edm.errors import UserError
from edm.files import write_whole


class LossLog:
    """Losses wait on the device until `flush` fetches them together, so that a training step never waits for its number.

    Args:
        path: the file; lines of steps after `step`, left by an interrupted run, are dropped from it.
        step: the step from which the run goes on; 0 starts the file afresh.
    """

    def __init__(self, path: Path, step: int):
        self.path = path
        self.pending: list[tuple[dict, torch.Tensor]] = []
        self.steps: list[int] = []
        self.losses: list[float] = []
        kept = []
        for line in path.read_text(errors="replace").splitlines() if step and path.exists() else []:
            try:
                row = json.loads(line)
                done, loss = int(row["step"]), float(row["loss"])
            except (ValueError, KeyError, TypeError):
                break  # a line that a power cut left half written, and nothing whole after it
            if done <= step:
                self.steps.append(done)
                self.losses.append(loss)
                kept.append(line + "\n")
        write_whole(path, lambda file: file.write("".join(kept).encode()))

    def add(self, loss: torch.Tensor, **row: float) -> None:
        """Note one step. Args: loss: a scalar tensor on any device; row: what else to write, the step among it."""
        self.pending.append((row, loss))

    def flush(self) -> float:
        """Write what is pending; returns the mean loss of the latest 100 steps."""
        if self.pending:
            losses = torch.stack([loss for _, loss in self.pending]).tolist()
            lines = [json.dumps({**row, "loss": loss}) + "\n" for (row, _), loss in zip(self.pending, losses)]
            try:
                with open(self.path, "a") as file:
                    file.writelines(lines)
            except OSError as error:
                raise UserError(f"cannot write {self.path}: {error.strerror}") from None
            self.steps += [row["step"] for row, _ in self.pending]
            self.losses += losses
            self.pending.clear()
        recent = self.losses[-100:]
        return sum(recent) / max(len(recent), 1)
