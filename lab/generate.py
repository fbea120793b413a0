"""From a checkpoint and seeds to images. Image i depends on seed i alone."""

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import one_hot
from tqdm import tqdm

from edm.precond import PreconditionedDenoiser
from lab import checkpoint, pictures
from lab import config as configs
from lab.build import build_network, build_sampler
from lab.cli import UserError
from lab.config import Config
from lab.data import to_uint8
from lab.device import autocast, in_parts_that_fit
from lab.distributed import World
from lab.seeds import ImageNoise

NO_GUIDANCE = ["sampler.guidance=1", "sampler.guide=null"]  # overrides


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of every command that takes a checkpoint."""
    parser.add_argument("--checkpoint", type=Path, required=True, help="a .pt or .safetensors file, or one of the authors'")
    parser.add_argument("--config_path", type=Path, help="the YAML config (default: the one that the checkpoint carries)")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the first of them that this machine has)")
    parser.add_argument(
        "--mixed_precision", choices=["no", "auto", "fp16", "bf16"], default="no", help="the network's precision (default: no)"
    )


def load_denoiser(
    path: Path, config_path: Path | None, overrides: list[str], device: torch.device, world: World | None = None
) -> tuple[Config, PreconditionedDenoiser, int]:
    """Read a checkpoint; returns its config, its denoiser with the averaged weights, for evaluation, and its step.

    The denoiser's attribute `guide` is that of `load_guide`.

    Args:
        path: the checkpoint.
        config_path: the config to use instead of the one in the checkpoint.
        overrides: "section.key=value" entries, which replace the config's.
        device: where the denoiser goes.
        world: rank 0 reads the file for all ranks.

    Raises:
        UserError: a bad checkpoint or config, or a config of another network.
    """
    contents = (world or World()).broadcast(lambda: checkpoint.load(path))
    config = configs.load(config_path, overrides) if config_path else checkpoint.read_config(contents, path, overrides)
    if "config" in contents:
        own = checkpoint.read_config(contents, path)
        if config.preconditioning.sigma_data == "auto":  # which training has measured
            measured = f"preconditioning.sigma_data={own.preconditioning.sigma_data}"
            config = configs.with_overrides(config, [measured], str(path))
        check_chain(config, own, path)
    if config.preconditioning.sigma_data == "auto":
        raise UserError(f"preconditioning.sigma_data: {path} does not say what auto was measured to be; give the number")
    denoiser = build_network(config, contents["ema"], path).to(device, memory_format=torch.channels_last)
    if config.sampler.guide and Path(config.sampler.guide).resolve() == path.resolve():
        instead = "; null guides by the network without its classes" if config.network.label_dim else ""
        raise UserError(f"sampler.guide: {path} cannot guide itself{instead}")
    denoiser.guide = load_guide(config, device, world)
    return config, denoiser.eval().requires_grad_(False), contents["step"]


def load_guide(config: Config, device: torch.device, world: World | None = None) -> PreconditionedDenoiser | None:
    """Read the checkpoint that the config's sampler names as the guide; returns its denoiser, or None if it names none.

    Raises:
        UserError: a bad checkpoint, or one of other images, classes or noise levels than the config's.
    """
    if not config.sampler.guide:
        return None
    path = Path(config.sampler.guide)
    try:
        own, guide, _ = load_denoiser(path, None, NO_GUIDANCE, device, world)
    except UserError as error:
        raise UserError(f"sampler.guide: {error}") from None
    for entry in ("data.resolution", "data.channels", "network.label_dim", "preconditioning.formulation"):
        section, key = entry.split(".")
        found, expected = (getattr(getattr(each, section), key) for each in (own, config))
        if found != expected:
            raise UserError(f"sampler.guide: {path} has {entry}={found}, and the network that it would guide {expected}")
    check_chain(config, own, path)
    return guide


def check_guide_is_used(config: Config) -> None:
    """Raise a `UserError` if the config's sampler names a guide and gives it no weight."""
    if config.sampler.guide and config.sampler.guidance == 1:
        raise UserError("sampler.guide: with sampler.guidance 1 the guide is not used; choose another weight, such as 2")


def networks(denoiser: nn.Module) -> list[nn.Module]:
    """Return the networks that sample: the denoiser, and its guide if it has one."""
    guide = getattr(denoiser, "guide", None)
    return [denoiser, guide] if guide else [denoiser]


def on_evaluation(denoiser: nn.Module, count: Callable[[int], None]) -> ExitStack:
    """Call `count` with the number of images at every evaluation of the denoiser or its guide, within a `with` statement."""
    hooks = ExitStack()
    for network in networks(denoiser):
        hooks.enter_context(network.register_forward_hook(lambda module, inputs, output: count(len(output))))
    return hooks


def check_chain(config: Config, own: Config, path: Path) -> None:
    """Raise a `UserError` if a network would be used on another chain than the one it was trained on.

    Its weights would load, and its samples would be wrong.

    Args:
        config: how the network is to be used.
        own: how it was trained, as its checkpoint says.
    """
    formulation = own.preconditioning.formulation
    if formulation in ("ddpm", "improved_ddpm") and (config.preconditioning.formulation, config.chain) != (
        formulation,
        own.chain,
    ):
        raise UserError(
            f"the network in {path} was trained with preconditioning.formulation={formulation} chain.betas={own.chain.betas} "
            f"chain.num_timesteps={own.chain.num_timesteps}, which cannot be changed"
        )


