"""Checkpoints: whole or not at all, damage is recognised, and no code in them runs."""

import math
import os
import random
import zipfile

import pytest
import torch
from torch import nn

from lab import checkpoint
from lab import config as configs
from lab.build import MAX_PARAMETERS, build_network
from lab.checkpoint import NUM_BANDS, write_atomically
from lab.cli import UserError
from lab.pictures import check_writable

CONTENTS = {
    "step": 3,
    "name": "x",
    "config": {"network": {"channel_mult": [1, 2]}},
    "ema": {"weight": torch.linspace(0, 1, 600), "bias": torch.ones(7, dtype=torch.float16)},
    "losses": torch.rand(3, 1 + NUM_BANDS, generator=torch.Generator().manual_seed(0)),
}


@pytest.fixture
def path(tmp_path):
    checkpoint.save(tmp_path / "diffusion-3.pt", CONTENTS)
    return tmp_path / "diffusion-3.pt"


def test_round_trip(path, same):
    contents = checkpoint.load(path)
    assert same(contents, CONTENTS)
    assert not same(contents, {**CONTENTS, "ema": {**CONTENTS["ema"], "bias": torch.zeros(7, dtype=torch.float16)}})
    assert checkpoint.read_config(contents, path) == configs.from_dict(CONTENTS["config"], "x", "x")
    state = nn.Linear(1, 1).state_dict()
    torch.save({**CONTENTS, "ema": state}, other := path.with_name("x.pt"))
    assert hasattr(state, "_metadata") and not hasattr(checkpoint.load(other)["ema"], "_metadata")
    other.unlink()
    assert [file.name for file in path.parent.iterdir()] == ["diffusion-3.pt"]
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"sha256 " + b"0" * 64  # in which earlier versions wrote a checksum of the file
    assert same(checkpoint.load(path), CONTENTS)


def test_safetensors_hold_the_average_and_its_config(path, same):
    shared = path.with_name("x.safetensors")
    contents = {**CONTENTS, "config": {"network": {"channel_mult": [1, 2]}, "sampler": {"S_max": math.inf}}}
    contents["ema"]["matrix"] = torch.arange(6.0).view(2, 3).T
    checkpoint.save(shared, contents)
    loaded = checkpoint.load(shared)
    assert same(loaded["ema"], contents["ema"])
    assert loaded.keys() == {"step", "name", "config", "ema"}
    assert checkpoint.read_config(loaded, shared) == checkpoint.read_config(contents, path)


def test_a_stray_name_or_folder_is_no_checkpoint(path):
    path.with_name("diffusion-007.pt").write_bytes(path.read_bytes())
    path.with_name("diffusion-5.pt").mkdir()
    path.with_name("diffusion-6.pt").symlink_to("nowhere")
    assert checkpoint.saved_steps(path.parent) == [3]


def test_damage_to_any_byte_is_recognised_or_changes_nothing(path, same):
    """Recognised in the weights and the pickle about them; elsewhere, as in padding and dates, a byte may not matter."""
    data, rng = path.read_bytes(), random.Random(0)
    with zipfile.ZipFile(path) as archive:
        parts = [archive.read(part) for part in archive.infolist() if part.file_size > 200]
    held = [place for part in parts for place in range(data.index(part), data.index(part) + len(part))]
    assert len(held) > 0.5 * len(data) and CONTENTS["ema"]["weight"].numpy().tobytes() in parts
    anywhere = [*rng.sample(range(len(data)), 250), *range(len(data) - 60, len(data))]
    for place in rng.sample(held, 150) + anywhere:
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :])
        try:
            assert same(checkpoint.load(path), CONTENTS), place
            assert place not in held
        except UserError as error:
            assert "diffusion-3.pt is " in str(error)
    for keep in (0, 1, 22, 1000, -23, -22, -1):
        path.write_bytes(data[:keep])
        with pytest.raises(UserError, match=r"diffusion-3\.pt is damaged, or not a checkpoint of this project"):
            checkpoint.load(path)


WRONG = {
    "step": [-1, "2", None, 2.0, True, [2], 2**53],
    "config": [None, [], {"data": 3}],
    "ema": [None, [], {"x": 3}, {3: torch.zeros(1)}, {"x": torch.zeros(1).long()}, {"x": torch.zeros(3).to_sparse()}],
    "net": [None, {"x": torch.zeros(3, device="meta")}, {"x": torch.zeros(3, dtype=torch.complex64)}],
    "losses": [3, [1.0], *(torch.zeros(1).expand(size) for size in ((3,), (2, 1), (4, 1 + NUM_BANDS), (3, 1 + NUM_BANDS)))],
}


@pytest.mark.parametrize(("key", "values"), WRONG.items(), ids=WRONG)
def test_contents_of_a_wrong_kind_are_recognised(path, key, values):
    for value in values:
        torch.save({**CONTENTS, key: value}, path)
        with pytest.raises(UserError, match="is damaged, or not a checkpoint of this project"):
            checkpoint.load(path)
    needed = key if key in ("step", "config", "ema") else "name"
    for other in ({name: value for name, value in CONTENTS.items() if name != needed}, [1, 2], torch.zeros(3)):
        torch.save(other, path)
        with pytest.raises(UserError, match="is damaged, or not a checkpoint of this project"):
            checkpoint.load(path)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("bomb",)


