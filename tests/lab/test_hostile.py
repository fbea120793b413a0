"""Files made to do harm: each ends in one line, without a warning, and soon."""

import io
import json
import pickle
import warnings
from collections import OrderedDict

import pytest
import safetensors.torch
import torch
from torch import nn

from lab.checkpoint import NUM_BANDS

CONTENTS = {"step": 3, "name": "x", "config": {}, "ema": {"weight": torch.zeros(4, 4)}}
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
DOUBLED = b"K\0q\0" + b"h\0\x86q\0" * 64  # a tuple of 2^64 numbers, by references


def saved(value: object, **options) -> bytes:
    torch.save(value, file := io.BytesIO(), **options)
    return file.getvalue()


def with_ema(ema: object) -> bytes:
    return saved({**CONTENTS, "ema": ema})


def storage(numbers: int, cut: int = 0) -> bytes:
    """The pickle of a call that makes a storage, of which `cut` bytes are missing."""
    data = saved(torch.zeros(numbers).storage(), _use_new_zipfile_serialization=False)
    data = data[: len(data) - cut]
    return b"ctorch.storage\n_load_from_bytes\nB" + len(data).to_bytes(4, "little") + data + b"\x85R"


def network(parameter: bytes) -> bytes:
    """The pickle of a network of the authors' with one parameter."""
    record = b"ctorch.nn.modules.container\nModuleDict\n)\x81"
    return b"\x80\x03}X\3\0\0\0ema" + record + b"}X\x0b\0\0\0_parameters}X\1\0\0\0w" + parameter + b"ssbs."


class Hiding:
    """Pickled as an OrderedDict of one tensor, with attributes that hide its methods."""

    def __init__(self, **attributes):
        self.attributes = attributes

    def __reduce__(self):
        return OrderedDict, (), self.attributes, None, iter([("weight", torch.zeros(4))])


def hiding_parameter(**attributes: object) -> nn.Parameter:
    parameter = nn.Parameter(torch.zeros(4))
    parameter.__dict__.update(attributes)
    return parameter


def in_itself() -> dict:
    value = {}
    value["a"] = value
    return value


def doubled_dict() -> dict:
    value = {}
    for _ in range(64):
        value = {"a": value, "b": value}
    return value


def shared(**metadata: str) -> bytes:
    """A safetensors file of tiny weights."""
    metadata = {"step": "3", "name": "x", "config": "{}"} | metadata
    return safetensors.torch.save(CONTENTS["ema"], metadata)


def headed(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def script_module() -> bytes:
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), file := io.BytesIO())
    return file.getvalue()


