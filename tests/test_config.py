"""Configs: what passes, and the one line that comes of what does not."""

import dataclasses
import importlib
import math
import re

import pytest
import torch
from conftest import ROOT

from edm import choices, ddpm, ddpm_training
from edm import config as configs
from edm.config import Config
from edm.errors import UserError
from edm.loss import NOISE_DISTRIBUTIONS, WEIGHTINGS
from edm.precond import PRECONDITIONINGS
from edm.schedule import DISCRETIZATIONS, SCALINGS, SCHEDULES
from edm.unet import NETWORKS

CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads_and_explains_every_entry(path):
    config = configs.load(path)
    assert config.name == path.stem
    entries = re.findall(r"^  (\w+): (.*)$", path.read_text(), re.MULTILINE)
    sections = config.to_dict()
    if config.preconditioning.formulation not in ddpm.FORMULATIONS:
        del sections["chain"]  # of which they know nothing
    assert [key for key, _ in entries] == [key for section in sections.values() for key in section]
    assert all("#" in rest for _, rest in entries)


def test_the_lesson_is_the_default():
    assert configs.load(ROOT / "configs/edm.yaml") == Config()


def changed_entries(before: str, after: str) -> set[str]:
    """The entries that differ between two config files."""
    a, b = (configs.load(ROOT / f"configs/{name}.yaml").to_dict() for name in (before, after))
    return {f"{section}.{key}" for section in a for key in a[section] if a[section][key] != b[section][key]}


def changed(before: str, after: str) -> set[str]:
    """The same, which must also be the lines that differ, but for the heading."""
    entries = changed_entries(before, after)
    lines = [(ROOT / f"configs/{name}.yaml").read_text().partition("\ndata:")[2].splitlines() for name in (before, after)]
    assert len(lines[0]) == len(lines[1])
    assert sum(x != y for x, y in zip(*lines)) == len(entries)
    return entries


COLUMN = {"preconditioning.formulation", "loss.noise_distribution", "loss.weighting"}
SAMPLING = {"sampler.solver", "sampler.sampling_steps", "sampler.discretization"}


def test_the_columns_of_table_1_differ_by_their_cells():
    assert changed("edm", "vp") == COLUMN | SAMPLING | {"sampler.schedule", "sampler.scaling"}
    assert changed("edm", "ve") == COLUMN | SAMPLING | {"sampler.schedule", "network.architecture"}
    assert changed("edm", "iddpm_ddim") == COLUMN | SAMPLING | {"network.architecture"}


@pytest.mark.parametrize("formulation", ["vp", "ve"])
def test_the_rows_of_table_2_differ_by_what_the_paper_changes(formulation):
    optimisation = {"batch_size", "num_training_steps", "learning_rate", "lr_rampup_images", "max_grad_norm"}
    rows = {
        "ab": {f"training.{key}" for key in optimisation} | {"network.dropout", "ema.halflife_images", "ema.rampup_ratio"},
        "bc": {"network.channel_mult"},
        "cd": {"preconditioning.formulation"},
        "de": {"loss.noise_distribution", "loss.weighting"},
        "ef": {"data.augment_probability", "network.augment_dim"},
    }
    for (before, after), entries in rows.items():
        assert changed(f"table2/{formulation}_{before}", f"table2/{formulation}_{after}") == entries
    assert changed("table2/vp_f", "table2/ve_f") == {"network.architecture"}
    assert changed("table2/vp_a", "table2/ve_a") == {"network.architecture"} | COLUMN


def test_the_cifar10_config_is_table_2s_last():
    cifar10, last = (configs.load(ROOT / f"configs/{name}.yaml") for name in ("cifar10", "table2/vp_f"))
    assert dataclasses.replace(cifar10, name=last.name) == last


def test_the_readme_names_a_function_for_every_cell_of_table_1():
    """Every `room.name` in the table exists, and every choice of every table of choices stands in it."""
    section = (ROOT / "README.md").read_text().partition("## The design space")[2].partition("Names in the cells")[0]
    names = re.findall(r"`((?:schedule|sampler|unet|precond|loss)\.[A-Za-z_]\w*(?:\.\w+)?)`", section)
    options = {f"{s}.{key}" for s, entries in Config().to_dict().items() for key in entries}
    places = [name for name in names if name not in options]
    assert len(places) > 30
    for name in places:
        room, *path = name.split(".")
        found = importlib.import_module(f"edm.{room}")
        for attribute in path:
            found = getattr(found, attribute)
        assert callable(found)
    tables = (DISCRETIZATIONS, SCHEDULES, SCALINGS, NETWORKS, PRECONDITIONINGS, NOISE_DISTRIBUTIONS, WEIGHTINGS)
    assert all(f"`{choice}`" in section for table in tables for choice in table)


