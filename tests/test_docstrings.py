"""Public names tell arguments, results and errors, and their examples do what they say."""

from __future__ import annotations

import doctest
import inspect
import runpy
from pathlib import Path
from typing import Any

import pytest

import jax_lnfold

PUBLIC = {name: getattr(jax_lnfold, name) for name in jax_lnfold.__all__}


def parts(text: str) -> set[str]:
    """The sections of a docstring."""
    return {line.strip(" :") for line in text.splitlines() if line.endswith(":")}


@pytest.mark.parametrize("name", PUBLIC)
def test_examples_of_public_names(name: str) -> None:
    finder = doctest.DocTestFinder(recurse=False)
    found = finder.find(PUBLIC[name], name, globs={})
    assert sum(len(test.examples) for test in found) > 0
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS)
    for test in found:
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0


@pytest.mark.parametrize("name", [name for name, x in PUBLIC.items() if inspect.isfunction(x)])
def test_functions_tell_arguments_results_and_errors(name: str) -> None:
    function: Any = PUBLIC[name]
    text = inspect.getdoc(function) or ""
    assert parts(text) >= {"Args", "Returns", "Raises", "Example"}
    arguments = inspect.signature(function).parameters
    assert [
        argument for argument in arguments if f"    {argument}:" not in text.replace("*", "")
    ] == []


def test_figures_of_the_theory_are_as_they_are_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = Path(__file__).parents[1] / "docs" / "figures" / "make.py"
    make = runpy.run_path(str(script))
    monkeypatch.setitem(make["figure"].__globals__, "HERE", tmp_path)
    make["main"]()
    assert len([*tmp_path.iterdir()]) == 4
    for drawn in tmp_path.iterdir():
        assert drawn.read_text("utf-8") == (script.parent / drawn.name).read_text("utf-8")
