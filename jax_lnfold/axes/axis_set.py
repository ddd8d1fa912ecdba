"""Axis sets: along which positions of an array a mean is taken.

A centering ``C_S x = x - mean_S(x)`` takes one mean per *group* of positions. An `AxisSet` says,
for every axis, how its positions fall into groups; a group of the array is a product of one group
per axis. This covers plain axis sets, the atomic factors that `reshape` splits off or merges
(one label per head in a fused ``H * head_dim`` axis), and regions (label -1 = left alone).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import numpy as np

FREE = "free"
"""Every position of the axis is a group of its own: the axis is not averaged over."""
ALL = "all"
"""All positions of the axis form one group."""


class Labels(tuple[int, ...]):
    """One group label per position, -1 outside the region; knows its hash and array."""

    @cached_property
    def _hash(self) -> int:
        return super().__hash__()

    def __hash__(self) -> int:
        """The hash of the tuple, computed once."""
        return self._hash

    @cached_property
    def array(self) -> np.ndarray:
        """The labels as an array."""
        return np.asarray(tuple(self), int)

    @cached_property
    def partial(self) -> bool:
        """Whether some positions lie outside the region."""
        return bool(np.any(self.array < 0))

    @cached_property
    def singles(self) -> bool:
        """Whether no two positions inside the region share a group."""
        inside = self.array[self.array >= 0]
        return len(np.unique(inside)) == len(inside)


Entry = str | Labels
"""`FREE`, `ALL`, or `Labels`."""

# Merging axes with different entries spells out one label per position: stop at this many.
_MAX_LABELS = 1 << 22


def canonical(labels: np.ndarray) -> Entry:
    """The unique entry for a 1-D array of group labels (-1 = outside the region)."""
    inside = labels >= 0
    _, first, inverse = np.unique(labels[inside], return_index=True, return_inverse=True)
    count = len(first)
    if count == len(labels):
        return FREE
    if inside.all() and count == 1:
        return ALL
    rank = np.empty(count, int)
    rank[np.argsort(first)] = np.arange(count)
    numbered = np.full(len(labels), -1)
    numbered[inside] = rank[inverse]
    return Labels(numbered.tolist())


def labels_of(entry: Entry, size: int) -> np.ndarray:
    """One group label per position of an axis with `size` positions."""
    if entry == FREE:
        return np.arange(size)
    if entry == ALL:
        return np.zeros(size, int)
    assert isinstance(entry, Labels)
    return entry.array


@dataclass(frozen=True, slots=True)
class AxisSet:
    """A partition of the positions of an array of `shape` into groups, one entry per axis."""

    shape: tuple[Any, ...]
    entries: tuple[Entry, ...]

    @staticmethod
    def over(shape: Sequence[Any], axes: Iterable[int]) -> AxisSet:
        """The plain axis set: one group along all of `axes`."""
        axes = set(axes)
        entries = (ALL if d in axes and n != 1 else FREE for d, n in enumerate(shape))
        return AxisSet(tuple(shape), tuple(entries))

    @staticmethod
    def of(shape: Sequence[Any], entries: Iterable[Entry]) -> AxisSet:
        """An axis set with `entries`, where `ALL` on an axis of size 1 becomes `FREE`."""
        named = (e if isinstance(e, str | Labels) else Labels(e) for e in entries)
        pairs = zip(shape, named, strict=True)
        return AxisSet(tuple(shape), tuple(FREE if n == 1 and e == ALL else e for n, e in pairs))

    def __str__(self) -> str:
        """The set in words: ``axis 1``, ``axis 1 in 4 groups``, ``every element``."""
        words = []
        for d in self.axes:
            e = self.entries[d]
            groups = f" in {int(e.array.max()) + 1} groups" if isinstance(e, Labels) else ""
            words.append(f"axis {d}{groups}")
        return " and ".join(words) or "every element"

    @property
    def trivial(self) -> bool:
        """Whether every position is its own group: zero-mean then means zero."""
        return all(e == FREE for e in self.entries)

    @property
    def empty(self) -> bool:
        """Whether the region holds no position at all."""
        return any(isinstance(e, Labels) and bool(np.all(e.array < 0)) for e in self.entries)

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes that are averaged over, wholly or in part."""
        return tuple(d for d, e in enumerate(self.entries) if e != FREE)

    def labels(self, axis: int) -> np.ndarray:
        """One group label per position of `axis`."""
        return labels_of(self.entries[axis], self.shape[axis])

    def uniform_along(self, axis: int) -> bool:
        """Whether a value uniform along this set does not vary along `axis` at all."""
        return self.entries[axis] == ALL or self.shape[axis] == 1

    def free(self, axes: Iterable[int]) -> AxisSet:
        """The finer set that does not average over `axes`."""
        axes = set(axes)
        return AxisSet(
            self.shape, tuple(FREE if d in axes else e for d, e in enumerate(self.entries))
        )

    def widened(self, axes: Iterable[int] | None = None) -> AxisSet:
        """The finer set without the regions on axes (all by default) that are not averaged over."""
        axes = range(len(self.shape)) if axes is None else set(axes)
        return AxisSet(
            self.shape,
            tuple(
                FREE if d in axes and isinstance(e, Labels) and e.singles else e
                for d, e in enumerate(self.entries)
            ),
        )

    def refines(self, coarse: AxisSet) -> bool:
        """Whether zero-mean along this set implies zero-mean along `coarse`."""
        pairs = zip(self.entries, coarse.entries, self.shape, strict=True)
        return all(_entry_refines(f, c, n) for f, c, n in pairs)

    def disjoint(self, other: AxisSet) -> bool:
        """Whether the regions of the two sets share no position."""
        return any(
            isinstance(a, Labels)
            and isinstance(b, Labels)
            and not np.any((a.array >= 0) & (b.array >= 0))
            for a, b in zip(self.entries, other.entries, strict=True)
        )

    def compatible(self, other: AxisSet) -> bool:
        """Whether centering along one set keeps a mean that is zero along the other."""
        apart = not {*self.axes} & {*other.axes}
        regions = any(isinstance(e, Labels) and e.partial for e in (*self.entries, *other.entries))
        nested = self.refines(other) or other.refines(self)
        return nested or self.disjoint(other) or (apart and not regions)

    def select(self, positions: Sequence[slice]) -> AxisSet:
        """The set seen by ``x[positions]``, one slice per axis."""
        entries = []
        for e, n, s in zip(self.entries, self.shape, positions, strict=True):
            whole = s == slice(0, n, 1)
            entries.append(canonical(e.array[s]) if isinstance(e, Labels) and not whole else e)
        shape = (_length(s, n) for s, n in zip(positions, self.shape, strict=True))
        return AxisSet.of(tuple(shape), entries)

    def embed(self, shape: Sequence[Any], positions: Sequence[slice]) -> AxisSet | None:
        """The set on an array of `shape` that is this set on ``[positions]``, nothing elsewhere.

        None where the labels cannot be spelt out (symbolic sizes).
        """
        entries = []
        for d, (n, s) in enumerate(zip(shape, positions, strict=True)):
            if s == slice(0, n, 1):
                entries.append(self.entries[d])
                continue
            if not isinstance(n, int) or n > _MAX_LABELS:
                return None
            labels = np.full(n, -1)
            labels[s] = self.labels(d)
            entries.append(canonical(labels))
        return AxisSet.of(tuple(shape), entries)

    def reshape(self, shape: Sequence[Any]) -> AxisSet | None:
        """The same partition after a row-major reshape; None if it is no product of axes there."""
        if self.shape == tuple(shape):
            return self
        if self.empty or prod(self.shape) == 0:
            return None
        old = [d for d, n in enumerate(self.shape) if n != 1]
        new = [d for d, n in enumerate(shape) if n != 1]
        entries: list[Entry] = [FREE] * len(shape)
        for olds, news in _blocks(old, new, self.shape, shape):
            block = _regroup(
                [(self.entries[d], self.shape[d]) for d in olds], [shape[d] for d in news]
            )
            if block is None:
                return None
            for d, e in zip(news, block, strict=True):
                entries[d] = e
        return AxisSet.of(tuple(shape), entries)


