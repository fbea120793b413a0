"""Draw "Why EDM?": samples of one network by the samplers of Table 1's four columns, and their distances, at equal cost."""

import json
from pathlib import Path

import torch
from tqdm import tqdm

from edm.precond import PreconditionedDenoiser
from lab import pictures
from lab.build import build_sampler
from lab.checkpoint import write_atomically
from lab.cli import Parser, UserError, run_script, whole_number
from lab.config import Config, with_overrides
from lab.data import to_uint8
from lab.device import autocast, autocast_dtype, explain_device_errors, pick_device
from lab.generate import NO_GUIDANCE, add_checkpoint_arguments, load_denoiser, noise_and_labels, on_evaluation
from lab.metrics import Comparison, real_images

SAMPLERS = {  # the sampling rows of Table 1
    "VP": {"discretization": "vp", "schedule": "vp", "scaling": "vp", "solver": "euler"},
    "VE": {"discretization": "ve", "schedule": "ve", "scaling": "none", "solver": "euler"},
    "DDIM": {"discretization": "iddpm", "schedule": "linear", "scaling": "none", "solver": "euler"},
    "EDM": {"discretization": "edm", "schedule": "linear", "scaling": "none", "solver": "heun"},
}
COLORS = pictures.COLORS | {"DDIM": pictures.COLORS["iDDPM"]}
ODE = ["sampler.S_churn=0", *NO_GUIDANCE, "sampler.clip=false"]  # the trained denoiser's own, unless overridden
EVALUATIONS = [5, 9, 17, 35, 79]  # odd, as N steps of Heun's method take 2 N - 1
EXACT = 999  # evaluations of the solution that counts as exact
NUM_SOLVED = 10  # images of which there is an exact solution
NUM_SHOWN = 2  # of them, in each cell of the picture
FLOORS = 8  # sets of real images whose mean distance is the floor
BATCH_SIZE = 100


def main() -> None:
    parser = Parser(__doc__)
    add = parser.add_argument
    add("overrides", nargs="*", metavar="section.key=value", help="replace entries of the checkpoint's config")
    add_checkpoint_arguments(parser)
    add("--second", type=Path, metavar="CHECKPOINT", help="a second network of the same data, whose quality is drawn as well")
    add("--samples", type=whole_number(NUM_SOLVED), default=150, help="samples of each Frechet distance (default: 150)")
    add("--data_root", help="short for data.root=VALUE")
    add("--output", type=Path, default=Path("assets/why.png"), help="the picture (default: assets/why.png); its figures: .json")
    args = parser.parse_intermixed_args()
    overrides = [*ODE, *args.overrides, *([f"data.root={args.data_root}"] if args.data_root else [])]
    device = pick_device(args.device)
    precision = autocast_dtype(args.mixed_precision, device)
    pictures.check_writable(args.output)
    with explain_device_errors("choose fp16 or bf16 for --mixed_precision"):
        networks = {args.checkpoint: load_denoiser(args.checkpoint, args.config_path, overrides, device)}
        config = networks[args.checkpoint][0]
        if args.second:
            networks[args.second] = load_denoiser(args.second, None, overrides, device)
            check_same_data(config, networks[args.second][0], args.second)
        comparison = Comparison(config, *real_images(config), device, Path("output/classifier"))
        stems = {path.stem for path in networks}
        measured = {
            path.stem if len(stems) == len(networks) else str(path): measure(
                denoiser, config, args.samples, comparison, device, precision
            )
            for path, (config, denoiser, _) in networks.items()
        }
    figures = {name: found for name, (found, _) in measured.items()}
    print_table(figures)
    write_atomically(args.output.with_suffix(".json"), lambda file: file.write(json.dumps(figures, indent=1).encode()))
    draw(args.output, figures, next(iter(measured.values()))[1])
    print(f"the picture is {args.output}")


def check_same_data(config: Config, second: Config, path: Path) -> None:
    """Raise a `UserError` if the second network, of this path, was trained on other data than the first."""
    for key in ("dataset", "resolution", "channels"):
        first, other = getattr(config.data, key), getattr(second.data, key)
        if first != other:
            raise UserError(f"--second: {path} has data.{key} {other}, the first checkpoint has {first}")


def with_sampler(config: Config, choices: dict[str, str], evaluations: int) -> Config:
    """Return the config with these choices for the sampler, in the steps that take so many evaluations without guidance."""
    steps = (evaluations + 1) // 2 if choices["solver"] == "heun" else evaluations
    entries = choices | {"sampling_steps": steps}
    return with_overrides(config, [f"sampler.{key}={value}" for key, value in entries.items()], "the sampler")


