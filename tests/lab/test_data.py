"""Data sets and batches."""

import os
import time
import types
from itertools import islice

import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, TensorDataset

from lab import config as configs
from lab import data
from lab.cli import UserError
from lab.data import as_tensors, batches, open_dataset, root_mean_square, shuffled_batches, to_model_range, to_uint8
from lab.distributed import World

CPU = torch.device("cpu")


def config(dataset: str, root: object, resolution: int, channels: int, label_dim: int = 0) -> configs.Config:
    options = {"dataset": dataset, "root": str(root), "resolution": resolution, "channels": channels}
    network = {"label_dim": label_dim, "channel_mult": [1], "attn_resolutions": []}
    return configs.from_dict({"data": options, "network": network}, "x", "x")


def test_pixels_survive_the_round_trips_to_the_models_range_and_to_pillow():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(to_model_range(levels)), levels)
    assert to_model_range(levels).aminmax() == (-1, 1)
    assert to_uint8(torch.tensor([-9.0, 9.0])).tolist() == [0, 255]
    colour = Image.effect_noise((5, 3), 100).convert("RGB")
    colour.putpixel((4, 1), (10, 20, 30))
    for image, value in ((colour, [10, 20, 30]), (colour.getchannel(1), [20])):
        tensor = data.from_pil(image)
        assert tensor.shape == (len(value), 3, 5)
        assert tensor[:, 1, 4].tolist() == value
        assert data.to_pil(tensor).tobytes() == image.tobytes()


def test_mnist_is_padded_with_black_and_never_interpolated(mnist_folder):
    def read(resolution: int, channels: int = 1, test: bool = False):
        return as_tensors(open_dataset(config("mnist", mnist_folder, resolution, channels), test))

    images, labels = read(28)
    assert torch.equal(images, (10 * torch.arange(20)).byte().view(20, 1, 1, 1).expand(20, 1, 28, 28))
    assert labels.tolist() == [*range(10)] * 2
    padded, _ = read(33)
    assert torch.equal(padded[:, :, 2:30, 2:30], images)
    assert padded.long().sum() == images.long().sum()  # nothing but black outside
    test, test_labels = read(33, test=True)
    assert torch.equal(test, padded.flip(0))
    assert torch.equal(test_labels, labels.flip(0))
    assert torch.equal(read(28, channels=3)[0], images.expand(-1, 3, -1, -1))


def test_missing_data_are_downloaded_into_any_folder(tmp_path, monkeypatch):
    asked = []

    class Downloaded:
        data, targets = torch.full((2, 28, 28), 7, dtype=torch.uint8), [3, 4]

        def __init__(self, root: str, train: bool, download: bool):
            asked.append((root, train, download))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torchvision.datasets.FashionMNIST", Downloaded)
    for root in (tmp_path / "elsewhere", "../beside"):
        images, labels = as_tensors(open_dataset(config("fashion_mnist", root, 28, 1)))
        assert (images.unique().tolist(), labels.tolist()) == ([7], [3, 4])
    assert asked == [(str(tmp_path / "elsewhere"), True, True), ("../beside", True, True)]


def test_colour_turns_to_grey_by_luma(monkeypatch):
    pixels = (255 * torch.eye(3)).byte()[:, None, None].expand(3, 32, 32, 3).numpy()
    cifar = types.SimpleNamespace(data=pixels, targets=[0, 1, 2])
    monkeypatch.setattr("torchvision.datasets.CIFAR10", lambda *args, **kwargs: cifar)
    colour, grey = (as_tensors(open_dataset(config("cifar10", "x", 32, channels)))[0] for channels in (3, 1))
    assert colour[:, :, 0, 0].tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    assert grey[:, :, 5, 7].tolist() == [[76], [150], [29]]


