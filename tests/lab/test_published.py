"""Checkpoints of others: the authors' pickles and those of lessons give the right numbers, and nothing in them runs."""

import builtins
import io
import json
import os
import pickle
import sys
import types
from collections import OrderedDict
from pathlib import Path

import numpy
import pytest
import torch
import yaml
from torch import nn

from lab import checkpoint, published
from lab import config as configs
from lab.build import build_network
from lab.cli import UserError
from lab.generate import load_denoiser

CASES = json.loads(Path(__file__).parents[1].joinpath("reference", "official_edm.json").read_text())["networks"]
SIZES = ("model_channels", "channel_mult", "num_blocks", "attn_resolutions", "dropout")
CPU = torch.device("cpu")


def reconstruct(meta):
    raise AssertionError("code of the file ran")


@pytest.fixture(autouse=True)
def authors_module(monkeypatch):
    """The module that the authors' pickles name, with which they can be written; reading must not import it."""
    reconstruct.__module__, reconstruct.__qualname__ = "torch_utils.persistence", "_reconstruct_persistent_obj"
    module = types.SimpleNamespace(_reconstruct_persistent_obj=reconstruct)
    monkeypatch.setitem(sys.modules, "torch_utils", types.SimpleNamespace(persistence=module))
    monkeypatch.setitem(sys.modules, "torch_utils.persistence", module)


class Persistent(nn.Module):
    """Pickled as the authors' classes are: a call of their wrapper with one dict."""

    def __init__(self, class_name: str, state: dict):
        super().__init__()
        self.meta = {"type": "class", "version": 6, "module_src": "raise SystemExit", "class_name": class_name, "state": state}

    def __reduce__(self):
        return reconstruct, (self.meta,)


def in_authors_layout(module: nn.Module, class_name: str = "Layer", **attributes) -> nn.Module:
    """A module of ours as the authors would have pickled it; plain containers of layers stay what they are."""
    children = {name: in_authors_layout(child) for name, child in module.named_children()}
    if isinstance(module, nn.ModuleDict):
        container = nn.ModuleDict()
        container._modules.update(children)
        return container
    state = dict(nn.Module().__dict__.items())
    state |= {"_parameters": module._parameters, "_buffers": module._buffers, "_modules": OrderedDict(children)}
    return Persistent(class_name, {**state, "_init_args": (), "_init_kwargs": {"dropout": 0.15}, **attributes})


def config_of(case: dict) -> configs.Config:
    network = {key: case["options"][key] for key in SIZES} | {key: case[key] for key in ("label_dim", "augment_dim")}
    sections = {
        "data": {"dataset": "image_folder", "resolution": case["img_resolution"], "channels": case["img_channels"]},
        "network": network | {"architecture": case["architecture"]},
        "preconditioning": {"formulation": case["preconditioning"].lower().removesuffix("precond")},
    }
    return configs.from_dict(sections, "reference", "reference")


@pytest.fixture
def authors_file(tmp_path, fill):
    """authors_file(case, protocol=4, class_name=None, **attributes) -> the pickle of a reference network."""

    def write(case: dict, protocol: int = 4, class_name: str | None = None, **attributes) -> Path:
        defaults = {"sigma_data": numpy.float64(0.5), "beta_d": numpy.float32(19.9), "M": 1000}
        net = fill(build_network(config_of(case))).float()
        network = in_authors_layout(net, class_name or case["preconditioning"], **{**defaults, **attributes})
        path = tmp_path / "edm-tiny-cond-vp.pkl"
        path.write_bytes(pickle.dumps({"ema": network, "dataset_kwargs": {"resolution": 16}}, protocol=protocol))
        return path

    return write


@pytest.fixture
def lesson(tmp_path, fill):
    """lesson(case, **contents) -> a lesson's checkpoint with a reference network's weights, and its config."""

    def write(case: dict, **contents) -> tuple[Path, Path]:
        config = config_of(case)
        weights = fill(build_network(config)).float().state_dict()
        weights = {f"_score_network.{name}": tensor for name, tensor in weights.items()}
        weights["_score_network.model.enc.8x8_down.conv0.resample_filter"] = torch.ones(1, 1, 2, 2)
        torch.save({"model_state_dict": weights, "step": 20000, **contents}, tmp_path / "lesson.pt")
        (tmp_path / "lesson.yaml").write_text(yaml.safe_dump(config.to_dict()))
        return tmp_path / "lesson.pt", tmp_path / "lesson.yaml"

    return write


@pytest.fixture
def check_numbers(wave, assert_close):
    """check_numbers(case, path, config_path=None): the network in a file gives the reference numbers, in float64."""

    def check(case: dict, path: Path, config_path: Path | None = None) -> None:
        _, denoiser, _ = load_denoiser(path, config_path, [], CPU)
        res, channels = case["img_resolution"], case["img_channels"]
        x = wave(2, channels, res, res, scale=0.5, frequency=0.7, phase=0.3)
        labels = torch.eye(10)[[3, 7]] if case["label_dim"] else None
        augment_labels = wave(2, case["augment_dim"], scale=0.3, frequency=1.1, phase=0.2)
        with torch.no_grad():
            D = denoiser.double()(x, torch.tensor([0.05, 1.7], dtype=torch.float64), labels, augment_labels)
        assert_close(D.flatten()[:8], case["denoised"]["first"])

    return check


