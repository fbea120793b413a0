"""notebooks/design_space.ipynb: it runs from top to bottom, and what is committed is what it draws."""

import ast
import importlib
import re

import nbformat
import pytest
from conftest import ROOT
from ipykernel.kernelspec import install
from nbclient import NotebookClient

PATH = ROOT / "notebooks" / "design_space.ipynb"
WIDGET_STATE, WIDGET_VIEW = "application/vnd.jupyter.widget-state+json", "application/vnd.jupyter.widget-view+json"
SECTIONS = """
# The design space of diffusion models, live
## Introduction
## A refresher on diffusion
## Sampling choices
### Where errors come from
### The design choices
### Deterministic sampling
### Stochastic sampling
## The neural denoiser, alias score function
## Network and preconditioning
## Training and loss
## Conclusion
"""


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(PATH, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook):
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def pictures(notebook):
    return [output for output in outputs(notebook) if "image/png" in output.get("data", {})]


def headings(notebook):
    texts = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    return [line for line in texts.splitlines() if re.match("#+ ", line)]


def test_it_runs_from_top_to_bottom(notebook, tmp_path, monkeypatch):
    """Every assertion in it holds, in a kernel of this very Python, with MNIST or without."""
    install(prefix=str(tmp_path))  # else Jupyter could find another environment's kernel by the same name
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "share" / "jupyter"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    copy = nbformat.from_dict(notebook)
    for cell in code_cells(copy):
        cell.outputs, cell.execution_count = [], None
    NotebookClient(copy, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(PATH.parent)}}).execute()
    assert [cell.execution_count for cell in code_cells(copy)] == [cell.execution_count for cell in code_cells(notebook)]
    assert len(pictures(copy)) == len(pictures(notebook)) >= 12


def test_it_is_committed_as_it_ran(notebook):
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == [*range(1, len(cells) + 1)]
    assert {output.output_type for output in outputs(notebook)} <= {"display_data", "stream"}  # no error, no warning
    assert all(output.name == "stdout" for output in outputs(notebook) if output.output_type == "stream")
    drawing = [cell for cell in cells if re.search(r"^(show|slider)\(", cell.source, re.MULTILINE)]
    assert len(drawing) >= 12
    assert all(any("image/png" in output.get("data", {}) for output in cell.outputs) for cell in drawing)


def test_every_figure_has_its_claim_asserted(notebook):
    for cell in code_cells(notebook):
        if re.search(r"^(show|slider)\(", cell.source, re.MULTILINE):
            assert any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(cell.source))), cell.source


def test_it_is_small_and_names_no_machine():
    text = PATH.read_text()
    assert PATH.stat().st_size < 2_000_000
    assert not re.search(r"/tmp|/home/|/root|/work|/Users/|[A-Z]:\\\\\\\\", text)


def test_sliders_work_without_a_kernel(notebook):
    """Each slider's model, its pictures and the link between them are saved, and a still picture is beside it."""
    state = notebook.metadata.widgets[WIDGET_STATE]["state"]
    views = [output.data for output in outputs(notebook) if WIDGET_VIEW in output.get("data", {})]
    assert len(views) >= 6

    def model(reference):
        return state[reference.removeprefix("IPY_MODEL_")]

    linked = {
        link["state"]["source"][0]: link["state"]["target"]
        for link in state.values()
        if link["model_name"] == "LinkModel" and link["state"]["source"][1] == "index"
    }
    for view in views:
        choice, stack = state[view[WIDGET_VIEW]["model_id"]]["state"]["children"]
        assert linked[choice] == [stack, "selected_index"]
        frames = [model(frame) for frame in model(stack)["state"]["children"]]
        assert len(frames) == len(model(choice)["state"]["_options_labels"]) >= 5
        values = [buffer["data"] for frame in frames for buffer in frame["buffers"] if buffer["path"] == ["value"]]
        assert len(set(values)) == len(frames)  # no two alike
        assert view["image/png"].strip() == values[model(choice)["state"]["index"]].strip()


def test_it_follows_the_paper_and_its_headings_can_be_pointed_to(notebook):
    found = headings(notebook)
    assert [heading for heading in found if heading in SECTIONS.splitlines()] == SECTIONS.split("\n")[1:-1]
    assert len(set(found)) == len(found)


def test_it_reimplements_nothing(notebook):
    """It defines no function or class by a name that the package's mathematics has."""
    modules = [
        importlib.import_module(f"edm.{name}") for name in ("schedule", "sampler", "precond", "loss", "exact", "learner")
    ]
    own = {name for module in modules for name, value in vars(module).items() if callable(value)}
    trees = [ast.parse(cell.source) for cell in code_cells(notebook)]
    defined = {node.name for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assert {"edm_steps", "sample", "Schedule"} < own and "wasserstein" in defined
    assert not defined & own
