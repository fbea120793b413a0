"""Configs: what the files in configs/ say, how a file is read, and the one line that a mistake ends in."""

import math
import re
from pathlib import Path

import pytest
import yaml

from lab import checkpoint
from lab import config as configs
from lab.build import build_chain_loss, build_noise_distribution, build_sampler, build_weighting, sampling_plan
from lab.cli import UserError
from lab.config import CONFIGS, Config

FILES = sorted(CONFIGS.rglob("*.yaml"))
ENTRIES = [(section, key) for section, entries in Config().to_dict().items() for key in entries]


def from_overrides(*overrides: str) -> Config:
    return configs.from_dict({}, "x", "x", overrides)


def flat(sections: dict) -> dict:
    return {(section, key): value for section, entries in sections.items() for key, value in entries.items()}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_config_makes_sense_explains_its_entries_and_holds_only_what_differs_from_its_base(path):
    config, values = configs.load(path), yaml.safe_load(path.read_text())
    assert config.name == path.stem
    for build in (build_noise_distribution, build_weighting, build_chain_loss, build_sampler):
        build(config)
    assert all("  # " in line for line in path.read_text().splitlines() if re.match(r"  \w", line))
    if name := values.pop("base", None):
        base = next(folder / name for folder in (path.parent, CONFIGS) if (folder / name).exists())
        inherited = flat(configs.load(base).to_dict())
        assert [entry for entry, value in flat(values).items() if inherited[entry] == value] == []


def test_edm_yaml_lists_every_entry_with_its_default():
    values = yaml.safe_load((CONFIGS / "edm.yaml").read_text())
    assert list(flat(values).items()) == list(flat(Config().to_dict()).items())
    assert configs.load(CONFIGS / "edm.yaml") == Config()


def changed(before: str, after: str) -> set[str]:
    """The entries in which two resolved configs differ."""
    a, b = (flat(configs.load(CONFIGS / f"{name}.yaml").to_dict()) for name in (before, after))
    return {f"{section}.{key}" for section, key in a if a[section, key] != b[section, key]}


COLUMN = {"preconditioning.formulation", "loss.noise_distribution", "loss.weighting"}
SAMPLING = {"sampler.solver", "sampler.sampling_steps", "sampler.discretization"}


def test_the_columns_of_table_1_differ_by_their_cells():
    assert changed("edm", "vp") == COLUMN | SAMPLING | {"sampler.schedule", "sampler.scaling"}
    assert changed("edm", "ve") == COLUMN | SAMPLING | {"sampler.schedule", "network.architecture"}
    assert changed("edm", "table1_iddpm") == COLUMN | SAMPLING | {"network.architecture"}


TABLE_2 = {
    "ab": {"training.batch_size", "training.num_training_steps", "training.learning_rate", "training.lr_rampup_images"}
    | {"training.max_grad_norm", "network.dropout", "ema.halflife_images", "ema.rampup_ratio"},
    "bc": {"network.channel_mult"},
    "cd": {"preconditioning.formulation"},
    "de": {"loss.noise_distribution", "loss.weighting"},
    "ef": {"data.augment_probability", "network.augment_dim"},
}


def test_the_rows_of_table_2_differ_by_what_the_paper_changes():
    for (before, after), entries in TABLE_2.items():
        for formulation in ("vp", "ve"):
            assert changed(f"table2/{formulation}_{before}", f"table2/{formulation}_{after}") == entries
    assert changed("table2/vp_f", "table2/ve_f") == {"network.architecture"}
    assert changed("table2/vp_a", "table2/ve_a") == {"network.architecture"} | COLUMN
    assert changed("table2/vp_f", "cifar10") == set()


def test_the_small_configs_differ_by_what_their_papers_say():
    length = {"training.num_training_steps", "training.save_and_sample_every_n"}
    sampler = {"sampler.solver", "sampler.sampling_steps", "sampler.clip", "sampler.S_churn", "sampler.guidance"}
    others = {"training.learning_rate", "preconditioning.sigma_data"}
    assert changed("edm_small", "ddpm_small") == COLUMN | length | sampler | others
    unconditional = {"network.label_dim", "loss.label_dropout", "loss.P_mean", "loss.P_std"}
    assert changed("edm_laptop", "edm_laptop_uncond") == unconditional
    assert changed("edm_small", "edm_small_uncond") == unconditional | {"sampler.sigma_min"}
    learned = {"preconditioning.formulation", "loss.objective", "network.architecture", "sampler.variance", "chain.betas"}
    assert changed("ddpm_small", "iddpm_small") == learned