def test_the_readme_names_a_place_for_every_choice_of_the_chain():
    section = (ROOT / "README.md").read_text().partition("## Where EDM came from")[2].partition("\n## ")[0]
    places = re.findall(r"`((?:ddpm|ddpm_training)\.(?!yaml)[A-Za-z_]\w*(?:\.\w+)?)`", section)
    assert len(places) > 12
    for name in places:
        found = importlib.import_module(f"edm.{name.partition('.')[0]}")
        for attribute in name.split(".")[1:]:
            found = getattr(found, attribute)
    tables = (ddpm.BETAS, ddpm.VARIANCES, ddpm.FORMULATIONS, ddpm_training.TIMESTEPS, ddpm_training.OBJECTIVES)
    assert all(f"`{choice}`" in section for table in tables for choice in table)


def test_the_lessons_differ_from_edm_and_from_each_other_by_what_their_papers_say():
    chain = COLUMN | {"sampler.solver", "sampler.sampling_steps", "sampler.clip"}
    learned = {"loss.objective", "network.architecture", "sampler.variance", "chain.schedule"}
    assert changed_entries("edm_small", "ddpm_small") == chain | {
        f"training.{key}" for key in ("num_training_steps", "save_and_sample_every_n")
    }
    assert changed("ddpm_small", "iddpm_small") == learned | {"preconditioning.formulation"}


