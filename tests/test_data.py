"""Data sets and batches."""

import struct
import time
from collections import Counter
from itertools import islice

import pytest
import torch
from conftest import ROOT
from PIL import Image

from edm.data import batches, open_dataset, shuffled_batches, streamed_batches, to_model_range, to_uint8, whole
from edm.digits import draw_digits
from edm.errors import UserError
from edm.pictures import from_pil, to_pil

CPU = torch.device("cpu")
SHARED = ROOT.parent / "shared" / "data"


def test_grey_levels_survive_the_round_trip():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_model_range(levels)), levels)
    assert to_model_range(levels).aminmax() == (-1, 1)
    assert to_uint8(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]


def write_mnist(root, images: torch.Tensor, labels: torch.Tensor) -> None:
    """Small files in MNIST's own format, in torchvision's layout. The test images are the same, in reverse."""
    folder = root / "MNIST" / "raw"
    folder.mkdir(parents=True)
    for split in ("train", "t10k"):
        images, labels = (images, labels) if split == "train" else (images.flip(0), labels.flip(0))
        header = struct.pack(">iiii", 0x803, len(images), 28, 28)
        (folder / f"{split}-images-idx3-ubyte").write_bytes(header + bytes(images.flatten().tolist()))
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(struct.pack(">ii", 0x801, len(labels)) + bytes(labels.tolist()))


