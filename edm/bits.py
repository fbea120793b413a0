"""Bits per dimension of a checkpoint on real images: by the deterministic sampler's ODE, and by a chain's variational bound."""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch.nn.functional import one_hot
from tqdm import tqdm

from edm.config import Config
from edm.data import to_model_range
from edm.ddpm import Chain, variational_bound
from edm.distributed import Processes
from edm.errors import UserError
from edm.likelihood import bits_per_dimension, dequantize, log_density
from edm.precond import Denoiser
from edm.randomness import ImageNoise
from edm.sampler import clipped
from edm.schedule import RANGES, ve_steps


def per_image(
    compute: Callable[[torch.Tensor, torch.Tensor | None, ImageNoise], Iterator[torch.Tensor]],
    num_rows: int,
    images: torch.Tensor,
    labels: torch.Tensor | None,
    batch_size: int,
    title: str,
    processes: Processes,
) -> torch.Tensor | None:
    """What a computation yields, `num_rows` times, for the images, each with noise of its own number.

    Args:
        compute: called with images (b, C, H, W) uint8, labels (b, K) or None, and noise; yields (b,) tensors.
        images, labels: (N, C, H, W) uint8 and (N, K) or None, divided between the processes.

    Returns:
        (num_rows, N) in float64 on the CPU, in the first process; None in the others.
    """
    mine, parts = processes.share(len(images)), []
    dtype = torch.float32 if images.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    starts = range(mine.start, mine.stop, batch_size)
    with tqdm(total=len(starts) * num_rows, desc=title, unit="step", leave=False, disable=not processes.is_first) as bar:
        for start in starts:
            batch = slice(start, min(start + batch_size, mine.stop))
            noise = ImageNoise(range(batch.start, batch.stop), tuple(images.shape[1:]), images.device, dtype)
            rows = []
            for row in compute(images[batch], labels if labels is None else labels[batch], noise):
                rows.append(row)
                bar.update()
            parts.append(torch.stack(rows).cpu().double())
    gathered = processes.gather(parts)
    return torch.cat([part for share in gathered for part in share], dim=1) if processes.is_first else None


def mean_and_error(values: torch.Tensor) -> tuple[float, float | None]:
    """The mean of (N,) values, and its standard error, if there are two or more."""
    return values.mean().item(), values.std().item() / math.sqrt(len(values)) if len(values) > 1 else None


def plus_minus(mean: float, error: float | None) -> str:
    return f"{mean:8.4f}" + (f" +- {error:.4f}" if error is not None else "")


def one_hot_labels(labels: torch.Tensor, config: Config) -> torch.Tensor | None:
    return one_hot(labels, config.network.label_dim) if config.network.label_dim else None


def ode_levels(denoiser: Denoiser, config: Config, num_steps: int) -> torch.Tensor:
    """Rising noise levels of the sampler's range, in geometric progression, as the network knows them: (num_steps + 1,), or
    fewer where it knows few."""
    options, formulation = config.sampler, denoiser.preconditioning
    low, high = RANGES[options.discretization]
    low = max(low if options.sigma_min is None else options.sigma_min, formulation.sigma_min)
    high = min(high if options.sigma_max is None else options.sigma_max, formulation.sigma_max)
    levels = sorted({denoiser.round_sigma(sigma) for sigma in ve_steps(num_steps + 1, low, high)[:-1].tolist()})
    if low >= high or len(levels) < 2:
        raise UserError(f"bits per dimension: the network knows no two noise levels from {low:g} to {high:g}")
    return torch.tensor(levels, dtype=torch.float64)


@torch.no_grad()
def ode_bits(
    denoiser: Denoiser,
    config: Config,
    images: torch.Tensor,
    labels: torch.Tensor,
    num_steps: int,
    batch_size: int,
    processes: Processes,
) -> dict | None:
    """Of images, each moved to a random point of its grey levels' intervals; given their classes, if the network knows any,
    and without guidance or clipping.

    Args:
        images, labels: (N, C, H, W) uint8 and (N,), on the network's device.
        num_steps: of Heun's method, at noise levels in geometric progression over the sampler's range.

    Returns:
        "total" and its "standard_error" (of the images, their points and Hutchinson's estimate), in the first process.

    Raises:
        UserError: the network does not know two noise levels of the sampler's range.
    """
    levels = ode_levels(denoiser, config, num_steps)

    def compute(images: torch.Tensor, labels: torch.Tensor | None, noise: ImageNoise) -> Iterator[torch.Tensor]:
        uniform = (1 + torch.erf(noise() / math.sqrt(2))) / 2  # the normal distribution function of normal noise
        return log_density(denoiser, dequantize(images, uniform), levels, noise, labels)

    labels = one_hot_labels(labels, config)
    rows = per_image(compute, len(levels) - 1, images, labels, batch_size, "the likelihood", processes)
    if rows is None:
        return None
    total, error = mean_and_error(bits_per_dimension(rows[-1], images[0].numel()))
    print(f"Bits per dimension of {len(images):,} images, by the ODE in {len(levels) - 1} steps: {plus_minus(total, error)}")
    return {"images": len(images), "steps": len(levels) - 1, "total": total, "standard_error": error}


@torch.no_grad()
def bound_bits(
    denoiser: Denoiser,
    config: Config,
    chain: Chain,
    images: torch.Tensor,
    labels: torch.Tensor,
    batch_size: int,
    processes: Processes,
) -> dict | None:
    """The variational bound of a chain, by its terms: given the images' classes, if the network knows any, without guidance,
    and clipped as the config's samples are.

    Args:
        images, labels: (N, C, H, W) uint8 and (N,), on the network's device.

    Returns:
        "prior", "terms", their "total" and its "standard_error", in the first process.
    """
    variance = config.sampler.variance
    D = clipped(denoiser) if config.sampler.clip == "true" else denoiser

    def compute(images: torch.Tensor, labels: torch.Tensor | None, noise: ImageNoise) -> Iterator[torch.Tensor]:
        y = to_model_range(images).to(noise.dtype)
        yield chain.like(y).prior_term(y)
        yield from variational_bound(D, y, chain, noise, variance, labels)

    labels = one_hot_labels(labels, config)
    rows = per_image(compute, len(chain) + 1, images, labels, batch_size, "the bound", processes)
    if rows is None:
        return None
    total, error = mean_and_error(rows.sum(dim=0))
    prior, *terms = rows.mean(dim=1).tolist()
    terms.reverse()  # they come from the noisy end
    steps = f"{len(chain)} of {config.chain.num_timesteps} timesteps"
    print(f"Bits per dimension of {len(images):,} images, by the bound of {steps}, {variance}:")
    parts = [("prior", prior)]
    edges = [1 + (len(chain) - 1) * tenth // 10 for tenth in range(11)]
    for low, high in reversed([pair for pair in pairwise(edges) if pair[0] < pair[1]]):
        first, last = chain.timesteps[low].item(), chain.timesteps[high - 1].item()
        parts.append((f"timesteps {first} to {last}" if first < last else f"timestep {first}", sum(terms[low:high])))
    for name, value in [*parts, ("reconstruction", terms[0])]:
        print(f"  {name:<24} {value:8.4f}")
    print(f"  {'all':<24} {plus_minus(total, error)}")
    return {
        "images": len(images),
        "timesteps": chain.timesteps.tolist(),
        "variance": variance,
        "prior": prior,
        "terms": terms,
        "total": total,
        "standard_error": error,
    }
