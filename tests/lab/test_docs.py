"""What README.md and docs/*.md name exists: functions, entries of configs, tests, files, links, and options of commands."""

import importlib
import re
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from lab.config import SECTIONS

ROOT = Path(__file__).parents[2]
MODULES = {}  # each name's modules: `ema` is one of edm and one of lab
for path in [*ROOT.glob("edm/*.py"), *ROOT.glob("lab/*.py")]:
    MODULES.setdefault(path.stem, []).append(f"{path.parent.name}.{path.stem}")
SCRIPTS = [
    *("train_mnist.py", "sample.py", "lab/evaluate.py", "lab/gallery.py", "lab/why.py", "lab/export_onnx.py", "lab/ema.py"),
    *("benchmarks/throughput.py", "benchmarks/gpu.py"),
]
FOLDERS = "assets|benchmarks|configs|docs|edm|lab|notebooks|playground|tests"
FILES = [*ROOT.glob("*"), *(path for folder in FOLDERS.split("|") for path in ROOT.glob(f"{folder}/**/*"))]
SUFFIXES = ("gif", "js", "json", "jsonl", "md", "onnx", "png", "pt", "py", "safetensors", "yaml")


@pytest.fixture(params=[ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))], ids=lambda path: path.name)
def document(request):
    return request.param


def is_known(module: str, name: str) -> bool:
    """Return whether a module of edm or lab has the name, or a section of configs the entry."""
    for path in MODULES.get(module, ()):
        found = importlib.import_module(path)
        for part in name.split("."):
            found = getattr(found, part, None)
        if found is not None:
            return True
    return name in SECTIONS.get(module, ())


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) < 15_000


def test_functions_and_entries_of_configs_exist(document):
    """They are written `module.function`, `section.key` or section.key=value."""
    named = {*re.findall(r"(?<![\w./-])([a-z_]+)\.(\w+(?:\.\w+)*)[`=]", document.read_text())}
    assert not [pair for pair in named if {pair[0]} & {*MODULES, *SECTIONS} and pair[1] not in SUFFIXES and not is_known(*pair)]


def test_links_files_and_tests_exist(document):
    text = document.read_text()
    tests = {name for path in FILES if path.suffix == ".py" for name in re.findall(r"def (test_\w+)", path.read_text())}
    assert not {name for name in re.findall(r"\btest_\w+\b(?!\.py)", text)} - tests
    assert not {name for name in re.findall(r"\b\w+\.(?:ipynb|js|py|yaml)\b", text)} - {path.name for path in FILES}
    assert not [name for name in re.findall(rf"(?<![\w./-])(?:{FOLDERS})/[\w./]*\w", text) if not (ROOT / name).exists()]
    links = re.findall(r"\]\(([^)#\s]+)", text)
    assert not [link for link in links if "://" not in link and not (document.parent / link).exists()]


def test_options_of_commands_exist(document, script):
    """In the indented lines; prose may speak of the options of other programs."""
    text = re.sub(r"-m lab\.(\w+)", r"lab/\1.py", document.read_text().replace("\\\n", " "))
    for line in re.findall(r"^    .*", text, re.MULTILINE):
        for name in [name for name in SCRIPTS if name in line]:
            known = script(name, "--help")[1] + get_args_parser().format_help() * ("torchrun" in line)
            assert not [option for option in re.findall(r"--\w+", line) if not re.search(rf"{option}\b", known)], line
