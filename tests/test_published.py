"""Files in the layout of the authors' and of the lessons': right numbers, and nothing in them runs."""

import builtins
import io
import os
import pickle
import sys
import time
import types
from collections import OrderedDict

import numpy
import pytest
import torch
from reference import assert_close, wave
from test_network import CASES, reference_net
from torch import nn

from edm import checkpoint, unpickle
from edm.errors import UserError
from edm.generate import build_denoiser


def reconstruct(meta):
    raise AssertionError("code of the file ran")


@pytest.fixture(autouse=True)
def authors_module(monkeypatch):
    """The module that the authors' pickles name; the reader must not import it."""
    module = types.ModuleType("torch_utils.persistence")
    reconstruct.__module__, reconstruct.__qualname__ = "torch_utils.persistence", "_reconstruct_persistent_obj"
    module._reconstruct_persistent_obj = reconstruct
    monkeypatch.setitem(sys.modules, "torch_utils", types.ModuleType("torch_utils"))
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
    state = {key: value for key, value in nn.Module().__dict__.items()}
    state |= {"_parameters": module._parameters, "_buffers": module._buffers, "_modules": OrderedDict(children)}
    return Persistent(class_name, {**state, "_init_args": (), "_init_kwargs": {"dropout": 0.1}, **attributes})


def authors_file(path, case, protocol=4, class_name=None, **attributes):
    net = reference_net(case).float()
    attributes = {
        "img_resolution": case["img_resolution"],
        "sigma_data": numpy.float64(0.5),
        "beta_d": numpy.float32(19.9),
        "M": 1000,
        **attributes,
    }
    network = in_authors_layout(net, class_name or case["preconditioning"], **attributes)
    path.write_bytes(pickle.dumps({"ema": network, "dataset_kwargs": {"resolution": 16}}, protocol=protocol))
    return path


def check_numbers(case, path):
    """The network in a file gives the reference numbers, to float32's precision."""
    contents = checkpoint.read(path)
    net = build_denoiser(checkpoint.read_config(contents, path))
    checkpoint.load_weights(net, contents["ema"], path)
    res, channels = case["img_resolution"], case["img_channels"]
    x = wave(2, channels, res, res, scale=0.5, frequency=0.7, phase=0.3)
    labels = torch.eye(10)[[3, 7]] if case["label_dim"] else None
    augment_labels = wave(2, case["augment_dim"], scale=0.3, frequency=1.1, phase=0.2)
    with torch.no_grad():
        D = net.double().eval()(x, torch.tensor([0.05, 1.7], dtype=torch.float64), labels, augment_labels)
    assert_close(D.flatten()[:8], case["denoised"]["first"])


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['architecture']}-{case['preconditioning']}")
def test_a_file_in_the_authors_layout_gives_their_numbers(case, tmp_path):
    check_numbers(case, authors_file(tmp_path / "network.pkl", case))


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 5])
def test_every_pickle_protocol_is_read(protocol, tmp_path):
    check_numbers(CASES[1], authors_file(tmp_path / "network.pkl", CASES[1], protocol))


@pytest.mark.parametrize("case", [CASES[1], CASES[4], CASES[2]], ids=["edm", "vp", "ncsnpp"])
def test_a_lessons_checkpoint_gives_the_numbers(case, tmp_path, capsys):
    weights = {f"_score_network.{name}": tensor for name, tensor in reference_net(case).float().state_dict().items()}
    weights["_score_network.model.enc.8x8_down.conv0.resample_filter"] = torch.ones(
        1, 1, *2 * [4 if "ncsn" in case["architecture"] else 2]
    )
    config = {
        "diffusion": {"score_network": {"target": f"lesson.diffusion.{case['preconditioning']}", "params": {}}},
        "epochs": 3,
    }
    torch.save({"model_state_dict": weights, "config": config, "step": 20000}, tmp_path / "diffusion-20000.pt")
    check_numbers(case, tmp_path / "diffusion-20000.pt")
    assert checkpoint.read(tmp_path / "diffusion-20000.pt")["step"] == 20000
    assert capsys.readouterr().out == ""
    torch.save({"model_state_dict": weights}, tmp_path / "silent.pt")
    assert checkpoint.read(tmp_path / "silent.pt")["config"]["preconditioning"]["formulation"] == "edm"
    assert "does not say how it is preconditioned; taken as edm" in capsys.readouterr().out


