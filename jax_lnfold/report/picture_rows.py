"""Rows and lines for a picture of the streams: repeated blocks stand in one box with a count."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from .events import APPROXIMATED, FOLDED, LEFT, Event
from .repeats import Repeat, fold_repeats
from .table import merged, template

_NORMS = (FOLDED, APPROXIMATED, LEFT)


@dataclass(frozen=True, slots=True)
class PictureRow:
    """One row: events that differ in numbers only, and the lane of their stream."""

    events: tuple[Event, ...]
    lane: int

    def text(self, field: str) -> str:
        """A field of the events, merged: ``block_{0-11}/norm``."""
        return merged([getattr(event, field) for event in self.events])


@dataclass(frozen=True, slots=True)
class Box:
    """Rows `top` to `bottom`, which stand for `count` alike blocks or `count` runs of a loop."""

    top: int
    bottom: int
    count: int
    is_loop: bool = False

    def holds(self, *rows: int) -> bool:
        """Whether all these rows are inside."""
        return all(self.top <= row <= self.bottom for row in rows)


@dataclass(frozen=True, slots=True)
class Layout:
    """Rows from top to bottom, boxes around them, and the pieces of the streams' lines.

    A piece is (lane, from row, to row); it ends half a row off where it leaves a box that its
    stream enters again at the other end.
    """

    rows: tuple[PictureRow, ...]
    boxes: tuple[Box, ...]
    lines: frozenset[tuple[int, float, float]]

    def depth(self, box: Box) -> int:
        """How many boxes there are around a box."""
        return sum(b != box and b.holds(box.top, box.bottom) for b in self.boxes)


def lay_out(events: Sequence[Event]) -> Layout:
    """The rows, boxes and lines for events in program order."""
    lanes = _lanes(events)

    def key(i: int) -> Hashable:
        e = events[i]
        words = (template(e.name), template(e.detail))
        return e.kind, words, e.runs, bool(e.loop)

    rows: list[list[int]] = []
    boxes: list[Box] = []
    alone = [[i] for i in range(len(events))]
    for item in fold_repeats(alone, key, lambda i: events[i].kind in _NORMS):
        _arrange(item, rows, boxes)
    loops = groupby(range(len(rows)), lambda r: (events[rows[r][0]].loop, events[rows[r][0]].runs))
    for (loop, runs), group in loops:
        if loop:
            inside = list(group)
            boxes.append(Box(inside[0], inside[-1], runs, is_loop=True))
    shown = {i: r for r, entries in enumerate(rows) for i in entries}
    drawn = [PictureRow(tuple(events[i] for i in r), lanes[events[r[0]].stream]) for r in rows]
    of_stream: dict[int, list[int]] = {}
    for i, event in enumerate(events):
        of_stream.setdefault(event.stream, []).append(shown[i])
    pieces = (piece for along in of_stream.values() for piece in _pieces(along, boxes))
    lines = frozenset((drawn[row].lane, start, end) for row, start, end in pieces)
    return Layout(tuple(drawn), tuple(dict.fromkeys(boxes)), lines)


def _arrange(item: Sequence[int] | Repeat[int], rows: list[list[int]], boxes: list[Box]) -> None:
    if not isinstance(item, Repeat):
        rows.append(list(item))
        return
    top, at = len(rows), len(boxes)
    for inner in item.items:
        _arrange(inner, rows, boxes)
    boxes.insert(at, Box(top, len(rows) - 1, item.count))


def _lanes(events: Sequence[Event]) -> dict[int, int]:
    """For each stream the first lane that is free from its first to its last event."""
    last = {event.stream: i for i, event in enumerate(events)}
    taken: dict[int, int] = {}  # lane -> where its stream ends
    lanes: dict[int, int] = {}
    for i, event in enumerate(events):
        if event.stream not in lanes:
            lane = next(n for n in range(len(taken) + 1) if taken.get(n, -1) < i)
            lanes[event.stream], taken[lane] = lane, last[event.stream]
    return lanes


def _pieces(rows: Sequence[int], boxes: Sequence[Box]) -> Iterator[tuple[int, float, float]]:
    """The pieces of one line through these rows: a row on its lane, from row, to row."""
    for row, following in pairwise(rows):
        if row < following:
            yield row, row, following
        else:  # from one repetition to the next
            around = [b for b in boxes if not b.is_loop and b.holds(row, following)]
            box = min(around, key=lambda b: b.bottom - b.top)
            yield row, row, box.bottom + 0.5
            yield row, box.top - 0.5, following
