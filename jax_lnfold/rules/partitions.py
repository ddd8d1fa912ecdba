"""Axis sets spelled out position by position: rules are tried against it, and share no code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..axes.axis_set import AxisSet
from ..axes.labels import ALL, FREE, Entry, canonical


def axis_labels(entry: Entry, size: int) -> np.ndarray:
    """One label per position of an axis."""
    if entry == FREE:
        return np.arange(size)
    return np.full(size, 0) if entry == ALL else np.array(entry, int).reshape(size)


def group_ids(along: AxisSet) -> np.ndarray:
    """One number per group of positions, -1 outside the region."""
    ids, inside = np.zeros(along.shape, int), np.ones(along.shape, bool)
    for d, (entry, size) in enumerate(zip(along.entries, along.shape, strict=True)):
        labels = axis_labels(entry, size).reshape([-1 if k == d else 1 for k in range(ids.ndim)])
        ids = ids * (size + 1) + labels
        inside = inside & (labels >= 0)
    return np.where(inside, ids, -1)


def numbered(ids: np.ndarray) -> tuple[np.ndarray, int]:
    """Groups numbered 0, 1, ... in order of appearance (-1 stays), and how many there are."""
    seen: dict[int, int] = {-1: -1}
    flat = [seen.setdefault(i, len(seen) - 1) for i in ids.reshape(-1).tolist()]
    return np.array(flat, int).reshape(ids.shape), len(seen) - 1


def same_partition(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether the groups are the same, whatever their numbers."""
    return a.shape == b.shape and np.array_equal(numbered(a)[0], numbered(b)[0])


def group_mean(x: np.ndarray, along: AxisSet) -> np.ndarray:
    """The mean of every group, at each of its positions; zero outside the region."""
    ids, count = numbered(group_ids(along))
    sums, members = np.zeros(count + 1, np.result_type(x.dtype, float)), np.zeros(count + 1)
    np.add.at(sums, ids, x)
    np.add.at(members, ids, 1)
    return np.append(sums[:-1] / members[:-1], 0.0)[ids]


def centered(x: np.ndarray, along: AxisSet) -> np.ndarray:
    """Every group without its mean."""
    return (x - group_mean(x, along)).astype(x.dtype)


def uniformed(x: np.ndarray, along: AxisSet) -> np.ndarray:
    """Every group set to one of its elements; any dtype."""
    ids, count = numbered(group_ids(along))
    chosen = np.zeros(count + 1, x.dtype)
    chosen[ids] = x
    return np.where(ids < 0, x, chosen[ids])


def uniform_shift(rng: np.random.Generator, along: AxisSet, dtype: Any = float) -> np.ndarray:
    """A random number per group, zero outside the region; a complex one for such a dtype."""
    ids, count = numbered(group_ids(along))
    shift = rng.normal(0, 1, count)
    if np.issubdtype(dtype, np.complexfloating):
        shift = shift + 1j * rng.normal(0, 1, count)
    return np.append(shift, 0.0)[ids].astype(dtype)


def is_zero_mean(x: np.ndarray, along: AxisSet, tolerance: float) -> bool:
    """Whether every group has a mean of zero, up to rounding."""
    scale = max(1.0, np.abs(x).max(initial=0))
    return bool(np.abs(group_mean(x, along)).max(initial=0) <= tolerance * scale)


def is_uniform(x: np.ndarray, along: AxisSet, tolerance: float) -> bool:
    """Whether every group holds one number (or only NaN), up to rounding."""
    if not np.issubdtype(x.dtype, np.inexact):
        return np.array_equal(x, uniformed(x, along))
    scale = max(1.0, np.abs(x[np.isfinite(x)]).max(initial=0))
    return np.allclose(x, uniformed(x, along), rtol=0, atol=tolerance * scale, equal_nan=True)


def random_entry(rng: np.random.Generator, size: int, plain: float = 0.6) -> Entry:
    """`FREE`, `ALL`, equal blocks, strides, arbitrary labels, or a region of any of them."""
    if rng.random() < plain:
        return FREE if rng.random() < 0.4 else ALL if size > 1 else FREE
    divisors = [k for k in range(1, size + 1) if size % k == 0]
    width = int(rng.choice(divisors))
    kinds = [np.arange(size) // width, np.arange(size) % width, rng.integers(0, 3, size)]
    labels = kinds[rng.integers(len(kinds))]
    if rng.random() < 0.5:
        start, stop = sorted(rng.integers(0, size + 1, 2))
        stretch = (np.arange(size) >= start) & (np.arange(size) < stop)
        labels = np.where(stretch if rng.random() < 0.7 else rng.random(size) < 0.6, labels, -1)
    return canonical(labels)


def random_set(rng: np.random.Generator, shape: Sequence[int], plain: float = 0.6) -> AxisSet:
    """A random entry on every axis, or on one axis only."""
    only = rng.integers(len(shape)) if shape and rng.random() < 0.3 else None
    return AxisSet.of(
        shape,
        (random_entry(rng, n, plain) if only in (None, d) else FREE for d, n in enumerate(shape)),
    )
