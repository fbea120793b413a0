"""Random draws that can be repeated: each has an address, such as (seed, "step", 12), that its seed is computed from."""

import hashlib

import torch


def seed_for(*address: int | str) -> int:
    """Return a 64-bit seed that depends on every part of the address.

    PyTorch's CPU generators use 32 of these bits. In a run of a few hundred thousand steps, two steps may therefore have the
    same noise, on different images.
    """
    return int.from_bytes(hashlib.blake2b(repr(address).encode(), digest_size=8).digest(), "little")


def generator_for(*address: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator whose draws depend on the address alone."""
    return torch.Generator(device).manual_seed(seed_for(*address))


class ImageNoise:
    """Unit normal noise for a batch of images, each from its own generator: calling it returns fresh noise, (B, C, H, W).

    An image therefore does not depend on the other images of its batch. The noise is drawn in float64 on the CPU, so it does
    not depend on the device either.

    Args:
        seeds: one for each image, from 0 to 2^32 - 1.
        shape: (C, H, W) of one image.
        device, dtype: what the noise is converted to.
    """

    def __init__(self, seeds: list[int], shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.shape, self.device, self.dtype = shape, device, dtype

    def __call__(self) -> torch.Tensor:
        noise = torch.stack([torch.randn(self.shape, generator=g, dtype=torch.float64) for g in self.generators])
        noise = noise.to(self.dtype)
        if self.device.type == "cuda":
            noise = noise.pin_memory()  # so that the copy does not wait for the work queued on the GPU
        return noise.to(self.device, non_blocking=True)