def test_the_readmes_python_runs_as_it_stands():
    """The schedule of one's own samples the images of the data set."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names = {}
    exec(code, names)
    nearest = torch.cdist(names["images"].flatten(1), names["denoiser"].images.flatten(1)).min(dim=1).values
    assert nearest.max() < 1e-3


def test_a_config_survives_the_round_trip_through_a_checkpoint():
    config = configs.load(ROOT / "configs/edm_cond.yaml", ["network.channel_mult=[1, 2]", "training.max_grad_norm=1"])
    assert configs.from_dict(config.to_dict(), "edm_cond", "checkpoint") == config
    assert config.network.channel_mult == (1, 2)
    assert config.training.max_grad_norm == 1.0


@pytest.mark.parametrize("text", ["3e-4", "0.0003", "3.0e-4", ".3e-3", "+3E-4"])
def test_numbers_as_people_write_them(text, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(f"training:\n  learning_rate: {text}\n")
    assert configs.load(path).training.learning_rate == 3e-4
    assert configs.load(path, ["training.learning_rate=1e-2"]).training.learning_rate == 0.01


def test_no_is_a_word(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("training:\n  mixed_precision: no\n")
    assert configs.load(path).training.mixed_precision == "no"


@pytest.mark.parametrize("text", ["true", "false", "auto", "True"])
def test_true_and_false_are_choices_where_there_is_a_third(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(f"training:\n  compile: {text}\n")
    assert configs.load(path).training.compile == text.lower()
    assert configs.from_dict(configs.load(path).to_dict(), "x", "x") == dataclasses.replace(configs.load(path), name="x")
    path.write_text(f"training:\n  mixed_precision: {text}x\n")
    with pytest.raises(UserError, match="unknown choice"):
        configs.load(path)


def test_infinity_as_people_write_it(tmp_path):
    for text in ("inf", ".inf"):
        assert configs.from_dict({}, "x", "x", [f"sampler.S_max={text}"]).sampler.S_max == math.inf


def test_text_entries_are_taken_as_they_stand():
    assert configs.from_dict({}, "x", "x", ["data.root=1e3"]).data.root == "1e3"
    assert configs.from_dict({}, "x", "x", ["data.root=a=b: c"]).data.root == "a=b: c"


BAD_OVERRIDES = {
    "training.learing_rate=1": "did you mean 'training.learning_rate'",
    "trainin.seed=1": "did you mean 'training'",
    "training.seed=-1": "training.seed: -1 is out of range; it must be at least 0 and below 4,294,967,296",
    "training.seed=1.5": "training.seed: must be a whole number, not 1.5",
    "training.batch_size=true": "training.batch_size: must be a whole number, not true",
    "training.batch_size=sixty": "training.batch_size: must be a whole number, not 'sixty'",
    "training.learning_rate=.inf": "training.learning_rate: inf is out of range",
    "training.learning_rate=0": "training.learning_rate: 0 is out of range; it must be above 0",
    "sampler.S_max=.nan": "sampler.S_max: nan is out of range",
    "network.dropout=1": "network.dropout: 1 is out of range; it must be at least 0 and below 1",
    "network.channel_mult=2": "network.channel_mult: must be a list of whole numbers, such as [2, 2, 2], not 2",
    "network.channel_mult=[2, x]": "network.channel_mult: must be a whole number, not 'x'",
    "network.channel_mult=[]": "must name at least one level",
    "network.channel_mult=[1, 1, 1, 1, 1, 1, 1]": "halve the image 6 times",
    "network.attn_resolutions=[15]": "15 is not a resolution of this network; allowed: 32, 16, 8",
    "network.model_channels=33": "must be even",
    "data.dataset=mnits": "unknown choice 'mnits'; did you mean 'mnist'",
    "data.channels=2": "neither 1 (grey) nor 3 (colour)",
    "data.resolution=16": "padded, never shrunk",
    "training.accumulation=3": "3 does not divide training.batch_size 64",
    "sampler.sigma_min=100": "sampler: sigma_min 100 must be below sigma_max 80",
    "sampler.alpha=0": "sampler.alpha: 0 is out of range; it must be above 0 and at most 1",
    "sampler.discretization=dpm": "did you mean 'iddpm'? Allowed: edm, vp, ve, iddpm",
    "sampler.scaling=vpp": "did you mean 'vp'",
    "preconditioning.formulation=vpp": "did you mean 'vp'",
    "loss.noise_distribution=log_normal": "did you mean 'lognormal'",
    "data.augment_probability=0.1": "needs network.augment_dim=9",
    "data.augment_probability=1.5": "must be at least 0 and at most 1",
    "network.augment_dim=3": "must be 0 (no augmentation) or 9, not 3",
    "sampler.guidance=2": "needs a class-conditional network",
    "loss.label_dropout=0.1": "needs a class-conditional network",
    "training.seed": "write section.key=value",
    "seed=1": "write section.key=value",
    "training.seed=[": "not valid YAML",
}


@pytest.mark.parametrize(
    ("sampler", "message"),
    [
        ("discretization: iddpm, sampling_steps: 2000", "noise levels from 0.002 to 81, too few for 2000 steps"),
        ("schedule: vp, sigma_min: 20", "no VP schedule rises from 20 to 80"),
        ("schedule: vp, sigma_min: 0.12, S_churn: 40", "the schedule has no time at which the noise level is 113.137"),
        ("discretization: vp, sigma_max: 0.5, sigma_min: 0.4", "no VP schedule rises from 0.4 to 0.5"),
    ],
)
def test_choices_that_do_not_fit_together(sampler, message, tmp_path):
    (tmp_path / "c.yaml").write_text(f"sampler: {{{sampler}}}")
    with pytest.raises(UserError, match=re.escape(message)):
        configs.load(tmp_path / "c.yaml")


def test_the_range_of_noise_levels_is_clamped_to_what_the_network_knows():
    def ends(formulation):
        steps, _ = choices.sampling_plan(configs.from_dict({}, "x", "x", [f"preconditioning.formulation={formulation}"]))
        return steps[0].item(), steps[-2].item()

    assert ends("edm") == pytest.approx((80, 0.002))
    assert ends("ve") == pytest.approx((80, 0.02))
    with pytest.raises(UserError, match=r"sigma_min 0.02 must be below sigma_max 0.01; the denoiser knows 0.02 to 100"):
        configs.from_dict({}, "x", "x", ["preconditioning.formulation=ve", "sampler.sigma_max=0.01"])


@pytest.mark.parametrize(("override", "message"), BAD_OVERRIDES.items())
def test_bad_overrides(override, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        configs.from_dict({}, "x", "x", [override])
    assert "\n" not in str(error.value)


BAD_FILES = {
    "data: 3": "data: must be a mapping of entries, not 3",
    "- 1": "a config is a mapping of sections",
    "datta:\n  root: x": "unknown section 'datta'; did you mean 'data'",
    "data:\n  root: a\n  root: b": "line 3: not valid YAML: 'root' is given twice",
    "data:\n  root: [": "line 2: not valid YAML",
    "a: &a [1]\nb: *a": "line 2: not valid YAML: aliases are not allowed",
    "data: !!python/object/apply:os.system [ls]": "tags are not allowed",
    "training: {seed: !!int ''}": "tags are not allowed",
    "data: {[1]: 2}": "a key must be a plain word",
    "training: {seed: 99999999999}": "training.seed: 99999999999 is out of range",
    "training: {1: 2}": "training.1: unknown key",
    "[" * 5000: "not valid YAML",
    "\x00": "not valid YAML",
}


@pytest.mark.parametrize(("text", "message"), BAD_FILES.items(), ids=range(len(BAD_FILES)))
def test_bad_files(text, message, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        configs.load(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_and_unreadable_files(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        configs.load(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="directory"):
        configs.load(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(UserError, match="UTF-8"):
        configs.load(tmp_path / "binary.yaml")


@pytest.mark.parametrize("name", ["../x", "a/b", "..", "", 5])
def test_a_name_from_a_stranger_cannot_leave_the_output_folder(name):
    with pytest.raises(UserError, match="output folder"):
        configs.from_dict({}, name, "x")


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().training.seed = 1
