"""Axis sets: along which positions of an array a mean is taken.

A centering ``C_S x = x - mean_S(x)`` takes one mean per *group* of positions. An `AxisSet` says,
for every axis, how its positions fall into groups; a group of the array is a product of one group
per axis. This covers plain axis sets, the atomic factors that `reshape` splits off or merges
(one label per head in a fused ``H * head_dim`` axis), and regions (label -1 = left alone).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from .labels import ALL, FREE, MAX_LABELS, Entry, Labels, canonical, labels_of
from .reshape import regrouped, runs_of_axes


@dataclass(frozen=True, slots=True)
class AxisSet:
    """A partition of the positions of an array of `shape` into groups, one entry per axis.

    Example:
        >>> from jax_lnfold import AxisSet
        >>> print(AxisSet.over((8, 12), axes=[1]))
        axis 1
        >>> print(AxisSet.of((8, 12), ["free", [i // 3 for i in range(12)]]))  # 4 heads
        axis 1 in 4 groups
    """

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
            if not isinstance(n, int) or n > MAX_LABELS:
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
        for olds, news in runs_of_axes(old, new, self.shape, shape):
            block = regrouped(
                [(self.entries[d], self.shape[d]) for d in olds], [shape[d] for d in news]
            )
            if block is None:
                return None
            for d, e in zip(news, block, strict=True):
                entries[d] = e
        return AxisSet.of(tuple(shape), entries)


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
