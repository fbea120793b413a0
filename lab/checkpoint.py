"""Checkpoints: plain tensors, numbers and text in one file, `diffusion-{step}.pt`.

A checkpoint holds `step`, `name`, `config` (nested plain values) and `ema` (the averaged weights, which samples are made with).
A training run goes on from one that also holds `net`, `optimizer`, `scaler`, `noise_distribution` and `losses`, a table
(steps, 1 + NUM_BANDS): the mean loss of each step, and that in each band of noise levels (`NOISE_BANDS`). With
`ema.snapshot_every_n` it also holds `power_ema`: {width: weights} of the averages that `WIDTHS` names. A snapshot,
`snapshot-{step}.pt`, is a checkpoint of these in half precision; its `ema` is the narrower of the two.

The file is the zip archive that `torch.save` writes. No code in it can run, and damage to what it holds is recognised by the
checksums of the archive.
"""

import contextlib
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

import torch

from lab import config as configs
from lab import published
from lab.cli import UserError, brief
from lab.config import Config
from lab.published import is_plain

WIDTHS = (0.05, 0.10)  # of the averages in snapshots
NOISE_BANDS = (0.05, 0.2, 0.8, 3.2)  # noise levels that divide the record of the training loss into bands (Figure 5a)
NUM_BANDS = len(NOISE_BANDS) + 1


def checkpoint_path(folder: Path, step: int, kind: str = "diffusion") -> Path:
    """Return the path of the checkpoint of a step, or of its snapshot (kind "snapshot")."""
    return folder / f"{kind}-{step}.pt"


def saved_steps(folder: Path, kind: str = "diffusion") -> list[int]:
    """Return the steps of the checkpoints or snapshots in a folder, in rising order."""
    matches = (re.fullmatch(rf"{kind}-(\d+)\.pt", path.name, re.ASCII) for path in folder.glob(f"{kind}-*.pt"))
    return sorted(int(match[1]) for match in matches if match)


