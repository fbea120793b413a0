"""The two scripts, as a user calls them."""

import os
import signal
import sys

import pytest
import torch
from conftest import ROOT
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from edm import config as configs
from edm.cli import run, seed_list
from edm.errors import UserError

RUN = "output/image/image_folder/tiny"
SAMPLES = "output/image/image_folder/sample/tiny"


def picture(path) -> torch.Tensor:
    with Image.open(path) as image:
        return pil_to_tensor(image)


def cell(grid: torch.Tensor, row: int, column: int, size: int = 8) -> torch.Tensor:
    return grid[:, row * (size + 2) + 2 :, column * (size + 2) + 2 :][:, :size, :size]


@pytest.fixture
def trained(script, tiny, tmp_path):
    code, out, err = script("train_mnist.py", "--config_path", tiny, "--device", "cpu")
    assert code == 0
    assert f"{RUN}/diffusion-6.pt" in out
    assert "6/6" in err  # the progress bar
    return tmp_path / RUN / "diffusion-6.pt"


def test_the_road_from_training_to_samples(script, trained, tiny, tmp_path):
    """Grid, single images and GIF agree with each other, with the training run's own grid, and do not depend on the batch."""
    code, out, _ = script("sample.py", "--checkpoint", trained, "--num_samples", 4, "--save_images", "--gif")
    assert code == 0
    assert all(name in out for name in ("grid.png", "images", "reverse.gif"))
    folder = tmp_path / SAMPLES
    assert {path.name for path in folder.iterdir()} == {"grid.png", "images", "reverse.gif"}
    grid = picture(folder / "grid.png")
    assert torch.equal(grid, picture(trained.with_name("sample-6.png")))
    assert sorted(path.name for path in (folder / "images").iterdir()) == [f"00000{seed}.png" for seed in range(4)]
    singles = [picture(folder / "images" / f"00000{seed}.png") for seed in range(4)]
    for seed, single in enumerate(singles):
        assert torch.equal(cell(grid, seed // 2, seed % 2), single.expand(3, -1, -1))
    assert len({tuple(single.flatten().tolist()) for single in singles}) == 4
    with Image.open(folder / "reverse.gif") as gif:
        assert 1 < gif.n_frames <= 3  # like frames are merged
        assert gif.size == (grid.shape[2], grid.shape[1])
        durations = []
        for frame in range(gif.n_frames):
            gif.seek(frame)
            durations.append(gif.info["duration"])
        assert sum(durations) == 2 * 120 + 1500
        assert (pil_to_tensor(gif.convert("RGB")).float() - grid.float()).abs().mean() < 5  # 256 colours

    for batch_size in (1, 3):
        arguments = (
            "--config_path",
            tiny,
            "--seeds",
            "3,0-1",
            "--batch_size",
            batch_size,
            "--save_images",
            "--output_dir",
            "b",
        )
        assert script("sample.py", "--checkpoint", trained, *arguments)[0] == 0
        for seed in (3, 0, 1):
            other = picture(tmp_path / "b" / "images" / f"00000{seed}.png")
            assert (other.int() - singles[seed].int()).abs().max() <= 1


@pytest.mark.parametrize("tiny", [1], indirect=True, ids=["grey"])
def test_every_sampler_parameter_can_be_set_and_matters(script, trained, tmp_path):
    def grid(*arguments):
        code, _, err = script("sample.py", "--checkpoint", trained, "--seeds", "0-2", *arguments)
        assert code == 0, err
        return picture(tmp_path / SAMPLES / "grid.png")

    churn = ("--S_churn", 5)
    plain, churned = grid(), grid(*churn)
    for arguments in (
        ("--sampling_steps", 5),
        ("--sigma_max", 3),
        ("--sigma_min", 0.5),
        ("--rho", 2),
        ("--solver", "euler"),
        churn,
    ):
        assert not torch.equal(grid(*arguments), plain), arguments
    for arguments in (("--S_noise", 1.5), ("--S_min", 1), ("--S_max", 1)):
        assert not torch.equal(grid(*churn, *arguments), churned), arguments
    assert torch.equal(grid(*churn, "--batch_size", 1), churned)
    wide, narrow = grid("--class", 1), grid("--class", 0)
    assert wide.shape == narrow.shape
    assert plain.shape[2] == 2 * 10 + 2  # a column for each class
    assert torch.equal(grid("--guidance", 0, "--class", 1), grid("--guidance", 0, "--class", 0))


def test_exported_weights_give_the_same_images(script, trained, tmp_path):
    assert script("sample.py", "--checkpoint", trained, "--export", "small.pt")[0] == 0
    assert (tmp_path / "small.pt").stat().st_size < 0.2 * trained.stat().st_size
    for path, folder in ((trained, "a"), ("small.pt", "b")):
        assert script("sample.py", "--checkpoint", path, "--num_samples", 4, "--output_dir", folder)[0] == 0
    a, b = picture(tmp_path / "a/grid.png"), picture(tmp_path / "b/grid.png")
    assert (a.int() - b.int()).abs().max() <= 2
    call = ("train_mnist.py", "--resume_from", "small.pt", "--config_path", "tiny.yaml", "--output_dir", "other")
    code, _, err = script(*call)
    assert code == 2
    assert "--load_model_weights_from_checkpoint" in err


def test_flags_stand_for_config_entries(script, tiny, image_folder, monkeypatch):
    seen = {}
    monkeypatch.setattr("edm.training.train", lambda config, *args, **kwargs: seen.update(config=config))
    flags = (
        "--num_training_steps",
        5,
        "--batch_size",
        2,
        "--save_and_sample_every_n",
        7,
        "--mixed_precision",
        "no",
        "--seed",
        9,
    )
    overrides = ("training.learning_rate=3e-4", "--data_root", "1e3", "ema.rampup_ratio=0.1")
    assert script("train_mnist.py", "--config_path", tiny, *flags, *overrides)[0] == 0
    entries = ["num_training_steps=5", "batch_size=2", "save_and_sample_every_n=7", "mixed_precision=no", "seed=9"]
    entries = [f"training.{entry}" for entry in entries] + [
        "training.learning_rate=3e-4",
        "ema.rampup_ratio=0.1",
        "data.root=1e3",
    ]
    assert seen["config"] == configs.load(tiny, entries)


BAD_CALLS = {
    "train_mnist.py --config_path none.yaml": "cannot read the config none.yaml: No such file",
    "train_mnist.py --config_path tiny.yaml training.learing_rate=1": "did you mean 'training.learning_rate'",
    "train_mnist.py --config_path tiny.yaml --batch_size many": "training.batch_size: must be a whole number, not 'many'",
    "train_mnist.py --config_path tiny.yaml --mixed_precision fp8": "did you mean 'fp16'",
    "train_mnist.py --config_path tiny.yaml --bach_size 3": "did you mean --batch_size",
    "train_mnist.py --config_path tiny.yaml --device cuda:99": "'cuda:99' is not on this machine; allowed: ",
    "train_mnist.py --config_path tiny.yaml --data_root nowhere": "'nowhere' is not a folder",
    "train_mnist.py --config_path tiny.yaml network.label_dim=1": "has 2 classes, more than the network's 1",
    "train_mnist.py --config_path tiny.yaml network.model_channels=48": "cannot be normalised",
    "train_mnist.py --config_path tiny.yaml --resume_from latest": "no whole checkpoint",
    "train_mnist.py --config_path tiny.yaml --resume_from none.pt": "there is no checkpoint none.pt",
    "train_mnist.py --config_path tiny.yaml --resume_from tiny.yaml": "tiny.yaml is damaged, or not a checkpoint",
    "train_mnist.py --config_path tiny.yaml --resume_from a.pt --load_model_weights_from_checkpoint b.pt": "its own weights",
    "train_mnist.py --config_path tiny.yaml training.seed=!!bool": "tags are not allowed",
    f"train_mnist.py --config_path tiny.yaml training.seed={'9' * 400}": "more than 30 digits",
    f"train_mnist.py --config_path {'x' * 300}": "File name too long",
    "sample.py": "--checkpoint",
    f"sample.py --checkpoint {'x' * 300}": "there is no checkpoint",
    "sample.py --checkpoint none.pt": "there is no checkpoint none.pt",
    "sample.py --checkpoint tiny.yaml": "tiny.yaml is damaged, or not a checkpoint",
    "sample.py --checkpoint none.pt --num_samples 0": "'0' is not a whole number from 1 to 1,000,000",
    "sample.py --checkpoint none.pt --seeds 5-3": "'5-3' is neither a seed nor a range",
    "sample.py --checkpoint none.pt --seeds 1,1": "names a seed twice",
    "sample.py --checkpoint none.pt --seeds 0-4294967295": "more than a million",
    "sample.py --checkpoint none.pt --seeds 1 --num_samples 3": "not allowed with",
}


@pytest.mark.parametrize(("call", "message"), BAD_CALLS.items(), ids=range(len(BAD_CALLS)))
def test_bad_calls_end_in_one_line_and_exit_code_2(script, tmp_path, image_folder, call, message):
    from conftest import TINY

    (tmp_path / "tiny.yaml").write_text(TINY.replace("ROOT", str(image_folder)).replace("CHANNELS", "3"))
    code, _, err = script(*call.split())
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "output").exists()


def test_bad_sampling_of_a_good_checkpoint(script, trained):
    for arguments, message in {
        ("--class", 2): "2 is not a class of",
        ("--rho", "x"): "sampler.rho: must be a number, not 'x'",
        ("--sigma_min", 99): "sigma_min 99 must be below sigma_max 80",
        ("--schedule", "vp", "--sigma_min", 30): "no VP schedule rises from 30 to 80",
        ("--rho", 0.005): "sampler.rho: 0.005 is out of range; it must be at least 0.1",
        ("--export", "."): "cannot write",
        ("--solver", "heunn"): "did you mean 'heun'",
        ("--output_dir", trained): "cannot write",
    }.items():
        code, _, err = script("sample.py", "--checkpoint", trained, *arguments)
        assert code == 2
        assert message in err
        assert "Traceback" not in err


@pytest.mark.parametrize("gone", ["closed", "unread"])
def test_a_script_does_its_work_though_nobody_listens(monkeypatch, gone):
    """`>&- 2>&-`, and `| true`."""
    stream = None
    if gone == "unread":
        reader, writer = os.pipe()
        os.close(reader)
        stream = os.fdopen(writer, "w")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(sys, "stderr", stream)
    done = []

    def main():
        print("on the way", flush=True)
        print("there is a problem", file=sys.stderr, flush=True)
        done.append(True)

    run(main)
    assert done


def test_sigterm_ends_a_script_but_does_not_hide_an_error(capfd):
    def signalled():
        os.kill(os.getpid(), signal.SIGTERM)  # as torchrun does when another process has died

    def failing():
        try:
            raise UserError("the reason")
        finally:
            signalled()

    for main, code, said in ((signalled, 143, "Terminated."), (failing, 2, "error: the reason")):
        with pytest.raises(SystemExit) as stop:
            run(main)
        assert (stop.value.code, capfd.readouterr().err.strip()) == (code, said)


def test_seed_lists():
    assert seed_list("0-3,100") == [0, 1, 2, 3, 100]
    assert seed_list("7") == [7]
    assert seed_list("4294967295") == [4294967295]


def test_help_names_every_option_of_the_readme(script):
    for name in ("train_mnist.py", "sample.py"):
        code, out, _ = script(name, "--help")
        assert code == 0
        readme = (ROOT / "README.md").read_text()
        assert all(option in readme for option in out.split() if option.startswith("--") and option != "--help")