def class_labels(seeds: Sequence[int], label_dim: int, class_index: int | None = None) -> torch.Tensor | None:
    """Return one-hot labels (B, label_dim): of one class, or of all classes in turn, seed by seed. None without classes."""
    if not label_dim:
        return None
    return one_hot(torch.tensor([seed % label_dim if class_index is None else class_index for seed in seeds]), label_dim)


def grid_columns(seeds: list[int], label_dim: int, class_index: int | None = None) -> int | None:
    """Return the number of columns of a grid with one for each class, if the classes take turns; else None."""
    in_turn = label_dim and all(seed % label_dim == index % label_dim for index, seed in enumerate(seeds))
    return label_dim if in_turn and class_index is None and label_dim <= 20 else None


def noise_and_labels(
    seeds: Sequence[int], config: Config, device: torch.device, class_index: int | None = None
) -> tuple[ImageNoise, torch.Tensor | None]:
    """Return the noise that images with these seeds are sampled from, and their labels as in `class_labels`, on the device."""
    shape = (config.data.channels, config.data.resolution, config.data.resolution)
    dtype = torch.float32 if device.type == "mps" else torch.float64  # Apple GPUs have no float64
    labels = class_labels(seeds, config.network.label_dim, class_index)
    return ImageNoise(seeds, shape, device, dtype), labels if labels is None else labels.to(device)


def generate(
    denoiser: PreconditionedDenoiser,
    seeds: list[int],
    config: Config,
    device: torch.device,
    batch_size: int,
    precision: torch.dtype = torch.float32,
    class_index: int | None = None,
    world: World | None = None,
    title: str | None = "sampling",
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[torch.Tensor]:
    """Sample images, one for each seed.

    Args:
        denoiser: on `device`, in evaluation mode.
        config: says how to sample.
        batch_size: images at a time, on each rank; half as many, or fewer, if memory runs out.
        precision: that of the network, from `autocast_dtype`.
        class_index: the class of all images; by default all classes in turn.
        world: the ranks that share the work. All of them call; only rank 0 gets images.
        title: of the progress bar; None for no bar.
        stop: asked after each sampling step. Once it is true, sampling ends, and the images are unfinished.

    Yields:
        (B, C, H, W) uint8 on the CPU, batch after batch.
    """
    world, sampler, num_steps = world or World(), build_sampler(config), config.sampler.sampling_steps
    batch_size = min(batch_size, math.ceil(len(seeds) / world.size))
    batch_size = math.ceil(len(seeds) / math.ceil(len(seeds) / batch_size))  # batches of about the same size
    batches = [seeds[start : start + batch_size] for start in range(0, len(seeds), batch_size)]
    rounds = [batches[start : start + world.size] for start in range(0, len(batches), world.size)]

    def sample_batch(seeds: list[int]) -> torch.Tensor:
        noise, labels = noise_and_labels(seeds, config, device, class_index)
        with torch.no_grad(), autocast(device, precision):
            for state in sampler(denoiser, noise(), labels, noise):
                images = state.x
                bar.update()
                if stop():
                    break
        return to_uint8(images).cpu()

    hidden = title is None or not world.is_first
    with tqdm(total=len(rounds) * num_steps, desc=title, unit="step", leave=False, disable=hidden) as bar:
        for batches in rounds:
            mine = batches[world.rank] if world.rank < len(batches) else None
            images = torch.cat(in_parts_that_fit(sample_batch, mine)) if mine else None
            yield from (part for part in world.gather(images) if part is not None)


def save_grid(
    path: Path,
    denoiser: PreconditionedDenoiser,
    config: Config,
    device: torch.device,
    precision: torch.dtype,
    world: World,
    stop: Callable[[], bool],
) -> None:
    """Write a grid of the config's `num_samples` samples, from seeds 0, 1, 2, ..., as a PNG file.

    Args:
        stop: asked after each sampling step. Once it is true on a rank, nothing is written.
    """
    seeds = list(range(config.sampler.num_samples))
    batch_size = 4 * config.training.batch_size  # without gradients there is room for more than in training
    images = list(generate(denoiser, seeds, config, device, batch_size, precision, world=world, stop=stop))
    is_stopped = world.all_reduce_max(stop())
    if images and not is_stopped:  # on rank 0
        pictures.save_image(path, pictures.grid(torch.cat(images), grid_columns(seeds, config.network.label_dim)))


def export(source: Path, target: Path, config_path: Path | None, overrides: list[str]) -> None:
    """Write a checkpoint for sampling only: the averaged weights (matrices in half precision), step, name and config.

    The config may name a guide, whose weights stay in its own file.

    Args:
        source, config_path, overrides: as in `load_denoiser`.
        target: the file to write: safetensors for a name that ends in .safetensors, else in the format of checkpoints.

    Raises:
        UserError: the source cannot be read, its weights do not fit its config, or the target cannot be written, or is a file
            that a run, the source or the guide needs.
    """
    checkpoint.check_name(target, "--export")
    config, denoiser, step = load_denoiser(source, config_path, overrides, torch.device("cpu"))
    build_sampler(config)  # raises if its choices do not fit together
    check_guide_is_used(config)
    for path in filter(None, (source, config.sampler.guide)):
        if target.resolve() == Path(path).resolve():
            raise UserError(f"--export: {path} would be overwritten; choose another name")
    denoiser.guide = None
    ema = checkpoint.halved(denoiser.state_dict())
    checkpoint.save(target, {"step": step, "name": config.name, "config": config.to_dict(), "ema": ema})
    print(f"{target}: {target.stat().st_size / 1e6:.1f} MB")
