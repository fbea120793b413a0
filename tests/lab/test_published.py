"""Checkpoints of others: the authors' pickles and those of lessons give the right numbers, and nothing in them runs."""

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


def reconstruct(meta):
    raise AssertionError("code of the file ran")


@pytest.fixture(autouse=True)
def authors_module(monkeypatch):
    """The module that the authors' pickles name, with which they can be written; reading must not import it."""
    reconstruct.__module__, reconstruct.__qualname__ = "torch_utils.persistence", "_reconstruct_persistent_obj"
    module = types.SimpleNamespace(_reconstruct_persistent_obj=reconstruct)
    monkeypatch.setitem(sys.modules, "torch_utils", types.SimpleNamespace(persistence=module))
    monkeypatch.setitem(sys.modules, "torch_utils.persistence", module)


class Call:
    """Pickled as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def persistent(class_name: str, state: dict) -> Call:
    """An object as the authors' classes are pickled: a call of their wrapper with one dict."""
    meta = {"type": "class", "version": 6, "module_src": "raise SystemExit", "class_name": class_name, "state": state}
    return Call(reconstruct, meta)


def in_authors_layout(module: nn.Module, class_name: str = "Layer", **attributes) -> object:
    """A module of ours as the authors would have pickled it; plain containers of layers stay what they are."""
    children = {name: in_authors_layout(child) for name, child in module.named_children()}
    if isinstance(module, nn.ModuleDict):
        container = nn.ModuleDict()
        container._modules.update(children)
        return container
    tensors = {"_parameters": module._parameters, "_buffers": module._buffers, "_modules": OrderedDict(children)}
    state = {**nn.Module().__dict__, **tensors, "_init_args": (), "_init_kwargs": {"dropout": 0.15}, **attributes}
    return persistent(class_name, state)


def config_of(case: dict) -> configs.Config:
    network = {key: case["options"][key] for key in SIZES} | {key: case[key] for key in ("label_dim", "augment_dim")}
    sections = {
        "data": {"dataset": "image_folder", "resolution": case["img_resolution"], "channels": case["img_channels"]},
        "network": network | {"architecture": case["architecture"]},
        "preconditioning": {"formulation": case["preconditioning"].lower().removesuffix("precond")},
    }
    return configs.from_dict(sections, "reference", "reference")


@pytest.fixture
def network(fill):
    """network(case) -> a reference network in float32."""
    return lambda case: fill(build_network(config_of(case))).float()


@pytest.fixture
def authors_file(tmp_path, network):
    """authors_file(case, protocol=4, class_name=None, taps=None, **attributes) -> the pickle of a reference network."""

    def write(case: dict, protocol: int = 4, class_name: str | None = None, taps: int | None = None, **attributes) -> Path:
        attributes = {"sigma_data": numpy.float64(0.5), "beta_d": numpy.float32(19.9), "M": 1000} | attributes
        net, path = network(case), tmp_path / "edm-tiny-cond-vp.pkl"
        if taps:
            net.model.enc["8x8_down"].register_buffer("resample_filter", torch.ones(1, 1, taps, taps))
        layout = in_authors_layout(net, class_name or case["preconditioning"], **attributes)
        path.write_bytes(pickle.dumps({"ema": layout, "dataset_kwargs": {"resolution": 16}}, protocol=protocol))
        return path

    return write


@pytest.fixture
def lesson(tmp_path, network):
    """lesson(case, **contents) -> a lesson's checkpoint with a reference network's weights, and its config."""

    def write(case: dict, **contents) -> tuple[Path, Path]:
        weights = {f"_score_network.{name}": tensor for name, tensor in network(case).state_dict().items()}
        weights["_score_network.model.enc.8x8_down.conv0.resample_filter"] = torch.ones(1, 1, 2, 2)
        torch.save({"model_state_dict": weights, "step": 20000, **contents}, tmp_path / "lesson.pt")
        (tmp_path / "lesson.yaml").write_text(yaml.safe_dump(config_of(case).to_dict()))
        return tmp_path / "lesson.pt", tmp_path / "lesson.yaml"

    return write


