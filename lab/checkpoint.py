"""Checkpoints: plain tensors, numbers and text in one file, `diffusion-{step}.pt`.

A checkpoint holds `step`, `name`, `config` (nested plain values) and `ema` (the averaged weights, which samples are made with).
A training run goes on from one that also holds `net`, `optimizer`, `scaler`, `noise_distribution` and `losses`, a table
(steps, 1 + NUM_BANDS): the mean loss of each step, and that in each band of noise levels (`NOISE_BANDS`). With
`ema.snapshot_every_n` it also holds `power_ema`: {width: weights} of the averages that `WIDTHS` names. A snapshot,
`snapshot-{step}.pt`, is a checkpoint of these in half precision; its `ema` is the narrower of the two.

The file is the zip archive that `torch.save` writes. No code in it can run, and damage to what it holds is recognised by the
checksums of the archive. More is not promised about it, so files for sharing are `.safetensors`: `ema`, with the rest as
metadata. Nothing in these can run, recurse or claim memory.
"""

import contextlib
import io
import json
import math
import os
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from pickle import UnpicklingError
from typing import BinaryIO

import safetensors.torch
import torch

from lab import config as configs
from lab import published
from lab.cli import UserError
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
    files = (path.name for path in folder.glob(f"{kind}-*.pt") if os.path.isfile(path))
    matches = (re.fullmatch(rf"{kind}-(0|[1-9]\d*)\.pt", name, re.ASCII) for name in files)
    return sorted(int(match[1]) for match in matches if match)


def check_name(path: Path, option: str) -> None:
    """Raise a `UserError` if a training run would take a file that this option names for one of its own."""
    if re.fullmatch(r"(diffusion|snapshot)-\d+\.pt", path.name, re.ASCII):
        raise UserError(f"{option}: a training run gives its own files names such as {path.name}; choose another name")


def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Write a file whole or not at all: to a temporary file beside it, fsync, then rename.

    Args:
        path: the file; its folder is created if it does not exist.
        write: called with the open temporary file.

    Raises:
        UserError: the folder cannot be written to, the disk is full, or `path` is a device, a pipe or a folder. An old file is
            intact.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"cannot write {path}: it is not a regular file")
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        if os.name == "posix":  # Windows cannot open folders
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)  # so that the new name survives a power cut
            os.close(folder)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def save(path: Path, contents: dict) -> None:
    """Write a checkpoint whole or not at all; as a .safetensors file, its averaged weights with step, name and config alone.

    Raises:
        UserError: the folder cannot be written to, or the disk is full.
    """

    def write(file: BinaryIO) -> None:
        if path.suffix == ".safetensors":
            file.write(to_safetensors(contents))
            return
        try:
            torch.save(contents, file)
        except RuntimeError as error:  # raised by torch.save in place of the error of the file
            raise error.__context__ if isinstance(error.__context__, OSError) else OSError("the disk may be full") from None

    write_atomically(path, write)


def to_safetensors(contents: dict) -> bytes:
    """Return the averaged weights of a checkpoint as a safetensors file with step, name and config (JSON) as metadata."""
    config = {section: dict(entries) for section, entries in contents["config"].items()}
    for entries in config.values():
        entries |= {key: "inf" for key, value in entries.items() if value == math.inf}  # JSON has no infinity
    metadata = {"step": str(contents["step"]), "name": contents["name"], "config": json.dumps(config, allow_nan=False)}
    return safetensors.torch.save({name: tensor.contiguous() for name, tensor in contents["ema"].items()}, metadata)


def from_safetensors(data: bytes) -> dict:
    """Return the contents of the checkpoint in a safetensors file."""
    ema = safetensors.torch.load(data)  # which checks the header
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
    parse = {"step": int, "name": str, "config": json.loads}
    return {"ema": ema} | {key: parse[key](text) for key, text in metadata.items() if key in parse}


