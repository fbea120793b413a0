"""Checkpoints that others have written: networks published with the paper, and those of lessons built on the same networks.

The published networks are pickles that carry their source code with them. None of it runs: `Unpickler` knows tensors,
numbers and plain containers, turns the networks' objects into a `Record` of their state, and refuses every other name.
"""

import io
import math
import pickle
import re
from collections import OrderedDict
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


def refusal(path: Path, name: str) -> UserError:
    """Return the error about a file that names something that could run code."""
    return UserError(f"{path} is refused: it asks for {name}, which is not data and could run code")


def damaged(path: Path) -> UserError:
    """Return the error about a file that cannot be read."""
    return UserError(f"{path} is damaged, or not a checkpoint of this project")


def read_pickle(path: Path) -> dict:
    """Read a network published with the paper; returns `step`, `name`, `config` and `ema`, as in a checkpoint of ours.

    Raises:
        UserError: the file asks for more than data, is damaged, or holds something else.
    """
    try:
        with open(path, "rb") as file:
            contents = Unpickler(file).load()
        return from_record(contents["ema"], path)
    except Refused as error:
        raise refusal(path, str(error)) from None
    except (UserError, PermissionError):
        raise
    except Exception:  # a damaged pickle can make its reader raise anything
        raise damaged(path) from None


def read_lesson(contents: dict, path: Path) -> dict:
    """Return `step`, `name` and `ema`, as in a checkpoint of ours but without `config`, from the checkpoint of a lesson.

    Args:
        contents: holds `model_state_dict`; the names of the network's weights in it begin with "_score_network.".
        path: the file, for error messages.

    Raises:
        UserError: the weights are not tensors, or there are none.
    """
    prefix, weights, step = "_score_network.", contents["model_state_dict"], contents.get("step", 0)
    if not isinstance(weights, dict):
        raise UserError(f"{path}: its model_state_dict is not a table of tensors")
    weights = {str(name).removeprefix(prefix): tensor for name, tensor in weights.items() if str(name).startswith(prefix)}
    ema = network_weights(weights, path)
    if not ema:
        raise UserError(f"{path}: no name in its model_state_dict begins with {prefix}model.")
    return {"step": step if isinstance(step, int) and step >= 0 else 0, "name": path.stem, "ema": ema}


def network_weights(weights: dict, path: Path) -> dict[str, torch.Tensor]:
    """Return the weights of the network, without the constant filters that our modules do not store.

    Raises:
        UserError: they are not all floating-point tensors.
    """
    if not all(is_plain(tensor) for tensor in weights.values()):
        raise UserError(f"{path}: its weights are not a table of tensors of floating-point numbers")
    return {name: tensor for name, tensor in weights.items() if name.startswith("model.") and "resample_filter" not in name}


