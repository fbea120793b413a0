"""The figures of design_space.ipynb. Each function computes what it shows from what it is given, and returns a figure."""

import functools
import math
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import torch
from ipywidgets import FloatLogSlider
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from torch.nn.functional import one_hot
from tqdm import tqdm

from edm.exact import FiniteData, GaussianMixture
from edm.loss import LogNormal, edm_weight, squared_error
from edm.precond import (
    Denoiser,
    EDMPreconditioning,
    Preconditioning,
    VEPreconditioning,
    VPPreconditioning,
    iDDPMPreconditioning,
    score,
)
from edm.sampler import State, heun_sampler, sample, stochastic_sampler
from edm.schedule import LINEAR, Schedule, edm_steps, table_1
from edm.unet import NETWORKS
from lab import live
from lab.cli import UserError
from lab.config import Config, load, with_overrides
from lab.data import as_tensors, batches, draw_digits, open_dataset, root_mean_square, to_model_range
from lab.distributed import World
from lab.learner import Learner
from lab.pictures import COLORS
from lab.seeds import generator_for

SCHEDULES = {"VP": table_1(1, "vp", "vp", "vp")[1], "VE": table_1(1, "ve", "ve", "none")[1], "EDM": LINEAR}
COLUMNS = {  # of Table 1: time steps, schedule and scaling; solver
    "VP": (("vp", "vp", "vp"), "euler"),
    "VE": (("ve", "ve", "none"), "euler"),
    "iDDPM": (("iddpm", "linear", "none"), "euler"),
    "EDM": (("edm", "linear", "none"), "heun"),
}
PRECONDITIONINGS = {"VP": VPPreconditioning(), "VE": VEPreconditioning(), "iDDPM": iDDPMPreconditioning()}


# What the figures and the notebook's checks compute


def images(values: torch.Tensor) -> torch.Tensor:
    """Return numbers (N,) or points (N, D) as images of one row, (N, 1, 1, D)."""
    return values.double().reshape(len(values), 1, 1, -1)


def normals(number: int) -> torch.Tensor:
    """Return quantiles of the unit normal distribution as images of one pixel: latents without randomness."""
    return images(torch.special.ndtri((torch.arange(number, dtype=torch.float64) + 0.5) / number))


def rms(x: torch.Tensor) -> float:
    """Return the root mean square."""
    return x.square().mean().sqrt().item()


def last(states: Iterator[State]) -> torch.Tensor:
    """Return the images that a sampler ends with."""
    *_, state = states
    return state.x


def averages(data: GaussianMixture, sigma: float, parcels: int = 200) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Add noise to 100,000 draws of 1-D data, and sort them by the result into parcels of neighbours.

    Returns:
        The mean noisy value, the mean of the clean values and its standard error, (parcels,) each.
    """
    y = data.sample(100_000, generator_for("data")).flatten()
    noisy, order = (y + sigma * torch.randn(len(y), generator=generator_for("noise"), dtype=y.dtype)).sort()
    noisy, clean = noisy.reshape(parcels, -1), y[order].reshape(parcels, -1)
    return noisy.mean(dim=1), clean.mean(dim=1), clean.std(dim=1) / clean.shape[1] ** 0.5


def trajectory(
    denoiser: Denoiser, latents: torch.Tensor, num_steps: int, schedule: Schedule, solver: str, top: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return times (N + 1,), noise levels (N + 1,) and the sampler's x times s(t), (N + 1, B), of 1-D data."""
    sigma_steps = edm_steps(num_steps, min(0.002, top / 2), top)
    states = sample(denoiser, latents, sigma_steps, schedule=schedule, solver=solver)
    x = torch.stack([latents * top, *(state.x for state in states)]).flatten(1)
    t = torch.tensor([schedule.t(sigma) for sigma in sigma_steps.tolist()], dtype=torch.float64)
    s = torch.tensor([float(schedule.s(moment)) for moment in t.tolist()], dtype=torch.float64)
    return t, sigma_steps, x * s[:, None]


