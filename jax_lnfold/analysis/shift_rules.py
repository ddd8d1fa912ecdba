"""What becomes of a shift in one equation: sums, products and moves, computed exactly.

Axes matter as much as numbers: every value knows which axis of the root each of its axes is.
Examples are in the words of `shift_example`: x is the root, u its shift.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from math import prod

import numpy as np

from ..axes.axis_set import AxisSet
from ..program.graph import Graph, Op
from ..program.primitives import DIV, MOVES, SCALINGS
from ..rules import axis_map
from .shift_algebra import (
    Refused,
    Sum,
    Tracked,
    exact_number,
    ordered,
    product,
    scaled,
    stopped,
    summed,
    total,
)

_DEPTH = 4
"""How far products are taken apart into their factors."""

Operands = list[Tracked | None]
"""Of each operand how it responds, None if it does not."""


class _Notices(Exception):
    """There is no arithmetic for an operation, or none for it with these operands."""


class Arithmetic:
    """Responses to a root shifted uniformly along `along`.

    `sums` collects the equations met that sum over axes of the root, with these axes. If `named`,
    other values are known by the equations that make them: those of equal equations are one value,
    and a product is its factors.
    """

    def __init__(self, graph: Graph, along: AxisSet, named: bool) -> None:
        """Start with the sizes of the root as the only counts known."""
        self.graph, self.along, self.named = graph, along, named
        self.sums: list[tuple[Op, frozenset[int]]] = []
        self._counts = {n for n in along.shape if isinstance(n, int)}

    def respond(self, op: Op, operands: Operands, refusal: str) -> Tracked | None:
        """The response of the output of `op`, None if it never responds.

        The response r(u) is what is added: ``f(x + u) = f(x) + r(u)``. What is not among
        `_RESPONSES`, or is used in a way that has no arithmetic, notices the shift: a `Refused`
        with the words `refusal`.

        >>> respond(lambda x: jnp.tanh(x), (2, 3), along=[1])
        refused: notices a shift
        """
        if any(t is not None and t.grows for t in operands):
            return self._grow(op, operands)
        try:
            return _RESPONSES.get(op.name, _notice)(self, op, operands)
        except _Notices:
            raise Refused(refusal) from None

    def _exponential(self, op: Op, operands: Operands) -> Tracked:
        """What is shifted in its derivatives alone is multiplied there.

        ``exp(x + u) = exp(x) exp(u)``, if u cancels in the values: they are as far from overflowing
        as they were.

        >>> respond(lambda x: jnp.exp(x - jax.lax.stop_gradient(x)), (2, 3), along=[1])
        times exp(-u' + u)
        >>> respond(jnp.exp, (2, 3), along=[1])
        refused: ...
        """
        t = _shifted(operands)
        if stopped(t).response:
            raise _Notices
        return Tracked(t.response, None, t.dims, grows=True)

    def _position(self, op: Op, operands: Operands) -> Tracked | None:
        """The largest of numbers that are all shifted alike stays where it is.

        ``argmax_S(x + u) = argmax_S(x)``. Reads `axes`.

        >>> respond(lambda x: x.argmax(1), (2, 3), along=[1])
        0
        >>> respond(lambda x: x.argmax(0), (2, 3), along=[1])
        refused: reduces over positions that would be shifted by different numbers
        """
        self._check_uniform(_shifted(operands), op.params["axes"])
        return None

    def _extremum(self, op: Op, operands: Operands) -> Tracked:
        """The largest of numbers that are all shifted alike is shifted like them.

        ``max_S(x + u) = max_S(x) + u``. Reads `axes`.

        >>> respond(lambda x: x.max(1), (2, 3), along=[1])
        u
        >>> respond(lambda x: x.max(0), (2, 3), along=[1])
        refused: reduces over positions that would be shifted by different numbers
        """
        t = _shifted(operands)
        self._check_uniform(t, op.params["axes"])
        return Tracked(t.response, None, _without(t.dims, op.params["axes"]))

    def _maximum(self, op: Op, operands: Operands) -> Tracked | None:
        """A maximum with -inf is the identity; any other notices the shift.

        ``max(x + u, -inf) = x + u``.

        >>> respond(lambda x: jnp.maximum(x, -jnp.inf), (2, 3), along=[1])
        u
        >>> respond(lambda x: jnp.maximum(x, 0.0), (2, 3), along=[1])
        refused: ...
        """
        a, b = operands
        other = [v for v, t in zip(op.inputs, operands, strict=True) if t is None]
        number = self.graph.scalar(other[0]) if other else None
        if number is None or not np.isneginf(float(number)):
            raise _Notices
        return a or b

    def _negate(self, op: Op, operands: Operands) -> Tracked:
        """The response changes its sign.

        ``-(x + r) = -x - r``.

        >>> respond(lambda x: -x, (2, 3), along=[1])
        -u
        """
        return scaled(_single(operands), Fraction(-1))

    def _square(self, op: Op, operands: Operands) -> Tracked:
        """A square responds as a product does; other powers notice the shift.

        ``(x + u)**2 = x**2 + 2 x u + u**2``. Reads `y` of powers.

        >>> respond(lambda x: x**2, (2, 3), along=[1])
        2 x u + u**2
        >>> respond(lambda x: x**3, (2, 3), along=[1])
        refused: ...
        """
        if not op.is_square:
            raise _Notices
        t = _single(operands)
        return product(t, t)

    def _check_uniform(self, t: Tracked, axes: Sequence[int]) -> None:
        """Refuse to reduce over axes along which u differs: neither n u nor a maximum then."""
        for axis in axes:
            d = t.dims[axis]
            if d is not None and not self.along.uniform_along(d):
                raise Refused("reduces over positions that would be shifted by different numbers")

    def _move(self, op: Op, operands: Operands) -> Tracked:
        """Axes appear, disappear or swap; those that matter keep their order of elements.

        ``move(x + u) = move(x) + move(u)``. Reads `permutation` of a transpose and
        `broadcast_dimensions` of a broadcast.

        >>> respond(lambda x: x - jnp.broadcast_to(x.mean(1)[:, None], (2, 3)), (2, 3), along=[1])
        0
        >>> respond(lambda x: x.T + x, (3, 3), along=[1])
        refused: combines axes that do not line up
        >>> respond(lambda x: x.reshape(6), (2, 3), along=[1])
        refused: reshapes the shifted value
        """
        t = _single(operands)
        if t.factors:  # values of the program whose axes would have to move along
            raise Refused("moves the shifted value")
        before, kept = self.graph.shape(op.inputs[0]), axis_map(self.graph, op)
        # Only axes of size 1 may come and go: else an axis of the result is none of the root.
        if any(n != 1 and d not in kept for d, n in enumerate(before)):
            raise Refused("reshapes the shifted value")
        back = {o: t.dims[d] for d, o in kept.items()}
        return replace(t, dims=tuple(map(back.get, range(len(self.graph.shape(op.outputs[0]))))))

    def _grow(self, op: Op, operands: Operands) -> Tracked:
        """An exponential is multiplied, and so are its sums, products and quotients.

        ``exp(x + u) = exp(x) exp(u)``. Only shifts that cancel in the values get here: of others,
        the exponential might overflow. Reads `axes` of sums.

        >>> def spread(x):
        ...     return jnp.exp(x - jax.lax.stop_gradient(x.max(1, keepdims=True)))
        >>> respond(lambda x: spread(x).sum(1), (2, 3), along=[1])
        times exp(-u' + u)
        >>> respond(lambda x: spread(x) / spread(x).sum(1, keepdims=True), (2, 3), along=[1])
        0
        >>> respond(lambda x: spread(x).sum(1) + 1.0, (2, 3), along=[1])
        refused: combines an exponential of the shifted value with other values
        >>> respond(jnp.exp, (2, 3), along=[1])
        refused: ...
        """
        if any(t is not None and not t.grows for t in operands):
            raise Refused("combines a shifted value with an exponential of it")
        first, name = operands[0], op.name
        if name in MOVES and first:
            return self._move(op, operands)
        if name == "reduce_sum" and first:
            self._check_uniform(first, op.params["axes"])
            return replace(first, dims=_without(first.dims, op.params["axes"]))
        if name in ("log", "abs") and first:
            return replace(first, grows=name == "abs")
        if name in SCALINGS:
            signs = (1, -1 if name == DIV else 1)
            pairs = zip(operands, signs, strict=True)
            parts = [scaled(t, Fraction(sign)) for t, sign in pairs if t is not None]
            growth = parts[0] if len(parts) == 1 else total(*parts)
            return replace(growth, dims=self._aligned(op, parts), grows=True)
        raise Refused("combines an exponential of the shifted value with other values")

    def _sum(self, op: Op, operands: Operands) -> Tracked:
        """A sum over n positions counts the shift n times, if it is uniform along them.

        ``sum(x + u) = sum(x) + n u``. Reads `axes`.

        >>> respond(lambda x: x.sum(1), (2, 3), along=[1])
        3 u
        >>> respond(lambda x: x.sum(0), (2, 3), along=[1])
        refused: reduces over positions that would be shifted by different numbers
        """
        t, axes = _single(operands), op.params["axes"]
        self._check_uniform(t, axes)
        shape = self.graph.shape(op.inputs[0])
        if t.factors or not all(isinstance(shape[a], int) for a in axes):
            raise Refused("sums products with the shifted value")
        n = prod(shape[a] for a in axes)
        named = [t.dims[a] for a in axes if shape[a] != 1]
        real = frozenset(d for d in named if d is not None)
        if real and None in named:  # some terms count several times: no plain sum of x
            raise Refused("sums repeated values")
        self._counts.add(n)
        result = summed(t, real, n)
        if real and result.form is not None and len(result.form) == 1:
            (factor,) = result.form
            if isinstance(factor, Sum) and factor.axes:
                self.sums.append((op, frozenset(factor.axes)))
                self._counts.add(prod(self.along.shape[d] for d in factor.axes))
        return replace(result, dims=_without(t.dims, axes))

    def _add(self, op: Op, operands: Operands) -> Tracked:
        """Responses add up, and may cancel.

        ``(x + r) - (y + s) = (x - y) + (r - s)``.

        >>> respond(lambda x, y: x + y, (2, 3), (2, 3), along=[1])
        u
        >>> respond(lambda x: x - x.sum(1, keepdims=True) / 3, (2, 3), along=[1])
        0
        >>> respond(lambda x: x - x.sum(1, keepdims=True) / 4, (2, 3), along=[1])
        1/4 u
        """
        sign = Fraction(-1 if op.name == "sub" else 1)
        a, b = operands[0], operands[1] and scaled(operands[1], sign)
        if a is None or b is None:
            (t,) = (t for t in (a, b) if t is not None)
            return Tracked(t.response, None, self._aligned(op, [t]))
        dims = self._aligned(op, [a, b])
        return replace(total(a, b), dims=dims)

    def _multiply(self, op: Op, operands: Operands) -> Tracked:
        """A factor multiplies the response; two factors that respond make a square of it.

        ``(x + r) (y + s) = x y + x s + r y + r s``.

        >>> respond(lambda x, g: x * g, (2, 3), (2, 3), along=[1])
        v1 u
        >>> respond(lambda x: x * x, (2, 3), along=[1])
        2 x u + u**2
        >>> respond(lambda x, g: g / x, (2, 3), (2, 3), along=[1])
        refused: divides by the shifted value
        """
        a, b = operands
        if a is not None and b is not None:
            if op.name == DIV:
                raise Refused("divides by the shifted value")
            dims = self._aligned(op, [a, b])
            return replace(product(a, b), dims=dims)
        position = 0 if a is not None else 1
        t = operands[position]
        assert t is not None
        if op.name == DIV and position == 1:
            raise Refused("divides by the shifted value")
        dims = self._aligned(op, [t])
        number = self.number(op.inputs[1 - position])
        if number is not None:
            factor = exact_number(number, self._counts)
            if op.name == DIV and factor == 0:
                raise Refused("divides by zero")
            return replace(scaled(t, 1 / factor if op.name == DIV else factor), dims=dims)
        times, by = self._factors(op.inputs[1 - position], "/" if op.name == DIV else "*")
        response = {
            (degree, ordered((*factors, *by))): number * times
            for (degree, factors), number in t.response.items()
        }
        return Tracked(response, None, dims)

    def number(self, value: int) -> np.ndarray | None:
        """The real, finite number that every element is, if the program fixes it."""
        number = self.graph.scalar(value)
        if number is None or np.iscomplexobj(number) or not np.isfinite(number):
            return None
        return number

    def _factors(self, value: int, sign: str, depth: int = 0) -> tuple[Fraction, tuple[str, ...]]:
        """What a factor (divisor, for ``/``) is a product of, however it is grouped."""
        graph = self.graph
        if not self.named:
            return Fraction(1), (f"{sign}{value}",)
        number = self.number(value)
        if number is not None and number != 0:
            factor = exact_number(number, self._counts)
            return 1 / factor if sign == "/" else factor, ()
        made = graph.producer[value]
        op = made[0] if made and depth < _DEPTH else None
        if op is not None and op.name in SCALINGS:
            back = {"*": "/", "/": "*"}[sign] if op.name == DIV else sign
            first, second = op.inputs
            a, more = self._factors(first, sign, depth + 1)
            b, rest = self._factors(second, back, depth + 1)
            return a * b, more + rest
        if op is not None and op.name == "broadcast_in_dim":
            (operand,) = op.inputs
            if len(graph.shape(operand)) == len(graph.shape(value)):  # repeats single positions
                return self._factors(operand, sign, depth)
        return Fraction(1), (f"{sign}{graph.same[value]}",)

    def _aligned(self, op: Op, tracked: list[Tracked]) -> tuple[int | None, ...]:
        """Axes of the output; every operand must line up with the root in the same way."""
        rank = len(self.graph.shape(op.outputs[0]))
        columns = [t.dims or (None,) * rank for t in tracked]
        dims: list[int | None] = []
        for column in zip(*columns, strict=True):
            named = {d for d in column if d is not None}
            if len(named) > 1:
                raise Refused("combines axes that do not line up")
            d = named.pop() if named else None
            # An operand without the axis has one shift for all of its positions.
            if d is not None and None in column and not self.along.uniform_along(d):
                raise Refused("combines positions that are shifted differently")
            dims.append(d)
        return tuple(dims)


def _single(operands: Operands) -> Tracked:
    """The first operand: what a move, say, is told besides must not respond."""
    if operands[0] is None:
        raise _Notices
    return operands[0]


def _shifted(operands: Operands) -> Tracked:
    """The first operand where it is merely shifted."""
    t = _single(operands)
    if not t.is_shift:
        raise _Notices
    return t


def _without(dims: tuple[int | None, ...], axes: Sequence[int]) -> tuple[int | None, ...]:
    """The root's axes behind those that a reduction over `axes` leaves."""
    return tuple(d for k, d in enumerate(dims) if k not in axes)


Respond = Callable[[Arithmetic, Op, Operands], Tracked | None]


def _notice(arithmetic: Arithmetic, op: Op, operands: Operands) -> Tracked | None:
    raise _Notices


_RESPONSES: dict[str, Respond] = {
    "exp": Arithmetic._exponential,
    **dict.fromkeys(("argmax", "argmin"), Arithmetic._position),
    **dict.fromkeys(("reduce_max", "reduce_min"), Arithmetic._extremum),
    "max": Arithmetic._maximum,
    **dict.fromkeys(MOVES, Arithmetic._move),
    "reduce_sum": Arithmetic._sum,
    "neg": Arithmetic._negate,
    **dict.fromkeys(("add", "sub", "add_any"), Arithmetic._add),
    **dict.fromkeys(SCALINGS, Arithmetic._multiply),
    **dict.fromkeys(("square", "integer_pow"), Arithmetic._square),
}
