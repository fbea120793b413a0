"""The chains of DDPM and Improved DDPM: against reference numbers, and against the general sampler."""

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import assert_close, fresh_noise, wave
from torch import nn

from edm.ddpm import ChainPreconditioning, LearnedVariancePreconditioning, ancestral, ddim, make_chain, variational_bound
from edm.ddpm_training import HybridLoss, ImportanceSampledTimesteps, UniformTimesteps, VariationalLoss
from edm.exact import FiniteData, GaussianMixture
from edm.loss import denoising_loss, inverse_variance
from edm.precond import Denoiser
from edm.sampler import clipped, guided, sample

REFERENCE = json.loads((Path(__file__).parent / "reference" / "improved_ddpm.json").read_text())
SHAPE = (2, 1, 4, 4)


class StandIn(nn.Module):
    """The reference's network: epsilon and v at timestep t of 1000."""

    def __init__(self, outputs: int = 2):
        super().__init__()
        self.outputs = outputs
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x, t, labels=None, augment_labels=None):
        t = t[:, None, None, None] / 1000
        epsilon = 0.9 * x * (0.2 + t) + 0.1 * torch.sin(3 * x)
        return self.weight * torch.cat([epsilon, torch.tanh(0.5 * x + t)], dim=1)[:, : self.outputs]


def stand_in(schedule: str) -> Denoiser:
    return Denoiser(StandIn(), LearnedVariancePreconditioning(schedule))


def close(actual: torch.Tensor, expected) -> None:
    assert_close(actual, expected, 1e-6)


@pytest.mark.parametrize("name", ["linear-1000", "linear-50", "cosine-1000", "cosine-50"])
def test_chains_agree_with_the_reference(name):
    schedule, length = name.split("-")
    chain, row = make_chain(schedule, int(length)), REFERENCE[name]
    t = torch.tensor(row["timesteps"])
    close(chain.beta[t], row["beta"])
    torch.testing.assert_close(chain.alpha_bar[t], torch.tensor(row["alpha_bar"], dtype=torch.float64), rtol=1e-9, atol=0)
    close(chain.fixed_small[t], row["posterior_log_variance_clipped"])
    close(chain.fixed_large[t].exp(), [math.exp(row["posterior_log_variance_clipped"][0]), *row["beta"][1:]])


@pytest.mark.parametrize("row", REFERENCE["learned_range"], ids=lambda row: f"{row['schedule']}-{row['t']}")
def test_terms_and_steps_agree_with_the_reference(row):
    y = wave(*SHAPE, scale=0.8, frequency=1.7, phase=0.2)
    epsilon = wave(*SHAPE, scale=math.sqrt(2), frequency=0.9, phase=0.5)
    chain, denoiser, t = make_chain(row["schedule"]), stand_in(row["schedule"]), torch.full((2,), row["t"])
    x_t, sigma = chain.diffuse(y, t, epsilon), chain.sigma[t]
    close(x_t.flatten()[:4], row["x_t"])
    _, mean, log_variance = chain.reverse(denoiser, x_t, t, None, "learned_range")
    close(chain.term(y, x_t, t, mean, log_variance), row["vb_bits"])
    _, mean, log_variance = chain.reverse(clipped(denoiser), x_t, t, None, "learned_range")
    close(mean.flatten()[:4], row["p_mean"])
    close(log_variance.flatten()[:4], row["p_log_variance"])
    noised = (denoiser, y, sigma[:, None, None, None] * epsilon, sigma, sigma**-2)
    close(HybridLoss(row["schedule"])(*noised) / 16, row["hybrid_loss"])
    close(VariationalLoss(row["schedule"])(*noised) / 16, [1000 * term for term in row["vb_bits"]])
    close((HybridLoss(row["schedule"])(*noised) - 0.001 * VariationalLoss(row["schedule"])(*noised)) / 16, row["mse"])


def test_the_reconstruction_at_the_ends_agrees_with_the_reference():
    y = (127.5 * (wave(*SHAPE, scale=1.25, frequency=1.7, phase=0.2).clamp(-1, 1) + 1)).round() / 127.5 - 1
    assert (y.abs() == 1).sum() > 4
    row = REFERENCE["reconstruction_at_the_ends"]
    chain, t = make_chain(row["schedule"]), torch.zeros(2, dtype=torch.int64)
    x_t = chain.diffuse(y, t, wave(*SHAPE, scale=math.sqrt(2), frequency=0.9, phase=0.5))
    _, mean, log_variance = chain.reverse(stand_in(row["schedule"]), x_t, t, None, "learned_range")
    close(chain.term(y, x_t, t, mean, log_variance), row["vb_bits"])


