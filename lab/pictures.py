"""How images, reverse processes and curves are drawn. Images are uint8 (C, H, W) tensors, grey or colour."""

import math
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from lab.checkpoint import write_atomically
from lab.cli import UserError
from lab.data import to_pil

if TYPE_CHECKING:  # slow to import, so each function that draws imports it
    from matplotlib.figure import Figure

COLORS = {"VP": "#D55E00", "VE": "#009E73", "iDDPM": "#CC79A7", "EDM": "#0072B2"}  # of the columns of Table 1
SCALE = 3  # screen pixels for each pixel of an image in a table


@contextmanager
def style() -> Iterator[None]:
    """Apply the style of lab/style.mplstyle, in a `with` block or in a function that is decorated with `@style()`."""
    with ctrl_c_postponed():
        import matplotlib.style

        with matplotlib.style.context(Path(__file__).with_name("style.mplstyle")):
            yield


@contextmanager
def ctrl_c_postponed() -> Iterator[None]:
    """Raise KeyboardInterrupt after the block, not in it, where matplotlib may swallow it or turn it into another error."""
    is_main = threading.current_thread() is threading.main_thread()  # no other thread has handlers
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # a training run's handler raises nothing
        return
    came = []
    signal.signal(signal.SIGINT, lambda *_: came.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if came:
        raise KeyboardInterrupt


def check_writable(path: Path) -> None:
    """Raise a `UserError` if the file cannot be written. Its folder is created where it is missing."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    if (os.path.exists(path) and not os.path.isfile(path)) or not os.access(path.parent, os.W_OK):
        raise UserError(f"cannot write {path}: it is not a regular file, or in a folder without permission to write")


def grid(images: torch.Tensor, columns: int | None = None) -> torch.Tensor:
    """Return one image (3, H', W') of images (N, C, H, W) uint8 in reading order, with two black pixels around each.

    Args:
        columns: images in a row; None makes the grid about square.
    """
    from torchvision.utils import make_grid  # slow to import

    columns = columns or math.ceil(math.sqrt(len(images)))
    return make_grid(images.expand(-1, 3, -1, -1), nrow=columns, padding=2)


def save_image(path: Path, image: torch.Tensor) -> None:
    """Write an image (1 or 3, H, W) uint8 as a PNG file."""
    write_atomically(path, lambda file: to_pil(image).save(file, format="PNG"))


@style()
def save_figure(path: Path, figure: "Figure") -> None:
    """Write a matplotlib figure as a PNG file."""
    write_atomically(path, lambda file: figure.savefig(file, format="png"))


@style()
def save_gif(path: Path, frames: "list[Figure]", milliseconds: list[int], colors: int) -> None:
    """Write figures of the same size as an animated GIF file.

    All frames share one palette, so that a pixel that does not change costs nothing.

    Args:
        milliseconds: how long each frame is shown.
        colors: at most 256. The fewer they are, the smaller is the file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    pixels = []
    for figure in frames:
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        pixels.append(np.asarray(canvas.buffer_rgba())[..., :3])
    palette = Image.fromarray(np.concatenate(pixels)).quantize(colors)
    first, *others = (Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in pixels)
    options = {"save_all": True, "append_images": others, "duration": milliseconds, "loop": 0}
    write_atomically(path, lambda file: first.save(file, format="GIF", **options))


@style()
def draw_table(images: torch.Tensor, rows: list[str], columns: list[str], title: str) -> "Figure":
    """Draw images in rows and columns, enlarged `SCALE` times, every pixel to a sharp square.

    Args:
        images: (R, K, C, H, W) uint8.
        rows: the R rows' names, or none.
        columns: the K columns' names, or none.
        title: what stands above the table, such as what the columns' names are; "" for no title.
    """
    from matplotlib.figure import Figure

    table = grid(images.flatten(0, 1), columns=images.shape[1]).permute(1, 2, 0).numpy()
    height, width = (SCALE * size for size in table.shape[:2])  # in pixels, as all that follows
    left = 10 * max(map(len, rows)) + 12 if rows else 0
    top = 22 * (bool(columns) + bool(title))
    figure = Figure(layout="none")
    figure.set_size_inches((left + width) / figure.dpi, (height + top) / figure.dpi)
    axes = figure.add_axes((left / (left + width), 0, width / (left + width), height / (height + top)))
    axes.imshow(table, aspect="auto")
    for axis, names, size in ((axes.xaxis, columns, images.shape[4] + 2), (axes.yaxis, rows, images.shape[3] + 2)):
        axis.set_ticks([0.5 + (place + 0.5) * size for place in range(len(names))], names)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.set_title(title, loc="left", pad=4)
    return figure


def save_table(path: Path, images: torch.Tensor, rows: list[str], columns: list[str], title: str) -> None:
    """Write images in rows and columns as a PNG file; the arguments are those of `draw_table`."""
    save_figure(path, draw_table(images, rows, columns, title))


@style()
def save_trajectories(
    path: Path,
    sigma: list[float],
    x: torch.Tensor,
    denoised: torch.Tensor,
    image: torch.Tensor,
    row: int,
    columns: list[int],
) -> None:
    """Draw trajectories of pixels over the noise level, above and below 1, beside the image with the pixels marked.

    Args:
        sigma: N falling noise levels.
        x: (N, pixels), the noisy values.
        denoised: (N, pixels), the values in the denoised image D(x; sigma).
        image: (C, H, W) uint8.
        row: the row that all pixels are in.
        columns: the pixels' columns.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.6))
    (shown, whole), (low, right) = figure.subplots(2, 2)
    shown.imshow(image.expand(3, -1, -1).permute(1, 2, 0).numpy())
    shown.axis("off")
    for place, column in enumerate(columns):
        color = colormaps["turbo"]((place + 0.5) / len(columns))
        shown.plot(column, row, marker="o", markerfacecolor=color, markeredgecolor="white")
        for axes, values in ((whole, x), (low, x), (right, denoised)):
            axes.plot(sigma, values[:, place].numpy(), color=color)
    pixels = "pixels" if len(image) == 1 else "pixels (red)"
    whole.set(xlabel="noise level", title=f"{pixels} of x", xlim=(max(sigma), 0))
    seen = x[[level <= 1 for level in sigma]]
    low.set(xlabel="noise level", title=f"{pixels} of x, below noise level 1", xlim=(1, 0))
    low.set_ylim(seen.min().item() - 0.2, seen.max().item() + 0.2)
    right.set(xlabel="noise level", title=f"{pixels} of the denoised image D(x)")
    right.set_xscale("symlog", linthresh=min(level for level in sigma if level > 0))
    right.set_xlim(max(sigma), 0)
    save_figure(path, figure)


@style()
def save_loss_curve(path: Path, steps: Sequence[int], records: torch.Tensor, edges: Sequence[float]) -> None:
    """Draw the loss of each step, and running means over a fiftieth of the run, of all images and by noise level, on a
    logarithmic scale.

    Args:
        steps: the numbers of the N steps.
        records: (N, 2 + edges), the loss of all images, and of those in each band of noise levels; nan where there are none.
        edges: the rising noise levels between the bands.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    window = max(len(records) // 50, 1)
    means = running_means(records.double(), window)
    figure = Figure(figsize=(7, 4))
    axes = figure.add_subplot(xlabel="training step", ylabel="loss, summed over pixels", yscale="log")
    axes.plot(steps, records[:, 0], color="gray", alpha=0.25, linewidth=0.6, label="each step")
    names = [f"sigma below {edges[0]:g}", *(f"{low:g} to {high:g}" for low, high in pairwise(edges)), f"above {edges[-1]:g}"]
    for band, name in enumerate(names, start=1):
        color = colormaps["viridis"](band / len(names))
        axes.plot(steps[window - 1 :], means[:, band], color=color, linewidth=1, label=name)
    axes.plot(steps[window - 1 :], means[:, 0], color="black", label=f"mean of {window} steps")
    axes.legend(ncols=2)
    save_figure(path, figure)


def running_means(records: torch.Tensor, window: int) -> torch.Tensor:
    """Return the mean of the finite numbers in each `window` successive rows of (N, K): (N - window + 1, K)."""
    finite = records.isfinite()
    parts = torch.where(finite, records, 0), finite.to(records.dtype)
    sums, counts = (torch.cat([part.new_zeros(1, part.shape[1]), part.cumsum(dim=0)]) for part in parts)
    return (sums[window:] - sums[:-window]) / (counts[window:] - counts[:-window])


@style()
def save_sweep(path: Path, curves: dict[str, list[tuple]], churn: list[tuple], floor: float, ylabel: str) -> None:
    """Draw a distance over the number of network evaluations, one curve for each sampler, and over S_churn.

    Args:
        curves: (evaluations, distance, deviation) of each sampler, named "solver" or "solver, churn"; the deviations are drawn
            as error bars.
        churn: (S_churn, distance, deviation).
        floor: the distance of real images, drawn as a dotted line.
        ylabel: what the distance is.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(8, 3.6))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[3, 2])
    solvers = list(dict.fromkeys(name.partition(",")[0] for name in curves))
    for name, points in curves.items():
        solver, with_churn, _ = name.partition(",")  # with churn, the solver's colour again, dashed
        line = {"color": f"C{solvers.index(solver)}", "linestyle": "--" if with_churn else "-"}
        if points:
            left.errorbar(*zip(*points), marker="o", capsize=2, label=name, **line)
    left.set(xlabel="network evaluations per image", ylabel=ylabel, xscale="log", yscale="log")
    left.minorticks_off()
    left.set_xticks([5, 10, 20, 40], ["5", "10", "20", "40"])
    left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.yaxis.set_major_formatter("{x:g}")
    if churn:
        color = f"C{solvers.index('heun') if 'heun' in solvers else 0}"
        right.errorbar(*zip(*churn), marker="o", capsize=2, label="heun, with churn", color=color, linestyle="--")
    right.set(xlabel="S_churn")
    for axes in (left, right):
        axes.axhline(floor, color="gray", linestyle=":", label="as many real images")
        axes.legend()
    save_figure(path, figure)