def test_code_in_a_checkpoint_never_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({**CONTENTS, "ema": Bomb()}, "bomb.pt")
    with pytest.raises(UserError, match=rf"bomb.pt is refused: it asks for {os.mkdir.__module__}.mkdir, which is not data"):
        checkpoint.load("bomb.pt")
    assert not os.path.exists("bomb")


def test_a_missing_checkpoint_names_its_neighbours(path):
    with pytest.raises(UserError, match=r"no checkpoint .*diffusion-4\.pt; beside it are diffusion-3\.pt"):
        checkpoint.load(path.with_name("diffusion-4.pt"))
    for name in (path.parent, path / "x.pt", "x" * 300):
        with pytest.raises(UserError, match="there is no checkpoint"):
            checkpoint.load(name)


@pytest.mark.parametrize("failure", [KeyboardInterrupt("a key"), OSError(28, "No space")])
def test_a_write_that_fails_leaves_the_old_file(path, failure):
    def write(file):
        file.write(b"half of it")
        raise failure

    before = path.read_bytes()
    with pytest.raises((KeyboardInterrupt, UserError), match=r"^a key$|^cannot write .*3\.pt: No space$"):
        write_atomically(path, write)
    assert path.read_bytes() == before
    assert len(list(path.parent.iterdir())) == 1
    with pytest.raises(UserError, match=r"^cannot write .*x\.pt: (Not a directory|File exists)$"):
        write_atomically(path / "x.pt", write)  # in a folder that is a file


def test_only_regular_files_are_replaced(path):
    os.mkfifo(path.with_name("pipe"))
    path.with_name("link").symlink_to(os.devnull)
    for name in ("pipe", "link", "."):
        target = path.parent / name
        with pytest.raises(UserError, match=r"^cannot write .*: it is not a regular file"):
            write_atomically(target, lambda file: file.write(b"all of it"))
        with pytest.raises(UserError, match=r"^cannot write .*: it is not a regular file"):
            check_writable(target)
        assert not target.is_file()


def test_a_file_is_on_the_disk_before_it_has_its_name(path, monkeypatch):
    order, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (order.append("fsync"), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *paths: (order.append("replace"), replace(*paths)))
    write_atomically(path, lambda file: file.write(b"all of it"))
    assert order[:2] == ["fsync", "replace"]
    assert path.read_bytes() == b"all of it"


def test_weights_of_another_network_are_refused_by_name():
    net = nn.Linear(2, 3)
    for weights, message in (
        (nn.Linear(4, 3).state_dict(), r"weight is \(3, 4\) there and \(3, 2\) here"),
        ({"weight": net.weight}, "bias is missing there"),
        (None, "of another network"),
        ({"weight": 3}, "of another network"),
        ({"weight": torch.full((3, 2), torch.nan), "bias": net.bias}, r"x\.pt are not finite numbers: weight holds nan"),
    ):
        with pytest.raises(UserError, match=message):
            checkpoint.load_weights(net, weights, "x.pt")
    checkpoint.load_weights(net, {name: torch.ones_like(tensor).half() for name, tensor in net.state_dict().items()}, "x.pt")
    assert net.weight.dtype == torch.float32
    assert net.weight.min() == net.weight.max() == 1


def test_a_network_is_checked_before_it_takes_memory(monkeypatch):
    """A huge one is refused; and weights that do not fit are found before a network of that size is made."""
    huge = {"model_channels": 2048, "channel_mult": [64, 64, 64], "num_blocks": 64}
    with pytest.raises(UserError, match=rf"network: [\d,]+ parameters are more than the {MAX_PARAMETERS:,} allowed"):
        build_network(configs.from_dict({"network": huge}, "x", "x"))
    with pytest.raises(UserError, match="network: a layer of 144 channels cannot be normali"):
        build_network(configs.from_dict({"network": {"model_channels": 48}}, "x", "x"))
    large = configs.from_dict({"network": {"model_channels": 512}}, "x", "x")
    made = []
    monkeypatch.setattr("torch.nn.init.xavier_uniform_", lambda weight, gain: made.append(weight.device.type))
    with pytest.raises(UserError, match=r"the weights in x\.pt are of another network than the config's: model"):
        build_network(large, {"weight": torch.zeros(3)}, "x.pt")
    assert set(made) == {"meta"}


def test_the_published_examples_load(root):
    names = ["edm_laptop", "edm_laptop_uncond", "edm_small", "edm_small_uncond", "edm_small_uncond_guide", "iddpm_small"]
    paths = sorted((root / "assets").glob("*.safetensors"))
    assert [path.stem for path in paths] == names
    for path in paths:
        contents = checkpoint.load(path)
        config = checkpoint.read_config(contents, path)
        share = 4 if path.stem.endswith("_guide") else 1  # of the training; a guide is a worse network
        assert (config.name, config.training.num_training_steps) == (path.stem.removesuffix("_guide"), share * contents["step"])
        build_network(config, contents["ema"], path)


def test_a_number_too_large_for_half_precision_stays():
    weights = {"small": torch.ones(2, 2), "large": torch.full((2, 2), 1e5), "bias": torch.ones(2)}
    assert [tensor.dtype for tensor in checkpoint.halved(weights).values()] == [torch.float16, torch.float32, torch.float32]
