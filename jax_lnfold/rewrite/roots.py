"""By which a norm is known again in a rewritten program: the root that makes its deviation.

No rewrite removes, adds or reorders the roots of live operations, so that the number of one among
all of them, in program order, says which norm it is of; no name is needed.
"""

from __future__ import annotations

from ..program.graph import Graph
from ..program.primitives import IDENTITIES, MOVES, SCALINGS

ROOTS = frozenset({"rsqrt", "sqrt", "pow"})
"""Primitives that make a deviation of a variance."""
STATISTICS = frozenset({"integer_pow", "reduce_sum", "rsqrt", "sqrt", "square"})
"""Primitives of a variance: calls to functions around them are opened (see `inlined`)."""
TO_THE_ROOT = SCALINGS | MOVES | IDENTITIES | frozenset("add sub max min clamp select_n".split())
"""Primitives that a sum of squares may pass on its way to the root of a norm."""
Root = tuple[int, int]
"""The number of a root, and how many there are: programs with fewer or more have other numbers."""


def roots_of(graph: Graph) -> dict[int, Root]:
    """The roots of a program, by the index of the operation."""
    live = [
        op.index
        for op in graph.ops
        if op.name in ROOTS and any(graph.uses[v] or v in graph.outputs for v in op.outputs)
    ]
    return {index: (number, len(live)) for number, index in enumerate(live)}


def roots_reached(graph: Graph, values: tuple[int, ...], through: frozenset[str]) -> list[int]:
    """Indices of the first roots of what is made of `values` by operations `through`."""
    todo, seen, found = list(values), {*values}, []
    while todo:
        for use, _ in graph.uses[todo.pop()]:
            if use.name in ROOTS:
                found.append(use.index)
            elif use.name in through:
                todo += {*use.outputs} - seen
                seen |= {*use.outputs}
    return sorted(found)


def root_behind(graph: Graph, value: int) -> int:
    """The index of the root that a factor is made of, the nearest one; -1 if there is none."""
    todo, seen = [value], {value}
    for at in todo:
        made = graph.producer[at]
        if made is not None and made[0].name in ROOTS:
            return made[0].index
        before = [v for v in (made[0].inputs if made else ()) if v not in seen]
        seen.update(before)
        todo += before
    return -1
