"""The repair of a post-LN encoder, imported by its path and run with few steps."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest

PATH = Path(__file__).resolve().parents[2] / "examples" / "repair_post_ln.py"
TINY = ["--steps", "30", "--repair", "3", "--depth", "1", "--width", "16"]


def test_folds_and_repairs(capsys: pytest.CaptureFixture[str]) -> None:
    for requirement in ("flax", "optax", "sklearn", "tqdm"):
        pytest.importorskip(requirement)
    example = runpy.run_path(str(PATH))
    found = []

    def kept(*args: object) -> tuple[np.ndarray, object]:
        figures, report = run(*args)
        found.append(figures)
        return figures, report

    run = example["main"].__globals__["run"]
    example["main"].__globals__["run"] = kept
    example["main"](["--seeds", "1", *TINY])
    (figures,) = found
    assert figures.shape == (len(example["ROWS"]), 3)
    accuracy, error, divergence = figures.T
    assert (accuracy >= 0).all()
    assert (accuracy <= 100).all()
    assert error[0] == divergence[0] == 0
    assert 0 < error[3] < error[1] / 3, "centered and fitted before means are left out"
    assert 0 < error[4] != error[3]
    printed = capsys.readouterr().out
    assert "LayerNorms" in printed
    for row in example["ROWS"]:
        assert row in printed