def bow(t: torch.Tensor, x: torch.Tensor) -> float:
    """Return how far solutions are from their chords at most, in units of the size of the latents."""
    chord = x[-1] + (x[0] - x[-1]) * (t / t[0])[:, None]
    return rms((x - chord).abs().amax(dim=0)) / rms(x[0])


def order_of(errors: list[float]) -> float:
    """Return the order of convergence from the errors at rising numbers of steps, the last of which is twice the one before."""
    return math.log2(errors[-2] / errors[-1])


def errors_at_sigma_min(denoiser: Denoiser, step_counts: list[int], **options) -> list[float]:
    """Return the RMS error before the last step, which is always Euler's, for each number of steps."""

    def before_last(sigma_steps: torch.Tensor, **options) -> torch.Tensor:
        *_, state, _ = sample(denoiser, normals(100), sigma_steps, **options)
        return state.x

    solution = before_last(edm_steps(1000))
    return [rms(before_last(edm_steps(count), **options) - solution) for count in step_counts]


def errors_of_steps(denoiser: Denoiser, latents: torch.Tensor, sigma_steps: torch.Tensor, solver: str) -> torch.Tensor:
    """Return the RMS error that each step but the last adds, (N - 1,), each started on the solution."""
    x, found = latents * sigma_steps[0], []
    for sigma, sigma_next in pairwise(sigma_steps[:-1].tolist()):
        *_, solution, _ = sample(denoiser, x / sigma, edm_steps(9, sigma_next, sigma))
        steps = torch.tensor([sigma, sigma_next, 0], dtype=torch.float64)
        found.append(rms(next(sample(denoiser, x / sigma, steps, solver=solver)).x - solution.x))
        x = solution.x
    return torch.tensor(found)


def errors_by_evaluations(denoiser: Denoiser, latents: torch.Tensor, budgets: list[int]) -> dict[str, list[float]]:
    """Return the RMS error of each column of Table 1 for each number of evaluations, from sigma 80 to 0."""

    @functools.cache
    def solution(sigma_max: float) -> torch.Tensor:
        return heun_sampler(denoiser, latents, edm_steps(200, sigma_max=sigma_max))

    found = {name: [] for name in COLUMNS}
    for name, (choices, solver) in COLUMNS.items():
        for budget in budgets:
            num_steps = budget if solver == "euler" else (budget + 1) // 2
            sigma_steps, schedule = table_1(num_steps, *choices, 0.002, 80.0)
            x = last(sample(denoiser, latents, sigma_steps, schedule=schedule, solver=solver))
            found[name].append(rms(x - solution(sigma_steps[0].item())))
    return found


def churned(denoiser: Denoiser, S_churn: float, num_steps: int, scale: float = 1.0, shift: float = 0.0, **options):
    """Sample 2,000 numbers by Algorithm 2, from latents of another scale and mean than they should have if one likes."""
    generator = generator_for("churn")
    latents = normals(2000)[torch.randperm(2000, generator=generator)]
    noise = functools.partial(torch.randn, latents.shape, generator=generator, dtype=torch.float64)
    return stochastic_sampler(denoiser, latents * scale + shift, edm_steps(num_steps), noise, S_churn, **options)


def wasserstein(x: torch.Tensor, data: GaussianMixture) -> float:
    """Return how far samples must move, on average, to have the distribution of 1-D data."""
    drawn = data.sample(100 * len(x), generator_for("quantiles")).flatten().sort().values
    return (x.flatten().sort().values - drawn[50::100]).abs().mean().item()


def spread_within(x: torch.Tensor, data: GaussianMixture) -> float:
    """Return the standard deviation of samples within the peaks of 1-D data."""
    x = x.flatten()
    nearest = (x[:, None] - data.means.flatten()).abs().argmin(dim=1)
    parts = [x[nearest == peak] for peak in nearest.unique()]
    return rms(torch.cat([part - part.mean() for part in parts]))


