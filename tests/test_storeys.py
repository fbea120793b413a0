"""The house has two storeys: `edm` is the paper and needs torch and einops alone; `lab` runs it, and imports `edm`."""

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def imports(path: Path) -> set[str]:
    """Return all modules that a file imports, anywhere in it: `edm.unet` for `import edm.unet` and `from edm import unet`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import it by its full name"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def graph(storey: str) -> dict[str, set[str]]:
    """Return what each module of a storey imports."""
    return {f"{storey}.{path.stem}": imports(path) for path in (ROOT / storey).glob("*.py")}


def test_edm_needs_nothing_but_torch_einops_and_the_standard_library():
    used = {name.partition(".")[0] for modules in graph("edm").values() for name in modules}
    assert used - sys.stdlib_module_names == {"edm", "torch", "einops"}


@pytest.mark.parametrize("storey", ["edm", "lab"])
def test_imports_have_no_cycle(storey):
    modules = graph(storey)
    order = list(TopologicalSorter({name: modules[name] & modules.keys() for name in modules}).static_order())
    assert len(order) == len(modules) > 5  # a cycle raises a CycleError
