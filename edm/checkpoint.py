"""Checkpoints: plain tensors, numbers and text in one file, `diffusion-{step}.pt`.

A training checkpoint holds `step`, `name`, `config` (nested plain values), `ema` (the weights that samples come from), `net`,
`optimizer` and `scaler`. An exported one, for sampling, holds `step`, `name`, `config` and `ema`, the
weights in half precision.
"""

import os
import pickle
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

import torch

from edm import config as configs
from edm import published
from edm.config import Config
from edm.errors import UserError
from edm.files import write_whole
from edm.published import is_plain
from edm.unpickle import name_in


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"diffusion-{step}.pt"


def saved_steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder, rising."""
    matches = (re.fullmatch(r"diffusion-(\d+)\.pt", path.name) for path in folder.glob("diffusion-*.pt"))
    return sorted(int(match[1]) for match in matches if match)


def write(path: Path, contents: dict) -> None:
    """Write a checkpoint whole or not at all.

    Raises:
        UserError: the folder cannot be written to, or the disk is full.
    """

    def save(file: BinaryIO) -> None:
        try:
            torch.save(contents, file)
        except RuntimeError as error:  # torch's name for a write that failed, and the file's own error is its context
            raise error.__context__ if isinstance(error.__context__, OSError) else OSError("the disk may be full") from None

    write_whole(path, save)


def read(path: str | Path) -> dict:
    """Read a checkpoint onto the CPU: one of ours, of a lesson, or a network published with the paper. No code in the file
    can run.

    Raises:
        UserError: no such file, a damaged one, or one of something else.
    """
    path = Path(path)
    if not os.path.isfile(path):  # unlike Path.is_file, it never raises
        near = ", ".join(f"diffusion-{step}.pt" for step in saved_steps(path.parent)[-5:])
        raise UserError(f"there is no checkpoint {path}" + (f"; beside it are {near}" if near else ""))
    if not zipfile.is_zipfile(path):
        return published.read_pickle(path)
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not compare the archive's checksums
            if archive.testzip() is not None:
                raise ValueError("checksum")
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError as error:
        raise UserError(f"cannot read the checkpoint {path}: {error.strerror}") from None
    except Exception as error:  # a damaged or hostile archive can make the readers raise anything
        refused = name_in(str(error)) if isinstance(error, pickle.UnpicklingError) else None
        raise (published.refusal(path, refused) if refused else published.damaged(path)) from None
    if isinstance(contents, dict) and "model_state_dict" in contents:
        return published.read_lesson(contents, path)
    if not isinstance(contents, dict) or not {"config", "name", "step", "ema"} <= contents.keys():
        raise UserError(f"{path} is not a checkpoint of this project: it lacks config, name, step or ema")
    if not is_weights(contents["ema"]):
        raise UserError(f"{path} is not a checkpoint of this project: its ema is not a table of tensors")
    if not isinstance(contents["step"], int) or contents["step"] < 0:
        raise UserError(f"{path} is not a checkpoint of this project: its step is {contents['step']!r:.60}")
    return contents


def read_config(contents: dict, path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """The config a checkpoint carries, checked like a file.

    Raises:
        UserError: it, or one of the overrides, does not pass.
    """
    return configs.from_dict(contents["config"], contents["name"], f"the config in {path}", overrides)


def is_weights(value: object) -> bool:
    """Whether a value is a dict of named tensors of floating-point numbers."""
    return isinstance(value, dict) and all(isinstance(name, str) and is_plain(tensor) for name, tensor in value.items())


def load_weights(module: torch.nn.Module, weights: dict, path: str | Path) -> None:
    """Copy weights into a module of the same architecture, whatever their precision.

    Raises:
        UserError: they belong to another architecture; the first parameter that differs is named.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()} if is_weights(weights) else {}
    for name in sorted(expected.keys() | found.keys(), key=list(expected | found).index):
        if expected.get(name) != found.get(name):
            raise UserError(
                f"the weights in {path} are of another network than the config's: "
                f"{name} is {found.get(name, 'missing')} there and {expected.get(name, 'missing')} here"
            )
    module.load_state_dict(weights)
