"""What is centered already is not edited again: same bits, same arrays."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_lnfold
from jax_lnfold.axes.axis_set import AxisSet
from jax_lnfold.plan.edits.center import CenterEdit
from jax_lnfold.plan.file import LeafSpec
from tests.models.zoo import ZOO

DTYPES = ["float64", "float32", "bfloat16", "float16"]
SETS = {
    "rows": AxisSet.over((96, 768), [1]),
    "columns": AxisSet.over((96, 768), [0]),
    "few": AxisSet.over((768, 3), [1]),
    "a bias": AxisSet.over((768,), [0]),
    "both": AxisSet.over((96, 768), [0, 1]),
    "heads": AxisSet.of((5, 64), ["free", tuple(i // 16 for i in range(64))]),
    "a part": AxisSet.of((5, 64), ["free", tuple(0 if i < 40 else -1 for i in range(64))]),
}


def bits(x: Any) -> np.ndarray:
    return np.asarray(x).view(np.uint8)


def centered(x: Any, along: AxisSet) -> Any:
    """The leaf after a plan that centers it."""
    plan = jax_lnfold.FoldPlan((LeafSpec("w", along.shape),), (CenterEdit("w", along),))
    return plan.center({"w": x})["w"]


@pytest.mark.parametrize("host", [True, False], ids=["NumPy", "jax"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SETS)
def test_an_edit_changes_nothing_the_second_time(name: str, dtype: str, host: bool) -> None:
    along = SETS[name]
    for seed in range(4):
        x = np.random.default_rng(seed).normal(0.1, 1, along.shape).astype(dtype)
        once = centered(x if host else jnp.asarray(x), along)
        assert np.any(bits(once) != bits(x))
        assert centered(once, along) is once


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("mean", "is_left"), [(0.0, True), (0.3, True), (40.0, False), (1e3, False)]
)
def test_means_that_may_be_roundings_are_left(dtype: str, mean: float, is_left: bool) -> None:
    along, unit = AxisSet.over((4, 1024), [1]), float(jnp.finfo(dtype).eps) / 2
    x = np.random.default_rng(0).normal(size=(4, 1024))
    x = (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)
    x[2] += mean * unit
    assert (centered(x, along) is x) == (mean == 0)  # in float64 it is a mean
    rounded = x.astype(dtype)
    new = centered(rounded, along)
    assert (new is rounded) == is_left
    assert np.all(np.abs(np.asarray(new, float).mean(1)) < unit)


@pytest.mark.parametrize("host", [True, False], ids=["NumPy", "jax"])
@pytest.mark.parametrize(("mean", "is_left"), [(0.0, True), (1.0, True), (100.0, False)])
def test_sums_are_rounded(host: bool, mean: float, is_left: bool) -> None:
    x = np.random.default_rng(0).normal(size=(4, 1024))
    x = (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True) + mean * 2.0**-53
    given = x if host else jnp.asarray(x)
    assert (centered(given, AxisSet.over((4, 1024), [1])) is given) == is_left


def test_large_numbers_have_means() -> None:
    x = np.full((2, 64), 1e25, np.float32) * np.linspace(1, 2, 64, dtype=np.float32)
    for given in (x, jnp.asarray(x)):
        new = np.asarray(centered(given, AxisSet.over((2, 64), [1])), float)
        assert np.all(np.abs(new.mean(1)) < 1e-6 * 1e25)


@pytest.mark.parametrize("options", [{}, {"fold_affine": True}], ids=["plain", "affine"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("host", [True, False], ids=["NumPy", "jax"])
def test_folding_twice(options: dict[str, Any], dtype: str, host: bool) -> None:
    for case in ZOO[::9]:
        model = case.build()
        params = jax.tree.map(lambda x: np.asarray(x).astype(dtype), model.params)
        params = params if host else jax.tree.map(jnp.asarray, params)
        folded = jax_lnfold.fold(model.apply_fn, params, *model.inputs, **options)
        again = jax_lnfold.fold(model.apply_fn, folded.params, *model.inputs, **options)
        assert again.plan == folded.plan
        pairs = zip(jax.tree.leaves(again.params), jax.tree.leaves(folded.params), strict=True)
        assert all(one is other for one, other in pairs)


def test_tracers_are_projected() -> None:
    along = AxisSet.over((3, 8), [1])
    x = np.random.default_rng(0).normal(size=(3, 8))
    x -= x.mean(1, keepdims=True)

    def edited(x: Any) -> Any:
        return (centered(x, along) * jnp.arange(8.0)).sum()

    np.testing.assert_allclose(jax.grad(edited)(x).sum(1), 0, atol=1e-12)
