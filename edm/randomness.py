"""Every random draw has an address (a seed and a purpose, a step or an image), so that it can be made again."""

import hashlib

import torch


def seed_for(*address: int | str) -> int:
    """A 64-bit seed that depends on every part of the address. (PyTorch's CPU generators use 32 bits of it, so in a run of
    a few hundred thousand steps some two will share their noise, though not their images.)"""
    return int.from_bytes(hashlib.blake2b(repr(address).encode(), digest_size=8).digest(), "little")


def generator_for(*address: int | str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator whose draws depend on the address alone."""
    return torch.Generator(device).manual_seed(seed_for(*address))


class ImageNoise:
    """Unit normal noise for a batch of images, each from a generator of its own, so that an image does not depend on the
    images beside it. Drawn in float64 on the CPU, so that it does not depend on the device either.

    Args:
        seeds: one per image, from 0 to 2^32 - 1.
        shape: (C, H, W) of one image.
        device, dtype: what the noise is converted to.

    Calling it gives fresh noise, (B, C, H, W).
    """

    def __init__(self, seeds: list[int], shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.shape, self.device, self.dtype = shape, device, dtype

    def __call__(self) -> torch.Tensor:
        noise = torch.stack([torch.randn(self.shape, generator=g, dtype=torch.float64) for g in self.generators])
        noise = noise.to(self.dtype)
        if self.device.type == "cuda":
            noise = noise.pin_memory()  # else the copy would wait until the GPU has done all before it
        return noise.to(self.device, non_blocking=True)
