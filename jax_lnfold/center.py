"""Centering of one array: the operator C_S, and the edit of one parameter leaf (CBWC)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is done to one leaf, with the other leaves (`sources`) that it takes, in this order.

    With `fill`, all elements become that number. Otherwise first, if there are `summed` axes, the
    product of a shift and a kernel is added: the shift runs along `axes` of the kernel, `summed`
    axes are summed over and the leaf's own axes run along the rest. Then the leaf is scaled by a
    factor along each of `factors`, and at last centered along `sets`.
    """

    fill: float | None = None
    axes: tuple[int, ...] = ()
    summed: tuple[int, ...] = ()
    factors: tuple[tuple[int, ...], ...] = ()
    sets: tuple[AxisSet, ...] = ()


def edit_leaf(x: Any, sources: Sequence[Any], recipe: Recipe, donate: bool) -> tuple[Any, Any]:
    """One leaf after its recipe.

    Shape, dtype and sharding stay. With `donate` a JAX array gives up its memory. The second
    result is whether finite numbers became too large for the dtype (a bool, maybe on a device).
    """
    if is_tracer(x) or any(map(is_tracer, sources)):
        return _edited(x, *_terms(x, sources, recipe), recipe), False
    if not isinstance(x, jax.Array):
        x = np.asarray(x)
        with np.errstate(over="ignore", invalid="ignore"):
            new = _edited_in_blocks(x, *_terms(x, sources, recipe), recipe)
        given = _finite(x, np) and all(_finite(source, np) for source in sources)
        return new, not _finite(new, np) and given
    placed = x.sharding if x.committed else None
    return _compiled_edit(recipe, donate, placed)(x, *sources)


def overflows(x: Any, sources: Sequence[Any], recipe: Recipe) -> bool:
    """Whether finite numbers would become too large for the dtype in `edit_leaf`."""
    return bool(edit_leaf(x, sources, recipe, donate=False)[1])


def _finite(x: Any, xp: Any) -> Any:
    return xp.isfinite(x).all()


def _terms(x: Any, sources: Sequence[Any], recipe: Recipe) -> tuple[Any, Any]:
    """What to add to `x` and by what to scale it, in the dtype of the arithmetic."""
    xp, wide = np if isinstance(x, np.ndarray) else jnp, _wide_type(x)
    added, factor, rest = None, None, list(sources)
    if recipe.summed:
        shift, kernel, *rest = rest
        kernel = xp.asarray(kernel, wide)
        aligned = _aligned(xp.asarray(shift, wide), recipe.axes, kernel.shape, xp)
        added = (aligned * kernel).sum(axis=recipe.summed).reshape(x.shape)
    for source, axes in zip(rest, recipe.factors, strict=True):
        aligned = _aligned(xp.asarray(source, wide), axes, x.shape, xp)
        factor = aligned if factor is None else factor * aligned
    return added, factor


def _aligned(source: Any, axes: tuple[int, ...], shape: tuple[int, ...], xp: Any) -> Any:
    """The source with its axes where they are in an array of this shape."""
    kept = [n if d in axes else 1 for d, n in enumerate(shape)]
    return xp.squeeze(source).transpose(*np.argsort(axes)).reshape(kept)


def _edited(x: Any, added: Any, factor: Any, recipe: Recipe) -> Any:
    if recipe.fill is not None:
        return (np if isinstance(x, np.ndarray) else jnp).full_like(x, recipe.fill)
    wide = x.astype(_wide_type(x))
    if added is not None:
        wide = wide + added
    if factor is not None:
        wide = wide * factor
    for along in recipe.sets:
        wide = center_array(wide, along)
    return wide.astype(x.dtype)


_BLOCK = 1 << 18
"""About as many numbers of a NumPy array are held in double precision at a time."""


def _edited_in_blocks(x: np.ndarray, added: Any, factor: Any, recipe: Recipe) -> np.ndarray:
    """`_edited` in blocks along the longest axis that no mean is taken over, if there is one."""
    free = [d for d in range(x.ndim) if all(along.entries[d] == FREE for along in recipe.sets)]
    if x.size <= _BLOCK or not free or added is not None:
        return _edited(x, added, factor, recipe)
    axis = max(free, key=lambda d: x.shape[d])
    new = np.empty_like(x)
    step = max(1, _BLOCK * x.shape[axis] // x.size)
    for start in range(0, x.shape[axis], step):
        part = (slice(None),) * axis + (slice(start, start + step),)
        block, scale = x[part], factor
        if factor is not None and factor.shape[axis] > 1:
            scale = factor[part]
        inside = tuple(AxisSet(block.shape, along.entries) for along in recipe.sets)
        new[part] = _edited(block, None, scale, replace(recipe, sets=inside))
    return new


@lru_cache(maxsize=256)
def _compiled_edit(recipe: Recipe, donate: bool, sharding: Any) -> Callable[..., tuple[Any, Any]]:
    """The edit under `jit`, so that a sharded leaf stays where it is."""

    def edit(x: Any, *sources: Any) -> tuple[Any, Any]:
        new = _edited(x, *_terms(x, sources, recipe), recipe)
        too_large = ~_finite(new, jnp) & _finite(x, jnp)
        for source in sources:
            too_large &= _finite(source, jnp)
        return new, too_large

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
