"""How networks are trained on a chain: the losses that teach the variance, and timesteps drawn by importance."""

import json
import math
from pathlib import Path

import pytest
import torch

from edm.ddpm import make_chain
from edm.ddpm_loss import HybridLoss, ImportanceSampledTimesteps, VariationalLoss
from edm.loss import inverse_variance, squared_error

REFERENCE = json.loads(Path(__file__).parents[1].joinpath("reference", "improved_ddpm.json").read_text())
SHAPE = (2, 1, 4, 4)


def test_l_simple_is_the_square_error_of_the_predicted_noise(stand_in, wave, assert_close):
    """DDPM's own loss (H14) needs no more than the weight 1 / sigma^2."""
    chain, t, y = make_chain(), torch.tensor([3, 700]), wave(*SHAPE, scale=0.8, frequency=1.7, phase=0.2)
    net, epsilon = stand_in(chain, outputs=1), wave(*SHAPE, scale=math.sqrt(2), frequency=0.9, phase=0.5)
    sigma = chain.sigma[t]
    loss = inverse_variance(sigma, 0.5) * squared_error(net(y + sigma[:, None, None, None] * epsilon, sigma), y)
    assert_close(loss, squared_error(net.model(chain.diffuse(y, t, epsilon), t.double()), epsilon))


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
    vlb, hybrid = (gradient(loss(denoiser, y, n, sigma, weight)) for loss in (VariationalLoss(chain), HybridLoss(chain)))
    assert torch.equal(hybrid[:, :1], simple[:, :1])
    torch.testing.assert_close(hybrid[:, 1:], 0.001 * vlb[:, 1:], rtol=1e-9, atol=0)
    assert (vlb[1] != 0).all()  # at t = 0, the probability of a value that is far off is constant


# Which timesteps are drawn


def importance(losses: torch.Tensor, **options) -> ImportanceSampledTimesteps:
    """Return the sampler with a full history of these losses, one a timestep."""
    sampler = ImportanceSampledTimesteps(make_chain("cosine", len(losses)).levels, **options)
    for _ in range(sampler.history.shape[1]):
        sampler.record(torch.arange(len(losses)), losses)
    return sampler


def counts(sampler: ImportanceSampledTimesteps, number: int) -> list[int]:
    """Return how often each timestep occurs among draws."""
    sigma = sampler.sample(number, torch.Generator().manual_seed(0))
    return sampler.levels.nearest(sigma).bincount(minlength=len(sampler.history)).tolist()


def test_importance_weights_agree_with_the_reference(assert_close):
    row = REFERENCE["loss_second_moment"]
    levels = make_chain("cosine", row["num_timesteps"]).levels
    sampler = ImportanceSampledTimesteps(levels, row["history_per_term"], row["uniform_prob"]).double()
    weights = {after["after"]: after["weights"] for after in row["weights"]}
    for count, (t, loss) in enumerate(zip(row["timesteps"], row["losses"]), start=1):
        sampler.record(torch.tensor([t]), torch.tensor([loss], dtype=torch.float64))
        if count in weights:
            assert_close(sampler.weights(), weights.pop(count), 1e-6)
    assert not weights


def test_timesteps_are_drawn_by_their_losses_and_the_mean_stays():
    """The mean of importance times loss is the mean over all timesteps, with a smaller variance: that is what it is for."""
    losses = torch.linspace(0, 5, 40)
    sampler = importance(losses, uniform_prob=0.1)
    assert counts(sampler, 10**5) == pytest.approx((10**5 * sampler.weights()).tolist(), abs=350)
    sigma = sampler.sample(10**5, torch.Generator().manual_seed(0))
    weight, loss = sampler.importance(sigma), losses[sampler.levels.nearest(sigma)]
    assert weight.mean().item() == pytest.approx(1, abs=0.02)
    assert (weight * loss).mean().item() == pytest.approx(2.5, rel=0.01)
    assert (weight * loss).std() < 0.2 * losses.std()


def test_before_every_timestep_has_a_full_history_all_are_drawn_alike():
    sampler = ImportanceSampledTimesteps(make_chain("cosine", 5).levels, history_per_term=2)
    sampler.record(torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 0, 4]), torch.arange(10.0))
    assert sampler.weights().tolist() == [1] * 5
    assert sampler.importance(sampler.levels.sigma).tolist() == [1] * 5
    assert counts(sampler, 10_000) == pytest.approx([2000] * 5, abs=150)
    sampler.record(torch.tensor([4]), torch.tensor([math.inf]))  # an overflow is no loss
    assert sampler.weights().tolist() == [1] * 5
    sampler.update(sampler.levels.sigma[[4, 4]], torch.tensor([1.0, 2.0]))
    assert sampler.weights().sum().item() == pytest.approx(1)
    for losses in ([3e19, 1, 1, 1, 1], [0.0] * 5):  # whose squares overflow, or are all 0
        assert importance(torch.tensor(losses)).weights().isfinite().all()


@pytest.mark.parametrize("batch_size", [1, 3, 50])
def test_the_latest_losses_of_every_timestep_are_remembered_in_order(batch_size):
    """However often a timestep occurs in a batch."""
    generator, histories = torch.Generator().manual_seed(batch_size), [[math.nan] * 3 for _ in range(4)]
    sampler = ImportanceSampledTimesteps(make_chain("cosine", 4).levels, history_per_term=3)
    for _ in range(20):
        t, losses = torch.randint(0, 4, (batch_size,), generator=generator), torch.rand(batch_size, generator=generator)
        sampler.record(t, losses)
        for place, loss in zip(t.tolist(), losses.tolist()):
            histories[place] = [*histories[place][1:], loss]
        torch.testing.assert_close(sampler.history, torch.tensor(histories), rtol=0, atol=0, equal_nan=True)
