"""notebooks/design_space.ipynb runs from top to bottom, and is committed as it ran."""

import ast
import re
from pathlib import Path

import nbformat
from ipykernel.kernelspec import install
from nbclient import NotebookClient

from edm import exact, loss, precond, sampler, schedule

PATH = Path(__file__).parents[2] / "notebooks" / "design_space.ipynb"
WIDGET_STATE, WIDGET_VIEW = "application/vnd.jupyter.widget-state+json", "application/vnd.jupyter.widget-view+json"
SECTIONS = """Introduction, A refresher on diffusion, Sampling choices, Deterministic sampling, Stochastic sampling,
Network and preconditioning, Training and loss, Conclusion"""
NOTEBOOK = nbformat.read(PATH, as_version=4)
CODE = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]
OUTPUTS = [output for cell in CODE for output in cell.outputs]


def has_picture(output) -> bool:
    return "image/png" in output.get("data", {})


def test_it_runs_from_top_to_bottom(tmp_path, monkeypatch):
    """Every assertion in it holds, with MNIST in `data` or without."""
    install(prefix=str(tmp_path))  # a kernel of this Python; Jupyter could find that of another environment
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "share" / "jupyter"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    for scheme in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(scheme, "http://127.0.0.1:9")  # where nobody answers, so that nothing is downloaded
    copy = nbformat.read(PATH, as_version=4)
    for cell in copy.cells:
        cell.update({"outputs": [], "execution_count": None} if cell.cell_type == "code" else {})
    NotebookClient(copy, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(PATH.parent)}}).execute()
    drawn = [output for cell in copy.cells for output in cell.get("outputs", []) if has_picture(output)]
    assert len(drawn) == sum(map(has_picture, OUTPUTS)) >= 12


def test_it_is_committed_as_it_ran():
    nbformat.validate(NOTEBOOK)
    counts = [cell.execution_count for cell in CODE]
    assert counts == [*range(1, len(counts) + 1)]
    kinds = {(output.output_type, output.get("name")) for output in OUTPUTS}
    assert kinds <= {("display_data", None), ("stream", "stdout")}  # no error, no warning
    assert PATH.stat().st_size < 2_000_000
    without_pictures = "\n".join(line for line in PATH.read_text().splitlines() if len(line) < 2000)
    assert not re.search(r"/tmp|/home/|/root|/work|/Users/|[A-Z]:\\\\", without_pictures)  # no path of a machine


def test_every_figure_is_saved_and_its_claim_asserted():
    drawing = [cell for cell in CODE if re.search(r"^(show|slider)\(", cell.source, re.MULTILINE)]
    assert len(drawing) >= 12
    for cell in drawing:
        assert any(map(has_picture, cell.outputs)), cell.source
        assert any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(cell.source))), cell.source


def test_sliders_work_without_a_kernel():
    """Each slider's model, its pictures and the link between them are saved, and a still picture is beside it."""
    models = {f"IPY_MODEL_{key}": model for key, model in NOTEBOOK.metadata.widgets[WIDGET_STATE]["state"].items()}
    state = {key: model["state"] for key, model in models.items()}
    links = [model for model in state.values() if model["_model_name"] == "LinkModel"]
    linked = {model["source"][0]: model["target"] for model in links if model["source"][1] == "index"}
    views = [output.data for output in OUTPUTS if WIDGET_VIEW in output.get("data", {})]
    assert len(views) >= 6
    for view in views:
        choice, stack = state[f"IPY_MODEL_{view[WIDGET_VIEW]['model_id']}"]["children"]
        assert linked[choice] == [stack, "selected_index"]
        frames = [models[frame]["buffers"][0]["data"] for frame in state[stack]["children"]]
        assert len(frames) == len(set(frames)) == len(state[choice]["_options_labels"]) >= 5
        assert view["image/png"].strip() == frames[state[choice]["index"]].strip()


def test_it_follows_the_paper_and_reimplements_nothing():
    """Its sections are the paper's, no heading occurs twice, and it defines nothing by a name that `edm` has."""
    texts = "\n".join(cell.source for cell in NOTEBOOK.cells if cell.cell_type == "markdown")
    headings, sections = re.findall("^#+ (.*)", texts, re.MULTILINE), re.split(r",\s", SECTIONS)
    assert [heading for heading in headings if heading in sections] == sections
    assert len(set(headings)) == len(headings)
    modules = exact, loss, precond, sampler, schedule
    own = {name for module in modules for name, value in vars(module).items() if callable(value)}
    nodes = [node for cell in CODE for node in ast.walk(ast.parse(cell.source))]
    defined = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assert {"edm_steps", "sample", "Schedule"} < own and "wasserstein" in defined
    assert not defined & own