def variances(preconditioning: Preconditioning, y: torch.Tensor, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean squares of F's input and of its training target for data y (N,), at each noise level."""
    n = torch.randn(y.shape, generator=generator_for("noise"), dtype=y.dtype) * sigma[:, None]
    c_skip, c_out, c_in = (getattr(preconditioning, name)(sigma)[:, None] for name in ("c_skip", "c_out", "c_in"))
    target = (y - c_skip * (y + n)) / c_out
    return (c_in * (y + n)).square().mean(dim=1), target.square().mean(dim=1)


def left_to_predict(y: torch.Tensor, sigma: float, c_skip: float) -> torch.Tensor:
    """Return y - c_skip (y + n), what c_out F has to predict."""
    return y - c_skip * (y + sigma * torch.randn(y.shape, generator=generator_for("noise"), dtype=y.dtype))


# How it is drawn


def canvas(columns: int, width: float = 9.0, height: float = 3.2, **options) -> tuple[Figure, object]:
    """Return a figure and its axes, side by side."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns, **options)


def refresher(data: GaussianMixture, sigma: float) -> Figure:
    """Draw density, denoiser and score of 1-D data with noise."""
    x = torch.linspace(-2.5, 2.5, 401, dtype=torch.float64)
    D, density = data(images(x), sigma).flatten(), data.log_density(images(x), sigma).exp()
    noisy, clean, _ = averages(data, sigma)
    figure, (left, middle, right) = canvas(3)
    left.fill_between(x, data.log_density(images(x), 1e-3).exp(), color="lightgray", label="data")
    left.plot(x, density, color=COLORS["EDM"], label="data + noise")
    left.set(title=r"density $p(x; \sigma)$", ylim=(0, None))
    middle.plot(x, x, "--", color="lightgray", label="x itself")
    middle.plot(x, D, color=COLORS["EDM"], label="D")
    middle.plot(noisy[::4], clean[::4], ".", color="dimgray", markersize=4, label="average of the data")
    middle.set(title=r"denoiser $D(x; \sigma)$", ylim=(-2, 2))
    right.plot(x, score(x, sigma, D), color=COLORS["EDM"])
    right.axhline(0, color="gray", linewidth=0.5)
    right.set(title=r"score $(D - x) / \sigma^2$")
    for panel in (left, middle, right):
        panel.set(xlabel="x", xlim=(-2.5, 2.5))
    left.legend(fontsize=8)
    middle.legend(fontsize=8, loc="upper left")
    return figure


def score_field(data: GaussianMixture, sigma: float) -> Figure:
    """Draw the density of 2-D data with noise, its score as arrows, and solutions of the ODE from there to the data."""
    reach = 2.2
    line = torch.linspace(-reach, reach, 81, dtype=torch.float64)
    mesh = torch.cartesian_prod(line, line)
    figure, (left, right) = canvas(2, width=8.4, height=4.2)
    shown = {"extent": (-reach, reach, -reach, reach), "origin": "lower", "cmap": "Greys", "interpolation": "bilinear"}
    for panel, level in ((left, sigma), (right, 0.05)):
        density = data.log_density(images(mesh), level).exp().reshape(81, 81).T
        panel.imshow(density / density.max(), alpha=0.5, **shown)
        panel.set(xticks=[], yticks=[], xlim=(-reach, reach), ylim=(-reach, reach))
    coarse = torch.cartesian_prod(line[::6], line[::6])
    arrows = score(coarse, sigma, data(images(coarse), sigma).reshape(-1, 2))
    left.quiver(*coarse.T, *(sigma * arrows).T, color=COLORS["EDM"], width=0.004)
    left.set_title(rf"$\sigma$ times the score, over the density at $\sigma$ = {sigma:.2g}", fontsize=9)
    start = torch.cartesian_prod(line[4::24], line[4::24])
    steps = edm_steps(40, 0.002, max(sigma, 0.01))
    path = [start, *(state.x.reshape(-1, 2) for state in sample(data, images(start) / steps[0], steps))]
    path = torch.stack(path)  # (steps, points, 2)
    right.plot(path[..., 0].numpy(), path[..., 1].numpy(), color=COLORS["EDM"], linewidth=1)
    right.plot(*path[0].T, "o", color="white", markeredgecolor=COLORS["EDM"], markersize=4)
    right.set_title("from there to the data, along the ODE", fontsize=9)
    return figure


def figure_3(denoiser: Denoiser, num_steps: int, solver: str = "euler", top: float = 25.0) -> Figure:
    """Draw solutions of the ODE of VP, VE and EDM, and the steps of a solver; below, the part from sigma = 1 on."""
    latents, figure = normals(10), Figure(figsize=(9, 4.8), layout="constrained")
    for name, panels in zip(SCHEDULES, figure.subplots(2, 3).T):
        schedule = SCHEDULES[name]
        t, _, x = trajectory(denoiser, latents, 200, schedule, "heun", top)
        steps_t, _, steps_x = trajectory(denoiser, latents, num_steps, schedule, solver, top)
        for panel, highest in zip(panels, (top, 1.0)):
            panel.plot(t, x.numpy(), color="darkgray", linewidth=1)
            panel.plot(steps_t, steps_x.numpy(), color=COLORS[name], linewidth=1, marker="o", markersize=2.5)
            reach = 1.1 * x[t <= schedule.t(highest) * 1.01].abs().max().item()
            panel.set(xlim=(0, schedule.t(highest)), ylim=(-reach, reach))
        panels[0].set(title=f"{name}: bow {bow(t, x):.2f}", ylabel="s(t) x" if name == "VP" else "x")
        panels[1].set(xlabel="t", ylabel="s(t) x" if name == "VP" else "x")
    return figure


def tangents(denoiser: Denoiser, sigma: float, top: float = 25.0) -> Figure:
    """Draw a solution of VP, VE and EDM, its tangent at a noise level, and the denoised image there."""
    latents, (figure, axes) = normals(10)[6:7], canvas(3, height=3.0)
    for panel, (name, schedule) in zip(axes, SCHEDULES.items()):
        t, sigma_steps, x = trajectory(denoiser, latents, 200, schedule, "heun", top)
        place = int((sigma_steps - sigma).abs().argmin())
        level, s = sigma_steps[place].item(), float(schedule.s(t[place].item()))
        start = images(x[place] / s)
        landed = next(sample(denoiser, start / level, torch.tensor([level, 0.0]), schedule=schedule, solver="euler")).x
        shown = t <= 1.3 * t[place]
        panel.plot(t[shown], x[shown], color=COLORS[name], linewidth=4, alpha=0.4, label="solution")
        panel.plot([t[place], 0], [x[place].item(), landed.item()], "k-o", markevery=[0], linewidth=1, label="tangent")
        panel.plot(0, denoiser(start, level).item(), "kx", markersize=9, clip_on=False, label="denoised image")
        panel.set(title=name, xlabel="t", xlim=(0, None), ylabel="s(t) x" if name == "VP" else "x")
    axes[0].legend(fontsize=8)
    return figure


def step_errors(denoiser: Denoiser, latents: torch.Tensor, rho: float, num_steps: int) -> Figure:
    """Draw the error that each step adds, for Euler's and Heun's method, and where the steps lie."""
    figure, (left, right) = canvas(2, height=3.5, width_ratios=(3, 2))
    steps = edm_steps(num_steps, rho=rho)
    for solver, line in (("euler", "o:"), ("heun", "o-")):
        found = errors_of_steps(denoiser, latents, steps, solver)
        left.loglog(steps[:-2], found, line, color=COLORS["EDM"], markersize=4, label=solver.capitalize())
    left.set(
        xlabel=r"noise level $\sigma$ at which the step starts", ylabel="error of one step", ylim=(1e-6, 5), xlim=(1e-3, 150)
    )
    left.legend(fontsize=8)
    plans = {rf"$\rho$ = {rho:g}": steps, "VP": table_1(num_steps, "vp", "vp", "vp", 0.002, 80.0)[0]}
    plans["VE"] = table_1(num_steps, "ve", "ve", "none", 0.002, 80.0)[0]
    for row, (name, levels) in enumerate(plans.items()):
        right.plot(levels[:-1], torch.full((num_steps,), row), "|", markersize=18, color=COLORS.get(name, COLORS["EDM"]))
    right.set(xscale="log", xlabel=r"noise levels of the steps", ylim=(-0.6, 2.6), xlim=(1e-3, 150))
    right.set_yticks(range(3), plans)
    return figure


def orders(denoiser: Denoiser, alpha: float) -> Figure:
    """Draw the error against the number of steps, for Euler's method and a second-order one."""
    step_counts, (figure, panel) = [8, 16, 32, 64, 128], canvas(1, width=5.5, height=3.4)
    methods = {"Euler": {"solver": "euler"}, rf"$\alpha$ = {alpha:g}": {"alpha": alpha}}
    for (name, options), color in zip(methods.items(), ("gray", COLORS["EDM"])):
        errors = errors_at_sigma_min(denoiser, step_counts, **options)
        panel.loglog(step_counts, errors, "o-", color=color, markersize=4, label=f"{name}: order {order_of(errors):.2f}")
    panel.set(xlabel="steps N", ylabel=r"error at $\sigma_{min}$")
    panel.minorticks_off()
    panel.set_xticks(step_counts, step_counts)
    panel.legend(fontsize=8)
    panel.grid(alpha=0.3)
    return figure


def equal_cost(found: dict[str, dict[str, list[float]]], budgets: list[int]) -> Figure:
    """Draw the errors of the columns of Table 1 against the number of evaluations, a panel for each data set."""
    figure, axes = canvas(len(found), height=3.4, squeeze=False)
    for panel, (title, errors) in zip(axes[0], found.items()):
        for name, curve in errors.items():
            width = 4 if name == "VP" else 1.5  # iDDPM's curve can lie on it
            label = f"{name} ({COLUMNS[name][1]})"
            panel.loglog(budgets, curve, "o-", color=COLORS[name], linewidth=width, markersize=3, label=label)
        panel.set(xlabel="evaluations of D", ylabel="error of the samples", title=title)
        panel.minorticks_off()
        panel.set_xticks(budgets, budgets)
        panel.legend(fontsize=8)
        panel.grid(alpha=0.3)
    return figure


def stochastic_paths(data: GaussianMixture, S_churn: float, num_steps: int, seed: int) -> Figure:
    """Draw paths of the stochastic sampler from one latent, beside the deterministic one."""
    figure, panel = canvas(1, width=7.5, height=3.4)
    generator, steps = generator_for("paths", seed), edm_steps(num_steps)
    latents = images(torch.full((12,), 0.4))
    noise = functools.partial(torch.randn, latents.shape, generator=generator, dtype=torch.float64)
    options = {"S_churn": S_churn, "noise": noise}
    for style, color, path_options in (("o-", COLORS["EDM"], options), ("o-", "black", {})):
        start = latents if path_options else latents[:1]
        x = torch.stack([start * steps[0], *(state.x for state in sample(data, start, steps, **path_options))]).flatten(1)
        label = [f"12 paths, S_churn = {S_churn:g}" if path_options else "the ODE"] + [None] * (x.shape[1] - 1)
        panel.plot(steps[1:].clamp(min=1e-3), x[1:].numpy(), style, color=color, markersize=2, linewidth=1, label=label)
    panel.set(xscale="log", xlabel=r"$\sigma$", ylabel="x", ylim=(-4, 4), xlim=(20, 1e-3))
    panel.legend(fontsize=8)
    return figure


def histogram(data: GaussianMixture, samples: dict[str, torch.Tensor]) -> Figure:
    """Draw histograms of samples over the density of 1-D data, with the distance between them."""
    figure, axes = canvas(len(samples), height=2.8, squeeze=False)
    line = torch.linspace(-1.5, 1.5, 400, dtype=torch.float64)
    for panel, (name, x) in zip(axes[0], samples.items()):
        panel.plot(line, data.log_density(images(line), 1e-3).exp(), color="gray", label="data")
        options = {"bins": 70, "range": (-1.5, 1.5), "density": True, "alpha": 0.5}
        panel.hist(x.flatten().numpy(), color=COLORS["EDM"], label="samples", **options)
        panel.set(xlabel="x", title=f"{name}: distance {wasserstein(x, data):.3f}", yticks=[])
        panel.legend(fontsize=8)
    return figure


def digits(rows: dict[str, torch.Tensor], title: str = "") -> Figure:
    """Draw rows of images (N, 1, H, W) in [-1, 1], each with its name."""
    count, size = max(map(len, rows.values())), next(iter(rows.values())).shape[-1]
    figure = Figure(figsize=(9, 0.45 + 9 / (count + 2) * len(rows)), layout="constrained")
    for panel, (name, pictures) in zip(figure.subplots(len(rows), 1, squeeze=False).flat, rows.items()):
        panel.imshow(torch.cat(list(pictures[:, 0]), dim=1), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
        panel.set(xticks=[], yticks=[])
        panel.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
        panel.spines[:].set_visible(False)
        panel.set_xlim(-0.5, count * size - 0.5)
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def preconditioning(y: torch.Tensor, sigma_data: float) -> Figure:
    """Draw the variances of F's input and target, and c_out, for EDM with this sigma_data and for the other columns."""
    sigma = torch.logspace(-2, 2, 25, dtype=torch.float64)
    figure, axes = canvas(3, height=3.3)
    choices = {**PRECONDITIONINGS, "EDM": EDMPreconditioning(sigma_data)}
    for (name, choice), width in zip(choices.items(), (4, 2, 1.5, 3)):
        for panel, curve in zip(axes, (*variances(choice, y, sigma), choice.c_out(sigma).abs())):
            panel.loglog(sigma, curve, color=COLORS[name], linewidth=width, label=name)
    titles = (r"mean square of $F$'s input", r"mean square of $F$'s target", r"$|c_{out}|$, which multiplies $F$'s errors")
    for panel, title in zip(axes, titles):
        panel.set(xlabel=r"$\sigma$")
        panel.set_title(title, fontsize=9)
    axes[0].legend(fontsize=8)
    axes[1].set(ylim=(0.1, 10))
    return figure


def skip(y: torch.Tensor, sigma: float, c_skip: float) -> Figure:
    """Draw what is left to predict for a c_skip, and c_out for every c_skip."""
    sigma_data, (figure, (left, right)) = rms(y), canvas(2, height=3.2)
    best = sigma_data**2 / (sigma**2 + sigma_data**2)
    reach = 3 * max(min(sigma, 3), sigma_data)
    kinds = {"image": (0.0, "black"), "noise": (1.0, COLORS["VP"]), "EDM": (best, COLORS["EDM"]), "yours": (c_skip, "crimson")}
    for name, (value, color) in kinds.items():
        rest = left_to_predict(y, sigma, value)
        options = {"bins": 120, "range": (-reach, reach), "density": True, "histtype": "step", "color": color}
        left.hist(rest.numpy(), label=f"{name}: {rms(rest):.3f}", linewidth=2 if name == "yours" else 1, **options)
        right.plot(value, rms(rest), "o", color=color, markersize=7, label=name)
    mixing = torch.linspace(0, 1, 41).tolist()
    right.plot(mixing, [rms(left_to_predict(y, sigma, value)) for value in mixing], color="gray", zorder=0)
    left.set(xlabel=r"$y - c_{skip}\,(y + n)$", title="what is left to predict, and its size", yticks=[])
    right.set(xlabel=r"$c_{skip}$", ylabel=r"$c_{out}$", ylim=(0, None))
    for panel in (left, right):
        panel.legend(fontsize=8)
    return figure


def noise_levels(P_mean: float, P_std: float, levels: torch.Tensor, losses: dict[str, torch.Tensor]) -> Figure:
    """Draw losses by noise level over the log-normal distribution of the noise levels (Figure 5a)."""
    figure = Figure(figsize=(7.5, 4), layout="constrained")
    upper, lower = figure.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    shades = ("gray", COLORS["EDM"], "black")
    for (name, loss), color, line in zip(losses.items(), shades, ("-", "-", ":")):
        upper.plot(levels, loss, line, color=color, label=name)
    distribution = LogNormal(P_mean, P_std)
    drawn = distribution.sigma(torch.special.ndtri((torch.arange(20_000) + 0.5) / 20_000))
    bins = torch.logspace(-2.5, 2, 81)
    lower.hist(drawn.numpy(), bins=bins.numpy(), color=COLORS["EDM"], alpha=0.4)
    upper.axvspan(math.exp(P_mean - P_std), math.exp(P_mean + P_std), color="lightgray", alpha=0.4)
    upper.set(ylabel="loss per pixel", ylim=(0, 1.15))
    lower.set(xscale="log", xlabel=r"$\sigma$", ylabel="drawn", yticks=[], xlim=(10**-2.5, 100))
    upper.legend(fontsize=8)
    return figure


def unet(net: torch.nn.Module, resolution: int) -> Figure:
    """Draw the blocks of a U-Net from its modules: width of a box by channels, red where it has attention."""
    figure, panel = canvas(1, height=3.6)
    for side, part in ((0, net.enc), (1, net.dec)):
        for place, (name, layer) in enumerate(part.items()):
            size = int(name.partition("x")[0])
            depth = math.log2(resolution / size)
            channels = getattr(layer, "conv1", layer).weight.shape[0]
            x = place + side * (len(net.enc) + 0.7)
            color = "crimson" if getattr(layer, "heads", 0) else COLORS["EDM"]
            box = FancyBboxPatch((x, -depth - 0.3), 0.7, 0.6, boxstyle="round,pad=0.02", facecolor=color, alpha=0.75)
            panel.add_patch(box)
            panel.text(x + 0.35, -depth, str(channels), ha="center", va="center", fontsize=6.5, color="white")
            panel.text(x + 0.35, -depth + 0.4, name.partition("_")[2], ha="center", va="bottom", fontsize=5.5, rotation=60)
    depths = sorted({int(name.partition("x")[0]) for name in net.enc}, reverse=True)
    panel.set(xlim=(-0.5, len(net.enc) + len(net.dec) + 1.5), ylim=(-len(depths) + 0.4, 1.4), xticks=[])
    panel.set_yticks([-math.log2(resolution / size) for size in depths], [f"{size} x {size}" for size in depths])
    panel.spines[:].set_visible(False)
    return figure


def architecture(network: str, num_blocks: int) -> Figure:
    """Draw a U-Net of the lesson's width."""
    with torch.device("meta"):  # without weights
        return unet(NETWORKS[network](32, 1, model_channels=128, channel_mult=(2, 2, 2), num_blocks=num_blocks), 32)


def show(figure: Figure, alt: str) -> None:
    """Display a figure without controls."""
    live.show(None, live.png(figure), alt)


def log_slider(start: float, low: float = 0.03, high: float = 10.0) -> FloatLogSlider:
    """Return a slider for a noise level, from low to high."""
    options = {"base": 10, "step": 0.05, "readout_format": ".2g", "continuous_update": True}
    return FloatLogSlider(value=start, min=math.log10(low), max=math.log10(high), **options)


# Data and training


def digit_mixture() -> GaussianMixture:
    """Return one Gaussian for each of the ten built-in digits at 8 x 8 pixels, with its images' mean and covariance."""
    drawn, labels = draw_digits(8, 3000)
    flat = to_model_range(drawn).double().flatten(1)
    classes = [flat[labels == digit] for digit in range(10)]
    return GaussianMixture(torch.stack([c.mean(dim=0) for c in classes]), torch.stack([c.mT.cov() for c in classes]))


def real_images(config: Config, folder: Path, count: int) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Return `count` training images in [-1, 1], their labels and the data set's name: MNIST, or else the built-in digits."""
    for origin, name in (("MNIST", "mnist"), ("the built-in digits", "digits")):
        try:
            dataset = open_dataset(with_overrides(config, [f"data.dataset={name}", f"data.root={folder}"], "the notebook"))
        except UserError:
            continue
        drawn, labels = (part[:count] for part in as_tensors(dataset))
        return to_model_range(drawn), labels, origin


class IdealByClass:
    """The ideal denoiser that is told the class: of all images of that class."""

    def __init__(self, drawn: torch.Tensor, labels: torch.Tensor):
        self.ideals = [FiniteData(drawn[labels == number]) for number in range(10)]

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor | float, labels: torch.Tensor | None = None) -> torch.Tensor:
        return torch.cat([self.ideals[number](image[None], sigma) for number, image in zip(labels.argmax(dim=1), x)])


class TinyLesson:
    """A small network that learns the built-in digits at 16 x 16 pixels, with their classes.

    Args:
        config_path: a config, whose network is made smaller.
        steps: of training.
        loss: entries of the config's `loss` section.

    Attributes:
        learner: the network, its average and its optimizer.
        sigma_data: root mean square of the images.
        levels: the noise levels at which losses are measured, (16,).
    """

    def __init__(self, config_path: Path, steps: int, **loss: float):
        overrides = SMALLER + [f"loss.{name}={value}" for name, value in loss.items()]
        config = load(config_path, [*overrides, f"training.num_training_steps={steps}"])
        self.dataset = open_dataset(config)
        self.sigma_data = round(root_mean_square(self.dataset), 3)
        self.config = with_overrides(config, [f"preconditioning.sigma_data={self.sigma_data}"], "the notebook")
        self.learner = Learner(self.config, torch.device("cpu"))
        drawn, self.labels = as_tensors(self.dataset)
        self.images, self.levels, self.step = to_model_range(drawn), torch.logspace(-2.5, 2, 16), 0

    def batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Yield images (B, 1, 16, 16), noise levels (B,), noise of these levels and one-hot classes, for every step."""
        training = self.config.training
        stream = batches(self.dataset, self.config, 0, torch.device("cpu"), World())
        for self.step in tqdm(range(1, training.num_training_steps + 1), desc="training", file=sys.stdout, mininterval=1):
            (drawn, labels), generator = next(stream), generator_for("training", self.step)
            y, sigma = to_model_range(drawn), self.learner.noise_distribution.sample(training.batch_size, generator)
            n = torch.randn(y.shape, generator=generator) * sigma[:, None, None, None]
            yield y, sigma, n, one_hot(labels, 10)

    def update(self, loss: torch.Tensor) -> None:
        """Change the weights by the gradient of the mean of the losses (B,), and then their average."""
        batch_size = self.config.training.batch_size
        self.learner.scaler.scale(loss.mean()).backward()
        self.learner.optimizer_step(self.step * batch_size)
        self.learner.ema.update(self.step * batch_size, batch_size)

    @torch.no_grad()
    def losses_of(self, denoiser: Denoiser) -> torch.Tensor:
        """Return the loss per pixel at each noise level, (16,), always on the same 48 images and the same noise."""
        y, labels, found = self.images[::201][:48], one_hot(self.labels[::201][:48], 10), []
        for number, sigma in enumerate(self.levels):
            n = sigma * torch.randn(y.shape, generator=generator_for("loss", number))
            loss = edm_weight(sigma, self.sigma_data) * squared_error(denoiser(y + n, sigma, labels), y)
            found.append(loss.mean() / y[0].numel())
        return torch.stack(found)

    def losses(self) -> torch.Tensor:
        """Return the losses of the averaged network."""
        return self.losses_of(self.learner.ema.net)

    def lowest_losses(self) -> torch.Tensor:
        """Return the losses of the ideal denoiser, which knows the images by heart."""
        return self.losses_of(IdealByClass(self.images, self.labels))

    @torch.no_grad()
    def samples(self, count: int) -> torch.Tensor:
        """Return samples of the averaged network, of all classes in turn, by Algorithm 1 in 18 steps."""
        latents = torch.randn(count, 1, 16, 16, generator=generator_for("samples"), dtype=torch.float64)
        labels = one_hot(torch.arange(count) % 10, 10)
        return heun_sampler(self.learner.ema.net, latents, edm_steps(18), labels).float()


SMALLER = [
    *("data.resolution=16", "network.model_channels=12", "network.channel_mult=[1, 2]", "network.attn_resolutions=[]"),
    *("loss.label_dropout=0", "sampler.guidance=1", "training.learning_rate=4e-3"),
    *("training.lr_rampup_images=800", "training.lr_halflife_images=3000"),
]
