"""A whole run: what it leaves behind, how it is resumed, and what it does not write over."""

import json
import math

import pytest
import torch
from PIL import Image
from test_training import CPU, same, trained

from edm import checkpoint
from edm import config as configs
from edm.errors import UserError
from edm.loss import NUM_BANDS
from edm.pictures import running_means
from edm.training import train


@pytest.mark.parametrize("stop_at", [3, 4])
def test_a_resumed_run_equals_one_never_stopped(tiny, tmp_path, stop_at):
    """Weights, average, optimizer and record, bit for bit, dropout and label dropout included."""
    config = configs.load(tiny)
    folder = "image/image_folder/tiny"
    train(config, CPU, tmp_path / "whole")
    first = configs.load(tiny, [f"training.num_training_steps={stop_at}"])
    train(first, CPU, tmp_path / "parts")
    train(config, CPU, tmp_path / "parts", resume_from="latest")
    whole, parts = (checkpoint.read(tmp_path / run / folder / "diffusion-6.pt") for run in ("whole", "parts"))
    assert whole["step"] == 6
    assert same(whole, parts)
    records = [(tmp_path / run / folder / "metrics.jsonl").read_text() for run in ("whole", "parts")]
    assert records[0] == records[1]
    assert [json.loads(line)["step"] for line in records[0].splitlines()] == [1, 2, 3, 4, 5, 6]


def test_a_record_with_a_torn_line_goes_on_where_it_is_whole(tiny, tmp_path):
    folder = tmp_path / "image/image_folder/tiny"
    train(configs.load(tiny, ["training.num_training_steps=3"]), CPU, tmp_path)
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 4}\n\xff{"st')
    train(configs.load(tiny), CPU, tmp_path, resume_from="latest")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]


def test_losses_are_recorded_by_noise_level(tiny, tmp_path):
    """The batch's loss is between those of its bands; the record survives a resume, also that of an older run without bands."""
    folder = tmp_path / "image/image_folder/tiny"
    train(configs.load(tiny, ["training.num_training_steps=3"]), CPU, tmp_path)
    for row in (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()):
        known = [band for band in row["by_noise_level"] if band is not None]
        assert len(row["by_noise_level"]) == NUM_BANDS
        assert min(known) <= row["loss"] * (1 + 1e-6)
        assert max(known) >= row["loss"] * (1 - 1e-6)
    contents = checkpoint.read(folder / "diffusion-3.pt")
    assert contents["losses"].shape == (3, 1 + NUM_BANDS)
    contents["losses"] = contents["losses"][:, 0].clone()
    checkpoint.write(folder / "diffusion-3.pt", contents)
    before = (folder / "metrics.jsonl").read_text().splitlines()
    train(configs.load(tiny), CPU, tmp_path, resume_from="latest")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows[:3]] == [json.loads(line)["loss"] for line in before]
    assert rows[2]["by_noise_level"] == [None] * NUM_BANDS
    assert rows[3]["by_noise_level"] != [None] * NUM_BANDS


def test_running_means_pass_over_what_is_missing():
    records = torch.tensor([[1, math.nan], [2, 4], [6, math.nan], [1, math.inf], [math.inf, 7]], dtype=torch.float64)
    expected = torch.tensor([[1.5, 4], [4, 4], [3.5, math.nan], [1, 7]], dtype=torch.float64)
    torch.testing.assert_close(running_means(records, 2), expected, equal_nan=True)


def test_a_run_leaves_its_pictures_record_and_checkpoints(tiny, tmp_path, capsys):
    config = configs.load(tiny)
    train(config, CPU, tmp_path / "output")
    folder = tmp_path / "output/image/image_folder/tiny"
    names = {"diffusion-3.pt", "diffusion-6.pt", "sample-3.png", "sample-6.png", "metrics.jsonl", "loss.png"}
    assert {path.name for path in folder.iterdir()} == names
    assert "python sample.py --checkpoint" in capsys.readouterr().out
    with Image.open(folder / "sample-6.png") as picture:  # 4 images of 8x8 in a column for each of the two classes
        assert picture.size == (2 * 10 + 2, 2 * 10 + 2)


