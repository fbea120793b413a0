"""Noise schedules and time discretisations (the paper's Table 1). EDM's choice is sigma(t) = t and s(t) = 1."""

import torch


def edm_steps(num_steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> torch.Tensor:
    """EDM's time steps (Eq. 5): t_0 = sigma_max > ... > t_{N-1} = sigma_min, then t_N = 0.

    Args:
        num_steps: N, at least 1 (a single step goes from sigma_max to 0).
        sigma_min, sigma_max: the range of noise levels, 0 < sigma_min < sigma_max.
        rho: how far the steps crowd towards sigma_min; 1 is uniform.

    Returns:
        (num_steps + 1,) in float64, on the CPU.
    """
    fraction = torch.arange(num_steps, dtype=torch.float64) / max(num_steps - 1, 1)
    t = (sigma_max ** (1 / rho) + fraction * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    return torch.cat([t, torch.zeros(1, dtype=torch.float64)])