def test_a_solver_without_churn_switches_it_off():
    small = configs.load(configs.CONFIGS / "edm_small.yaml")
    for solver, S_churn in {"dpmpp_2m": 0, "ddim": 0, "ancestral": 0, "euler": 10, "heun": 10}.items():
        assert configs.with_overrides(small, [f"sampler.solver={solver}"], "x").sampler.S_churn == S_churn
    with pytest.raises(UserError, match="the solver ddim has no churn"):
        configs.with_overrides(small, ["sampler.solver=ddim", "sampler.S_churn=10"], "x")


def write(folder: Path, **files: str) -> Path:
    """Write files of some text; returns the path of the first."""
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8", errors="surrogateescape")
    return folder / f"{next(iter(files))}.yaml"


def test_a_file_is_merged_key_by_key_onto_the_files_that_it_is_based_on(tmp_path):
    path = write(
        tmp_path,
        top="base: middle.yaml\ntraining: {seed: 5}\nnetwork: {channel_mult: [3, 3]}\nloss:\n",
        middle="base: edm_cond.yaml\ntraining: {seed: 4, batch_size: 8}\nnetwork: {channel_mult: [1, 2, 3, 4]}\n",
    )
    entries = ["training.seed=5", "training.batch_size=8", "network.channel_mult=[3, 3]"]
    expected = configs.load(CONFIGS / "edm_cond.yaml", entries)
    assert configs.load(path) == expected.model_copy(update={"name": "top"})
    assert configs.load(path, ["training.batch_size=9"]).training.batch_size == 9
    write(tmp_path, edm_cond="training: {learning_rate: 1}")  # a file beside it comes before one of configs/
    assert configs.load(path).training.learning_rate == 1
    assert configs.load(path).network.label_dim == 0


AS_WRITTEN = {
    "training.learning_rate": {"3e-4": 3e-4, "0.0003": 3e-4, "3.0e-4": 3e-4, ".3e-3": 3e-4, "+3E-4": 3e-4},
    "training.batch_size": {"1e3": 1000},
    "sampler.S_max": {"inf": math.inf, ".inf": math.inf},
    "training.compile": {"true": True, "True": True},
    "training.max_grad_norm": {"null": None},
    "preconditioning.sigma_data": {"auto": "auto"},
    "training.mixed_precision": {"no": "no"},  # which YAML takes for false
    "sampler.guide": {"null": None, "a.pt": "a.pt"},
}


def test_entries_are_read_as_people_write_them(tmp_path):
    for entry, text, value in ((entry, *pair) for entry, values in AS_WRITTEN.items() for pair in values.items()):
        section, key = entry.split(".")
        path = write(tmp_path, c=f"{section}: {{{key}: {text}}}")
        for config in (configs.load(path), from_overrides(f"{entry}={text}")):
            assert config.to_dict()[section][key] == value
    for text in ("1e3", "a=b: c", "no"):  # folders
        assert from_overrides(f"data.root={text}").data.root == text
        assert from_overrides(f"sampler.guide={text}").sampler.guide == text


def test_a_checkpoint_carries_its_config():
    config = configs.load(CONFIGS / "iddpm_small.yaml", ["network.channel_mult=[1, 2, 3]", "training.max_grad_norm=1"])
    contents = {"name": "iddpm_small", "config": config.to_dict()}
    assert checkpoint.read_config(contents, "x.pt") == config
    assert checkpoint.read_config(contents, "x.pt", ["training.seed=7"]).training.seed == 7
    old = {section: dict(entries) for section, entries in config.to_dict().items()}  # as earlier versions wrote it
    old["chain"] = {"schedule": "cosine", "num_timesteps": 1000}
    old["training"]["compile"], old["sampler"]["clip"] = "auto", "true"
    assert checkpoint.read_config({"name": "iddpm_small", "config": old}, "x.pt") == config
    assert old["chain"]["schedule"] == "cosine"  # it is left as it was read
    for wrong in ({"training": {"seed": "x"}}, {3: {}}, {"network": {3: 1}}, {"base": {}}):
        with pytest.raises(UserError, match=r"^the config in x\.pt: "):
            checkpoint.read_config({"name": "x", "config": wrong}, "x.pt")


