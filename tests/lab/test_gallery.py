"""`python -m lab.gallery` and lab/pictures.py: what is in the pictures is what the sampler and the data set hold."""

import math
import shutil

import matplotlib
import pytest
import torch
from PIL import Image

from edm.precond import PreconditionedDenoiser
from edm.sampler import State
from lab import config as configs
from lab import gallery, pictures
from lab.data import as_tensors, from_pil, open_dataset, to_model_range
from lab.generate import generate, load_denoiser

CPU = torch.device("cpu")


@pytest.fixture
def draw(script, trained, tmp_path, monkeypatch):
    """draw("classes", *arguments) -> what was drawn, as arguments of pictures.save_table or save_trajectories."""
    drawn = []
    for name in ("save_table", "save_trajectories"):
        save = getattr(pictures, name)
        monkeypatch.setattr(pictures, name, lambda *args, save=save: (drawn.append(args), save(*args)))

    def call(picture: str, *arguments, checkpoint=trained) -> tuple:
        drawn.clear()
        code, out, err = script("lab/gallery.py", picture, "--checkpoint", checkpoint, *arguments)
        assert code == 0, err
        ((path, *shown),) = drawn
        assert str(path) == f"output/image/image_folder/gallery/tiny/{picture}.png"
        assert f"the picture is {path}" in out
        with Image.open(tmp_path / path) as image:
            assert min(image.size) > 60
        return tuple(shown)

    return call


@pytest.fixture
def samples(trained):
    """samples(seeds, *overrides, class_index=None) -> (B, C, H, W), as `generate` makes them."""

    def call(seeds: list[int], *overrides: str, class_index: int | None = None) -> torch.Tensor:
        config, denoiser, _ = load_denoiser(trained, None, list(overrides), CPU)
        return torch.cat(list(generate(denoiser, seeds, config, CPU, 64, class_index=class_index)))

    return call


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether no pixel is more than a grey level away."""
    return one.shape == other.shape and (one.int() - other.int()).abs().max() <= 1


def test_the_pixels_of_a_table_are_squares_of_three_by_three(tmp_path):
    """Exactly, with names and without, so that a picture can be taken apart again."""
    images = torch.randint(0, 256, (2, 3, 1, 5, 8), generator=torch.Generator().manual_seed(0)).byte()
    table = pictures.grid(images.flatten(0, 1), columns=3)
    for names in (([], [], ""), (["a", "a long name"], ["x", "y", "z"], "title")):
        pictures.save_table(tmp_path / "table.png", images, *names)
        with Image.open(tmp_path / "table.png") as image:
            drawn = from_pil(image.convert("RGB"))[:, -3 * table.shape[1] :, -3 * table.shape[2] :]
        assert torch.equal(drawn, table.repeat_interleave(3, dim=1).repeat_interleave(3, dim=2))


def test_the_style_is_used_and_left_again(tmp_path, monkeypatch):
    before = dict(matplotlib.rcParams)
    figures = []
    monkeypatch.setattr(pictures, "save_figure", lambda path, figure: figures.append(figure))
    points = [(1, 2, 1), (3, 1, 0)]
    pictures.save_sweep(
        tmp_path / "x.png", {"ddim": points, "heun": points, "heun, S_churn 4": points}, points, 1.0, "distance"
    )
    left, right = (axes.containers for axes in figures[0].axes)  # with error bars, and churn in the solver's colour
    assert len(left) == 3 and len({bars.lines[0].get_color() for bars in left}) == 2
    assert [bars.lines[0].get_linestyle() for bars in (*left, *right)] == ["-", "-", "--", "--"]
    assert {bars.lines[0].get_color() for bars in (*left[1:], *right)} == {left[1].lines[0].get_color()}
    assert figures[0].dpi == 128
    assert not figures[0].axes[0].spines["top"].get_visible()
    assert dict(matplotlib.rcParams) == before


def test_states_are_shown_where_the_shape_is_decided():
    sigma = torch.linspace(80**0.25, 0, 400) ** 4
    states = [State(torch.zeros(()), level, torch.zeros(())) for level in sigma.tolist()]
    places = gallery.shown(states, 50)
    assert len(places) == 50 and places == sorted(places)
    assert (places[0], places[-1]) == (0, len(states) - 1)
    assert sum(1 <= states[place].sigma <= 5 for place in places) == pytest.approx(20, abs=1)
    assert gallery.shown(states[-1:], 3) == [0, 0, 0]


def test_a_grid_has_a_column_for_each_class_where_they_take_turns(draw, samples):
    images, rows, columns, title = draw("grid", "--seeds", "4-8")
    assert (rows, columns, title) == ([], ["0", "1"], "class")
    assert close(images.flatten(0, 1)[:5], samples([4, 5, 6, 7, 8]))
    assert images.shape[:2] == (3, 2) and not images[2, 1].any()
    images, _, columns, title = draw("grid", "--seeds", "0,2,4,6,8")
    assert (images.shape[:2], columns, title) == ((2, 3), [], "")


def test_the_filmstrip_pairs_noisy_images_with_what_the_network_makes_of_them(draw, samples):
    images, rows, columns, _ = draw("filmstrip", "--seeds", "5,2", "sampler.sampling_steps=12")
    assert rows == ["seed 5", "D(x)", "seed 2", "D(x)"]
    assert images.shape[:2] == (4, len(columns))
    assert 6 <= len(columns) <= 10
    assert [float(name) for name in columns] == sorted(map(float, columns), reverse=True)
    assert columns[-1] == "0"
    assert close(images[:, -1], samples([5, 2], "sampler.sampling_steps=12").repeat_interleave(2, dim=0))
    assert not close(images[::2, 0], images[1::2, 0])


@pytest.mark.parametrize("options", [["S_churn=5"], ["solver=euler", "guidance=2"], ["clip=true", "guidance=1000"]], ids=str)
def test_what_the_network_makes_of_a_state(trained, options):
    """D(x; sigma) at the state's own x, with guidance and clipping; the last state is the sample."""
    overrides = ["sampler.sampling_steps=5", *(f"sampler.{option}" for option in options)]
    config, denoiser, _ = load_denoiser(trained, None, overrides, CPU)
    states = gallery.reverse_process(denoiser, config, CPU, torch.float32, [5, 2])
    assert len(states) == 5
    for state in states[:-1]:
        with torch.no_grad():
            unconditional, D = (denoiser(state.x, state.sigma, labels) for labels in (None, torch.eye(2)[[1, 0]]))
        D = unconditional + config.sampler.guidance * (D - unconditional)
        torch.testing.assert_close(state.denoised, (D.clamp(-1, 1) if config.sampler.clip else D).double())
    assert torch.equal(states[-1].denoised, states[-1].x)


