"""sample.py: from a checkpoint and seeds to images, and the lines that end in none."""

import io
import os
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch
from PIL import Image, ImageSequence

from edm.precond import PreconditionedDenoiser
from lab import checkpoint
from lab.cli import UserError, run_script, seed_list
from lab.data import from_pil
from lab.gallery import FRAME_MS, LAST_FRAME_MS, NUM_FRAMES
from lab.generate import class_labels, grid_columns, load_denoiser

CPU = torch.device("cpu")


def picture(path) -> torch.Tensor:
    with Image.open(path) as image:
        return from_pil(image)


def tile(grid: torch.Tensor, row: int, column: int, size: int = 8) -> torch.Tensor:
    return grid[:, row * (size + 2) + 2 :, column * (size + 2) + 2 :][:, :size, :size]


def near(one: torch.Tensor, other: torch.Tensor, levels: int = 1) -> bool:
    """Whether no pixel is more than a grey level away."""
    return one.shape == other.shape and (one.int() - other.int()).abs().max() <= levels


@pytest.fixture
def grid(script, tmp_path):
    """grid(checkpoint, *arguments) -> the grid that sample.py writes."""

    def call(path, *arguments) -> torch.Tensor:
        code, _, err = script("sample.py", "--checkpoint", path, "--output_dir", "grid", *arguments)
        assert code == 0, err
        return picture(tmp_path / "grid" / "grid.png")

    return call


def enlarged(picture: torch.Tensor, rows: int, columns: int, size: int = 8) -> torch.Tensor:
    """Return the grid in a picture of the gallery: three screen pixels a pixel, at the right and the bottom."""
    height, width = (3 * (count * (size + 2) + 2) for count in (rows, columns))
    return picture[:3, -height::3, -width::3]  # without transparency


