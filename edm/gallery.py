"""Pictures of what a checkpoint does: its reverse process, its classes, and the training images nearest to its samples."""

import argparse
import dataclasses
from pathlib import Path

import torch

from edm import checkpoint, choices, pictures
from edm.cli import Parser, run, seed_list
from edm.config import Config
from edm.data import HAVE_TEST_SETS, to_model_range, to_uint8
from edm.device import autocast_dtype, explain_out_of_memory, pick_device
from edm.errors import UserError
from edm.generate import build_denoiser, check_chain, class_labels, generate
from edm.judge import images_of
from edm.precond import Denoiser
from edm.randomness import ImageNoise
from edm.sampler import State

NUM_FRAMES = 10  # of a filmstrip
NUM_PIXELS = 8  # whose trajectories are drawn
NUM_NEIGHBOURS = 4
GUIDANCE = [0, 1, 1.5, 2, 4]


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument(
        "picture", choices=PICTURES, help="; ".join(f"{name}: {draw.__doc__}" for name, (draw, _) in PICTURES.items())
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="replace any entry of the checkpoint's config"
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="a diffusion-*.pt file")
    parser.add_argument("--seeds", type=seed_list, help="which images, such as 0-3,100 (default: the first few)")
    parser.add_argument("--data_root", help="short for data.root=VALUE")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the first of them that there is)")
    parser.add_argument("--output_dir", type=Path, help="where to (default: output/image/<dataset>/gallery/<config name>)")
    args = parser.parse_intermixed_args()
    with explain_out_of_memory("ask for fewer --seeds"):
        save(args, pick_device(args.device))


def save(args: argparse.Namespace, device: torch.device) -> None:
    """Make the picture that is asked for."""
    contents = checkpoint.read(args.checkpoint)
    overrides = [*args.overrides, *([f"data.root={args.data_root}"] if args.data_root else [])]
    config = checkpoint.read_config(contents, args.checkpoint, overrides)
    check_chain(config, checkpoint.read_config(contents, args.checkpoint), args.checkpoint)
    denoiser = build_denoiser(config, contents["ema"], args.checkpoint).to(device, memory_format=torch.channels_last).eval()
    draw, num_seeds = PICTURES[args.picture]
    folder = args.output_dir or Path("output/image") / config.data.dataset / "gallery" / config.name
    path = folder / f"{args.picture}.png"
    draw(path, denoiser, config, device, args.seeds or list(range(num_seeds)))
    print(f"the picture is {path}")


@torch.no_grad()
def reverse_process(denoiser: Denoiser, config: Config, device: torch.device, seeds: list[int]) -> list[State]:
    """Noisy images, their noise level, and what the network makes of them, (B, C, H, W) on the CPU: from the first step's end
    to the samples."""
    dtype = torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    noise = ImageNoise(seeds, (config.data.channels, config.data.resolution, config.data.resolution), device, dtype)
    labels = class_labels(seeds, config.network.label_dim)
    labels = labels if labels is None else labels.to(device)
    D, found = choices.steered(denoiser, config), []
    for state in choices.sampler(config)(denoiser, noise(), labels, noise):
        # The step's own denoised images are those of where it began, with churn after more noise was added.
        denoised = D(state.x, state.sigma, labels).to(state.x.dtype) if state.sigma > 0 else state.x
        found.append(State(state.x.cpu(), state.sigma, denoised.cpu()))
    return found


def sampled(
    denoiser: Denoiser, config: Config, device: torch.device, seeds: list[int], class_index: int | None = None
) -> torch.Tensor:
    """The samples alone, (B, C, H, W) uint8 on the CPU."""
    precision = autocast_dtype("no", device)
    batches = generate(denoiser, seeds, config, device, batch_size=64, precision=precision, class_index=class_index)
    return torch.cat([batch[-1] for batch in batches])


def filmstrip(path: Path, denoiser: Denoiser, config: Config, device: torch.device, seeds: list[int]) -> None:
    """noisy images on their way to samples, and below them what the network makes of them"""
    states = reverse_process(denoiser, config, device, seeds)
    count = min(NUM_FRAMES, len(states))
    shown = [states[round(place)] for place in torch.linspace(0, len(states) - 1, count).tolist()]
    sigma_data = config.preconditioning.sigma_data
    scales = [sigma_data / (state.sigma**2 + sigma_data**2) ** 0.5 for state in shown]
    noisy = torch.stack([state.x * scale for state, scale in zip(shown, scales)], dim=1)  # (B, frames, C, H, W)
    denoised = torch.stack([state.denoised for state in shown], dim=1)
    rows = to_uint8(torch.stack([noisy, denoised], dim=1).flatten(0, 1))
    names = [name for seed in seeds for name in (f"seed {seed}", "D(x)")]
    pictures.save_table(path, rows, names, [f"{state.sigma:.2g}" for state in shown], "noise level")


