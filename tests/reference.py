"""The rules behind the reference numbers in reference/official_edm.json: weights and inputs that need no random numbers."""

import json
import math
import zlib
from pathlib import Path

import torch
from torch import nn

OFFICIAL = json.loads((Path(__file__).parent / "reference" / "official_edm.json").read_text())


def wave(*shape: int, scale: float, frequency: float, phase: float) -> torch.Tensor:
    """scale sin(frequency i + phase) over the elements i of a float64 tensor."""
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    return (scale * torch.sin(frequency * i + phase)).reshape(shape)


def fill(net: nn.Module) -> nn.Module:
    """Give every parameter the value that follows from its name and shape; the network becomes float64."""
    net.double()
    frequencies = [(name, buffer) for name, buffer in net.named_buffers() if name.endswith("freqs")]
    for name, parameter in [*net.named_parameters(), *frequencies]:
        phase = (zlib.crc32(name.encode()) % 10007) / 100
        s = wave(*parameter.shape, scale=1, frequency=0.61803398875, phase=phase)
        if name.endswith("freqs"):
            value = 2 * s
        elif name.endswith("bias"):
            value = 0.1 * s
        elif parameter.ndim == 1:
            value = 1 + 0.1 * s
        else:
            value = math.sqrt(2 * parameter.shape[0] / parameter.numel()) * s
        parameter.data = value.float().double()
    return net


def two_peaks(x: torch.Tensor, sigma: float, labels: torch.Tensor | None = None) -> torch.Tensor:
    """The exact denoiser of data that is N(+-0.5, 0.2^2) in every pixel."""
    q = 0.04 + sigma**2
    return 0.04 / q * x + sigma**2 / q * 0.5 * torch.tanh(0.5 * x / q)


def fresh_noise(like: torch.Tensor):
    """The reference's noise: the k-th call returns sqrt(2) sin(0.9 i + 1.3 k)."""
    calls = 0

    def noise() -> torch.Tensor:
        nonlocal calls
        calls += 1
        return wave(*like.shape, scale=math.sqrt(2), frequency=0.9, phase=1.3 * calls)

    return noise


def assert_close(actual: torch.Tensor, expected, tolerance: float = 1e-9) -> None:
    """|difference| <= tolerance (1 + |expected|), element by element."""
    torch.testing.assert_close(actual.double(), torch.tensor(expected, dtype=torch.float64), rtol=tolerance, atol=tolerance)