def test_sampling_and_exporting(script, tmp_path):
    path = authors_file(tmp_path / "edm-tiny-cond-vp.pkl", CASES[1])
    code, _, err = script("sample.py", "--checkpoint", path, "--num_samples", 2, "--sampling_steps", 2)
    assert (code, err.count("Traceback")) == (0, 0)
    assert (tmp_path / "output/image/image_folder/sample/edm-tiny-cond-vp/grid.png").exists()
    assert script("sample.py", "--checkpoint", path, "--export", "small.pt")[0] == 0
    small, large = torch.load(tmp_path / "small.pt", weights_only=True), checkpoint.read(path)
    assert small["config"]["network"]["label_dim"] == 10
    for name, tensor in large["ema"].items():
        assert torch.equal(small["ema"][name], tensor.half() if tensor.ndim > 1 else tensor)
    assert script("sample.py", "--checkpoint", "small.pt", "--num_samples", 2, "--sampling_steps", 2)[0] == 0


class Call:
    """Pickled as a call."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def torch_saved(obj) -> bytes:
    file = io.BytesIO()
    torch.save(obj, file, _use_new_zipfile_serialization=False)
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
def test_hostile_pickles_are_refused_by_name_and_nothing_runs(name, protocol, script, tmp_path):
    network = Persistent("EDMPrecond", {"_parameters": {}, "_modules": {}, "extra": HOSTILE[name]()})
    (tmp_path / "hostile.pkl").write_bytes(pickle.dumps({"ema": network}, protocol=protocol))
    code, out, err = script("sample.py", "--checkpoint", "hostile.pkl")
    assert code == 2
    assert err.replace("__builtin__", "builtins") == (
        f"error: hostile.pkl is refused: it asks for {name}, which is no data and could run code\n"
    )
    assert not (tmp_path / "bomb").exists()
    assert out == ""


def test_a_damaged_storage_is_damage_and_no_attack(tmp_path):
    for data in (b"", b"PK\x03\x04", torch_saved(torch.zeros(3))[:50]):
        (tmp_path / "x.pkl").write_bytes(pickle.dumps({"ema": Call(torch.storage._load_from_bytes, data)}))
        with pytest.raises(UserError, match="is damaged"):
            checkpoint.read(tmp_path / "x.pkl")


def test_a_bare_hostile_pickle_and_one_in_a_tensors_state_are_refused(tmp_path):
    for contents in (
        Call(os.system, "true"),
        [Call(builtins.input)],
        {"ema": Call(torch._utils._rebuild_tensor_v2, Call(os.getcwd))},
    ):
        (tmp_path / "hostile.pkl").write_bytes(pickle.dumps(contents))
        with pytest.raises(UserError, match="is refused: it asks for"):
            checkpoint.read(tmp_path / "hostile.pkl")


def crafted(*opcodes: bytes) -> bytes:
    return pickle.PROTO + b"\x02" + b"".join(opcodes) + pickle.STOP


WRAPPER = b"ctorch_utils.persistence\n_reconstruct_persistent_obj\n"
STATE = {
    "a function": crafted(WRAPPER, b"}", b"U\x04evil", b"K\x01", b"s", b"b"),
    "a class": crafted(b"cnumpy\ndtype\n", b"}", b"U\x04evil", b"K\x01", b"s", b"b"),
    "a tensor": pickle.dumps(torch.zeros(4))[:-1] + b"(K\x01K\x02tb.",
}


@pytest.mark.parametrize("name", STATE)
def test_only_records_are_given_state(name, tmp_path):
    """A tensor's own way of taking a state would let it read memory that is not its own."""
    (tmp_path / "x.pkl").write_bytes(STATE[name])
    with pytest.raises(UserError, match="is refused: it asks for the state of a"):
        checkpoint.read(tmp_path / "x.pkl")
    assert not hasattr(unpickle.persistent_object, "evil")
    assert not hasattr(unpickle.NumpyDtype, "evil")


