"""Trajectories of samplers from noise to data, for the playground: on toy data and on trained networks, computed and drawn."""

import functools
import math
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from edm.exact import FiniteData, GaussianMixture
from edm.precond import Denoiser
from edm.schedule import LINEAR, RANGES, Schedule
from lab import config as configs
from lab.build import build_sampler, known_chain, sampling_plan
from lab.config import CONFIGS, Config
from lab.data import to_uint8
from lab.generate import class_labels, load_denoiser
from lab.pictures import COLORS, grid, style
from lab.seeds import ImageNoise, generator_for

TRAINED = {  # by data, the files in assets/: the network, and its guide unless that is the network without classes
    "ten digits": ("edm_small", None),
    "ten digits, larger network": ("edm_laptop", None),
    "digits without classes": ("edm_small_uncond", "edm_small_uncond_guide"),
}
FILES = {"VP": "vp.yaml", "VE": "ve.yaml", "iDDPM": "table1_iddpm.yaml", "EDM": "edm.yaml"}  # the columns of Table 1
VIEWS = (ONE := "one sampler", FOUR := "the four presets")
GUIDANCE = ("guidance", "guidance_min", "guidance_max")


@functools.cache
def preset(name: str) -> dict[str, object]:
    """Return the sampler's choices in a column of Table 1, without churn."""
    sampler = configs.load(CONFIGS / FILES[name]).sampler
    rows = {row: getattr(sampler, row) for row in ("solver", "discretization", "schedule", "scaling", "rho")}
    low, high = RANGES[sampler.discretization]
    churn = {"S_churn": 0.0, "S_min": 0.001, "S_max": 200.0, "S_noise": 1.0}
    return {**rows, "sigma_min": low, "sigma_max": high, **churn}


# What is computed


class Problem(NamedTuple):
    """Data, and how they are sampled and drawn."""

    denoiser: Denoiser
    config: Config
    shape: tuple[int, int, int]  # (C, H, W) of one sample
    count: int  # samples at a time
    fine: int  # steps of the solution that errors are measured against
    points: torch.Tensor | None = None  # (n, D), the data as drawn


@functools.cache
def load_problem(data: str) -> Problem:
    """Return the problem of this name: toy data, or one of `TRAINED`."""
    if data in TRAINED:
        path, guide = (name and Path(__file__).parents[1] / "assets" / f"{name}.safetensors" for name in TRAINED[data])
        overrides = [f"sampler.guide={guide}"] if guide else []
        config, denoiser, _ = load_denoiser(path, None, overrides, torch.device("cpu"))
        shape = (config.data.channels, config.data.resolution, config.data.resolution)
        return Problem(denoiser.float(), config, shape, 10, 100)
    if data == "two points":
        points = torch.tensor([[-1.0], [1.0]])
        denoiser = FiniteData(points[:, :, None, None])
    elif data == "2-D spiral":
        angle = 2 * math.pi * torch.linspace(0.3, 2, 150)
        points = torch.stack([angle.cos(), angle.sin()], dim=1) * angle[:, None] / 10
        denoiser = FiniteData(points[:, None, None])
    else:
        if data == "two peaks":
            means, covariances = torch.tensor([[-1.0], [1.0]]), torch.full((2, 1, 1), 0.04)
        else:
            means = torch.tensor([[-0.8, -0.5], [0.8, -0.5], [0.0, 0.9]])
            axes = torch.tensor([[[0.14, 0.1], [0.0, 0.1]], [[0.14, -0.1], [0.0, 0.1]], [[0.25, 0.0], [0.0, 0.06]]])
            covariances = axes @ axes.mT
        denoiser = GaussianMixture(means, covariances)
        points = denoiser.sample(300, generator_for("playground"))
    return Problem(denoiser, Config(), (1, 1, points.shape[1]), 24, 1000, points)


def sampler_config(data: str, N: int, **choices: object) -> Config:
    """Return the problem's config with N steps and these choices of the sampler.

    Raises:
        UserError: they do not fit together.
    """
    values = load_problem(data).config.to_dict()
    values["sampler"] |= {"sampling_steps": N, **choices}
    return configs.from_dict(values, "playground", "these settings")


def start_and_schedule(config: Config) -> tuple[float, Schedule]:
    """Return the first noise level, and sigma(t) with s(t)."""
    if config.sampler.solver == "ddim":
        return known_chain(config, config.sampler.sampling_steps).sigma[-1].item(), LINEAR
    sigma_steps, schedule = sampling_plan(config)
    return sigma_steps[0].item(), schedule


class Counted:
    """A denoiser that counts its evaluations, together with those of its guide if it has one."""

    def __init__(self, denoiser: Denoiser):
        self.denoiser, self.calls = denoiser, 0
        self.round_sigma = getattr(denoiser, "round_sigma", lambda sigma: sigma)
        guide = getattr(denoiser, "guide", None)
        self.guide = Counted(guide) if guide else None

    @property
    def evaluations(self) -> int:
        return self.calls + (self.guide.evaluations if self.guide else 0)

    def __call__(self, *args, **options) -> torch.Tensor:
        self.calls += 1
        return self.denoiser(*args, **options)


