"""The tutorial notebook runs from top to bottom, and is committed with the outputs of its cells.

``python -m tests.examples.test_tutorial`` runs it and writes the outputs into it.
"""

from __future__ import annotations

import os
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest

import jax_lnfold

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

PATH = Path(__file__).resolve().parents[2] / "examples" / "tutorial.ipynb"
NUMBER = re.compile(r"-?\d[\d.]*(e[-+]?\d+)?( [kMGT])?")


def run(path: Path) -> Any:
    """The notebook with the outputs of a fresh kernel, less what differs between machines."""
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook,
        timeout=600,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": path.parent}},
    )
    package = str(Path(jax_lnfold.__file__).parents[1])
    paths = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    client.execute(env={**os.environ, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""})
    notebook.metadata.language_info = {"name": "python"}
    for cell in code_cells(notebook):
        for output in cell.outputs:
            data = output.get("data", {})
            if len(data) > 1:
                data.pop("text/plain", None)  # what a notebook does not show
    return notebook


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(notebook: Any) -> dict[str, str]:
    """The text of the outputs by cell."""
    return {
        cell.id: "".join(
            text
            for output in cell.outputs
            for text in (output.get("text", ""), *output.get("data", {}).values())
        )
        for cell in code_cells(notebook)
    }


def words(text: str) -> str:
    """What versions of the packages agree on: no numbers, spaces and spellings of quotes."""
    return " ".join(NUMBER.sub("#", unescape(text)).split())


@pytest.fixture(scope="module")
def committed() -> Any:
    return nbformat.read(PATH, as_version=4)


def test_runs(committed: Any, tmp_path: Path) -> None:
    for requirement in ("flax", "flatbuffers", "ipykernel", "optax", "sklearn"):
        pytest.importorskip(requirement)
    copy = tmp_path / PATH.name
    copy.write_bytes(PATH.read_bytes())
    fresh = run(copy)  # raises if a cell does

    assert len(code_cells(fresh)) == len(code_cells(committed)) == 25
    check_outputs(fresh)
    texts = shown(fresh)
    assert "5 of 5 LayerNorms folded" in texts["fold-call-code"]
    assert "equal predictions: 360 of 360" in texts["compare-code"]
    for cell in ("report-code", "pre-ln-code", "features-fix-code"):
        assert "5 of 5 LayerNorms folded" in texts[cell]
        assert 'class="left"' not in texts[cell]
    assert "1 of 5 LayerNorms folded" in texts["analyze-code"]
    assert "pre-LN" in texts["analyze-code"]
    assert "0 of 5 LayerNorms folded" in texts["features"]
    assert "normalised values instead of the stream" in texts["features"]
    for cell in ("picture-code", "post-ln-picture-code"):
        assert texts[cell].startswith("<svg")

    hint = "outputs are out of date: run `python -m tests.examples.test_tutorial` and look at them"
    for cell, text in shown(committed).items():
        assert words(texts[cell]) == words(text), hint


def test_committed_outputs(committed: Any) -> None:
    check_outputs(committed)
    assert PATH.stat().st_size < 100_000
    text = PATH.read_text(encoding="utf-8")
    assert not re.search(r"/(home|root|tmp|Users|work)/|site-packages", text)
    assert set(committed.metadata) == {"kernelspec", "language_info"}


def check_outputs(notebook: Any) -> None:
    """Every cell ran once, in order, without errors and warnings."""
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        assert not cell.metadata
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr", output.text


if __name__ == "__main__":
    nbformat.write(run(PATH), PATH)
