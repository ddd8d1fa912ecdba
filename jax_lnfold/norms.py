"""Finds the LayerNorms of a program by how their arithmetic responds to a shift.

A LayerNorm over axes S of ``x`` is a value that does not respond to a shift of ``x`` uniform along
S, divided by the root of a variance that does not respond either. BatchNorm with stored
statistics, RMSNorm and softmax lack one of the two.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

import jax.numpy as jnp

from .axes import AxisSet
from .facts import Claim, Facts
from .graph import Graph, Op
from .tracking import Tracker

_CASTS = frozenset({"convert_element_type", "copy", "stop_gradient", "name", "reduce_precision"})
# What a centered value passes through on its way to the quotient, and a variance besides.
_SCALING = _CASTS | frozenset(
    "mul div neg broadcast_in_dim reshape squeeze expand_dims transpose sharding_constraint "
    "optimization_barrier".split()
)
_CARRIES = _SCALING | frozenset("add sub max min clamp pow sqrt rsqrt integer_pow select_n".split())
_ROOTS = frozenset({"rsqrt", "sqrt", "pow"})


@dataclass(frozen=True)
class LayerNorm:
    """One LayerNorm of the program.

    `x` and `along` are its input and the axes it averages over; `root` takes the root of its
    variance and `sums` are the equations that compute the sum of ``x`` over `along`.
    """

    x: int
    along: AxisSet
    root: Op
    sums: tuple[Op, ...]
    elements: int


@dataclass(frozen=True)
class Norms:
    """All LayerNorms in program order, and the values that are zero-mean because of a centering."""

    found: tuple[LayerNorm, ...]
    centered: dict[int, AxisSet]


def find_norms(facts: Facts) -> Norms:
    """Every LayerNorm of the program, foldable or not."""
    graph = facts.graph
    found: dict[int, LayerNorm] = {}
    centered: dict[int, AxisSet] = {}
    for x, along in _candidates(graph):
        for keep_products in (False, True):
            tracker = Tracker(graph, x, along, facts.context, keep_products, stop_early=False)
            tracker.run()
            if not tracker.cancelled:
                continue
            shape = graph.shape(x)
            centered.update(
                (c.value, AxisSet.over(shape, c.centered)) for c in tracker.cancelled if c.centered
            )
            for root in _normalising_roots(graph, tracker, along):
                whole = frozenset(along.axes)
                sums = {op.index: op for op, axes in tracker.sums if axes == whole}
                if (known := found.get(root.index)) is not None:
                    sums |= {op.index: op for op in known.sums}
                ordered = tuple(sums[i] for i in sorted(sums))
                found[root.index] = LayerNorm(x, along, root, ordered, _elements(graph, x))
    return Norms(tuple(found[i] for i in sorted(found)), centered)


def _candidates(graph: Graph) -> Iterable[Claim]:
    """Inputs of sums, seen through casts: (value, axes summed over)."""
    seen: dict[Claim, None] = {}
    for op in graph.ops:
        if op.name != "reduce_sum":
            continue
        x = op.inputs[0]
        if not jnp.issubdtype(graph.avals[x].dtype, jnp.floating):
            continue
        while (made := graph.producer[x]) is not None and made[0].name in _CASTS:
            if not jnp.issubdtype(graph.avals[made[0].inputs[0]].dtype, jnp.floating):
                break
            x = made[0].inputs[0]
        along = AxisSet.over(graph.shape(x), op.params["axes"])
        if not along.trivial:
            seen[x, along] = None
    return seen


def _normalising_roots(graph: Graph, tracker: Tracker, along: AxisSet) -> list[Op]:
    """Roots of a variance by which a value without a mean is scaled."""
    centered = {c.value for c in tracker.cancelled if c.centered == frozenset(along.axes)}
    variances = {c.value for c in tracker.cancelled if c.quadratic}
    variances |= _mean_squares(graph, centered, along)
    if not variances:
        return []
    numerators = _reach(graph, centered, through=_SCALING)
    combined = [c for c in tracker.cancelled if c.factors]
    roots = []
    for op in _uses_within(graph, _reach(graph, variances, stop=_ROOTS)):
        if op.name not in _ROOTS:
            continue
        scales = _reach(graph, set(op.outputs), avoid=numerators)
        tokens = {f"{sign}{v}" for v in scales for sign in "*/"}
        if any(c.factors & tokens for c in combined) or any(
            _joins(use, v, numerators, scales) for v in scales for use, _ in graph.uses[v]
        ):
            roots.append(op)
    return roots


def _joins(op: Op, scale: int, numerators: set[int], scales: set[int]) -> bool:
    """Whether `op` multiplies or divides a centered value, not itself a scale, by `scale`."""
    if op.name not in ("mul", "div"):
        return False
    other = op.inputs[1] if op.inputs[0] == scale else op.inputs[0]
    return other in numerators and other not in scales


def _mean_squares(graph: Graph, centered: set[int], along: AxisSet) -> set[int]:
    """Sums over S of squares of centered values: the two-pass variance."""
    squares = set()
    for v in _reach(graph, centered, through=_CASTS):
        for op, _ in graph.uses[v]:
            power = op.name == "integer_pow" and op.params["y"] == 2
            if op.name == "square" or power or (op.name == "mul" and len(set(op.inputs)) == 1):
                squares.add(op.outputs[0])
    axes = {d for d in along.axes}
    sums = set()
    for v in _reach(graph, squares, through=_CASTS):
        for op, _ in graph.uses[v]:
            if op.name == "reduce_sum" and axes <= set(op.params["axes"]):
                sums.add(op.outputs[0])
    return sums


def _reach(
    graph: Graph,
    start: set[int],
    through: frozenset[str] = _CARRIES,
    stop: frozenset[str] = frozenset(),
    avoid: Container[int] = (),
) -> set[int]:
    """Values computed from `start` by steps `through`, but not `stop` nor with what to `avoid`."""
    reached, todo = set(start), list(start)
    while todo:
        for op, _ in graph.uses[todo.pop()]:
            usable = op.name in through and op.name not in stop
            if usable and not any(v in avoid for v in op.inputs):
                fresh = [v for v in op.outputs if v not in reached]
                reached.update(fresh)
                todo.extend(fresh)
    return reached


def _uses_within(graph: Graph, values: set[int]) -> list[Op]:
    ops: dict[int, Any] = {op.index: op for v in values for op, _ in graph.uses[v]}
    return [ops[i] for i in sorted(ops)]


def _elements(graph: Graph, value: int) -> int:
    return prod(n for n in graph.shape(value) if isinstance(n, int))