@torch.no_grad()
def sample_images(
    denoiser: PreconditionedDenoiser, config: Config, seeds: range, device: torch.device, precision: torch.dtype
) -> torch.Tensor:
    """Return the samples of these seeds as the sampler leaves them, (B, C, H, W) on the CPU, neither clipped nor rounded."""
    sampler, parts = build_sampler(config), []
    for batch in (seeds[start : start + BATCH_SIZE] for start in range(0, len(seeds), BATCH_SIZE)):
        noise, labels = noise_and_labels(batch, config, device)
        with autocast(device, precision):
            *_, last = sampler(denoiser, noise(), labels, noise)
        parts.append(last.x.cpu())
    return torch.cat(parts)


def rms(x: torch.Tensor) -> float:
    """Return the root mean square."""
    return x.square().mean().sqrt().item()


def measure(
    denoiser: PreconditionedDenoiser,
    config: Config,
    num_samples: int,
    comparison: Comparison,
    device: torch.device,
    precision: torch.dtype,
) -> tuple[dict, torch.Tensor]:
    """Sample with each of `SAMPLERS` at each cost, from the same seeds 0, 1, 2, ..., and measure the distances.

    The exact solution has a sampler's own sigma(t), s(t) and noise levels, but Heun's method and `EXACT` evaluations.

    Args:
        denoiser: its evaluations are counted, and those of its guide.
        num_samples: of each Frechet distance, `NUM_SOLVED` or more.

    Returns:
        The figures: "guidance", "samples", "solved", "floor" (the mean Frechet distance of sets of as many real images, of
        every class equally many if the samples are), and in "samplers" for each one a list over the costs of "evaluations" per
        image, "rms_distance" from its exact solution and "frechet_distance"; "from_edm" is the rms distance of its exact
        solution from EDM's. And uint8 images (samplers, costs and exact, NUM_SHOWN, C, H, W).
    """
    counts, seeds, guidance = [], range(num_samples), config.sampler.guidance
    total = len(SAMPLERS) * (NUM_SOLVED * EXACT + num_samples * sum(EVALUATIONS)) * (1 if guidance == 1 else 2)
    bar = tqdm(total=total, desc="sampling", unit="evaluation", unit_scale=True, leave=False)

    def count(images: int) -> None:
        counts.append(images)
        bar.update(images)

    samplers, exact, shown = {}, {}, []
    with bar, on_evaluation(denoiser, count):
        for name, choices in SAMPLERS.items():
            solver = with_sampler(config, choices | {"solver": "heun"}, EXACT)
            exact[name] = sample_images(denoiser, solver, seeds[:NUM_SOLVED], device, precision)
            rows = []
            for evaluations in EVALUATIONS:
                counts.clear()
                x = sample_images(denoiser, with_sampler(config, choices, evaluations), seeds, device, precision)
                distances = rms(x[:NUM_SOLVED] - exact[name]), comparison.frechet_distance(to_uint8(x))
                rows.append((sum(counts) / num_samples, *distances))
                shown.append(x[:NUM_SHOWN])
            samplers[name] = dict(zip(("evaluations", "rms_distance", "frechet_distance"), zip(*rows)))
            shown.append(exact[name][:NUM_SHOWN])
    for name, curve in samplers.items():
        curve["from_edm"] = rms(exact[name] - exact["EDM"])
    floor = comparison.mean_floor(num_samples, FLOORS, balanced=config.network.label_dim > 0)
    figures = {"guidance": guidance, "samples": num_samples, "solved": NUM_SOLVED, "floor": floor, "samplers": samplers}
    return figures, to_uint8(torch.stack(shown)).unflatten(0, (len(SAMPLERS), -1))


def print_table(figures: dict[str, dict]) -> None:
    """Print the distances of every sampler on every network, and how far the exact solutions are apart."""
    for network, found in figures.items():
        print(f"{network}, guidance {found['guidance']:g}")
        print(f"{'':<14}evaluations    rms distance    Frechet distance")
        for name, curve in found["samplers"].items():
            for cost, distance, quality in zip(curve["evaluations"], curve["rms_distance"], curve["frechet_distance"]):
                print(f"{name:<14}{cost:>11.0f}{distance:>16.4f}{quality:>20.1f}")
        print(f"{'real images':<41}{found['floor']:>20.1f}")
        between = (f"{name} {curve['from_edm']:.4f}" for name, curve in found["samplers"].items())
        print("exact solutions, rms distance from EDM's:", *between)


