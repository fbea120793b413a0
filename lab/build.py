"""From the names in a config to the objects of `edm` that they stand for: one function for each choice."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from edm.ddpm import Chain, ancestral, ddim, make_chain
from edm.ddpm_loss import ImportanceSampledTimesteps, variational_loss
from edm.loss import WEIGHTINGS, LogNormal, NoiseDistribution, UniformLevels, VENoise, VPNoise
from edm.precond import (
    Denoiser,
    EDMPreconditioning,
    PreconditionedDenoiser,
    Preconditioning,
    VEPreconditioning,
    VPPreconditioning,
    iDDPMPreconditioning,
)
from edm.sampler import State, clipped, guided, sample
from edm.schedule import DISCRETIZATIONS, RANGES, SCALINGS, SCHEDULES, Schedule
from edm.unet import NETWORKS
from lab import checkpoint
from lab.cli import UserError
from lab.config import Config

MAX_PARAMETERS = 1_000_000_000  # of a network; the paper's largest has 296 million


def build_network(config: Config, weights: dict | None = None, path: str | Path = "") -> PreconditionedDenoiser:
    """Return the config's network in its preconditioning, with initial weights or with those read from `path`.

    Raises:
        UserError: the widths make no network, or a huge one; or the weights are another network's.
    """
    preconditioning, channels = build_preconditioning(config), config.data.channels
    options = config.network.model_dump(exclude={"architecture"})
    architecture = NETWORKS[config.network.architecture]

    def build() -> PreconditionedDenoiser:
        model = architecture(config.data.resolution, channels, preconditioning.outputs * channels, **options)
        return PreconditionedDenoiser(model, preconditioning)

    try:
        with torch.device("meta"):  # takes no memory, whatever the config of a stranger asks for
            plan = build()
        count = sum(parameter.numel() for parameter in plan.parameters())
        if count > MAX_PARAMETERS:
            raise ValueError(f"{count:,} parameters are more than the {MAX_PARAMETERS:,} allowed")
    except ValueError as error:
        raise UserError(f"network: {error}") from None
    if weights is not None:
        checkpoint.check_weights(plan, weights, path)
    net = build()
    if weights is not None:
        net.load_state_dict(weights)
    return net


def build_chain(config: Config) -> Chain:
    """Return the chain of DDPM's formulations: that of the config, or for `iddpm` the one in Table 1.

    Raises:
        UserError: the chain is too short for its betas.
    """
    if config.preconditioning.formulation == "iddpm":
        return make_chain("cosine", 1000)
    try:
        return make_chain(config.chain.betas, config.chain.num_timesteps)
    except ValueError as error:
        raise UserError(f"chain.num_timesteps: {error}") from None


def build_preconditioning(config: Config) -> Preconditioning:
    """Return the preconditioning: c_skip, c_out, c_in, c_noise, and the noise levels that the network knows."""
    match config.preconditioning.formulation:
        case "edm":
            return EDMPreconditioning(config.preconditioning.sigma_data)
        case "vp":
            return VPPreconditioning()
        case "ve":
            return VEPreconditioning()
        case "iddpm":
            return iDDPMPreconditioning()
        case "ddpm":
            return iDDPMPreconditioning(build_chain(config).levels, outputs=1)
        case "improved_ddpm":
            return iDDPMPreconditioning(build_chain(config).levels, outputs=2)


def build_noise_distribution(config: Config) -> NoiseDistribution:
    """Return the distribution of the noise levels in training."""
    match config.loss.noise_distribution:
        case "lognormal":
            return LogNormal(config.loss.P_mean, config.loss.P_std)
        case "vp":
            return VPNoise()
        case "ve":
            return VENoise()
        case "iddpm":
            return UniformLevels(iDDPMPreconditioning().levels)
        case "ddpm":
            return UniformLevels(build_chain(config).levels)
        case "importance":
            return ImportanceSampledTimesteps(build_chain(config).levels)


def build_weighting(config: Config) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return lambda(sigma)."""
    return partial(WEIGHTINGS[config.loss.weighting], sigma_data=config.preconditioning.sigma_data)


def build_chain_loss(config: Config) -> Callable[..., torch.Tensor] | None:
    """Return the loss that teaches Improved DDPM its variance, or None for the denoising loss (Eq. 8).

    Returns:
        A function of the denoiser, y, n, sigma, weight and the denoiser's conditions: `variational_loss` on the chain.

    Raises:
        UserError: the network puts out no variance, or is not trained at the timesteps of a chain.
    """
    objective = config.loss.objective
    if objective == "denoising":
        return None
    if config.preconditioning.formulation != "improved_ddpm":
        raise UserError(f"loss.objective: {objective} teaches a variance; it needs preconditioning.formulation=improved_ddpm")
    if config.loss.noise_distribution not in ("ddpm", "importance"):
        raise UserError(
            f"loss.objective: {objective} needs the timesteps of a chain: loss.noise_distribution ddpm or importance"
        )
    return partial(variational_loss, chain=build_chain(config), hybrid=objective == "hybrid")


