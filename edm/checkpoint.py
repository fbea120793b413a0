"""Checkpoints: plain tensors, numbers and text in one file, `diffusion-{step}.pt`.

A training checkpoint holds `step`, `name`, `config` (nested plain values), `ema` (the weights that samples come from), `net`,
`optimizer`, `scaler`, `compiled` (whether the network was) and `losses` (of every step so far, (steps, 1 + bands): all of
its images', then those in each of `NOISE_BANDS`; in older files (steps,)). An exported one, for sampling,
holds `step`, `name`, `config` and `ema`, the weights in half precision.

The file is a zip archive, as PyTorch writes it. Its comment is a checksum of all that comes before the comment, since the
archive's own checksums leave out its padding and its directory, and torch.load does not compare any.
"""

import os
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import torch

from edm import config as configs
from edm import published
from edm.config import Config
from edm.errors import UserError, brief
from edm.files import write_whole
from edm.loss import NUM_BANDS
from edm.published import is_plain
from edm.unpickle import name_in


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"diffusion-{step}.pt"


def saved_steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder, rising."""
    matches = (re.fullmatch(r"diffusion-(\d+)\.pt", path.name, re.ASCII) for path in folder.glob("diffusion-*.pt"))
    return sorted(int(match[1]) for match in matches if match)


COMMENT = struct.Struct("<H6s8s")  # the comment's length, which ends an archive without one, and the comment: "crc32 " and hex


def comment(checksum: int) -> bytes:
    return COMMENT.pack(COMMENT.size - 2, b"crc32 ", f"{checksum:08x}".encode())


class Summed:
    """A file that sums up what is written to it."""

    def __init__(self, file: BinaryIO):
        self.file, self.checksum = file, 0

    def write(self, data: bytes) -> int:
        self.checksum = zlib.crc32(data, self.checksum)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def write(path: Path, contents: dict) -> None:
    """Write a checkpoint whole or not at all.

    Raises:
        UserError: the folder cannot be written to, or the disk is full.
    """

    def save(file: BinaryIO) -> None:
        summed = Summed(file)
        try:
            torch.save(contents, summed)
        except RuntimeError as error:  # torch's name for a write that failed, and the file's own error is its context
            raise error.__context__ if isinstance(error.__context__, OSError) else OSError("the disk may be full") from None
        file.seek(-2, os.SEEK_END)
        file.write(comment(summed.checksum))

    write_whole(path, save)


def is_intact(path: Path) -> bool:
    """Whether an archive has the checksum that it names, or, if PyTorch alone has written it, those of its parts; and whether
    what it holds takes no more memory than the file has bytes."""
    size = os.path.getsize(path)
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        parts = archive.infolist()
        if sum(part.file_size for part in parts) > size:
            return False
        pickles = [archive.read(part) for part in parts if part.filename.endswith("/data.pkl")]
        if any(b"\nbytearray\n" in pickled for pickled in pickles):  # PyTorch's unpickler would make one of any length
            return False
        if not archive.comment:
            file.seek(-22, os.SEEK_END)
            return archive.testzip() is None and file.read(4) == b"PK\5\6"  # no comment follows whose length was damaged
        checksum = 0
        for start in range(0, size - COMMENT.size, 2**20):
            checksum = zlib.crc32(file.read(min(2**20, size - COMMENT.size - start)), checksum)
        return file.read() == comment(zlib.crc32(b"\0\0", checksum))


def read(path: str | Path) -> dict:
    """Read a checkpoint onto the CPU: one of ours, of a lesson, or a network published with the paper. No code in the file
    can run, and it takes no more memory than the file has bytes. The tensors are views of the file until they are copied.

    Raises:
        UserError: no such file, a damaged one, or one of something else.
    """
    path = Path(path)
    if not os.path.isfile(path):  # unlike Path.is_file, it never raises
        near = ", ".join(f"diffusion-{step}.pt" for step in saved_steps(path.parent)[-5:])
        raise UserError(f"there is no checkpoint {path}" + (f"; beside it are {near}" if near else ""))
    try:
        if not zipfile.is_zipfile(path):
            return published.read_pickle(path)
        if not is_intact(path):
            raise ValueError("checksum")
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UserError:
        raise
    except PermissionError as error:
        raise UserError(f"cannot read the checkpoint {path}: {error.strerror}") from None
    except Exception as error:  # a damaged or hostile archive can make the readers raise anything
        refused = name_in(str(error)) if isinstance(error, pickle.UnpicklingError) else None
        raise (published.refusal(path, refused) if refused else published.damaged(path)) from None
    if isinstance(contents, dict) and "model_state_dict" in contents:
        return published.read_lesson(contents, path)
    check_contents(contents, path)
    return contents


def check_contents(contents: object, path: Path) -> None:
    """Refuse, with a `UserError`, what is no checkpoint of ours."""

    def refuse(why: str):
        raise UserError(f"{path} is not a checkpoint of this project: {why}")

    if not isinstance(contents, dict) or not {"config", "name", "step", "ema"} <= contents.keys():
        refuse("it lacks config, name, step or ema")
    step, losses = contents["step"], contents.get("losses", torch.zeros(0))
    if not isinstance(step, int) or step < 0:
        refuse(f"its step is {brief(step)}")
    for key in {"ema", "net"} & contents.keys():
        if not is_weights(contents[key]):
            refuse(f"its {key} is not a table of tensors")
    if not isinstance(contents.get("compiled", False), bool):
        refuse("whether it was compiled is neither true nor false")
    shapes = ((), (1 + NUM_BANDS,))  # after the first
    if not is_plain(losses) or losses.ndim == 0 or losses.shape[1:] not in shapes or len(losses) > step:
        refuse(f"its losses are not 1 or {1 + NUM_BANDS} numbers a step")


def read_config(contents: dict, path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """The config a checkpoint carries, checked like a file.

    Raises:
        UserError: it, or one of the overrides, does not pass.
    """
    return configs.from_dict(contents["config"], contents["name"], f"the config in {path}", overrides)


def is_weights(value: object) -> bool:
    """Whether a value is a dict of named tensors of floating-point numbers."""
    return isinstance(value, dict) and all(isinstance(name, str) and is_plain(tensor) for name, tensor in value.items())


def check_weights(module: torch.nn.Module, weights: dict, path: str | Path) -> None:
    """Refuse weights of another architecture than the module's with a `UserError` that names the first difference."""
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()} if is_weights(weights) else {}
    for name in sorted(expected.keys() | found.keys(), key=list(expected | found).index):
        if expected.get(name) != found.get(name):
            raise UserError(
                f"the weights in {path} are of another network than the config's: "
                f"{name:.60} is {found.get(name, 'missing')} there and {expected.get(name, 'missing')} here"
            )


def load_weights(module: torch.nn.Module, weights: dict, path: str | Path) -> None:
    """Copy weights into a module of the same architecture, whatever their precision.

    Raises:
        UserError: they belong to another architecture.
    """
    check_weights(module, weights, path)
    module.load_state_dict(weights)
