"""The README's map of the paper points to what there is, and names all that the code refers to."""

import importlib
import json
import re

import pytest
from conftest import ROOT

SECTION = (ROOT / "README.md").read_text().partition("## The paper, number by number")[2].partition("\n## ")[0]
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in SECTION.splitlines() if line.startswith("| ")][1:]
CELLS = json.loads((ROOT / "notebooks" / "design_space.ipynb").read_text())["cells"]
OTHER_PAPERS = ("ddpm.py", "ddpm_training.py", "test_ddpm.py", "test_lessons.py")
NUMBER = re.compile(
    r"(?<!\), )"  # "Song et al. (2021), Eq. 12" is another paper's
    r"\b(Eq\.|Algorithms?|Table|Figures?|Appendix) (\d+[a-c]?|[B-F](?:\.\d)?)\b(?:(?:, (\d+))? and (\d+))?"
)


def numbers(text: str) -> set[str]:
    """ "Algorithms 1, 2 and 3 ... Eq. 5" -> {"Algorithm 1", "Algorithm 2", "Algorithm 3", "Eq. 5"}."""
    return {
        f"{kind if kind == 'Eq.' else kind.removesuffix('s')} {number}"
        for kind, *found in NUMBER.findall(text)
        for number in found
        if number
    }


def test_numbers_are_found():
    text = "Algorithms 1, 2 and 3; (Appendix F.2, Table 6). Figure 5c, 18 steps; Eq. 8; Figures 2 and 4. F (2020), Eq. 9."
    expected = "Algorithm 1,Algorithm 2,Algorithm 3,Appendix F.2,Table 6,Figure 5c,Eq. 8,Figure 2,Figure 4"
    assert numbers(text) == set(expected.split(","))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_every_row_points_to_what_there_is(row):
    number, code, tests, notebook = row
    places = re.findall(r"`(\w+)\.(\w+)`", code)
    assert places
    for module, name in places:
        assert hasattr(importlib.import_module(f"edm.{module}"), name), f"{number}: {module}.{name}"
    named = re.findall(r"`(test_\w+\.py)::(\w+)`", tests)
    assert named
    for file, name in named:
        assert f"\ndef {name}(" in (ROOT / "tests" / file).read_text(), f"{number}: {file}::{name}"
    headings = {line.lstrip("# ") for cell in CELLS for line in "".join(cell["source"]).splitlines() if line.startswith("#")}
    assert {heading for heading in notebook.split("; ") if heading} <= headings


def test_every_number_in_the_code_is_on_the_map():
    """So are those of the configs, the tests, the README itself and the notebook."""
    files = [*ROOT.glob("edm/*.py"), *ROOT.glob("configs/**/*.yaml"), *ROOT.glob("tests/test_*.py"), ROOT / "README.md"]
    texts = {path.name: path.read_text() for path in files if path.name not in (*OTHER_PAPERS, "test_map.py")}
    texts["the notebook"] = "\n".join("".join(cell["source"]) for cell in CELLS)
    known = {number for row in ROWS for number in numbers(row[0])}
    assert len(known) == len(ROWS)
    missing = {(name, number) for name, text in texts.items() for number in numbers(text) - known}
    assert not missing