def from_archive(data: bytes) -> object:
    """Return what `torch.save` has written to a zip archive."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        if archive.testzip() is not None:  # torch.load does not compare the checksums
            raise ValueError("damaged")
    return plain_copy(torch.load(io.BytesIO(data), map_location="cpu", weights_only=True), {})


def plain_copy(value: object, copies: dict[int, dict]) -> object:
    """Return nested dicts and tensors without the attributes that a file can give them, which could hide their methods."""
    if isinstance(value, torch.Tensor):
        return torch.Tensor.detach(value)
    if isinstance(value, dict) and id(value) not in copies:
        copies[id(value)] = {key: plain_copy(entry, copies) for key, entry in dict.items(value)}
    return copies.get(id(value), value)


def load(path: str | Path) -> dict:
    """Read a checkpoint onto the CPU: one of ours, one of a lesson, or a network published with the paper.

    Raises:
        UserError: there is no such file, it is damaged, it asks for more than data, or it is something else.
    """
    path = Path(path)
    check_exists(path)
    try:
        data = path.read_bytes()  # once, as the file may be replaced meanwhile
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch warns about odd tensors and formats
            if path.suffix == ".safetensors":
                contents = from_safetensors(data)
            elif data.startswith(b"PK\x03\x04"):
                contents = from_archive(data)
            else:
                return published.read_pickle(data, path)
            if "model_state_dict" in contents:
                return published.read_lesson(contents, path)
            check_contents(contents)
            return contents
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read the checkpoint {path}: {error.strerror or error}") from None
    except Exception as error:  # a damaged file can make its readers raise anything
        name = re.search(r"\b(?:GLOBAL|function|class|type) (\S+)", str(error)) if isinstance(error, UnpicklingError) else None
        refused = f"{path} is refused: it asks for {name and name[1]}, which is not data and could run code"
        raise UserError(refused if name else f"{path} is damaged, or not a checkpoint of this project") from None


def check_exists(path: str | Path) -> None:
    """Raise a `UserError` that names the checkpoints beside it unless there is such a file."""
    if not os.path.isfile(path):  # Path.is_file raises if the name is too long
        beside = ", ".join(f"diffusion-{step}.pt" for step in saved_steps(Path(path).parent)[-5:])
        raise UserError(f"there is no checkpoint {path}" + (f"; beside it are {beside}" if beside else ""))


def check_contents(contents: dict) -> None:
    """Raise any error unless `contents` are those of a checkpoint of ours."""
    step, averages = contents["step"], contents.get("power_ema", {})
    losses = contents.get("losses", torch.zeros(0, 1 + NUM_BANDS))
    if not (
        (type(step) is int and step in range(2**53) and isinstance(contents["name"], str))
        and all(isinstance(entries, dict) for entries in contents["config"].values())
        and all(map(is_weights, (contents["ema"], contents.get("net", {}), *averages.values())))
        and averages.keys() in (set(), {*WIDTHS})
        and (is_plain(losses) and losses.ndim == 2 and losses.shape[1] == 1 + NUM_BANDS and len(losses) <= step)
    ):
        raise ValueError("not a checkpoint")


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
    """Return weights with matrices in half precision, unless a number is too large for it.

    What is small stays exact: biases, norms, and the frequencies of NCSN++, which half precision would change.
    """
    halves = {name: tensor.half() for name, tensor in weights.items() if tensor.ndim > 1}
    return weights | {name: half for name, half in halves.items() if half.isfinite().all()}


def is_weights(value: object) -> bool:
    """Return whether a value is a dict of named tensors that `is_plain` accepts."""
    return isinstance(value, dict) and all(isinstance(name, str) and is_plain(tensor) for name, tensor in value.items())


def check_weights(module: torch.nn.Module, weights: dict, path: str | Path) -> None:
    """Raise a `UserError` that names the first weight that is not finite, or not of the module's architecture."""
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()} if is_weights(weights) else {}
    for name in expected | found:
        if expected.get(name) != found.get(name):
            raise UserError(
                f"the weights in {path} are of another network than the config's: "
                f"{name:.60} is {found.get(name, 'missing')} there and {expected.get(name, 'missing')} here"
            )
        if not weights[name].isfinite().all():
            raise UserError(f"the weights in {path} are not finite numbers: {name:.60} holds nan or infinity")


def load_weights(module: torch.nn.Module, weights: dict, path: str | Path) -> None:
    """Copy weights of any precision into a module of the same architecture.

    Raises:
        UserError: they belong to another architecture.
    """
    check_weights(module, weights, path)
    module.load_state_dict(weights)