def test_grid_single_images_and_animation_agree(grid, trained, tmp_path):
    """With each other, and with the grid that the training run drew."""
    drawn = grid(trained, "--num_samples", 4, "--save_images", "--gif")
    assert torch.equal(drawn, picture(trained.with_name("sample-6.png")))
    folder = tmp_path / "grid"
    assert {path.name for path in folder.iterdir()} == {"grid.png", "images", "reverse.gif"}
    assert sorted(path.name for path in (folder / "images").iterdir()) == [f"00000{seed}.png" for seed in range(4)]
    singles = [picture(folder / "images" / f"00000{seed}.png") for seed in range(4)]
    assert all(torch.equal(tile(drawn, seed // 2, seed % 2), single) for seed, single in enumerate(singles))
    assert len(torch.stack(singles).unique(dim=0)) == 4
    with Image.open(folder / "reverse.gif") as gif:
        durations = [frame.info["duration"] for frame in ImageSequence.Iterator(gif)]
        assert len(durations) == 3  # one for each step
        assert sum(durations[:2]) < NUM_FRAMES * FRAME_MS
        assert durations[2] == LAST_FRAME_MS
        last = enlarged(from_pil(gif.convert("RGB")), rows=2, columns=4)
    for row in range(2):  # x and D(x)
        shown = torch.stack([tile(last, row, column) for column in range(4)])
        assert (shown.float() - torch.stack(singles).float()).abs().mean() < 5  # 256 colours


@pytest.mark.parametrize("batch_size", [1, 3])
def test_an_image_depends_on_its_seed_alone(grid, trained, batch_size):
    drawn = grid(trained, "--seeds", "3,0-1", "--batch_size", batch_size)
    run_grid = picture(trained.with_name("sample-6.png"))
    assert all(near(tile(drawn, i // 2, i % 2), tile(run_grid, seed // 2, seed % 2)) for i, seed in enumerate((3, 0, 1)))


def test_images_that_do_not_fit_into_memory_at_a_time_are_made_in_parts(grid, trained, monkeypatch):
    """One for each seed, in their order, and about the same as together."""
    together, forward, sizes = grid(trained, "--seeds", "5,0-3"), PreconditionedDenoiser.forward, []

    def at_most_two(net, x, *args, **options):
        sizes.append(len(x))
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(net, x, *args, **options)

    monkeypatch.setattr(PreconditionedDenoiser, "forward", at_most_two)
    assert near(grid(trained, "--seeds", "5,0-3"), together)
    assert set(sizes) == {5, 3, 2, 1}


def test_every_sampler_parameter_can_be_set_and_matters(grid, trained):
    churn = "--S_churn 5"
    cases = {"": "sampling_steps 5, sigma_max 3, sigma_min 0.5, rho 2, solver euler, discretization ve, schedule vp, S_churn 5"}
    cases |= {
        "--solver heun": "alpha 0.5",
        "--schedule vp": "scaling vp",
        "--guidance 1000": "clip true, guidance_min 1, guidance_max 1, solver dpmpp_2m",
        "--class 0": "class 1",
        churn: "S_noise 1.5, S_min 1, S_max 1",
    }

    def drawn(arguments: str) -> torch.Tensor:
        return grid(trained, "--seeds", "0-4", *arguments.split())

    plain = {arguments: drawn(arguments) for arguments in cases}
    for arguments, changes in cases.items():
        for change in changes.split(", "):
            assert not torch.equal(drawn(f"{arguments} --{change}"), plain[arguments]), change
    assert torch.equal(drawn(f"{churn} --batch_size 1"), plain[churn])
    assert plain[""].shape[2] == 2 * 10 + 2  # a column for each class; a square grid would have three
    assert torch.equal(drawn("--guidance 0 --class 1"), drawn("--guidance 0 --class 0"))


def test_a_worse_checkpoint_guides(grid, trained):
    """With weight 0 the images are the guide's own, whose sampler is not used."""
    guide = trained.with_name("diffusion-3.pt")
    arguments = ("--seeds", "0-4", "--class", 1)
    plain, other = grid(trained, *arguments), grid(guide, *arguments)
    assert torch.equal(grid(trained, *arguments, "--guide", guide, "--guidance", 0), other)
    assert torch.equal(grid(trained, *arguments, "--guide", guide, "--guidance", 9, "--guidance_min", 100), plain)
    strong = grid(trained, *arguments, "--guide", guide, "--guidance", 9)
    assert not near(strong, plain) and not near(strong, grid(trained, *arguments, "--guidance", 9))


def test_a_network_without_classes_is_guided_and_an_export_names_its_guide(script, grid, train, tiny, tmp_path):
    path = train(tiny, "network.label_dim=0", "loss.label_dropout=0") / "diffusion-6.pt"
    guide = path.with_name("diffusion-3.pt").relative_to(tmp_path)
    guided = grid(path, "--guide", guide, "--guidance", 9)
    assert not near(guided, grid(path))
    assert script("sample.py", "--checkpoint", path, "--guide", guide, "--guidance", 9, "--export", "small.safetensors")[0] == 0
    assert not [name for name in checkpoint.load(tmp_path / "small.safetensors")["ema"] if "guide" in name]
    assert near(grid("small.safetensors"), guided, levels=4)
    assert not near(grid("small.safetensors", "--guide", "null", "--guidance", 1), guided, levels=4)
    (tmp_path / guide).unlink()  # the guide of a guide is not read
    assert near(grid(path, "--guide", "small.safetensors", "--guidance", 0), grid(path), levels=2)


def test_exported_weights_give_the_same_images(script, grid, trained, tmp_path):
    assert script("sample.py", "--checkpoint", trained, "--export", "small.safetensors")[0] == 0
    assert (tmp_path / "small.safetensors").stat().st_size < 0.2 * trained.stat().st_size
    assert near(grid(trained), grid("small.safetensors"), levels=2)
    assert "1 images of 1 in" in script("sample.py", "--checkpoint", "small.safetensors", "--num_samples", 1)[1]
    assert (tmp_path / "output/image/image_folder/sample/tiny/grid.png").exists()


def test_the_published_example_draws_its_picture(grid, root, tmp_path):
    """The committed picture holds seeds 0 to 59 in ten columns; these are three of them."""
    grid(root / "assets" / "edm_small.safetensors", "--seeds", "0,7,34", "--save_images")
    committed = enlarged(picture(root / "assets" / "edm_small.png"), rows=6, columns=10, size=32)
    for seed in (0, 7, 34):
        expected = tile(committed, seed // 10, seed % 10, 32)
        assert expected.float().std() > 30
        assert near(picture(tmp_path / "grid" / "images" / f"{seed:06d}.png").expand(3, -1, -1), expected)


def test_a_network_of_iddpm_samples_along_the_chain(train, grid, tiny):
    """With DDPM's sampler, which adds noise, and with DDIM, which is Euler's method at the chain's noise levels."""
    path = train(tiny, "preconditioning.formulation=iddpm", "training.num_training_steps=1") / "diffusion-1.pt"
    drawn = [grid(path, "--solver", solver, "--sampling_steps", 8, "--clip", "true") for solver in ("ancestral", "ddim")]
    assert all(image.float().std() > 10 for image in drawn)
    assert not near(*drawn, levels=9)


def test_a_configs_auto_is_what_training_measured(trained, tmp_path, grid):
    contents = checkpoint.load(trained)
    contents["config"]["preconditioning"]["sigma_data"] = 0.7
    checkpoint.save(tmp_path / "x.pt", contents)
    (tmp_path / "auto.yaml").write_text(f"base: {trained.parents[4] / 'tiny.yaml'}\npreconditioning: {{sigma_data: auto}}\n")
    assert load_denoiser(tmp_path / "x.pt", tmp_path / "auto.yaml", [], CPU)[0].preconditioning.sigma_data == 0.7
    assert torch.equal(grid("x.pt", "--config_path", "auto.yaml"), grid("x.pt"))
    contents["config"]["preconditioning"]["sigma_data"] = "auto"
    checkpoint.save(tmp_path / "x.pt", contents)
    with pytest.raises(UserError, match="does not say what auto was measured to be; give the number"):
        load_denoiser(tmp_path / "x.pt", None, [], CPU)


BAD_CALLS = {
    f"--checkpoint {'x' * 300}": "there is no checkpoint",
    "--checkpoint none.pt": "there is no checkpoint none.pt",
    "--checkpoint none.pt --seeds 5-3": "'5-3' is neither a seed nor a range",
    "--checkpoint none.pt --seeds 1,1": "names a seed twice",
    "--checkpoint none.pt --seeds 0-4294967295": "more than a million",
    "--checkpoint none.pt --chekpoint": "did you mean --checkpoint",
    "--checkpoint none.pt --device cuda:99": "'cuda:99' is not on this machine; allowed: cpu",
    "TRAINED --class 2": "2 is not a class of",
    "TRAINED --rho 0.005": "sampler.rho: must be greater than or equal to 0.1, not 0.005",
    "TRAINED --sigma_min 99": "sigma_min 99 must be below sigma_max 80",
    "TRAINED --export .": "cannot write",
    "TRAINED --output_dir tiny.yaml": "cannot write",
    "TRAINED --config_path none.yaml": "cannot read the config none.yaml: No such file",
    "TRAINED --config_path other.yaml": "of another network than the config's",
    "TRAINED --solver dpmpp_2m --S_churn 1": "sampler.S_churn: the solver dpmpp_2m has no churn; set S_churn to 0",
    "TRAINED --guide none.pt --guidance 2": "sampler.guide: there is no checkpoint none.pt",
    "TRAINED --guide tiny.yaml --guidance 2": "tiny.yaml is damaged, or not a checkpoint",
    "TRAINED --guide GUIDE": "sampler.guide: with sampler.guidance 1 the guide is not used; choose another",
    "TRAINED --guide SELF --guidance 2": "cannot guide itself",
}
OTHER_GUIDES = {
    "data.resolution=16": "has data.resolution=16, and the network that it would guide 8",
    "data.channels=1": "has data.channels=1, and the network that it would guide 3",
    "network.label_dim=3": "has network.label_dim=3, and the network that it would guide 2",
    "preconditioning.formulation=ve": "has preconditioning.formulation=ve, and the network that it would guide edm",
}


def test_a_bad_call_ends_in_one_line_and_exit_code_2(script, tmp_path, tiny, trained):
    (tmp_path / "other.yaml").write_text("base: tiny.yaml\nnetwork: {model_channels: 16}\n")
    for call, message in BAD_CALLS.items():
        call = call.replace("TRAINED", f"--checkpoint {trained}").replace("GUIDE", str(trained.with_name("diffusion-3.pt")))
        call = call.replace("SELF", str(trained))
        code, out, err = script("sample.py", *call.split())
        assert (code, out, err.count("\n")) == (2, "", 1), call
        assert message in err
    assert not list(tmp_path.glob("output/**/*.png"))


def test_a_guide_of_other_images_classes_or_noise_levels_is_one_line(script, train, tiny, trained):
    for place, (override, message) in enumerate(OTHER_GUIDES.items()):
        guide = train(tiny, override, "network.attn_resolutions=[]", "--num_training_steps", 1, output=str(place))
        guide /= "diffusion-1.pt"
        code, _, err = script("sample.py", "--checkpoint", trained, "--guide", guide, "--guidance", 2)
        assert (code, err.count("\n")) == (2, 1)
        assert f"sampler.guide: {guide} {message}" in err


def test_guides_of_another_chain_are_refused(script, train, tiny):
    chain = ["preconditioning.formulation=ddpm", "loss.noise_distribution=ddpm", "--num_training_steps", 1]
    path, guide = (
        train(tiny, *chain, f"chain.num_timesteps={count}", output=str(count)) / "diffusion-1.pt" for count in (100, 200)
    )
    code, _, err = script("sample.py", "--checkpoint", path, "--guide", guide, "--guidance", 2)
    assert (code, err.count("\n")) == (2, 1)
    assert "was trained with preconditioning.formulation=ddpm chain.betas=linear chain.num_timesteps=200" in err


def test_seeds_and_classes():
    """Classes take turns by seed, and have a column each where that fills the grid."""
    assert seed_list("0-3,100,4294967295") == [0, 1, 2, 3, 100, 4294967295]
    assert class_labels([0, 1, 5], 3).argmax(dim=1).tolist() == [0, 1, 2]
    assert class_labels([0, 1, 5], 3, class_index=2).argmax(dim=1).tolist() == [2, 2, 2]
    assert class_labels([0, 1], 0) is None
    assert grid_columns([3, 4, 5, 6], 3) == 3
    others = ([0, 2, 1], 3), ([0, 1, 2], 3, 1), (list(range(50)), 50)
    assert [grid_columns(*arguments) for arguments in others] == [None] * 3


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_characters_that_the_terminal_lacks_are_escaped(monkeypatch, encoding):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding=encoding))

    def main():
        print("日本 \udcff")
        raise UserError("no 日本")

    with pytest.raises(SystemExit, match="2"):
        run_script(main)
    for stream, line in ((sys.stdout, rb"\u65e5\u672c \udcff"), (sys.stderr, rb"error: no \u65e5\u672c")):
        stream.flush()
        assert stream.buffer.getvalue() == line + b"\n"


def test_pictures_are_drawn_whatever_backend_matplotlib_is_told_to_use(root):
    command = [sys.executable, "-c", "from lab import cli, pictures; cli.run_script(pictures.style().__enter__)"]
    ended = subprocess.run(command, cwd=root, env={**os.environ, "MPLBACKEND": "bogus"}, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("a line\nand \x1b[2J more of it, " + "x" * 2000), 2, "error: a line and ?[2J more of it, xxx"),
        (KeyboardInterrupt(), 130, "\nInterrupted."),
        (UnicodeEncodeError("ascii", "日本", 0, 2, "no"), 2, "error: file names cannot hold '日本' in the encoding ascii; set"),
    ],
    ids=["error", "interrupt", "encoding"],
)
def test_an_error_is_one_line_and_an_interrupt_has_its_own_code(capsys, error, code, said):
    with pytest.raises(SystemExit) as stop:
        run_script(Mock(side_effect=error))
    err = capsys.readouterr().err
    assert (stop.value.code, err.count("\n")) == (code, said.count("\n") + 1)
    assert err.startswith(said)
    assert len(err) < 1020