@pytest.mark.parametrize(
    "row", REFERENCE["ancestral_sampling"], ids=lambda row: f"{row['schedule']}-{row['steps']}-{row['variance']}"
)
def test_ancestral_sampling_agrees_with_the_reference(row):
    chain = make_chain(row["schedule"]).strided(row["steps"])
    visited = chain.timesteps.flip(0).tolist()
    if "..." in row["timesteps"]:
        assert visited == list(range(999, -1, -1))
    else:
        assert visited == row["timesteps"]
    latents = wave(*SHAPE, scale=math.sqrt(2), frequency=2.3, phase=0.4)
    states = ancestral(clipped(stand_in(row["schedule"])), latents, chain, fresh_noise(latents), row["variance"])
    *_, last = states
    close(last.x.flatten()[:8], row["out"])


def test_importance_weights_agree_with_the_reference():
    row = REFERENCE["loss_second_moment"]
    sampler = ImportanceSampledTimesteps("cosine", row["num_timesteps"], row["history_per_term"], row["uniform_prob"]).double()
    weights = {after["after"]: after["weights"] for after in row["weights"]}
    for count, (t, loss) in enumerate(zip(row["timesteps"], row["losses"]), start=1):
        sampler.record(torch.tensor([t]), torch.tensor([loss], dtype=torch.float64))
        if count in weights:
            close(sampler.weights(), weights.pop(count))
    assert not weights


# A closed form: two correlated pixels, whose every conditional distribution is known.

SPREADS = (0.4, 0.05)  # standard deviations along the two diagonals
TURN = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / math.sqrt(2)
COVARIANCE = TURN @ torch.diag(torch.tensor(SPREADS, dtype=torch.float64) ** 2) @ TURN


class ExactChainDenoiser:
    """The exact denoiser of the two pixels, and the v of the variance that makes each step's bound as low as it can be."""

    def __init__(self, chain):
        self.chain, self.exact = chain, GaussianMixture(torch.zeros(1, 2), COVARIANCE[None])

    def __call__(self, x, sigma, labels=None, all_outputs=False):
        D = self.exact(x, sigma)
        if not all_outputs:
            return D
        chain, t = self.chain, self.chain.nearest(sigma[0])  # the same for all
        noise = sigma[0] ** 2 * torch.eye(2, dtype=torch.float64)
        of_y = COVARIANCE - COVARIANCE @ torch.linalg.inv(COVARIANCE + noise) @ COVARIANCE  # the covariance of y given x
        posterior = chain.fixed_small[t].exp() if t > 0 else 0.0
        optimal = (posterior + chain.mean_of_y[t] ** 2 * of_y.diagonal()).log()
        v = 2 * (optimal - chain.fixed_small[t]) / (chain.log_beta[t] - chain.fixed_small[t]) - 1
        return torch.cat([D, v.expand_as(D)], dim=1)


def expected_bound(chain, variance: str) -> float:
    """The bound in bits per dimension, its mean taken by quadrature (exact but for the reconstruction, which is smooth)."""
    z, w = map(torch.from_numpy, np.polynomial.hermite_e.hermegauss(6))
    z, w = torch.cartesian_prod(z, z, z, z), torch.cartesian_prod(w, w, w, w).prod(dim=1)
    y = (z[:, :2] @ torch.linalg.cholesky(COVARIANCE).T).view(-1, 1, 1, 2)
    terms = variational_bound(ExactChainDenoiser(chain), y, chain, lambda: z[:, 2:].view_as(y), variance)
    return ((sum(terms) + chain.prior_term(y)) * w).sum().item() / w.sum().item()


