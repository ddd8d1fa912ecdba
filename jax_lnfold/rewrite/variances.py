"""Where a LayerNorm takes its variance, if by no more than plain arithmetic in one place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._compat import Var, evaluate, is_explicit
from ..analysis.facts import Facts
from ..analysis.layer_norms import LayerNorm
from ..analysis.shift_algebra import exact_number
from ..analysis.shift_tracker import Tracker
from ..axes.axis_set import AxisSet
from ..program.graph import Graph, Op
from ..program.primitives import DIV, IDENTITIES, MOVES, MUL, SCALINGS
from .about_mean import one_pass_sum, two_pass_sum
from .roots import TO_THE_ROOT, roots_reached
from .rounded import is_rounded

_CAST = "convert_element_type"
_PASSES_ON = MOVES | IDENTITIES
_STORED = frozenset(map(np.dtype, (jnp.bfloat16, jnp.float16)))
_DIGITS = np.finfo(np.float32).nmant + 1
_EPSILON = 2.0**-80
"""What is added to a variance, at least: next to it, what underflows in one pass does not show."""
SHORT = 16
"""Bits of a number that does not show the last digits of a variance in float32."""


@dataclass(frozen=True, slots=True)
class Change:
    """The sum of squares `op` becomes what `sums` makes of `atom`; `difference` is what it was in.

    Of a difference, which is then no longer needed, the first operand is left.
    """

    norm: LayerNorm
    op: Op
    value: int
    atom: Any
    sums: Callable[[jax.Array], jax.Array]
    difference: Op | None = None


# --- from two passes to one -----------------------------------------------------------------------


def in_one_pass(facts: Facts, norm: LayerNorm) -> Iterator[Change]:
    """Sums of squares of ``x - mean(x)`` that end in the root of a norm, where `x` has few digits.

    That a value has no mean is proved of it. If it is ``x - b``, and b is uniform, then b is the
    mean of x.
    """
    graph = facts.graph
    for value, along in norm.centered:
        made = graph.producer[value]
        if made is None or made[0].name != "sub" or not facts.uniform(made[0].inputs[1], along):
            continue
        x, atom = made[0].inputs[0], made[0].eqn.invars[0]
        stored = _stored(graph, x)
        for op in _sums_of_squares(graph, value):
            axes = op.params["axes"]
            usable = made[0].path == op.path and isinstance(atom, Var) and stored is not None
            usable = usable and AxisSet.over(graph.shape(value), axes) == along
            count = _count(graph, op)
            if not (usable and count and graph.avals[x].dtype == np.float32):
                continue
            if not _is_as_exact(graph, made[0].inputs[1], x, count):
                continue
            # Sums of so many numbers, and of the halves of their squares, are exact.
            if (jnp.finfo(stored).nmant + 1) + count.bit_length() >= _DIGITS:
                continue
            if _ends_in(graph, op, norm) and _hides_underflow(graph, op):
                yield Change(norm, op, x, atom, one_pass_sum(axes, count, np.dtype(stored)))


def _is_as_exact(graph: Graph, mean: int, x: int, count: int) -> bool:
    """Whether a mean is made of the numbers x in their own digits, with derivatives.

    What a rounded mean is off by is in the squares of ``x - mean``, too, and no variance has it.
    """
    while not _alike(graph, mean, x):
        made = graph.producer[mean]
        op = made[0] if made is not None else None
        if op is None or graph.avals[mean].dtype != graph.avals[x].dtype:
            return False
        known = [v for v in op.inputs[:2] if _scaled(graph, op, v, count) is not None]
        if not (known or op.name == "reduce_sum"):
            return False
        mean = op.inputs[0] if op.name == "reduce_sum" else known[0]
    return True


def _sums_of_squares(graph: Graph, value: int) -> Iterator[Op]:
    squares = (op.outputs[0] for op, _ in graph.uses[value] if op.is_square)
    uses = (op for square in {*squares} for op, _ in graph.uses[square])
    return (op for op in uses if op.name == "reduce_sum")


def _count(graph: Graph, op: Op) -> int:
    """How many numbers each of the sums has; 0 where that is not known, or none of ours."""
    x = op.inputs[0]
    sizes = [graph.shape(x)[d] for d in op.params["axes"]]
    known = all(isinstance(n, int) for n in sizes) and not is_explicit(graph.avals[x])
    return prod(sizes) if known else 0


def _stored(graph: Graph, value: int) -> Any:
    """The dtype of 16 bits that a value has been rounded to, if to any, and only moved since."""
    while (made := graph.producer[value]) is not None and made[0].name in _PASSES_ON:
        (value,) = made[0].inputs[:1]
        if not jnp.issubdtype(graph.avals[value].dtype, jnp.floating):
            return None
        if graph.avals[value].dtype in _STORED:
            return graph.avals[value].dtype
    return None


def _ends_in(graph: Graph, op: Op, norm: LayerNorm) -> bool:
    """Whether the sum is that of the norm, and its last digits are rounded away."""
    return _reaches(graph, op, norm) and is_rounded(graph, op.outputs, SHORT)


def _reaches(graph: Graph, op: Op, norm: LayerNorm) -> bool:
    """Whether what an operation makes goes into the root of the norm."""
    reached = roots_reached(graph, op.outputs, TO_THE_ROOT)
    return norm.root is not None and norm.root.index in reached


def _hides_underflow(graph: Graph, op: Op) -> bool:
    """Whether a number is added to what is made of the sum before anything else reads it."""
    todo, seen = list(op.outputs), {*op.outputs}
    while todo:
        value = todo.pop()
        if value in graph.outputs:
            return False
        for use, position in graph.uses[value]:
            other = _number(graph, use.inputs[1 - position]) if len(use.inputs) == 2 else None
            if use.name in ("add", "max") and other is not None and _EPSILON <= other < np.inf:
                continue
            if not (use.name in _PASSES_ON or _shrinks(graph, use, position, other)):
                return False
            todo += {*use.outputs} - seen
            seen |= {*use.outputs}
    return True


def _shrinks(graph: Graph, op: Op, position: int, number: Any) -> bool:
    """Whether differences of an operand become no larger: of one in a choice that is fixed, too."""
    if op.name == "select_n":
        return position > 0 and graph.fixed[op.inputs[0]]
    if number is None:
        return False
    if op.name == DIV:
        return position == 0 and bool(number >= 1)
    return op.name == "max" or (op.name == MUL and bool(0 < number <= 1))


def _number(graph: Graph, value: int) -> Any:
    """The number that every element of a value has, if the program fixes it or computes it."""
    while (made := graph.producer[value]) is not None and made[0].name in MOVES:
        value = made[0].inputs[0]
    if made is None or graph.shape(value) or not graph.fixed[value]:
        return graph.scalar(value)
    operands = [_number(graph, v) for v in made[0].inputs]
    if any(n is None for n in operands) or made[0].role:
        return None
    return np.asarray(evaluate(made[0].eqn, operands)[made[1]])


# --- from one pass to two -------------------------------------------------------------------------


def in_two_passes(facts: Facts, norm: LayerNorm) -> Iterator[Change]:
    """Differences ``a sum(x**2) - b sum(x)**2``, ``a = b n``, that end in the root of a norm.

    They are proved not to respond to a shift of x, so the two sums are of the same numbers.
    """
    graph = facts.graph
    for op in graph.ops:
        made = graph.producer[op.inputs[0]] if op.name == "reduce_sum" else None
        if made is None or not made[0].is_square or made[0].path != op.path:
            continue
        x, atom, count = made[0].inputs[0], made[0].eqn.invars[0], _count(graph, op)
        wide = graph.avals[x].dtype in (np.float32, np.float64)
        if not (wide and count and isinstance(atom, Var) and _is_input_of(graph, x, norm)):
            continue
        found = _difference(graph, op, count)
        if found is None or not _is_variance(facts, found, norm):
            continue
        sums = two_pass_sum(op.params["axes"], count)
        yield Change(norm, op, x, atom, sums, found)


def _is_input_of(graph: Graph, x: int, norm: LayerNorm) -> bool:
    """Whether the norm averages this very value."""
    return any(_alike(graph, x, op.inputs[0]) for op in norm.sums)


def _alike(graph: Graph, one: int, other: int) -> bool:
    """Whether two values are the same numbers, each cast by itself perhaps."""

    def source(value: int) -> tuple[int, Any]:
        dtype, made = graph.avals[value].dtype, graph.producer[value]
        return graph.same[made[0].inputs[0] if made and made[0].name == _CAST else value], dtype

    return source(one) == source(other) or graph.same[one] == graph.same[other]


def _is_variance(facts: Facts, op: Op, norm: LayerNorm) -> bool:
    """Whether the shift that a norm does not notice cancels here, on the way to its root."""
    tracker = Tracker(facts.graph, norm.x, norm.along, facts.context, stop_early=False, named=True)
    tracker.run()
    cancels = any(c.value == op.outputs[0] and c.quadratic for c in tracker.cancelled)
    return cancels and _reaches(facts.graph, op, norm)


def _difference(graph: Graph, op: Op, count: int) -> Op | None:
    """The difference that only the sum of squares `op` is for, if it is a variance."""
    value, factor = op.outputs[0], Fraction(1)
    while len(graph.uses[value]) == 1 and value not in graph.outputs:
        (use, position), *_ = graph.uses[value]
        if use.name == "sub":
            whole = position == 0 and use.path == op.path
            whole = whole and graph.avals[value] == graph.avals[use.outputs[0]]
            other = _of_squared_sum(graph, use.inputs[1], op, count)
            return use if whole and other is not None and factor == other * count else None
        step = _scaled(graph, use, value, count)
        if step is None:
            return None
        factor, value = factor * step, use.outputs[0]
    return None


def _of_squared_sum(graph: Graph, value: int, squares: Op, count: int) -> Fraction | None:
    """Of ``b sum(x)**2`` the b, where the sum is over the same numbers as that of squares."""
    factor, power = Fraction(1), 1
    x = graph.producer[squares.inputs[0]]
    while (made := graph.producer[value]) is not None:
        op = made[0]
        if op.name == "reduce_sum":
            alike = x is not None and _alike(graph, op.inputs[0], x[0].inputs[0])
            alike = alike and op.params["axes"] == squares.params["axes"]
            return factor if alike and power == 2 else None
        if op.is_square:
            power *= 2
            value = op.inputs[0]
            continue
        for before in op.inputs[:2]:
            if (step := _scaled(graph, op, before, count)) is not None:
                factor, value = factor * step**power, before
                break
        else:
            return None
    return None


def _scaled(graph: Graph, op: Op, value: int, count: int) -> Fraction | None:
    """By what the operation multiplies the value, if it does nothing else to it."""
    if op.name in MOVES:
        return Fraction(1)
    dtypes = {graph.avals[v].dtype for v in (value, op.outputs[0])}
    if op.name in IDENTITIES and op.name != "reduce_precision":
        return Fraction(1) if len(dtypes) == 1 else None
    if op.name not in SCALINGS or value not in op.inputs:
        return None
    position = op.inputs.index(value)
    number = graph.scalar(op.inputs[1 - position])
    if number is None or not np.isfinite(number) or number == 0:
        return None
    exact = exact_number(number, [count])
    if op.name == DIV:
        return 1 / exact if position == 0 else None
    return exact