class Trajectories(NamedTuple):
    """What a sampler does in N steps, for B samples."""

    sigma: list[float]  # (N + 1,), the noise levels
    x: torch.Tensor  # (N + 1, B, C, H, W), the scaling divided out
    denoised: torch.Tensor  # (N, B, C, H, W), D at the start of each step
    evaluations: int  # of D and its guide


def follow(data: str, config: Config, seed: int, class_index: int | None) -> Generator[None, None, Trajectories]:
    """Sample; yields after each step, and returns the trajectories."""
    net, _, shape, count, *_ = load_problem(data)
    net, seeds, (sigma, _) = Counted(net), list(range(count * seed, count * (seed + 1))), start_and_schedule(config)
    noise = ImageNoise(seeds, shape, torch.device("cpu"), torch.float64)
    latents, labels, states = noise(), class_labels(seeds, config.network.label_dim, class_index), []
    for state in build_sampler(config)(net, latents, labels, noise):
        states.append(state)
        yield
    x = torch.stack([sigma * latents, *(state.x for state in states)])
    denoised = torch.stack([state.denoised for state in states])
    return Trajectories([sigma, *(state.sigma for state in states)], x, denoised, net.evaluations)


class Solution:
    """The same problem in many steps of Heun's method, which can be interrupted and continued: `steps` yields after each."""

    def __init__(
        self, data: str, sigma_max: float, guidance: tuple[tuple[str, float], ...], seed: int, class_index: int | None
    ):
        options = preset("EDM") | {"sigma_max": sigma_max, **dict(guidance)}
        config = sampler_config(data, load_problem(data).fine, **options)
        self.trajectories: Trajectories | None = None  # until the last step
        self.steps = self.solve(data, config, seed, class_index)

    def solve(self, *arguments: object) -> Iterator[None]:
        self.trajectories = yield from follow(*arguments)


solution_of = functools.lru_cache(maxsize=16)(Solution)


class Result(NamedTuple):
    """The trajectories of a sampler, and what they are compared with."""

    trajectories: Trajectories
    schedule: Schedule
    solution: Solution
    is_random: bool  # with churn

    @property
    def error(self) -> float:
        """The root mean square distance of the samples from those of the solution, which has ended."""
        return (self.trajectories.x[-1] - self.solution.trajectories.x[-1]).square().mean().sqrt().item()

    def caption(self, between: str = ", ") -> str:
        """Return the error and the number of evaluations in words."""
        known = f"error {self.error:.2g}" if self.solution.trajectories else "error: computing"
        return f"{'random paths' if self.is_random else known}{between}{self.trajectories.evaluations} evaluations"


def results(
    data: str, view: str, N: int, seed: int, class_index: int | str, **choices: object
) -> Iterator[dict[str, Result] | None]:
    """Compute what the settings ask for; yields None after each part, and results by name.

    They are yielded twice if the solution is not known yet: before and after it is computed.
    """
    guidance = {name: choices.pop(name) for name in GUIDANCE}
    if data not in TRAINED:  # toy data have no guide
        guidance = {}
    class_index = None if class_index == "all" or data not in TRAINED else class_index
    chosen = {name: preset(name) for name in FILES} if view == FOUR else {ONE: choices}
    found = {}
    for name, options in chosen.items():
        config = sampler_config(data, N, **options, **guidance)
        sigma_max, schedule = start_and_schedule(config)
        trajectories = yield from follow(data, config, seed, class_index)
        solution = solution_of(data, sigma_max, tuple(guidance.items()), seed, class_index)
        found[name] = Result(trajectories, schedule, solution, config.sampler.S_churn > 0)
    for result in found.values():
        if result.solution.trajectories is None:
            yield found
            for _ in result.solution.steps:  # `yield from` would end them where it is interrupted
                yield
    yield found


# How it is drawn


def draw(**settings: object) -> Iterator[Figure | None]:
    """Yield a picture for each of the `results` of these settings, and None where there are none yet."""
    problem = load_problem(settings["data"])
    draw_found = draw_digits if settings["data"] in TRAINED else draw_paths
    for found in results(**settings):
        yield found and draw_found(problem, found)


def figure_of(height: int, layout: str) -> Figure:
    """Return a figure of 900 pixels' width; `height` is in pixels."""
    return Figure(figsize=(900 / 128, height / 128), dpi=128, layout=layout)