@pytest.fixture
def check_numbers(wave, assert_close):
    """check_numbers(case, path, config_path=None): the network in a file gives the reference numbers, in float64."""

    def check(case: dict, path: Path, config_path: Path | None = None) -> None:
        _, denoiser, _ = load_denoiser(path, config_path, [], torch.device("cpu"))
        res, channels = case["img_resolution"], case["img_channels"]
        x = wave(2, channels, res, res, scale=0.5, frequency=0.7, phase=0.3)
        labels = torch.eye(10)[[3, 7]] if case["label_dim"] else None
        augment_labels = wave(2, case["augment_dim"], scale=0.3, frequency=1.1, phase=0.2)
        with torch.no_grad():
            D = denoiser.double()(x, torch.tensor([0.05, 1.7], dtype=torch.float64), labels, augment_labels)
        assert_close(D.flatten()[:8], case["denoised"]["first"])

    return check


@pytest.mark.parametrize(("case", "protocol"), [(case, 4) for case in CASES] + [(CASES[1], protocol) for protocol in (3, 5)])
def test_a_file_in_the_authors_layout_gives_their_numbers_in_every_protocol(case, protocol, authors_file, check_numbers):
    check_numbers(case, authors_file(case, protocol))


def test_a_lessons_checkpoint_gives_the_numbers_with_a_config(lesson, check_numbers):
    for case in (CASES[1], CASES[4], CASES[2]):  # edm, vp, ncsnpp
        path, config_path = lesson(case)
        check_numbers(case, path, config_path)
        assert checkpoint.load(path)["step"] == 20000


def test_both_are_sampled_and_exported(script, authors_file, lesson, tmp_path):
    few, folder = ("--num_samples", 2, "--sampling_steps", 2), tmp_path / "output/image/image_folder/sample"
    path, config_path = lesson(CASES[1], config={"target": "lesson.EDMPrecond"})
    code, _, err = script("sample.py", "--checkpoint", path, *few)
    assert (code, err) == (2, f"error: {path} does not say how its network is built; name its config with --config_path\n")
    assert not folder.exists()
    assert script("sample.py", "--checkpoint", path, "--config_path", config_path, *few)[0] == 0
    path = authors_file(CASES[1])
    assert script("sample.py", "--checkpoint", path, *few)[0] == 0
    assert {grid.parent.name for grid in folder.glob("*/grid.png")} == {"lesson", "edm-tiny-cond-vp"}
    assert script("sample.py", "--checkpoint", path, "--export", "small.safetensors")[0] == 0
    small, large = checkpoint.load(tmp_path / "small.safetensors"), checkpoint.load(path)
    assert small["config"]["network"]["label_dim"] == 10
    for name, tensor in large["ema"].items():
        assert torch.equal(small["ema"][name], tensor.half() if tensor.ndim > 1 else tensor)
    assert script("sample.py", "--checkpoint", "small.safetensors", *few)[0] == 0


def test_what_a_file_says_of_itself_is_kept_or_must_be_so(authors_file):
    contents = checkpoint.load(authors_file(CASES[0], sigma_data=0.3))
    assert contents["config"]["preconditioning"] == {"formulation": "edm", "sigma_data": 0.3}
    assert contents["config"]["network"]["dropout"] == 0.15
    for change, message in (
        ({"class_name": "Generator"}, "unknown network 'Generator'"),
        ({"class_name": "VPPrecond", "beta_d": 5.0}, r"its beta_d is 5\.0, and only 19\.9 is known here"),
        ({"taps": 4}, "its resampling filter does not have the 2 taps of ddpmpp"),
        ({"sigma_data": "x"}, "is damaged"),
        ({"class_name": "VPPrecond", "M": 10**400}, "is damaged"),
    ):
        with pytest.raises(UserError, match=message):
            checkpoint.load(authors_file(CASES[0], **change))


