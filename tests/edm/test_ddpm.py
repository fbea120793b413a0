"""The chains of DDPM and Improved DDPM: against reference numbers, closed forms, and the general sampler. Training on them."""

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from edm.ddpm import VARIANCES, Chain, ancestral, ddim, make_chain, variational_bound
from edm.ddpm_loss import ImportanceSampledTimesteps, variational_loss
from edm.exact import GaussianMixture
from edm.loss import inverse_variance, squared_error
from edm.precond import PreconditionedDenoiser, iDDPMPreconditioning
from edm.sampler import clipped, sample
from edm.schedule import iddpm_levels

REFERENCE = json.loads(Path(__file__).parents[1].joinpath("reference", "improved_ddpm.json").read_text())
SHAPE = (2, 1, 4, 4)


@pytest.mark.parametrize("name", ["linear-1000", "linear-50", "cosine-1000", "cosine-50"])
def test_chains_agree_with_the_reference(name, assert_close):
    betas, length = name.split("-")
    chain, row = make_chain(betas, int(length)), REFERENCE[name]
    t = torch.tensor(row["timesteps"])
    assert_close(chain.beta[t], row["beta"], 1e-6)
    torch.testing.assert_close(chain.alpha_bar[t], torch.tensor(row["alpha_bar"], dtype=torch.float64), rtol=1e-9, atol=0)
    small = row["posterior_log_variance_clipped"]
    assert_close(chain.log_small[t], small, 1e-6)
    assert_close(chain.log_large[t].exp(), [math.exp(small[0]), *row["beta"][1:]], 1e-6)


@pytest.mark.parametrize("row", REFERENCE["learned_range"], ids=lambda row: f"{row['schedule']}-{row['t']}")
def test_a_reverse_step_its_bound_and_the_losses_agree_with_the_reference(row, stand_in, wave, assert_close):
    """L_vlb is T = 1000 times a term of the bound; L_hybrid is L_simple + 0.001 L_vlb (N16)."""
    chain, t = make_chain(row["schedule"]), torch.full((2,), row["t"])
    y, epsilon = (wave(*SHAPE, scale=s, frequency=f, phase=p) for s, f, p in ((0.8, 1.7, 0.2), (math.sqrt(2), 0.9, 0.5)))
    x_t, net, sigma = chain.diffuse(y, t, epsilon), stand_in(chain), chain.sigma[t]
    assert_close(x_t.flatten()[:4], row["x_t"], 1e-6)
    _, mean, log_variance = chain.reverse(net, x_t, t, None, "learned_range")
    assert_close(chain.bound_term(y, x_t, t, mean, log_variance), row["vb_bits"], 1e-6)
    _, mean, log_variance = chain.reverse(clipped(net), x_t, t, None, "learned_range")
    assert_close(mean.flatten()[:4], row["p_mean"], 1e-6)
    assert_close(log_variance.flatten()[:4], row["p_log_variance"], 1e-6)
    batch = (net, y, sigma[:, None, None, None] * epsilon, sigma, inverse_variance(sigma, 0.5))
    hybrid, vlb = (variational_loss(*batch, chain, hybrid) / 16 for hybrid in (True, False))  # of 16 pixels
    assert_close(hybrid, row["hybrid_loss"], 1e-6)
    assert_close(vlb, [1000 * term for term in row["vb_bits"]], 1e-6)
    assert_close(hybrid - 0.001 * vlb, row["mse"], 1e-6)


def test_the_reconstruction_at_the_ends_agrees_with_the_reference(stand_in, wave, assert_close):
    """Black and white pixels have the tails of the normal distribution as well (H13)."""
    y = (127.5 * (wave(*SHAPE, scale=1.25, frequency=1.7, phase=0.2).clamp(-1, 1) + 1)).round() / 127.5 - 1
    assert (y.abs() == 1).sum() > 4
    row = REFERENCE["reconstruction_at_the_ends"]
    chain, t = make_chain(row["schedule"]), torch.zeros(2, dtype=torch.int64)
    x_t = chain.diffuse(y, t, wave(*SHAPE, scale=math.sqrt(2), frequency=0.9, phase=0.5))
    _, mean, log_variance = chain.reverse(stand_in(chain), x_t, t, None, "learned_range")
    assert_close(chain.bound_term(y, x_t, t, mean, log_variance), row["vb_bits"], 1e-6)


