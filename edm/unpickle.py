"""An unpickler of data alone: it knows tensors, numbers and plain containers, turns the objects of the networks published with
the paper, which carry their source code with them, into records of their state, and refuses the rest by name."""

import io
import pickle
import re
import struct
from collections import OrderedDict

import torch


class Refused(pickle.UnpicklingError):
    """The file names something that is no data."""


class Record:
    """An object in the file: its class's name, where it is known, and its state."""

    def __init__(self, class_name: str = ""):
        self.class_name = class_name
        self.state = {}

    def __setstate__(self, state: dict) -> None:
        self.state = state


def persistent_object(meta: dict) -> Record:
    """The authors' wrapper: `type`, `version`, `module_src` (which is not looked at), `class_name` and `state`."""
    record = Record(meta["class_name"])
    record.state = meta["state"]
    return record


def reconstructed(cls: type, base: type, state: object) -> Record:
    """How protocols 0 and 1 make an object."""
    return cls()


def storage_from_bytes(data: bytes) -> torch.Tensor:
    """A tensor's memory, a file of PyTorch's inside the file, as a tensor of one dimension."""
    if data[:2] == b"PK":
        raise ValueError("an archive, which could be larger inside")
    try:
        storage = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = name_in(str(error))
        raise (Refused(refused) if refused else ValueError("damaged")) from None
    return torch.tensor([], dtype=storage.dtype).set_(storage)


def tensor_from_storage(storage: torch.Tensor, offset: int, size: tuple, stride: tuple, *ignored: object) -> torch.Tensor:
    """A view of the storage, which must hold all of it."""
    return storage.as_strided(size, stride, offset)


NUMBERS = {f"{kind}{1 << size}": code for kind, codes in (("i", "bhiq"), ("u", "BHIQ")) for size, code in enumerate(codes)}
NUMBERS |= {"b1": "?", "f2": "e", "f4": "f", "f8": "d"}  # NumPy's names of types, and struct's


class NumpyDtype:
    """A NumPy type of plain numbers."""

    def __init__(self, name: str, *ignored: object):
        if name not in NUMBERS:
            raise Refused(f"numpy.dtype({name!r})")
        self.code, self.byte_order = NUMBERS[name], "<"

    def __setstate__(self, state: tuple) -> None:
        self.byte_order = ">" if state[1] == ">" else "<"


def numpy_scalar(dtype: NumpyDtype, data: bytes) -> float | int | bool:
    """A NumPy number as Python's."""
    return struct.unpack(dtype.byte_order + dtype.code, data)[0]


KNOWN = {
    "torch_utils.persistence._reconstruct_persistent_obj": persistent_object,
    "torch.nn.modules.container.ModuleDict": Record,
    "torch.storage._load_from_bytes": storage_from_bytes,
    "torch._utils._rebuild_tensor_v2": tensor_from_storage,
    "torch._utils._rebuild_parameter": lambda data, requires_grad, hooks: data,
    "collections.OrderedDict": OrderedDict,
    "builtins.set": set,
    "builtins.object": object,
    "copyreg._reconstructor": reconstructed,
    "_codecs.encode": lambda text, encoding: text.encode("latin1"),  # bytes, in protocols 0 to 2
    "numpy.dtype": NumpyDtype,
    "numpy.core.multiarray.scalar": numpy_scalar,
    "numpy._core.multiarray.scalar": numpy_scalar,
}
OLD_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # Python 2's names, which protocols 0 to 2 use


class Unpickler(pickle._Unpickler):
    """An unpickler of data alone: Python's own one in Python, since that in C lets a file give state to any object, the
    functions above included, and makes room for as many remembered objects as a file claims to have."""

    dispatch = dict(pickle._Unpickler.dispatch)  # noqa: RUF012

    def find_class(self, module: str, name: str):
        known = f"{OLD_MODULES.get(module, module)}.{name}"
        if known not in KNOWN:
            raise Refused(f"{module}.{name}")
        return KNOWN[known]

    def load_build(self) -> None:
        """Give an object its state."""
        state = self.stack.pop()
        if isinstance(self.stack[-1], Record | NumpyDtype):
            self.stack[-1].__setstate__(state)
        elif not isinstance(self.stack[-1], OrderedDict):  # which has no need of the attributes that it may carry
            raise Refused(f"the state of a {type(self.stack[-1]).__name__}")

    dispatch[pickle.BUILD[0]] = load_build
    del dispatch[pickle.BYTEARRAY8[0]]  # which is given all the memory that it claims before it is read


def name_in(message: str) -> str | None:
    """What PyTorch's own unpickler refused, from its message; None if the file is merely damaged."""
    match = re.search(r"(?:GLOBAL|function|class|type) (\S+)", message)
    return match[1] if match else None
