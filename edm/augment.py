"""Non-leaky augmentation of the training images (the paper's Appendix F.2, Table 6).

Every image is transformed at random, and nine numbers tell the network how. They are all 0 for an untransformed image, so
sampling with zeros gives untransformed images. The transformations, their order and the labels are those of Table 6.
"""

import math
from dataclasses import dataclass

import torch
from torch.nn.functional import grid_sample, pad

NUM_LABELS = 9


def rotation_matrix(angle: torch.Tensor) -> torch.Tensor:
    """Return the matrices (B, 2, 2) of rotations by angles (B,), in radians, clockwise: x points right and y points down."""
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.stack([cos, -sin], dim=-1), torch.stack([sin, cos], dim=-1)], dim=-2)


@dataclass(frozen=True)
class Transformation:
    """Holds the transformations of B images, applied in the order of the fields. Each field is (B,), except `shift`."""

    x_flip: torch.Tensor  # 0 or 1
    y_flip: torch.Tensor  # 0 or 1
    zoom: torch.Tensor  # w: the image is enlarged by 2^(0.2 w)
    angle: torch.Tensor  # of the rotation, in radians, clockwise
    stretch: torch.Tensor  # w: enlarged by 2^(0.2 w) along an axis, and shrunk by as much across it
    axis: torch.Tensor  # angle of that axis
    shift: torch.Tensor  # (B, 2), right and down, in eighths of the image's size

    @classmethod
    def draw(cls, batch_size: int, probability: float, generator: torch.Generator) -> "Transformation":
        """Draw transformations for a batch (Table 6).

        x is flipped with probability 1/2, y with half of `probability`, and every other part is applied with `probability`. The
        stretch is along the x axis or along a random axis, with probability 1/2 each.
        """
        options = {"generator": generator, "device": generator.device}

        def bernoulli(p: float) -> torch.Tensor:
            return (torch.rand(batch_size, **options) < p).float()

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(batch_size, *shape, **options)

        def any_angle() -> torch.Tensor:
            return math.pi * (2 * torch.rand(batch_size, **options) - 1)

        return cls(
            x_flip=bernoulli(0.5),
            y_flip=bernoulli(0.5) * bernoulli(probability),
            zoom=normal() * bernoulli(probability),
            angle=any_angle() * bernoulli(probability),
            stretch=normal() * bernoulli(probability),
            axis=any_angle() * bernoulli(0.5),
            shift=normal(2) * bernoulli(probability)[:, None],
        )

    def labels(self) -> torch.Tensor:
        """Return the augmentation labels (B, 9), which tell the network what was done."""
        columns = [
            self.x_flip,
            self.y_flip,
            self.zoom,
            self.angle.cos() - 1,
            self.angle.sin(),
            self.stretch * self.axis.cos(),
            self.stretch * self.axis.sin(),
            *self.shift.unbind(dim=1),
        ]
        return torch.stack(columns, dim=1)

    def apply(self, images: torch.Tensor) -> torch.Tensor:
        """Transform images (B, C, H, W) in [-1, 1], at least 2 pixels high and wide, differentiably.

        Flips are exact. Everything else is one cubic interpolation of the anti-aliased images, with reflected borders; images
        to which nothing but flips happens are not interpolated.
        """
        images = torch.where(self.x_flip[:, None, None, None] > 0, images.flip(3), images)
        images = torch.where(self.y_flip[:, None, None, None] > 0, images.flip(2), images)
        height, width = images.shape[2:]
        shift = self.shift.to(images.dtype)
        # Positions of the output's pixels relative to the centre: first with the shift undone, then in the input.
        x = torch.arange(width, dtype=images.dtype, device=images.device) - (width - 1) / 2 - shift[:, :1] * width / 8
        y = torch.arange(height, dtype=images.dtype, device=images.device) - (height - 1) / 2 - shift[:, 1:] * height / 8
        x, y = torch.broadcast_tensors(x[:, None, :], y[:, :, None])
        inverse = self.inverse_matrix().to(images.dtype)
        x, y = (torch.stack([x, y], dim=-1) @ inverse.mT[:, None]).unbind(dim=-1)
        grid = torch.stack([x * 2 / (width - 1), y * 2 / (height - 1)], dim=-1)  # centres of the outermost pixels are -1 and 1
        smooth = antialias(images, inverse)
        resampled = grid_sample(smooth, grid, mode="bicubic", padding_mode="reflection", align_corners=True)
        moved = (self.zoom != 0) | (self.angle != 0) | (self.stretch != 0) | (self.shift != 0).any(dim=1)
        return torch.where(moved[:, None, None, None], resampled.clamp(-1, 1), images)  # cubic interpolation overshoots

    def inverse_matrix(self) -> torch.Tensor:
        """Return the inverse of zoom, rotation and stretch together: (B, 2, 2), from output to input positions.

        Positions (x, y) are relative to the image's centre. The shift is not included.
        """
        stretch = torch.stack([2 ** (-0.2 * self.stretch), 2 ** (0.2 * self.stretch)], dim=-1)
        inverse_stretch = rotation_matrix(self.axis) * stretch[:, None, :] @ rotation_matrix(-self.axis)
        return 2 ** (-0.2 * self.zoom)[:, None, None] * rotation_matrix(-self.angle) @ inverse_stretch


