"""How the positions of one axis fall into groups."""

from __future__ import annotations

from functools import cached_property

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
MAX_LABELS = 1 << 22


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


def intersect(entry: Entry, other: Entry, size: int) -> Entry:
    """The groups that two entries have in common, within both of their regions."""
    if FREE in (entry, other) or entry == other:
        return FREE if FREE in (entry, other) else entry
    return canonical(paired(labels_of(entry, size), labels_of(other, size)))


def paired(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """One label for each pair of labels, -1 where one of them is."""
    pairs = a * (b.max(initial=0) + 1) + b
    return np.where((a < 0) | (b < 0), -1, pairs)
