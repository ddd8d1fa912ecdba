"""CONTRIBUTING.md and the Makefile say what is there."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path
from textwrap import dedent
from typing import Any

import jax.numpy as jnp
import pytest

import conftest
import jax_lnfold
from jax_lnfold.analysis.shift_example import respond

PACKAGE = Path(jax_lnfold.__file__).parent
ROOT = PACKAGE.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
BLOCKS = re.findall(r"^( *)```python\n(.*?)^\1```", TEXT, re.DOTALL | re.MULTILINE)
MADE_UP = {"plan/edits/negate.py", "placement/negation.py", "checkpoints/npz.py"}


def test_every_room_is_on_the_map() -> None:
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert {*re.findall(r"^\| `(\w+)` \| ", TEXT, re.MULTILINE)} == rooms
    single = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    assert {name for name in single if f"`{name}`" not in TEXT} == set()


def test_every_file_named_is_there() -> None:
    files = {*re.findall(r"`([\w/]+\.(?:py|md))`", TEXT)}
    known = [path for path in ROOT.rglob("*") if not {*path.parts} & {".git", ".venv"}]
    missing = {f for f in files if not any(path.as_posix().endswith(f"/{f}") for path in known)}
    assert missing == MADE_UP
    assert len(files) > 15


@pytest.mark.parametrize(("indent", "block"), BLOCKS)
def test_examples_are_python(indent: str, block: str) -> None:
    code = dedent(block)
    try:
        ast.parse(code)
    except SyntaxError:  # an argument, or a method without its class
        ast.parse(f"call(\n{code})")


@pytest.mark.parametrize(
    "said", re.findall(r"(respond\(.*\))\s+# (.*)", TEXT), ids=lambda said: said[0]
)
def test_responses(said: tuple[str, str]) -> None:
    call, answer = said
    found: Any = eval(call, {"respond": respond, "jnp": jnp})
    assert found.startswith(answer.removesuffix("..."))


def test_what_make_checks_is_checked_at_last() -> None:
    """By `.ci/run`, word by word, but for how programs are found."""
    rules = re.findall(
        r"^(?:lint|types|test|quickstart):\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M
    )
    commands = [line.split()[1:] for rule in rules for line in rule.splitlines()]
    assert len(commands) == 5
    asked = (ROOT / ".ci" / "run").read_text().splitlines()
    for command in commands:
        words = " ".join(word for word in command if word not in ("-m", "$(PYTHON)"))
        assert any(
            line.replace("python -m ", "").replace("python ", "", 1).startswith(words)
            for line in asked
        ), words


# --- what runs where -----------------------------------------------------------------------------


def test_what_is_wide_is_there_and_runs_at_last() -> None:
    """What ``python -m pytest`` leaves out: no name is stale, and `.ci/run` leaves out nothing."""
    assert [path for path in conftest.WIDE if not path.exists()] == []
    assert "python -m pytest --all tests examples\n" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize(
    ("args", "left_out"),
    [
        (["tests"], True),
        (["tests", "--all"], False),
        (["tests/frameworks"], False),
        (["tests/frameworks/test_linen.py::test_name"], False),
        (["tests/examples", "tests/whole"], True),
        ([""], True),
    ],
)
def test_what_is_named_runs(args: list[str], left_out: bool) -> None:
    config = pytest.Config.fromdictargs({"all": "--all" in args}, [])
    config.args = [str(ROOT / arg) for arg in args if arg != "--all"]
    found = conftest.pytest_ignore_collect(ROOT / "tests/frameworks/test_linen.py", config)
    assert bool(found) == left_out
    assert not conftest.pytest_ignore_collect(ROOT / "tests/rules/test_rules.py", config)


def test_workflows_call_what_is_there() -> None:
    """Those of the forge run targets of the Makefile and the scripts of `.ci`."""
    texts = [path.read_text() for path in (ROOT / ".github" / "workflows").glob("*.yml")]
    assert len(texts) == 3
    for text in texts:
        for script in re.findall(r"bash (\S+)", text):
            assert (ROOT / script).exists()
        for target in re.findall(r"make ([\w-]+)", text):
            assert f"\n{target}:" in (ROOT / "Makefile").read_text()


def test_extras_that_are_named_are_there() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "Makefile", ".ci/run")]
    texts += [*(ROOT / ".github" / "workflows").glob("*.yml"), *PACKAGE.rglob("*.py")]
    named = {
        extra
        for path in texts
        for found in re.findall(r"(?:jax_lnfold|'\.|[ \"]\.)\[([\w,-]+)\]", path.read_text())
        for extra in found.split(",")
    }
    assert named <= {*project["optional-dependencies"]}
    assert len(named) > 4


def test_one_version() -> None:
    cited = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert cited
    assert cited[1] == jax_lnfold.__version__
    assert f"## [{jax_lnfold.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