def antialias(images: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Blur images (B, C, H, W) with a Gaussian in the directions in which a transformation shrinks them, and in no other.

    A pixel of the output covers an ellipse of the input, with semi-axes proportional to the singular values of the inverse
    matrix (B, 2, 2). Along each of these axes the Gaussian has the variance max(singular value^2 - 1, 0) / 4, in pixels^2:
    0, so no blur, where the image is not shrunk. This filter is ours; the authors use another one.
    """
    gram = inverse @ inverse.mT  # its eigenvalues a >= b, here in closed form, are the squared singular values
    identity = torch.eye(2, dtype=inverse.dtype, device=inverse.device)
    mean = gram.diagonal(dim1=1, dim2=2).mean(dim=1)
    gap = (((gram[:, 0, 0] - gram[:, 1, 1]) / 2) ** 2 + gram[:, 0, 1] ** 2).sqrt()
    a, b = (mean + gap)[:, None, None], (mean - gap)[:, None, None]
    projection_a = (gram - b * identity) / (a - b).clamp(min=1e-12)  # on the eigenvector of a; 0 for a = b
    variance_a, variance_b = (a - 1).clamp(min=0) / 4, (b - 1).clamp(min=0) / 4
    covariance = variance_b * identity + (variance_a - variance_b) * projection_a

    height, width = images.shape[2:]
    margin = min(8, height - 1, width - 1)
    padded = pad(images, (margin,) * 4, mode="reflect")
    y = 2 * math.pi * torch.fft.fftfreq(padded.shape[2], device=images.device, dtype=images.dtype)
    x = 2 * math.pi * torch.fft.rfftfreq(padded.shape[3], device=images.device, dtype=images.dtype)
    frequency = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)  # (H', W' / 2 + 1, 2), in radians per pixel
    response = torch.exp(-(frequency @ covariance[:, None] * frequency).sum(dim=-1) / 2)
    smooth = torch.fft.irfft2(torch.fft.rfft2(padded) * response[:, None], s=padded.shape[2:])
    return smooth[..., margin : margin + height, margin : margin + width]


def augment(
    images: torch.Tensor,
    probability: float,
    generator: torch.Generator,
    batch_size: int | None = None,
    shard: slice = slice(None),
) -> tuple[torch.Tensor, torch.Tensor]:
    """Transform images (B, C, H, W) in [-1, 1] at random, and return them and their augmentation labels (B, 9).

    Args:
        probability: as in `Transformation.draw`. At 0 the images are returned unchanged, and nothing is drawn.
        generator: on the images' device.
        batch_size, shard: if the images are only a part of a batch, the batch's size and their place in it. An image is
            then transformed as it would be with the whole batch.
    """
    if probability == 0:
        return images, images.new_zeros(len(images), NUM_LABELS)
    whole_batch = Transformation.draw(batch_size or len(images), probability, generator)
    transformation = Transformation(*(field[shard] for field in vars(whole_batch).values()))
    return transformation.apply(images), transformation.labels()
