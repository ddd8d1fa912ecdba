"""Sums of squares about the mean, in one pass over the numbers or in two (theory, section 14)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .ones_products import as_before

_DOWN, _LARGE = np.float32(2.0**-64), np.float32(2.0**-8)
"""What large numbers are multiplied by, and what sums of their squares are beyond."""


def one_pass_sum(
    axes: Sequence[int], count: int, dtype: np.dtype[Any]
) -> Callable[[jax.Array], jax.Array]:
    """The sum of squares about the mean, from sums of `x` and its squares; derivatives as before.

    Numbers of `dtype` have squares of twice its digits. Split in halves, these have sums without
    rounding where it matters: where all are about as large as the mean. With a number p of `dtype`
    near the mean, ``sum((x - mean)**2) = sum(x**2 - p**2) - 2 p d - d**2 / n``, d = sum(x - p).
    What a compiler keeps of more digits, by leaving out a cast, is summed by itself.
    """
    digits, n = jnp.finfo(dtype).nmant, np.float32(count)

    def halves(square: jax.Array) -> tuple[jax.Array, jax.Array]:
        upper = lax.reduce_precision(square, 8, digits)
        return upper, square - upper

    def about_mean(
        upper: jax.Array, lower: jax.Array, total: jax.Array, more: jax.Array
    ) -> jax.Array:
        near = lax.reduce_precision((total + more) / n, 8, digits)
        of_near, rest = halves(near * near)
        squares = (upper - n * of_near) + (lower - n * rest)
        moved = (total - n * near) + more
        found = squares - 2 * near * moved - moved * moved / n
        # Numbers of `dtype` that differ are a unit apart; no less may be left of more digits.
        least = near * near * np.float32(4.0 ** (-digits - 2))
        return jnp.where((found == 0) & (moved == 0), 0, lax.max(found, least))

    def in_one_pass(x: jax.Array) -> jax.Array:
        kept = lax.reduce_precision(x, 8, digits)
        parts = *halves(x * x), kept, x - kept
        upper, lower, total, more = (jnp.sum(part, axis=axes) for part in parts)
        found = about_mean(upper, lower, total, more)
        if jnp.finfo(dtype).maxexp > 64:  # once more where squares leave float32, or are about to
            large = jnp.sum(lax.square(x * _DOWN), axis=axes)
            scaled = about_mean(large, jnp.zeros_like(large), total * _DOWN, more * _DOWN)
            is_large = large > _LARGE
            up = jnp.where(is_large, 1 / _DOWN, 1)  # a constant squared would be infinite
            found = jnp.where(is_large, scaled, found) * up * up
        return found

    def sum_of_squares_about_mean(x: jax.Array) -> jax.Array:
        return as_before(in_one_pass, two_pass_sum(axes, count))(x)

    return sum_of_squares_about_mean


def two_pass_sum(axes: Sequence[int], count: int) -> Callable[[jax.Array], jax.Array]:
    """The sum of squares about the mean as a LayerNorm in two passes has it."""

    def sum_of_squares_about_mean(x: jax.Array) -> jax.Array:
        mean = jnp.sum(x, axis=axes, keepdims=True) / np.asarray(count, x.dtype)
        return jnp.sum(lax.square(x - mean), axis=axes)

    return sum_of_squares_about_mean
