"""notebooks/design_space.ipynb: it runs, it is committed as it ran, and what a learner edits does not break it."""

import ast
import builtins
import re
import sys
from pathlib import Path

import nbformat
import pytest
from ipykernel.kernelspec import install
from nbclient import NotebookClient

from edm import exact, loss, precond, sampler, schedule
from lab import live

PATH = Path(__file__).parents[2] / "notebooks" / "design_space.ipynb"
SECTIONS = [
    *("Introduction", "A refresher on diffusion", "Sampling choices", "Sources of error", "Design choices"),
    *("Deterministic sampling", "Stochastic sampling", "The neural denoiser", "Network and preconditioning"),
    *("Training and loss", "After the paper", "Conclusion"),
]
NOTEBOOK = nbformat.read(PATH, as_version=4)
CODE = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]
OUTPUTS = [output for cell in CODE for output in cell.outputs]
EDITS = {  # what a learner would try
    "peaks at +-1": ("[[-0.6], [0.4]]", "[[-1.0], [1.0]]"),
    "equal weights": ("[0.4, 0.6]", "[0.5, 0.5]"),
    "peaks of different widths": ("[[[0.01]], [[0.01]]]", "[[[0.0001]], [[0.09]]]"),
    "two blobs": ("[0.9, -0.8], [0.1, 1.0]]", "[0.9, -0.8], [0.9, -0.8]]"),
    "digits by Euler's method": ('draw_digits(N, solver="heun")', 'draw_digits(N, solver="euler")'),
    "a coarse solution": ("exact_digits = draw_digits(48)", "exact_digits = draw_digits(5)"),
    "errors of one step": ("N=(4, 24, 1, 18)", "N=(1, 24, 1, 1)"),
    "two Euler steps": ("N=(1, 40, 1, 8)", "N=(1, 40, 1, 2)"),
    "three points": ("torch.tensor([-1.0, 1.0])", "torch.tensor([-1.0, 0.0, 1.0])"),
    "a single point": ("torch.tensor([-1.0, 1.0])", "torch.tensor([0.0])"),
    "a tangent at high noise": ("log_slider(1.0, 0.2, 10)", "log_slider(20.0, 0.2, 25)"),
    "another list of rho": ("rho=(1, 15, 1, 7)", "rho=[2, 5, 9]"),
    "one latent": ("torch.randn(8, 1, 8, 8", "torch.randn(1, 1, 8, 8"),
    "the midpoint method alone": ("alpha=(0.3, 1.0, 0.05, 1.0)", "alpha=[0.5]"),
    "other budgets": ("[7, 15, 31, 63, 127]", "[5, 9, 19]"),
    "S_churn 20": ("S_churn=(0.0, 13.0, 0.5, 2.0)", "S_churn=(0.0, 20.0, 0.5, 20.0)"),
    "a bad denoiser": ("0.99 * data", "0.5 * data"),
    "fifty images": ('"data", 5000', '"data", 50'),
    "a large sigma_data": ("sigma_data=(0.1, 1.5, 0.05, 0.5)", "sigma_data=(0.1, 5.0, 0.1, 5.0)"),
    "fewer draws": ("data.sample(20_000", "data.sample(200"),
    "always predict the noise": ("figures.skip(y, sigma, c_skip)", "figures.skip(y, sigma, 1.0)"),
    "deeper networks": ("num_blocks=(1, 4, 1, 2)", "num_blocks=(1, 8, 1, 8)"),
    "three training steps": ("steps=400", "steps=3"),
    "other training noise": ("steps=400)", "steps=3, P_mean=0.5)"),
    "no guidance": ("weight=(1.0, 4.0, 0.1, 2.0)", "weight=[1.0]"),
    "guidance nowhere": ("high=log_slider(80.0, 0.01, 80)", "high=log_slider(0.01, 0.01, 80)"),
    "the widest average": ("width=(0.03, 0.25, 0.01, 0.07)", "width=[0.2886]"),
    "one snapshot": ("snapshots=(1, 24, 1, 8)", "snapshots=[1]"),
    "another weight": ("edm_weight(sigma, tiny.sigma_data)", "1 / sigma**2"),
}


def is_check(cell) -> bool:
    return "check" in cell.metadata.get("tags", [])


def has_picture(output) -> bool:
    return "image/png" in output.get("data", {})


