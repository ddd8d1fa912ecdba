"""The rooms of the package: who may import whom, what is private, and nothing private of jax."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import jax_lnfold

PACKAGE = Path(jax_lnfold.__file__).parent

# Rooms are packages and single modules. They may import from floors below their own.
FLOORS = [
    {"errors", "_compat", "axes", "printable", "version"},
    {"centering", "options", "output_differences", "trees"},
    {"untied"},
    {"plan", "program"},
    {"batches", "checkpoints", "rules", "training"},
    {"analysis", "calibration"},
    {"placement"},
    {"measurement", "rewrite"},
    {"kernels", "report"},
    {"dropping", "fitting", "observing", "program_cache"},
    {"folded"},
    {"approximation", "folded_functions"},
    {"arguments", "models"},
    {"api"},
    {"measuring", "widening"},
    {"cli", "regression", "verification"},
    {"__init__", "__main__"},
]


class Import(NamedTuple):
    """``from module import name``, with the parts of the module's name inside the package."""

    module: tuple[str, ...]
    name: str


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def parts_of(path: Path) -> tuple[str, ...]:
    return path.relative_to(PACKAGE).with_suffix("").parts


def own_imports(path: Path) -> Iterator[Import]:
    """What a module imports from this package."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = parts_of(path)[: -node.level]
            module = (*folder, *(node.module.split(".") if node.module else ()))
            for alias in node.names:
                yield Import(module or (alias.name,), alias.name)


def floor(room: str) -> int:
    return next(i for i, rooms in enumerate(FLOORS) if room in rooms)


def test_every_room_has_a_floor() -> None:
    assert {parts_of(path)[0] for path in modules()} == set().union(*FLOORS)


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    room, *_ = parts_of(path)
    for imported in own_imports(path):
        below = imported.module[0]
        assert below == room or floor(below) < floor(room), f"{room} imports {below}"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_private_names_of_other_modules(path: Path) -> None:
    private = [i for i in own_imports(path) if i.name.startswith("_") and i.name != "_compat"]
    assert not private


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


# --- names and sizes -----------------------------------------------------------------------------

LOOPS = (ast.For, ast.While, ast.comprehension)
BRANCHES = (ast.If, ast.IfExp, ast.BoolOp, ast.ExceptHandler, *LOOPS)
SPELLED = "broadcast_in_dim div mul reshape transpose".split()


def strings(tree: ast.AST) -> Iterator[str]:
    """String constants, but for docstrings and parts of messages."""
    texts = {
        id(part)
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
        for part in node.values
    }
    texts |= {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in texts:
            yield node.value


@pytest.mark.parametrize("name", SPELLED)
def test_names_of_primitives_stand_in_few_modules(name: str) -> None:
    found = [
        p
        for p in modules()
        if any(name in text.split() for text in strings(ast.parse(p.read_text())))
    ]
    assert 0 < len(found) <= 5


def length(function: ast.FunctionDef) -> int:
    """Lines of code, without the docstring."""
    first, *rest = function.body
    text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    start = rest[0] if text and rest else first
    assert function.end_lineno is not None
    return function.end_lineno - start.lineno + 1


def branches(function: ast.FunctionDef) -> int:
    """Conditions and loops, those of expressions included."""
    return sum(isinstance(node, BRANCHES) for node in ast.walk(function))


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_functions_are_short(path: Path) -> None:
    functions = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)]
    long = {
        f.name: (length(f), branches(f)) for f in functions if length(f) > 40 or branches(f) > 15
    }
    assert not long
