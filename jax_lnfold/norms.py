"""Finds the LayerNorms of a program by how their arithmetic responds to a shift.

A LayerNorm over axes S of ``x`` is a value that does not respond to a shift of ``x`` uniform along
S, divided by the root of a variance that does not respond either. BatchNorm with stored
statistics, RMSNorm and softmax lack one of the two.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass, replace
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

    `x` and `along` are its input and the axes it averages over, `sums` the equations that compute
    the sum of ``x`` over `along`, `module` the path of the module it stands in. It runs `count`
    times in one call, on `elements` numbers in all.
    """

    x: int
    along: AxisSet
    sums: tuple[Op, ...]
    module: str
    elements: int
    count: int


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
    source: dict[Claim, LayerNorm] = {}  # what a centered value is centered from
    for x, along in _candidates(graph):
        for keep_products in (False, True):
            tracker = Tracker(graph, x, along, facts.context, keep_products, stop_early=False)
            tracker.run()
            if not tracker.cancelled:
                continue
            whole = frozenset(along.axes)
            sums = {op.index: op for op, axes in tracker.sums if axes == whole}
            # A mean taken of a value that has none already belongs to the norm that removed it.
            origin = source.get((x, along))
            if origin is not None:
                sums |= {op.index: op for op in origin.sums}
            norm = origin or LayerNorm(x, along, (), "", *_size(graph, x))
            for c in tracker.cancelled:
                if c.centered:
                    centered[c.value] = AxisSet.over(graph.shape(x), c.centered)
                if c.centered == whole:
                    source[c.value, along] = replace(norm, sums=_in_order(sums))
            for root in _normalising_roots(graph, tracker, along, {x} if origin else set()):
                if (known := found.get(root.index)) is not None:
                    sums |= {op.index: op for op in known.sums}
                found[root.index] = replace(norm, sums=_in_order(sums), module=root.module)
    return Norms(tuple(found[i] for i in sorted(found)), centered)


def _in_order(ops: dict[int, Op]) -> tuple[Op, ...]:
    return tuple(ops[i] for i in sorted(ops))


def _candidates(graph: Graph) -> Iterable[Claim]:
    """Inputs of sums, seen through casts and constant factors: (value, axes summed over)."""
    seen: dict[Claim, None] = {}
    for op in graph.ops:
        if op.name != "reduce_sum":
            continue
        x: int | None = op.inputs[0]
        while x is not None and jnp.issubdtype(graph.avals[x].dtype, jnp.floating):
            made = graph.producer[x]
            if made is None or made[0].name not in _CASTS:
                along = AxisSet.over(graph.shape(x), op.params["axes"])
                if not along.trivial:
                    seen[x, along] = None
            x = _unscaled(graph, made[0]) if made else None
    return seen


def _unscaled(graph: Graph, op: Op) -> int | None:
    """The operand of which `op` makes a constant multiple, if it does."""
    if op.name in _CASTS or op.name == "neg":
        return op.inputs[0]
    for factor, other in ((1, 0), (0, 1)) if op.name == "mul" else ((1, 0),):
        if op.name in ("mul", "div") and graph.scalar(op.inputs[factor]) is not None:
            return op.inputs[other]
    return None


def _normalising_roots(graph: Graph, tracker: Tracker, along: AxisSet, known: set[int]) -> list[Op]:
    """Roots of a variance by which a value without a mean (`known` ones included) is scaled."""
    centered = {c.value for c in tracker.cancelled if c.centered == frozenset(along.axes)}
    variances = {c.value for c in tracker.cancelled if c.quadratic}
    variances |= _mean_squares(graph, centered, along)
    if not variances:
        return []
    numerators = _reach(graph, centered | known, through=_SCALING)
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
    axes = set(along.axes)
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


def _size(graph: Graph, value: int) -> tuple[int, int]:
    """Elements computed in one call, and in how many pieces."""
    count = graph.trips[graph.home[value]]
    return prod(n for n in graph.shape(value) if isinstance(n, int)) * count, count