def trajectories(path: Path, denoiser: Denoiser, config: Config, device: torch.device, seeds: list[int]) -> None:
    """the ways of eight pixels of an image (of their red, if it has colours), and of what the network expects of them"""
    if len(seeds) > 1 or config.sampler.sampling_steps < 2:
        raise UserError("trajectories are those of one seed, and take 2 or more sampler.sampling_steps")
    states, size = reverse_process(denoiser, config, device, seeds), config.data.resolution
    columns = torch.linspace(size / 4, 3 * size / 4, NUM_PIXELS).long()
    pixels = [
        torch.stack([part[:, 0, size // 2, columns] for part in parts]) for parts in zip(*((s.x, s.denoised) for s in states))
    ]
    final = to_uint8(states[-1].x)
    pictures.save_trajectories(path, [state.sigma for state in states], *pixels, final, size // 2, columns.tolist())


def neighbours(path: Path, denoiser: Denoiser, config: Config, device: torch.device, seeds: list[int]) -> None:
    """samples, each beside the training images nearest to it, pixel by pixel"""
    samples = sampled(denoiser, config, device, seeds)
    train, _ = images_of(config, device, test=False)
    distances, places = nearest_images(samples.to(device), train, min(NUM_NEIGHBOURS, len(train)))
    rows = torch.cat([samples[:, None], train[places].cpu()], dim=1)
    names = [f"{distance:.3f}" for distance in distances[:, 0].tolist()]
    pictures.save_table(path, rows, names, ["sample", *["training"] * places.shape[1]], "beside the distance to the nearest")
    print("Root mean square distance to the nearest training image, median:")
    print(f"  {distances[:, 0].median():.3f} of {len(seeds)} samples")
    if config.data.dataset in HAVE_TEST_SETS:
        test, _ = images_of(config, device, test=True)
        distances, _ = nearest_images(test[:1000], train, 1)
        print(f"  {distances.median():.3f} of {len(distances):,} test images, which no network has seen")


def nearest_images(images: torch.Tensor, train: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k nearest training images of each of (N, C, H, W) uint8: root mean square differences of the pixels in [-1, 1], and
    indices, (N, k) each."""
    images, train = (to_model_range(part).flatten(1) for part in (images, train))
    places = torch.cat([torch.cdist(part, train).topk(k, largest=False).indices for part in images.split(100)])
    return (images[:, None] - train[places]).square().mean(dim=2).sqrt(), places  # which cdist finds less exactly


def classes(path: Path, denoiser: Denoiser, config: Config, device: torch.device, seeds: list[int]) -> None:
    """a column for each class, from the same noise in every row"""
    label_dim = num_classes(config)
    columns = [sampled(denoiser, config, device, seeds, class_index=index) for index in range(label_dim)]
    names = [f"seed {seed}" for seed in seeds]
    pictures.save_table(path, torch.stack(columns, dim=1), names, list(map(str, range(label_dim))), "class")


def guidance(path: Path, denoiser: Denoiser, config: Config, device: torch.device, seeds: list[int]) -> None:
    """a row for each strength of guidance, from the same noise in every column"""
    label_dim, rows = num_classes(config), []
    for strength in GUIDANCE:
        varied = dataclasses.replace(config, sampler=dataclasses.replace(config.sampler, guidance=float(strength)))
        rows.append(sampled(denoiser, varied, device, seeds))
    names = [f"guidance {strength:g}" for strength in GUIDANCE]
    pictures.save_table(path, torch.stack(rows), names, [str(seed % label_dim) for seed in seeds], "class")


def num_classes(config: Config) -> int:
    """Those that the network knows."""
    if not config.network.label_dim:
        raise UserError(
            "the network is unconditional and knows no classes; its pictures are filmstrip, trajectories and neighbours"
        )
    return config.network.label_dim


PICTURES = {  # and of how many seeds they are made, if none are named
    "filmstrip": (filmstrip, 3),
    "trajectories": (trajectories, 1),
    "neighbours": (neighbours, 8),
    "classes": (classes, 6),
    "guidance": (guidance, 10),
}


if __name__ == "__main__":
    run(main)