def true_bits() -> float:
    """The negative log-likelihood per dimension of the part 2/255 wide around a value, up to the part's fourth power."""
    return (torch.logdet(2 * math.pi * math.e * COVARIANCE).item() / 4 + math.log(127.5)) / math.log(2)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_bound_of_a_learned_variance_falls_to_the_truth_as_the_chain_gets_longer(schedule):
    """The gap is what a step's covariance between the pixels costs, of the order of a step: it halves with every doubling."""
    gaps = [expected_bound(make_chain(schedule, length), "learned_range") - true_bits() for length in (25, 50, 100, 200)]
    assert min(gaps) > 0
    assert all(1.6 < longer / shorter < 2.1 for longer, shorter in pairwise(gaps))
    strided = [
        expected_bound(make_chain(schedule).strided(length), "learned_range") - true_bits() for length in (10, 30, 100, 300)
    ]
    assert min(strided) > 0
    assert all(longer > 1.3 * shorter for longer, shorter in pairwise(strided))


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_a_fixed_variance_bounds_worse_than_the_optimal_one(variance):
    """By much where there are few steps."""
    for length in (25, 200):
        chain = make_chain("cosine", length)
        assert expected_bound(chain, variance) > expected_bound(chain, "learned_range") + 0.03 > true_bits() + 0.03


@pytest.mark.parametrize(("schedule", "steps"), [("linear", 1000), ("linear", 37), ("cosine", 50), ("cosine", 1)])
def test_ddim_is_eulers_method_at_the_chains_noise_levels(schedule, steps):
    chain = make_chain(schedule).strided(steps)
    latents = wave(*SHAPE, scale=math.sqrt(2), frequency=2.3, phase=0.4)
    levels = torch.cat([chain.sigma.flip(0), torch.zeros(1, dtype=torch.float64)])
    network = Denoiser(StandIn(1), ChainPreconditioning(schedule))
    scale = (1 + levels[0] ** 2).sqrt()  # x_T is noise at unit variance, y + n has sigma_T^2 more than y
    for denoiser in (network, ExactChainDenoiser(chain)):
        latents = latents if denoiser is network else latents.reshape(-1, 1, 1, 2)
        expected = sample(denoiser, latents * scale / levels[0], levels, solver="euler", round_sigma=network.round_sigma)
        for state, other in zip(ddim(denoiser, latents, chain), expected, strict=True):
            torch.testing.assert_close(state.x, other.x, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(state.denoised, other.denoised, rtol=1e-9, atol=1e-9)
            assert state.sigma == pytest.approx(other.sigma, rel=1e-12)


def test_a_chain_network_is_a_denoiser_at_its_own_noise_levels():
    """It is told the integer timestep and sees x_t; the levels are sqrt((1 - abar) / abar), not the continuous formula's."""
    told = []

    class Network(StandIn):
        def forward(self, x, t, *rest):
            told.append((x, t))
            return super().forward(x, t, *rest)

    for schedule in ("linear", "cosine"):
        chain, network = make_chain(schedule), Denoiser(Network(1), ChainPreconditioning(schedule))
        t = torch.tensor([0, 1, 500, 998, 999])
        y, epsilon = wave(5, 1, 4, 4, scale=0.8, frequency=1.7, phase=0.2), wave(5, 1, 4, 4, scale=1, frequency=0.9, phase=0.5)
        x = y + chain.sigma[t][:, None, None, None] * epsilon
        D = network(x, chain.sigma[t])
        assert torch.equal(told[-1][1], t.double())
        torch.testing.assert_close(told[-1][0], chain.diffuse(y, t, epsilon), rtol=1e-9, atol=1e-12)
        predicted = StandIn(1)(told[-1][0], told[-1][1])
        assert_close((x - chain.sigma[t][:, None, None, None] * predicted - D).abs().max(), 0.0)
        abar = (1 - (torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64) if schedule == "linear" else chain.beta)).cumprod(0)
        ends = [((1 - abar[place]) / abar[place]).sqrt().item() for place in (0, -1)]
        assert [network.round_sigma(sigma) for sigma in (1e-9, 1e9)] == pytest.approx(ends)
        middle = (chain.sigma[400:402].sum() / 2).item()
        for nudge, place in ((0.9999, 400), (1.0001, 401)):
            assert network.round_sigma(nudge * middle) == chain.sigma[place].item()
            assert chain.nearest(torch.full((2, 1), nudge * middle, dtype=torch.float64)).tolist() == [[place]] * 2


