"""Plan files: one written long ago is read, written and obeyed as then."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from jax_lnfold import FoldPlan
from jax_lnfold.axes.labels import ALL, FREE, Labels

TEXT = (Path(__file__).parent / "data" / "plan_v2.json").read_text()


def test_same_text() -> None:
    plan = FoldPlan.from_json(TEXT)
    entries = [entry for edit in plan.edits for entry in edit.along.entries]
    kinds = {"labels" if isinstance(entry, Labels) else entry for entry in entries}
    assert kinds == {ALL, FREE, "labels"}
    assert len(plan.scales) == 1
    assert plan.to_json() + "\n" == TEXT


@pytest.mark.parametrize("to_array", [np.asarray, jax.numpy.asarray], ids=["numpy", "jax"])
def test_same_numbers(to_array: type) -> None:
    rng = np.random.default_rng(0)
    bias, kernel, stem = rng.normal(size=6), rng.normal(size=(2, 3)), rng.normal(size=(4, 3))
    scale = rng.normal(size=(1, 3))
    tree = {"bias": bias, "blocks": [{"kernel": kernel}], "scale": scale, "stem": stem}
    got = FoldPlan.from_json(TEXT).center(jax.tree.map(to_array, tree))

    want = bias.copy()
    want[[0, 1]] -= (bias[0] + bias[1]) / 2
    want[[3, 5]] -= (bias[3] + bias[5]) / 2
    np.testing.assert_allclose(got["bias"], want, rtol=0, atol=1e-15)
    scaled = kernel * scale
    want = scaled - scaled.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(got["blocks"][0]["kernel"], want, rtol=0, atol=1e-15)
    np.testing.assert_array_equal(got["scale"], np.ones((1, 3)))
    want = np.concatenate([stem[:2] - stem[:2].mean(), stem[2:] - stem[2:].mean()])
    np.testing.assert_allclose(got["stem"], want, rtol=0, atol=1e-15)


def test_example_of_the_reference() -> None:
    page = Path(__file__).parents[2] / "docs" / "reference" / "plan_file.md"
    plan = FoldPlan.from_json(page.read_text("utf-8").split('text = """')[1].split('"""')[0])
    kernel, gamma = np.arange(32.0).reshape(8, 4) ** 2, np.arange(1.0, 5)
    got = plan.center({"kernel": kernel, "gamma": gamma})
    heads = (kernel * gamma).reshape(8, 2, 2)
    want = (heads - heads.mean(-1, keepdims=True)).reshape(8, 4)
    np.testing.assert_allclose(got["kernel"], want, rtol=0, atol=1e-12)


def test_other_keys_are_notes() -> None:
    noted = json.dumps({"model": "vit", **json.loads(TEXT), "made": {"by": "me"}})
    assert FoldPlan.from_json(noted) == FoldPlan.from_json(TEXT)
