"""Configs: from YAML files to checked, frozen values. `configs/edm.yaml` explains every entry and holds the defaults.

A file may begin with `base: other.yaml` (a file beside it, or one of `configs/`) and then holds only what differs.
"""

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from edm.augment import NUM_LABELS
from edm.ddpm import BETAS, VARIANCES
from edm.loss import WEIGHTINGS
from edm.sampler import SOLVERS
from edm.schedule import DISCRETIZATIONS, SCALINGS, SCHEDULES
from edm.unet import NETWORKS
from lab.cli import UserError, brief, nearest

CONFIGS = Path(__file__).parents[1] / "configs"
WITH_CHURN = ("heun", "euler")  # the solvers that S_churn applies to


def as_number(value: object) -> object:
    """Turn text such as "1e-4", which YAML takes for a word, into a number; refuse true and false."""
    if isinstance(value, bool):
        raise ValueError
    return float(value) if isinstance(value, str) else value


def no_as_word(value: object) -> object:
    """Turn false back into "no", which YAML reads as false."""
    return "no" if value is False else value


Int = Annotated[int, BeforeValidator(as_number), Field(le=2**53)]
Float = Annotated[float, BeforeValidator(as_number)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class Data(Section):
    """Where the images come from, and what is done to them."""

    dataset: Literal["mnist", "fashion_mnist", "cifar10", "image_folder", "digits"] = "mnist"
    root: Annotated[str, Field(min_length=1)] = "data"
    resolution: Annotated[Int, Field(ge=4, le=1024)] = 32
    channels: Literal[1, 3] = 1
    augment_probability: Annotated[Float, Field(ge=0, le=1)] = 0.0
    max_resident_mb: Annotated[Int, Field(ge=0)] = 4096


class Network(Section):
    """The raw network F."""

    architecture: Literal[tuple(NETWORKS)] = "ddpmpp"
    model_channels: Annotated[Int, Field(ge=4, le=2048, multiple_of=2)] = 128
    channel_mult: Annotated[tuple[Annotated[Int, Field(ge=1, le=64)], ...], Field(min_length=1, max_length=8)] = (2, 2, 2)
    num_blocks: Annotated[Int, Field(ge=1, le=64)] = 4
    attn_resolutions: tuple[Annotated[Int, Field(ge=1)], ...] = (16,)
    dropout: Annotated[Float, Field(ge=0, lt=1)] = 0.10
    label_dim: Annotated[Int, Field(ge=0, le=100_000)] = 0
    augment_dim: Literal[0, NUM_LABELS] = 0


class Preconditioning(Section):
    """How F becomes a denoiser."""

    formulation: Literal["edm", "vp", "ve", "iddpm", "ddpm", "improved_ddpm"] = "edm"
    sigma_data: Annotated[Float, Field(ge=1e-3, le=1000)] | Literal["auto"] = 0.5


class Chain(Section):
    """The chain of DDPM's and Improved DDPM's formulations, noise distributions, losses and samplers."""

    betas: Literal[tuple(BETAS)] = "linear"
    num_timesteps: Annotated[Int, Field(ge=2, le=100_000)] = 1000


class Loss(Section):
    """Which noise levels are trained, and how they are weighted."""

    objective: Literal["denoising", "hybrid", "vlb"] = "denoising"
    noise_distribution: Literal["lognormal", "vp", "ve", "iddpm", "ddpm", "importance"] = "lognormal"
    P_mean: Annotated[Float, Field(ge=-20, le=20)] = -1.2
    P_std: Annotated[Float, Field(ge=0, le=20)] = 1.2
    weighting: Literal[tuple(WEIGHTINGS)] = "edm"
    label_dropout: Annotated[Float, Field(ge=0, le=1)] = 0.0


class Training(Section):
    """Steps, batches, Adam, precision."""

    num_training_steps: Annotated[Int, Field(ge=1)] = 20_000
    batch_size: Annotated[Int, Field(ge=1, le=1_000_000)] = 64
    accumulation: Annotated[Int, Field(ge=1)] = 1
    learning_rate: Annotated[Float, Field(gt=0)] = 3e-4
    lr_rampup_images: Annotated[Int, Field(ge=0)] = 64_000
    lr_halflife_images: Annotated[Int, Field(ge=1)] | None = None
    adam_beta1: Annotated[Float, Field(ge=0, lt=1)] = 0.9
    adam_beta2: Annotated[Float, Field(ge=0, lt=1)] = 0.999
    adam_eps: Annotated[Float, Field(gt=0)] = 1e-8
    max_grad_norm: Annotated[Float, Field(gt=0)] | None = None
    mixed_precision: Annotated[Literal["auto", "no", "fp16", "bf16"], BeforeValidator(no_as_word)] = "auto"
    compile: bool = False
    save_and_sample_every_n: Annotated[Int, Field(ge=1)] = 1000
    seed: Annotated[Int, Field(ge=0, lt=2**32)] = 0


class EMA(Section):
    """The averaged weights."""

    halflife_images: Annotated[Int, Field(ge=1)] = 50_000
    rampup_ratio: Annotated[Float, Field(gt=0)] | None = 0.05
    snapshot_every_n: Annotated[Int, Field(ge=1)] | None = None


class Checkpoint(Section):
    """Which checkpoints are kept. The last one always is."""

    keep_last: Annotated[Int, Field(ge=1)] | None = None
    keep_every_n: Annotated[Int, Field(ge=1)] | None = None


class Sampler(Section):
    """How images are sampled, in training and after it."""

    num_samples: Annotated[Int, Field(ge=1, le=1_000_000)] = 64
    sampling_steps: Annotated[Int, Field(ge=1, le=100_000)] = 18
    discretization: Literal[tuple(DISCRETIZATIONS)] = "edm"
    schedule: Literal[tuple(SCHEDULES)] = "linear"
    scaling: Literal[tuple(SCALINGS)] = "none"
    sigma_min: Annotated[Float, Field(ge=1e-6)] | None = None
    sigma_max: Annotated[Float, Field(gt=0, le=1e6)] | None = None
    rho: Annotated[Float, Field(ge=0.1, le=1000)] = 7.0
    solver: Literal[(*SOLVERS, "ancestral", "ddim")] = "heun"
    alpha: Annotated[Float, Field(gt=0, le=1)] = 1.0
    variance: Literal[VARIANCES] = "fixed_small"
    S_churn: Annotated[Float, Field(ge=0)] = 0.0
    S_min: Annotated[Float, Field(ge=0)] = 0.0
    S_max: Annotated[float, Field(ge=0, allow_inf_nan=True), BeforeValidator(as_number)] = math.inf
    S_noise: Annotated[Float, Field(gt=0)] = 1.0
    guidance: Annotated[Float, Field(ge=-1000, le=1000)] = 1.0
    guidance_min: Annotated[Float, Field(ge=0)] = 0.0
    guidance_max: Annotated[float, Field(ge=0, allow_inf_nan=True), BeforeValidator(as_number)] = math.inf
    guide: Annotated[str | None, Field(min_length=1)] = None
    clip: bool = False


class Config(Section):
    """One run. `name` is the stem of the config's file; every other field is a section of the file."""

    name: str = "edm"
    data: Data = Data()
    network: Network = Network()
    preconditioning: Preconditioning = Preconditioning()
    chain: Chain = Chain()
    loss: Loss = Loss()
    training: Training = Training()
    ema: EMA = EMA()
    checkpoint: Checkpoint = Checkpoint()
    sampler: Sampler = Sampler()

    def to_dict(self) -> dict:
        """Return {section: {key: value}} of plain values, without the name, as a file has them and checkpoints carry them."""
        sections = self.model_dump(exclude={"name"}).items()
        return {
            section: {key: list(value) if isinstance(value, tuple) else value for key, value in entries.items()}
            for section, entries in sections
        }


SECTIONS = {name: field.annotation.model_fields for name, field in Config.model_fields.items() if name != "name"}


def load(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML config, and the files that it is based on.

    Args:
        path: the file; its stem becomes the config's name.
        overrides: "section.key=value" entries, which replace the file's.

    Raises:
        UserError: a file cannot be read, or an entry is unknown or impossible.
    """
    path = Path(path)
    return from_dict(read_file(path, ()), path.stem, str(path), overrides)


def read_file(path: Path, above: tuple[Path, ...]) -> dict:
    """Return the sections of a file, merged key by key onto those of its base.

    Args:
        above: the files that led to this one by their `base:`.
    """
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        beside = list(path.parent.glob("*.yaml")) if os.path.isdir(path.parent) else []
        others = {other.name for other in [*beside, *CONFIGS.glob("*.yaml")]} if above else set(map(str, beside))
        hint = f"; {nearest(path.name if above else str(path), sorted(others))}" if others and not os.path.exists(path) else ""
        by = f" (the base of {above[-1]})" if above else ""
        raise UserError(f"cannot read the config {path}{by}: {reason}{hint}") from None
    base = values.pop("base", None) if isinstance(values, dict) else None
    values = check_sections({} if values is None else values, str(path))
    if base is None:
        return values
    if not isinstance(base, str) or not base.isprintable():
        raise UserError(f"{path}: base: must be the name of a file, not {brief(base)}")
    beside, shipped = path.parent / base, CONFIGS / base
    base = shipped if os.path.exists(shipped) and not os.path.exists(beside) else beside
    if os.path.realpath(base) in map(os.path.realpath, (path, *above)):  # Path.resolve fails where links lead in a circle
        raise UserError(f"{path}: base: {base} is based on this file in turn")
    merged = read_file(base, (*above, path))
    return merged | {section: merged.get(section, {}) | entries for section, entries in values.items()}


class StrictLoader(yaml.SafeLoader):
    """YAML's safe loader; a key that is given twice is an error."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if keys.count(key.value) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{brief(key.value)} is given twice", key.start_mark)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, source: str) -> object:
    """Return the plain values in a YAML text.

    Raises:
        UserError: the text is not YAML; the line is named.
    """
    try:
        return yaml.load(text, StrictLoader)
    except Exception as error:  # odd numbers, dates, tags and nests make PyYAML raise anything
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{source}{line}: not valid YAML: {getattr(error, 'problem', None) or 'unreadable'}") from None


def check_sections(values: object, source: str) -> dict:
    """Return {section: {key: value}}, with {} for an empty section.

    Raises:
        UserError: the values have another form, or a section is unknown, or a key is no text.
    """
    if not isinstance(values, dict):
        raise UserError(f"{source}: a config is a mapping of sections ({', '.join(SECTIONS)}), not {brief(values)}")
    for section, entries in values.items():
        if section not in SECTIONS:
            raise UserError(f"{source}: unknown section {brief(section)}; {nearest(brief(section), SECTIONS)}")
        if not isinstance(entries, dict | None):
            raise UserError(f"{source}: {section}: must be a mapping of entries, not {brief(entries)}")
        for key in entries or ():
            if not isinstance(key, str):
                raise UserError(f"{source}: {section}: unknown key {brief(key)}; {nearest(str(key), SECTIONS[section])}")
    return {section: entries or {} for section, entries in values.items()}


def from_dict(values: object, name: str, source: str, overrides: Iterable[str] = ()) -> Config:
    """Check plain values and return them as a `Config`.

    Args:
        values: {section: {key: value}}; what is missing has its default.
        name: the config's name, which names its output folder.
        source: where the values come from, for error messages.
        overrides: as in `load`.

    Raises:
        UserError: an entry is unknown or impossible, or entries contradict each other.
    """
    if not isinstance(name, str) or Path(name).name != name or name in ("", ".", "..") or not name.isprintable():
        raise UserError(f"{source}: {brief(name)} cannot be the name of an output folder")
    sections = {section: dict(entries) for section, entries in check_sections(values, source).items()}
    parsed = [parse_override(override) for override in overrides]
    for section, key, value in parsed:
        sections.setdefault(section, {})[key] = value
    replaced = {f"{section}.{key}": value for section, key, value in parsed}
    if "sampler.solver" in replaced and "sampler.S_churn" not in replaced and replaced["sampler.solver"] not in WITH_CHURN:
        sections["sampler"]["S_churn"] = 0.0  # the churn was meant for another solver
    try:
        config = Config(name=name, **sections)
    except ValidationError as error:
        first = error.errors()[0]
        overridden = first["loc"][:2] in [(section, key) for section, key, _ in parsed]
        raise UserError(f"{'command line' if overridden else source}: {explain(first)}") from None
    check_combinations(config, f"{source} and command line" if parsed else source)
    return config


def with_overrides(config: Config, overrides: Iterable[str], source: str) -> Config:
    """Return the config with "section.key=value" entries replaced."""
    return from_dict(config.to_dict(), config.name, source, overrides)


def parse_override(override: str) -> tuple[str, str, object]:
    """Split "section.key=value" into section, key and value."""
    path, equals, text = override.partition("=")
    section, dot, key = path.partition(".")
    if not (equals and dot and key):
        raise UserError(
            f"command line: {override!r} is not an override; write section.key=value, such as training.learning_rate=3e-4"
        )
    if section not in SECTIONS:
        raise UserError(f"command line: unknown section {section!r} in {override!r}; {nearest(section, SECTIONS)}")
    annotation = SECTIONS[section][key].annotation if key in SECTIONS[section] else None
    is_text = annotation is str or (annotation == str | None and text != "null")  # a folder may be called 5, or no
    return section, key, text if is_text else parse_yaml(text, f"command line: {path}")


def explain(error: dict) -> str:
    """Return one of pydantic's errors as one line: what is wrong, where, what is allowed."""
    section, key = error["loc"][:2]
    if error["type"] == "extra_forbidden":
        return (
            f"{section}.{key}: unknown key; {nearest(f'{section}.{key}', (f'{section}.{name}' for name in SECTIONS[section]))}"
        )
    value, field = error["input"], SECTIONS[section][key]
    if error["type"] == "literal_error":
        allowed = [str(choice) for choice in getattr(field.annotation, "__args__", ())]
        return f"{section}.{key}: unknown choice {brief(value)}; {nearest(str(value), allowed)}"
    if error["type"] == "value_error":
        return f"{section}.{key}: must be a number{' or auto' * (key == 'sigma_data')}, not {brief(value)}"
    rule = error["msg"].partition(",")[0].partition(" after")[0]
    for pydantic, ours in WORDS.items():
        rule = rule.replace(pydantic, ours)
    return f"{section}.{key}: {rule}, not {brief(value)}"


WORDS = {
    "Input should be": "must be",
    "Tuple should have": "must have",
    "String should have": "must have",
    "Unable to parse input string as an integer": "must be a whole number",
    "a valid tuple": "a list such as [2, 2, 2]",
    "a valid integer": "a whole number",
    "a valid boolean": "true or false",
    "a valid string": "text",
}


def check_combinations(config: Config, source: str) -> None:
    """Raise a `UserError` for entries that are possible alone and not together."""
    data, network, training, sampler = config.data, config.network, config.training, config.sampler

    def refuse(key: str, why: str):
        raise UserError(f"{source}: {key}: {why}")

    if data.dataset in ("mnist", "fashion_mnist") and not 28 <= data.resolution <= 128:
        refuse("data.resolution", f"{data.dataset} images have 28 pixels and are padded, never shrunk; 28 to 128 are allowed")
    if data.dataset == "digits" and data.resolution > 128:
        refuse("data.resolution", "the embedded digits are drawn at up to 128 pixels")
    if data.dataset == "cifar10" and data.resolution != 32:
        refuse("data.resolution", f"cifar10 images have 32 pixels, not {data.resolution}")
    levels = [data.resolution >> level for level in range(len(network.channel_mult))]
    if data.resolution % 2 ** (len(levels) - 1):
        refuse(
            "network.channel_mult",
            f"its {len(levels)} levels halve the image {len(levels) - 1} times, but data.resolution is {data.resolution}",
        )
    for resolution in network.attn_resolutions:
        if resolution not in levels:
            allowed = ", ".join(map(str, levels))
            refuse("network.attn_resolutions", f"{resolution} is not a resolution of this network; allowed: {allowed}")
    if data.augment_probability and not network.augment_dim:
        refuse(
            "data.augment_probability",
            f"above 0 needs network.augment_dim={NUM_LABELS}; a network that is not told about the augmentation imitates it",
        )
    if training.batch_size % training.accumulation:
        refuse("training.accumulation", f"{training.accumulation} does not divide training.batch_size {training.batch_size}")
    if sampler.S_min > sampler.S_max:
        refuse("sampler.S_min", f"{sampler.S_min} must not be above sampler.S_max {sampler.S_max}")
    if sampler.S_churn and sampler.solver not in WITH_CHURN:
        refuse("sampler.S_churn", f"the solver {sampler.solver} has no churn; set S_churn to 0, or choose heun or euler")
    if sampler.guidance_min > sampler.guidance_max:
        refuse("sampler.guidance_min", f"{sampler.guidance_min} must not be above sampler.guidance_max {sampler.guidance_max}")
    if not network.label_dim and config.loss.label_dropout:
        refuse("loss.label_dropout", "needs a class-conditional network (network.label_dim above 0)")
    if not network.label_dim and sampler.guidance != 1 and not sampler.guide:
        refuse("sampler.guidance", "other than 1 needs a network with classes (network.label_dim above 0), or a sampler.guide")
