"""Networks published with the paper, and those of lessons built on them, as checkpoints of ours: nothing in the files runs.

The architecture is read off the weights' names and shapes.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import torch

from edm.config import Config, DataConfig, NetworkConfig, PreconditioningConfig
from edm.errors import UserError, brief, nearest
from edm.precond import PRECONDITIONINGS
from edm.unet import NETWORKS
from edm.unpickle import Record, Refused, Unpickler

FORMULATIONS = {f"{formulation}precond": formulation for formulation in PRECONDITIONINGS}  # of the authors' classes


def refusal(path: Path, name: str) -> UserError:
    return UserError(f"{path} is refused: it asks for {name}, which is no data and could run code")


def damaged(path: Path) -> UserError:
    return UserError(f"{path} is damaged, or not a checkpoint of this project")


def read_pickle(path: Path) -> dict:
    """A network published with the paper, as the contents of a checkpoint: `step`, `name`, `config` and `ema`.

    Raises:
        UserError: the file asks for more than data, is damaged, or holds something else.
    """
    try:
        with open(path, "rb") as file:
            contents = Unpickler(file).load()
        return from_record(contents["ema"], path)
    except Refused as error:
        raise refusal(path, str(error)) from None
    except PermissionError as error:
        raise UserError(f"cannot read the checkpoint {path}: {error.strerror}") from None
    except UserError:
        raise
    except Exception:  # a damaged or hostile pickle can make its reader raise anything
        raise damaged(path) from None


def from_record(network: Record, path: Path) -> dict:
    """The contents of a checkpoint from the record of a published network."""
    state, name = network.state, network.class_name
    if not isinstance(name, str) or name.lower() not in FORMULATIONS:
        raise UserError(f"{path}: unknown network {brief(name)}; {nearest(brief(name), FORMULATIONS)}")
    formulation = FORMULATIONS[name.lower()]
    for field in fields(PRECONDITIONINGS[formulation]):
        value = state.get(field.name, field.default)
        if field.name != "sigma_data" and not math.isclose(value, field.default, rel_tol=1e-6):
            raise UserError(f"{path}: its {field.name} is {value}, and only {field.default} is known here")
    weights = dict(tensors(network, "", set()))
    options = {**state.get("_init_kwargs", {}), **network.state["_modules"]["model"].state.get("_init_kwargs", {})}
    return as_checkpoint(path, weights, formulation, state.get("sigma_data", 0.5), options)


def tensors(record: Record, prefix: str, seen: set[int]) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters of a module's record and of those in it, by their full names, and the buffers that the numbers hang on."""
    if id(record) in seen:
        raise ValueError("a module stands in two places")
    seen.add(id(record))
    for kind in ("_parameters", "_buffers"):
        for name, tensor in record.state.get(kind, {}).items():
            if tensor is not None and (kind == "_parameters" or name in ("freqs", "resample_filter")):
                yield prefix + name, tensor
    for name, module in record.state.get("_modules", {}).items():
        yield from tensors(module, f"{prefix}{name}.", seen)


def read_lesson(contents: dict, path: Path) -> dict:
    """A checkpoint of a lesson built on the same networks, as the contents of one of ours.

    Args:
        contents: `model_state_dict`, whose names begin with "_score_network.", and `config`, of any shape.

    Raises:
        UserError: it is something else.
    """
    prefix, weights = "_score_network.", contents["model_state_dict"]
    if not isinstance(weights, dict):
        raise UserError(f"{path}: its model_state_dict is not a table of tensors")
    weights = {str(name).removeprefix(prefix): tensor for name, tensor in weights.items() if str(name).startswith(prefix)}
    try:
        entries = list(settings(contents.get("config"), "", set()))
        found = {formulation for key, value in entries for formulation in formulations(key, value)}
        sigma_data = next((value for key, value in entries if key == "sigma_data"), 0.5)
        read = as_checkpoint(path, weights, min(found) if len(found) == 1 else "edm", sigma_data, {})
    except (OverflowError, RecursionError, TypeError, ValueError):
        raise damaged(path) from None
    if len(found) != 1:
        why = f"names several formulations ({', '.join(sorted(found))})" if found else "does not say how it is preconditioned"
        print(f"{path} {why}; taken as edm (--config_path can say otherwise)")
    step = contents.get("step", 0)
    return {**read, "step": step if isinstance(step, int) and step >= 0 else 0}


