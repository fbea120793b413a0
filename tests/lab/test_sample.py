"""sample.py: from a checkpoint and seeds to images, and the lines that end in none."""

import subprocess
import sys

import pytest
import torch
from PIL import Image

from lab import checkpoint
from lab.cli import UserError, run_script, seed_list
from lab.data import from_pil
from lab.generate import class_labels, grid_columns, load_denoiser

CPU = torch.device("cpu")
SAMPLES = "output/image/image_folder/sample/tiny"


def picture(path) -> torch.Tensor:
    with Image.open(path) as image:
        return from_pil(image)


def tile(grid: torch.Tensor, row: int, column: int, size: int = 8) -> torch.Tensor:
    return grid[:, row * (size + 2) + 2 :, column * (size + 2) + 2 :][:, :size, :size]


def near(one: torch.Tensor, other: torch.Tensor, levels: int = 1) -> bool:
    """Whether no pixel is more than a grey level away."""
    return one.shape == other.shape and (one.int() - other.int()).abs().max() <= levels


def test_grid_single_images_and_animation_agree(script, trained, tmp_path):
    """With each other, and with the grid that the training run drew."""
    code, out, err = script("sample.py", "--checkpoint", trained, "--num_samples", 4, "--save_images", "--gif")
    assert code == 0, err
    assert "4 images of 4 in" in out
    folder = tmp_path / SAMPLES
    assert {path.name for path in folder.iterdir()} == {"grid.png", "images", "reverse.gif"}
    grid = picture(folder / "grid.png")
    assert torch.equal(grid, picture(trained.with_name("sample-6.png")))
    assert sorted(path.name for path in (folder / "images").iterdir()) == [f"00000{seed}.png" for seed in range(4)]
    singles = [picture(folder / "images" / f"00000{seed}.png") for seed in range(4)]
    assert all(torch.equal(tile(grid, seed // 2, seed % 2), single) for seed, single in enumerate(singles))
    assert len(torch.stack(singles).unique(dim=0)) == 4
    with Image.open(folder / "reverse.gif") as gif:
        assert gif.size == (grid.shape[2], grid.shape[1])
        durations = []
        for frame in range(gif.n_frames):
            gif.seek(frame)
            durations.append(gif.info["duration"])
        assert 1 < len(durations) <= 3  # like frames are merged
        assert sum(durations) == 2 * 120 + 1500
        assert (from_pil(gif.convert("RGB")).float() - grid.float()).abs().mean() < 5  # 256 colours


@pytest.mark.parametrize("batch_size", [1, 3])
def test_an_image_depends_on_its_seed_alone(script, trained, tmp_path, batch_size):
    arguments = ("--seeds", "3,0-1", "--batch_size", batch_size, "--save_images", "--output_dir", "b")
    assert script("sample.py", "--checkpoint", trained, *arguments)[0] == 0
    grid = picture(trained.with_name("sample-6.png"))
    for seed in (3, 0, 1):
        assert near(picture(tmp_path / "b" / "images" / f"00000{seed}.png"), tile(grid, seed // 2, seed % 2))


@pytest.fixture
def grid(script, tmp_path):
    """grid(checkpoint, *arguments) -> the grid that sample.py writes."""

    def call(path, *arguments) -> torch.Tensor:
        code, _, err = script("sample.py", "--checkpoint", path, "--output_dir", "grid", *arguments)
        assert code == 0, err
        return picture(tmp_path / "grid" / "grid.png")

    return call


def test_every_sampler_parameter_can_be_set_and_matters(grid, trained):
    def drawn(*arguments) -> torch.Tensor:
        return grid(trained, "--seeds", "0-4", *arguments)

    churn = ("--S_churn", 5)
    plain, churned = drawn(), drawn(*churn)
    for arguments in ("--sampling_steps 5", "--sigma_max 3", "--sigma_min 0.5", "--rho 2", "--solver euler", "--alpha 0.5"):
        assert not torch.equal(drawn(*arguments.split()), plain), arguments
    for arguments in ("--discretization ve", "--schedule vp", "--scaling vp"):
        assert not torch.equal(drawn(*arguments.split()), plain), arguments
    assert not torch.equal(drawn("--guidance", 1000), drawn("--guidance", 1000, "--clip", "true"))
    for arguments in (("--S_noise", 1.5), ("--S_min", 1), ("--S_max", 1)):
        assert not torch.equal(drawn(*churn, *arguments), churned), arguments
    assert not torch.equal(churned, plain)
    assert torch.equal(drawn(*churn, "--batch_size", 1), churned)
    assert plain.shape[2] == 2 * 10 + 2  # a column for each class; a square grid would have three
    assert not torch.equal(drawn("--class", 1), drawn("--class", 0))
    assert torch.equal(drawn("--guidance", 0, "--class", 1), drawn("--guidance", 0, "--class", 0))


def test_exported_weights_give_the_same_images(script, grid, trained, tmp_path):
    assert script("sample.py", "--checkpoint", trained, "--export", "small.pt")[0] == 0
    assert (tmp_path / "small.pt").stat().st_size < 0.2 * trained.stat().st_size
    assert near(grid(trained), grid("small.pt"), levels=2)


def test_the_published_example_draws_its_picture(grid, root, tmp_path):
    """The committed picture holds seeds 0 to 59 in ten columns; these are three of them."""
    grid(root / "assets" / "edm_small.pt", "--seeds", "0,7,34", "--save_images")
    committed = picture(root / "assets" / "edm_small.png")
    assert committed.shape == (3, 6 * 34 + 2, 10 * 34 + 2)
    for seed in (0, 7, 34):
        expected = tile(committed, seed // 10, seed % 10, 32)
        assert expected.float().std() > 30
        assert near(picture(tmp_path / "grid" / "images" / f"{seed:06d}.png").expand(3, -1, -1), expected)


def test_a_network_of_iddpm_samples_along_the_chain(train, grid, tiny):
    """With DDPM's sampler, which adds noise, and with DDIM, which is Euler's method at the chain's noise levels."""
    path = train(tiny, "preconditioning.formulation=iddpm", "training.num_training_steps=1") / "diffusion-1.pt"
    drawn = {
        solver: grid(path, "--solver", solver, "--sampling_steps", 8, "--clip", "true") for solver in ("ancestral", "ddim")
    }
    assert all(image.float().std() > 10 for image in drawn.values())
    assert not near(drawn["ancestral"], drawn["ddim"], levels=9)


def test_a_chains_network_is_not_taken_for_one_of_another_chain(train, script, tiny, tmp_path):
    chain = ["preconditioning.formulation=ddpm", "loss.noise_distribution=ddpm", "chain.num_timesteps=30"]
    path = train(tiny, *chain, "training.num_training_steps=1") / "diffusion-1.pt"
    for other in ("chain: {num_timesteps: 31}\npreconditioning: {formulation: ddpm}", "chain: {num_timesteps: 30}"):
        (tmp_path / "other.yaml").write_text(f"base: tiny.yaml\n{other}\n")
        code, _, err = script("sample.py", "--checkpoint", path, "--config_path", "other.yaml")
        assert code == 2
        expected = (
            "trained with preconditioning.formulation=ddpm chain.betas=linear chain.num_timesteps=30, which cannot be changed"
        )
        assert expected in err


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
    "": "--checkpoint",
    f"--checkpoint {'x' * 300}": "there is no checkpoint",
    "--checkpoint none.pt": "there is no checkpoint none.pt",
    "--checkpoint \x1b[2J.pt": "there is no checkpoint ?[2J.pt",
    "--checkpoint none.pt --seeds 5-3": "'5-3' is neither a seed nor a range",
    "--checkpoint none.pt --seeds 1,1": "names a seed twice",
    "--checkpoint none.pt --seeds 0-4294967295": "more than a million",
    "--checkpoint none.pt --seeds 1 --num_samples 3": "not allowed with",
    "--checkpoint none.pt --chekpoint": "did you mean --checkpoint",
    "--checkpoint none.pt --device cuda:99": "'cuda:99' is not on this machine; allowed: cpu",
    "TRAINED --class 2": "2 is not a class of",
    "TRAINED --rho 0.005": "sampler.rho: must be greater than or equal to 0.1, not 0.005",
    "TRAINED --sigma_min 99": "sigma_min 99 must be below sigma_max 80",
    "TRAINED --export .": "cannot write",
    "TRAINED --output_dir tiny.yaml": "cannot write",
    "TRAINED --config_path none.yaml": "cannot read the config none.yaml: No such file",
    "TRAINED --config_path other.yaml": "of another network than the config's",
}


@pytest.mark.parametrize(("call", "message"), BAD_CALLS.items(), ids=range(len(BAD_CALLS)))
def test_a_bad_call_ends_in_one_line_and_exit_code_2(script, tmp_path, tiny, trained, call, message):
    (tmp_path / "other.yaml").write_text("base: tiny.yaml\nnetwork: {model_channels: 16}\n")
    code, out, err = script("sample.py", *call.replace("TRAINED", f"--checkpoint {trained}").split())
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "output").exists() or not list((tmp_path / "output").rglob("*.png"))


# Parts


def test_seed_lists():
    assert seed_list("0-3,100") == [0, 1, 2, 3, 100]
    assert seed_list("7") == [7]
    assert seed_list("4294967295") == [4294967295]


def test_classes_take_turns_by_seed():
    assert class_labels([0, 1, 5], 3).argmax(dim=1).tolist() == [0, 1, 2]
    assert class_labels([0, 1, 5], 3, class_index=2).argmax(dim=1).tolist() == [2, 2, 2]
    assert class_labels([0, 1], 0) is None
    assert grid_columns([3, 4, 5, 6], 3) == 3
    assert grid_columns([0, 2, 1], 3) is None
    assert grid_columns([0, 1, 2], 3, class_index=1) is None
    assert grid_columns(list(range(50)), 50) is None


def test_an_error_is_one_line_and_an_interrupt_has_its_own_code(capsys):
    def end(error: BaseException):
        raise error

    long = UserError("a line\nand \x1b[2J more of it, " + "x" * 2000), 2, "error: a line and ?[2J more of it, xxx"
    for error, code, said in (long, (KeyboardInterrupt(), 130, "\nInterrupted.")):
        with pytest.raises(SystemExit) as stop:
            run_script(lambda error=error: end(error))
        err = capsys.readouterr().err
        assert stop.value.code == code
        assert err.startswith(said)
        assert err.count("\n") == said.count("\n") + 1
        assert len(err) < 1020


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGPIPE")
def test_a_closed_output_ends_a_script_silently(root):
    code = "from lab.cli import run_script; run_script(lambda: print('x\\n' * 10**6))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "x\n"
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 141