def test_the_ancestral_sampler_samples_the_data():
    """1,000 steps, drawn with the exact denoiser: the covariance of the two pixels, and both of two images as often."""
    generator = torch.Generator().manual_seed(0)

    def noise() -> torch.Tensor:
        return torch.randn(4000, 1, 1, 2, generator=generator, dtype=torch.float64)

    cases = [("linear", "fixed_small", 0.1), ("linear", "fixed_large", 0.1), ("cosine", "learned_range", 0.03)]
    for schedule, variance, tolerance in cases:  # a fixed variance is a little too small, or too large
        chain = make_chain(schedule)
        *_, last = ancestral(ExactChainDenoiser(chain), noise(), chain, noise, variance)
        along = last.x.flatten(1) @ TURN
        assert along.std(dim=0).tolist() == pytest.approx(SPREADS, rel=tolerance)
        assert abs(along.T.corrcoef()[0, 1]) < 0.06
    middle = next(state for state in ancestral(FiniteData(torch.zeros(1, 1, 1, 2)), noise(), chain, noise) if state.sigma < 0.5)
    assert middle.x.std().item() == pytest.approx(middle.sigma, rel=0.05)  # a state is the data and noise of its level
    images = torch.tensor([[0.6, -0.2], [-0.5, 0.4]], dtype=torch.float64).view(2, 1, 1, 2)
    chain = make_chain("cosine").strided(100)
    *_, last = ancestral(FiniteData(images), noise(), chain, noise)
    distances = torch.cdist(last.x.flatten(1), images.flatten(1))
    assert distances.min(dim=1).values.max() < 0.05
    assert distances.argmin(dim=1).double().mean().item() == pytest.approx(0.5, abs=0.03)


def test_guidance_and_clipping_leave_the_variance_alone():
    def denoiser(x, sigma, labels=None, all_outputs=False):
        outputs = torch.cat([x + (0 if labels is None else 3), torch.full_like(x, 0 if labels is None else 7)], dim=1)
        return outputs if all_outputs else outputs[:, : x.shape[1]]

    x, labels = torch.zeros(2, 3, 4, 4), torch.ones(2, 1)
    t = torch.full((2,), 500)
    for variance in ("fixed_small", "learned_range"):  # a step is told the labels, too
        denoised, _, log_variance = make_chain().reverse(denoiser, x, t, labels, variance)
        assert torch.equal(denoised, torch.full_like(x, 3).double())
    assert_close(log_variance, make_chain().learned_log_variance(torch.full((2, 3, 4, 4), 7), t).tolist())
    both = clipped(guided(denoiser, 0.2))
    assert torch.equal(both(x, 1.0, labels), torch.full_like(x, 0.6))
    assert torch.equal(both(x, 1.0, labels, all_outputs=True)[:, 3:], torch.full_like(x, 7))
    assert torch.equal(clipped(guided(denoiser, 2))(x, 1.0, labels), torch.ones_like(x))


# Training.


def test_l_simple_is_the_square_error_of_the_predicted_noise():
    chain, network = make_chain(), Denoiser(StandIn(1), ChainPreconditioning())
    t, y = torch.tensor([3, 700]), wave(*SHAPE, scale=0.8, frequency=1.7, phase=0.2)
    epsilon = wave(*SHAPE, scale=math.sqrt(2), frequency=0.9, phase=0.5)
    sigma = chain.sigma[t]
    loss = denoising_loss(network, y, sigma[:, None, None, None] * epsilon, sigma, inverse_variance(sigma, 0.5))
    predicted = StandIn(1)(chain.diffuse(y, t, epsilon), t.double())
    assert_close(loss, (predicted - epsilon).square().sum(dim=(1, 2, 3)).tolist())


def test_the_hybrid_loss_teaches_the_mean_by_l_simple_and_the_variance_by_the_bound():
    """The gradients of the network's first output are L_simple's, of its second 0.001 times the bound's."""
    chain, t = make_chain("cosine"), torch.tensor([0, 400])
    y, sigma = wave(*SHAPE, scale=0.8, frequency=1.7, phase=0.2), chain.sigma[t]
    n = sigma[:, None, None, None] * wave(*SHAPE, scale=math.sqrt(2), frequency=0.9, phase=0.5)
    out = torch.cat([0.7 * y, 0.3 * y], dim=1).requires_grad_()

    def denoiser(x, sigma, all_outputs=False):
        return out if all_outputs else out[:, :1]

    weight = inverse_variance(sigma, 0.5)
    simple, vlb, hybrid = (
        torch.autograd.grad(loss(denoiser, y, n, sigma, weight).sum(), out)[0]
        for loss in (denoising_loss, VariationalLoss("cosine"), HybridLoss("cosine"))
    )
    assert torch.equal(hybrid[:, :1], simple[:, :1])
    torch.testing.assert_close(hybrid[:, 1:], 0.001 * vlb[:, 1:], rtol=1e-9, atol=0)
    assert (simple[:, 1:] == 0).all()
    assert (vlb[1] != 0).all()  # at t = 0, the probability of a value that is far off is constant


