"""Data sets and batches. Images are uint8 (C, H, W) here; `to_model_range` makes them what the model sees."""

import contextlib
import io
import os
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset, TensorDataset, default_collate
from tqdm import tqdm

from edm.digits import draw_digits
from edm.distributed import Processes
from edm.errors import UserError
from edm.pictures import from_pil
from edm.randomness import generator_for

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".webp"}
IMAGE_FORMATS = ["BMP", "GIF", "JPEG", "PNG", "PPM", "WEBP"]  # whatever the suffix; Pillow would run others, as EPS
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # said in one line instead
HAVE_TEST_SETS = ("mnist", "fashion_mnist", "cifar10")
MAX_READERS = 16  # each of which may hold an image of a camera's size


def to_model_range(images: torch.Tensor) -> torch.Tensor:
    """uint8 0..255 -> float32 -1..1."""
    return images.float() / 127.5 - 1


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """-1..1, clamped -> uint8 0..255, to the nearest grey level."""
    return (images * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


def open_dataset(dataset: str, root: str, resolution: int, channels: int, label_dim: int, test: bool = False) -> Dataset:
    """The training images of a data set.

    Args:
        dataset: mnist, fashion_mnist, cifar10, image_folder or digits.
        root: torchvision's root folder (downloaded into where missing), or the folder of images; digits needs none.
        resolution: height and width, in pixels.
        channels: 1 (colour is turned to grey) or 3 (grey is repeated).
        label_dim: how many classes the network knows; 0 for none.
        test: the test images instead, of data sets that have any (not digits, not image_folder).

    Returns:
        A map-style data set of (uint8 (channels, resolution, resolution), label).

    Raises:
        UserError: the data cannot be found, downloaded or read, or has more classes than the network.
    """
    if dataset == "image_folder":
        opened = ImageFolder(root, resolution, channels)
        num_classes = len(opened.classes)
    else:
        images, labels = draw_digits(resolution) if dataset == "digits" else torchvision_images(dataset, root, resolution, test)
        opened = TensorDataset(with_channels(images, channels), labels)
        num_classes = 10
    if label_dim and num_classes > label_dim:
        raise UserError(f"network.label_dim: {dataset} has {num_classes} classes, more than the network's {label_dim}")
    return opened


def torchvision_images(dataset: str, root: str, resolution: int, test: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """All training or test images, (N, C, resolution, resolution) uint8, and labels, (N,). Small ones are padded with black."""
    from torchvision import datasets  # slow to import, and needed only here

    cls = {"mnist": datasets.MNIST, "fashion_mnist": datasets.FashionMNIST, "cifar10": datasets.CIFAR10}[dataset]
    ours = Path(root).resolve().is_relative_to(Path.cwd())  # a stranger's config does not say where else to write
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # torchvision prints every mirror it tries
            opened = cls(root, train=not test, download=ours)
    except Exception as error:  # torchvision raises whatever its download or its parser came upon
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        reason = reason if ours else "only a folder inside the current one, such as data, is downloaded into"
        raise UserError(
            f"{dataset} could be neither read from {root!r} nor downloaded ({reason}); name the folder that holds it with "
            "--data_root, or try --config_path configs/quickstart.yaml, which needs no download"
        ) from None
    images = torch.as_tensor(opened.data)
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
    before = (resolution - images.shape[-1]) // 2
    after = resolution - images.shape[-1] - before
    return torch.nn.functional.pad(images, (before, after, before, after)), torch.as_tensor(opened.targets)


def with_channels(images: torch.Tensor, channels: int) -> torch.Tensor:
    """(N, 1 or 3, H, W) uint8 -> (N, channels, H, W): grey repeated, colour weighted by ITU-R 601's luma."""
    if images.shape[1] == 3 and channels == 1:
        weights = torch.tensor([0.299, 0.587, 0.114])
        return torch.cat([torch.einsum("nchw,c->nhw", part.float(), weights).round() for part in images.split(1000)])[
            :, None
        ].byte()
    return images.expand(-1, channels, -1, -1)


class ImageFolder(Dataset):
    """Every image under a folder, centre-cropped to a square and resized. The first level of sub-folders names the classes
    (a folder without sub-folders is one class).

    Raises:
        UserError: no folder, no images in it, or (when it is read) an unreadable image.
    """

    def __init__(self, root: str, resolution: int, channels: int):
        self.root, self.resolution, self.channels = Path(root), resolution, channels
        if not os.path.isdir(root):
            raise UserError(f"data.root: {root!r} is not a folder; name a folder of images with --data_root")
        self.paths = sorted(
            path
            for path in self.root.rglob("*")
            if path.suffix.lower() in IMAGE_SUFFIXES
            and path.is_file()
            and not any(part.startswith((".", "__")) for part in path.relative_to(root).parts)
        )
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
                if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                    raise ValueError(f"Image size ({image.width * image.height} pixels) exceeds that of any camera's")
                image = ImageOps.exif_transpose(image)
                if image.mode.startswith("I"):  # 16 bits a pixel; Pillow's own conversion to 8 would clip them to white
                    image = image.convert("I").point(lambda value: value / 256).convert("L")
                image = image.convert("L" if self.channels == 1 else "RGB")
                image = ImageOps.fit(image, (self.resolution, self.resolution), Image.Resampling.LANCZOS)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            reason = str(error).partition("\n")[0]
            raise UserError(f"cannot read the image {self.paths[index]}: {reason}") from None
        return from_pil(image), self.labels[index]


def shuffled_batches(num_images: int, batch_size: int, seed: int, first_step: int = 0) -> Iterator[torch.Tensor]:
    """Indices (batch_size,) without end: every epoch is a permutation of its own, batches run on from one into the next.

    Args:
        first_step: how many batches to leave out. Batch k is the same whichever step a run starts from.
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
    dataset: Dataset,
    batch_size: int,
    seed: int,
    first_step: int,
    device: torch.device,
    max_resident_mb: int,
    processes: Processes | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches without end, or a process's share of each, on the device: images (b, C, H, W) uint8, labels (b,).

    A data set of at most `max_resident_mb` stays on the device as uint8 and is batched there; of a larger one, every batch is
    read when its time comes. Both give the same batches.
    """
    processes = processes or Processes()
    mine = processes.share(batch_size)
    indices = (batch[mine] for batch in shuffled_batches(len(dataset), batch_size, seed, first_step))
    if len(dataset) * dataset[0][0].numel() <= max_resident_mb * 2**20:
        return resident_batches(whole(dataset, quiet=not processes.is_first), indices, device)
    return streamed_batches(dataset, indices, device, max(min(num_cores() // processes.local_size, MAX_READERS), 1))


def resident_batches(dataset: tuple[torch.Tensor, torch.Tensor], indices: Iterator[torch.Tensor], device: torch.device):
    """Batches cut from images that stay on the device."""
    images, labels = (part.to(device) for part in dataset)
    for index in indices:
        index = index.to(device, non_blocking=True)
        yield images[index], labels[index]


def streamed_batches(dataset: Dataset, indices: Iterator[torch.Tensor], device: torch.device, num_readers: int):
    """Batches read by threads, two ahead of their use, from indices without end. Decoding and resizing an image leave Python's
    lock to the others."""
    readers = ThreadPoolExecutor(num_readers)

    def ask_for(index: torch.Tensor) -> list[Future]:
        return [readers.submit(dataset.__getitem__, place) for place in index.tolist()]

    try:
        ahead = deque(map(ask_for, islice(indices, 2)))
        for index in indices:
            batch = default_collate([item.result() for item in ahead.popleft()])
            ahead.append(ask_for(index))
            if device.type == "cuda":
                batch = [part.pin_memory() for part in batch]
            yield tuple(part.to(device, non_blocking=True) for part in batch)
    finally:
        readers.shutdown(cancel_futures=True)  # waits for an image each


def num_cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def whole(dataset: Dataset, quiet: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """A data set as two tensors: images (N, C, H, W) uint8, labels (N,)."""
    if isinstance(dataset, TensorDataset):
        return dataset.tensors
    items = [dataset[index] for index in tqdm(range(len(dataset)), desc="reading images", leave=False, disable=quiet)]
    return torch.stack([image for image, _ in items]), torch.tensor([label for _, label in items])
