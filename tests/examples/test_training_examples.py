"""The training examples learn, in both forms, and are short."""

from __future__ import annotations

import runpy
from pathlib import Path

import jax
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("name", ["train_linen.py", "train_nnx.py"])
def test_learns_in_both_forms(name: str) -> None:
    source = EXAMPLES / name
    assert len(source.read_text().splitlines()) <= 60
    main = runpy.run_path(str(source))["main"]
    with jax.enable_x64(False):
        accuracies = [main(reparameterised, steps=150) for reparameterised in (False, True)]
    assert min(accuracies) > 0.8
    assert abs(accuracies[0] - accuracies[1]) < 0.05