def build_sampler(config: Config) -> Callable[..., Iterator[State]]:
    """Return the sampler with all its choices, guidance and clipping included.

    Returns:
        A function of a network, latents (B, C, H, W), one-hot labels (B, K) or None, and noise (called for more noise of the
        latents' shape), which yields the state after each step.

    Raises:
        UserError: the choices do not fit together.
    """
    options = config.sampler
    if options.solver in ("ancestral", "ddim"):
        chain = known_chain(config, options.sampling_steps)
    else:
        sigma_steps, schedule = sampling_plan(config)

    def run(
        net: PreconditionedDenoiser, latents: torch.Tensor, labels: torch.Tensor | None, noise: Callable
    ) -> Iterator[State]:
        denoiser = with_guidance_and_clipping(net, config)
        if options.solver == "ancestral":
            return ancestral(denoiser, latents, chain, noise, options.variance, labels)
        if options.solver == "ddim":
            return ddim(denoiser, latents, chain, labels)
        return sample(
            denoiser,
            latents,
            sigma_steps,
            labels,
            schedule,
            solver=options.solver,
            alpha=options.alpha,
            S_churn=options.S_churn,
            S_min=options.S_min,
            S_max=options.S_max,
            S_noise=options.S_noise,
            noise=noise,
            round_sigma=net.round_sigma,
        )

    return run


def with_guidance_and_clipping(denoiser: Denoiser, config: Config) -> Denoiser:
    """Return the denoiser with the guidance and the clipping of the config's sampler.

    The guide is `denoiser.guide`, which `generate.load_denoiser` reads, or the denoiser itself without labels.
    """
    options = config.sampler
    guide = denoiser.guide if options.guide else lambda x, sigma, labels: denoiser(x, sigma)
    D = guided(denoiser, guide, options.guidance, (options.guidance_min, options.guidance_max))
    return clipped(D) if options.clip else D


def sampling_plan(config: Config) -> tuple[torch.Tensor, Schedule]:
    """Return the noise levels, within those that the network knows, and the schedule, for the samplers of Table 1.

    Raises:
        UserError: the choices do not fit together.
    """
    known, options = build_preconditioning(config), config.sampler
    try:
        sigma_steps, schedule = table_1(
            options.sampling_steps,
            options.discretization,
            options.schedule,
            options.scaling,
            options.sigma_min,
            options.sigma_max,
            options.rho,
            supported=(known.sigma_min, known.sigma_max),
        )
        if options.S_churn > 0:  # the highest noise level that churn can reach must be one of the schedule's
            gamma = min(options.S_churn / options.sampling_steps, math.sqrt(2) - 1)
            schedule.t((1 + gamma) * min(sigma_steps[0].item(), max(options.S_max, sigma_steps[-2].item())))
    except ValueError as error:
        raise UserError(f"sampler: {error}") from None
    return sigma_steps, schedule


def table_1(
    num_steps: int,
    discretization: str = "edm",
    schedule: str = "linear",
    scaling: str = "none",
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    rho: float = 7.0,
    supported: tuple[float, float] = (0.0, math.inf),
) -> tuple[torch.Tensor, Schedule]:
    """Return the noise levels and the schedule that these names have in Table 1.

    Args:
        num_steps: N, at least 1.
        discretization, schedule, scaling: names in `DISCRETIZATIONS`, `SCHEDULES` and `SCALINGS`.
        sigma_min, sigma_max: the range of noise levels; None takes the discretization's own from `RANGES`.
        rho: used by EDM's discretization alone.
        supported: the lowest and the highest noise level that the denoiser knows; the range is clamped to them.

    Returns:
        The noise levels (num_steps + 1,), falling, the last one 0; and sigma(t) with s(t).

    Raises:
        ValueError: the range is empty, or one of the choices cannot cover it.
    """
    low, high = RANGES[discretization]
    low = max(low if sigma_min is None else sigma_min, supported[0])
    high = min(high if sigma_max is None else sigma_max, supported[1])
    if not low < high:
        known = f"the denoiser knows {supported[0]:g} to {supported[1]:g}"
        raise ValueError(f"sigma_min {low:g} must be below sigma_max {high:g}; {known}")
    options = {"rho": rho} if discretization == "edm" else {}
    sigma_steps = DISCRETIZATIONS[discretization](num_steps, low, high, **options)
    sigma, sigma_inverse = SCHEDULES[schedule](low, high)
    return sigma_steps, Schedule(sigma, SCALINGS[scaling](sigma), sigma_inverse)


def known_chain(config: Config, num_steps: int) -> Chain:
    """Return num_steps timesteps of the chain, at noise levels that the network knows.

    Raises:
        UserError: the chain is shorter, or the network knows other noise levels, or no variance.
    """
    known, formulation = build_preconditioning(config), config.preconditioning.formulation
    try:
        chain = build_chain(config).strided(num_steps)
    except ValueError as error:
        raise UserError(f"sampler: {error}") from None
    tolerance = 1e-9  # the noise levels of `iddpm` and those of its chain differ by rounding
    highest, rounded = chain.sigma[-1] / (1 + tolerance), known.round_sigma(chain.sigma)
    if highest > known.sigma_max or not torch.allclose(rounded, chain.sigma, rtol=tolerance, atol=0):
        raise UserError(
            f"sampler: the formulation {formulation} does not know the noise levels of the chain; choose the solver heun, "
            "euler or dpmpp_2m, or a network with the formulation edm, iddpm, ddpm or improved_ddpm"
        )
    if config.sampler.variance == "learned_range" and formulation != "improved_ddpm":
        raise UserError(f"sampler: the formulation {formulation} has learned no variance; choose fixed_small or fixed_large")
    return chain
