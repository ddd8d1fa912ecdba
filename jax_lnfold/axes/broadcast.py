"""Axis sets and axes before and after an operation that repeats, cuts or contracts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .axis_set import AxisSet
from .labels import ALL, FREE


def project(along: AxisSet, shape: Sequence[Any]) -> AxisSet:
    """The set of the output as an operand of `shape` sees it: broadcast axes drop out."""
    if not shape:
        return AxisSet((), ())
    pairs = zip(along.entries, along.shape, shape, strict=True)
    return AxisSet.of(shape, (e if n == m else FREE for e, n, m in pairs))


def lift(along: AxisSet, shape: Sequence[Any]) -> AxisSet:
    """The set of an operand on an output of `shape`: it is uniform along broadcast axes."""
    if not along.shape:
        return AxisSet.of(shape, (ALL for _ in shape))
    pairs = zip(along.entries, along.shape, shape, strict=True)
    return AxisSet.of(shape, (e if n == m else ALL for e, n, m in pairs))


def output_axes(numbers: Any, ranks: Sequence[int], operand: int) -> dict[int, int]:
    """Free axis of an operand -> axis of the output, for the dimension numbers of a product."""
    (contract, batch) = numbers
    free = [
        [d for d in range(ranks[i]) if d not in contract[i] and d not in batch[i]] for i in (0, 1)
    ]
    offset = len(batch[operand]) + (len(free[0]) if operand else 0)
    return {d: offset + k for k, d in enumerate(free[operand])}


def embed_or_free(along: AxisSet, shape: Sequence[Any], positions: list[slice]) -> AxisSet | None:
    """The set on the whole array; axes too long or symbolic get every position instead."""
    found = along.embed(shape, positions)
    if found is not None:
        return found
    touched = [d for d, s in enumerate(positions) if s != slice(0, shape[d], 1)]
    if any(along.entries[d] != FREE for d in touched):  # every position would not be the same set
        return None
    return AxisSet.of(shape, along.entries)
