"""Data sets and batches."""

import time
import types
import zlib
from collections import Counter
from itertools import islice

import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset

from lab import config as configs
from lab import data
from lab.cli import UserError
from lab.data import (
    as_tensors,
    batches,
    draw_digits,
    from_pil,
    open_dataset,
    root_mean_square,
    shuffled_batches,
    to_model_range,
    to_pil,
    to_uint8,
)
from lab.distributed import World

CPU = torch.device("cpu")


def config(dataset: str, root: object, resolution: int, channels: int, label_dim: int = 0) -> configs.Config:
    options = {"dataset": dataset, "root": str(root), "resolution": resolution, "channels": channels}
    network = {"label_dim": label_dim, "channel_mult": [1], "attn_resolutions": []}
    return configs.from_dict({"data": options, "network": network}, "x", "x")


def test_grey_levels_survive_the_round_trip():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_model_range(levels)), levels)
    assert to_model_range(levels).aminmax() == (-1, 1)
    assert to_uint8(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_pixels_keep_their_place_between_pillow_and_tensors(mode):
    image = Image.effect_noise((5, 3), 100).convert(mode)
    image.putpixel((4, 1), 77 if mode == "L" else (10, 20, 30))
    tensor = from_pil(image)
    assert tensor.shape == (len(mode), 3, 5)
    assert tensor[:, 1, 4].tolist() == ([77] if mode == "L" else [10, 20, 30])
    assert to_pil(tensor).tobytes() == image.tobytes()


# Data sets of torchvision


def test_mnist_is_padded_with_black_and_never_interpolated(mnist_folder):
    images, labels = as_tensors(open_dataset(config("mnist", mnist_folder, 28, 1)))
    assert images.shape == (20, 1, 28, 28)
    assert images[:, 0, 5, 5].tolist() == [10 * place for place in range(20)]
    assert labels.tolist() == [*range(10)] * 2
    padded, _ = as_tensors(open_dataset(config("mnist", mnist_folder, 33, 1)))
    assert padded.dtype == torch.uint8
    assert torch.equal(padded[:, :, 2:30, 2:30], images)
    assert padded.long().sum() == images.long().sum()  # nothing but black outside
    test, test_labels = as_tensors(open_dataset(config("mnist", mnist_folder, 33, 1), test=True))
    assert torch.equal(test, padded.flip(0))
    assert torch.equal(test_labels, labels.flip(0))
    colour, _ = as_tensors(open_dataset(config("mnist", mnist_folder, 28, 3)))
    assert torch.equal(colour, images.expand(-1, 3, -1, -1))


def test_missing_data_are_downloaded_into_any_folder(tmp_path, monkeypatch):
    asked = []

    class Downloaded:
        data, targets = torch.full((2, 28, 28), 7, dtype=torch.uint8), [3, 4]

        def __init__(self, root: str, train: bool, download: bool):
            asked.append((root, train, download))
            print("a mirror")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torchvision.datasets.FashionMNIST", Downloaded)
    for root in (tmp_path / "elsewhere", "../beside"):
        images, labels = as_tensors(open_dataset(config("fashion_mnist", root, 28, 1)))
        assert (images.unique().tolist(), labels.tolist()) == ([7], [3, 4])
    assert asked == [(str(tmp_path / "elsewhere"), True, True), ("../beside", True, True)]


def test_a_failed_download_names_the_ways_out(tmp_path, monkeypatch):
    monkeypatch.setattr("torchvision.datasets.MNIST.mirrors", ["http://127.0.0.1:1/"])
    with pytest.raises(UserError, match=r"Error downloading.*--data_root.*data\.dataset=digits") as error:
        open_dataset(config("mnist", tmp_path, 32, 1))
    assert "\n" not in str(error.value)


def test_colour_turns_to_grey_by_luma(monkeypatch):
    pixels = (255 * torch.eye(3)).byte()[:, None, None].expand(3, 32, 32, 3).numpy()
    cifar = types.SimpleNamespace(data=pixels, targets=[0, 1, 2])
    monkeypatch.setattr("torchvision.datasets.CIFAR10", lambda *args, **kwargs: cifar)
    colour, grey = (as_tensors(open_dataset(config("cifar10", "x", 32, channels)))[0] for channels in (3, 1))
    assert colour[:, :, 0, 0].tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    assert grey[:, :, 5, 7].tolist() == [[76], [150], [29]]


# Folders of images


def test_an_image_folder_crops_the_centre_resizes_and_takes_every_kind_of_image(tmp_path):
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

    dataset = open_dataset(config("image_folder", tmp_path, 8, 3, 2))
    images, labels = as_tensors(dataset)
    names = ["alpha.png", "grey.JPG", "palette.gif", "sixteen.pgm", "sixteen.png", "wide.png"]
    assert [path.name for path in dataset.paths] == names
    assert images.shape == (6, 3, 8, 8)
    assert labels.tolist() == [0, 0, 0, 0, 0, 1]
    assert images[0, :, 0, 0].tolist() == [10, 20, 30]
    assert (images[1] - 100.0).abs().max() <= 1
    assert (images[3:5] == 128).all()
    assert images[5].float().mean(dim=(1, 2)).tolist() == pytest.approx([0, 255, 0], abs=5)  # the red is cropped away
    assert as_tensors(open_dataset(config("image_folder", tmp_path, 8, 1)))[0].shape == (6, 1, 8, 8)


def test_a_bad_image_folder_is_one_line(tmp_path, image_folder):
    with pytest.raises(UserError, match="not a folder"):
        open_dataset(config("image_folder", tmp_path / "none", 8, 3))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no image"):
        open_dataset(config("image_folder", tmp_path / "empty", 8, 3))
    with pytest.raises(UserError, match="image_folder has 2 classes, more than the network's 1"):
        open_dataset(config("image_folder", image_folder, 8, 3, 1))


HEADER = b"IHDR" + (100_000).to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])
PNG = b"\x89PNG\r\n\x1a\n"
BAD_IMAGES = {
    "truncated": (PNG + b" and no more", "cannot identify image file"),
    "huge": (
        PNG + b"\0\0\0\x0d" + HEADER + zlib.crc32(HEADER).to_bytes(4, "big") + b"\0\0\0\0IDAT\x35\xaf\x06\x1e",
        "Image size .* exceeds",
    ),
    "a program": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(bomb) run\n",
        "cannot identify image file",
    ),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_a_bad_image_is_one_line(name, image_folder):
    content, message = BAD_IMAGES[name]
    (image_folder / "dark" / "x.png").write_bytes(content)
    for resident_mb in (1, 0):
        options = configs.with_overrides(
            config("image_folder", image_folder, 8, 3), [f"data.max_resident_mb={resident_mb}"], "x"
        )
        with pytest.raises(UserError, match=rf"^cannot read the image .*x\.png: {message}") as error:
            list(islice(batches(open_dataset(options), options, 0, CPU, World()), 2))
        assert "\n" not in str(error.value)