def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Write a file whole or not at all: to a temporary file beside it, fsync, then rename.

    Args:
        path: the file; its folder is created if it does not exist.
        write: called with the open temporary file.

    Raises:
        UserError: the folder cannot be written to, or the disk is full. The old file is intact.
    """
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def sync_folder(folder: Path) -> None:
    """Write the folder itself to the disk, so that a renamed file keeps its new name after a power cut."""
    if os.name == "posix":  # Windows cannot open folders
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def save(path: Path, contents: dict) -> None:
    """Write a checkpoint whole or not at all.

    Raises:
        UserError: the folder cannot be written to, or the disk is full.
    """

    def write(file: BinaryIO) -> None:
        try:
            torch.save(contents, file)
        except RuntimeError as error:  # raised by torch.save in place of the error of the file
            raise error.__context__ if isinstance(error.__context__, OSError) else OSError("the disk may be full") from None

    write_atomically(path, write)


def load(path: str | Path) -> dict:
    """Read a checkpoint onto the CPU: one of ours, one of a lesson, or a network published with the paper.

    Raises:
        UserError: there is no such file, it is damaged, it asks for more than data, or it is something else.
    """
    path = Path(path)
    check_exists(path)
    try:
        if not zipfile.is_zipfile(path):
            return published.read_pickle(path)
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None:  # torch.load does not compare the checksums
                raise ValueError("damaged")
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except PermissionError as error:
        raise UserError(f"cannot read the checkpoint {path}: {error.strerror}") from None
    except Exception as error:  # a damaged archive can make its readers raise anything
        refused = published.refused_name(error) if isinstance(error, pickle.UnpicklingError) else None
        raise (published.refusal(path, refused) if refused else published.damaged(path)) from None
    if isinstance(contents, dict) and "model_state_dict" in contents:
        return published.read_lesson(contents, path)
    check_contents(contents, path)
    return contents


def check_exists(path: str | Path) -> None:
    """Raise a `UserError` that names the checkpoints beside it unless there is such a file."""
    if not os.path.isfile(path):  # Path.is_file raises if the name is too long
        beside = ", ".join(f"diffusion-{step}.pt" for step in saved_steps(Path(path).parent)[-5:])
        raise UserError(f"there is no checkpoint {path}" + (f"; beside it are {beside}" if beside else ""))


def check_contents(contents: object, path: Path) -> None:
    """Raise `UserError` unless `contents` are those of a checkpoint of ours."""

    def refuse(why: str):
        raise UserError(f"{path} is not a checkpoint of this project: {why}")

    if not isinstance(contents, dict) or not {"config", "name", "step", "ema"} <= contents.keys():
        refuse("it lacks config, name, step or ema")
    step, config, losses = contents["step"], contents["config"], contents.get("losses", torch.zeros(0, 1 + NUM_BANDS))
    if type(step) is not int or step < 0:
        refuse(f"its step is {brief(step)}")
    if not isinstance(config, dict) or not all(isinstance(entries, dict) for entries in config.values()):
        refuse("its config is not a table of sections")
    for key in {"ema", "net"} & contents.keys():
        if not is_weights(contents[key]):
            refuse(f"its {key} is not a table of tensors")
    averages = contents.get("power_ema", {})
    if not isinstance(averages, dict) or averages.keys() not in (set(), {*WIDTHS}):
        refuse(f"its power_ema is not a table of averages of the widths {WIDTHS}")
    if not all(map(is_weights, averages.values())):
        refuse("its power_ema does not hold tables of tensors")
    if not is_plain(losses) or losses.ndim != 2 or losses.shape[1] != 1 + NUM_BANDS or len(losses) > step:
        refuse(f"its losses are not {1 + NUM_BANDS} numbers for each step")


def read_config(contents: dict, path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Return the config that a checkpoint carries, checked like a config file.

    Raises:
        UserError: the checkpoint carries none, or its config or one of the overrides is not valid.
    """
    if "config" not in contents:
        raise UserError(f"{path} does not say how its network is built; name its config with --config_path")
    values = {section: dict(entries) for section, entries in contents["config"].items()}
    for section, key in (("training", "compile"), ("sampler", "clip")):  # earlier versions of this project wrote these as text
        if values.get(section, {}).get(key) in ("auto", "true", "false"):
            values[section][key] = values[section][key] == "true"
    chain = values.get("chain", {})
    if "schedule" in chain:  # the name of `betas` in earlier versions
        chain["betas"] = chain.pop("schedule")
    return configs.from_dict(values, contents["name"], f"the config in {path}", overrides)


def halved(weights: dict) -> dict:
    """Return weights with matrices in half precision.

    What is small stays exact: biases, norms, and the frequencies of NCSN++, which half precision would change.
    """
    return {name: tensor.half() if tensor.ndim > 1 else tensor for name, tensor in weights.items()}


def is_weights(value: object) -> bool:
    """Return whether a value is a dict of named tensors that `is_plain` accepts."""
    return isinstance(value, dict) and all(isinstance(name, str) and is_plain(tensor) for name, tensor in value.items())


def check_weights(module: torch.nn.Module, weights: dict, path: str | Path) -> None:
    """Raise a `UserError` that names the first difference if `weights` belong to another architecture than the module's."""
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()} if is_weights(weights) else {}
    for name in sorted(expected.keys() | found.keys(), key=list(expected | found).index):
        if expected.get(name) != found.get(name):
            raise UserError(
                f"the weights in {path} are of another network than the config's: "
                f"{name:.60} is {found.get(name, 'missing')} there and {expected.get(name, 'missing')} here"
            )


def load_weights(module: torch.nn.Module, weights: dict, path: str | Path) -> None:
    """Copy weights of any precision into a module of the same architecture.

    Raises:
        UserError: they belong to another architecture.
    """
    check_weights(module, weights, path)
    module.load_state_dict(weights)
