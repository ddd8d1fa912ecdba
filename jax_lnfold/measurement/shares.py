"""The share of the mean in the second moment of each token, as sums that can be merged.

A token is a group of positions that a LayerNorm averages over: ``mean**2 / mean(x**2)`` is between
0 (zero-mean) and 1 (constant). Numbers are taken relative to the largest one of their token, and
sums relative to the largest one of all, so that no square leaves the range of the dtype.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._compat import is_explicit
from ..axes.axis_set import AxisSet
from ..axes.labels import Labels
from ..centering import group_means, widened

PER_OCTAVE = 8
"""Bins of the histogram of shares for each factor of two: a bin is 9 % wide."""
OCTAVES = 112
"""Shares below ``2**-112``, about 2e-34, are in the lowest bin."""
BINS = PER_OCTAVE * OCTAVES + 1
EDGES = 2.0 ** ((np.arange(BINS) + 1 - BINS) / PER_OCTAVE)
"""The largest share in each bin."""


class Sums(NamedTuple):
    """What is known of some tokens; fields may have leading axes, one entry for each iteration.

    `scale` is the largest magnitude of all numbers, `means` and `squares` are the sums of
    ``mean**2`` and ``mean(x**2)`` relative to its square. `shares` is the sum of the shares,
    `largest` the largest one. `counts` is their histogram (last axis of `BINS`), without those of
    `spoilt` tokens, which are NaN.
    """

    scale: Any
    means: Any
    squares: Any
    shares: Any
    largest: Any
    counts: Any
    spoilt: Any


def sums_of(x: jax.Array, along: AxisSet, mesh_axes: tuple[str, ...] = ()) -> Sums:
    """The sums of all tokens of ``x``, in float32 or, for float64, in that.

    `mesh_axes` are those of a `shard_map` that means span besides the axes of one shard.
    """
    wide = x.astype(widened(x.dtype))
    size = jnp.max(jnp.abs(wide), along.axes, keepdims=True, initial=0)
    size = jax.lax.pmax(size, mesh_axes) if mesh_axes else size
    scaled = wide / jnp.where(size == 0, 1, size)
    mean, square = (
        one_each(group_means(values, along, jnp), along) for values in (scaled, scaled**2)
    )
    if mesh_axes:
        mean, square = jax.lax.pmean((mean, square), mesh_axes)
    # Of zeros the mean is zero, too: padding has none.
    share = jnp.minimum(mean**2 / jnp.where(square == 0, 1, square), 1)
    largest = jnp.max(size, initial=0)
    weight = (size / jnp.where(largest == 0, 1, largest)) ** 2
    spoilt = jnp.isnan(share)
    return Sums(
        scale=largest,
        means=jnp.sum(weight * mean**2),
        squares=jnp.sum(weight * square),
        shares=jnp.sum(share),
        largest=jnp.max(share, initial=0),
        counts=_histogram(share, spoilt),
        spoilt=jnp.sum(spoilt, dtype=jnp.int32),
    )


def merged(sums: Sums, xp: Any) -> Sums:
    """The sums of all tokens of which the first axis has some in each entry."""
    scale = xp.max(sums.scale, axis=0)
    weight = (sums.scale / xp.where(scale == 0, xp.ones((), scale.dtype), scale)) ** 2
    return Sums(
        scale=scale,
        means=xp.sum(weight * sums.means, axis=0),
        squares=xp.sum(weight * sums.squares, axis=0),
        shares=xp.sum(sums.shares, axis=0),
        largest=xp.max(sums.largest, axis=0),
        counts=xp.sum(sums.counts, axis=0, dtype=sums.counts.dtype),
        spoilt=xp.sum(sums.spoilt, axis=0, dtype=sums.spoilt.dtype),
    )


def one_each(means: jax.Array, along: AxisSet) -> jax.Array:
    """Means at one position of each group; positions that are in no group are left out."""
    for axis, entry in enumerate(along.entries):
        if isinstance(entry, Labels):
            groups, firsts = np.unique(along.labels(axis), return_index=True)
            means = jnp.take(means, firsts[groups >= 0], axis=axis)
    return means


def _histogram(share: jax.Array, spoilt: jax.Array) -> jax.Array:
    """How many shares are in each bin."""
    if is_explicit(jax.typeof(share)):  # which would have to say how the bins are spread
        share, spoilt = jax.sharding.reshard((share, spoilt), jax.sharding.PartitionSpec())
    known = jnp.clip(jnp.where(spoilt, 1, share), float(EDGES[0]), 1)
    steps = jnp.ceil(jnp.log2(known) * PER_OCTAVE).astype(jnp.int32)
    bins = jnp.clip(steps + BINS - 1, 0, BINS - 1)
    return jnp.zeros(BINS, jnp.int32).at[bins].add((~spoilt).astype(jnp.int32))
