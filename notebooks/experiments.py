"""The experiments of design_space.ipynb: what its figures show and its checks test, and a small lesson in training."""

import functools
import math
import sys
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path

import torch
from torch.nn.functional import one_hot
from tqdm import tqdm

from edm.ema import gamma_of
from edm.exact import FiniteData, GaussianMixture
from edm.loss import edm_weight, squared_error
from edm.precond import (
    Denoiser,
    Preconditioning,
    VEPreconditioning,
    VPPreconditioning,
    iDDPMPreconditioning,
)
from edm.sampler import State, guided, heun_sampler, sample, stochastic_sampler
from edm.schedule import LINEAR, Schedule, edm_steps
from lab.build import table_1
from lab.checkpoint import WIDTHS
from lab.cli import UserError
from lab.config import Config, load, with_overrides
from lab.data import as_tensors, batches, draw_digits, open_dataset, root_mean_square, to_model_range
from lab.distributed import World
from lab.learner import Learner
from lab.seeds import generator_for

SCHEDULES = {"VP": table_1(1, "vp", "vp", "vp")[1], "VE": table_1(1, "ve", "ve", "none")[1], "EDM": LINEAR}
COLUMNS = {  # of Table 1: time steps, schedule and scaling; solver
    "VP": (("vp", "vp", "vp"), "euler"),
    "VE": (("ve", "ve", "none"), "euler"),
    "iDDPM": (("iddpm", "linear", "none"), "euler"),
    "EDM": (("edm", "linear", "none"), "heun"),
    "EDM's steps": (("edm", "linear", "none"), "euler"),  # not in Table 1: what is left of EDM without its solver
}
PRECONDITIONINGS = {"VP": VPPreconditioning(), "VE": VEPreconditioning(), "iDDPM": iDDPMPreconditioning()}


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


def errors_of_steps(
    denoiser: Denoiser, latents: torch.Tensor, sigma_steps: torch.Tensor, parts: int = 8
) -> dict[str, torch.Tensor]:
    """Return the RMS error that each step but the last adds, (N - 1,), by Euler's and by Heun's method.

    Each step starts where steps `parts` times as short lead to, and its error is the distance from where they lead next.
    """
    x, found = latents * sigma_steps[0], {"euler": [], "heun": []}
    for sigma, sigma_next in pairwise(sigma_steps[:-1].tolist()):
        *_, solution = islice(sample(denoiser, x / sigma, edm_steps(parts + 1, sigma_next, sigma)), parts)
        step = torch.tensor([sigma, sigma_next, 0], dtype=torch.float64)
        for solver, errors in found.items():
            errors.append(rms(next(sample(denoiser, x / sigma, step, solver=solver)).x - solution.x))
        x = solution.x
    return {solver: torch.tensor(errors) for solver, errors in found.items()}


def errors_of_network(
    network: Denoiser, ideal: Denoiser, clean: torch.Tensor, noise: torch.Tensor, sigma_steps: torch.Tensor
) -> torch.Tensor:
    """Return the RMS error that the network's D adds to each step but the last, (N - 1,), on these images with this noise.

    A step of Euler's method from sigma to sigma' moves x by (1 - sigma' / sigma) (D - x), so it takes over this share of the
    difference between the network's D and the ideal one.
    """
    found = []
    for sigma, sigma_next in pairwise(sigma_steps[:-1].tolist()):
        x = clean + sigma * noise
        found.append((1 - sigma_next / sigma) * rms(network(x, sigma) - ideal(x, sigma)))
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


def churned(
    denoiser: Denoiser, S_churn: float, num_steps: int, scale: float = 1.0, shift: float = 0.0, **options
) -> torch.Tensor:
    """Sample 2,000 numbers by Algorithm 2. A `scale` other than 1, or a `shift` other than 0, makes the latents wrong."""
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


def widened(data: GaussianMixture, variance: float) -> GaussianMixture:
    """Return a mixture whose components are wider: the exact denoiser of it is an imperfect one of `data`."""
    covariances = data.eigenvectors @ (data.eigenvalues + variance).diag_embed() @ data.eigenvectors.mT
    return GaussianMixture(data.means, covariances, data.log_weights.exp())


def component(data: GaussianMixture, k: int) -> GaussianMixture:
    """Return one component of a mixture as a mixture: the data of one class."""
    covariance = data.eigenvectors[k] @ data.eigenvalues[k].diag() @ data.eigenvectors[k].mT
    return GaussianMixture(data.means[k : k + 1], covariance[None])


def guided_samples(data: GaussianMixture, weight: float, interval: tuple[float, float]) -> dict[str, tuple]:
    """Sample 500 points by a guided network that takes the data for wider than they are.

    Returns:
        By the kind of guidance, the samples (500, 1, 1, D) and the data that they should resemble: of a network that is guided
        by a worse one, and of a network that is told the first component, guided by the one that is not.
    """
    latents = torch.randn(500, 1, 1, data.means.shape[1], generator=generator_for("guided"), dtype=torch.float64)
    network, one = widened(data, 0.04), component(data, 0)
    pairs = {
        "autoguidance": (network, widened(data, 0.2), data),
        "classifier-free guidance": (widened(one, 0.04), network, one),
    }
    steps = edm_steps(18)
    return {
        name: (heun_sampler(guided(D, guide, weight, interval), latents, steps), target)
        for name, (D, guide, target) in pairs.items()
    }


def share_within(x: torch.Tensor, data: GaussianMixture, share: float = 0.9) -> tuple[float, float]:
    """Return the part of samples in the densest region with this share of the data, and the log-density at its edge."""
    of_data = data.log_density(images(data.sample(4000, generator_for("region"))), 1e-3)
    edge = of_data.quantile(1 - share).item()
    return (data.log_density(x, 1e-3) > edge).double().mean().item(), edge


def known_averages(count: int) -> list[tuple[float, float]]:
    """Return (time, width) of the averages in `count` equally spaced snapshots; training ends at time 1."""
    return [((place + 1) / count, width) for place in range(count) for width in WIDTHS]


def profile(tau: torch.Tensor, t: float, width: float) -> torch.Tensor:
    """Return p(tau), the weight that the average of this width at time t gives to the network of time tau."""
    gamma = gamma_of(width)
    return torch.where(tau <= t, (gamma + 1) * tau**gamma / t ** (gamma + 1), 0.0)


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
