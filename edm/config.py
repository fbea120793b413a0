"""From a YAML file to frozen dataclasses: every key, type and range is checked here, once.

The defaults are the lesson's (configs/edm.yaml).
"""

import dataclasses
import math
import os
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from edm import choices
from edm.augment import NUM_LABELS
from edm.choices import DISTRIBUTIONS, FORMULATIONS, OBJECTIVES, SOLVERS
from edm.ddpm import BETAS, VARIANCES, make_chain
from edm.errors import UserError, brief, nearest
from edm.loss import WEIGHTINGS
from edm.schedule import DISCRETIZATIONS, SCALINGS, SCHEDULES
from edm.schema import number, one_of, read_section
from edm.strictyaml import parse_yaml
from edm.unet import NETWORKS

DATASETS = ("mnist", "fashion_mnist", "cifar10", "image_folder", "digits")


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from, and what is done to them."""

    dataset: str = one_of("mnist", *DATASETS)
    root: str = "data"
    resolution: int = number(32, at_least=4, at_most=1024)
    channels: int = number(1, at_least=1, at_most=3)
    augment_probability: float = number(0.0, at_least=0, at_most=1)
    max_resident_mb: int = number(4096, at_least=0)


@dataclass(frozen=True)
class NetworkConfig:
    """The raw network F."""

    architecture: str = one_of("ddpmpp", *NETWORKS)
    model_channels: int = number(128, at_least=4, at_most=2048)
    channel_mult: tuple[int, ...] = number((2, 2, 2), at_least=1, at_most=64)
    num_blocks: int = number(4, at_least=1, at_most=64)
    attn_resolutions: tuple[int, ...] = number((16,), at_least=1)
    dropout: float = number(0.10, at_least=0, below=1)
    label_dim: int = number(0, at_least=0, at_most=100_000)
    augment_dim: int = number(0, at_least=0, at_most=NUM_LABELS)


@dataclass(frozen=True)
class PreconditioningConfig:
    """How F becomes a denoiser."""

    formulation: str = one_of("edm", *FORMULATIONS)
    sigma_data: float = number(0.5, above=0)


@dataclass(frozen=True)
class ChainConfig:
    """The chain of DDPM's and Improved DDPM's formulations, timesteps, objectives and solvers."""

    schedule: str = one_of("linear", *BETAS)
    num_timesteps: int = number(1000, at_least=2, at_most=100_000)


@dataclass(frozen=True)
class LossConfig:
    """At which noise levels it is trained, and with what weights."""

    objective: str = one_of("denoising", *OBJECTIVES)
    noise_distribution: str = one_of("lognormal", *DISTRIBUTIONS)
    P_mean: float = number(-1.2, at_least=-20, at_most=20)
    P_std: float = number(1.2, at_least=0, at_most=20)
    weighting: str = one_of("edm", *WEIGHTINGS)
    label_dropout: float = number(0.0, at_least=0, at_most=1)


@dataclass(frozen=True)
class TrainingConfig:
    """Steps, batches, Adam, precision."""

    num_training_steps: int = number(20_000, at_least=1)
    batch_size: int = number(64, at_least=1, at_most=1_000_000)
    accumulation: int = number(1, at_least=1)
    learning_rate: float = number(3e-4, above=0)
    lr_rampup_images: int = number(64_000, at_least=0)
    lr_halflife_images: int | None = number(None, at_least=1)
    adam_beta1: float = number(0.9, at_least=0, below=1)
    adam_beta2: float = number(0.999, at_least=0, below=1)
    adam_eps: float = number(1e-8, above=0)
    max_grad_norm: float | None = number(None, above=0)
    mixed_precision: str = one_of("auto", "auto", "no", "fp16", "bf16")
    compile: str = one_of("auto", "auto", "true", "false")
    save_and_sample_every_n: int = number(1000, at_least=1)
    seed: int = number(0, at_least=0, below=2**32)


@dataclass(frozen=True)
class EMAConfig:
    """The averaged weights."""

    halflife_images: int = number(50_000, above=0)
    rampup_ratio: float | None = number(0.05, above=0)


@dataclass(frozen=True)
class CheckpointConfig:
    """Which checkpoints stay. The last one always does."""

    keep_last: int | None = number(None, at_least=1)
    keep_every_n: int | None = number(None, at_least=1)


@dataclass(frozen=True)
class SamplerConfig:
    """How samples are made, in training and after."""

    num_samples: int = number(64, at_least=1, at_most=1_000_000)
    sampling_steps: int = number(18, at_least=1, at_most=100_000)
    discretization: str = one_of("edm", *DISCRETIZATIONS)
    schedule: str = one_of("linear", *SCHEDULES)
    scaling: str = one_of("none", *SCALINGS)
    sigma_min: float | None = number(None, at_least=1e-6)
    sigma_max: float | None = number(None, at_most=1e6)
    rho: float = number(7.0, at_least=0.1, at_most=1000)
    solver: str = one_of("heun", *SOLVERS)
    alpha: float = number(1.0, above=0, at_most=1)
    variance: str = one_of("fixed_small", *VARIANCES)
    S_churn: float = number(0.0, at_least=0)
    S_min: float = number(0.0, at_least=0)
    S_max: float = number(math.inf, at_least=0, at_most=math.inf)  # the only entry that may be infinite
    S_noise: float = number(1.0, above=0)
    guidance: float = number(1.0, at_least=-1000, at_most=1000)
    clip: str = one_of("false", "true", "false")


@dataclass(frozen=True)
class Config:
    """One run. `name` is the config file's stem; every other field is a section of the file."""

    name: str = "edm"
    data: DataConfig = DataConfig()
    network: NetworkConfig = NetworkConfig()
    preconditioning: PreconditioningConfig = PreconditioningConfig()
    chain: ChainConfig = ChainConfig()
    loss: LossConfig = LossConfig()
    training: TrainingConfig = TrainingConfig()
    ema: EMAConfig = EMAConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    sampler: SamplerConfig = SamplerConfig()

    def to_dict(self) -> dict:
        """Plain nested dicts and lists, without the name: what `from_dict` reads and a checkpoint carries."""
        sections = {key: value for key, value in dataclasses.asdict(self).items() if key != "name"}
        return {
            section: {key: list(value) if isinstance(value, tuple) else value for key, value in entries.items()}
            for section, entries in sections.items()
        }