entry = {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 4]}
HOSTILE = {
    "storage without bytes.pkl": lambda: network(storage(45_745, cut=4 * 45_745)),
    "storage that lacks a byte.pkl": lambda: network(storage(1000, cut=1)),
    "storage too small for its tensor.pkl": lambda: network(REBUILD + b"(" + storage(4) + b"K\0(K\5t(K\1tNNtR"),
    "tensor expanded from a number.pkl": lambda: network(REBUILD + b"(" + storage(4) + b"K\0(J\0\0\0\x40t(K\0tNNtR"),
    "doubled tuple as a key.pkl": lambda: b"\x80\x04}" + DOUBLED + b"K\1s.",
    "doubled tuple as keys.pkl": lambda: b"\x80\x04}(" + DOUBLED + b"K\1K\2K\3u.",
    "doubled tuple in a set.pkl": lambda: b"\x80\x04\x8f(" + DOUBLED + b"\x90.",
    "doubled tuple in a frozen set.pkl": lambda: b"\x80\x04(" + DOUBLED + b"\x91.",
    "doubled tuple as pairs.pkl": lambda: b"\x80\x04ccollections\nOrderedDict\n]](" + DOUBLED + b"K\1ea\x85R.",
    "doubled tuple as a storage.pkl": lambda: b"\x80\x04ctorch.storage\n_load_from_bytes\n" + DOUBLED + b"\x85R.",
    "doubled tuple as a class.pkl": lambda: b"\x80\x03}X\3\0\0\0ema" + DOUBLED + b"s.",
    "deep tuple as a key.pkl": lambda: b"\x80\x04})" + b"\x85" * 10**6 + b"K\1s.",
    "deep list.pkl": lambda: network(b"]" * 10**6 + b"a" * (10**6 - 1)),
    "hex of hex.pkl": lambda: b"\x80\x03c_codecs\nencode\nX\1\0\0\0aX\3\0\0\0hex\x86R.",
    "bytearray of 2^60.pkl": lambda: b"\x80\x05\x96" + (2**60).to_bytes(8, "little") + b".",
    "bytes of 2^60.pkl": lambda: b"\x80\x04\x8e" + (2**60).to_bytes(8, "little") + b".",
    "keys hidden.pkl": lambda: pickle.dumps({"ema": Hiding(keys=3, items=3, get=3)}),
    "keys hidden.pt": lambda: saved(Hiding(keys=3)),
    "items hidden.pt": lambda: with_ema(Hiding(items=3, values=OrderedDict())),
    "items hidden by a function.pt": lambda: with_ema(Hiding(items=OrderedDict, keys=OrderedDict)),
    "tensor's methods hidden.pt": lambda: with_ema({"w": hiding_parameter(is_floating_point=3, numel=3, isfinite=3)}),
    "dict in itself.pt": lambda: with_ema(in_itself()),
    "doubled dict.pt": lambda: with_ema(doubled_dict()),
    "nested.pt": lambda: with_ema({"weight": torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])}),
    "sparse.pt": lambda: with_ema({"weight": torch.eye(3).to_sparse_csr()}),
    "quantised.pt": lambda: with_ema({"weight": torch.quantize_per_tensor(torch.zeros(3), 1.0, 0, torch.quint8)}),
    "eight bits.pt": lambda: with_ema({"weight": torch.zeros(3).to(torch.float8_e5m2)}),
    "script.pt": script_module,
    "protocol 5.pt": lambda: saved(CONTENTS | {"step": []}, pickle_protocol=5),
    "step of many digits.pt": lambda: saved(CONTENTS | {"step": 10**5000}),
    "losses of another width.pt": lambda: saved(CONTENTS | {"losses": torch.zeros(1).expand(3, 1 + NUM_BANDS)}),
    "not a number.pt": lambda: with_ema({"weight": torch.full((4, 4), torch.nan)}),
    "not a number.safetensors": lambda: safetensors.torch.save({"weight": torch.full((4,), torch.inf)}, {"step": "3"}),
    "no metadata.safetensors": lambda: safetensors.torch.save(CONTENTS["ema"]),
    "eight bits.safetensors": lambda: headed(json.dumps({"w": entry | {"dtype": "F8_E5M2", "shape": [4]}}).encode(), b"1234"),
    "huge header.safetensors": lambda: (2**63).to_bytes(8, "little") + b"{}",
    "huge shape.safetensors": lambda: headed(json.dumps({"weight": entry}).encode(), b"\0" * 4),
    "deep header.safetensors": lambda: headed(b'{"a":' * 10**5),
    "deep config.safetensors": lambda: shared(config="[" * 10**5),
    "config of numbers.safetensors": lambda: shared(config='{"network": 3}'),
    "config with another key.safetensors": lambda: shared(config='{"network": {"\\u001b[31m": 3}}'),
    "huge network.safetensors": lambda: shared(config='{"network": {"model_channels": 2048, "num_blocks": 64}}'),
    "step of many digits.safetensors": lambda: shared(step="9" * 5000),
    "name of a folder.safetensors": lambda: shared(name="../x"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_ends_in_one_line(name, tmp_path, script):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (tmp_path / name).write_bytes(HOSTILE[name]())
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        code, out, err = script("sample.py", "--checkpoint", name, "--export", "x.safetensors")
    assert (code, out, err.count("\n"), shown) == (2, "", 1, [])
    assert err.isascii() and err[:-1].isprintable()
    assert not (tmp_path / "x.safetensors").exists()
