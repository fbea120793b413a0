"""The chains of DDPM and Improved DDPM: against reference numbers, and against the general sampler."""

import json
import math
from pathlib import Path

import pytest
import torch
from reference import assert_close, fresh_noise, wave
from torch import nn

from edm.ddpm import (
    HybridLoss,
    ImportanceSampledTimesteps,
    LearnedVariancePreconditioning,
    VariationalLoss,
    ancestral,
    make_chain,
)
from edm.precond import Denoiser
from edm.sampler import clipped

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
    states = ancestral(clipped(stand_in(row["schedule"])), latents, chain, row["variance"], noise=fresh_noise(latents))
    *_, last = states
    close(last.x.flatten()[:8], row["out"])


def test_importance_weights_agree_with_the_reference():
    row = REFERENCE["loss_second_moment"]
    torch.set_default_dtype(torch.float64)
    try:
        sampler = ImportanceSampledTimesteps("cosine", row["num_timesteps"], row["history_per_term"], row["uniform_prob"])
    finally:
        torch.set_default_dtype(torch.float32)
    weights = {after["after"]: after["weights"] for after in row["weights"]}
    for count, (t, loss) in enumerate(zip(row["timesteps"], row["losses"]), start=1):
        sampler.record(torch.tensor([t]), torch.tensor([loss], dtype=torch.float64))
        if count in weights:
            close(sampler.weights(), weights.pop(count))
    assert not weights