# The right numbers


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['architecture']}-{case['preconditioning']}")
def test_a_file_in_the_authors_layout_gives_their_numbers(case, authors_file, check_numbers):
    check_numbers(case, authors_file(case))


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 5])
def test_every_pickle_protocol_is_read(protocol, authors_file, check_numbers):
    check_numbers(CASES[1], authors_file(CASES[1], protocol))


@pytest.mark.parametrize("case", [CASES[1], CASES[4], CASES[2]], ids=["edm", "vp", "ncsnpp"])
def test_a_lessons_checkpoint_gives_the_numbers_with_a_config(case, lesson, check_numbers):
    path, config_path = lesson(case)
    check_numbers(case, path, config_path)
    assert checkpoint.load(path)["step"] == 20000


def test_a_lessons_checkpoint_asks_for_its_config(lesson, script, tmp_path):
    path, config_path = lesson(CASES[1], config={"target": "lesson.EDMPrecond"})
    arguments = ("--checkpoint", path, "--num_samples", 2, "--sampling_steps", 2)
    code, _, err = script("sample.py", *arguments)
    assert (code, err) == (2, f"error: {path} does not say how its network is built; name its config with --config_path\n")
    assert not (tmp_path / "output").exists()
    assert script("sample.py", *arguments, "--config_path", config_path)[0] == 0
    assert (tmp_path / "output/image/image_folder/sample/lesson/grid.png").exists()


def test_the_authors_network_is_sampled_and_exported(script, authors_file, tmp_path):
    path = authors_file(CASES[1])
    few = ("--num_samples", 2, "--sampling_steps", 2)
    code, _, err = script("sample.py", "--checkpoint", path, *few)
    assert code == 0, err
    assert (tmp_path / "output/image/image_folder/sample/edm-tiny-cond-vp/grid.png").exists()
    assert script("sample.py", "--checkpoint", path, "--export", "small.pt")[0] == 0
    small, large = torch.load(tmp_path / "small.pt", weights_only=True), checkpoint.load(path)
    assert small["config"]["network"]["label_dim"] == 10
    for name, tensor in large["ema"].items():
        assert torch.equal(small["ema"][name], tensor.half() if tensor.ndim > 1 else tensor)
    assert script("sample.py", "--checkpoint", "small.pt", *few)[0] == 0


# What a file says of itself


def test_what_a_file_says_of_itself_is_kept_or_must_be_so(authors_file):
    contents = checkpoint.load(authors_file(CASES[0], sigma_data=0.3))
    assert contents["config"]["preconditioning"] == {"formulation": "edm", "sigma_data": 0.3}
    assert contents["config"]["network"]["dropout"] == 0.15
    for change, message in (
        ({"_init_kwargs": {"channel_mult": [1, 4]}}, r"it says channel_mult \[1, 4\], but its weights have \[1, 2\]"),
        ({"class_name": "Generator"}, "unknown network 'Generator'"),
        ({"class_name": "VPPrecond", "beta_d": 5.0}, r"its beta_d is 5\.0, and only 19\.9 is known here"),
        ({"sigma_data": None}, "is damaged"),
        ({"sigma_data": "x"}, "is damaged"),
        ({"class_name": "VPPrecond", "M": 10**400}, "is damaged"),
    ):
        with pytest.raises(UserError, match=message):
            checkpoint.load(authors_file(CASES[0], **change))


@pytest.mark.parametrize("keep", [1, 100, -1, -1000])
def test_a_truncated_pickle_is_recognised(keep, authors_file):
    path = authors_file(CASES[0])
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"vp\.pkl is damaged, or not a checkpoint of this project"):
        checkpoint.load(path)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"_score_network.model.weight": 3}, "its weights are not a table of tensors"),
        ({"_score_network.model.weight": torch.zeros(1).expand(2**40)}, "its weights are not a table of tensors"),
        ({"_score_network.model.weight": torch.zeros(3, device="meta")}, "its weights are not a table of tensors"),
        ({"model.weight": torch.zeros(3)}, r"no name in its model_state_dict begins with _score_network\.model\."),
        ([1], "its model_state_dict is not a table of tensors"),
        ({"_score_network.model.weight": torch.zeros(3)}, "of another network than the config's"),
    ],
)
def test_a_lesson_with_odd_weights_is_one_line(weights, message, lesson):
    path, config_path = lesson(CASES[0], model_state_dict=weights)
    with pytest.raises(UserError, match=message):
        load_denoiser(path, config_path, [], CPU)