@pytest.mark.parametrize(
    "row", REFERENCE["ancestral_sampling"], ids=lambda row: f"{row['schedule']}-{row['steps']}-{row['variance']}"
)
def test_ancestral_sampling_agrees_with_the_reference(row, stand_in, wave, fresh_noise, final, assert_close):
    whole = make_chain(row["schedule"])
    chain = whole.strided(row["steps"])
    visited = list(range(999, -1, -1)) if "..." in row["timesteps"] else row["timesteps"]
    assert chain.timesteps.flip(0).tolist() == visited
    latents = wave(*SHAPE, scale=math.sqrt(2), frequency=2.3, phase=0.4)
    x = final(ancestral(clipped(stand_in(whole)), latents, chain, fresh_noise(latents), row["variance"]))
    assert_close(x.flatten()[:8], row["out"], 1e-6)


# One table of noise levels


def test_the_cosine_chain_and_iddpms_column_of_table_1_have_the_same_noise_levels(stand_in, wave, fresh_noise, final):
    """And so the same preconditioning: a network trained as the one can be sampled as the other, with the same images."""
    chain, p = make_chain("cosine", 1000), iDDPMPreconditioning()
    torch.testing.assert_close(chain.sigma.flip(0), iddpm_levels()[:-1], rtol=1e-11, atol=0)
    other, sigma = iDDPMPreconditioning(chain.levels), torch.logspace(-3, 5, 500, dtype=torch.float64)
    assert torch.equal(p.c_noise(sigma), other.c_noise(sigma))
    torch.testing.assert_close(p.round_sigma(sigma), other.round_sigma(sigma), rtol=1e-11, atol=0)
    assert (p.sigma_min, p.sigma_max) == pytest.approx((other.sigma_min, other.sigma_max), rel=1e-11)

    on_chain, short, latents = stand_in(chain), chain.strided(20), wave(*SHAPE, scale=1.4, frequency=2.3, phase=0.4)
    nets = (on_chain, PreconditionedDenoiser(on_chain.model, p))
    images = [final(ancestral(net, latents, short, fresh_noise(latents), "learned_range")) for net in nets]
    torch.testing.assert_close(images[1], images[0], rtol=1e-9, atol=1e-9)


# A closed form: two correlated pixels, whose every conditional distribution is known

SPREADS = (0.4, 0.05)  # standard deviations along the two diagonals
TURN = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / math.sqrt(2)
COVARIANCE = TURN @ torch.diag(torch.tensor(SPREADS, dtype=torch.float64) ** 2) @ TURN


class ExactChainDenoiser:
    """The exact denoiser of the two pixels, and the v of the variance that makes each step's bound as low as it can be."""

    def __init__(self, chain: Chain):
        self.chain, self.exact = chain, GaussianMixture(torch.zeros(1, 2), COVARIANCE[None])

    def __call__(self, x, sigma, labels=None, all_outputs=False):
        D = self.exact(x, sigma)
        if not all_outputs:
            return D
        chain, t = self.chain, self.chain.levels.nearest(sigma[0])  # the same for all
        noise = sigma[0] ** 2 * torch.eye(2, dtype=torch.float64)
        of_y = COVARIANCE - COVARIANCE @ torch.linalg.inv(COVARIANCE + noise) @ COVARIANCE  # the covariance of y given x
        posterior = chain.log_small[t].exp() if t > 0 else 0.0
        optimal = (posterior + chain.y_coefficient[t] ** 2 * of_y.diagonal()).log()
        v = 2 * (optimal - chain.log_small[t]) / (chain.log_beta[t] - chain.log_small[t]) - 1
        return torch.cat([D, v.expand_as(D)], dim=1)


# The negative log-likelihood per dimension of the part 2/255 wide around a value, up to its fourth power
TRUE_BITS = (torch.logdet(2 * math.pi * math.e * COVARIANCE).item() / 4 + math.log(127.5)) / math.log(2)


def gap(chain: Chain, variance: str = "learned_range") -> float:
    """Return how many bits per dimension the mean bound lies above the truth, by quadrature: exact, but for the reconstruction,
    which is smooth."""
    z, w = map(torch.from_numpy, np.polynomial.hermite_e.hermegauss(6))
    z, w = torch.cartesian_prod(z, z, z, z), torch.cartesian_prod(w, w, w, w).prod(dim=1)
    y = (z[:, :2] @ torch.linalg.cholesky(COVARIANCE).T).view(-1, 1, 1, 2)
    terms = variational_bound(ExactChainDenoiser(chain), y, chain, lambda: z[:, 2:].view_as(y), variance)
    return ((sum(terms) + chain.prior_term(y)) * w).sum().item() / w.sum().item() - TRUE_BITS


