"""Quality against cost: one network's samples by several samplers, each at several numbers of evaluations (the paper's
Figures 2 and 4), and with more and more churn (Figure 5c)."""

import functools
from collections.abc import Callable
from pathlib import Path

import torch

from edm import config as configs
from edm import pictures
from edm.config import Config
from edm.distributed import Processes
from edm.errors import UserError
from edm.judge import Judge
from edm.precond import Denoiser

EDM = ["sampler.discretization=edm", "sampler.schedule=linear", "sampler.scaling=none"]
HEUN, STEPS = [*EDM, "sampler.solver=heun"], [3, 5, 10, 18]
SAMPLERS = {  # at so many steps: a chain's two samplers, then EDM's steps with three solvers
    "ancestral": ([5, 10, 20, 50], ["sampler.solver=ancestral"]),
    "ddim": ([5, 10, 20, 50], ["sampler.solver=ddim"]),
    "euler": ([5, 9, 19, 35], [*EDM, "sampler.solver=euler", "sampler.S_churn=0"]),
    "heun": (STEPS, [*HEUN, "sampler.S_churn=0"]),
    "heun, S_churn 4": (STEPS, [*HEUN, "sampler.S_churn=4"]),
}
CHURN = [0, 1, 2, 4, 7]  # of Heun's method in 18 steps, where all beyond 7.5 is the same (gamma is at most sqrt(2) - 1)


def sweep(
    denoiser: Denoiser,
    config: Config,
    draw: Callable[[Config], torch.Tensor | None],
    judge: Judge | None,
    count: int,
    processes: Processes,
) -> dict | None:
    """The Frechet distance of samples against the number of evaluations an image, and against S_churn, printed.

    Args:
        denoiser: of which evaluations are counted.
        draw: makes `count` samples with it as a config says: (count, C, H, W) uint8, or None in all but the first process.
        judge: None in all but the first process.

    Returns:
        "samplers": {name: [(evaluations, distance), ...]}, "churn": [(S_churn, distance), ...] and the real images' "floor",
        in the first process.
    """

    @functools.cache
    def measure(varied: Config) -> tuple[float, float | None]:
        rows = []
        with denoiser.register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0]))):
            images = draw(varied)
        evaluations = sum(processes.gather(sum(rows))) / count
        return evaluations, judge.distance(images) if processes.is_first else None

    def point(name: str, overrides: list[str], steps: int) -> list[tuple[float, float | None]]:
        """Its evaluations and distance, or nothing."""
        try:
            varied = configs.from_dict(
                config.to_dict(), config.name, "the sweep", [*overrides, f"sampler.sampling_steps={steps}"]
            )
        except UserError as error:
            print(f"{name} at {steps} steps is left out: {error}")
            return []
        evaluations, distance = measure(varied)
        if processes.is_first:
            print(f"{name + f', {steps} steps':<30} {evaluations:5.0f} evaluations: {distance:8.1f}", flush=True)
        return [(evaluations, distance)]

    curves = {
        name: [found for steps in numbers for found in point(name, overrides, steps)]
        for name, (numbers, overrides) in SAMPLERS.items()
    }
    churn = [
        (S_churn, distance)
        for S_churn in CHURN
        for _, distance in point(f"heun, S_churn {S_churn}", [*HEUN, f"sampler.S_churn={S_churn}"], STEPS[-1])
    ]
    if not processes.is_first:
        return None
    floor = judge.floor_distance(count)
    print(f"{'as many real images':<30} {'':5}              {floor:8.1f}")
    return {"samplers": curves, "churn": churn, "floor": floor}


def save(path: Path, found: dict, count: int) -> None:
    """Draw what `sweep` has returned."""
    pictures.save_sweep(path, found["samplers"], found["churn"], found["floor"], f"Frechet distance of {count:,} samples")
    print(f"the picture is {path}")