@style()
def draw_paths(problem: Problem, found: dict[str, Result]) -> Figure:
    """Draw the paths s(t) x, whole and below noise level 1, over the solutions in grey."""
    four = len(found) > 1
    figure = figure_of(560 if four else 400, "none")
    columns = figure.subplots(2, 4).T if four else [figure.subplots(1, 2)]
    margins = {"left": 0.06, "right": 0.965, "wspace": 0.35, "hspace": 0.35} if four else {"left": 0.09, "right": 0.98}
    figure.subplots_adjust(bottom=0.13, top=0.87 if four else 0.91, **margins)  # a computed layout takes longer than the rest
    for (name, result), panels in zip(found.items(), columns):
        for panel, highest in zip(panels, (result.trajectories.sigma[0], 1.0)):
            draw_panel(panel, problem, result, COLORS.get(name, COLORS["EDM"]), highest, bare=four)
        title = f"{name}\n{result.caption(chr(10))}" if four else result.caption()
        panels[0].set_title(title)
    if four:
        columns[0][0].set_ylabel("whole paths")
        columns[0][1].set_ylabel(r"where $\sigma < 1$")
    else:
        columns[0][1].set_title(rf"where $\sigma < 1$; grey: {problem.fine:,} steps of Heun's method")
    return figure


def draw_panel(panel: Axes, problem: Problem, result: Result, color: str, highest: float, bare: bool) -> None:
    """Draw the paths in a window that shows the noise levels up to `highest`; a bare panel has few numbers."""
    time, plane = result.schedule.t(highest), problem.shape[-1] == 2
    reach = 2 * result.schedule.s(time) * highest + problem.points.abs().max().item()
    if solution := result.solution.trajectories:
        panel.add_collection(LineCollection(lines(solution, result.schedule, every=5), colors="gray", linewidths=0.7))
    paths = lines(result.trajectories, result.schedule)
    panel.add_collection(LineCollection(paths, colors=color, linewidths=1))
    panel.plot(*paths.flatten(0, 1).T, ".", color=color, markersize=4)
    points = problem.points if plane else torch.cat([torch.zeros_like(problem.points), problem.points], dim=1)
    panel.plot(*points.T, ".", color="black", markersize=3, zorder=3 - plane)
    panel.set(xlim=(-reach, reach) if plane else (0, time), ylim=(-reach, reach))
    if bare:
        panel.set(xticks=[] if plane else [0, time], yticks=[])
    if plane:
        panel.set_box_aspect(1)
    else:
        panel.set(xlabel="t", ylabel="" if bare else "s(t) x")


def lines(trajectories: Trajectories, schedule: Schedule, every: int = 1) -> torch.Tensor:
    """Return them as points of the plane (B, n, 2): s(t) x in two dimensions, or over t in one."""
    sigma, x = trajectories.sigma[::every], trajectories.x[::every].flatten(2)
    t = torch.tensor([schedule.t(level) for level in sigma], dtype=torch.float64)[:, None, None].expand(-1, x.shape[1], 1)
    s = torch.tensor([schedule.s(moment) for moment in t[:, 0, 0].tolist()], dtype=torch.float64)
    path = s[:, None, None] * x
    return (path if x.shape[2] == 2 else torch.cat([t, path], dim=2)).transpose(0, 1)


@style()
def draw_digits(problem: Problem, found: dict[str, Result]) -> Figure:
    """Draw the ten digits of each sampler, and the last one's solution; for one sampler also the steps of the first digit."""
    *_, last = found.values()
    (sigma, x, denoised, _), solution, four = last.trajectories, last.solution.trajectories, len(found) > 1
    images = [result.trajectories.x[-1] for result in found.values()]
    images.append(solution.x[-1] if solution else torch.zeros_like(x[-1]))
    names = [f"{name}\n{result.caption(chr(10))}" if four else result.caption("\n") for name, result in found.items()]
    names.append(f"{problem.fine} steps" if solution else f"{problem.fine} steps: computing")
    figure = figure_of(430, "constrained")
    digits, film = figure.subplots(2) if not four else (figure.subplots(), None)
    show_images(digits, torch.stack(images), names)
    if film:
        sigma_data, N = problem.config.preconditioning.sigma_data, len(denoised)
        steps = torch.linspace(0, N - 1, min(N, 10)).round().long().tolist()
        noisy = torch.stack([x[step, 0] * sigma_data / math.hypot(sigma[step], sigma_data) for step in steps])
        levels = [f"{sigma[step]:.3g}" for step in steps]
        show_images(film, torch.stack([noisy, denoised[steps, 0]]), ["x", r"D(x; $\sigma$)"], levels)
        film.set_xlabel(r"noise level $\sigma$ at the start of a step")
    return figure


def show_images(panel: Axes, images: torch.Tensor, rows: list[str], columns: list[str] | None = None) -> None:
    """Draw images (R, K, C, H, W) in [-1, 1] in R rows and K columns of these names."""
    table = grid(to_uint8(images.flatten(0, 1)), columns=images.shape[1])
    height, width = images.shape[-2] + 2, images.shape[-1] + 2  # grid leaves two pixels between images
    panel.imshow(table.permute(1, 2, 0).numpy(), interpolation="nearest")
    panel.set_yticks([1 + height * (place + 0.5) for place in range(len(rows))], rows)
    panel.set_xticks([1 + width * (place + 0.5) for place in range(len(columns or []))], columns or [])
    panel.tick_params(length=0)
    panel.grid(False)
    panel.spines[:].set_visible(False)
