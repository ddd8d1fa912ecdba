"""Which frames of a video are taken: for answers evenly, for benchmarks in other ways, too."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np

Seconds = float | Fraction
Chooser = Callable[[int, Seconds], list[int]]
"""From the number of frames (at least one) and the duration to indices of frames."""


def how_many(count: int, limit: int, seconds: Seconds) -> int:
    """`count`, or one a second if that is -1, at most `limit` then."""
    return count if count > 0 else min(limit, max(1, int(seconds)))


def evenly(count: int, limit: int) -> Chooser:
    """From the first to the last; short videos repeat frames."""

    def choose(total: int, seconds: Seconds) -> list[int]:
        return np.linspace(0, total - 1, how_many(count, limit, seconds), dtype=int).tolist()

    return choose


def each_once(count: int, limit: int) -> Chooser:
    """The same, but a short video gives fewer frames (Video-MME, MLVU)."""
    choose = evenly(count, limit)
    return lambda total, seconds: sorted(set(choose(total, seconds)))


def middles(
    count: int, limit: int, *, bound: tuple[float, float] | None = None, first: int = 0
) -> Chooser:
    """The middles of parts of equal length between two times, or of all (MVBench).

    `first` is the number of the first frame, if frames are not counted from 0.
    """

    def choose(total: int, seconds: Seconds) -> list[int]:
        fps, last = float(total / seconds), total - 1 + first
        start, end = (first, last)
        if bound:
            start, end = max(first, round(bound[0] * fps)), min(round(bound[1] * fps), last)
        parts = how_many(count, limit, seconds)
        size = (end - start) / parts
        return [int(start + size / 2 + np.round(size * i)) for i in range(parts)]

    return choose


def steps(count: int, limit: int, *, duration: float) -> Chooser:
    """Steps of whole frames from the first one on, as long as the video is said to be (LVB)."""

    def choose(total: int, seconds: Seconds) -> list[int]:
        parts = max(1, min(how_many(count, limit, duration), int(duration)))
        step = int(int(duration * float(total / seconds)) / parts)
        return [min(step * i, total - 1) for i in range(parts)]

    return choose
