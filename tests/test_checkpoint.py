"""Checkpoints: whole or not at all, and never code."""

import os
import pickle
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from torch import nn

from edm import checkpoint
from edm import config as configs
from edm.errors import UserError
from edm.files import write_whole

CONTENTS = {"step": 3, "name": "x", "config": {}, "ema": {"weight": torch.linspace(0, 1, 5000)}}


@pytest.fixture
def path(tmp_path):
    checkpoint.write(tmp_path / "diffusion-3.pt", CONTENTS)
    return tmp_path / "diffusion-3.pt"


def test_round_trip(path):
    contents = checkpoint.read(path)
    assert torch.equal(contents["ema"]["weight"], CONTENTS["ema"]["weight"])
    assert checkpoint.read_config(contents, path) == configs.Config(name="x")
    assert [p.name for p in path.parent.iterdir()] == ["diffusion-3.pt"]


@pytest.mark.parametrize("keep", [0, 10, 1000, -1])
def test_truncated_checkpoints_are_recognised(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"diffusion-3\.pt is damaged"):
        checkpoint.read(path)


def test_a_flipped_byte_anywhere_in_the_weights_is_recognised(path):
    data = path.read_bytes()
    start = data.index(CONTENTS["ema"]["weight"].numpy().tobytes())
    for position in (start, start + 9999, start + 19999):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with pytest.raises(UserError, match="damaged"):
            checkpoint.read(path)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("bomb",)


@pytest.mark.parametrize("save", [torch.save, lambda contents, path: path.write_bytes(pickle.dumps(contents))])
def test_code_in_a_checkpoint_never_runs(tmp_path, monkeypatch, save):
    monkeypatch.chdir(tmp_path)
    save({**CONTENTS, "ema": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(UserError, match=rf"bomb.pt is refused: it asks for {os.mkdir.__module__}.mkdir, which is no data"):
        checkpoint.read(tmp_path / "bomb.pt")
    assert not (tmp_path / "bomb").exists()


@pytest.mark.parametrize("contents", [[1, 2], {"model": 1}, torch.zeros(3)])
def test_other_files_of_torch_are_not_checkpoints(tmp_path, contents):
    torch.save(contents, tmp_path / "other.pt")
    with pytest.raises(UserError, match="is not a checkpoint of this project"):
        checkpoint.read(tmp_path / "other.pt")


def test_a_missing_checkpoint_names_its_neighbours(path):
    with pytest.raises(UserError, match=r"no checkpoint .*diffusion-4\.pt; beside it are diffusion-3\.pt"):
        checkpoint.read(path.with_name("diffusion-4.pt"))


def test_an_interrupted_write_leaves_the_old_file(path):
    before = path.read_bytes()

    def interrupted(file):
        file.write(b"half of it")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, interrupted)
    assert path.read_bytes() == before
    assert len(list(path.parent.iterdir())) == 1


def test_an_unwritable_folder_is_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write"):
        write_whole(tmp_path / "file" / "x.pt", lambda file: None)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on a file's size")
def test_a_full_disk_is_one_line_and_leaves_the_old_checkpoint(path):
    """A limit on file sizes stands for the full disk; in a process of its own, since a limit cannot be lifted again."""
    before = path.read_bytes()
    code = (
        "import resource, signal, sys, torch; from pathlib import Path; from edm import checkpoint\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\n"
        "try: checkpoint.write(Path(sys.argv[1]), {'ema': torch.zeros(9999)})\n"
        "except checkpoint.UserError as error: print(error)"
    )
    result = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, capture_output=True, text=True)
    assert result.stderr == ""
    assert result.stdout.startswith(f"cannot write {path}: ")
    assert result.stdout.count("\n") == 1
    assert path.read_bytes() == before
    assert len(list(path.parent.iterdir())) == 1


def test_weights_of_another_network_are_refused_by_name():
    net = nn.Linear(2, 3)
    with pytest.raises(UserError, match=r"weight is \(3, 4\) there and \(3, 2\) here"):
        checkpoint.load_weights(net, nn.Linear(4, 3).state_dict(), "x.pt")
    with pytest.raises(UserError, match="bias is missing there"):
        checkpoint.load_weights(net, {"weight": net.weight}, "x.pt")
    for weights in (None, {"weight": 3}):
        with pytest.raises(UserError, match="of another network"):
            checkpoint.load_weights(net, weights, "x.pt")