@pytest.mark.parametrize(("section", "key"), ENTRIES, ids=".".join)
def test_every_entry_is_checked_and_a_misspelt_one_names_it(section, key):
    with pytest.raises(UserError, match=rf"^x: {section}\.{key}x: unknown key; did you mean '{section}\.{key}'"):
        configs.from_dict({section: {f"{key}x": 1}}, "x", "x")
    for wrong in ({"a": 1}, [[1]], -1.5e99, math.nan, "\0", "9" * 400):
        # Files may have any name, and upper ends may be infinite.
        if key not in ("root", "guide", "S_max", "guidance_max") or not isinstance(wrong, str):
            with pytest.raises(UserError, match=rf"^x: {section}\.{key}: (must|unknown choice)") as error:
                configs.from_dict({section: {key: wrong}}, "x", "x")
            assert len(str(error.value)) < 200


IMPOSSIBLE = {
    "training.learing_rate=1": "did you mean 'training.learning_rate'",
    "trainin.seed=1": "did you mean 'training'",
    "data.dataset=mnits": "unknown choice 'mnits'; did you mean 'mnist'",
    "training.seed=4294967296": "training.seed: must be less than 4294967296, not 4294967296",
    "training.batch_size=true": "training.batch_size: must be a number, not true",
    "network.channel_mult=2": "network.channel_mult: must be a list such as [2, 2, 2], not 2",
    "data.root=": "data.root: must have at least 1 character",
    "preconditioning.sigma_data=1e-300": "preconditioning.sigma_data: must be greater than or equal to 0.001, not",
    "preconditioning.sigma_data=1e300": "preconditioning.sigma_data: must be less than or equal to 1000, not",
    "training.seed": "write section.key=value",
    "seed=1": "write section.key=value",
    "training.seed=[": "command line: training.seed, line 1: not valid YAML",
    # choices that do not fit together
    "training.accumulation=3": "3 does not divide training.batch_size 64",
    "sampler.S_min=2 sampler.S_max=1": "sampler.S_min: 2.0 must not be above sampler.S_max 1.0",
    "sampler.guidance=2": "sampler.guidance: other than 1 needs a network with classes (network.label_dim above 0), or a",
    "sampler.guidance_min=2 sampler.guidance_max=1": "sampler.guidance_min: 2.0 must not be above sampler.guidance_max 1.0",
    "sampler.guide=": "sampler.guide: must have at least 1 character",
    "sampler.solver=dpmpp_2m sampler.S_churn=1": "sampler.S_churn: the solver dpmpp_2m has no churn",
    "sampler.solver=ddim sampler.S_churn=1": "sampler.S_churn: the solver ddim has no churn",
    "loss.label_dropout=0.1": "loss.label_dropout: needs a class-conditional network",
    "network.channel_mult=[1,1,1,1,1,1,1]": "halve the image 6 times",
    "network.attn_resolutions=[15]": "15 is not a resolution of this network; allowed: 32, 16, 8",
    "data.augment_probability=0.1": "needs network.augment_dim=9",
    "data.resolution=16": "padded, never shrunk",
    "data.dataset=cifar10 data.resolution=64": "cifar10 images have 32 pixels, not 64",
    "data.dataset=digits data.resolution=256": "drawn at up to 128 pixels",
    "sampler.sigma_min=100": "sampler: sigma_min 100 must be below sigma_max 80",
    "sampler.discretization=iddpm sampler.sampling_steps=2000": "noise levels from 0.002 to 81, too few for 2000 steps",
    "sampler.schedule=vp sampler.sigma_min=20": "no VP schedule rises from 20 to 80",
    "sampler.schedule=vp sampler.sigma_min=0.12 sampler.S_churn=40": "no time at which the noise level is 113.137",
    "sampler.discretization=vp sampler.sigma_max=0.5 sampler.sigma_min=0.4": "no VP schedule rises from 0.4 to 0.5",
    "preconditioning.formulation=ve sampler.sigma_max=0.01": "must be below sigma_max 0.01; the denoiser knows 0.02 to 100",
    "sampler.solver=ancestral sampler.sampling_steps=1001": "sampler: the chain has 1000 timesteps, too few for 1001 steps",
    "sampler.solver=ddim preconditioning.formulation=ve": "the formulation ve does not know the noise levels of the chain",
    "sampler.solver=ancestral sampler.variance=learned_range": "the formulation edm has learned no variance",
    "loss.objective=hybrid": "needs preconditioning.formulation=improved_ddpm",
    "loss.objective=vlb preconditioning.formulation=improved_ddpm": "needs the timesteps of a chain",
}