def test_a_new_run_does_not_write_over_another(tiny, tmp_path):
    config = configs.load(tiny, ["training.num_training_steps=1"])
    train(config, CPU, tmp_path)
    path = tmp_path / "image/image_folder/tiny/diffusion-1.pt"
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"--resume_from latest.*--overwrite"):
        train(config, CPU, tmp_path)
    assert path.read_bytes() == before
    other = ["training.num_training_steps=3", "training.seed=1"]
    with pytest.raises(UserError, match="cannot read the image"):  # a run that never gets to save replaces nothing
        train(configs.load(tiny, [*other, f"data.root={broken_folder(tmp_path)}"]), CPU, tmp_path, overwrite=True)
    assert path.read_bytes() == before
    train(configs.load(tiny, other), CPU, tmp_path, overwrite=True)
    assert checkpoint.saved_steps(path.parent) == [3]


def broken_folder(tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    return tmp_path / "broken"


def test_resuming_from_an_earlier_checkpoint_sets_the_later_ones_aside(tiny, tmp_path):
    """Otherwise "latest" would be a checkpoint of the run that was left."""
    folder = tmp_path / "image/image_folder/tiny"
    train(configs.load(tiny), CPU, tmp_path)
    train(configs.load(tiny, ["training.num_training_steps=4"]), CPU, tmp_path, resume_from=str(folder / "diffusion-3.pt"))
    assert checkpoint.saved_steps(folder) == [3, 4]
    assert (folder / "diffusion-6.pt.old").exists()
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]
    with pytest.raises(UserError, match="at step 4 already"):
        train(configs.load(tiny, ["training.num_training_steps=3"]), CPU, tmp_path, resume_from="latest")


def test_a_damaged_checkpoint_is_passed_over(tiny, tmp_path, capsys):
    config = configs.load(tiny)
    train(config, CPU, tmp_path)
    folder = tmp_path / "image/image_folder/tiny"
    good = checkpoint.read(folder / "diffusion-6.pt")
    (folder / "diffusion-6.pt").write_bytes((folder / "diffusion-6.pt").read_bytes()[:-1000])
    capsys.readouterr()
    train(config, CPU, tmp_path, resume_from="latest")
    assert "diffusion-6.pt is damaged" in capsys.readouterr().out
    assert same(checkpoint.read(folder / "diffusion-6.pt"), good)


def test_starting_from_weights(tiny, tmp_path):
    config = configs.load(tiny)
    learner, _ = trained(config, 3)
    contents = {"step": 3, "name": "tiny", "config": config.to_dict(), **learner.state_dict()}
    checkpoint.write(tmp_path / "weights.pt", contents)
    frozen = configs.load(tiny, ["training.num_training_steps=1", "training.learning_rate=1e-30"])
    train(frozen, CPU, tmp_path, weights_from=str(tmp_path / "weights.pt"))
    started = checkpoint.read(tmp_path / "image/image_folder/tiny/diffusion-1.pt")
    assert started["step"] == 1
    assert same(started["net"], learner.state_dict()["ema"])


def test_resuming_says_what_differs_and_refuses_what_cannot_fit(tiny, tmp_path, capsys):
    train(configs.load(tiny, ["training.num_training_steps=1"]), CPU, tmp_path)
    capsys.readouterr()
    changed = configs.load(tiny, ["training.num_training_steps=2", "training.learning_rate=1e-5", "network.dropout=0.3"])
    train(changed, CPU, tmp_path, resume_from="latest")
    expected = "though with another network.dropout (0.1, now 0.3), training.learning_rate (0.001, now 1e-05)\n"
    assert expected in capsys.readouterr().out
    with pytest.raises(UserError, match=r"diffusion-2.pt with another network.model_channels \(8, now 16\)"):
        train(configs.load(tiny, ["network.model_channels=16"]), CPU, tmp_path, resume_from="latest")
    with pytest.raises(UserError, match="no whole checkpoint"):
        train(configs.load(tiny), CPU, tmp_path / "elsewhere", resume_from="latest")
