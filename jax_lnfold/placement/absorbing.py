"""What scales that are merged into linear layers have in common, be these before or behind them."""

from __future__ import annotations

from collections.abc import Iterable

from ..program.graph import ROWS, CallPath, Graph, Op
from ..program.primitives import IDENTITIES, MOVES
from ..rules import AxisMap, axis_map
from ..trees import is_editable

AxisPlace = int | CallPath
"""An axis of a value, or the loop that takes it row by row."""
AxisPlaces = tuple[AxisPlace, ...]
"""Where the axes of a scale are in a value."""
_CARRY = MOVES | IDENTITIES | ROWS | {"slice"}


class CannotAbsorb(Exception):
    """A parameter has a use that rules out the merge: why, in words."""


def candidates(graph: Graph) -> list[int]:
    """Leaf values that may be scales: numbers that can be edited, more than one."""
    avals = ((value, graph.avals[value]) for value in graph.leaves)
    return [v for v, a in avals if is_editable(a.dtype) and {*a.shape} - {1}]


def carried(graph: Graph, op: Op) -> AxisMap | None:
    """Where the axes of the operand are in the result, if all `op` does is move and convert it.

    What is cut, repeated, merged or split is nowhere.
    """
    if op.name not in _CARRY or not is_editable(graph.avals[op.outputs[0]].dtype):
        return None
    return axis_map(graph, op)


def moved_places(places: AxisPlaces, axes: AxisMap) -> AxisPlaces:
    """Where the axes are after a value was moved; those in loops stay."""
    if any(isinstance(p, int) and p not in axes for p in places):
        raise CannotAbsorb("its axes are cut, repeated, merged or split")
    return tuple(axes[p] if isinstance(p, int) else p for p in places)


def are_seen(graph: Graph, leaves: Iterable[int]) -> bool:
    """Whether the program uses one of these leaf values."""
    return any(graph.uses[leaf] or leaf in graph.outputs for leaf in leaves)
