"""Repetitions in a sequence, folded: twelve alike blocks become one with a count."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Repeat(Generic[T]):
    """What stands `count` times in a row; each of its items is a list, one entry a time.

    An item is a `Repeat` itself where something repeats within.
    """

    items: tuple[Sequence[T] | Repeat[T], ...]
    count: int


def fold_repeats(
    rows: Sequence[Sequence[T]],
    key: Callable[[T], Hashable],
    counts: Callable[[T], bool] = lambda _: True,
) -> list[Sequence[T] | Repeat[T]]:
    """Rows with what repeats folded, from the left: whatever covers most, then the shortest.

    Rows are lists of entries that are alike; two rows are alike if `key` of their first entries is.
    Only what has a row that `counts` is folded.
    """
    keys = [key(row[0]) for row in rows]
    counting = [counts(row[0]) for row in rows]
    folded: list[Sequence[T] | Repeat[T]] = []
    at = 0
    while at < len(rows):
        period, count = _best(keys, counting, at)
        if count < 2:
            folded.append(rows[at])
            at += 1
            continue
        end = at + period * count
        merged = [[e for row in rows[at + i : end : period] for e in row] for i in range(period)]
        folded.append(Repeat(tuple(fold_repeats(merged, key, counts)), count))
        at = end
    return folded


def _best(keys: Sequence[Hashable], counting: Sequence[bool], at: int) -> tuple[int, int]:
    """The period and count of the repetition from `at` on that covers most."""
    best = (1, 1)
    for period in range(1, (len(keys) - at) // 2 + 1):
        same = at
        while same + period < len(keys) and keys[same] == keys[same + period]:
            same += 1
        count = (same - at) // period + 1
        useful = count > 1 and any(counting[at : at + period])
        if useful and count * period > best[0] * best[1]:
            best = (period, count)
    return best
