"""Data sets and batches. Images are uint8 (C, H, W) here; `to_model_range` converts them to what the model sees."""

import contextlib
import io
import math
import os
import random
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.data import Dataset, TensorDataset, default_collate
from tqdm import tqdm

from lab.cli import UserError, one_line
from lab.config import Config, Data, with_overrides
from lab.device import is_out_of_memory
from lab.distributed import World
from lab.seeds import generator_for

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".webp"}
# Formats that are read, whatever the suffix. Pillow would run code in others, such as EPS.
IMAGE_FORMATS = ["BMP", "GIF", "JPEG", "PNG", "PPM", "WEBP"]
HAVE_TEST_SETS = ("mnist", "fashion_mnist", "cifar10")
HIDDEN = (".", "__")  # how the names of files and folders begin that are no data
MAX_READERS = 16  # threads that decode images


def to_model_range(images: torch.Tensor) -> torch.Tensor:
    """Convert uint8 0..255 to float32 -1..1."""
    return images.float() / 127.5 - 1


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Convert -1..1, clamped, to the nearest uint8 0..255."""
    return (images * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def to_pil(image: torch.Tensor) -> Image.Image:
    """Convert (1 or 3, H, W) uint8 to a Pillow image, grey or colour."""
    return Image.fromarray((image[0] if len(image) == 1 else image.permute(1, 2, 0)).numpy())


def from_pil(image: Image.Image) -> torch.Tensor:
    """Convert a Pillow image, grey or colour, to (1 or 3, H, W) uint8."""
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, -1).permute(2, 0, 1).contiguous()


def open_dataset(config: Config, test: bool = False) -> Dataset:
    """Open the training images of a data set.

    Args:
        config: `config.data` names the data set, its folder (torchvision's data sets are downloaded there if they are missing),
            the resolution in pixels, and the channels: 1 (colour is turned to grey) or 3 (grey is repeated).
        test: open the test images instead, of a data set that has any (`HAVE_TEST_SETS`).

    Returns:
        A map-style data set of (uint8 (channels, resolution, resolution), label).

    Raises:
        UserError: the data cannot be found, downloaded or read, or has more classes than the network.
    """
    data, label_dim = config.data, config.network.label_dim
    if data.dataset == "image_folder":
        opened = ImageFolder(data.root, data.resolution, data.channels)
        num_classes = len(opened.classes)
    else:
        images, labels = draw_digits(data.resolution) if data.dataset == "digits" else torchvision_images(data, test)
        opened = TensorDataset(with_channels(images, data.channels), labels)
        num_classes = 10
    if label_dim and num_classes > label_dim:
        raise UserError(f"network.label_dim: {data.dataset} has {num_classes} classes, more than the network's {label_dim}")
    return opened


def torchvision_images(data: Data, test: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return all training or test images, (N, C, resolution, resolution) uint8, padded with black, and their labels, (N,)."""
    from torchvision import datasets  # slow to import, and needed only here

    cls, name, shape = {
        "mnist": (datasets.MNIST, "MNIST", (28, 28)),
        "fashion_mnist": (datasets.FashionMNIST, "FashionMNIST", (28, 28)),
        "cifar10": (datasets.CIFAR10, "cifar-10-batches-py", (32, 32, 3)),
    }[data.dataset]
    folder = Path(data.root, name)
    was_there = os.path.isdir(folder) and any(path.is_file() for path in folder.rglob("*"))
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # torchvision prints every mirror that it tries
            opened = cls(data.root, train=not test, download=True)
        images, labels = torch.as_tensor(opened.data), torch.as_tensor(opened.targets)
        if images.shape[1:] != shape or labels.shape != images.shape[:1] or not 0 <= labels.min() <= labels.max() <= 9:
            raise ValueError(f"it must hold {shape[0]} x {shape[1]} pixels and a label from 0 to 9 for each image")
    except Exception as error:  # torchvision raises whatever its download or its parser raises
        reason = one_line(str(error)) or type(error).__name__
        problem = f"in {str(folder)!r} is damaged or incomplete" if was_there else f"could not be downloaded to {data.root!r}"
        raise UserError(
            f"{data.dataset} {problem} ({reason:.300}); "
            "name the folder that holds it with --data_root, or use data.dataset=digits, which needs no download"
        ) from None
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
    missing = data.resolution - images.shape[-1]
    before, after = missing // 2, missing - missing // 2
    return torch.nn.functional.pad(images, (before, after, before, after)), labels


def with_channels(images: torch.Tensor, channels: int) -> torch.Tensor:
    """Convert (N, 1 or 3, H, W) uint8 to (N, channels, H, W): grey is repeated, colour weighted by the luma of ITU-R 601."""
    if images.shape[1] == 3 and channels == 1:
        weights = torch.tensor([0.299, 0.587, 0.114])
        grey = [torch.einsum("nchw,c->nhw", part.float(), weights).round().byte() for part in images.split(1000)]
        return torch.cat(grey)[:, None]
    return images.expand(-1, channels, -1, -1)


class ImageFolder(Dataset):
    """Every image under a folder, cropped to its central square and resized. The first level of sub-folders names the classes;
    a folder without sub-folders is one class.

    Raises:
        UserError: there is no such folder, it has no images, a folder in it or (when it is read) an image is unreadable.
    """

    def __init__(self, root: str, resolution: int, channels: int):
        self.root, self.resolution, self.channels = Path(root), resolution, channels
        if not os.path.isdir(root):
            raise UserError(f"data.root: {root!r} is not a folder; name a folder of images with --data_root")
        self.paths = sorted(path for path in files_under(self.root) if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
        if not self.paths:
            raise UserError(f"data.root: there is no image in {root!r} ({', '.join(sorted(IMAGE_SUFFIXES))})")
        folders = [path.relative_to(root).parts[0] if path.parent != self.root else "" for path in self.paths]
        self.classes = sorted(set(folders))
        self.labels = [self.classes.index(folder) for folder in folders]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        try:
            with Image.open(self.paths[index], formats=IMAGE_FORMATS) as image:
                image = ImageOps.exif_transpose(image)
                if image.mode.startswith("I"):  # 16 bits for each pixel, which Pillow's own conversion would clip to white
                    image = image.convert("I").point(lambda value: value / 256).convert("L")
                image = image.convert("L" if self.channels == 1 else "RGB")
                image = ImageOps.fit(image, (self.resolution, self.resolution), Image.Resampling.LANCZOS)
        except Exception as error:  # damage makes Pillow raise anything
            if is_out_of_memory(error):
                raise
            raise UserError(f"cannot read the image {self.paths[index]}: {one_line(str(error))}") from None
        return from_pil(image), self.labels[index]


def files_under(root: Path) -> Iterator[Path]:
    """Yield the files in a folder and in all folders below it, except hidden ones.

    Raises:
        UserError: one of the folders cannot be read.
    """

    def refuse(error: OSError):
        raise UserError(f"cannot read the folder {error.filename}: {error.strerror}")

    for folder, folders, names in os.walk(root, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(HIDDEN)]
        yield from (Path(folder, name) for name in names if not name.startswith(HIDDEN))


def as_tensors(dataset: Dataset, quiet: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a whole data set as images (N, C, H, W) uint8 and labels (N,)."""
    if isinstance(dataset, TensorDataset):
        return dataset.tensors
    items = [dataset[index] for index in tqdm(range(len(dataset)), desc="reading images", leave=False, disable=quiet)]
    return torch.stack([image for image, _ in items]), torch.tensor([label for _, label in items])


def root_mean_square(dataset: Dataset) -> float:
    """Return the root mean square of the pixels in [-1, 1], in float64: of all images, or of 10,000 evenly spaced ones if there
    are more."""
    count = min(len(dataset), 10_000)
    places = (place * len(dataset) // count for place in range(count))
    places = tqdm(places, desc="measuring images", total=count, leave=False, delay=1)
    histogram = sum(torch.bincount(dataset[place][0].flatten(), minlength=256) for place in places)  # of the grey levels
    squares = (torch.arange(256, dtype=torch.float64) / 127.5 - 1).square()
    return math.sqrt((histogram * squares).sum() / histogram.sum())


def with_measured_sigma_data(config: Config, dataset: Dataset) -> Config:
    """Return the config with the root mean square of the data in place of `preconditioning.sigma_data: auto`."""
    if config.preconditioning.sigma_data != "auto":
        return config
    return with_overrides(config, [f"preconditioning.sigma_data={root_mean_square(dataset)}"], "the measured sigma_data")


def shuffled_batches(num_images: int, batch_size: int, seed: int, first_step: int = 0) -> Iterator[torch.Tensor]:
    """Yield indices (batch_size,) without end. Every epoch is another permutation, and a batch can span two epochs.

    Args:
        first_step: how many batches to leave out. Batch k is the same wherever a run starts.
    """
    epoch, offset = divmod(first_step * batch_size, num_images)
    pending = torch.empty(0, dtype=torch.int64)
    while True:
        while len(pending) < batch_size:
            permutation = torch.randperm(num_images, generator=generator_for(seed, "epoch", epoch))
            pending = torch.cat([pending, permutation[offset:]])
            epoch, offset = epoch + 1, 0
        yield pending[:batch_size]
        pending = pending[batch_size:]


def batches(
    dataset: Dataset, config: Config, first_step: int, device: torch.device, world: World
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield this rank's shard of batches without end, on the device: images (b, C, H, W) uint8, labels (b,).

    A data set of at most `config.data.max_resident_mb` megabytes stays on the device; a larger one is read batch by batch.
    Both give the same batches.

    Args:
        first_step: as in `shuffled_batches`.
    """
    batch_size = config.training.batch_size
    shard = world.shard(batch_size)
    indices = (batch[shard] for batch in shuffled_batches(len(dataset), batch_size, config.training.seed, first_step))
    if len(dataset) * dataset[0][0].numel() <= config.data.max_resident_mb * 2**20:
        return resident_batches(as_tensors(dataset, quiet=not world.is_first), indices, device)
    return streamed_batches(dataset, indices, device, max(min(num_cores() // world.local_size, MAX_READERS), 1))


def resident_batches(dataset: tuple[torch.Tensor, torch.Tensor], indices: Iterator[torch.Tensor], device: torch.device):
    """Yield batches of a data set that stays on the device."""
    images, labels = (part.to(device) for part in dataset)
    for index in indices:
        index = index.to(device, non_blocking=True)
        yield images[index], labels[index]


def streamed_batches(dataset: Dataset, indices: Iterator[torch.Tensor], device: torch.device, num_readers: int):
    """Yield batches that threads read two batches ahead. (Decoding and resizing an image release Python's lock.)"""
    readers = ThreadPoolExecutor(num_readers)

    def start_reading(index: torch.Tensor) -> list[Future]:
        return [readers.submit(dataset.__getitem__, place) for place in index.tolist()]

    try:
        ahead = deque(map(start_reading, islice(indices, 2)))
        for index in indices:
            batch = default_collate([item.result() for item in ahead.popleft()])
            ahead.append(start_reading(index))
            if device.type == "cuda":
                batch = [part.pin_memory() for part in batch]
            yield tuple(part.to(device, non_blocking=True) for part in batch)
    finally:
        readers.shutdown(cancel_futures=True)


def num_cores() -> int:
    """Return how many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# The embedded data set: digits in Pillow's built-in font, each a little different

SUPERSAMPLING = 4  # digits are drawn this many times larger, then averaged down


def draw_digits(resolution: int, num_images: int = 10_000, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw white digits on black, with random rotation, shear, scale, translation and stroke width.

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
    """Draw a digit in the middle of a black square of `size` pixels, its lines thickened by `stroke` steps."""
    image = Image.new("L", (size, size))
    font = ImageFont.load_default(0.95 * size)
    width = stroke * size // 64
    ImageDraw.Draw(image).text((size / 2, size / 2), str(digit), fill=255, font=font, anchor="mm", stroke_width=width)
    return image


def distorted(glyph: Image.Image, rng: random.Random) -> torch.Tensor:
    """Return a random affine view of the glyph, averaged down: (1, H, W), uint8."""
    size, middle = glyph.size[0], glyph.size[0] / 2
    angle, shear = math.radians(rng.gauss(0, 5)), rng.gauss(0, 0.08)
    scale_x, scale_y = rng.uniform(0.8, 1.05), rng.uniform(0.85, 1.05)
    shift_x, shift_y = rng.uniform(-0.04, 0.04) * size, rng.uniform(-0.04, 0.04) * size

    # Pillow asks for the map from a pixel of the result to one of the glyph: it undoes shift, rotation, scale, shear in turn.
    a, b = math.cos(angle) / scale_x, math.sin(angle) / scale_x
    c, d = -math.sin(angle) / scale_y, math.cos(angle) / scale_y
    a, b = a + shear * c, b + shear * d
    x0, y0 = middle + shift_x, middle + shift_y
    matrix = (a, b, middle - a * x0 - b * y0, c, d, middle - c * x0 - d * y0)
    view = glyph.transform(glyph.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    return from_pil(view.reduce(SUPERSAMPLING))
