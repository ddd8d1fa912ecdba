"""LayerNorms that keep their mean, in the spelling of the variance that a backend likes best.

A TPU's compiler makes sums of ``x`` and of ``x**2`` in the product that writes ``x``, but a mean of
``(x - mean)**2`` takes another pass; XLA makes one kernel for GPUs of a norm in two passes, and
several of one in a single pass. Both spellings are exact algebra (theory, section 12); in one pass,
only what is stored in 16 bits keeps its digits, and it keeps all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .._compat import ClosedJaxpr, Jaxpr, JaxprEqn, Var, evaluate, is_explicit, trace_like
from ..analysis.facts import Facts
from ..analysis.layer_norms import LayerNorm, find_norms
from ..analysis.shift_algebra import exact_number
from ..axes.axis_set import AxisSet
from ..program.flatten import flatten
from ..program.graph import Graph, Op
from ..program.primitives import DIV, IDENTITIES, MOVES, MUL, SCALINGS
from .inline import inlined
from .jaxprs import live, reading, same
from .ones_products import as_before
from .roots import Root, roots_of, roots_reached
from .rounded import is_rounded
from .walk import Walk

_AROUND = frozenset({"integer_pow", "reduce_sum", "rsqrt", "sqrt", "square"})
_CAST = "convert_element_type"
_PASSES_ON = MOVES | IDENTITIES
_TO_THE_ROOT = SCALINGS | _PASSES_ON | frozenset("add clamp max min select_n sub".split())
_STORED = frozenset(map(np.dtype, (jnp.bfloat16, jnp.float16)))
_DIGITS = np.finfo(np.float32).nmant + 1
_EPSILON = 2.0**-80
"""What is added to a variance, at least: next to it, what underflows in one pass does not show."""
_DOWN, _LARGE = np.float32(2.0**-64), np.float32(2.0**-8)
"""What large numbers are multiplied by, and what sums of their squares are beyond."""
SHORT = 16
"""Bits of a number that does not show the last digits of a variance in float32."""


@dataclass(frozen=True, slots=True)
class Respelled:
    """A LayerNorm that keeps its mean, and takes one pass or two where it took the other number.

    `shape` is that of its input, `root` the root of its variance.

    Example:
        >>> from jax_lnfold import Respelled
        >>> Respelled("Bert/norm", shape=(2, 256, 768), two_pass=False, root=(0, 4)).two_pass
        False
    """

    module: str
    shape: tuple[int, ...]
    two_pass: bool
    root: Root | None


@dataclass(frozen=True, slots=True)
class _Change:
    """The sum of squares `op` becomes what `sums` makes of `atom`; `difference` is what it was in.

    Of a difference, which is then no longer needed, the first operand is left.
    """

    norm: LayerNorm
    op: Op
    value: int
    atom: Any
    sums: Callable[[jax.Array], jax.Array]
    difference: Op | None = None


def respelled(
    closed: ClosedJaxpr, leaves: Sequence[str], spelling: str
) -> tuple[ClosedJaxpr, tuple[Respelled, ...]]:
    """The program with the LayerNorms in it spelled in ``"one_pass"`` or in ``"two_pass"``.

    Those in which something else than their plain arithmetic happens stay. The first inputs are the
    parameters named by `leaves`.
    """
    program = inlined(closed, _AROUND)
    rewriter = _Rewriter(program, leaves, spelling)
    result = rewriter.closed(program, ())
    return (closed if result is program else result), tuple(rewriter.made)


class _Rewriter(Walk):
    def __init__(self, program: ClosedJaxpr, leaves: Sequence[str], spelling: str) -> None:
        super().__init__(flatten(program, leaves))
        facts = Facts(self.graph)
        self.roots = roots_of(self.graph)
        find = _in_one_pass if spelling == "one_pass" else _in_two_passes
        norms = [norm for norm in find_norms(facts).found if norm.root is not None]
        changes = [change for norm in norms for change in find(facts, norm)]
        self.changes = {change.op.index: change for change in changes}
        self.made: list[Respelled] = []

    def body(self, jaxpr: Jaxpr, path: tuple[int, ...]) -> Jaxpr:
        """The jaxpr with other sums of squares, the very same one where there are none."""
        ops = [self.graph.op_at.get((*path, index)) for index in range(len(jaxpr.eqns))]
        changes = [self.changes.get(op.index) if op is not None else None for op in ops]
        gone = {c.difference.index for c in changes if c is not None and c.difference is not None}
        eqns: list[JaxprEqn] = []
        renamed: dict[Any, Any] = {}
        for index, (eqn, op, change) in enumerate(zip(jaxpr.eqns, ops, changes, strict=True)):
            now = reading(eqn, [_renamed(a, renamed) for a in eqn.invars])
            if change is not None:
                eqns.append(_call(change, self.graph))
                self.made.append(self._told(change))
            elif op is not None and op.index in gone:
                renamed[eqn.outvars[0]] = now.invars[0]
            else:
                eqns.append(self.inside(now, (*path, index)))
        if same(eqns, jaxpr.eqns):
            return jaxpr
        outvars = [_renamed(a, renamed) for a in jaxpr.outvars]
        return jaxpr.replace(eqns=live(eqns, outvars), outvars=outvars)

    def _told(self, change: _Change) -> Respelled:
        root = change.norm.root
        assert root is not None
        return Respelled(
            change.norm.module,
            self.graph.shape(change.value),
            change.difference is not None,
            self.roots.get(root.index),
        )


def _renamed(atom: Any, renamed: dict[Any, Any]) -> Any:
    return renamed.get(atom, atom) if isinstance(atom, Var) else atom


def _call(change: _Change, graph: Graph) -> JaxprEqn:
    """One call to a function of its own name that makes the sum."""
    (eqn,) = trace_like(jax.jit(change.sums), graph.avals[change.value]).eqns
    return eqn.replace(invars=[change.atom], outvars=change.op.eqn.outvars)


# --- from two passes to one -----------------------------------------------------------------------


def _in_one_pass(facts: Facts, norm: LayerNorm) -> Iterator[_Change]:
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
            # Sums of so many numbers, and of the halves of their squares, are exact.
            if (jnp.finfo(stored).nmant + 1) + count.bit_length() >= _DIGITS:
                continue
            if _ends_in(graph, op, norm) and _hides_underflow(graph, op):
                yield _Change(norm, op, x, atom, _one_pass(axes, count, np.dtype(stored)))


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
    reached = roots_reached(graph, op.outputs, _TO_THE_ROOT)
    of_norm = norm.root is not None and norm.root.index in reached
    return of_norm and is_rounded(graph, op.outputs, SHORT)


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


def _one_pass(
    axes: Sequence[int], count: int, dtype: np.dtype[Any]
) -> Callable[[jax.Array], jax.Array]:
    """The sum of squares about the mean, from sums of `x` and its squares; derivatives as before.

    Numbers of `dtype` have squares of twice its digits. Split in halves, these have sums without
    rounding where it matters: where all are about as large as the mean. With a number p of `dtype`
    near the mean, ``sum((x - mean)**2) = sum(x**2 - p**2) - 2 p d - d**2 / n``, d = sum(x - p).
    """
    digits, n = jnp.finfo(dtype).nmant, np.float32(count)

    def halves(square: jax.Array) -> tuple[jax.Array, jax.Array]:
        upper = lax.reduce_precision(square, 8, digits)
        return upper, square - upper

    def about_mean(upper: jax.Array, lower: jax.Array, total: jax.Array) -> jax.Array:
        near = lax.reduce_precision(total / n, 8, digits)
        more, rest = halves(near * near)
        squares = (upper - n * more) + (lower - n * rest)
        moved = total - n * near
        return squares - 2 * near * moved - moved * moved / n

    def in_one_pass(x: jax.Array) -> jax.Array:
        upper, lower = (jnp.sum(half, axis=axes) for half in halves(x * x))
        total = jnp.sum(x, axis=axes)
        found = about_mean(upper, lower, total)
        if jnp.finfo(dtype).maxexp > 64:  # once more where squares leave float32, or are about to
            large = jnp.sum(lax.square(x * _DOWN), axis=axes)
            scaled = about_mean(large, jnp.zeros_like(large), total * _DOWN)
            is_large = large > _LARGE
            up = jnp.where(is_large, 1 / _DOWN, 1)  # a constant squared would be infinite
            found = jnp.where(is_large, scaled, found) * up * up
        return lax.max(found, np.float32(0))

    def sum_of_squares_about_mean(x: jax.Array) -> jax.Array:
        return as_before(in_one_pass, _two_passes(axes, count))(x)

    return sum_of_squares_about_mean


# --- from one pass to two -------------------------------------------------------------------------


def _in_two_passes(facts: Facts, norm: LayerNorm) -> Iterator[_Change]:
    """Differences ``a sum(x**2) - b sum(x)**2``, ``a = b n``, that end in the root of a norm."""
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
        if found is None or not _ends_in_root(graph, found, norm):
            continue
        sums = _two_passes(op.params["axes"], count)
        yield _Change(norm, op, x, atom, sums, found)


def _is_input_of(graph: Graph, x: int, norm: LayerNorm) -> bool:
    """Whether the norm averages this very value."""
    return any(_alike(graph, x, op.inputs[0]) for op in norm.sums)


def _alike(graph: Graph, one: int, other: int) -> bool:
    """Whether two values are the same numbers, each cast by itself perhaps."""

    def source(value: int) -> tuple[int, Any]:
        dtype, made = graph.avals[value].dtype, graph.producer[value]
        return graph.same[made[0].inputs[0] if made and made[0].name == _CAST else value], dtype

    return source(one) == source(other) or graph.same[one] == graph.same[other]


def _ends_in_root(graph: Graph, op: Op, norm: LayerNorm) -> bool:
    reached = roots_reached(graph, op.outputs, _TO_THE_ROOT)
    return norm.root is not None and norm.root.index in reached


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


def _two_passes(axes: Sequence[int], count: int) -> Callable[[jax.Array], jax.Array]:
    """The sum of squares about the mean as a LayerNorm in two passes has it."""

    def sum_of_squares_about_mean(x: jax.Array) -> jax.Array:
        mean = jnp.sum(x, axis=axes, keepdims=True) / np.asarray(count, x.dtype)
        return jnp.sum(lax.square(x - mean), axis=axes)

    return sum_of_squares_about_mean