# The embedded digits, and the scale of data


def test_digits_depend_on_their_seed_and_vary():
    images, labels = draw_digits(32, num_images=40, seed=1)
    assert images.shape == (40, 1, 32, 32)
    assert torch.equal(images, draw_digits(32, num_images=40, seed=1)[0])
    assert not torch.equal(images, draw_digits(32, num_images=40, seed=2)[0])
    assert labels.tolist() == [*range(10)] * 4
    assert len(images.unique(dim=0)) == 40
    assert (images.flatten(1).amax(dim=1) > 200).all()
    many, _ = draw_digits(32, num_images=1000)
    edges = torch.stack([many[..., 0], many[..., -1], many[..., 0, :], many[..., -1, :]])
    assert (edges.amax(dim=(2, 3)) > 60).sum() <= 1  # in a thousand: digits are not cut off


def test_the_root_mean_square_is_that_of_all_pixels(mnist_folder, image_folder, monkeypatch):
    for options in (config("mnist", mnist_folder, 32, 1), config("image_folder", image_folder, 8, 3)):
        dataset = open_dataset(options)
        expected = to_model_range(as_tensors(dataset)[0]).double().square().mean().sqrt().item()
        assert root_mean_square(dataset) == pytest.approx(expected, rel=1e-6)
        measured = configs.with_overrides(options, ["preconditioning.sigma_data=auto"], "x")
        assert data.with_measured_sigma_data(measured, dataset).preconditioning.sigma_data == root_mean_square(dataset)
        assert data.with_measured_sigma_data(options, dataset) is options

    class Many(Dataset):
        def __len__(self):
            return 30_000

        def __getitem__(self, place: int):
            seen.append(place)
            return torch.full((1, 2, 2), 255 * (place % 3 > 0), dtype=torch.uint8), 0

    seen = []
    assert root_mean_square(Many()) == 1
    assert (len(seen), seen[0], seen[-1]) == (10_000, 0, 29_997)


# Batches


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


def test_batches_are_the_same_streamed_resident_and_divided(tiny):
    def first_seven(*overrides: str, world: World | None = None):
        options = configs.load(tiny, overrides)
        return list(islice(batches(open_dataset(options), options, 1, CPU, world or World()), 7))

    resident, streamed = first_seven(), first_seven("data.max_resident_mb=0")
    parts = [first_seven(world=World(rank=rank, size=2)) for rank in range(2)]
    assert not torch.equal(resident[0][0], first_seven("training.seed=1")[0][0])
    for whole, *others in zip(resident, streamed, zip(*parts)):
        for kind in range(2):
            assert torch.equal(whole[kind], others[0][kind])
            assert torch.equal(whole[kind], torch.cat([part[kind] for part in others[1]]))
        assert Counter((image.float().mean() > 127).long().item() for image in whole[0]) == Counter(whole[1].tolist())


def test_a_stream_closes_without_reading_what_it_has_asked_for():
    read = []

    class Slow(Dataset):
        def __getitem__(self, index: int):
            time.sleep(0.01)
            read.append(index)
            return torch.full((1, 2, 2), index, dtype=torch.uint8), 0

    stream = data.streamed_batches(Slow(), iter([torch.arange(2)] + [torch.arange(100)] * 99), CPU, num_readers=2)
    assert next(stream)[0].flatten(1)[:, 0].tolist() == [0, 1]
    stream.close()
    assert len(read) < 50  # of the 200 images of two batches ahead
