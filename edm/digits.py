"""The embedded data set: digits drawn with Pillow's built-in font, each a little different. Nothing to download."""

import math
import random

import torch
from PIL import Image, ImageDraw, ImageFont

from edm.pictures import from_pil

NUM_IMAGES = 10_000
SUPERSAMPLING = 4  # digits are drawn this many times larger, then averaged down


def draw_digits(resolution: int, num_images: int = NUM_IMAGES, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """White digits on black under random rotation, shear, scale, translation and stroke width.

    Args:
        resolution: height and width, in pixels.
        num_images: how many; the classes take turns.
        seed: decides all the variation.

    Returns:
        images (num_images, 1, resolution, resolution), uint8; labels (num_images,), int64, 0 to 9.
    """
    rng = random.Random(seed)
    size = resolution * SUPERSAMPLING
    glyphs = {(digit, stroke): draw_glyph(digit, stroke, size) for digit in range(10) for stroke in range(3)}
    labels = torch.arange(num_images) % 10
    images = [distorted(glyphs[digit, rng.randrange(3)], rng) for digit in labels.tolist()]
    return torch.stack(images), labels


def draw_glyph(digit: int, stroke: int, size: int) -> Image.Image:
    """One digit in the middle of a black square of `size` pixels, its lines thickened by `stroke` steps."""
    image = Image.new("L", (size, size))
    font = ImageFont.load_default(0.95 * size)
    width = stroke * size // 64
    ImageDraw.Draw(image).text((size / 2, size / 2), str(digit), fill=255, font=font, anchor="mm", stroke_width=width)
    return image


def distorted(glyph: Image.Image, rng: random.Random) -> torch.Tensor:
    """A random affine view of the glyph, averaged down: (1, H, W), uint8."""
    size, middle = glyph.size[0], glyph.size[0] / 2
    angle, shear = math.radians(rng.gauss(0, 5)), rng.gauss(0, 0.08)
    scale_x, scale_y = rng.uniform(0.8, 1.05), rng.uniform(0.85, 1.05)
    shift_x, shift_y = rng.uniform(-0.04, 0.04) * size, rng.uniform(-0.04, 0.04) * size

    # Pillow wants the map from a pixel of the result to one of the glyph: shift, rotation, scale, shear undone in this order.
    a, b = math.cos(angle) / scale_x, math.sin(angle) / scale_x
    c, d = -math.sin(angle) / scale_y, math.cos(angle) / scale_y
    a, b = a + shear * c, b + shear * d
    x0, y0 = middle + shift_x, middle + shift_y
    matrix = (a, b, middle - a * x0 - b * y0, c, d, middle - c * x0 - d * y0)
    view = glyph.transform(glyph.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    return from_pil(view.reduce(SUPERSAMPLING))
