"""Bits per dimension of images: by the ODE of the deterministic sampler, and by the variational bound of a chain."""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from tqdm import tqdm

from edm.ddpm import Chain, variational_bound
from edm.likelihood import log_density
from edm.precond import Denoiser, PreconditionedDenoiser
from edm.sampler import clipped
from edm.schedule import RANGES, ve_steps
from lab.cli import UserError
from lab.config import Config
from lab.data import to_model_range
from lab.device import autocast, in_parts_that_fit
from lab.distributed import World
from lab.seeds import ImageNoise


def per_image(
    compute: Callable[[torch.Tensor, torch.Tensor | None, ImageNoise], Iterator[torch.Tensor]],
    num_rows: int,
    images: torch.Tensor,
    labels: torch.Tensor | None,
    device: torch.device,
    batch_size: int,
    precision: torch.dtype,
    world: World,
    title: str,
) -> torch.Tensor | None:
    """Return what a computation yields for each image. The images are divided among the ranks.

    Args:
        compute: called with images (b, C, H, W) uint8, labels (b, K) or None, and noise seeded by the images' indices; yields
            `num_rows` tensors (b,).
        images, labels: (N, C, H, W) uint8, and one-hot (N, K) or None, on the CPU.
        device: where the computation runs.
        batch_size: images at a time, on each rank; half as many, or fewer, if memory runs out.
        precision: that of the network, from `autocast_dtype`.
        title: of the progress bar.

    Returns:
        (num_rows, N) in float64 on the CPU, on rank 0; None on the others.
    """
    mine, parts = range(len(images))[world.shard(len(images))], []
    dtype = torch.float32 if device.type == "mps" else torch.float64  # Apple GPUs have no float64

    def compute_batch(places: range) -> torch.Tensor:
        batch, rows = slice(places.start, places.stop), []
        noise = ImageNoise(places, tuple(images.shape[1:]), device, dtype)
        batch_labels = labels if labels is None else labels[batch].to(device)
        with autocast(device, precision):
            for row in compute(images[batch].to(device), batch_labels, noise):
                rows.append(row)
                bar.update()
        return torch.stack(rows).cpu().double()

    starts = range(0, len(mine), batch_size)
    with tqdm(total=len(starts) * num_rows, desc=title, unit="step", leave=False, disable=not world.is_first) as bar:
        for start in starts:
            parts += in_parts_that_fit(compute_batch, mine[start : start + batch_size])
    gathered = world.gather(parts)
    return torch.cat([part for shard in gathered for part in shard], dim=1) if world.is_first else None