def is_plain(tensor: object) -> bool:
    """Return whether a value is a floating-point tensor whose numbers are all in memory (not sparse, meta or expanded)."""
    return (
        isinstance(tensor, torch.Tensor)
        and tensor.layout == torch.strided
        and tensor.is_floating_point()
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
            raise UserError(f"{path}: its {key} is {state[key]}, and only {known} is known here")
    tensors = dict(tensors_of(network, "", set()))
    weights = network_weights(tensors, path)
    try:
        data, options = data_and_network(weights)
    except (KeyError, IndexError, ValueError, ZeroDivisionError):
        raise UserError(f"{path}: its network is none of {', '.join(TAPS)}") from None
    architecture = options["architecture"]
    taps = TAPS[architecture]
    if any(tensor.numel() != taps**2 for name, tensor in tensors.items() if name.endswith("resample_filter")):
        raise UserError(f"{path}: its resampling filter does not have the {taps} taps of {architecture}")
    said = {**state.get("_init_kwargs", {}), **state["_modules"]["model"].state.get("_init_kwargs", {})}
    for key in ("model_channels", "channel_mult", "num_blocks"):
        value = said.get(key, options[key])
        if (list(value) if isinstance(value, tuple) else value) != options[key]:
            raise UserError(f"{path}: it says {key} {brief(value)}, but its weights have {options[key]}")
    options["dropout"] = float(said.get("dropout", 0.1))
    preconditioning = {"formulation": formulation, "sigma_data": float(state.get("sigma_data", 0.5))}
    config = {"data": data, "network": options, "preconditioning": preconditioning}
    return {"step": 0, "name": path.stem, "config": config, "ema": weights}


def tensors_of(record: "Record", prefix: str, seen: set[int]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the parameters of a module's record and its submodules with their full names, and the buffers that matter.

    Raises:
        ValueError: a module stands in two places, so that the walk could take for ever.
    """
    if id(record) in seen:
        raise ValueError("a module stands in two places")
    seen.add(id(record))
    for kind in ("_parameters", "_buffers"):
        for name, tensor in record.state.get(kind, {}).items():
            if tensor is not None and (kind == "_parameters" or name in ("freqs", "resample_filter")):
                yield prefix + name, tensor
    for name, module in record.state.get("_modules", {}).items():
        yield from tensors_of(module, f"{prefix}{name}.", seen)


def data_and_network(weights: dict[str, torch.Tensor]) -> tuple[dict, dict]:
    """Return the config sections `data` and `network` that weights belong to, from their names and shapes."""
    blocks = [re.fullmatch(r"model\.enc\.(\d+)x\1_block(\d+)\.conv0\.weight", name) for name in weights]
    blocks = [(int(match[1]), int(match[2])) for match in blocks if match]
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


class Refused(pickle.UnpicklingError):
    """The error of an unpickler about a name that is not data."""


class Record:
    """Holds the class name, if the file tells it, and the state of an object that is not created."""

    def __init__(self, class_name: str = ""):
        self.class_name = class_name
        self.state = {}


def persistent_object(meta: dict) -> Record:
    """Return the record of an object in the wrapper of the published files; its source code (`module_src`) is not looked at."""
    record = Record(meta["class_name"])
    record.state = meta["state"]
    return record


def storage_from_bytes(data: bytes) -> torch.Tensor:
    """Return the memory of a tensor, which the file holds in PyTorch's own old format, as a tensor of one dimension."""
    try:
        storage = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        name = refused_name(error)
        raise (Refused(name) if name else ValueError("damaged")) from None
    return torch.tensor([], dtype=storage.dtype).set_(storage)


def tensor_from_storage(storage: torch.Tensor, offset: int, size: tuple, stride: tuple, *ignored: object) -> torch.Tensor:
    """Return a view of the storage; PyTorch raises RuntimeError if it reaches beyond the end."""
    return storage.as_strided(size, stride, offset)


def numpy_dtype(name: str, *ignored: object) -> numpy.dtype:
    """Return the NumPy type of a plain number."""
    if not re.fullmatch("b1|[iu][1248]|f[248]", name):
        raise Refused(f"numpy.dtype({name!r})")
    return numpy.dtype(f"<{name}")


def numpy_scalar(dtype: numpy.dtype, data: bytes) -> float | int | bool:
    """Convert a NumPy scalar to a Python number."""
    return numpy.frombuffer(data, dtype).item()


KNOWN = {
    "torch_utils.persistence._reconstruct_persistent_obj": persistent_object,
    "torch.nn.modules.container.ModuleDict": Record,
    "torch.storage._load_from_bytes": storage_from_bytes,
    "torch._utils._rebuild_tensor_v2": tensor_from_storage,
    "torch._utils._rebuild_parameter": lambda data, requires_grad, hooks: data,
    "collections.OrderedDict": OrderedDict,
    "builtins.set": set,
    "builtins.object": object,
    "copyreg._reconstructor": lambda cls, base, state: cls(),  # objects in protocols 0 and 1
    "_codecs.encode": lambda text, encoding: text.encode("latin1"),  # bytes in protocols 0 to 2
    "numpy.dtype": numpy_dtype,
    "numpy.core.multiarray.scalar": numpy_scalar,
    "numpy._core.multiarray.scalar": numpy_scalar,
}
OLD_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # the names of Python 2, which protocols 0 to 2 use


class Unpickler(pickle._Unpickler):
    """An unpickler of data alone. It is Python's own unpickler written in Python; the one in C would let a file set the state
    of any object, of the functions above too."""

    dispatch = dict(pickle._Unpickler.dispatch)  # noqa: RUF012

    def find_class(self, module: str, name: str):
        """Return what stands for a name in the file; raises `Refused` for a name that is not known."""
        known = f"{OLD_MODULES.get(module, module)}.{name}"
        if known not in KNOWN:
            raise Refused(f"{module}.{name}")
        return KNOWN[known]

    def load_build(self) -> None:
        """Set the state of a record, and leave dicts and NumPy types (whose state is their byte order) as they are."""
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Record):
            target.state = state
        elif isinstance(target, numpy.dtype) and state[1] == ">":
            raise ValueError("the number of a big-endian machine")
        elif not isinstance(target, OrderedDict | numpy.dtype):
            raise Refused(f"the state of a {type(target).__name__}")

    dispatch[pickle.BUILD[0]] = load_build


def refused_name(error: pickle.UnpicklingError) -> str | None:
    """Return what PyTorch's own unpickler refused, from its message, or None if the file is merely damaged."""
    match = re.search(r"(?:GLOBAL|function|class|type) (\S+)", str(error))
    return match[1] if match else None