def test_trajectories_are_those_of_pixels_in_the_picture(draw):
    sigma, x, denoised, image, row, columns = draw("trajectories", "--seeds", "3")
    assert sigma == sorted(sigma, reverse=True)
    assert x.shape == denoised.shape == (len(sigma), gallery.NUM_PIXELS)
    pixels = to_model_range(image[0, row, columns]).double()
    torch.testing.assert_close(x[-1].clamp(-1, 1), pixels, atol=1 / 255, rtol=0)


def test_neighbours_are_the_nearest_training_images(draw, samples, image_folder):
    arguments = ("--data_root", image_folder)
    images, names, *_ = draw("neighbours", "--seeds", "0-2", *arguments)
    assert close(images[:, 0], samples([0, 1, 2]))
    data = {"dataset": "image_folder", "root": str(image_folder), "resolution": 8, "channels": 3}
    config = configs.from_dict({"data": data, "network": {"channel_mult": [1], "attn_resolutions": []}}, "x", "x")
    train_images, _ = as_tensors(open_dataset(config))
    for row, name in zip(images, names):
        distances = (to_model_range(row[0]) - to_model_range(train_images)).square().mean(dim=(1, 2, 3)).sqrt().sort()
        assert torch.equal(row[1:], train_images[distances.indices[: gallery.NUM_NEIGHBOURS]])
        assert float(name) == pytest.approx(distances.values[0].item(), abs=1e-3)
    for path in sorted(image_folder.glob("*/*.png"))[3:]:
        path.unlink()
    images, _, columns, _ = draw("neighbours", "--seeds", "0-1", *arguments)
    assert (images.shape[:2], columns) == ((2, 4), ["sample", *["training"] * 3])


def test_nearest_images_are_found_in_parts_of_the_training_images():
    train = torch.randint(0, 256, (1500, 1, 4, 4), generator=torch.Generator().manual_seed(0)).byte()
    places = torch.tensor([3, 1499, 1000])
    distances, found = gallery.nearest_images(train[places], train, 2, CPU)
    assert torch.equal(found[:, 0], places)
    expected = (to_model_range(train[places])[:, None] - to_model_range(train)).square().mean(dim=(2, 3, 4)).sqrt()
    torch.testing.assert_close(distances, expected.sort().values[:, :2])


