"""The digits example, imported by its path and run with few epochs."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
import pytest

import jax_lnfold

PATH = Path(__file__).resolve().parents[2] / "examples" / "digits_vit.py"


@pytest.fixture(scope="module")
def example() -> Iterator[ModuleType]:
    for requirement in ("flax", "optax", "sklearn", "tqdm"):
        pytest.importorskip(requirement)
    spec = importlib.util.spec_from_file_location("digits_vit", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    with jax.enable_x64(False):  # as the example runs for its reader
        yield module
    del sys.modules[spec.name]


def test_trains_and_folds(example: ModuleType) -> None:
    model = example.ViT(depth=2, width=32)
    train_data, test_data = example.load_data(seed=0)
    params = example.train(model, train_data, epochs=10)

    folded = jax_lnfold.fold(model.apply, params, test_data.images)
    assert len(folded.report.norms) == folded.report.n_folded == 2 * model.depth + 1
    assert folded.report.n_inserted == 0

    result = example.compare(model, params, folded, test_data)
    assert result.accuracy > 0.7
    assert result.folded_accuracy == result.accuracy
    assert result.n_equal == len(test_data.labels)

    check = jax_lnfold.verify(model.apply, params, folded, test_data.images)
    assert check.folded_error < max(2 * check.original_error, 1e-5)


def test_split_is_disjoint_and_stratified(example: ModuleType) -> None:
    train_data, test_data = example.load_data(seed=3)
    assert len(train_data.labels) + len(test_data.labels) == 1797
    images = np.concatenate([train_data.images, test_data.images])
    assert len(np.unique(images, axis=0)) == 1797
    assert images.min() == -1
    assert images.max() == 1
    shares = [np.bincount(d.labels) / len(d.labels) for d in (train_data, test_data)]
    np.testing.assert_allclose(*shares, atol=0.005)


@pytest.fixture
def untrained(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    def train(model: Any, data: Any, epochs: int, seed: int) -> Any:
        return model.init(jax.random.key(seed), data.images[:1])

    monkeypatch.setattr(example, "train", train)
    monkeypatch.setattr(example, "ViT", partial(example.ViT, depth=1, width=16))
    return example


def test_exits_when_the_accuracy_is_low(
    untrained: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="accuracy"):
        untrained.main([])
    printed = capsys.readouterr().out
    assert "3 of 3 LayerNorms folded" in printed
    assert "360 of 360" in printed


def test_exits_when_a_prediction_changes(
    untrained: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_differs = untrained.Comparison(accuracy=0.99, folded_accuracy=0.99, n_equal=359)
    monkeypatch.setattr(untrained, "compare", lambda *_: one_differs)
    with pytest.raises(SystemExit, match="changed 1 of 360 predictions"):
        untrained.main([])
