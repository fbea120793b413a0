"""Draw what a checkpoint does: its reverse process, its classes, guidance, or the training images nearest to its samples."""

from pathlib import Path

import torch
from tqdm import tqdm

from edm.precond import PreconditionedDenoiser
from edm.sampler import State
from lab import pictures
from lab.build import build_sampler, with_guidance_and_clipping
from lab.cli import Parser, UserError, run_script, seed_list
from lab.config import Config, with_overrides
from lab.data import HAVE_TEST_SETS, as_tensors, open_dataset, to_model_range, to_uint8
from lab.device import autocast, autocast_dtype, explain_device_errors, pick_device
from lab.generate import add_checkpoint_arguments, class_labels, generate, load_denoiser
from lab.seeds import ImageNoise

NUM_FRAMES = 10  # of a filmstrip
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
    title: str,
) -> list[State]:
    """Return the states after each step of the sampler, (B, C, H, W) on the CPU, the last of which holds the samples.

    Here `denoised` is computed anew at the end of the step; the sampler yields the one from its start.
    """
    dtype = torch.float32 if device.type == "mps" else torch.float64  # Apple GPUs have no float64
    noise = ImageNoise(seeds, (config.data.channels, config.data.resolution, config.data.resolution), device, dtype)
    labels = class_labels(seeds, config.network.label_dim)
    labels = labels if labels is None else labels.to(device)
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
    batches = generate(denoiser, seeds, config, device, 64, precision, class_index, title=title)
    return torch.cat([batch[-1] for batch in batches])


def filmstrip(
    path: Path, denoiser: PreconditionedDenoiser, config: Config, device: torch.device, precision: torch.dtype, seeds: list[int]
) -> None:
    """Draw noisy images on their way to samples, and the denoised images below them."""
    states = reverse_process(denoiser, config, device, precision, seeds, "filmstrip")
    shown = [states[round(place)] for place in torch.linspace(0, len(states) - 1, min(NUM_FRAMES, len(states))).tolist()]
    sigma_data = config.preconditioning.sigma_data
    scales = [sigma_data / (state.sigma**2 + sigma_data**2) ** 0.5 for state in shown]
    noisy = torch.stack([state.x * scale for state, scale in zip(shown, scales)], dim=1)  # (B, frames, C, H, W)
    denoised = torch.stack([state.denoised for state in shown], dim=1)
    rows = to_uint8(torch.stack([noisy, denoised], dim=1).flatten(0, 1))
    names = [name for seed in seeds for name in (f"seed {seed}", "D(x)")]
    pictures.save_table(path, rows, names, [f"{state.sigma:.2g}" for state in shown], "noise level")


def trajectories(
    path: Path, denoiser: PreconditionedDenoiser, config: Config, device: torch.device, precision: torch.dtype, seeds: list[int]
) -> None:
    """Draw trajectories of eight pixels of an image (their red value in colour images), and of their denoised values."""
    if len(seeds) > 1 or config.sampler.sampling_steps < 2:
        raise UserError("trajectories are drawn for one seed, and take 2 or more sampler.sampling_steps")
    states = reverse_process(denoiser, config, device, precision, seeds, "trajectories")
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
    columns = [str(seed % num_classes(config)) for seed in seeds]
    bar = tqdm(GUIDANCE, desc="sampling with all strengths of guidance", unit="strength", leave=False)
    configs = (with_overrides(config, [f"sampler.guidance={strength}"], "the gallery") for strength in bar)
    images = torch.stack([samples(denoiser, guided, device, precision, seeds) for guided in configs])
    pictures.save_table(path, images, [f"guidance {strength:g}" for strength in GUIDANCE], columns, "class")


def num_classes(config: Config) -> int:
    """Return the number of classes that the network knows.

    Raises:
        UserError: the network is unconditional.
    """
    if not config.network.label_dim:
        raise UserError(
            "the network is unconditional and knows no classes; its pictures are filmstrip, trajectories and neighbours"
        )
    return config.network.label_dim


PICTURES = {  # the function that draws, the number of seeds by default, and what is drawn
    "filmstrip": (filmstrip, 3, "noisy images on their way to samples, and the denoised images below them"),
    "trajectories": (trajectories, 1, "trajectories of eight pixels of an image"),
    "neighbours": (neighbours, 8, "samples, each beside the training images nearest to it"),
    "classes": (classes, 6, "a column of samples for each class, from the same noise in each row"),
    "guidance": (guidance, 10, "a row of samples for each strength of guidance, from the same noise in each column"),
}


if __name__ == "__main__":
    run_script(main)
