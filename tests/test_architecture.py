"""The floors of the package: who may import whom, and nothing private of jax."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import jax_lnfold

PACKAGE = Path(jax_lnfold.__file__).parent

# Modules may import from floors below their own, and rules from each other.
FLOORS = [
    {
        "_compat",
        "collector",
        "difference",
        "errors",
        "axes",
        "header",
        "mincut",
        "primitives",
        "printable",
        "repeats",
        "response",
        "stopping",
    },
    {"center", "cost", "exchange", "frames", "inline", "lanes", "options", "table", "trees"},
    {"edits", "graph", "kept", "stores", "targets", "widening"},
    {"dropout", "fitting", "orbax_store", "planfile", "safetensors_store"},
    {"arithmetic", "flatten", "formats", "plan"},
    {"rules"},
    {"checkpoints", "shift_example", "tracking", "training"},
    {"facts"},
    {"norms", "scales"},
    {"readers", "scaled"},
    {"affine"},
    {"zeromean"},
    {"placement"},
    {"planning", "program", "rewrite", "streams"},
    {"advice", "defer"},
    {"layout"},
    {"picture"},
    {"report"},
    {"describe"},
    {"api"},
    {"cli", "verify"},
    {"__init__", "__main__"},
]


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def floor(name: str) -> int:
    return next(i for i, names in enumerate(FLOORS) if name in names)


def own_imports(path: Path) -> set[str]:
    """First names of the package's modules that a module imports."""
    inside = path.parent != PACKAGE
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            if inside and node.level == 1:
                continue  # among the rules
            found |= {node.module.split(".")[0]} if node.module else {a.name for a in node.names}
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    name = "rules" if path.parent != PACKAGE else path.stem
    for imported in own_imports(path):
        assert floor(imported) < floor(name), f"{name} imports {imported}"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_only_public_jax(path: Path) -> None:
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            imported.add(node.module)
    assert not any("_src" in name for name in imported)
    internal = [n for n in imported if n.startswith(("jax.extend", "jax.interpreters", "jax.core"))]
    assert not internal or path.name == "_compat.py"