def dequantize(images: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Move each pixel to a random point of its grey level's interval, so that 8-bit images have a density.

    Args:
        images: (B, C, H, W) uint8.
        uniform: (B, C, H, W), draws from [0, 1).

    Returns:
        (B, C, H, W) in the dtype of `uniform`, from -1 - 1/255 to 1 + 1/255.
    """
    return (images - 0.5 + uniform) / 127.5 - 1


def bits_per_dimension(log_density: torch.Tensor, num_dimensions: int) -> torch.Tensor:
    """Convert the log-density of dequantized images, in nats, to bits per pixel and channel (a grey level is 2/255 wide)."""
    return -log_density / (num_dimensions * math.log(2)) + math.log2(127.5)


def mean_and_error(values: torch.Tensor) -> tuple[float, float | None]:
    """Return the mean of (N,) values and its standard error, which is None for a single value."""
    return values.mean().item(), values.std().item() / math.sqrt(len(values)) if len(values) > 1 else None


def plus_minus(mean: float, error: float | None) -> str:
    """Return a mean and its standard error as text."""
    return f"{mean:8.4f}" + (f" +- {error:.4f}" if error is not None else "")


def ode_levels(denoiser: PreconditionedDenoiser, config: Config, num_steps: int) -> torch.Tensor:
    """Return rising noise levels of the sampler's range, in geometric progression and rounded to those that the network knows.

    Returns:
        (num_steps + 1,), or fewer if the network knows few.

    Raises:
        UserError: the network does not know two noise levels of the range.
    """
    options, known = config.sampler, denoiser.preconditioning
    low, high = RANGES[options.discretization]
    low = max(low if options.sigma_min is None else options.sigma_min, known.sigma_min)
    high = min(high if options.sigma_max is None else options.sigma_max, known.sigma_max)
    levels = sorted({denoiser.round_sigma(sigma) for sigma in ve_steps(num_steps + 1, low, high)[:-1].tolist()})
    if low >= high or len(levels) < 2:
        raise UserError(f"bits per dimension: the network does not know two noise levels from {low:g} to {high:g}")
    return torch.tensor(levels, dtype=torch.float64)


@torch.no_grad()
def ode_bits(
    denoiser: Denoiser,
    levels: torch.Tensor,
    images: torch.Tensor,
    labels: torch.Tensor | None,
    device: torch.device,
    batch_size: int,
    precision: torch.dtype,
    world: World,
) -> dict | None:
    """Return the bits per dimension of images under the ODE of the deterministic sampler, and print them.

    Each image is moved to a random point of the intervals of its grey levels. A conditional network is given its class; there
    is no guidance and no clipping.

    Args:
        levels: rising noise levels, (steps + 1,), as returned by `ode_levels`, between which Heun's method steps.
        images, labels, device, batch_size, precision: as in `per_image`.

    Returns:
        "images", "steps", "total", and "standard_error" over images, random points and Hutchinson's estimate. On rank 0; None
        on the others.
    """

    def compute(images: torch.Tensor, labels: torch.Tensor | None, noise: ImageNoise) -> Iterator[torch.Tensor]:
        uniform = (1 + torch.erf(noise() / math.sqrt(2))) / 2  # the normal distribution function of normal noise
        return log_density(denoiser, dequantize(images, uniform), levels, noise, labels)

    steps = len(levels) - 1
    rows = per_image(compute, steps, images, labels, device, batch_size, precision, world, "likelihood by the ODE")
    if rows is None:
        return None
    total, error = mean_and_error(bits_per_dimension(rows[-1], images[0].numel()))
    print(f"Bits per dimension of {len(images):,} images, by the ODE in {steps} steps: {plus_minus(total, error)}")
    return {"images": len(images), "steps": steps, "total": total, "standard_error": error}


@torch.no_grad()
def bound_bits(
    denoiser: Denoiser,
    config: Config,
    chain: Chain,
    images: torch.Tensor,
    labels: torch.Tensor | None,
    device: torch.device,
    batch_size: int,
    precision: torch.dtype,
    world: World,
) -> dict | None:
    """Return the variational bound of a chain on the bits per dimension of images, and print it by its terms.

    A conditional network is given the classes; there is no guidance, and clipping only if the config's samples are clipped.

    Args:
        images, labels, device, batch_size, precision: as in `per_image`.

    Returns:
        "images", "timesteps", "variance", "prior", "terms" from the reconstruction on, "total", their sum, and
        "standard_error". On rank 0; None on the others.
    """
    variance = config.sampler.variance
    D = clipped(denoiser) if config.sampler.clip else denoiser

    def compute(images: torch.Tensor, labels: torch.Tensor | None, noise: ImageNoise) -> Iterator[torch.Tensor]:
        y = to_model_range(images).to(noise.dtype)
        yield chain.like(y).prior_term(y)
        yield from variational_bound(D, y, chain, noise, variance, labels)

    rows = per_image(compute, len(chain) + 1, images, labels, device, batch_size, precision, world, "variational bound")
    if rows is None:
        return None
    total, error = mean_and_error(rows.sum(dim=0))
    prior, *terms = rows.mean(dim=1).tolist()
    terms.reverse()  # the bound starts with the noisiest timestep
    steps = f"{len(chain)} of {config.chain.num_timesteps} timesteps"
    print(f"Bits per dimension of {len(images):,} images, by the bound of {steps}, {variance}:")
    parts = [("prior", prior)]
    edges = [1 + (len(chain) - 1) * tenth // 10 for tenth in range(11)]
    for low, high in reversed([pair for pair in pairwise(edges) if pair[0] < pair[1]]):
        first, last = chain.timesteps[low].item(), chain.timesteps[high - 1].item()
        parts.append((f"timesteps {first} to {last}" if first < last else f"timestep {first}", sum(terms[low:high])))
    for name, value in [*parts, ("reconstruction", terms[0])]:
        print(f"  {name:<24} {value:8.4f}")
    print(f"  {'total':<24} {plus_minus(total, error)}")
    return {
        "images": len(images),
        "timesteps": chain.timesteps.tolist(),
        "variance": variance,
        "prior": prior,
        "terms": terms,
        "total": total,
        "standard_error": error,
    }