def test_timesteps_are_drawn_alike():
    uniform, chain = UniformTimesteps("cosine", 40), make_chain("cosine", 40)
    j = torch.arange(40, dtype=torch.float64)
    assert torch.equal(uniform.sigma((j + 0.5) / 40), chain.sigma)
    t = make_chain("cosine", 40, torch.float32).nearest(uniform.sample(10**5, torch.Generator().manual_seed(0)))
    assert t.bincount(minlength=40).tolist() == pytest.approx([2500] * 40, abs=200)  # a standard deviation is 50


def importance(losses: torch.Tensor, **options) -> ImportanceSampledTimesteps:
    """With a full history of these losses, one a timestep."""
    sampler = ImportanceSampledTimesteps("cosine", len(losses), **options)
    for _ in range(sampler.history.shape[1]):
        sampler.record(torch.arange(len(losses)), losses)
    return sampler


def test_timesteps_are_drawn_by_their_losses_and_the_mean_stays():
    losses = torch.linspace(0, 5, 40)
    sampler = importance(losses, uniform_prob=0.1)
    sigma = sampler.sample(10**5, torch.Generator().manual_seed(0))
    t = sampler.chain(sigma).nearest(sigma)
    assert t.bincount(minlength=40).tolist() == pytest.approx((10**5 * sampler.weights()).tolist(), abs=350)
    weight = sampler.importance(sigma)
    assert weight.mean().item() == pytest.approx(1, abs=0.02)
    assert (weight * losses[t]).mean().item() == pytest.approx(2.5, rel=0.01)  # what the mean over all timesteps is
    assert (weight * losses[t]).std() < 0.2 * losses.std()  # which is what it is for


def test_before_every_timestep_has_a_full_history_all_are_drawn_alike():
    sampler = ImportanceSampledTimesteps("cosine", 5, history_per_term=2)
    sampler.record(torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 0, 4]), torch.arange(10.0))
    assert sampler.weights().tolist() == [1] * 5
    assert sampler.importance(make_chain("cosine", 5).sigma).tolist() == [1] * 5
    sigma = sampler.sample(10_000, torch.Generator().manual_seed(0))
    assert sampler.chain(sigma).nearest(sigma).bincount(minlength=5).tolist() == pytest.approx([2000] * 5, abs=150)
    sampler.record(torch.tensor([4]), torch.tensor([math.inf]))  # an overflow is no loss
    assert sampler.weights().tolist() == [1] * 5
    sampler.record(torch.tensor([4, 4]), torch.tensor([1.0, 2.0]))
    assert sampler.weights().sum().item() == pytest.approx(1)
    for losses in ([3e19, 1, 1, 1, 1], [0.0] * 5):  # whose squares overflow, or are nothing
        assert importance(torch.tensor(losses)).weights().isfinite().all()


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_a_batch_is_remembered_as_its_losses_one_by_one(batch_size):
    """However often a timestep occurs in it."""
    generator = torch.Generator().manual_seed(batch_size)
    whole, single = (ImportanceSampledTimesteps("cosine", 4, history_per_term=3) for _ in range(2))
    expected = {t: [] for t in range(4)}
    for _ in range(20):
        t, losses = torch.randint(0, 4, (batch_size,), generator=generator), torch.rand(batch_size, generator=generator)
        whole.record(t, losses)
        for place, loss in zip(t, losses):
            single.record(place[None], loss[None])
            expected[place.item()].append(loss.item())
        torch.testing.assert_close(whole.history, single.history, rtol=0, atol=0, equal_nan=True)
    for t, history in zip(range(4), whole.history.tolist()):
        assert history[-len(expected[t][-3:]) :] == expected[t][-3:]


def test_what_a_chain_is_refused():
    with pytest.raises(ValueError, match="20 are too few for the linear schedule"):
        make_chain("linear", 20)
    assert make_chain().strided(334).strided(3).timesteps.tolist() == [0, 498, 999]  # by their own number
    with pytest.raises(ValueError, match="has 1000 timesteps, too few for 1001 steps"):
        make_chain().strided(1001)
    x = torch.zeros(1, 1, 1, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="must be one of fixed_small, fixed_large, learned_range"):
        next(ancestral(FiniteData(x), x, make_chain(), lambda: x, "log_beta"))