@pytest.mark.parametrize("betas", ["linear", "cosine"])
def test_the_bound_of_a_learned_variance_falls_to_the_truth_as_the_chain_gets_longer(betas):
    """The gap is what a step's covariance between the pixels costs, of the order of a step: it halves with every doubling. The
    bound of a fixed variance is worse."""
    gaps = [gap(make_chain(betas, length)) for length in (25, 50, 100, 200)]
    assert min(gaps) > 0
    assert all(1.6 < longer / shorter < 2.1 for longer, shorter in pairwise(gaps))
    assert min(gap(make_chain(betas, 25), fixed) for fixed in ("fixed_small", "fixed_large")) > gaps[0]
    strided = [gap(make_chain(betas).strided(length)) for length in (10, 30, 100)]
    assert min(strided) > 0
    assert all(longer > 1.3 * shorter for longer, shorter in pairwise(strided))


@pytest.mark.parametrize("betas", ["linear", "cosine"])
def test_the_ancestral_sampler_samples_the_data(betas, impulses, final):
    """The exact covariance of the samples tends to that of the two pixels as the chain gets longer. fixed_small makes it too
    small, fixed_large too large, and the learned variance is better than both. States are data and noise of their level."""
    errors = {}
    for variance in VARIANCES:
        for num_steps in (200, 400):
            chain, noise = make_chain(betas, num_steps), impulses(num_steps + 1, 2)
            states = list(ancestral(ExactChainDenoiser(chain), noise(), chain, noise, variance))
            x = states[-1].x.flatten(1)
            errors[variance, num_steps] = (TURN @ x.T @ x @ TURN).diagonal().sqrt() / torch.tensor(SPREADS) - 1
        assert errors[variance, 200].abs().max() > 1.4 * errors[variance, 400].abs().max()
    assert (errors["fixed_small", 400] < 0).all()
    assert (errors["fixed_large", 400] > 0).all()
    small, large, learned = (errors[variance, 400].abs().max() for variance in VARIANCES)
    assert learned < min(small, large, 0.02)
    x, noisy = states[200].x.flatten(1), COVARIANCE + states[200].sigma ** 2 * torch.eye(2)
    torch.testing.assert_close(x.T @ x, noisy, rtol=0.05, atol=0.01)


@pytest.mark.parametrize(("betas", "steps"), [("linear", 200), ("cosine", 50), ("cosine", 1)])
def test_ddim_is_eulers_method_at_the_chains_noise_levels(betas, steps, stand_in, wave, assert_close):
    """Both are Eq. 12 of Song et al. (2021) without noise: x_{t-1} = sqrt(abar_{t-1}) x_0 + sqrt(1 - abar_{t-1}) epsilon."""
    whole = make_chain(betas)
    chain, net, x = whole.strided(steps), stand_in(whole, outputs=1), wave(*SHAPE, scale=1.4, frequency=2.3, phase=0.4)
    levels = torch.cat([chain.sigma.flip(0), torch.zeros(1, dtype=torch.float64)])
    latents = x * (1 + levels[0] ** 2).sqrt() / levels[0]  # x_T is noise at unit variance, y + n has sigma_T^2 more than y
    euler = sample(net, latents, levels, solver="euler", round_sigma=net.round_sigma)
    alpha_bar = [*chain.alpha_bar.flip(0), torch.ones(())]
    for t, (state, other) in enumerate(zip(ddim(net, x, chain), euler, strict=True)):
        x_0 = net(x / alpha_bar[t].sqrt(), levels[t])
        epsilon = (x - alpha_bar[t].sqrt() * x_0) / (1 - alpha_bar[t]).sqrt()
        x = alpha_bar[t + 1].sqrt() * x_0 + (1 - alpha_bar[t + 1]).sqrt() * epsilon
        for found in (state, other):
            assert_close(found.x, x / alpha_bar[t + 1].sqrt())
            assert_close(found.denoised, x_0)
            assert found.sigma == pytest.approx(levels[t + 1].item(), rel=1e-12)