SECTIONS = {f.name: f.default.__class__ for f in dataclasses.fields(Config) if f.name != "name"}


MAX_CONFIG_BYTES = 1_000_000


def load(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML config.

    Args:
        path: the file; its stem becomes the config's name.
        overrides: "section.key=value" entries, which replace the file's.

    Raises:
        UserError: an unreadable file, an unknown key, a wrong type or an impossible value.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_CONFIG_BYTES + 1).decode("utf-8")
        if len(text) > MAX_CONFIG_BYTES:
            raise UserError(f"{path} is no config: it has more than {MAX_CONFIG_BYTES:,} bytes")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        beside = [str(other) for other in sorted(path.parent.glob("*.yaml"))]
        hint = f"; {nearest(str(path), beside)}" if beside and not os.path.exists(path) else ""
        raise UserError(f"cannot read the config {path}: {reason}{hint}") from None
    values = parse_yaml(text, str(path))
    return from_dict({} if values is None else values, path.stem, str(path), overrides)


def from_dict(values: object, name: str, source: str, overrides: Iterable[str] = ()) -> Config:
    """Check nested plain values and make them a `Config`.

    Args:
        values: {section: {key: value}}; what is left out has its default.
        name: the config's name; a plain file name.
        source: where the values come from, for the error messages.
        overrides: as in `load`.

    Raises:
        UserError: as in `load`.
    """
    if not isinstance(name, str) or Path(name).name != name or name in ("", ".", "..") or not name.isprintable():
        raise UserError(f"{source}: {brief(name)} cannot be the name of an output folder")
    if not isinstance(values, dict):
        raise UserError(f"{source}: a config is a mapping of sections ({', '.join(SECTIONS)}), not {brief(values)}")
    sections = {}
    for section, entries in values.items():
        if section not in SECTIONS:
            raise UserError(f"{source}: unknown section {brief(section)}; {nearest(brief(section), SECTIONS)}")
        if entries is not None and not isinstance(entries, dict):
            raise UserError(f"{source}: {section}: must be a mapping of entries, not {brief(entries)}")
        sections[section] = {key: (value, source) for key, value in (entries or {}).items()}
    for override in overrides:
        section, key, value = parse_override(override)
        sections.setdefault(section, {})[key] = (value, "command line")
    config = Config(
        name, **{section: read_section(section, SECTIONS[section], entries) for section, entries in sections.items()}
    )
    check_combinations(config, source)
    return config


