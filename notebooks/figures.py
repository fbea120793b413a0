"""The figures of design_space.ipynb. Each function draws what `experiments.py` computes, and returns a figure."""

import functools
import math

import torch
from experiments import (
    COLUMNS,
    PRECONDITIONINGS,
    SCHEDULES,
    averages,
    bow,
    errors_at_sigma_min,
    errors_of_steps,
    guided_samples,
    images,
    known_averages,
    left_to_predict,
    normals,
    order_of,
    profile,
    rms,
    share_within,
    trajectory,
    variances,
    wasserstein,
)
from ipywidgets import FloatLogSlider
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from edm.ema import reconstruct
from edm.exact import GaussianMixture
from edm.loss import LogNormal
from edm.precond import Denoiser, EDMPreconditioning, score
from edm.sampler import sample
from edm.schedule import edm_steps
from edm.unet import NETWORKS
from lab import live
from lab.build import table_1
from lab.pictures import COLORS
from lab.seeds import generator_for


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


def sources_of_error(sigma_steps: torch.Tensor, network: torch.Tensor, steps: dict[str, torch.Tensor], title: str) -> Figure:
    """Draw the error that each step but the last adds, (N - 1,), by the network and by the truncation of two methods."""
    figure, panel = canvas(1, width=7.5, height=3.4)
    curves = {"network": network, "truncation, Euler": steps["euler"], "truncation, Heun": steps["heun"]}
    for (name, curve), color, line in zip(curves.items(), ("black", COLORS["EDM"], COLORS["EDM"]), ("o-", "o:", "o-")):
        panel.loglog(sigma_steps[:-2], curve, line, color=color, markersize=4, label=name)
    panel.set(xlabel=r"noise level $\sigma$ at which the step starts", ylabel="error of one step", xlim=(100, 4e-3))
    panel.set(ylim=(1e-5, 1), title=title)
    panel.legend(fontsize=8)
    panel.grid(alpha=0.3)
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
    for (solver, errors), line in zip(errors_of_steps(denoiser, latents, steps).items(), ("o:", "o-")):
        left.loglog(steps[:-2], errors, line, color=COLORS["EDM"], markersize=4, label=solver.capitalize())
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
    """Draw the error against the number of steps, for Euler's method, one of second order, and `dpmpp_2m`."""
    step_counts, (figure, panel) = [8, 16, 32, 64, 128], canvas(1, width=5.5, height=3.4)
    methods = {"Euler": {"solver": "euler"}, rf"$\alpha$ = {alpha:g}": {"alpha": alpha}, "dpmpp_2m": {"solver": "dpmpp_2m"}}
    for (name, options), color in zip(methods.items(), ("gray", COLORS["EDM"], "black")):
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
            line, color = ("o-", COLORS[name]) if name in COLORS else ("o:", COLORS["EDM"])
            label = f"{name} ({COLUMNS[name][1]})"
            panel.loglog(budgets, curve, line, color=color, linewidth=width, markersize=3, label=label)
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


def guidance(data: GaussianMixture, weight: float, low: float, high: float) -> Figure:
    """Draw samples guided by a worse network, and by one without classes, over the regions that hold 90% of the data."""
    figure, axes = canvas(2, width=8.4, height=4.2)
    line = torch.linspace(-3.2, 2.4, 113, dtype=torch.float64)
    mesh = torch.cartesian_prod(line, line)
    for panel, (name, (x, target)) in zip(axes, guided_samples(data, weight, (low, high)).items()):
        share, edge = share_within(x, target)
        density = target.log_density(images(mesh), 1e-3).reshape(113, 113).T
        panel.contourf(line, line, density, levels=[edge, math.inf], colors=["lightgray"])
        panel.plot(*x.flatten(1).T, ".", color=COLORS["EDM"], markersize=2.5)
        panel.set_title(f"{name}: {share:.0%} in the grey region", fontsize=9)
        panel.set(xticks=[], yticks=[], xlim=(-3.2, 2.4), ylim=(-2.4, 2.4))
    return figure


def average_after_training(width: float, snapshots: int) -> Figure:
    """Draw the weight that an average gives to each moment of training: as wanted, and as put together from snapshots."""
    tau = torch.linspace(0, 1, 401, dtype=torch.float64)
    known = known_averages(snapshots)
    factors, residual = reconstruct(known, (1.0, width))
    found = sum(factor * profile(tau, *average) for factor, average in zip(factors, known))
    figure, panel = canvas(1, width=7.5, height=3.2)
    for average in known:
        panel.plot(tau, profile(tau, *average), color="lightgray", linewidth=0.8, zorder=0)
    wanted = profile(tau, 1.0, width)
    panel.plot(tau, wanted, color="black", linewidth=3, label=f"wanted: width {width:g}")
    panel.plot(tau, found, color=COLORS["EDM"], label=f"from snapshots ({snapshots}): off by {residual:.1%}")
    panel.set(xlabel="time of training", ylabel="weight in the average", xlim=(0, 1))
    panel.set_ylim(-2, 1.2 * torch.maximum(wanted, found).max().item())
    panel.legend(fontsize=8, loc="upper left")
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
