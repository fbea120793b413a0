"""The objects that the names in a config stand for: one table for every choice."""

import inspect
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch

from edm import ddpm, ddpm_training, loss, precond
from edm.ddpm import ancestral, ddim, make_chain
from edm.loss import NoiseDistribution, denoising_loss
from edm.precond import Denoiser, Preconditioning
from edm.sampler import SOLVERS as ODE_SOLVERS
from edm.sampler import State, clipped, guided, sample
from edm.schedule import Schedule, table_1

if TYPE_CHECKING:
    from edm.config import Config

FORMULATIONS = {**precond.PRECONDITIONINGS, **ddpm.FORMULATIONS}
DISTRIBUTIONS = {**loss.NOISE_DISTRIBUTIONS, **ddpm_training.TIMESTEPS}
OBJECTIVES = {"denoising": lambda: denoising_loss, **ddpm_training.OBJECTIVES}
SOLVERS = (*ODE_SOLVERS, "ancestral", "ddim")


def chosen(table: dict[str, Callable], name: str, *sections: object):
    """What a name stands for, made with those of the sections' entries that it has a use for."""
    entries = {key: value for section in sections for key, value in vars(section).items()}
    return table[name](**{key: entries[key] for key in inspect.signature(table[name]).parameters if key in entries})


def preconditioning(config: "Config") -> Preconditioning:
    """The formulation.

    Raises:
        ValueError: there is no such chain.
    """
    return chosen(FORMULATIONS, config.preconditioning.formulation, config.preconditioning, config.chain)


def noise_distribution(config: "Config") -> NoiseDistribution:
    """The noise levels of training."""
    return chosen(DISTRIBUTIONS, config.loss.noise_distribution, config.loss, config.chain)


def objective(config: "Config") -> Callable[..., torch.Tensor]:
    """The loss, called like `loss.denoising_loss`.

    Raises:
        ValueError: it asks for a variance that the network does not have, or for timesteps that the images are not drawn at.
    """
    chosen_loss = config.loss
    if chosen_loss.objective in ddpm_training.OBJECTIVES:
        if config.preconditioning.formulation != "improved_ddpm":
            raise ValueError(f"{chosen_loss.objective} teaches a variance; it needs preconditioning.formulation improved_ddpm")
        if chosen_loss.noise_distribution not in ddpm_training.TIMESTEPS:
            raise ValueError(
                f"{chosen_loss.objective} is the loss of a chain's timesteps; "
                f"loss.noise_distribution must be {' or '.join(ddpm_training.TIMESTEPS)}"
            )
    return chosen(OBJECTIVES, chosen_loss.objective, config.chain)


def sampler(config: "Config") -> Callable[..., Iterator[State]]:
    """The sampler with all its choices, guidance and clipping among them: called with a network's denoiser, latents, labels (or
    None) and noise, it yields the state after each step.

    Raises:
        ValueError: the choices do not fit together.
    """
    options = config.sampler
    if options.solver in ODE_SOLVERS:
        sigma_steps, schedule = sampling_plan(config)
    else:
        chain = known_chain(config, options.sampling_steps)

    def run(network: Denoiser, latents, labels, noise):
        denoiser = steered(network, config)
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
            round_sigma=network.round_sigma,
        )

    return run


def steered(network: Denoiser, config: "Config"):
    """The network's denoiser with the config's guidance and clipping, as its sampler uses it."""
    denoiser = guided(network, config.sampler.guidance)
    return clipped(denoiser) if config.sampler.clip == "true" else denoiser


def sampling_plan(config: "Config") -> tuple[torch.Tensor, Schedule]:
    """Of the samplers that follow the ODE: the noise levels, within those that the formulation knows, and the schedule.

    Raises:
        ValueError: the choices do not fit together.
    """
    formulation, options = preconditioning(config), config.sampler
    sigma_steps, schedule = table_1(
        options.sampling_steps,
        options.discretization,
        options.schedule,
        options.scaling,
        options.sigma_min,
        options.sigma_max,
        options.rho,
        supported=(formulation.sigma_min, formulation.sigma_max),
    )
    if options.S_churn > 0:  # the highest noise level that it can ask for must be one of the schedule's
        gamma = min(options.S_churn / options.sampling_steps, math.sqrt(2) - 1)
        schedule.t((1 + gamma) * min(sigma_steps[0].item(), max(options.S_max, sigma_steps[-2].item())))
    return sigma_steps, schedule


def known_chain(config: "Config", num_steps: int) -> ddpm.Chain:
    """So many timesteps of the config's chain.

    Raises:
        ValueError: they are more than the chain has, or the network knows other noise levels, or no variance.
    """
    formulation, name = preconditioning(config), config.preconditioning.formulation
    chain = make_chain(config.chain.schedule, config.chain.num_timesteps).strided(num_steps)
    if chain.sigma[-1] > formulation.sigma_max or not torch.equal(formulation.round_sigma(chain.sigma), chain.sigma):
        raise ValueError(
            f"the formulation {name} knows other noise levels than those of a DDPM chain (ddpm, improved_ddpm and edm know "
            f"them; the solvers {' and '.join(ODE_SOLVERS)} need none)"
        )
    if config.sampler.variance == "learned_range" and name != "improved_ddpm":
        raise ValueError(f"the formulation {name} has learned no variance; variance can be fixed_small or fixed_large")
    return chain
