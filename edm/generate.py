"""From a checkpoint and seeds to images."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.nn.functional import one_hot
from tqdm import tqdm

from edm import checkpoint, choices, ddpm, pictures
from edm import config as configs
from edm.compiling import compile_network, is_wanted
from edm.config import Config
from edm.data import to_uint8
from edm.device import autocast, autocast_dtype
from edm.distributed import Processes
from edm.errors import UserError
from edm.precond import Denoiser
from edm.randomness import ImageNoise
from edm.sampler import guided
from edm.unet import NETWORKS

MAX_PARAMETERS = 1_000_000_000  # of a network; the paper's largest has 296 million


def build_denoiser(config: Config, weights: dict | None = None, path: str | Path = "") -> Denoiser:
    """The config's network wrapped in its preconditioning, freshly initialised or with the weights read from `path`.

    Raises:
        UserError: the config's widths make no network, or none that a machine could hold; the weights are another network's.
    """
    options = dataclasses.asdict(config.network)
    architecture = NETWORKS[options.pop("architecture")]
    formulation, channels = choices.preconditioning(config), config.data.channels

    def build() -> Denoiser:
        return Denoiser(architecture(config.data.resolution, channels, formulation.outputs * channels, **options), formulation)

    try:
        with torch.device("meta"):  # takes no memory, whatever a stranger's config or checkpoint asks for
            plan = build()
        count = sum(parameter.numel() for parameter in plan.parameters())
        if count > MAX_PARAMETERS:
            raise ValueError(f"{count:,} parameters are more than the {MAX_PARAMETERS:,} allowed")
    except ValueError as error:
        raise UserError(f"network: {error}") from None
    if weights is not None:
        checkpoint.check_weights(plan, weights, path)
    denoiser = build()
    if weights is not None:
        denoiser.load_state_dict(weights)
    return denoiser


def class_labels(seeds: list[int], label_dim: int, class_index: int | None = None) -> torch.Tensor | None:
    """One-hot labels (B, label_dim): the class asked for, or else, seed by seed, all classes in turn. None without classes."""
    if not label_dim:
        return None
    return one_hot(torch.tensor([seed % label_dim if class_index is None else class_index for seed in seeds]), label_dim)


def grid_columns(seeds: list[int], label_dim: int, class_index: int | None = None) -> int | None:
    """A column for each class where the classes take turns; None leaves the grid about square."""
    in_turn = all(seed % label_dim == place % label_dim for place, seed in enumerate(seeds)) if label_dim else False
    return label_dim if in_turn and class_index is None and label_dim <= 20 else None


def generate(
    denoiser: Denoiser,
    seeds: list[int],
    config: Config,
    device: torch.device,
    batch_size: int,
    precision: torch.dtype = torch.float32,
    class_index: int | None = None,
    num_frames: int = 1,
    compile: str = "false",
    processes: Processes | None = None,
) -> Iterator[torch.Tensor]:
    """Images from seeds: image i depends on seeds[i] alone, up to float rounding.

    Args:
        denoiser: on `device`, in evaluation mode.
        config: what the denoiser was made from, and how to sample.
        batch_size: images at a time, of each process.
        precision: the network's, as `autocast_dtype` gives it.
        class_index: the class of all images; by default all classes in turn.
        num_frames: how many of the sampler's states to yield at most, about evenly spaced, the last one being the samples.
        compile: whether to compile the network first, as in `compiling.is_wanted`.
        processes: between which the seeds are divided. All of them call; only the first yields anything.

    Yields:
        (frames, B, C, H, W) uint8 on the CPU, batch after batch: noisy images, scaled to the data's standard deviation.
    """
    processes, options, sampler = processes or Processes(), config.sampler, choices.sampler(config)
    shape = (config.data.channels, config.data.resolution, config.data.resolution)
    state_dtype = torch.float32 if device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    sigma_data = config.preconditioning.sigma_data
    shown = {math.ceil((frame + 1) * options.sampling_steps / num_frames) for frame in range(num_frames)}  # after these steps
    batch_size = min(batch_size, math.ceil(len(seeds) / processes.size))
    batch_size = math.ceil(len(seeds) / math.ceil(len(seeds) / batch_size))  # all about the same
    batches = [seeds[i : i + batch_size] for i in range(0, len(seeds), batch_size)]
    rounds = [batches[i : i + processes.size] for i in range(0, len(batches), processes.size)]

    def rehearse() -> None:
        labels = class_labels(seeds[:1] * batch_size, config.network.label_dim)
        with torch.no_grad(), autocast(device, precision):
            x = torch.zeros(batch_size, *shape, device=device)
            guided(denoiser, options.guidance)(x, 1.0, labels if labels is None else labels.to(device))

    evaluations = len(rounds) * options.sampling_steps * (2 if options.solver == "heun" else 1)
    compiled = processes.highest(is_wanted(compile, device, rehearse, evaluations)) and compile_network(
        denoiser.model, rehearse, cuda_graphs=device.type == "cuda"
    )

    def frames(batch: list[int], bar: tqdm) -> torch.Tensor:
        count = len(batch)
        if compiled:
            batch = batch + batch[-1:] * (batch_size - count)  # the network was compiled for full batches
        noise = ImageNoise(batch, shape, device, state_dtype)
        labels = class_labels(batch, config.network.label_dim, class_index)
        states = sampler(denoiser, noise(), labels if labels is None else labels.to(device), noise)
        kept = []
        with torch.no_grad(), autocast(device, precision):
            for step, state in enumerate(states, start=1):
                if step in shown:
                    scale = sigma_data / (state.sigma**2 + sigma_data**2) ** 0.5
                    kept.append(to_uint8(state.x[:count] * scale).cpu())
                bar.update()
        return torch.stack(kept)

    total = len(rounds) * options.sampling_steps
    with tqdm(total=total, desc="sampling", unit="step", leave=False, disable=not processes.is_first) as bar:
        for batches in rounds:
            made = frames(batches[processes.rank], bar) if processes.rank < len(batches) else None
            yield from (part for part in processes.gather(made) if part is not None)


def largest_batch_size(denoiser: Denoiser, config: Config, device: torch.device, precision: torch.dtype) -> int:
    """How many images at a time: on CUDA, the power of two, up to 512, that takes at most three quarters of the memory at hand
    (which grows in proportion to the images); elsewhere 64, beyond which a CPU gets no faster."""
    if device.type != "cuda":
        return 64
    few = 8
    x = torch.zeros(few, config.data.channels, config.data.resolution, config.data.resolution, device=device)
    with torch.no_grad(), autocast(device, precision):
        denoiser(x, 1.0)  # what the libraries keep for themselves is counted as used
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        denoiser(x, 1.0)
    each = (torch.cuda.max_memory_allocated(device) - before) / few
    at_hand = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - before
    return 2 ** max(0, min(9, int(math.log2(0.75 * at_hand / max(each, 1)))))


def check_chain(config: Config, own: Config, path: str | Path) -> None:
    """Refuse, with a `UserError`, to take a chain's network for one of another chain, which its weights would fit as well.

    Args:
        config: how the network is going to be used.
        own: how it was trained, as its checkpoint says.
    """
    formulation = own.preconditioning.formulation
    if formulation in ddpm.FORMULATIONS and (config.preconditioning.formulation, config.chain) != (formulation, own.chain):
        raise UserError(
            f"the network in {path} was trained with preconditioning.formulation={formulation} "
            f"chain.schedule={own.chain.schedule} chain.num_timesteps={own.chain.num_timesteps}, which cannot be replaced"
        )


MAX_FRAMES = 64  # of a GIF
MAX_GRID = 2500  # images in a grid; what comes after is written only as single files


def write_samples(
    path: Path,
    config_path: Path | None,
    overrides: list[str],
    seeds: list[int] | None,
    device: torch.device,
    batch_size: int | None,
    mixed_precision: str = "no",
    class_index: int | None = None,
    output_dir: Path | None = None,
    save_images: bool = False,
    gif: bool = False,
    compile: str = "false",
    processes: Processes | None = None,
) -> None:
    """Sample from a checkpoint's averaged weights and write a grid, and on request single images and a GIF.

    Args:
        path: the checkpoint.
        config_path: the config; by default the one that the checkpoint carries.
        overrides: "sampler.key=value" entries, which replace the config's.
        seeds: which images; by default as many as the config says, from seed 0.
        device, class_index, compile: as in `generate`.
        batch_size: images at a time, of each process; None for `largest_batch_size`.
        mixed_precision: as in `autocast_dtype`.
        output_dir: where to; by default output/image/<dataset>/sample/<config name>.
        save_images: write every image as images/<seed>.png, too.
        gif: write the reverse process as reverse.gif, too.
        processes: between which the seeds are divided; the first one writes.

    Raises:
        UserError: a bad checkpoint or config, a class the network does not know, a folder that cannot be written to.
    """
    processes = processes or Processes()
    contents = processes.from_first(lambda: checkpoint.read(path))
    config = configs.load(config_path, overrides) if config_path else checkpoint.read_config(contents, path, overrides)
    if config_path:
        check_chain(config, checkpoint.read_config(contents, path), path)
    seeds = seeds or list(range(config.sampler.num_samples))
    label_dim = config.network.label_dim
    if class_index is not None and class_index >= label_dim:
        known = f"its classes are 0 to {label_dim - 1}" if label_dim else "the network is unconditional"
        raise UserError(f"--class: {class_index} is not a class of {path}: {known}")
    denoiser = build_denoiser(config, contents["ema"], path)
    denoiser.to(device, memory_format=torch.channels_last).eval()

    folder = output_dir or Path("output/image") / config.data.dataset / "sample" / config.name
    precision = autocast_dtype(mixed_precision, device)
    if batch_size is None:  # the processes', whose GPUs may not have the same memory at hand, agree on the smallest
        batch_size = -processes.highest(-largest_batch_size(denoiser, config, device, precision))
    num_frames = MAX_FRAMES if gif else 1
    batches = generate(denoiser, seeds, config, device, batch_size, precision, class_index, num_frames, compile, processes)

    def write(seeds: list[int], images: torch.Tensor) -> None:
        for seed, image in zip(seeds, images):
            pictures.save_image(folder / "images" / f"{seed:06d}.png", image)

    shown, done = [], 0  # (frames, B, C, H, W) of the batches in the grid; how many images were made
    with contextlib.closing(batches), ThreadPoolExecutor(1) as writer:  # a batch is written while the next one is computed
        written = writer.submit(write, [], [])
        for frames in batches:
            written.result()
            if save_images:
                written = writer.submit(write, seeds[done : done + frames.shape[1]], frames[-1])
            if done < MAX_GRID:
                shown.append(frames)
            done += frames.shape[1]
        written.result()
    if not processes.is_first:
        return
    columns = grid_columns(seeds, label_dim, class_index)
    grids = [pictures.grid(images[:MAX_GRID], columns) for images in torch.cat(shown, dim=1)]
    pictures.save_image(folder / "grid.png", grids[-1])
    print(f"{min(len(seeds), MAX_GRID)} images of {len(seeds)} in {folder / 'grid.png'}")
    if save_images:
        found = len(list((folder / "images").glob("*.png")))
        others = f", beside {found - len(seeds)} of earlier runs" if found > len(seeds) else ""
        print(f"{len(seeds)} single images in {folder / 'images'}{others}")
    if gif:
        pictures.save_gif(folder / "reverse.gif", grids)
        print(f"the reverse process in {folder / 'reverse.gif'}")


def export(source: Path, target: Path) -> None:
    """Write a checkpoint for sampling only: the averaged weights in half precision, step, name and config.

    Raises:
        UserError: the source cannot be read, its weights do not fit its config, or the target cannot be written.
    """
    contents = checkpoint.read(source)
    denoiser = build_denoiser(checkpoint.read_config(contents, source), contents["ema"], source)
    # What is small stays exact: biases, norms, and NCSN++'s frequencies, which half precision would detune.
    ema = {name: tensor.half() if tensor.ndim > 1 else tensor for name, tensor in denoiser.state_dict().items()}
    checkpoint.write(target, {**{key: contents[key] for key in ("step", "name", "config")}, "ema": ema})
    print(f"{target}: {target.stat().st_size / 1e6:.1f} MB")
