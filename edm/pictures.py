"""Pictures of what was made: grids, reverse processes, loss curves. Images are uint8 (C, H, W) tensors, grey or colour."""

import math
from pathlib import Path

import torch
from PIL import Image

from edm.files import write_whole


def save_image(path: Path, image: torch.Tensor) -> None:
    """Write one image, (1 or 3, H, W) uint8, as a PNG."""
    write_whole(path, lambda file: to_pil(image).save(file, format="PNG"))


def to_pil(image: torch.Tensor) -> Image.Image:
    """(1 or 3, H, W) uint8 -> a Pillow image, grey or colour."""
    return Image.fromarray((image[0] if len(image) == 1 else image.permute(1, 2, 0)).numpy())


def from_pil(image: Image.Image) -> torch.Tensor:
    """A Pillow image, grey or colour -> (1 or 3, H, W) uint8."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, -1).permute(2, 0, 1).contiguous()


def grid(images: torch.Tensor, columns: int | None = None) -> torch.Tensor:
    """Images (N, C, H, W) uint8 in reading order, two black pixels around each: (3, H', W').

    Args:
        columns: images in a row; by default the grid is about square.
    """
    from torchvision.utils import make_grid  # slow to import, as matplotlib is below, and needed only here

    columns = columns or math.ceil(math.sqrt(len(images)))
    return make_grid(images.expand(-1, 3, -1, -1), nrow=columns, padding=2)


def save_gif(path: Path, frames: list[torch.Tensor], milliseconds: int = 120, hold: int = 1500) -> None:
    """Write frames, each (3, H, W) uint8, as an animation that rests on the last one.

    Args:
        milliseconds, hold: how long each frame is shown, and the last.
    """
    pictures: list[Image.Image] = [to_pil(frame) for frame in frames]
    durations = [milliseconds] * (len(pictures) - 1) + [hold]
    options = {"save_all": True, "append_images": pictures[1:], "duration": durations, "loop": 0}
    write_whole(path, lambda file: pictures[0].save(file, format="GIF", **options))


def save_loss_curve(path: Path, steps: list[int], losses: list[float]) -> None:
    """Draw the loss of every step, and its running mean over a fiftieth of the run, on a logarithmic scale."""
    from matplotlib.figure import Figure

    window = max(len(losses) // 50, 1)
    sums = torch.tensor([0.0, *losses], dtype=torch.float64).cumsum(0)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="training step", ylabel="loss, summed over pixels", yscale="log")
    axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.6, label="each step")
    axes.plot(
        steps[window - 1 :],
        (sums[window:] - sums[:-window]) / window,
        color="tab:blue",
        label=f"mean of {window} steps",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=110))


def save_sweep(path: Path, curves: dict[str, list[tuple[int, float]]], floor: float, ylabel: str) -> None:
    """Draw curves of a distance against the number of network evaluations, both on logarithmic scales, above a floor."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="network evaluations an image", ylabel=ylabel, xscale="log", yscale="log")
    for name, points in filter(lambda curve: curve[1], curves.items()):
        axes.plot(*zip(*points), marker="o", label=name)
    axes.axhline(floor, color="gray", linestyle="--", label="training images")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=110))
