"""The guide on kernels: its code runs, and prints what it says."""

from __future__ import annotations

import doctest
import re
from pathlib import Path
from typing import Any

import jax
import pytest

from jax_lnfold.kernels import check, declaration

GUIDE = Path(__file__).parents[2] / "docs" / "guide" / "kernels.md"
TEXT = GUIDE.read_text("utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
SHOWN = re.findall(r"^```text\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("module", [check, declaration])
def test_examples_of_docstrings(module: Any) -> None:
    found = doctest.testmod(module)
    assert found.attempted
    assert not found.failed


def test_the_guide_is_true(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    for block in BLOCKS:
        exec(compile(block, str(GUIDE), "exec"), names)
    printed = capsys.readouterr().out
    table, refusal = SHOWN
    for line in table.splitlines()[:3]:
        assert line in printed
    assert "2 of 2 LayerNorms folded, 2 parameters centered" in table
    assert "2 of 2 LayerNorms folded, 2 parameters centered" in printed
    assert refusal.split("(shapes")[0] in printed
    folded, x = names["folded"], names["x"]
    difference = abs(jax.jit(folded)(x) - names["model"](names["params"], x)).max()
    assert difference < 1e-11
    declared = names["add_norm"], names["fast_norm"]
    assert all(type(d).__name__ == "Declared" for d in declared)