def test_an_image_folder_crops_the_centre_resizes_and_takes_every_kind_of_image(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "deep").mkdir(parents=True)
    wide = Image.new("RGB", (30, 10), (255, 0, 0))  # red, its middle third green
    wide.paste((0, 255, 0), (10, 0, 20, 10))
    wide.save(tmp_path / "b" / "wide.png")
    Image.new("L", (40, 40), 100).save(tmp_path / "a/grey.JPG")
    Image.new("RGBA", (4, 4), (10, 20, 30, 255)).save(tmp_path / "a/deep/alpha.png")
    Image.new("P", (9, 9), 0).save(tmp_path / "a/palette.gif")
    Image.new("I;16", (8, 8), 128 * 256).save(tmp_path / "a/sixteen.png")
    (tmp_path / "a/sixteen.pgm").write_bytes(b"P5 8 8 65535\n" + bytes([128, 0]) * 64)
    for name in ("a/notes.txt", ".hidden.png"):
        (tmp_path / name).write_text("not an image")

    dataset = open_dataset(config("image_folder", tmp_path, 8, 3, 2))
    images, labels = as_tensors(dataset)
    assert [path.stem for path in dataset.paths] == ["alpha", "grey", "palette", "sixteen", "sixteen", "wide"]
    assert (images.shape, labels.tolist()) == ((6, 3, 8, 8), [0, 0, 0, 0, 0, 1])
    means = [[10, 20, 30], [100] * 3, [0] * 3, [128] * 3, [128] * 3, [0, 255, 0]]  # the red is cropped away
    torch.testing.assert_close(images.float().mean(dim=(2, 3)), torch.tensor(means).float(), rtol=0, atol=5)
    assert (images[3:5] == 128).all()
    assert as_tensors(open_dataset(config("image_folder", tmp_path, 8, 1)))[0].shape == (6, 1, 8, 8)


