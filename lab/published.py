"""Checkpoints that others have written: networks published with the paper, and those of lessons built on the same networks.

The published networks are pickles that carry their source code with them. None of it runs: `Unpickler` knows tensors,
numbers and plain containers, turns the networks' objects into a `Record` of their state, and refuses every other name.
"""

import io
import math
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import numpy
import torch

from lab.cli import UserError, brief, nearest

# The published classes, the formulation of each, and the constants that it must have to be the one of Table 1.
CLASSES = {
    "edmprecond": ("edm", {}),
    "vpprecond": ("vp", {"beta_d": 19.9, "beta_min": 0.1, "M": 1000, "epsilon_t": 1e-5}),
    "veprecond": ("ve", {"sigma_min": 0.02, "sigma_max": 100}),
    "iddpmprecond": ("iddpm", {"M": 1000, "C_1": 0.001, "C_2": 0.008}),
}
TAPS = {"ddpmpp": 2, "ncsnpp": 4, "adm": 2}  # of the filters that resample


def read_pickle(data: bytes, path: Path) -> dict:
    """Read a network published with the paper; returns `step`, `name`, `config` and `ema`, as in a checkpoint of ours.

    Raises:
        UserError: the network is of a kind that is not known here.
        pickle.UnpicklingError: the file asks for more than data, "GLOBAL module.name".
    """
    return from_record(Unpickler(io.BytesIO(data), KNOWN).load()["ema"], path)


def read_lesson(contents: dict, path: Path) -> dict:
    """Return `step`, `name` and `ema`, as in a checkpoint of ours but without `config`, from the checkpoint of a lesson.

    Args:
        contents: holds `model_state_dict`; the names of the network's weights in it begin with "_score_network.".
        path: the file, for error messages.

    Raises:
        UserError: it holds no weights of such names.
    """
    prefix, step = "_score_network.", contents.get("step", 0)
    weights = contents["model_state_dict"].items()
    ema = network_weights({name.removeprefix(prefix): tensor for name, tensor in weights if name.startswith(prefix)})
    if not ema:
        raise UserError(f"{path}: no name in its model_state_dict begins with {prefix}model.")
    return {"step": step if type(step) is int and step in range(2**53) else 0, "name": path.stem, "ema": ema}


def network_weights(weights: dict) -> dict[str, torch.Tensor]:
    """Return the weights of the network, without the constant filters that our modules do not store."""
    if not all(map(is_plain, weights.values())):
        raise ValueError("not a table of tensors of floating-point numbers")
    return {name: tensor for name, tensor in weights.items() if name.startswith("model.") and "resample_filter" not in name}


def is_plain(tensor: object) -> bool:
    """Return whether a value is a tensor of usual floating-point numbers, all in memory (not sparse, meta or expanded)."""
    return (
        isinstance(tensor, torch.Tensor)
        and (tensor.layout == torch.strided and not tensor.is_nested)
        and tensor.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        and tensor.device.type == "cpu"
        and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
    )


# From a record to the contents of a checkpoint


def from_record(network: "Record", path: Path) -> dict:
    """Return the contents of a checkpoint from the record of a published network.

    Raises:
        UserError: the network is of a kind that is not known here.
    """
    state, name = network.state, network.class_name
    if not isinstance(name, str) or name.lower() not in CLASSES:
        raise UserError(f"{path}: unknown network {brief(name)}; {nearest(brief(name), CLASSES)}")
    formulation, constants = CLASSES[name.lower()]
    for key, known in constants.items():
        if not math.isclose(state.get(key, known), known, rel_tol=1e-6):
            raise UserError(f"{path}: its {key} is {brief(state[key])}, and only {known} is known here")
    tensors = dict(tensors_of(network, "", set()))
    weights = network_weights(tensors)
    data, options = data_and_network(weights)
    taps = TAPS[options["architecture"]]
    if any(tensor.numel() != taps**2 for name, tensor in tensors.items() if name.endswith("resample_filter")):
        raise UserError(f"{path}: its resampling filter does not have the {taps} taps of {options['architecture']}")
    said = {**state.get("_init_kwargs", {}), **state["_modules"]["model"].state.get("_init_kwargs", {})}
    options["dropout"] = float(said.get("dropout", 0.1))
    preconditioning = {"formulation": formulation, "sigma_data": float(state.get("sigma_data", 0.5))}
    config = {"data": data, "network": options, "preconditioning": preconditioning}
    return {"step": 0, "name": path.stem, "config": config, "ema": weights}


