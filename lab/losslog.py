"""The record of a run's losses, and the file `metrics.jsonl`."""

import json
import math
from pathlib import Path

import torch

from lab.checkpoint import NOISE_BANDS, NUM_BANDS, write_atomically
from lab.cli import UserError
from lab.config import Config


def by_noise_level(losses: torch.Tensor, sigma: torch.Tensor, importance: torch.Tensor, edges: torch.Tensor) -> torch.Tensor:
    """Return the mean loss in each band of noise levels: below the first edge, between each two, above the last.

    Args:
        losses, sigma, importance: (B,), one for each image.
        edges: (K,), rising noise levels, on the same device.

    Returns:
        (K + 1,); nan for a band without images.
    """
    in_band = torch.bucketize(sigma, edges)[:, None] == torch.arange(len(edges) + 1, device=sigma.device)
    weight = in_band * importance[:, None]
    return torch.where(in_band, weight * losses[:, None], 0).sum(dim=0) / weight.sum(dim=0)


class LossLog:
    """The losses of all steps, and their file `metrics.jsonl`, one line for each step.

    Losses stay on the device until `flush` fetches them together, so that no training step waits for them.

    Args:
        path: the file, which is written anew from the losses so far; None to keep them without a file.
        config: the run.
        contents: of the checkpoint that the run goes on from, or {}.
    """

    def __init__(self, path: Path | None, config: Config, contents: dict):
        self.path, self.batch_size = path, config.training.batch_size
        self.pending: list[torch.Tensor] = []
        self.edges = torch.tensor(NOISE_BANDS)
        self.records: list[list[float]] = contents.get("losses", torch.zeros(0)).tolist()
        self.first_step = contents.get("step", 0) - len(self.records) + 1
        self.initial_loss = config.data.channels * config.data.resolution**2  # about 1 for each pixel
        if path:
            write_atomically(path, lambda file: file.write(self.lines(0).encode()))

    @property
    def steps(self) -> range:
        """Return the steps whose losses are known."""
        return range(self.first_step, self.first_step + len(self.records))

    @property
    def limit(self) -> float:
        """Return a loss far above any that training starts with."""
        first = [record[0] for record in self.records[:1] if math.isfinite(record[0])]
        return 100 * max(self.initial_loss, *first, 0)

    def add(self, loss: torch.Tensor, sigma: torch.Tensor, importance: torch.Tensor) -> None:
        """Note the mean loss of the next step, of all images and of those in each band of noise levels.

        Args:
            loss, sigma, importance: (batch_size,), one for each image, on any device.
        """
        self.edges = self.edges.to(loss.device)  # a copy in the first step alone, as the GPU would wait for it
        bands = by_noise_level(loss, sigma, importance, self.edges)
        self.pending.append(torch.cat([(importance * loss).mean()[None], bands]))

    def flush(self) -> None:
        """Fetch the pending losses and append them to the file."""
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

    def lines(self, start: int) -> str:
        """Return the lines of the file from the given index on."""
        lines = []
        for step, record in zip(self.steps[start:], self.records[start:]):
            loss, *bands = (number if math.isfinite(number) else None for number in record)  # JSON has neither nan nor inf
            lines.append(json.dumps({"step": step, "images": step * self.batch_size, "loss": loss, "by_noise_level": bands}))
        return "".join(line + "\n" for line in lines)

    def table(self) -> torch.Tensor:
        """Return the losses of all steps, (steps, 1 + NUM_BANDS), in float64."""
        return torch.tensor(self.records, dtype=torch.float64).view(-1, 1 + NUM_BANDS)

    def mean(self) -> float:
        """Return the mean loss of the latest 100 steps."""
        latest = [record[0] for record in self.records[-100:]]
        return sum(latest) / max(len(latest), 1)

    def exploded(self) -> list[bool]:
        """Return for each of the latest 10 losses whether it is above the limit or not finite."""
        return [not record[0] <= self.limit for record in self.records[-10:]]

    def has_diverged(self) -> bool:
        """Return whether most of the latest losses have exploded. One alone may be an fp16 overflow, which the scaler mends."""
        exploded = self.exploded()
        return sum(exploded) > len(exploded) / 2