def test_mnist_is_padded_with_black_and_never_interpolated(tmp_path):
    images = torch.randint(0, 256, (5, 28, 28), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    write_mnist(tmp_path, images, torch.arange(5))
    padded, labels = whole(open_dataset("mnist", str(tmp_path), 32, 1, 10))
    assert padded.shape == (5, 1, 32, 32)
    assert padded.dtype == torch.uint8
    assert torch.equal(padded[:, 0, 2:30, 2:30], images)
    assert padded.long().sum() == images.long().sum()  # nothing but black outside
    assert labels.tolist() == [0, 1, 2, 3, 4]
    test, labels = whole(open_dataset("mnist", str(tmp_path), 32, 1, 10, test=True))
    assert torch.equal(test, padded.flip(0))
    assert labels.tolist() == [4, 3, 2, 1, 0]
    colour, _ = whole(open_dataset("mnist", str(tmp_path), 28, 3, 0))
    assert torch.equal(colour, images[:, None].expand(-1, 3, -1, -1))


@pytest.mark.skipif(not SHARED.exists(), reason="the real MNIST is not beside the repository")
def test_real_mnist():
    images, labels = whole(open_dataset("mnist", str(SHARED), 32, 1, 10))
    assert images.shape == (60_000, 1, 32, 32)
    assert labels[:5].tolist() == [5, 0, 4, 1, 9]


def test_missing_mnist_names_the_ways_out(tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.MNIST.mirrors", ["http://127.0.0.1:1/"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"Error downloading.*--data_root.*configs/quickstart.yaml") as error:
        open_dataset("mnist", "data", 32, 1, 0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_pixels_keep_their_place_between_pillow_and_tensors(mode):
    image = (
        Image.effect_noise((5, 3), 100) if mode == "L" else Image.effect_mandelbrot((5, 3), (-2, -1, 1, 1), 9).convert("RGB")
    )
    image.putpixel((4, 1), 77 if mode == "L" else (10, 20, 30))
    tensor = from_pil(image)
    assert tensor.shape == (len(mode), 3, 5)
    assert tensor[:, 1, 4].tolist() == ([77] if mode == "L" else [10, 20, 30])
    assert to_pil(tensor).tobytes() == image.tobytes()


def test_image_folder_crops_the_centre_resizes_and_takes_every_kind_of_image(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "deep").mkdir(parents=True)
    wide = Image.new("RGB", (30, 10), (255, 0, 0))  # red, its middle third green
    wide.paste((0, 255, 0), (10, 0, 20, 10))
    wide.save(tmp_path / "b" / "wide.png")
    Image.new("L", (40, 40), 100).save(tmp_path / "a" / "grey.JPG")
    Image.new("RGBA", (4, 4), (10, 20, 30, 255)).save(tmp_path / "a" / "deep" / "alpha.png")
    Image.new("P", (9, 9), 0).save(tmp_path / "a" / "palette.gif")
    Image.new("I;16", (8, 8), 128 * 256).save(tmp_path / "a" / "sixteen.png")
    (tmp_path / "a" / "sixteen.pgm").write_bytes(b"P5 8 8 65535\n" + bytes([128, 0]) * 64)
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    (tmp_path / ".hidden.png").write_text("not an image either")

    dataset = open_dataset("image_folder", str(tmp_path), 8, 3, 2)
    images, labels = whole(dataset)
    assert [path.name for path in dataset.paths] == [
        "alpha.png",
        "grey.JPG",
        "palette.gif",
        "sixteen.pgm",
        "sixteen.png",
        "wide.png",
    ]
    assert images.shape == (6, 3, 8, 8)
    assert labels.tolist() == [0, 0, 0, 0, 0, 1]
    assert images[0, :, 0, 0].tolist() == [10, 20, 30]
    assert (images[1] - 100.0).abs().max() <= 1
    assert (images[3:5] == 128).all()
    assert images[5].float().mean(dim=(1, 2)).tolist() == pytest.approx([0, 255, 0], abs=5)  # the red is cropped away
    assert whole(open_dataset("image_folder", str(tmp_path), 8, 1, 0))[0].shape == (6, 1, 8, 8)


def test_bad_image_folders(tmp_path):
    with pytest.raises(UserError, match="not a folder"):
        open_dataset("image_folder", str(tmp_path / "none"), 8, 3, 0)
    with pytest.raises(UserError, match="no image"):
        open_dataset("image_folder", str(tmp_path), 8, 3, 0)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    broken = open_dataset("image_folder", str(tmp_path), 8, 3, 0)
    with pytest.raises(UserError, match=r"cannot read the image .*broken\.png"):
        broken[0]


def test_too_many_classes(image_folder):
    with pytest.raises(UserError, match="image_folder has 2 classes, more than the network's 1"):
        open_dataset("image_folder", str(image_folder), 8, 3, 1)


def test_digits_depend_on_their_seed_and_vary():
    images, labels = draw_digits(32, num_images=40, seed=1)
    again, _ = draw_digits(32, num_images=40, seed=1)
    other, _ = draw_digits(32, num_images=40, seed=2)
    assert images.shape == (40, 1, 32, 32)
    assert torch.equal(images, again)
    assert not torch.equal(images, other)
    assert labels.tolist() == [*range(10)] * 4
    assert len({tuple(image.flatten().tolist()) for image in images}) == 40
    assert (images.flatten(1).max(dim=1).values > 200).all()
    many, _ = draw_digits(32, num_images=1000)
    edges = torch.stack([edge.flatten(1).amax(1) for edge in (many[..., 0], many[..., -1], many[..., 0, :], many[..., -1, :])])
    assert (edges > 60).sum() <= 1  # in a thousand: digits are not cut off


@pytest.mark.parametrize(("num_images", "batch_size"), [(10, 4), (3, 8), (5, 5)])
def test_every_epoch_is_a_permutation_of_its_own(num_images, batch_size):
    stream = torch.cat(list(islice(shuffled_batches(num_images, batch_size, seed=0), 5 * num_images)))
    epochs = stream.split(num_images)[:5]
    assert all(sorted(epoch.tolist()) == list(range(num_images)) for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) > 1


@pytest.mark.parametrize("first_step", [1, 2, 3, 7])
def test_batches_do_not_depend_on_where_a_run_starts(first_step):
    whole_run = list(islice(shuffled_batches(10, 4, seed=3), 12))
    resumed = list(islice(shuffled_batches(10, 4, seed=3, first_step=first_step), 12 - first_step))
    assert all(torch.equal(a, b) for a, b in zip(whole_run[first_step:], resumed, strict=True))


def test_streamed_and_resident_batches_are_the_same(image_folder):
    dataset = open_dataset("image_folder", str(image_folder), 8, 3, 2)
    resident, streamed = (batches(dataset, 4, seed=0, first_step=1, device=CPU, max_resident_mb=mb) for mb in (1, 0))
    for (a, a_labels), (b, b_labels) in islice(zip(resident, streamed), 7):
        assert torch.equal(a, b)
        assert torch.equal(a_labels, b_labels)
        assert Counter((image.float().mean() > 127).long().item() for image in a) == Counter(a_labels.tolist())


class Slow:
    """Images that take a hundredth of a second each."""

    def __getitem__(self, index: int):
        time.sleep(0.01)
        return torch.full((1, 2, 2), index, dtype=torch.uint8), 0


def test_a_stream_closes_at_once_whatever_it_has_begun_to_read():
    stream = streamed_batches(Slow(), iter([torch.arange(2)] + [torch.arange(100)] * 99), CPU, num_readers=2)
    assert next(stream)[0].flatten(1)[:, 0].tolist() == [0, 1]
    began = time.monotonic()
    stream.close()
    assert time.monotonic() - began < 0.5  # the batches asked for would take a second


def test_a_broken_image_in_a_stream_is_one_line(image_folder):
    (image_folder / "dark" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    dataset = open_dataset("image_folder", str(image_folder), 8, 3, 2)
    with pytest.raises(UserError, match=r"^cannot read the image .*broken\.png") as error:
        list(islice(batches(dataset, 4, seed=0, first_step=0, device=CPU, max_resident_mb=0), 10))
    assert "\n" not in str(error.value)