def test_a_missing_or_unfit_data_set_is_one_line(tmp_path, image_folder, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    for name in ("a\0b", tmp_path / "loop"):
        for dataset in ("mnist", "image_folder"):
            with pytest.raises(UserError, match=r"not a folder|could not be downloaded to .* (null byte|symbolic links)"):
                open_dataset(config(dataset, name, 32, 1))
    for folder, message in {"none": "not a folder", "empty": "no image", "images": "has 2 classes, more than .* 1"}.items():
        with pytest.raises(UserError, match=message):
            open_dataset(config("image_folder", tmp_path / folder, 8, 3, 1))
    monkeypatch.setattr("torchvision.datasets.MNIST.mirrors", ["http://127.0.0.1:1/"])
    with pytest.raises(UserError, match=r"^.*Error downloading.*--data_root.*data\.dataset=digits, which needs no download$"):
        open_dataset(config("mnist", tmp_path, 32, 1))


BAD_MNIST = [  # what is written over the start of a file, and what is said
    ("labels", b"\0\0\x08\x01\0\0\0\x14\x0a", "must hold 28 x 28 pixels and a label from 0 to 9"),  # the first is 10
    ("images", b"\0\0\x08\x03\0\0\0\x0a\0\0\0\x1c\0\0\0\x38", "must hold 28 x 28 pixels and a label"),  # 10 of 28 x 56
    ("labels", b"\0\0\x08\x01\0\0\0\x15", "shape"),  # 21, though there are 20
]


@pytest.mark.parametrize(("name", "start", "reason"), BAD_MNIST, ids=["label", "size", "number"])
def test_damaged_mnist_is_one_line(mnist_folder, name, start, reason):
    path = next(mnist_folder.rglob(f"train-{name}*"))
    path.write_bytes(start + path.read_bytes()[len(start) :])
    with pytest.raises(UserError, match=rf"^mnist in '.*MNIST' is damaged or incomplete \(.*{reason}.*--data_root"):
        open_dataset(config("mnist", mnist_folder, 32, 1))


def test_a_folder_of_images_that_cannot_be_read_is_one_line_unless_hidden(image_folder, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if os.path.basename(path) in ("light", ".hidden"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"^cannot read the folder .*/images/light: Permission denied$"):
        open_dataset(config("image_folder", image_folder, 8, 3))
    (image_folder / "light").rename(image_folder / ".hidden")
    assert len(open_dataset(config("image_folder", image_folder, 8, 3))) == 7


def test_an_image_with_damaged_exif_is_one_line(image_folder):
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 3, 72.0  # turned upside down; a resolution
    Image.new("RGB", (8, 8)).save(image_folder / "dark" / "00.jpg", exif=exif)
    content = (image_folder / "dark" / "00.jpg").read_bytes()
    damaged = content.replace(b"\x01\x1a\0\x05", b"\x01\x1a\0\x01")  # the resolution's type
    (image_folder / "dark" / "00.jpg").write_bytes(damaged)
    with pytest.raises(UserError, match=r"^cannot read the image .*00\.jpg: bad operand type"):
        as_tensors(open_dataset(config("image_folder", image_folder, 8, 3)))


PROGRAM = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(bomb) run\n"


@pytest.mark.parametrize("content", [b"\x89PNG\r\n\x1a\n and no more", PROGRAM, None], ids=["truncated", "a program", "huge"])
@pytest.mark.parametrize("resident_mb", [1, 0])
def test_a_bad_image_is_one_line(content, resident_mb, image_folder, monkeypatch):
    if content:
        (image_folder / "dark" / "00.png").write_bytes(content)
    else:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    options = configs.with_overrides(config("image_folder", image_folder, 8, 3), [f"data.max_resident_mb={resident_mb}"], "x")
    message = "cannot identify image file" if content else "Image size .* exceeds"
    with pytest.raises(UserError, match=rf"^cannot read the image .*\d\d\.png: {message}") as error:
        next(batches(open_dataset(options), options, 0, CPU, World()))
    assert "\n" not in str(error.value)


def test_digits_depend_on_their_seed_and_vary():
    images, labels = data.draw_digits(32, num_images=40, seed=1)
    assert images.shape == (40, 1, 32, 32)
    assert torch.equal(images, data.draw_digits(32, num_images=40, seed=1)[0])
    assert labels.tolist() == [*range(10)] * 4
    many, _ = data.draw_digits(32, num_images=500)
    assert len(torch.cat([images, many]).unique(dim=0)) == 540
    assert (many.flatten(1).amax(dim=1) > 200).all()
    edges = torch.stack([many[..., 0], many[..., -1], many[..., 0, :], many[..., -1, :]])
    assert (edges.amax(dim=(2, 3)) > 60).sum() <= 1  # digits are not cut off


def test_the_root_mean_square_is_that_of_all_pixels(mnist_folder, image_folder):
    for options in (config("mnist", mnist_folder, 32, 1), config("image_folder", image_folder, 8, 3)):
        dataset = open_dataset(options)
        expected = to_model_range(as_tensors(dataset)[0]).double().square().mean().sqrt().item()
        assert root_mean_square(dataset) == pytest.approx(expected, rel=1e-6)
        measured = configs.with_overrides(options, ["preconditioning.sigma_data=auto"], "x")
        assert data.with_measured_sigma_data(measured, dataset).preconditioning.sigma_data == root_mean_square(dataset)
        assert data.with_measured_sigma_data(options, dataset) is options
    images = (torch.arange(30_000) % 3).mul(100).byte().view(-1, 1, 1, 1)  # of which every third one is looked at
    assert root_mean_square(TensorDataset(images, images)) == 1


@pytest.mark.parametrize(("num_images", "batch_size"), [(10, 4), (3, 8), (5, 5)])
def test_every_epoch_is_a_permutation_of_its_own_wherever_a_run_starts(num_images, batch_size):
    whole_run = list(islice(shuffled_batches(num_images, batch_size, seed=3), 50))
    epochs = [epoch.tolist() for epoch in torch.cat(whole_run).split(num_images)[:5]]
    assert all(sorted(epoch) == list(range(num_images)) for epoch in epochs)
    assert any(epoch != epochs[0] for epoch in epochs)
    for first_step in (1, 2, 3, 7):
        resumed = shuffled_batches(num_images, batch_size, seed=3, first_step=first_step)
        assert all(map(torch.equal, whole_run[first_step:], resumed))


def test_batches_are_the_same_streamed_resident_and_divided(tiny, same):
    def first_seven(*overrides: str, world: World | None = None):
        options = configs.load(tiny, overrides)
        return list(islice(batches(open_dataset(options), options, 1, CPU, world or World()), 7))

    resident, streamed = first_seven(), first_seven("data.max_resident_mb=0")
    divided = zip(*(first_seven(world=World(rank=rank, size=2)) for rank in range(2)))
    assert not torch.equal(resident[0][0], first_seven("training.seed=1")[0][0])
    for whole, other, parts in zip(resident, streamed, divided):
        assert same(whole, other)
        assert same(whole, [torch.cat(part) for part in zip(*parts)])
        assert torch.equal(whole[0].float().mean(dim=(1, 2, 3)) > 127, whole[1].bool())


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
