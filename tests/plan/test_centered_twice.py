"""What is centered already is not edited again: same bits, same arrays."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_lnfold
from jax_lnfold.axes.axis_set import AxisSet
from jax_lnfold.plan.leaf import Recipe, edit_leaf
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


@pytest.mark.parametrize("host", [True, False], ids=["NumPy", "jax"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SETS)
def test_an_edit_changes_nothing_the_second_time(name: str, dtype: str, host: bool) -> None:
    along, recipe = SETS[name], Recipe(sets=(SETS[name],))
    for seed in range(4):
        x = np.random.default_rng(seed).normal(0.1, 1, along.shape).astype(dtype)
        given = x if host else jnp.asarray(x)
        once = edit_leaf(given, (), recipe, donate=False)
        twice = edit_leaf(once.leaf, (), recipe, donate=False)
        assert not once.same
        assert np.any(bits(once.leaf) != bits(x))
        assert twice.same
        np.testing.assert_array_equal(bits(twice.leaf), bits(once.leaf))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_means_that_may_be_roundings_are_left(dtype: str) -> None:
    along, unit = AxisSet.over((4, 1024), [1]), float(jnp.finfo(dtype).eps) / 2
    x = np.random.default_rng(0).normal(size=(4, 1024))
    x = (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)
    means = np.array([0.0, 0.3, 3.0, 1e3])[:, None] * unit
    assert not edit_leaf(x + means, (), Recipe(sets=(along,)), donate=False).same  # in float64
    rounded = (x + means).astype(dtype)
    new = np.asarray(edit_leaf(rounded, (), Recipe(sets=(along,)), donate=False).leaf)
    moved = np.any(new != rounded, axis=1)
    assert moved.tolist() == [False, False, True, True]
    assert np.all(np.abs(np.asarray(new, float).mean(1)) < unit)


@pytest.mark.parametrize("host", [True, False], ids=["NumPy", "jax"])
def test_sums_are_rounded(host: bool) -> None:
    along, unit = AxisSet.over((4, 1024), [1]), 2.0**-53
    x = np.random.default_rng(0).normal(size=(4, 1024))
    x = (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)
    x += np.array([0.0, 1.0, 100.0, 1e6])[:, None] * unit
    new = edit_leaf(x if host else jnp.asarray(x), (), Recipe(sets=(along,)), donate=False).leaf
    assert np.any(np.asarray(new) != x, axis=1).tolist() == [False, False, True, True]


def test_large_numbers_have_means() -> None:
    x = np.full((2, 64), 1e25, np.float32) * np.linspace(1, 2, 64, dtype=np.float32)
    for given in (x, jnp.asarray(x)):
        new = np.asarray(
            edit_leaf(given, (), Recipe(sets=(AxisSet.over((2, 64), [1]),)), False).leaf
        )
        assert np.all(np.abs(np.asarray(new, float).mean(1)) < 1e-6 * 1e25)


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
        return (edit_leaf(x, (), Recipe(sets=(along,)), donate=False).leaf * jnp.arange(8.0)).sum()

    np.testing.assert_allclose(jax.grad(edited)(x).sum(1), 0, atol=1e-12)