@pytest.mark.parametrize(("overrides", "message"), IMPOSSIBLE.items())
def test_what_is_impossible_or_does_not_fit_together_is_one_line(overrides, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        config = from_overrides(*overrides.split())
        build_chain_loss(config)
        build_sampler(config)
    assert "\n" not in str(error.value)


ODD_VALUES = ("!!int ''", "!!timestamp x", "2024-13-41", "9" * 5000, "1:" * 180 + "1.5")  # on which PyYAML itself fails

# What errors say, and 40 files with that one thing wrong
DAMAGED = {
    "a config is a mapping of sections": ["- 1", "!!set {data}", "\ufeff\ufeffx", "x" * 100_000],
    "unknown section 'datta'; did you mean 'data'": ["datta: {root: x}"],
    "unknown section": ["name: {x: y}"],
    "data: must be a mapping of entries, not 3": ["data: 3"],
    "training: unknown key 1": ["training: {1: 2}"],
    "training.seed: must be a whole number, not nothing": ["training: {seed: null}"],
    "training.seed: must be a whole number, not ": ["training: &x {seed: *x}", "training: {seed: 2024-01-01}"],
    "not a number of more than 30 digits": [f"training: {{seed: {'9' * 400}}}"],
    "data.root: must be text, not 5": ["data: {root: 5}"],
    "sampler.solver: unknown choice ['heun']": ["sampler: {solver: [heun]}"],
    "network.channel_mult: must be a list": ["network: {channel_mult: '123'}"],
    "line 1: not valid YAML": ["data: {[1]: 2}", "training: {<<: 3}", "training: *x"],
    "line 2: not valid YAML": ["data:\n  root: [", "data:\n\troot: x", "a: 1\n--- \nb: 1"],
    "'root' is given twice": ["data:\n  root: a\n  root: b"],
    "'data' is given twice": ["data: {root: x}\ndata: {root: y}"],
    "not valid YAML: could": ["data: !!python/object/apply:os.mkdir [bomb]", "data:\n  root: !!python/name:os.system"],
    "not valid YAML: unreadable": ["\0", "[" * 600, *(f"training: {{seed: {value}}}" for value in ODD_VALUES)],
    "cannot read the config none.yaml (the base of bad.yaml): No such file or directory; did you mean": ["base: none.yaml"],
    "bad.yaml: base: bad.yaml is based on this file in turn": ["base: bad.yaml"],
    "b.yaml: base: bad.yaml is based on this file in turn": ["base: b.yaml"],
    "bad.yaml: base: must be the name of a file": ["base: [b.yaml]", 'base: "b\\0"'],
    "(the base of bad.yaml): File name too long": [f"base: {'x' * 300}"],
    "(the base of bad.yaml): Is a directory": ["base: ."],
    "cannot read the config bad.yaml: it is not UTF-8 text": ["data: {root: \udcff}"],
}


@pytest.mark.parametrize(("text", "message"), [(text, message) for message, texts in DAMAGED.items() for text in texts])
def test_a_damaged_file_is_one_line(text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write(Path(), bad=text, b="base: bad.yaml\n")
    with pytest.raises(UserError, match=re.escape(message)) as error:
        configs.load(path)
    assert re.match(r"(bad|b)\.yaml|cannot read the config", str(error.value))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 700
    assert not Path("bomb").exists()


def test_a_base_that_is_a_link_to_itself_is_one_line(tmp_path):
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    with pytest.raises(UserError, match=r"cannot read the config .*loop\.yaml \(the base of .*: Too many levels"):
        configs.load(write(tmp_path, c="base: loop.yaml\n"))


@pytest.mark.parametrize("name", ["../x", "a/b", "..", "", "a\nb", 5])
def test_a_name_from_a_stranger_cannot_leave_the_output_folder(name):
    with pytest.raises(UserError, match="cannot be the name of an output folder"):
        configs.from_dict({}, name, "x")


def test_the_range_of_noise_levels_is_the_samplers_within_what_the_network_knows():
    for formulation, ends in {"edm": (80, 0.002), "ve": (80, 0.02)}.items():
        steps, _ = sampling_plan(from_overrides(f"preconditioning.formulation={formulation}"))
        assert (steps[0].item(), steps[-2].item(), steps[-1].item()) == pytest.approx((*ends, 0))
