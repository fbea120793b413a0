"""Draw what a checkpoint does: samples, its reverse process, classes, guidance, the training images nearest to its samples."""

import math
from itertools import groupby
from pathlib import Path

import torch
from torch.nn.functional import pad
from tqdm import tqdm

from edm.precond import PreconditionedDenoiser
from edm.sampler import State
from lab import pictures
from lab.build import build_sampler, with_guidance_and_clipping
from lab.cli import Parser, UserError, run_script, seed_list
from lab.config import Config, with_overrides
from lab.data import HAVE_TEST_SETS, as_tensors, open_dataset, to_model_range, to_uint8
from lab.device import autocast, autocast_dtype, explain_device_errors, pick_device
from lab.generate import add_checkpoint_arguments, class_labels, generate, grid_columns, load_denoiser, noise_and_labels

NUM_COLUMNS = 10  # of a filmstrip
NUM_FRAMES = 40  # of an animation
FRAME_MS, LAST_FRAME_MS = 150, 2500  # how long they are shown
NUM_PIXELS = 8  # whose trajectories are drawn
NUM_NEIGHBOURS = 4
GUIDANCE = [0, 1, 1.5, 2, 4]


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument(
        "picture", choices=PICTURES, help="; ".join(f"{name}: {text}" for name, (_, _, text) in PICTURES.items())
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replace entries of the checkpoint's config")
    add_checkpoint_arguments(parser)
    parser.add_argument("--seeds", type=seed_list, help="which images, such as 0-3,100 (default: the first few)")
    parser.add_argument("--data_root", help="short for data.root=VALUE")
    parser.add_argument("--output_dir", type=Path, help="output folder (default: output/image/<dataset>/gallery/<config name>)")
    args = parser.parse_intermixed_args()
    overrides = [*args.overrides, *([f"data.root={args.data_root}"] if args.data_root else [])]
    device = pick_device(args.device)
    precision = autocast_dtype(args.mixed_precision, device)
    with explain_device_errors("ask for fewer --seeds, or choose fp16 or bf16 for --mixed_precision"):
        config, denoiser, _ = load_denoiser(args.checkpoint, args.config_path, overrides, device)
        folder = args.output_dir or Path("output/image") / config.data.dataset / "gallery" / config.name
        path = folder / f"{args.picture}.png"
        pictures.check_writable(path)
        draw, num_seeds, _ = PICTURES[args.picture]
        draw(path, denoiser, config, device, precision, args.seeds or list(range(num_seeds)))
    print(f"the picture is {path}")


@torch.no_grad()
def reverse_process(
    denoiser: PreconditionedDenoiser,
    config: Config,
    device: torch.device,
    precision: torch.dtype,
    seeds: list[int],
    class_index: int | None = None,
    title: str = "the reverse process",
) -> list[State]:
    """Return the states after each step of the sampler, (B, C, H, W) on the CPU, the last of which holds the samples.

    Here `denoised` is computed anew at the end of the step; the sampler yields the one from its start.
    """
    noise, labels = noise_and_labels(seeds, config, device, class_index)
    D, found = with_guidance_and_clipping(denoiser, config), []
    states = build_sampler(config)(denoiser, noise(), labels, noise)
    with autocast(device, precision):
        for state in tqdm(states, desc=title, total=config.sampler.sampling_steps, unit="step", leave=False):
            denoised = D(state.x, state.sigma, labels).to(state.x.dtype) if state.sigma > 0 else state.x
            found.append(State(state.x.cpu(), state.sigma, denoised.cpu()))
    return found


def samples(
    denoiser: PreconditionedDenoiser,
    config: Config,
    device: torch.device,
    precision: torch.dtype,
    seeds: list[int],
    class_index: int | None = None,
    title: str | None = None,
) -> torch.Tensor:
    """Return samples (B, C, H, W) uint8 on the CPU, with a progress bar if it has a title."""
    return torch.cat(list(generate(denoiser, seeds, config, device, 64, precision, class_index, title=title)))


def shown(states: list[State], count: int) -> list[int]:
    """Return the indices of `count` states for a reader to see, from the first to the last; with few states some repeat.

    They are evenly spaced in sigma / (sigma + 2), so two fifths of them lie between the noise levels 5 and 1, where the shape
    of an image is decided.
    """
    places = torch.tensor([state.sigma / (state.sigma + 2) for state in states])
    wanted = torch.linspace(places[0], places[-1], count)
    return (wanted[:, None] - places).abs().argmin(dim=1).tolist()


def short(sigma: float) -> str:
    """Return a noise level as text: "157", "28", "5.3", "0.0075"."""
    return f"{sigma:.0f}" if sigma >= 10 else f"{sigma:.2g}"


def noisy_and_denoised(state: State, config: Config) -> torch.Tensor:
    """Return x, scaled to the data's standard deviation, and D(x): (2, B, C, H, W) uint8."""
    sigma_data = config.preconditioning.sigma_data
    scale = sigma_data / (state.sigma**2 + sigma_data**2) ** 0.5
    return to_uint8(torch.stack([state.x * scale, state.denoised]))


def grid(
    path: Path, denoiser: PreconditionedDenoiser, config: Config, device: torch.device, precision: torch.dtype, seeds: list[int]
) -> None:
    """Draw samples, in a column for each class if the classes take turns."""
    made = samples(denoiser, config, device, precision, seeds, title="sampling")
    columns = grid_columns(seeds, config.network.label_dim)
    names = [str(number) for number in range(columns or 0)]
    columns = columns or math.ceil(math.sqrt(len(seeds)))
    rows = pad(made, [0] * 7 + [-len(made) % columns]).unflatten(0, (-1, columns))  # black images fill the last row
    pictures.save_table(path, rows, [], names, "class" if names else "")


def animation(
    path: Path,
    denoiser: PreconditionedDenoiser,
    config: Config,
    device: torch.device,
    precision: torch.dtype,
    seeds: list[int],
    class_index: int | None = None,
) -> None:
    """Draw noisy images on their way to samples above the denoised images, as an animated GIF file."""
    states = reverse_process(denoiser, config, device, precision, seeds, class_index, "animation")
    labels = class_labels(seeds, config.network.label_dim, class_index)
    names = [] if labels is None else [str(number) for number in labels.argmax(dim=1).tolist()]
    frames, milliseconds = [], []
    for place, repeats in groupby(shown(states, NUM_FRAMES)):
        images = noisy_and_denoised(states[place], config)
        frames.append(pictures.draw_table(images, ["x", "D(x)"], names, f"noise level {short(states[place].sigma)}"))
        milliseconds.append(FRAME_MS * len(list(repeats)))
    pictures.save_gif(path, frames, [*milliseconds[:-1], LAST_FRAME_MS], colors=12 if config.data.channels == 1 else 256)


def filmstrip(
    path: Path, denoiser: PreconditionedDenoiser, config: Config, device: torch.device, precision: torch.dtype, seeds: list[int]
) -> None:
    """Draw noisy images on their way to samples, and the denoised images below them."""
    states = reverse_process(denoiser, config, device, precision, seeds, title="filmstrip")
    states = [states[place] for place in sorted({*shown(states, NUM_COLUMNS)})]
    rows = torch.stack([noisy_and_denoised(state, config) for state in states], dim=2)  # (2, B, columns, C, H, W)
    names = [name for seed in seeds for name in (f"seed {seed}", "D(x)")]
    levels = [short(state.sigma) for state in states]
    pictures.save_table(path, rows.transpose(0, 1).flatten(0, 1), names, levels, "noise level")


def trajectories(
    path: Path, denoiser: PreconditionedDenoiser, config: Config, device: torch.device, precision: torch.dtype, seeds: list[int]
) -> None:
    """Draw trajectories of eight pixels of an image (their red value in colour images), and of their denoised values."""
    if len(seeds) > 1 or config.sampler.sampling_steps < 2:
        raise UserError("trajectories are drawn for one seed, and take 2 or more sampler.sampling_steps")
    states = reverse_process(denoiser, config, device, precision, seeds, title="trajectories")
    size = config.data.resolution
    row, columns = size // 2, torch.linspace(size / 4, 3 * size / 4, NUM_PIXELS).long()
    x = torch.stack([state.x[0, 0, row, columns] for state in states])
    denoised = torch.stack([state.denoised[0, 0, row, columns] for state in states])
    sigma, image = [state.sigma for state in states], to_uint8(states[-1].x[0])
    pictures.save_trajectories(path, sigma, x, denoised, image, row, columns.tolist())


def neighbours(
    path: Path, denoiser: PreconditionedDenoiser, config: Config, device: torch.device, precision: torch.dtype, seeds: list[int]
) -> None:
    """Plot samples beside their nearest training images, and print the median distance of samples and of test images."""
    train, _ = as_tensors(open_dataset(config))
    test = as_tensors(open_dataset(config, test=True))[0][:1000] if config.data.dataset in HAVE_TEST_SETS else None
    made = samples(denoiser, config, device, precision, seeds, title="sampling")
    distances, places = nearest_images(made, train, min(NUM_NEIGHBOURS, len(train)), device)
    rows = torch.cat([made[:, None], train[places]], dim=1)
    names = [f"{distance:.3f}" for distance in distances[:, 0].tolist()]
    columns = ["sample", *["training"] * places.shape[1]]
    pictures.save_table(path, rows, names, columns, "rows: distance to the nearest training image")
    print("Root mean square distance to the nearest training image, median:")
    print(f"  {distances[:, 0].median():.3f} of {len(seeds)} samples")
    if test is not None:
        distances, _ = nearest_images(test, train, 1, device)
        print(f"  {distances.median():.3f} of {len(distances):,} test images, which this network has not been trained on")


def nearest_images(
    images: torch.Tensor, train: torch.Tensor, k: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the distances of images to their k nearest training images, rising, and those images' indices.

    Args:
        images, train: (N, C, H, W) and (M, C, H, W) uint8, on the CPU.
        k: at most M.
        device: where the distances are computed, of parts of the images.

    Returns:
        Root mean square differences of the pixels in [-1, 1], and indices, (N, k) each.
    """

    def flat(part: torch.Tensor) -> torch.Tensor:
        return to_model_range(part.to(device)).flatten(1)

    def nearest(part: torch.Tensor) -> torch.Tensor:
        distances = torch.cat([torch.cdist(flat(part), flat(others)).cpu() for others in train.split(1000)], dim=1)
        return distances.topk(k, largest=False).indices

    places = torch.cat([nearest(part) for part in images.split(100)])
    differences = to_model_range(images)[:, None] - to_model_range(train[places])
    return differences.square().mean(dim=(2, 3, 4)).sqrt(), places  # more exact than the distances of cdist


def classes(
    path: Path, denoiser: PreconditionedDenoiser, config: Config, device: torch.device, precision: torch.dtype, seeds: list[int]
) -> None:
    """Draw a column of samples for each class, from the same noise in each row."""
    numbers = range(num_classes(config))
    bar = tqdm(numbers, desc="sampling all classes", unit="class", leave=False)
    images = torch.stack([samples(denoiser, config, device, precision, seeds, number) for number in bar], dim=1)
    pictures.save_table(path, images, [f"seed {seed}" for seed in seeds], [str(number) for number in numbers], "class")


def guidance(
    path: Path, denoiser: PreconditionedDenoiser, config: Config, device: torch.device, precision: torch.dtype, seeds: list[int]
) -> None:
    """Draw a row of samples for each strength of guidance, from the same noise in each column."""
    classes = config.network.label_dim if config.sampler.guide else num_classes(config)
    columns, what = ([str(seed % classes) for seed in seeds], "class") if classes else (list(map(str, seeds)), "seed")
    bar = tqdm(GUIDANCE, desc="sampling with all strengths of guidance", unit="strength", leave=False)
    configs = (with_overrides(config, [f"sampler.guidance={strength}"], "the gallery") for strength in bar)
    images = torch.stack([samples(denoiser, guided, device, precision, seeds) for guided in configs])
    pictures.save_table(path, images, [f"guidance {strength:g}" for strength in GUIDANCE], columns, what)


def num_classes(config: Config) -> int:
    """Return the number of classes that the network knows.

    Raises:
        UserError: the network is unconditional.
    """
    if not config.network.label_dim:
        raise UserError(
            "the network is unconditional and knows no classes; its pictures are grid, filmstrip, trajectories and neighbours"
        )
    return config.network.label_dim


PICTURES = {  # the function that draws, the number of seeds by default, and what is drawn
    "grid": (grid, 60, "samples, in a column for each class"),
    "filmstrip": (filmstrip, 3, "noisy images on their way to samples, and the denoised images below them"),
    "trajectories": (trajectories, 1, "trajectories of eight pixels of an image"),
    "neighbours": (neighbours, 8, "samples, each beside the training images nearest to it"),
    "classes": (classes, 6, "a column of samples for each class, from the same noise in each row"),
    "guidance": (guidance, 10, "a row of samples for each strength of guidance, from the same noise in each column"),
}


if __name__ == "__main__":
    run_script(main)