def test_a_network_with_other_filters_is_refused(tmp_path, authors_file, fill):
    """Its resampling filter of 4 taps would otherwise be taken for the 2 taps of DDPM++."""
    net = fill(build_network(config_of(CASES[0]))).float()
    net.model.enc["8x8_down"].register_buffer("resample_filter", torch.ones(1, 1, 4, 4))
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"ema": in_authors_layout(net, "EDMPrecond")}))
    with pytest.raises(UserError, match="its resampling filter does not have the 2 taps of ddpmpp"):
        checkpoint.load(tmp_path / "x.pkl")


# Hostile files


class Call:
    """Pickled as a call."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def torch_saved(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


HOSTILE = {
    f"{os.system.__module__}.system": lambda: Call(os.system, "touch bomb"),
    "builtins.eval": lambda: Call(eval, "open('bomb', 'w')"),
    "builtins.getattr": lambda: Call(getattr, Call(__import__, "os"), "system"),
    "builtins.print": lambda: print,
    "builtins.exec": lambda: OrderedDict(a=[{"b": Call(exec, "open('bomb', 'w')")}]),
    f"{os.mkdir.__module__}.mkdir": lambda: Call(torch.storage._load_from_bytes, torch_saved(Call(os.mkdir, "bomb"))),
    "torch.serialization.load": lambda: Call(torch.load, "bomb"),
    "torch.nn.modules.linear.Linear": lambda: nn.Linear(1, 1),
    "types.SimpleNamespace": lambda: types.SimpleNamespace(a=1),
    "numpy.dtype('O8')": lambda: Call(numpy.dtype, "O8"),
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pickle_is_refused_by_name_and_nothing_runs(name, protocol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    network = Persistent("EDMPrecond", {"_parameters": {}, "_modules": {}, "extra": HOSTILE[name]()})
    (tmp_path / "hostile.pkl").write_bytes(pickle.dumps({"ema": network}, protocol=protocol))
    with pytest.raises(UserError) as error:
        checkpoint.load("hostile.pkl")
    expected = f"hostile.pkl is refused: it asks for {name}, which is no data and could run code"
    assert str(error.value).replace("__builtin__", "builtins") == expected
    assert not (tmp_path / "bomb").exists()


def test_a_bare_call_and_one_in_a_tensors_state_are_refused(tmp_path):
    for contents in (
        Call(os.system, "true"),
        [Call(builtins.input)],
        {"ema": Call(torch._utils._rebuild_tensor_v2, Call(os.getcwd))},
    ):
        (tmp_path / "hostile.pkl").write_bytes(pickle.dumps(contents))
        with pytest.raises(UserError, match="is refused: it asks for"):
            checkpoint.load(tmp_path / "hostile.pkl")


def crafted(*opcodes: bytes) -> bytes:
    return pickle.PROTO + b"\x02" + b"".join(opcodes) + pickle.STOP


STATE = {
    "a function": crafted(b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n", b"}", b"U\x04evil", b"K\x01", b"s", b"b"),
    "a class": crafted(b"cnumpy\ndtype\n", b"}", b"U\x04evil", b"K\x01", b"s", b"b"),
    "a tensor": pickle.dumps(torch.zeros(4))[:-1] + b"(K\x01K\x02tb.",
}


@pytest.mark.parametrize("name", STATE)
def test_only_records_are_given_a_state(name, tmp_path):
    """A tensor's own way of taking a state would let it read memory that is not its own."""
    (tmp_path / "x.pkl").write_bytes(STATE[name])
    with pytest.raises(UserError, match="is refused: it asks for the state of a"):
        checkpoint.load(tmp_path / "x.pkl")
    assert not any(hasattr(known, "evil") for known in published.KNOWN.values())


def damaged_pickles() -> dict[str, object]:
    deep = Persistent("Layer", {"_parameters": {}})
    for _ in range(16):  # 2^16 modules, if each were looked at wherever it stands
        deep = Persistent("EDMPrecond", {"_modules": OrderedDict(a=deep, b=deep)})
    storage, found = torch.arange(4.0).storage(), {"modules that hold each other": deep}
    for size in ((5,), (2**40,), (2, 4)):  # of a storage of 4 numbers
        tensor = Call(torch._utils._rebuild_tensor_v2, storage, 0, size, (1,) * len(size), False, OrderedDict())
        found[f"a tensor of {size}"] = Persistent("EDMPrecond", {"_parameters": {"weight": tensor}})
    for data in (b"", b"PK\x03\x04", torch_saved(torch.zeros(3))[:50]):
        found[f"a storage of {len(data)} bytes"] = Call(torch.storage._load_from_bytes, data)
    return found


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_damage_is_called_damage(tmp_path):
    for name, network in damaged_pickles().items():
        (tmp_path / "x.pkl").write_bytes(pickle.dumps({"ema": network}))
        with pytest.raises(UserError) as error:
            checkpoint.load(tmp_path / "x.pkl")
        assert "is damaged, or not a checkpoint" in str(error.value), name