def test_small_files_cannot_take_long(tmp_path):
    """Modules that hold each other twice, 60 levels deep; a memo of 2^28 places; a config that holds itself."""
    module = Persistent("Layer", {"_parameters": {}})
    for _ in range(60):
        module = Persistent("EDMPrecond", {"_modules": OrderedDict(a=module, b=module)})
    (tmp_path / "deep.pkl").write_bytes(pickle.dumps({"ema": module}))
    (tmp_path / "memo.pkl").write_bytes(crafted(b"}", b"r" + (2**28).to_bytes(4, "little")))
    config = [1]
    for _ in range(60):
        config = [config, config]
    config[0].append(config)
    torch.save({"model_state_dict": {}, "config": config}, tmp_path / "lesson.pt")
    began = time.monotonic()
    for name in ("deep.pkl", "memo.pkl"):
        with pytest.raises(UserError, match="is damaged"):
            checkpoint.read(tmp_path / name)
    with pytest.raises(UserError, match="none of"):
        checkpoint.read(tmp_path / "lesson.pt")
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    "change",
    [
        {"sigma_data": None},
        {"sigma_data": "x"},
        {"class_name": "VPPrecond", "beta_d": None},
        {"class_name": "VPPrecond", "M": 10**400},
    ],
)
def test_odd_attributes_end_in_one_line(change, tmp_path):
    with pytest.raises(UserError, match="is damaged"):
        checkpoint.read(authors_file(tmp_path / "network.pkl", CASES[0], **change))


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(3).to_sparse(),
        torch.zeros(3, device="meta"),
        torch.zeros(3, dtype=torch.complex64),
        torch.zeros(1).expand(2**40),
    ],
    ids=["sparse", "meta", "complex", "expanded"],
)
def test_odd_tensors_end_in_one_line(tensor, tmp_path):
    torch.save({"model_state_dict": {"_score_network.model.out_conv.weight": tensor}}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="not a table of tensors"):
        checkpoint.read(tmp_path / "x.pt")
    torch.save({"step": 1, "name": "x", "config": {}, "ema": {"weight": tensor}}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="its ema is not a table of tensors"):
        checkpoint.read(tmp_path / "x.pt")


def test_what_the_file_says_of_itself_is_kept_or_must_be_so(tmp_path):
    contents = checkpoint.read(authors_file(tmp_path / "network.pkl", CASES[0], sigma_data=0.3))
    assert contents["config"]["preconditioning"]["sigma_data"] == 0.3
    assert contents["config"]["network"]["dropout"] == 0.1
    with pytest.raises(UserError, match=r"it says channel_mult \[1, 4\], but its weights have \(1, 2\)"):
        checkpoint.read(authors_file(tmp_path / "network.pkl", CASES[0], _init_kwargs={"channel_mult": [1, 4]}))
    weights = {f"_score_network.{name}": tensor for name, tensor in reference_net(CASES[0]).state_dict().items()}
    torch.save({"model_state_dict": weights, "config": {"a": [{"sigma_data": 0.25}, "x.EDMPrecond"]}}, tmp_path / "x.pt")
    assert checkpoint.read(tmp_path / "x.pt")["config"]["preconditioning"]["sigma_data"] == 0.25


@pytest.mark.parametrize("keep", [1, 100, -1, -1000])
def test_truncated_pickles_are_recognised(keep, tmp_path):
    path = authors_file(tmp_path / "network.pkl", CASES[0])
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"network\.pkl is damaged, or not a checkpoint"):
        checkpoint.read(path)


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_tensors_that_reach_beyond_their_memory_are_refused(tmp_path):
    storage = torch.arange(4.0).storage()
    for size in ((5,), (2**40,), (2, 4)):
        tensor = Call(torch._utils._rebuild_tensor_v2, storage, 0, size, (1,) * len(size), False, OrderedDict())
        network = Persistent("EDMPrecond", {"_parameters": {"weight": tensor}})
        (tmp_path / "x.pkl").write_bytes(pickle.dumps({"ema": network}))
        with pytest.raises(UserError, match="is damaged"):
            checkpoint.read(tmp_path / "x.pkl")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_name": "Generator"}, "unknown network 'Generator'"),
        ({"class_name": "VPPrecond", "beta_d": 5.0}, "its beta_d is 5.0, and only 19.9 is known here"),
    ],
)
def test_networks_of_another_kind_are_refused(change, message, tmp_path):
    with pytest.raises(UserError, match=message):
        checkpoint.read(authors_file(tmp_path / "network.pkl", CASES[0], **change))


def test_other_weights_are_refused(tmp_path, capsys):
    torch.save({"model_state_dict": {"_score_network.model.weight": torch.zeros(3)}}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="its network is none of ddpmpp, ncsnpp, adm"):
        checkpoint.read(tmp_path / "x.pt")
    torch.save({"model_state_dict": {"_score_network.model.weight": 3}}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="its weights are not a table of tensors"):
        checkpoint.read(tmp_path / "x.pt")
    weights = {f"_score_network.{name}": tensor for name, tensor in reference_net(CASES[0]).state_dict().items()}
    torch.save({"model_state_dict": weights, "config": ["VPPrecond", {"preconditioning": "edm"}]}, tmp_path / "x.pt")
    checkpoint.read(tmp_path / "x.pt")
    assert "names several formulations (edm, vp); taken as edm" in capsys.readouterr().out
    weights["_score_network.model.enc.8x8_down.conv0.resample_filter"] = torch.ones(1, 1, 4, 4)
    torch.save({"model_state_dict": weights, "config": {}}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="does not have the 2 taps of ddpmpp"):
        checkpoint.read(tmp_path / "x.pt")
