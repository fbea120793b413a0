"""The house has two storeys: `edm` is the paper and needs torch and einops alone; `lab` runs it, and imports `edm`."""

import ast
import sys
from graphlib import TopologicalSorter

import pytest


@pytest.fixture
def imports(root):
    """imports("edm") -> what each module of `edm` imports, anywhere in it: "edm.unet" for `from edm import unet` as well."""

    def names(node: ast.AST) -> list[str]:
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "modules are imported by their full name"
            return [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        return [alias.name for alias in node.names] if isinstance(node, ast.Import) else []

    def of(storey: str) -> dict[str, set[str]]:
        trees = {f"{storey}.{path.stem}": ast.parse(path.read_text()) for path in (root / storey).glob("*.py")}
        return {module: {name for node in ast.walk(tree) for name in names(node)} for module, tree in trees.items()}

    return of


def test_edm_needs_nothing_but_torch_einops_and_the_standard_library(imports):
    used = {name.partition(".")[0] for modules in imports("edm").values() for name in modules}
    assert used - sys.stdlib_module_names == {"edm", "torch", "einops"}


@pytest.mark.parametrize("storey", ["edm", "lab"])
def test_imports_have_no_cycle(storey, imports):
    """`static_order` raises a CycleError where there is one."""
    modules = imports(storey)
    order = TopologicalSorter({name: modules[name] & modules.keys() for name in modules}).static_order()
    assert len(list(order)) == len(modules) > 5
