"""Values that a scale is a factor of, and where its elements are once they are moved or joined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from ..program.graph import Graph, Op
from .absorbing import AxisPlaces, CannotAbsorb, carried, moved_places


@dataclass(frozen=True, slots=True)
class Scaled:
    """A value that is linear in the scale, plus the shift if `shifted`.

    The axes of the scale, which have these `sizes`, are at `places`; the value may have a part of
    the scale only, which begins at `starts`. `raw` is the leaf itself, moved and converted.
    """

    places: AxisPlaces
    sizes: tuple[int, ...]
    starts: tuple[int, ...]
    raw: bool = False
    shifted: bool = False

    def is_whole(self, shape: Sequence[int]) -> bool:
        """Whether a value of this shape has all elements of the scale."""
        axes = zip(self.places, self.sizes, self.starts, strict=True)
        return all(not isinstance(p, int) or (s == 0 and shape[p] == n) for p, n, s in axes)

    def is_alike(self, shape: Sequence[int], other: Sequence[int]) -> bool:
        """Whether values of these shapes have equally large parts of the scale."""
        return all(shape[p] == other[p] for p in self.places if isinstance(p, int))

    def later(self, axis: int, by: int) -> Scaled:
        """The part that begins this much later along an axis of the value."""
        pairs = zip(self.places, self.starts, strict=True)
        return replace(self, starts=tuple(s + by if p == axis else s for p, s in pairs))


def moved(graph: Graph, op: Op, states: Sequence[Scaled | None]) -> list[Scaled] | None:
    """The results of an operation that moves, cuts or joins its operands; None for other ones."""
    if op.name == "concatenate":
        return [_joined(graph, op, states)]
    if op.name == "pad":
        return [_padded(graph, op, states)]
    state, params = states[0], op.params
    if state is None:
        return None
    if op.name == "slice":
        steps = enumerate(params["strides"] or ())
        if any(step != 1 and axis in state.places for axis, step in steps):
            raise CannotAbsorb(f"{op.location()} leaves out elements of it")
        for axis, start in enumerate(params["start_indices"]):
            state = state.later(axis, start)
        return [state]
    if op.name == "split":
        starts = accumulate(params["sizes"][:-1], initial=0)
        return [state.later(params["axis"], start) for start in starts]
    if (axes := carried(graph, op)) is None:
        return None
    if op.name == "loop_slice" and not state.is_whole(graph.shape(op.inputs[0])):
        raise CannotAbsorb(f"{op.location()} takes a part of it row by row")
    return [replace(state, places=moved_places(state.places, axes))]


def _joined(graph: Graph, op: Op, states: Sequence[Scaled | None]) -> Scaled:
    """Parts of the scale that follow on each other, or the same part along another axis."""
    axis = op.params["dimension"]
    first = following = next(s for s in states if s is not None)
    for value, state in zip(op.inputs, states, strict=True):
        zeros = state is None and axis not in first.places and _adds_zeros(graph, value, first)
        if state != following and not zeros:
            raise CannotAbsorb(f"{op.location()} joins what it scales with something else")
        following = following.later(axis, graph.shape(value)[axis])
    return first


def _padded(graph: Graph, op: Op, states: Sequence[Scaled | None]) -> Scaled:
    state, config = states[0], enumerate(op.params["padding_config"])
    kept = state and all(d not in state.places or set(pads) == {0} for d, pads in config)
    if not (state and kept and _adds_zeros(graph, op.inputs[1], state)):
        raise CannotAbsorb(f"{op.location()} joins what it scales with something else")
    return state


def _adds_zeros(graph: Graph, value: int, state: Scaled) -> bool:
    """Whether these are zeros, and as good as others that are scaled: without a shift."""
    number = graph.scalar(value)
    return number is not None and bool(number == 0) and not (state.shifted or state.raw)