def draw(path: Path, figures: dict[str, dict], images: torch.Tensor) -> None:
    """Draw the samples at twice their size; below, their distance from the exact solution, and the quality of each network.

    Args:
        figures: by the networks' names, as returned by `measure`.
        images: the first network's, as returned by `measure`.
    """
    from matplotlib.figure import Figure  # slow to import
    from matplotlib.ticker import LogLocator
    from torchvision.utils import make_grid

    first, *_ = figures.values()
    curves = first["samplers"]
    cells = torch.cat(images.unbind(dim=2), dim=-1)  # (samplers, costs and exact, C, H, NUM_SHOWN W)
    table = make_grid(cells.flatten(0, 1).expand(-1, 3, -1, -1), nrow=cells.shape[1], padding=3, pad_value=255)
    table_height, table_width = (2 * size for size in table.shape[1:])
    inner = max(table_width, 800)  # wide enough for the curves below
    width, height, left, top, bottom = inner + 88, table_height + 490, 70, 70, 55  # pixels
    figure = Figure(figsize=(width / 100, height / 100), dpi=100)

    def axes_at(x: float, y: float, w: float, h: float):
        """Return axes of w by h pixels, x and y pixels from the left and the top: a pixel of an image is then 2 by 2."""
        return figure.add_axes((x / width, 1 - (y + h) / height, w / width, h / height))

    grid = axes_at(left, top, table_width, table_height)
    grid.imshow(table.permute(1, 2, 0).numpy(), interpolation="nearest")
    columns = [f"{cost:.0f}" for cost in curves["EDM"]["evaluations"]]
    for axis, names, size in ((grid.xaxis, [*columns, "exact"], cells.shape[4] + 3), (grid.yaxis, curves, cells.shape[3] + 3)):
        axis.set_ticks([1 + (place + 0.5) * size for place in range(len(names))], names)
    for label in grid.get_yticklabels():
        label.set(color=COLORS[label.get_text()], weight="bold", fontsize=12)
    grid.xaxis.tick_top()
    grid.tick_params(length=0)
    grid.spines[:].set_visible(False)
    guided = f", guidance {first['guidance']:g}" if first["guidance"] != 1 else ""
    grid.set_title(f"One network, the same noise{guided}: samples by number of evaluations", pad=10)

    panels, below, gap = 1 + len(figures), top + table_height + 80, 60
    size = (inner - gap * (panels - 1)) / panels, height - below - bottom
    error, *qualities = (axes_at(left + place * (size[0] + gap), below, *size) for place in range(panels))
    for name, curve in curves.items():
        error.plot(curve["evaluations"], curve["rms_distance"], marker="o", color=COLORS[name])
    error.set_title(f"Distance from the exact solution\n({next(iter(figures))}, rms of {first['solved']} images)", fontsize=10)
    for axes, (network, found) in zip(qualities, figures.items()):
        for name, curve in found["samplers"].items():
            label = f"{name} ({SAMPLERS[name]['solver'].capitalize()})"
            axes.plot(curve["evaluations"], curve["frechet_distance"], marker="o", color=COLORS[name], label=label)
        axes.axhline(found["floor"], color="gray", linestyle="--", label="as many real images")
        axes.set_title(f"Fréchet distance, {found['samples']:,} samples\n({network})", fontsize=10)
    for order, name, offset in ((1, "VP", 3), (2, "EDM", 0.5)):  # how an error of this order falls, above or below the curve
        (left_end, right_end), end = curves[name]["evaluations"][-2:], offset * curves[name]["rms_distance"][-1]
        start = end * (right_end / left_end) ** order
        error.plot([left_end, right_end], [start, end], color="gray", linestyle=":")
        error.annotate(f"order {order}", (left_end, start), (-4, 0), textcoords="offset points", ha="right", va="center")
    for axes in (error, *qualities):
        axes.set(xlabel="evaluations per image", xscale="log", yscale="log")
        axes.set_xticks(curves["EDM"]["evaluations"], columns)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    for axes in qualities:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
    anchor = (0.5, 1 - (below - 58) / height)
    figure.legend(*qualities[0].get_legend_handles_labels(), loc="center", bbox_to_anchor=anchor, ncols=5)
    pictures.save_figure(path, figure)


if __name__ == "__main__":
    run_script(main)
