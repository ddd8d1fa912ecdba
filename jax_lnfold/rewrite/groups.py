"""Which features of a value the groups that a sum is over are, once slices and moves are undone.

A norm over heads reads slices of one product's result: ``qkv -> reshape -> split -> sum``. Behind
leading axes, which no step touches, the features of ``qkv`` are numbered in order; the steps move
these numbers, and each sum is over one stretch of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from ..analysis.facts import Facts
from ..axes.axis_set import AxisSet
from ..axes.labels import FREE, canonical
from ..program.graph import Op
from ..program.primitives import RESHAPE, SLICE, SPLIT, SQUEEZE, TRANSPOSE
from ..rules import Opaque, rule_of

Step = tuple[Op, int]
"""An operation of one operand, and which of its results is read."""


@dataclass(frozen=True, slots=True)
class Groups:
    """Stretches of `size` features: stretch i, of `count`, begins at ``start + i * stride``.

    `kept` are the sizes of the axes that number the stretches, and `order` is where the axes of the
    sums come from: leading ones first, then those of `kept`.
    """

    start: int
    stride: int
    count: int
    size: int
    kept: tuple[int, ...]
    order: tuple[int, ...]

    @property
    def first(self) -> np.ndarray:
        """Where each stretch begins."""
        return self.start + self.stride * np.arange(self.count)

    def labels(self, features: int) -> np.ndarray:
        """The number of the stretch that each feature is in, -1 for none."""
        found = np.full(features, -1)
        for i, first in enumerate(self.first):
            found[first : first + self.size] = i
        return found


def groups_of(
    shape: Sequence[Any], leading: int, steps: Sequence[Step], axes: Sequence[int]
) -> Groups | None:
    """What sums over `axes` are of, `steps` after a value of this shape; None if no stretches."""
    trailing = shape[leading:]
    if not all(isinstance(n, int) for n in trailing):
        return None
    axis_of = list(range(len(shape)))  # the leading axes, then those of `numbers`, as they stand
    numbers = np.arange(prod(trailing)).reshape(trailing)
    for op, result in steps:
        if op.name == TRANSPOSE:
            axis_of = [axis_of[d] for d in op.params["permutation"]]
            continue
        if op.name not in _MOVED:  # a cast
            continue
        if axis_of != sorted(axis_of):
            return None
        moved = _MOVED[op.name](op.params, result, shape[:leading], numbers)
        if moved is None:
            return None
        numbers, axis_of = moved, list(range(leading + moved.ndim))
    return _summed(numbers, axis_of, leading, axes)


def _summed(
    numbers: np.ndarray, axis_of: Sequence[int], leading: int, axes: Sequence[int]
) -> Groups | None:
    """The groups of sums over `axes` of a value whose axes are those of `axis_of`."""
    summed = [axis_of[d] - leading for d in axes]
    if any(d < 0 for d in summed):
        return None
    kept = [d for d in range(numbers.ndim) if d not in summed]
    sizes = tuple(numbers.shape[d] for d in kept)
    rows = numbers.transpose(*kept, *sorted(summed)).reshape(prod(sizes), -1)
    place = {d: d for d in range(leading)} | {d + leading: leading + i for i, d in enumerate(kept)}
    order = tuple(place[d] for k, d in enumerate(axis_of) if k not in axes)
    return _stretches(rows, sizes, order)


def _stretches(rows: np.ndarray, kept: tuple[int, ...], order: tuple[int, ...]) -> Groups | None:
    """The groups, if each row is a stretch and these are at equal distances."""
    first, size = rows[:, 0], rows.shape[1]
    stride = int(first[1] - first[0]) if len(first) > 1 else size
    found = Groups(int(first[0]), stride, len(first), size, kept, order)
    same = np.array_equal(rows, found.first[:, None] + np.arange(size))
    return found if same and stride >= size else None


def _reshaped(
    params: dict[str, Any], result: int, leading: Sequence[Any], numbers: np.ndarray
) -> np.ndarray | None:
    n, sizes = len(leading), params["new_sizes"]
    same = tuple(sizes[:n]) == tuple(leading) and params.get("dimensions") is None
    fits = same and all(isinstance(s, int) for s in sizes[n:]) and prod(sizes[n:]) == numbers.size
    return numbers.reshape(sizes[n:]) if fits else None


def _squeezed(
    params: dict[str, Any], result: int, leading: Sequence[Any], numbers: np.ndarray
) -> np.ndarray | None:
    axes = tuple(d - len(leading) for d in params["dimensions"])
    return numbers.squeeze(axes) if min(axes, default=0) >= 0 else None


def _sliced(
    params: dict[str, Any], result: int, leading: Sequence[Any], numbers: np.ndarray
) -> np.ndarray | None:
    starts, limits = params["start_indices"], params["limit_indices"]
    strides = params["strides"] or (1,) * len(starts)
    n = len(leading)
    if any((a, b, s) != (0, m, 1) for a, b, s, m in zip(starts, limits, strides, leading)):  # noqa: B905
        return None
    return numbers[tuple(map(slice, starts[n:], limits[n:], strides[n:]))]


def _split(
    params: dict[str, Any], result: int, leading: Sequence[Any], numbers: np.ndarray
) -> np.ndarray | None:
    axis = params["axis"] - len(leading)
    ends = np.cumsum(params["sizes"])
    return np.split(numbers, ends[:-1], axis)[result] if axis >= 0 else None


_MOVED: dict[str, Callable[..., np.ndarray | None]] = {
    RESHAPE: _reshaped,
    SQUEEZE: _squeezed,
    SLICE: _sliced,
    SPLIT: _split,
}
STEPS = frozenset({"convert_element_type", TRANSPOSE, *_MOVED})
"""Primitives that may stand between the value and the sum."""


def agree(
    groups: Groups,
    facts: Facts,
    shape: Sequence[Any],
    leading: int,
    steps: Sequence[Step],
    axes: Sequence[int],
    summed: Sequence[Any],
) -> bool:
    """Whether the rules of transport, which know nothing of `groups_of`, find the same groups."""
    along = AxisSet.over(summed, axes)
    for op, result in reversed(steps):
        pulled = rule_of(op).pull(facts.context(op), result, along)
        if isinstance(pulled, Opaque) or not pulled.exact:
            return False
        ((_, along),) = pulled.needs
    flat = along.reshape((*shape[:leading], prod(shape[leading:])))
    if flat is None:
        return False
    *before, last = flat.entries
    labels = groups.labels(prod(shape[leading:]))
    return all(entry == FREE for entry in before) and last == canonical(labels)