def intersect(entry: Entry, other: Entry, size: int) -> Entry:
    """The groups that two entries have in common, within both of their regions."""
    if FREE in (entry, other) or entry == other:
        return FREE if FREE in (entry, other) else entry
    return canonical(_pair(labels_of(entry, size), labels_of(other, size)))


def _length(s: slice, size: Any) -> Any:
    if all(isinstance(n, int | np.integer) for n in (s.start, s.stop, size)):
        return len(range(*s.indices(size)))
    return (s.stop - s.start - 1) // s.step + 1  # symbolic sizes


def _entry_refines(fine: Entry, coarse: Entry, size: Any) -> bool:
    if fine in (coarse, FREE):
        return True
    if isinstance(coarse, str):
        # A label tuple refines `ALL` when it covers every position, and never refines `FREE`.
        return isinstance(fine, Labels) and coarse == ALL and not fine.partial
    f, c = labels_of(fine, size), labels_of(coarse, size)
    if np.any(f[c >= 0] < 0):
        return False
    touched = np.unique(f[c >= 0])
    pairs = np.stack([f, c])[:, np.isin(f, touched)]
    return np.unique(pairs, axis=1).shape[1] == len(touched)


def _pair(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    paired = a * (b.max(initial=0) + 1) + b
    return np.where((a < 0) | (b < 0), -1, paired)


def _blocks(
    old: list[int], new: list[int], old_shape: Sequence[Any], new_shape: Sequence[Any]
) -> Iterable[tuple[list[int], list[int]]]:
    """Pairs of runs of axes with equal products, as short as possible."""
    tail: list[tuple[list[int], list[int]]] = []
    while old and new and old_shape[old[-1]] == new_shape[new[-1]]:
        tail.append(([old[-1]], [new[-1]]))
        old, new = old[:-1], new[:-1]
    yield from tail
    i = j = 0
    while i < len(old) or j < len(new):
        olds, news = old[i : i + 1], new[j : j + 1]
        p, q = prod(old_shape[d] for d in olds), prod(new_shape[d] for d in news)
        while p != q:
            if not (isinstance(p, int) and isinstance(q, int)):
                olds, news = old[i:], new[j:]  # symbolic sizes: one block of all that remains
                break
            if p < q:
                olds = old[i : i + len(olds) + 1]
                p = prod(old_shape[d] for d in olds)
            else:
                news = new[j : j + len(news) + 1]
                q = prod(new_shape[d] for d in news)
        i, j = i + len(olds), j + len(news)
        yield olds, news


def _regroup(old: list[tuple[Entry, Any]], new: list[Any]) -> list[Entry] | None:
    if len(old) == len(new) == 1:
        return [old[0][0]]
    if all(e == FREE for e, _ in old) or all(e == ALL for e, _ in old):
        return [old[0][0]] * len(new)
    total = prod(n for _, n in old)
    if not isinstance(total, int) or total > _MAX_LABELS:
        return None
    merged = _merge([labels_of(e, n) for e, n in old])
    return _split(merged, new)


def _merge(parts: list[np.ndarray]) -> np.ndarray:
    merged = parts[0]
    for labels in parts[1:]:
        merged = _pair(merged[:, None], labels[None, :]).reshape(-1)
    return merged


def _split(merged: np.ndarray, sizes: list[int]) -> list[Entry] | None:
    """Entries per axis whose product is the partition `merged`, or None if there are none."""
    if len(sizes) == 1:
        return [canonical(merged)]
    block = merged.reshape(sizes)
    parts = []
    for d, n in enumerate(sizes):
        rows = np.moveaxis(block, d, 0).reshape(n, -1)
        _, labels = np.unique(rows, axis=0, return_inverse=True)
        parts.append(np.where((rows >= 0).any(axis=1), labels.reshape(-1), -1))
    if canonical(_merge(parts)) != canonical(merged):
        return None
    return [canonical(p) for p in parts]