def test_a_lesson_with_odd_weights_is_one_line(lesson):
    name = "_score_network.model.weight"
    for weights, message in (
        ({name: 3}, "is damaged"),
        ({name: torch.zeros(1).expand(2**40)}, "is damaged"),
        ({name: torch.zeros(3, device="meta")}, "is damaged"),
        ({"model.weight": torch.zeros(3)}, r"no name in its model_state_dict begins with _score_network\.model\."),
        ([1], "is damaged"),
        ({name: torch.zeros(3)}, "of another network than the config's"),
    ):
        path, config_path = lesson(CASES[0], model_state_dict=weights)
        with pytest.raises(UserError, match=message):
            load_denoiser(path, config_path, [], torch.device("cpu"))


def torch_saved(value: object) -> bytes:
    torch.save(value, file := io.BytesIO(), _use_new_zipfile_serialization=False)
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


@pytest.mark.parametrize("protocol", [3, 4])
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pickle_is_refused_by_name_and_nothing_runs(name, protocol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    value = HOSTILE[name]()
    network = persistent("EDMPrecond", {"_parameters": {}, "_modules": {}, "extra": value})
    for contents in ({"ema": network}, value, {"ema": Call(torch._utils._rebuild_tensor_v2, value)}):
        Path("hostile.pkl").write_bytes(pickle.dumps(contents, protocol=protocol))
        with pytest.raises(UserError) as error:
            checkpoint.load("hostile.pkl")
        expected = f"hostile.pkl is refused: it asks for {name}, which is not data and could run code"
        assert str(error.value) == expected
        assert not Path("bomb").exists()


def test_only_records_are_given_a_state(tmp_path):
    """A tensor's own way of taking a state would let it read memory that is not its own."""
    function, cls = "torch_utils.persistence\n_reconstruct_persistent_obj", "numpy\ndtype"
    pickled = [f"c{name}\n}}U\x04evilK\x01sb.".encode() for name in (function, cls)]
    for data in (*pickled, pickle.dumps(torch.zeros(4))[:-1] + b"(K\x01K\x02tb."):
        (tmp_path / "x.pkl").write_bytes(data)
        with pytest.raises(UserError, match="is damaged"):
            checkpoint.load(tmp_path / "x.pkl")
    assert not any(hasattr(known, "evil") for known in published.KNOWN.values())


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_a_storage_holds_what_it_claims():
    data = torch_saved(torch.arange(4.0).storage())
    assert published.storage_from_bytes(data).tolist() == [0, 1, 2, 3]
    for other in (data[:-24], data[:-16], data[:-4], data[:-1], data + bytes(4), data.replace(b"Float", b"Short")):
        with pytest.raises((ValueError, RuntimeError)):
            published.storage_from_bytes(other)


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_damage_is_called_damage(authors_file):
    path = authors_file(CASES[0])
    files = [path.read_bytes()[:keep] for keep in (1, 100, -1000, -1)]
    deep = persistent("Layer", {"_parameters": {}})
    for _ in range(16):  # 2^16 modules, if each were looked at wherever it stands
        deep = persistent("EDMPrecond", {"_modules": OrderedDict(a=deep, b=deep)})
    networks, storage = [deep], torch.arange(4.0).storage()
    for size in ((5,), (2**40,), (2, 4)):  # of a storage of 4 numbers
        tensor = Call(torch._utils._rebuild_tensor_v2, storage, 0, size, (1,) * len(size), False, OrderedDict())
        networks.append(persistent("EDMPrecond", {"_parameters": {"weight": tensor}}))
    for storage in (b"", b"PK\x03\x04", torch_saved(torch.zeros(3))[:50]):
        networks.append(Call(torch.storage._load_from_bytes, storage))
    for number, data in enumerate(files + [pickle.dumps({"ema": network}) for network in networks]):
        path.write_bytes(data)
        with pytest.raises(UserError) as error:
            checkpoint.load(path)
        assert str(error.value).endswith("vp.pkl is damaged, or not a checkpoint of this project"), number