def settings(config: object, key: str, seen: set[int]) -> Iterator[tuple[str, object]]:
    """The plain values in a nest of dicts and lists, each with the nearest key above it."""
    if not isinstance(config, dict | list | tuple):
        yield key, config
    elif id(config) not in seen:
        seen.add(id(config))
        for inner, value in config.items() if isinstance(config, dict) else ((key, value) for value in config):
            yield from settings(value, str(inner), seen)


def formulations(key: str, value: object) -> Iterator[str]:
    """The formulation that a setting names, if it does: "...VPPrecond" anywhere, or "vp" at a key that has to do with it."""
    name = value if isinstance(value, str) else ""
    match = re.search(rf"(?:^|[._])({'|'.join(PRECONDITIONINGS)})_?(precond\w*)?$", name, re.IGNORECASE)
    if match and (match[2] or re.search("precond|formulation", key, re.IGNORECASE)):
        yield match[1].lower()


def as_checkpoint(path: Path, weights: dict, formulation: str, sigma_data: object, options: dict) -> dict:
    """Weights, by their official names, with the config that they imply; the rest of it has its defaults.

    Args:
        options: what the file says of the architecture; the weights must bear it out.

    Raises:
        UserError: they are of no network known here.
    """
    if not all(is_plain(tensor) for tensor in weights.values()):
        raise UserError(f"{path}: its weights are not a table of tensors of floating-point numbers")
    filters = [tensor for name, tensor in weights.items() if name.endswith("resample_filter")]
    weights = {name: tensor for name, tensor in weights.items() if name.startswith("model.") and "resample_filter" not in name}
    try:
        data, network = sizes(weights)
    except (KeyError, IndexError, ValueError, ZeroDivisionError):
        raise UserError(f"{path}: its network is none of {', '.join(NETWORKS)}") from None
    taps = len(NETWORKS[network.architecture].Block.taps)
    if any(kernel.numel() != taps**2 for kernel in filters):
        raise UserError(f"{path}: its resampling filter does not have the {taps} taps of {network.architecture}")
    for key in ("model_channels", "channel_mult", "num_blocks"):
        found, said = getattr(network, key), options.get(key, getattr(network, key))
        if (tuple(said) if isinstance(said, list) else said) != found:
            raise UserError(f"{path}: it says {key} {brief(said)}, but its weights have {found}")
    network = replace(network, dropout=float(options.get("dropout", network.dropout)))
    config = Config(path.stem, data, network, PreconditioningConfig(formulation, float(sigma_data)))
    return {"step": 0, "name": path.stem, "config": config.to_dict(), "ema": weights}


def is_plain(tensor: object) -> bool:
    """Whether a value is a tensor of floating-point numbers that are all in memory."""
    return (
        isinstance(tensor, torch.Tensor)
        and tensor.layout == torch.strided
        and tensor.is_floating_point()
        and tensor.device.type == "cpu"
        and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
    )


def sizes(weights: dict) -> tuple[DataConfig, NetworkConfig]:
    """The images and the architecture that weights are for, from their names and shapes."""
    blocks = [re.fullmatch(r"model\.enc\.(\d+)x\1_block(\d+)\.conv0\.weight", name) for name in weights]
    blocks = [(int(match[1]), int(match[2])) for match in blocks if match]
    resolutions = sorted({res for res, _ in blocks}, reverse=True)
    top = resolutions[0]

    def shape(name: str) -> tuple[int, ...]:
        return tuple(weights[f"model.{name}"].shape)

    def inputs(name: str) -> int:
        return shape(name)[1] if f"model.{name}" in weights else 0

    family = "adm" if "model.out_conv.weight" in weights else "ncsnpp" if "model.map_noise.freqs" in weights else "ddpmpp"
    model_channels = shape("map_layer0.weight")[0] // 4
    network = NetworkConfig(
        architecture=family,
        model_channels=model_channels,
        channel_mult=tuple(shape(f"enc.{res}x{res}_block0.conv0.weight")[0] // model_channels for res in resolutions),
        num_blocks=1 + max(index for _, index in blocks),
        attn_resolutions=tuple(res for res in resolutions if f"model.enc.{res}x{res}_block0.qkv.weight" in weights),
        label_dim=inputs("map_label.weight"),
        augment_dim=inputs("map_augment.weight"),
    )
    return DataConfig("image_folder", resolution=top, channels=shape(f"enc.{top}x{top}_conv.weight")[1]), network