def parse_override(override: str) -> tuple[str, str, object]:
    """Split "section.key=value" into its three parts."""
    path, equals, text = override.partition("=")
    section, dot, key = path.partition(".")
    if not (equals and dot and key):
        raise UserError(
            f"command line: {override!r} is not an override; write section.key=value, such as training.learning_rate=3e-4"
        )
    if section not in SECTIONS:
        raise UserError(f"command line: unknown section {section!r} in {override!r}; {nearest(section, SECTIONS)}")
    if typing.get_type_hints(SECTIONS[section]).get(key) is str:
        return section, key, text  # as it stands: a folder may be called 5, or no
    return section, key, parse_yaml(text, f"command line: {path}")


def check_combinations(config: Config, source: str) -> None:
    """What no entry says alone."""
    data, network, training, sampler = config.data, config.network, config.training, config.sampler

    def refuse(key: str, why: str):
        raise UserError(f"{source}: {key}: {why}")

    if data.channels == 2:
        refuse("data.channels", "2 is neither 1 (grey) nor 3 (colour)")
    if data.dataset in ("mnist", "fashion_mnist") and not 28 <= data.resolution <= 128:
        refuse("data.resolution", f"{data.dataset} images have 28 pixels and are padded, never shrunk; 28 to 128 are allowed")
    if data.dataset == "digits" and data.resolution > 128:
        refuse("data.resolution", "the embedded digits are drawn at up to 128 pixels")
    if data.dataset == "cifar10" and data.resolution != 32:
        refuse("data.resolution", f"cifar10 images have 32 pixels, not {data.resolution}")
    if not network.channel_mult:
        refuse("network.channel_mult", "must name at least one level, such as [2, 2, 2]")
    halvings = len(network.channel_mult) - 1
    if data.resolution % 2**halvings:
        refuse(
            "network.channel_mult",
            f"its {halvings + 1} levels halve the image {halvings} times, but data.resolution is {data.resolution}",
        )
    levels = [data.resolution >> level for level in range(halvings + 1)]
    for res in network.attn_resolutions:
        if res not in levels:
            refuse(
                "network.attn_resolutions",
                f"{res} is not a resolution of this network; allowed: {', '.join(map(str, levels))}",
            )
    if network.model_channels % 2:
        refuse("network.model_channels", f"must be even (half sines, half cosines), not {network.model_channels}")
    if network.augment_dim not in (0, NUM_LABELS):
        refuse("network.augment_dim", f"must be 0 (no augmentation) or {NUM_LABELS}, not {network.augment_dim}")
    if data.augment_probability and not network.augment_dim:
        refuse(
            "data.augment_probability",
            f"above 0 needs network.augment_dim={NUM_LABELS}; a network that is not told of the augmentation would copy it",
        )
    if training.batch_size % training.accumulation:
        refuse("training.accumulation", f"{training.accumulation} does not divide training.batch_size {training.batch_size}")
    made = {
        "chain.num_timesteps": lambda: make_chain(config.chain.schedule, config.chain.num_timesteps),
        "loss.objective": lambda: choices.objective(config),
        "sampler": lambda: choices.sampler(config),
    }
    for key, make in made.items():
        try:
            make()
        except ValueError as error:
            refuse(key, str(error))
    if sampler.S_min > sampler.S_max:
        refuse("sampler.S_min", f"{sampler.S_min} must not be above sampler.S_max {sampler.S_max}")
    if not network.label_dim and (config.loss.label_dropout or sampler.guidance != 1):
        key = "loss.label_dropout" if config.loss.label_dropout else "sampler.guidance"
        refuse(key, "needs a class-conditional network (network.label_dim above 0)")