def names(source: str, context: type[ast.expr_context]) -> set[str]:
    """The names that a cell reads (ast.Load) or defines (ast.Store)."""
    nodes = list(ast.walk(ast.parse(source)))
    found = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, context)}
    if context is ast.Store:
        found |= {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        imports = [alias for node in nodes if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names]
        found |= {alias.asname or alias.name for alias in imports}
    return found


def cells_around(index: int) -> list[int]:
    """The cells that the edited one needs, itself, and the other figures that need it; no checks."""
    defined, needed = [names(cell.source, ast.Store) for cell in CODE], {0, index}  # 0 finds the repository
    for cell in range(index + 1, len(CODE)):
        if not is_check(CODE[cell]) and names(CODE[cell].source, ast.Load) & defined[index]:
            needed.add(cell)
    for cell in reversed(range(len(CODE))):
        wanted = set().union(*(names(CODE[other].source, ast.Load) for other in needed if other > cell))
        if not is_check(CODE[cell]) and defined[cell] & wanted - set(dir(builtins)):
            needed.add(cell)
    return sorted(needed)


@pytest.mark.parametrize("edit", EDITS)
def test_experiments_do_not_fail(edit, monkeypatch):
    """Neither a cell, nor a drawing, whose error `live` would show below the controls."""
    old, new = EDITS[edit]
    (index,) = [place for place, cell in enumerate(CODE) if old in cell.source and not is_check(cell)]
    failures = []
    monkeypatch.setattr(live, "one_line", lambda text: failures.append(text) or text)
    monkeypatch.setattr(live, "show", lambda view, picture, alt: None)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(PATH.parent)
    for scheme in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(scheme, "http://127.0.0.1:9")  # where nobody answers, so that nothing is downloaded
    namespace = {}
    for place in cells_around(index):
        source = CODE[place].source.replace(old, new) if place == index else CODE[place].source
        exec(compile(source.replace("steps=400", "steps=3"), f"cell {place}", "exec"), namespace)
    assert not failures


def test_it_runs_from_top_to_bottom(tmp_path, monkeypatch):
    """Every check in it holds, with MNIST in `data` or without."""
    install(prefix=str(tmp_path))  # a kernel of this Python; Jupyter could find that of another environment
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "share" / "jupyter"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    for scheme in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(scheme, "http://127.0.0.1:9")
    copy = nbformat.read(PATH, as_version=4)
    for cell in copy.cells:
        cell.update({"outputs": [], "execution_count": None} if cell.cell_type == "code" else {})
    NotebookClient(copy, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(PATH.parent)}}).execute()
    drawn = [output for cell in copy.cells for output in cell.get("outputs", []) if has_picture(output)]
    assert len(drawn) == sum(map(has_picture, OUTPUTS)) >= 16


def test_it_is_committed_as_it_ran():
    nbformat.validate(NOTEBOOK)
    counts = [cell.execution_count for cell in CODE]
    assert counts == [*range(1, len(counts) + 1)]
    kinds = {(output.output_type, output.get("name")) for output in OUTPUTS}
    assert kinds <= {("display_data", None), ("stream", "stdout")}  # no error, no warning
    assert PATH.stat().st_size < 2_000_000
    without_pictures = "\n".join(line for line in PATH.read_text().splitlines() if len(line) < 2000)
    assert not re.search(r"/tmp|/home/|/root|/work|/Users/|[A-Z]:\\\\", without_pictures)  # no path of a machine


def test_figures_are_live_described_and_short():
    """Every picture has a text for those who cannot see it; code that draws asserts nothing, and a check says what holds."""
    for cell in CODE:
        asserts = [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.Assert)]
        assert bool(asserts) == is_check(cell), cell.source
        assert all(node.msg for node in asserts), cell.source
        assert is_check(cell) or len(cell.source.splitlines()) <= 15, cell.source
    pictures = [output for output in OUTPUTS if has_picture(output)]
    assert all(output.metadata["image/png"]["alt"] for output in pictures)
    controls = [output for output in pictures if "application/vnd.jupyter.widget-view+json" in output.data]
    assert len(controls) >= 14


def test_what_a_live_picture_reads_is_not_redefined_later():
    """It is drawn again after all cells have run, with the values that the names have then."""
    defined = [names(cell.source, ast.Store) for cell in CODE]
    for place, cell in enumerate(CODE):
        later = set().union(*defined[place + 1 :])
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.Lambda | ast.FunctionDef):
                source, arguments = ast.unparse(node), {each.arg for each in ast.walk(node) if isinstance(each, ast.arg)}
                assert not (names(source, ast.Load) - names(source, ast.Store) - arguments) & later, cell.source


def test_it_follows_the_paper_and_reimplements_nothing():
    """Its sections are the paper's, and it defines nothing by a name that `edm` has."""
    texts = "\n".join(cell.source for cell in NOTEBOOK.cells if cell.cell_type == "markdown")
    headings = re.findall("^#+ (.*)", texts, re.MULTILINE)
    places = [next(place for place, heading in enumerate(headings) if heading.startswith(name)) for name in SECTIONS]
    assert places == sorted(places)
    assert texts.count("<details>") == 2 * texts.count("**Exercises") >= 22
    modules = exact, loss, precond, sampler, schedule
    own = {name for module in modules for name, value in vars(module).items() if callable(value)}
    sources = [*(cell.source for cell in CODE), *(path.read_text() for path in PATH.parent.glob("*.py"))]
    nodes = [node for source in sources for node in ast.walk(ast.parse(source))]
    defined = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assert {"edm_steps", "sample", "Schedule"} < own and "wasserstein" in defined
    assert not defined & own
