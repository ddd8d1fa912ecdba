"""Sums of groups of features as products with ones, on a matrix unit that multiplies bfloat16.

The numbers are split into parts of 8 binary digits each, which add up to what they are (theory,
section 13); products with ones and zeros are exact, and sums are taken in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .groups import Groups

_PART = jnp.bfloat16
_UPPER_HALF = np.uint32(0xFFFF0000)  # the bits of a float32 that a bfloat16 has
_LANES = 128
_OVERFLOWS = np.float32(2.0**120)  # with the largest number of bfloat16
_FINITE = np.float32(np.finfo(np.float32).max)


def parts_of_squares(dtype: Any) -> int:
    """How many parts hold the square of a number of this dtype in float32."""
    return 2 if 2 * (jnp.finfo(dtype).nmant + 1) <= 16 else 3


def group_sums(
    x: jax.Array, groups: Sequence[Groups], leading: int, squares: bool, number: int
) -> tuple[jax.Array, ...]:
    """For each of `groups`, the sums of what is in them, squared or not, in float32.

    Leading axes stay, the others are the features. What is infinite or NaN is so in the sum of its
    own group only, though a product multiplies it with the zeros of others.
    """
    if len(x.shape) == leading + 1:
        x, groups = _within_lanes(x, groups)
    features = x.shape[leading:]
    wide = x.astype(jnp.float32)
    wide = lax.square(wide) if squares else wide
    apart = sum(g.count for g in groups) > 1
    if apart:
        ones = jnp.asarray(_ones(groups, prod(features)).reshape(*features, -1))
    else:  # a single column would be made a sum again
        ones = jnp.ones((*features, _LANES), _PART)
    total = _product(wide, ones, leading, number, apart)
    found, column = [], 0
    for g in groups:
        part = lax.slice_in_dim(total, column, column + g.count, axis=leading)
        part = part.reshape(*x.shape[:leading], *g.kept)
        found.append(lax.transpose(part, g.order))
        column += g.count
    return tuple(found)


def _within_lanes(x: jax.Array, groups: Sequence[Groups]) -> tuple[jax.Array, Sequence[Groups]]:
    """Whole registers of features, from the first to the last that is in a group."""
    start = min(int(g.first.min()) for g in groups) // _LANES * _LANES
    end = max(int(g.first.max()) + g.size for g in groups)
    end = min(-(-end // _LANES) * _LANES, x.shape[-1])
    if (start, end) == (0, x.shape[-1]):
        return x, groups
    moved = [replace(g, start=g.start - start) for g in groups]
    return lax.slice_in_dim(x, start, end, axis=x.ndim - 1), moved


def _ones(groups: Sequence[Groups], features: int) -> np.ndarray:
    """One column for each group, which has ones where a feature is in it: a constant."""
    columns = [g.labels(features)[:, None] == np.arange(g.count) for g in groups]
    return np.concatenate(columns, axis=1).astype(_PART)


def _product(wide: jax.Array, ones: jax.Array, leading: int, number: int, apart: bool) -> jax.Array:
    axes = tuple(range(leading, wide.ndim)), tuple(range(wide.ndim - leading))
    sums = [
        lax.dot_general(part, ones, (axes, ((), ())), preferred_element_type=jnp.float32)
        for part in _parts(wide, number, apart)
    ]
    total = sums[-1]
    for larger in sums[-2::-1]:  # the last sum rounds the most
        total = larger + total
    if apart and number > 1:
        total = jnp.where(sums[1] < 0, np.float32(np.nan), total)
    return total


def _parts(wide: jax.Array, number: int, apart: bool) -> list[jax.Array]:
    """Numbers of bfloat16 that add up to `wide`, which is not negative where there are several.

    The second one of an infinity is what the first, the largest of bfloat16, overflows with. Where
    groups are `apart`, no part is infinite or NaN, and a NaN has a second part below zero, which
    up to 60 infinities in one group do not make up for.
    """
    if number == 1:
        return [wide.astype(_PART)]
    finite, beyond, is_nan = _cut_off(wide, apart)
    first = _upper_half(finite)
    second = finite - first
    third = []
    if number == 3:
        left, second = second, _upper_half(second)
        third = [left - second]
        # The three parts of the largest number of float32 do not overflow.
        second = second + lax.min(beyond * _OVERFLOWS, _OVERFLOWS)
    if is_nan is not None:
        second = second - is_nan * np.float32(2.0**126)
    return [part.astype(_PART) for part in (first, second, *third)]


def _cut_off(wide: jax.Array, apart: bool) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The number, or the largest finite one; above zero where it is beyond; and 2 for NaN, or 0."""
    if not apart:
        finite = lax.min(wide, _FINITE)
        return finite, wide - finite, None
    # As whole numbers, NaN is larger than infinity, whatever its sign.
    bits = lax.bitcast_convert_type(wide, jnp.uint32)
    within = lax.min(bits, _FINITE.view(np.uint32))
    more = bits - within
    is_nan = lax.bitcast_convert_type(more << np.uint32(8), jnp.float32)
    beyond = lax.min(more, np.uint32(1)).astype(jnp.float32)
    return lax.bitcast_convert_type(within, jnp.float32), beyond, is_nan


def _upper_half(x: jax.Array) -> jax.Array:
    """The number of bfloat16 next to one of float32, towards zero.

    A cast there and back is what a compiler may leave out, for more precision.
    """
    bits = lax.bitcast_convert_type(x, jnp.uint32) & _UPPER_HALF
    return lax.bitcast_convert_type(bits, jnp.float32)


def as_before(
    fast: Callable[[jax.Array], Any], before: Callable[[jax.Array], Any]
) -> Callable[[jax.Array], Any]:
    """`fast` with the derivatives of what was there before."""
    with_rule = jax.custom_jvp(fast)
    with_rule.defjvp(lambda x, dx: (with_rule(*x), jax.jvp(before, x, dx)[1]))
    return with_rule
