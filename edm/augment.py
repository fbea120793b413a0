"""Data augmentation that does not leak into the samples (the paper's Appendix F.2, Table 6).

Every image is transformed at random, and the network is told how: nine numbers, all of them 0 for an image left as it is,
which is what sampling asks for.
"""

import math
from dataclasses import dataclass, fields

import torch
from torch.nn.functional import grid_sample, pad

NUM_LABELS = 9


def rotation(angle: torch.Tensor) -> torch.Tensor:
    """(B,) -> (B, 2, 2); x points right and y down, so a positive angle turns clockwise."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.stack([cos, -sin], dim=-1), torch.stack([sin, cos], dim=-1)], dim=-2)


@dataclass(frozen=True)
class Transformation:
    """What happens to each of B images, in this order (Table 6). Every field is (B,) but for `shift`."""

    x_flip: torch.Tensor  # 0 or 1
    y_flip: torch.Tensor  # 0 or 1
    zoom: torch.Tensor  # w: the image is enlarged by 2^(0.2 w)
    angle: torch.Tensor  # radians, clockwise
    stretch: torch.Tensor  # w: enlarged by 2^(0.2 w) along an axis, by the inverse across it
    axis: torch.Tensor  # angle of that axis
    shift: torch.Tensor  # (B, 2), right and down, in eighths of the image's size

    @classmethod
    def draw(cls, batch_size: int, probability: float, generator: torch.Generator) -> "Transformation":
        """Half of all images are flipped in x; each of the other transformations is tossed for with `probability`."""

        def rand() -> torch.Tensor:
            return torch.rand(batch_size, generator=generator, device=generator.device)

        def randn(*shape: int) -> torch.Tensor:
            return torch.randn(batch_size, *shape, generator=generator, device=generator.device)

        def tossed() -> torch.Tensor:
            return (rand() < probability).float()

        def any_angle() -> torch.Tensor:
            return math.pi * (2 * rand() - 1)

        def coin() -> torch.Tensor:
            return (rand() < 0.5).float()

        return cls(
            x_flip=coin(),
            y_flip=coin() * tossed(),
            zoom=randn() * tossed(),
            angle=any_angle() * tossed(),
            stretch=randn() * tossed(),
            axis=any_angle() * coin(),
            shift=randn(2) * tossed()[:, None],
        )

    def __getitem__(self, which: slice) -> "Transformation":
        """Those of some of the images."""
        return Transformation(*(getattr(self, field.name)[which] for field in fields(self)))

    def labels(self) -> torch.Tensor:
        """What the network is told: (B, 9)."""
        columns = [
            self.x_flip,
            self.y_flip,
            self.zoom,
            self.angle.cos() - 1,
            self.angle.sin(),
            self.stretch * self.axis.cos(),
            self.stretch * self.axis.sin(),
        ]
        return torch.cat([torch.stack(columns, dim=1), self.shift], dim=1)

    def apply(self, images: torch.Tensor) -> torch.Tensor:
        """Transform images (B, C, H, W) in [-1, 1], 2 or more pixels a side, differentiably.

        The geometry beyond flips is one resampling. Borders are reflected. Flips, and images left as they are, are exact.
        """
        images = torch.where(self.x_flip[:, None, None, None] > 0, images.flip(3), images)
        images = torch.where(self.y_flip[:, None, None, None] > 0, images.flip(2), images)
        resampled = self.resample(images).clamp(-1, 1)  # cubic interpolation overshoots
        moved = (self.zoom != 0) | (self.angle != 0) | (self.stretch != 0) | (self.shift != 0).any(dim=1)
        return torch.where(moved[:, None, None, None], resampled, images)

    def backward_map(self) -> torch.Tensor:
        """(B, 2, 2): where a pixel of the output, relative to the centre and unshifted, comes from in the input."""
        stretched = torch.stack([2 ** (-0.2 * self.stretch), 2 ** (0.2 * self.stretch)], dim=-1)
        unstretch = rotation(self.axis) * stretched[:, None, :] @ rotation(-self.axis)
        return 2 ** (-0.2 * self.zoom)[:, None, None] * rotation(-self.angle) @ unstretch

    def resample(self, images: torch.Tensor) -> torch.Tensor:
        """Zoom, rotation, stretch and shift at once, by cubic interpolation of anti-aliased images."""
        height, width = images.shape[2:]
        x = torch.arange(width, dtype=images.dtype, device=images.device) - (width - 1) / 2
        y = torch.arange(height, dtype=images.dtype, device=images.device) - (height - 1) / 2
        shift_x, shift_y = self.shift.to(images.dtype)[..., None].unbind(dim=1)
        shift_x, shift_y = shift_x * width / 8, shift_y * height / 8
        # Relative to the centre: where the output's pixels were before the shift, (B, H, W, 2), and in the input.
        x, y = torch.broadcast_tensors((x - shift_x)[:, None, :], (y - shift_y)[:, :, None])
        back = self.backward_map().to(images.dtype)
        x, y = (torch.stack([x, y], dim=-1) @ back.mT[:, None]).unbind(dim=-1)
        grid = torch.stack([x * 2 / (width - 1), y * 2 / (height - 1)], dim=-1)  # the outermost pixels' centres are at -1 and 1
        smooth = antialiased(images, back)
        return grid_sample(smooth, grid, mode="bicubic", padding_mode="reflection", align_corners=True)


def antialiased(images: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
    """Smooth each image (B, C, H, W) along the directions in which its backward map (B, 2, 2) shrinks it, and no other.

    A pixel of the output covers, in the input, an ellipse with semi-axes in proportion to the map's singular values. The
    Gaussian's variance is a quarter of what their squares exceed 1 by: 0, and so no smoothing, where the image is enlarged.
    """
    gram = back @ back.mT  # its eigenvalues, a >= b, in closed form, are the squares
    identity = torch.eye(2, dtype=back.dtype, device=back.device)
    mean = gram.diagonal(dim1=1, dim2=2).mean(dim=1)
    gap = (((gram[:, 0, 0] - gram[:, 1, 1]) / 2) ** 2 + gram[:, 0, 1] ** 2).sqrt()
    a, b = (mean + gap)[:, None, None], (mean - gap)[:, None, None]
    along = (gram - b * identity) / (a - b).clamp(min=1e-12)  # projects on a's direction, where there is one
    variance_a, variance_b = (a - 1).clamp(min=0) / 4, (b - 1).clamp(min=0) / 4
    variance = variance_b * identity + (variance_a - variance_b) * along

    height, width = images.shape[2:]
    margin = min(8, height - 1, width - 1)
    padded = pad(images, (margin,) * 4, mode="reflect")
    y = 2 * math.pi * torch.fft.fftfreq(padded.shape[2], device=images.device, dtype=images.dtype)
    x = 2 * math.pi * torch.fft.rfftfreq(padded.shape[3], device=images.device, dtype=images.dtype)
    frequency = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)  # (H', W' / 2 + 1, 2), radians a pixel
    response = torch.exp(-(frequency @ variance[:, None] * frequency).sum(dim=-1) / 2)
    smooth = torch.fft.irfft2(torch.fft.rfft2(padded) * response[:, None], s=padded.shape[2:])
    return smooth[..., margin : margin + height, margin : margin + width]


def augment(
    images: torch.Tensor,
    probability: float,
    generator: torch.Generator,
    batch_size: int | None = None,
    mine: slice = slice(None),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (B, C, H, W) in [-1, 1], transformed at random, and the labels (B, 9) that say how.

    Args:
        probability: of each transformation but the flip in x; at 0 nothing happens, not even that.
        generator: on the images' device.
        batch_size, mine: where the images are part of a batch, its size and their place in it; the draws are the batch's.
    """
    if probability == 0:
        return images, images.new_zeros(len(images), NUM_LABELS)
    transformation = Transformation.draw(batch_size or len(images), probability, generator)[mine]
    return transformation.apply(images), transformation.labels()
