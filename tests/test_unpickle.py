"""Hostile and damaged pickles: refused, and nothing in them runs."""

import builtins
import io
import os
import pickle
import time
import types
from collections import OrderedDict

import numpy
import pytest
import torch
from authors import Persistent
from torch import nn

from edm import checkpoint, unpickle
from edm.errors import UserError

pytestmark = pytest.mark.usefixtures("authors_module")


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


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_tensors_that_reach_beyond_their_memory_are_refused(tmp_path):
    storage = torch.arange(4.0).storage()
    for size in ((5,), (2**40,), (2, 4)):
        tensor = Call(torch._utils._rebuild_tensor_v2, storage, 0, size, (1,) * len(size), False, OrderedDict())
        network = Persistent("EDMPrecond", {"_parameters": {"weight": tensor}})
        (tmp_path / "x.pkl").write_bytes(pickle.dumps({"ema": network}))
        with pytest.raises(UserError, match="is damaged"):
            checkpoint.read(tmp_path / "x.pkl")