def tensors_of(record: "Record", prefix: str, seen: set[int]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the parameters of a module's record and its submodules with their full names, and the buffers that matter."""
    if id(record) in seen:
        raise ValueError("a module stands in two places, so that the walk could take for ever")
    seen.add(id(record))
    for kind in ("_parameters", "_buffers"):
        for name, tensor in record.state.get(kind, {}).items():
            if tensor is not None and (kind == "_parameters" or name in ("freqs", "resample_filter")):
                yield prefix + name, tensor
    for name, module in record.state.get("_modules", {}).items():
        yield from tensors_of(module, f"{prefix}{name}.", seen)


def data_and_network(weights: dict[str, torch.Tensor]) -> tuple[dict, dict]:
    """Return the config sections `data` and `network` that weights belong to, from their names and shapes."""
    matches = [re.fullmatch(r"model\.enc\.(\d+)x\1_block(\d+)\.conv0\.weight", name) for name in weights]
    blocks = [(int(match[1]), int(match[2])) for match in matches if match]
    resolutions = sorted({res for res, _ in blocks}, reverse=True)
    top = resolutions[0]

    def shape(name: str) -> tuple[int, ...]:
        return tuple(weights[f"model.{name}"].shape)

    def inputs(name: str) -> int:
        return shape(name)[1] if f"model.{name}" in weights else 0

    marks = {"adm": "model.out_conv.weight", "ncsnpp": "model.map_noise.freqs"}  # weights that no other architecture has
    architecture = next((name for name, mark in marks.items() if mark in weights), "ddpmpp")
    model_channels = shape("map_layer0.weight")[0] // 4
    network = {
        "architecture": architecture,
        "model_channels": model_channels,
        "channel_mult": [shape(f"enc.{res}x{res}_block0.conv0.weight")[0] // model_channels for res in resolutions],
        "num_blocks": 1 + max(index for _, index in blocks),
        "attn_resolutions": [res for res in resolutions if f"model.enc.{res}x{res}_block0.qkv.weight" in weights],
        "label_dim": inputs("map_label.weight"),
        "augment_dim": inputs("map_augment.weight"),
    }
    return {"dataset": "image_folder", "resolution": top, "channels": shape(f"enc.{top}x{top}_conv.weight")[1]}, network


# Reading pickles as data


class Record:
    """Holds the state of an object that is not created, and the class name if it is in the wrapper of the published files.

    The source code in the wrapper (`module_src`) is not looked at.
    """

    class_name = ""

    def __init__(self, meta: dict):
        self.class_name, self.state = meta["class_name"], meta["state"]


def storage_from_bytes(data: bytes) -> torch.Tensor:
    """Return the memory of a tensor, which the file holds in PyTorch's own old format, as a tensor of one dimension.

    The format is five pickles (magic number, version, machine, storage, keys), the number of elements in 8 bytes, the elements.
    """
    header = io.BytesIO(data[:1024])
    unpickler = Unpickler(header, STORAGES)
    magic, _, machine, (_, dtype, _, _, count, _), _ = (unpickler.load() for _ in range(5))
    storage = torch.frombuffer(data, dtype=dtype, offset=header.tell() + 8)
    if magic != 0x1950A86A20F9469CFC6C or not machine["little_endian"] or len(storage) != count:
        raise ValueError("damaged")
    return storage


def numpy_dtype(name: str, *ignored: object) -> numpy.dtype:
    """Return the NumPy type of a plain number."""
    if not re.fullmatch("b1|[iu][1248]|f[248]", name):
        raise pickle.UnpicklingError(f"GLOBAL numpy.dtype({name!r})")
    return numpy.dtype(f"<{name}")


STORAGES = {
    f"torch.{kind}Storage": getattr(torch, kind.lower())
    for kind in ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Bool")
}
KNOWN = {
    "torch_utils.persistence._reconstruct_persistent_obj": Record,
    "torch.nn.modules.container.ModuleDict": Record,
    "torch.storage._load_from_bytes": storage_from_bytes,
    "torch._utils._rebuild_tensor_v2": lambda storage, offset, size, stride, *ignored: storage.as_strided(size, stride, offset),
    "torch._utils._rebuild_parameter": lambda data, requires_grad, hooks: data,
    "collections.OrderedDict": lambda: {},
    "builtins.set": lambda *elements: [],  # no set is looked at
    "numpy.dtype": numpy_dtype,
    "numpy.core.multiarray.scalar": lambda dtype, data: numpy.frombuffer(data, dtype).item(),
}
KNOWN["numpy._core.multiarray.scalar"] = KNOWN["numpy.core.multiarray.scalar"]  # its name since NumPy 2
OPCODES = """PROTO FRAME STOP MARK MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET NONE NEWTRUE NEWFALSE BININT BININT1 BININT2
LONG1 BINFLOAT SHORT_BINUNICODE BINUNICODE BINUNICODE8 SHORT_BINBYTES BINBYTES BINBYTES8 EMPTY_TUPLE TUPLE1 TUPLE2 TUPLE3 TUPLE
EMPTY_LIST APPEND APPENDS EMPTY_DICT GLOBAL STACK_GLOBAL REDUCE NEWOBJ BINPERSID"""


class Unpickler(pickle._Unpickler):
    """An unpickler of data alone, in protocols 3 and later. It is Python's own unpickler written in Python; the one in C would
    let a file set the state of any object, of the functions above too. Sets become lists.

    Args:
        file: the pickle.
        known: {name in the file: what stands for it}.
    """

    codes = [getattr(pickle, name)[0] for name in OPCODES.split()]  # noqa: RUF012
    dispatch = dict(zip(codes, map(pickle._Unpickler.dispatch.get, codes)))  # noqa: RUF012
    dispatch[pickle.EMPTY_SET[0]] = dispatch[pickle.EMPTY_LIST[0]]
    dispatch[pickle.ADDITEMS[0]] = dispatch[pickle.APPENDS[0]]
    dispatch[pickle.SETITEM[0]] = lambda self: self.set_items([self.stack.pop(-2), self.stack.pop()])
    dispatch[pickle.SETITEMS[0]] = lambda self: self.set_items(self.pop_mark())
    dispatch[pickle.BUILD[0]] = lambda self: self.set_state(self.stack.pop(), self.stack[-1])
    persistent_load = staticmethod(lambda description: description)  # of a storage

    def __init__(self, file: io.BytesIO, known: dict[str, object]):
        super().__init__(file)
        self.known = known

    def find_class(self, module: str, name: str):
        """Return what stands for a name in the file; raises `pickle.UnpicklingError` for a name that is not known."""
        if f"{module}.{name}" not in self.known:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")
        return self.known[f"{module}.{name}"]

    def set_items(self, items: list) -> None:
        """Set entries of a dict. Their keys are text, as hashing a nest of tuples can last for ever."""
        if type(self.stack[-1]) is not dict or not all(isinstance(key, str) for key in items[::2]):
            raise ValueError("an entry that is not one of a dict, or has a key that is not text")
        self.stack[-1].update(zip(items[::2], items[1::2]))

    def set_state(self, state: object, target: object) -> None:
        """Set the state of a record, and leave dicts and NumPy types (whose state is their byte order) as they are."""
        if isinstance(target, Record):
            target.state = state
        elif not isinstance(target, dict | numpy.dtype) or (isinstance(target, numpy.dtype) and state[1] == ">"):
            raise ValueError("a state that is not known, or the number of a big-endian machine")
