"""Edits of single leaves: overflows that are noted without a look, and products as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jax_lnfold.plan.leaf
from jax_lnfold.axes.axis_set import AxisSet
from jax_lnfold.axes.labels import ALL, FREE
from jax_lnfold.plan.editing import edit_leaf
from jax_lnfold.plan.leaf import Factor, Recipe, center_array

ROWS, WIDTH = 5, 96
CENTERED = Recipe(sets=(AxisSet((ROWS, WIDTH), (FREE, ALL)),))
SCALED = Recipe(factors=(Factor((0,)),))
TAKES_SHIFT = Recipe(axes=(0,), summed=(0,))
DTYPES = [np.float16, np.float32, np.float64, ml_dtypes.bfloat16]
NAMES = ["float16", "float32", "float64", "bfloat16"]
ORDERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "rows": np.ascontiguousarray,
    "columns": np.asfortranarray,
    "strided": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
}


def spoilt(dtype: Any, value: float) -> np.ndarray:
    """Numbers of about one, and one that is something else."""
    x = np.random.default_rng(0).normal(0, 1, (ROWS, WIDTH)).astype(dtype)
    x[3, 4] = value
    return x


def uneven(dtype: Any) -> np.ndarray:
    """The smallest number of one row is further from the mean than numbers can be."""
    x = spoilt(dtype, 1.0)
    x[2] = ml_dtypes.finfo(dtype).max
    x[2, -1] = -x[2, 0]
    return x


def overflow(x: np.ndarray, recipe: Recipe = CENTERED, *sources: np.ndarray) -> bool:
    return bool(edit_leaf(x, sources, recipe, donate=False)[1])


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("block", [7, 1 << 17])
@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
def test_overflows_of_numpy_leaves(
    dtype: Any, block: int, order: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are told from infinities that were given; the caller's settings do not matter."""
    monkeypatch.setattr(jax_lnfold.plan.leaf, "_BLOCK", block)
    largest = float(ml_dtypes.finfo(dtype).max)
    with np.errstate(all="raise"):
        assert overflow(order(uneven(dtype)))
        assert not overflow(order(spoilt(dtype, largest / 4)))
        for given in (np.inf, -np.inf, np.nan):
            assert not overflow(order(spoilt(dtype, given)))
    both = uneven(dtype)
    both[0, 0] = np.inf
    assert not overflow(order(both)), "not finite before"
    assert not np.isfinite(edit_leaf(both, (), CENTERED, donate=False)[0][2, -1])


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
def test_overflows_of_products(dtype: Any) -> None:
    large = spoilt(dtype, float(ml_dtypes.finfo(dtype).max) * 0.75)
    factor = np.ones(ROWS, dtype)
    assert not overflow(large, SCALED, factor)
    factor[3] = 2
    assert overflow(large, SCALED, factor)
    shift, bias = 2 * factor, np.zeros(WIDTH, dtype)
    assert overflow(bias, TAKES_SHIFT, shift, large)
    assert not overflow(bias, TAKES_SHIFT, shift / 16, large)
    given = spoilt(dtype, np.inf)
    assert not overflow(given, SCALED, factor)
    assert not overflow(bias, TAKES_SHIFT, shift, given)


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != np.float64], ids=lambda d: d.__name__)
def test_a_product_is_rounded_once(dtype: Any, array: Callable[..., Any]) -> None:
    """Subnormal numbers included, as in double precision."""
    tiny, rng = float(ml_dtypes.finfo(dtype).smallest_normal), np.random.default_rng(0)
    factor = rng.normal(0, 1, ROWS).astype(dtype)
    for size in (1.0, 8 * tiny) if array is np.asarray else (1.0,):  # XLA flushes them
        x = (size * rng.normal(0, 1, (ROWS, WIDTH))).astype(dtype)
        want = (x.astype(np.float64) * factor[:, None].astype(np.float64)).astype(dtype)
        found = edit_leaf(array(x), (array(factor),), SCALED, donate=False)[0]
        np.testing.assert_array_equal(np.asarray(found), want)


def test_a_product_with_a_wider_factor_is_rounded_once() -> None:
    rng = np.random.default_rng(0)
    x, factor = rng.normal(size=(ROWS, WIDTH)).astype(np.float32), rng.normal(size=ROWS)
    found = edit_leaf(x, (factor,), SCALED, donate=False)[0]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, (x * factor[:, None]).astype(np.float32))
    assert not np.array_equal(found, x * factor[:, None].astype(np.float32))


@pytest.mark.parametrize("block", [1, 50, 1 << 17])
@pytest.mark.parametrize(
    ("axes", "summed"), [((1,), (0, 1)), ((0, 1), (0, 1)), ((1,), (1,)), ((), (0,)), ((2,), (2, 0))]
)
def test_sums_block_by_block(
    axes: tuple[int, ...], summed: tuple[int, ...], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax_lnfold.plan.leaf, "_BLOCK", block)
    rng, shape = np.random.default_rng(0), (3, 4, 5)
    kernel = rng.normal(size=shape).astype(np.float32)
    shift = rng.normal(size=[shape[d] for d in axes]).astype(np.float32)
    kept = [n for d, n in enumerate(shape) if d not in summed]
    bias, recipe = rng.normal(size=kept).astype(np.float32), Recipe(axes=axes, summed=summed)
    aligned = shift.reshape([n if d in axes else 1 for d, n in enumerate(shape)]).astype(float)
    found = edit_leaf(bias, (shift, kernel), recipe, donate=False)[0]
    np.testing.assert_allclose(found, bias + (aligned * kernel).sum(axis=summed), rtol=2e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)
def test_leaves_without_axes_or_numbers(dtype: Any) -> None:
    """They stay arrays of their shape; the caller's are not changed."""
    scalar, empty = np.array(3, dtype), np.zeros((0, 4), dtype)
    for x, recipe, sources in (
        (scalar, Recipe(sets=(AxisSet((), ()),)), ()),
        (scalar, Recipe(factors=(Factor(()),)), (np.array(0, dtype),)),
        (empty, Recipe(sets=(AxisSet((0, 4), (FREE, ALL)),)), ()),
        (empty, SCALED, (np.zeros(0, dtype),)),
    ):
        new, too_large = edit_leaf(x, sources, recipe, donate=False)
        assert isinstance(new, np.ndarray)
        assert (new.shape, new.dtype) == (x.shape, x.dtype)
        assert not np.any(new)
        assert not too_large
    assert scalar == 3


def test_caller_keeps_what_is_centered_in_its_own_dtype() -> None:
    x = np.random.default_rng(0).normal(3, 1, (ROWS, WIDTH))
    given = x.copy()
    new = center_array(x, CENTERED.sets[0])
    np.testing.assert_array_equal(x, given)
    np.testing.assert_allclose(new, x - x.mean(1, keepdims=True), atol=1e-15)


def test_a_numpy_leaf_beside_traced_ones() -> None:
    x = np.random.default_rng(0).normal(size=(ROWS, WIDTH)).astype(np.float32)

    def total(factor: jax.Array) -> jax.Array:
        return (edit_leaf(x, (factor,), SCALED, donate=False)[0] * x).sum()

    gradient = jax.jit(jax.grad(total))(jnp.ones(ROWS))
    np.testing.assert_allclose(gradient, (x * x).sum(axis=1), rtol=1e-5)