def test_a_strided_chain_keeps_the_timesteps_numbers_and_impossible_chains_are_refused():
    assert make_chain().strided(334).strided(3).timesteps.tolist() == [0, 498, 999]
    with pytest.raises(ValueError, match="has 1000 timesteps, too few for 1001 steps"):
        make_chain().strided(1001)
    with pytest.raises(ValueError, match="20 are too few for the linear schedule"):
        make_chain("linear", 20)


# Training on a chain: the losses that teach the variance, and timesteps drawn by importance


def test_the_hybrid_loss_teaches_the_mean_by_l_simple_and_the_variance_by_the_bound(wave):
    """The gradients of the network's first output are L_simple's, those of its second 0.001 times the bound's."""
    chain, t = make_chain("cosine"), torch.tensor([0, 400])
    y, sigma = wave(*SHAPE, scale=0.8, frequency=1.7, phase=0.2), chain.sigma[t]
    n = sigma[:, None, None, None] * wave(*SHAPE, scale=math.sqrt(2), frequency=0.9, phase=0.5)
    out, weight = torch.cat([0.7 * y, 0.3 * y], dim=1).requires_grad_(), inverse_variance(sigma, 0.5)

    def denoiser(x, sigma, all_outputs):
        return out

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(loss.sum(), out)[0]

    simple = gradient(weight * squared_error(out[:, :1], y))
    vlb, hybrid = (gradient(variational_loss(denoiser, y, n, sigma, weight, chain, hybrid)) for hybrid in (False, True))
    assert torch.equal(hybrid[:, :1], simple[:, :1])
    torch.testing.assert_close(hybrid[:, 1:], 0.001 * vlb[:, 1:], rtol=1e-9, atol=0)
    assert (vlb[1] != 0).all()  # at t = 0, the probability of a value that is far off is constant


def importance(losses: torch.Tensor, **options) -> ImportanceSampledTimesteps:
    """Return the sampler with a full history of these losses, one a timestep."""
    sampler = ImportanceSampledTimesteps(make_chain("cosine", len(losses)).levels, **options)
    for _ in range(sampler.history.shape[1]):
        sampler.update(sampler.levels.sigma, losses)
    return sampler


def test_importance_weights_agree_with_the_reference(assert_close):
    row = REFERENCE["loss_second_moment"]
    levels = make_chain("cosine", row["num_timesteps"]).levels
    sampler = ImportanceSampledTimesteps(levels, row["history_per_term"], row["uniform_prob"]).double()
    weights = {after["after"]: after["weights"] for after in row["weights"]}
    for count, (t, loss) in enumerate(zip(row["timesteps"], row["losses"]), start=1):
        sampler.update(levels.sigma[t][None], torch.tensor([loss], dtype=torch.float64))
        if count in weights:
            assert_close(sampler.weights(), weights.pop(count), 1e-6)
    assert not weights


def test_timesteps_are_drawn_by_their_losses_and_the_mean_stays():
    """The mean of importance times loss is the mean over all timesteps, with a smaller variance: that is what it is for."""
    losses = torch.linspace(0, 5, 40)
    sampler = importance(losses, uniform_prob=0.1)
    sigma = sampler.sample(10**5, torch.Generator().manual_seed(0))
    t, weight = sampler.levels.nearest(sigma), sampler.importance(sigma)
    loss = losses[t]
    assert t.bincount(minlength=40).tolist() == pytest.approx((10**5 * sampler.weights()).tolist(), abs=350)
    assert weight.mean().item() == pytest.approx(1, abs=0.02)
    assert (weight * loss).mean().item() == pytest.approx(2.5, rel=0.01)
    assert (weight * loss).std() < 0.2 * losses.std()


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_the_latest_losses_of_every_timestep_are_remembered_in_order(batch_size):
    """However often a timestep occurs in a batch."""
    generator, histories = torch.Generator().manual_seed(batch_size), [[math.nan] * 3 for _ in range(4)]
    sampler = ImportanceSampledTimesteps(make_chain("cosine", 4).levels, history_per_term=3)
    for _ in range(20):
        t, losses = torch.randint(0, 4, (batch_size,), generator=generator), torch.rand(batch_size, generator=generator)
        sampler.update(sampler.levels.sigma[t], losses)
        for place, loss in zip(t.tolist(), losses.tolist()):
            histories[place] = [*histories[place][1:], loss]
        torch.testing.assert_close(sampler.history, torch.tensor(histories), rtol=0, atol=0, equal_nan=True)
