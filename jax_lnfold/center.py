"""Centering of one array: the operator C_S, and the edit of one parameter leaf (CBWC)."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._compat import is_tracer
from .axes import ALL, FREE, AxisSet


def center_array(x: Any, along: AxisSet) -> Any:
    """``x`` minus its mean over every group of `along` (theory: the operator C_S).

    Computed in float64 for NumPy arrays; for JAX arrays in the dtype of ``x`` or float32, whichever
    is wider, with a second pass that removes the rounding of the first. The result has the shape
    and dtype of ``x``, rounded once.
    """
    wide = x.astype(_wide_type(x))
    if isinstance(x, np.ndarray):
        return (wide - group_means(wide, along, np)).astype(x.dtype)
    once = wide - group_means(wide, along, jnp)
    return (once - group_means(once, along, jnp)).astype(x.dtype)


def edit_leaf(
    x: Any,
    factor: Any,
    axes: tuple[int, ...],
    sets: tuple[AxisSet, ...] | None,
    donate: bool,
) -> tuple[Any, Any]:
    """One leaf scaled by `factor` along `axes`, then centered; `sets` None sets it to one.

    Shape, dtype and sharding stay. With `donate` a JAX array gives up its memory. The second
    result is whether finite numbers became too large for the dtype (a bool, maybe on a device).
    """
    if is_tracer(x) or is_tracer(factor):
        return _edited(x, _aligned(factor, axes, x), sets), False
    if not isinstance(x, jax.Array):
        x = np.asarray(x)
        with np.errstate(over="ignore", invalid="ignore"):
            new = _edited_in_blocks(x, _aligned(factor, axes, x), sets)
        return new, not _finite(new, np) and _finite(x, np) and _finite(factor, np)
    placed = x.sharding if x.committed else None
    return _compiled_edit(axes, sets, donate, placed)(x, factor)


def overflows(x: Any, factor: Any, axes: tuple[int, ...], sets: tuple[AxisSet, ...] | None) -> bool:
    """Whether finite numbers would become too large for the dtype in `edit_leaf`."""
    return bool(edit_leaf(x, factor, axes, sets, donate=False)[1])


def _finite(x: Any, xp: Any) -> Any:
    return x is None or xp.isfinite(x).all()


def _aligned(factor: Any, axes: tuple[int, ...], x: Any) -> Any:
    """The factor with its axes where they are in `x`, in the dtype of the arithmetic."""
    if factor is None:
        return None
    xp = np if isinstance(x, np.ndarray) else jnp
    shape = [n if d in axes else 1 for d, n in enumerate(x.shape)]
    scale = xp.asarray(factor, _wide_type(x)).squeeze().transpose(*np.argsort(axes))
    return scale.reshape(shape)


def _edited(x: Any, scale: Any, sets: tuple[AxisSet, ...] | None) -> Any:
    if sets is None:
        return np.ones_like(x) if isinstance(x, np.ndarray) else jnp.ones_like(x)
    wide = x.astype(_wide_type(x))
    if scale is not None:
        wide = wide * scale
    for along in sets:
        wide = center_array(wide, along)
    return wide.astype(x.dtype)


_BLOCK = 1 << 18
"""About as many numbers of a NumPy array are held in double precision at a time."""


def _edited_in_blocks(x: np.ndarray, scale: Any, sets: tuple[AxisSet, ...] | None) -> np.ndarray:
    """`_edited` in blocks along the longest axis that no mean is taken over, if there is one."""
    free = [d for d in range(x.ndim) if all(along.entries[d] == FREE for along in sets or ())]
    if x.size <= _BLOCK or not free:
        return _edited(x, scale, sets)
    axis = max(free, key=lambda d: x.shape[d])
    new = np.empty_like(x)
    step = max(1, _BLOCK * x.shape[axis] // x.size)
    for start in range(0, x.shape[axis], step):
        part = (slice(None),) * axis + (slice(start, start + step),)
        block, factor = x[part], scale
        if scale is not None and scale.shape[axis] > 1:
            factor = scale[part]
        inside = sets and tuple(AxisSet(block.shape, along.entries) for along in sets)
        new[part] = _edited(block, factor, inside)
    return new


@lru_cache(maxsize=256)
def _compiled_edit(
    axes: tuple[int, ...], sets: tuple[AxisSet, ...] | None, donate: bool, sharding: Any
) -> Callable[[Any, Any], tuple[Any, Any]]:
    """The edit under `jit`, so that a sharded leaf stays where it is."""

    def edit(x: Any, factor: Any) -> tuple[Any, Any]:
        new = _edited(x, _aligned(factor, axes, x), sets)
        return new, ~_finite(new, jnp) & _finite(x, jnp) & _finite(factor, jnp)

    donated = (0,) if donate else ()
    return jax.jit(edit, donate_argnums=donated, out_shardings=(sharding, None))


def _wide_type(x: Any) -> Any:
    """The dtype in which means of `x` are taken."""
    if isinstance(x, np.ndarray):
        return np.promote_types(x.dtype, np.float64)
    return jnp.promote_types(x.dtype, jnp.float32)


def group_means(x: Any, along: AxisSet, xp: Any) -> Any:
    """The mean of every group, at each of its positions; zero outside the region."""
    if all(isinstance(e, str) for e in along.entries):
        return xp.mean(x, axis=along.axes, keepdims=True) if along.axes else x
    means = x
    for d, entry in enumerate(along.entries):
        if entry == ALL:
            means = xp.mean(means, axis=d, keepdims=True)
        elif entry != FREE:
            means = _label_means(means, along.labels(d), d, xp)
    return means


def _label_means(x: Any, labels: np.ndarray, axis: int, xp: Any) -> Any:
    """The mean over equal labels along one axis, zero where the label is -1."""
    size, count = len(labels), int(labels.max()) + 1
    if count == 0:
        return xp.zeros_like(x)
    width = size // count
    if size == count * width and np.array_equal(labels, np.arange(size) // width):
        split = x.reshape(*x.shape[:axis], count, width, *x.shape[axis + 1 :])
        return xp.repeat(xp.mean(split, axis=axis + 1), width, axis=axis)
    inside = np.flatnonzero(labels >= 0)
    rows = xp.moveaxis(x, axis, 0)
    sizes = np.bincount(labels[inside], minlength=count).reshape(-1, *[1] * (x.ndim - 1))
    order = inside[np.argsort(labels[inside], kind="stable")]
    groups = np.sort(labels[inside])
    if xp is np:
        starts = np.searchsorted(groups, np.arange(count))
        sums = np.add.reduceat(rows[order], starts, axis=0)
    else:
        sums = jax.ops.segment_sum(rows[order], groups, count, indices_are_sorted=True)
    means = (sums / sizes.astype(x.dtype))[np.maximum(labels, 0)]
    outside = (labels < 0).reshape(-1, *[1] * (x.ndim - 1))
    return xp.moveaxis(xp.where(outside, xp.zeros((), x.dtype), means), 0, axis)
