"""Table 1 as a space: every choice of the sampler combines with every other, and each of them solves the ODE."""

import itertools
import math

import pytest
import torch

from edm.exact import GaussianMixture
from edm.sampler import sample
from edm.schedule import SCALINGS, SCHEDULES, Schedule, edm_steps
from lab.build import table_1

CHOICES = list(itertools.product(("edm", "vp", "ve"), SCHEDULES, SCALINGS))
GAUSSIAN = GaussianMixture(
    torch.tensor([[0.3, -0.2, 0.1]]), torch.tensor([[[0.5, 0.2, 0.1], [0.2, 0.4, -0.1], [0.1, -0.1, 0.3]]])
)
LATENTS = torch.linspace(-1.2, 1.2, 12, dtype=torch.float64).view(4, 3, 1, 1)


def before_zero(states) -> torch.Tensor:
    """Return the images at sigma_min: the last step to 0, an Euler step, has an order of its own."""
    *_, state, _ = states
    return state.x


def exact_solution(x: torch.Tensor, sigma: float, sigma_next: float) -> torch.Tensor:
    """Return where the ODE takes x from one noise level to another for GAUSSIAN: each principal axis is scaled on its own."""
    u, eigenvalues, mean = GAUSSIAN.eigenvectors[0], GAUSSIAN.eigenvalues[0], GAUSSIAN.means
    scale = ((eigenvalues + sigma_next**2) / (eigenvalues + sigma**2)).sqrt()
    return (mean + ((x.flatten(1) - mean) @ u * scale) @ u.mT).reshape(x.shape)


def error(num_steps: int, choices: tuple[str, str, str], **options) -> float:
    """Return the largest error of the images at sigma_min."""
    steps, schedule = table_1(num_steps, *choices)
    x = before_zero(sample(GAUSSIAN, LATENTS, steps, schedule=schedule, **options))
    return (x - exact_solution(LATENTS * steps[0], steps[0].item(), steps[-2].item())).abs().max().item()


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("dpmpp_2m", 2)])
@pytest.mark.parametrize("choices", CHOICES, ids="-".join)
def test_order_of_convergence(choices, solver, order):
    """Doubling the steps divides the error at sigma_min by 2^order."""
    coarse, fine = (error(num_steps, choices, solver=solver) for num_steps in (64, 128))
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("alpha", [0.3, 0.5, 2 / 3])
def test_order_of_the_second_order_family(alpha):
    """Algorithm 3, with the second evaluation anywhere in the step."""
    coarse, fine = (error(num_steps, ("vp", "vp", "vp"), alpha=alpha) for num_steps in (64, 128))
    assert math.log2(coarse / fine) == pytest.approx(2, abs=0.15)


OWN = {  # schedules that are not in the paper
    "cosine": Schedule(lambda t: torch.tan(math.pi / 2 * t), lambda t: torch.cos(math.pi / 2 * t)),
    "quadratic": Schedule(lambda t: t**2),
    "geometric": Schedule(lambda t: 0.002 * 40000**t),  # never reaches 0
    "late": Schedule(lambda t: t**3 + t, lambda t: 1 / (1 + t)),
}


@pytest.mark.parametrize("name", OWN)
def test_every_schedule_leads_to_the_same_images(name):
    """Eq. 4's marginals are p(x; sigma(t)) whatever sigma(t) and s(t), and its paths those of sigma(t) = t: so every state lies
    on the exact path at its noise level, with the scaling divided out. The error is of order 2. Where sigma never reaches 0,
    the last step is to the denoised image."""
    errors = {}
    for num_steps in (64, 128):
        states = list(sample(GAUSSIAN, LATENTS, edm_steps(num_steps), schedule=OWN[name]))
        assert [state.sigma for state in states] == edm_steps(num_steps)[1:].tolist()
        errors[num_steps] = [(state.x - exact_solution(LATENTS * 80, 80.0, state.sigma)).abs().max() for state in states]
    assert max(errors[128]) < 0.02
    assert errors[128][-1] < 1e-2
    assert math.log2(errors[64][-2] / errors[128][-2]) == pytest.approx(2, abs=0.15)
    if name == "geometric":
        assert torch.equal(states[-1].x, states[-1].denoised)
