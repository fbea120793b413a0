"""The gallery: what is in its pictures is what the sampler and the data set hold."""

import sys

import pytest
import torch
from test_training import CPU

from edm import checkpoint, gallery
from edm import config as configs
from edm.data import open_dataset, to_model_range, whole
from edm.generate import build_denoiser, generate
from edm.training import train


@pytest.fixture
def trained(tiny, tmp_path, script, monkeypatch, capsys):
    """Call the gallery on a tiny run: trained("classes", ...) -> (exit code, stderr, what was drawn); and its parts."""
    train(configs.load(tiny, ["training.num_training_steps=3", "training.learning_rate=0.01"]), CPU, tmp_path / "output")
    path = tmp_path / "output/image/image_folder/tiny/diffusion-3.pt"
    drawn = {}
    for name in ("save_table", "save_trajectories"):
        draw = getattr(gallery.pictures, name)
        monkeypatch.setattr(gallery.pictures, name, lambda *args, draw=draw: (drawn.update(args=args), draw(*args))[1])

    def call(picture: str, *arguments) -> tuple[int, str, tuple]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["gallery", picture, "--checkpoint", str(path), *map(str, arguments)])
        code = 0
        try:
            gallery.run(gallery.main)
        except SystemExit as stop:
            code = stop.code
        return code, capsys.readouterr().err, drawn.get("args")

    contents = checkpoint.read(path)
    call.config = checkpoint.read_config(contents, path)
    call.denoiser = build_denoiser(call.config, contents["ema"], path).eval()
    return call


def samples(trained, seeds, *overrides, **options) -> torch.Tensor:
    config = configs.from_dict(trained.config.to_dict(), "tiny", "here", overrides)
    return torch.cat([batch[-1] for batch in generate(trained.denoiser, seeds, config, CPU, batch_size=64, **options)])


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether no pixel is more than a grey level away."""
    return one.shape == other.shape and (one.int() - other.int()).abs().max() <= 1


def test_the_filmstrip_pairs_noisy_images_with_what_the_network_makes_of_them(trained, tmp_path):
    code, err, (path, images, rows, columns, _) = trained("filmstrip", "--seeds", "5,2", "sampler.sampling_steps=12")
    assert code == 0, err
    assert path == tmp_path.relative_to(tmp_path) / "output/image/image_folder/gallery/tiny/filmstrip.png"
    assert path.exists()
    assert rows == ["seed 5", "D(x)", "seed 2", "D(x)"]
    assert images.shape[:2] == (4, len(columns)) == (4, 10)
    assert columns[-1] == "0"
    final = samples(trained, [5, 2], "sampler.sampling_steps=12")
    assert close(images[::2, -1], final)
    assert close(images[1::2, -1], final)


@pytest.mark.parametrize("options", [[], ["S_churn=5"], ["solver=euler", "guidance=2"], ["clip=true", "guidance=3"]], ids=str)
def test_what_the_network_makes_of_a_state(trained, options):
    overrides = ["sampler.sampling_steps=5", *(f"sampler.{option}" for option in options)]
    config = configs.from_dict(trained.config.to_dict(), "tiny", "here", overrides)
    states = gallery.reverse_process(trained.denoiser, config, CPU, [5, 2])
    assert len(states) == 5
    for state in states[:-1]:
        with torch.no_grad():
            unconditional, D = (trained.denoiser(state.x, state.sigma, labels) for labels in (None, torch.eye(2)[[1, 0]]))
        D = unconditional + config.sampler.guidance * (D - unconditional)
        torch.testing.assert_close(state.denoised, (D.clamp(-1, 1) if config.sampler.clip == "true" else D).double())
    assert torch.equal(states[-1].denoised, states[-1].x)


def test_trajectories_are_those_of_pixels_in_the_picture(trained):
    code, err, (_, sigma, x, denoised, images, row, columns) = trained("trajectories", "--seeds", "3")
    assert code == 0, err
    assert sigma == sorted(sigma, reverse=True)
    assert x.shape == denoised.shape == (len(sigma), 1, gallery.NUM_PIXELS)
    pixels = to_model_range(images[:, 0, row, columns]).double()
    torch.testing.assert_close(x[-1].clamp(-1, 1), pixels, atol=1 / 255, rtol=0)
    for arguments in (["sampler.sampling_steps=1"], ["--seeds", "0-2"]):
        code, err, _ = trained("trajectories", *arguments)
        assert (code, err) == (2, "error: trajectories are those of one seed, and take 2 or more sampler.sampling_steps\n")


def test_neighbours_are_the_nearest_training_images(trained, image_folder):
    code, err, (_, images, names, _, _) = trained("neighbours", "--seeds", "0-2")
    assert code == 0, err
    data = trained.config.data
    train_images = whole(open_dataset("image_folder", str(image_folder), 8, data.channels, 2))[0]
    assert close(images[:, 0], samples(trained, [0, 1, 2]))
    for row, name in zip(images, names):
        distances = (to_model_range(row[0]) - to_model_range(train_images)).square().mean(dim=(1, 2, 3)).sqrt().sort()
        assert torch.equal(row[1:], train_images[distances.indices[: gallery.NUM_NEIGHBOURS]])
        assert float(name) == pytest.approx(distances.values[0].item(), abs=1e-3)
    for path in sorted(image_folder.glob("*/*.png"))[3:]:
        path.unlink()
    code, err, (_, images, *_) = trained("neighbours", "--seeds", "0-1")
    assert (code, images.shape[:2]) == (0, (2, 4)), err


def test_classes_and_guidance(trained):
    code, err, (_, images, _, columns, _) = trained("classes", "--seeds", "4-6")
    assert code == 0, err
    assert columns == ["0", "1"]
    for index in range(2):
        assert close(images[:, index], samples(trained, [4, 5, 6], class_index=index))
    code, err, (_, images, rows, columns, _) = trained("guidance", "--seeds", "4-6", "sampler.guidance=3")
    assert code == 0, err
    assert columns == ["0", "1", "0"]
    for row, name in zip(images, rows):
        assert close(row, samples(trained, [4, 5, 6], f"sampler.guidance={name.removeprefix('guidance ')}"))
    assert not close(images[0], images[-1])


def test_an_unconditional_network_has_no_classes(tiny, tmp_path, script, monkeypatch, capsys):
    config = configs.load(tiny, ["network.label_dim=0", "loss.label_dropout=0", "training.num_training_steps=1"])
    train(config, CPU, tmp_path / "output")
    path = tmp_path / "output/image/image_folder/tiny/diffusion-1.pt"
    capsys.readouterr()
    for picture in ("classes", "guidance", "film"):
        monkeypatch.setattr(sys, "argv", ["gallery", picture, "--checkpoint", str(path)])
        with pytest.raises(SystemExit) as stop:
            gallery.run(gallery.main)
        err = capsys.readouterr().err
        assert stop.value.code == 2
        assert err.count("\n") == 1
        assert ("unconditional" if picture != "film" else "invalid choice") in err
