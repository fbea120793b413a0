"""Checkpoints: whole or not at all, damage is recognised, and no code in them runs."""

import contextlib
import os
import pickle
import random
import zipfile

import pytest
import torch
from torch import nn

from edm.loss import NUM_BANDS
from lab import checkpoint
from lab import config as configs
from lab.build import MAX_PARAMETERS, build_network
from lab.checkpoint import write_atomically
from lab.cli import UserError

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
    assert [file.name for file in path.parent.iterdir()] == ["diffusion-3.pt"]


def test_the_comment_of_an_earlier_version_is_ignored(path, same):
    """Earlier versions wrote a checksum of the file into the archive's comment."""
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"sha256 " + b"0" * 64
    assert same(checkpoint.load(path), CONTENTS)


def held(path) -> list[int]:
    """The positions of the bytes that a checkpoint's archive holds: weights, numbers and names."""
    data, places = path.read_bytes(), []
    with zipfile.ZipFile(path) as archive:
        for part in archive.infolist():
            start = data.index(archive.read(part), part.header_offset + 30 + len(part.filename))
            places += range(start, start + part.file_size)
    return places


def test_damage_to_any_byte_is_recognised_or_changes_nothing(path, same):
    """Recognised in all that the archive holds; elsewhere, as in its padding and dates, a byte may not matter."""
    data, rng, places = path.read_bytes(), random.Random(0), held(path)
    assert len(places) > 0.5 * len(data)
    weights = data.index(CONTENTS["ema"]["weight"].numpy().tobytes())
    assert {weights, weights + 2399} <= set(places)
    for place in [*rng.sample(places, 150), weights, weights + 2399]:
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :])
        with pytest.raises(UserError, match=r"diffusion-3\.pt is "):
            checkpoint.load(path)
    for place in [*rng.sample(range(len(data)), 300), *range(len(data) - 60, len(data))]:
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :])
        with contextlib.suppress(UserError):
            assert same(checkpoint.load(path), CONTENTS), place


@pytest.mark.parametrize("keep", [0, 1, 22, 1000, -23, -22, -1])
def test_a_truncated_checkpoint_is_recognised(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"diffusion-3\.pt is damaged, or not a checkpoint of this project"):
        checkpoint.load(path)


WRONG = {
    "step": [-1, "2", None, 2.0, True, [2]],
    "config": [None, [], {"data": 3}],
    "ema": [None, [], {"x": 3}, {3: torch.zeros(1)}, {"x": torch.zeros(1).long()}, {"x": torch.zeros(3).to_sparse()}],
    "net": [None, {"x": torch.zeros(3, device="meta")}, {"x": torch.zeros(3, dtype=torch.complex64)}],
    "losses": [3, [1.0], *(torch.zeros(1).expand(size) for size in ((3,), (2, 1), (4, 1 + NUM_BANDS), (3, 1 + NUM_BANDS)))],
}


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
@pytest.mark.parametrize(("key", "values"), WRONG.items(), ids=WRONG)
def test_contents_of_a_wrong_kind_are_recognised(path, key, values):
    for value in values:
        torch.save({**CONTENTS, key: value}, path)
        with pytest.raises(UserError, match=rf"is not a checkpoint of this project: its {key} "):
            checkpoint.load(path)
    if key in ("step", "config", "ema"):
        torch.save({name: value for name, value in CONTENTS.items() if name != key}, path)
        with pytest.raises(UserError, match="it lacks"):
            checkpoint.load(path)


@pytest.mark.parametrize("config", [{"network": {"dropout": "much"}}, {3: {}}, {"network": {3: 1}}, {"base": {}}])
def test_a_config_of_a_wrong_kind_is_recognised(config):
    with pytest.raises(UserError, match=r"^the config in x\.pt: "):
        checkpoint.read_config({"name": "x", "config": config}, "x.pt")


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("bomb",)


@pytest.mark.parametrize("save", [torch.save, lambda contents, path: path.write_bytes(pickle.dumps(contents))])
def test_code_in_a_checkpoint_never_runs(tmp_path, monkeypatch, save):
    monkeypatch.chdir(tmp_path)
    save({**CONTENTS, "ema": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(UserError, match=rf"bomb.pt is refused: it asks for {os.mkdir.__module__}.mkdir, which is no data"):
        checkpoint.load("bomb.pt")
    assert not (tmp_path / "bomb").exists()


@pytest.mark.parametrize("contents", [[1, 2], {"model": 1}, torch.zeros(3)], ids=["list", "dict", "tensor"])
def test_another_file_of_torch_is_no_checkpoint(tmp_path, contents):
    torch.save(contents, tmp_path / "other.pt")
    with pytest.raises(UserError, match="is not a checkpoint of this project"):
        checkpoint.load(tmp_path / "other.pt")


def test_a_missing_checkpoint_names_its_neighbours(path):
    with pytest.raises(UserError, match=r"no checkpoint .*diffusion-4\.pt; beside it are diffusion-3\.pt"):
        checkpoint.load(path.with_name("diffusion-4.pt"))
    for name in (path.parent, path / "x.pt", "x" * 300):
        with pytest.raises(UserError, match="there is no checkpoint"):
            checkpoint.load(name)


# Writing


def test_an_interrupted_write_leaves_the_old_file(path):
    before = path.read_bytes()

    def interrupted(file):
        file.write(b"half of it")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, interrupted)
    assert path.read_bytes() == before
    assert len(list(path.parent.iterdir())) == 1


def test_a_file_is_on_the_disk_before_it_has_its_name(path, monkeypatch):
    order = []
    for name in ("fsync", "replace"):
        act = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, act=act: (order.append(name), act(*args)))
    write_atomically(path, lambda file: file.write(b"all of it"))
    assert order[:2] == ["fsync", "replace"]
    assert path.read_bytes() == b"all of it"


def test_a_full_disk_is_one_line_and_leaves_the_old_checkpoint(path):
    """A limit on the size of files stands for the full disk."""
    resource = pytest.importorskip("resource")  # Windows has no such limit
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, limits[1]))
    try:
        with pytest.raises(UserError, match=rf"^cannot write {path}: .+") as error:
            checkpoint.save(path, {"ema": torch.zeros(9999)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value)
    assert path.read_bytes() == before
    assert len(list(path.parent.iterdir())) == 1
    with pytest.raises(UserError, match=r"^cannot write .*x\.pt: (Not a directory|File exists)$"):
        write_atomically(path / "x.pt", lambda file: None)  # in a folder that is a file


# Weights


def test_weights_of_another_network_are_refused_by_name():
    net = nn.Linear(2, 3)
    with pytest.raises(UserError, match=r"weight is \(3, 4\) there and \(3, 2\) here"):
        checkpoint.load_weights(net, nn.Linear(4, 3).state_dict(), "x.pt")
    with pytest.raises(UserError, match="bias is missing there"):
        checkpoint.load_weights(net, {"weight": net.weight}, "x.pt")
    for weights in (None, {"weight": 3}):
        with pytest.raises(UserError, match="of another network"):
            checkpoint.load_weights(net, weights, "x.pt")
    weights = {name: torch.ones_like(tensor).half() for name, tensor in net.state_dict().items()}
    checkpoint.load_weights(net, weights, "x.pt")
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
    paths = sorted((root / "assets").glob("*.pt"))
    assert [path.name for path in paths] == ["edm_small.pt", "iddpm_small.pt"]
    for path in paths:
        contents = checkpoint.load(path)
        config = checkpoint.read_config(contents, path)
        assert (config.name, config.training.num_training_steps) == (path.stem, contents["step"])
        build_network(config, contents["ema"], path)
