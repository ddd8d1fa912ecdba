"""Edits of NumPy arrays: block by block in double precision, in place if they are given up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from ..axes.labels import FREE
from ..centering import Shape
from .leaf import Recipe, Terms, blocks, edited, looks_edited, terms_of


def edit_array(
    x: np.ndarray, sources: Sequence[Any], recipe: Recipe, in_place: bool = False
) -> tuple[np.ndarray, bool]:
    """The array after its recipe, and whether finite numbers became too large for the dtype.

    The very array with `in_place`, where it is not told what became too large (see `overflows`).
    """
    noted = list[str]()
    ignored: Any = {"divide": "ignore", "invalid": "ignore"}  # what comes of it is no finite number
    with np.errstate(over="call", call=lambda kind, _: noted.append(kind), **ignored):
        terms = terms_of(x, recipe.means_for(np.float64), sources, recipe)
        new = _edited_in_blocks(x, terms, recipe, x if in_place else np.empty_like(x))
    added = recipe.summed or recipe.terms
    if in_place or (not noted and not added and x.dtype.isbuiltin == 1):
        return new, False  # NumPy notes overflows of its own dtypes, but in einsum
    given = (np.asarray(v) for v in (x, *sources))
    return new, not np.isfinite(new).all() and all(np.isfinite(v).all() for v in given)


def is_edited_array(x: np.ndarray, recipe: Recipe, slack: float) -> bool:
    """`looks_edited` of a NumPy array, block by block."""
    means, axis = recipe.means_for(np.float64), _free_axis(x.shape, recipe)
    parts = [(...,)] if axis is None else blocks(x.shape, axis)
    return all(looks_edited(x[part], _cut(means, part, axis), recipe, slack) for part in parts)


def overflows_array(x: np.ndarray, sources: Sequence[Any], recipe: Recipe) -> bool:
    """Whether finite numbers would become too large; only without a bound it is tried out."""
    return not _is_bounded(x, sources, recipe) and edit_array(x, sources, recipe)[1]


def _is_bounded(x: np.ndarray, sources: Sequence[Any], recipe: Recipe) -> bool:
    """Whether a bound on the largest number shows that no edit overflows, as `bounded` does."""
    if recipe.fill is not None or recipe.terms:
        return not recipe.terms
    largest, rest = _largest(x), [*map(np.asarray, sources)]
    with np.errstate(all="ignore"):
        if recipe.summed:
            shift, kernel, *rest = rest
            largest += float(np.abs(shift.astype(np.float64)).sum()) * _largest(kernel)
        for multiplier in recipe.factors:
            taken, rest = rest[: multiplier.takes], rest[multiplier.takes :]
            largest *= _largest(multiplier.value(taken, x.shape, np.dtype(np.float64), np))
        largest *= 2.0 ** (1 + len(recipe.sets))  # a mean is no larger; once more for rounding
        if recipe.means is not None:
            largest += 2 * _largest(np.asarray(recipe.means))
    most = float(jax.numpy.finfo(x.dtype).max)
    return largest < most and largest * x.size < float(np.finfo(np.float64).max)


def _largest(x: np.ndarray) -> float:
    """The largest magnitude, NaN if there is one: no copy is made."""
    return max(float(x.max()), -float(x.min())) if x.size else 0.0


def _free_axis(shape: Shape, recipe: Recipe) -> int | None:
    """The longest axis that no mean is taken over, if there is one."""
    every = (*recipe.sets, *recipe.constant)
    free = [d for d in range(len(shape)) if all(s.entries[d] == FREE for s in every)]
    return max(free, key=lambda d: shape[d], default=None)


def _cut(term: Any, part: tuple[Any, ...], axis: int | None) -> Any:
    """What of a term is for a part of the leaf, cut along the axis."""
    return term if term is None or axis is None or term.shape[axis] == 1 else term[part]


def _edited_in_blocks(x: np.ndarray, terms: Terms, recipe: Recipe, new: np.ndarray) -> np.ndarray:
    """`edited` in blocks along the longest axis that no mean is taken over, if there is one."""
    factor = terms.factor
    if factor is not None and factor.dtype == x.dtype and terms.added is None and not recipe.sets:
        return np.multiply(x, factor, out=new)
    axis = _free_axis(x.shape, recipe)
    for part in [(...,)] if axis is None else blocks(x.shape, axis):
        own = Terms(*(_cut(term, part, axis) for term in terms))
        new[part] = edited(x[part], own, recipe)
    return new
