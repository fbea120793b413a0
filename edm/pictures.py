"""Pictures of what was made: grids, reverse processes, loss curves. Images are uint8 (C, H, W) tensors, grey or colour."""

import math
from collections.abc import Sequence
from itertools import pairwise
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


def save_table(path: Path, images: torch.Tensor, rows: list[str], columns: list[str], title: str) -> None:
    """Draw images (R, K, C, H, W) uint8, twice their size, in rows and columns with names, under a title of the columns."""
    from matplotlib.figure import Figure

    table = grid(images.flatten(0, 1), columns=images.shape[1]).permute(1, 2, 0).numpy()
    height, width = (2 * size / 100 for size in table.shape[:2])  # in inches of 100 pixels
    figure = Figure(figsize=(width + 1.2, height + 0.7), layout="constrained", dpi=100)
    axes = figure.add_subplot()
    axes.imshow(table, interpolation="nearest")
    for axis, names, size in ((axes.xaxis, columns, images.shape[4] + 2), (axes.yaxis, rows, images.shape[3] + 2)):
        axis.set_ticks([1 + (place + 0.5) * size for place in range(len(names))], names, fontsize="small")
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(title, fontsize="small")
    write_whole(path, lambda file: figure.savefig(file, format="png"))


def save_trajectories(
    path: Path,
    sigma: list[float],
    x: torch.Tensor,
    denoised: torch.Tensor,
    images: torch.Tensor,
    row: int,
    columns: list[int],
) -> None:
    """Draw the ways of pixels of one row through the noise levels.

    Args:
        sigma: the noise levels, falling.
        x, denoised: (steps, B, pixels), the noisy values and what is expected of them.
        images: (B, C, H, W) uint8, the first of which is shown with the pixels marked.
        row, columns: where they are.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4), layout="constrained", dpi=100)
    image, noisy, expected = figure.subplots(1, 3, width_ratios=[2, 3, 3])
    image.imshow(grid(images[:1], columns=1)[:, 2:-2, 2:-2].permute(1, 2, 0).numpy(), interpolation="nearest")
    image.axis("off")
    for place, column in enumerate(columns):
        color = colormaps["turbo"]((place + 0.5) / len(columns))
        image.plot(column, row, marker="o", markersize=6, markerfacecolor=color, markeredgecolor="white")
        noisy.plot(sigma, x[:, :, place].numpy(), color=color)
        expected.plot(sigma, denoised[:, :, place].numpy(), color=color)
    noisy.set(
        xlabel="noise level", title="the pixels x" if images.shape[1] == 1 else "the pixels x (red)", xlim=(max(sigma), 0)
    )
    expected.set(xlabel="noise level", title="what is expected of them, D(x)")
    expected.set_xscale("symlog", linthresh=min(level for level in sigma if level > 0))
    expected.set_xlim(max(sigma), 0)
    for axes in (noisy, expected):
        axes.grid(alpha=0.3)
    write_whole(path, lambda file: figure.savefig(file, format="png"))


def save_loss_curve(path: Path, steps: Sequence[int], records: torch.Tensor, edges: Sequence[float]) -> None:
    """Draw the loss of every step, and running means over a fiftieth of the run, of all and by noise level, on a logarithmic
    scale.

    Args:
        steps: their numbers.
        records: (steps, 2 + edges): the loss of all images, and of those in each band of noise levels, nan where there are
            none.
        edges: the noise levels between the bands, rising.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    window = max(len(records) // 50, 1)
    means = running_means(records.double(), window)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="training step", ylabel="loss, summed over pixels", yscale="log")
    axes.plot(steps, records[:, 0], color="gray", alpha=0.25, linewidth=0.6, label="each step")
    names = [f"sigma below {edges[0]:g}", *(f"{low:g} to {high:g}" for low, high in pairwise(edges)), f"above {edges[-1]:g}"]
    for band, name in enumerate(names, start=1):
        color = colormaps["viridis"](band / len(names))
        axes.plot(steps[window - 1 :], means[:, band], color=color, linewidth=1, label=name)
    axes.plot(steps[window - 1 :], means[:, 0], color="black", label=f"mean of {window} steps")
    axes.grid(alpha=0.3)
    axes.legend(ncols=2, fontsize="small")
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=110))


def running_means(records: torch.Tensor, window: int) -> torch.Tensor:
    """Over each `window` rows of (N, K): (N - window + 1, K), of what is finite there."""
    known = records.isfinite()
    parts = torch.where(known, records, 0), known.to(records.dtype)
    sums, counts = (torch.cat([part.new_zeros(1, part.shape[1]), part.cumsum(dim=0)]) for part in parts)
    return (sums[window:] - sums[:-window]) / (counts[window:] - counts[:-window])


def save_sweep(path: Path, curves: dict[str, list[tuple]], churn: list[tuple], floor: float, ylabel: str) -> None:
    """Draw a distance against the number of network evaluations, a curve a sampler, and against S_churn, above a floor."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
    for name, points in filter(lambda curve: curve[1], curves.items()):
        left.plot(*zip(*points), marker="o", label=name)
    left.set(xlabel="network evaluations an image", ylabel=ylabel, xscale="log", yscale="log")
    left.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.xaxis.set_major_formatter("{x:g}")
    left.xaxis.set_minor_formatter("")
    right.plot(*zip(*churn), marker="o", color="tab:purple", label="heun with churn")
    right.set(xlabel="S_churn")
    for axes in (left, right):
        axes.axhline(floor, color="gray", linestyle="--", label="as many real images")
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=110))