def test_test_images_are_compared_with_the_training_images_where_there_are_any(script, root, mnist_folder):
    arguments = ("--seeds", "0-2", "--data_root", mnist_folder, "sampler.sampling_steps=2")
    _, out, _ = script("lab/gallery.py", "neighbours", "--checkpoint", root / "assets" / "edm_small.safetensors", *arguments)
    assert " of 3 samples" in out
    assert "  0.000 of 20 test images" in out  # which are the training images in reverse


def test_missing_data_are_noticed_before_anything_is_sampled(script, trained, monkeypatch):
    monkeypatch.setattr("lab.generate.build_sampler", lambda config: pytest.fail("it samples"))
    code, out, err = script("lab/gallery.py", "neighbours", "--checkpoint", trained, "--data_root", "nowhere")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: data.root: 'nowhere' is not a folder")


def test_a_column_for_each_class_and_a_row_for_each_strength_of_guidance(draw, samples):
    images, rows, columns, _ = draw("classes", "--seeds", "4-6")
    assert (rows, columns) == (["seed 4", "seed 5", "seed 6"], ["0", "1"])
    for index in range(2):
        assert close(images[:, index], samples([4, 5, 6], class_index=index))
    images, rows, columns, _ = draw("guidance", "--seeds", "4-6", "sampler.guidance=3")
    assert columns == ["0", "1", "0"]
    for row, name in zip(images, rows):
        assert close(row, samples([4, 5, 6], f"sampler.guidance={name.removeprefix('guidance ')}"))
    assert not torch.equal(images[0], images[-1])


def test_a_guide_of_a_network_without_classes_in_all_strengths(train, tiny, script):
    path = train(tiny, "network.label_dim=0", "loss.label_dropout=0", "training.num_training_steps=3") / "diffusion-3.pt"
    guide = shutil.copy(path, path.with_name("guide.pt"))
    code, out, err = script("lab/gallery.py", "guidance", "--checkpoint", path, "--seeds", "4-6", f"sampler.guide={guide}")
    assert code == 0, err
    assert "the picture is" in out


@pytest.mark.parametrize("picture", gallery.PICTURES)
def test_every_picture_is_drawn_in_the_precision_asked_for(draw, picture, image_folder, monkeypatch):
    forward, seen = PreconditionedDenoiser.forward, set()

    def watch(*args, **options) -> torch.Tensor:
        seen.add((torch.ones(1, 1) @ torch.ones(1, 1)).dtype)
        return forward(*args, **options)

    monkeypatch.setattr(PreconditionedDenoiser, "forward", watch)
    for name, precision in (("no", torch.float32), ("bf16", torch.bfloat16)):
        draw(picture, "--seeds", "0", "--mixed_precision", name, "--data_root", image_folder)
        assert seen == {precision}
        seen.clear()


def test_what_cannot_be_drawn_is_one_line(trained, train, tiny, script):
    overrides = ["network.label_dim=0", "loss.label_dropout=0", "training.num_training_steps=1"]
    unconditional = train(tiny, *overrides) / "diffusion-1.pt"
    for path, arguments, message in (
        (unconditional, "classes", "the network is unconditional and knows no classes"),
        (unconditional, "guidance", "the network is unconditional"),
        (trained, "filmstrip --output_dir tiny.yaml", "cannot write tiny.yaml/filmstrip.png"),
        (trained, "trajectories sampler.sampling_steps=1", "take 2 or more sampler.sampling_steps"),
        (trained, "trajectories --seeds 0-2", "trajectories are drawn for one seed"),
    ):
        picture, *others = arguments.split()
        code, _, err = script("lab/gallery.py", picture, "--checkpoint", path, *others)
        assert (code, err.count("\n")) == (2, 1)
        assert message in err


def test_the_loss_curve_is_drawn(tmp_path):
    """With bands in which no noise level was drawn, and a single step."""
    for steps in (1, 120):
        records = torch.rand(steps, 4, generator=torch.Generator().manual_seed(0)) + 0.1
        records[:, 2] = math.nan
        pictures.save_loss_curve(tmp_path / f"{steps}.png", range(1, steps + 1), records, [0.1, 1])
        with Image.open(tmp_path / f"{steps}.png") as image:
            assert from_pil(image.convert("RGB")).float().std() > 10
