"""Follows a shift of one value through the arithmetic around it, until it cancels or goes on.

``mean(x**2)`` responds to ``x -> x + u`` with ``2 sum(x) u / n + u**2``, and so does
``mean(x)**2``: their difference does not respond. This recognises the arithmetic of a LayerNorm in
every spelling, and nothing that only resembles it. Numbers are exact fractions; ``1/n`` is the
reciprocal of a number of positions, rounded to the dtype of the program.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import prod
from typing import Any

import jax.numpy as jnp
import numpy as np

from .axes import ALL, FREE, AxisSet
from .graph import JOINS, Graph, Op
from .primitives import IDENTITIES, IDENTITIES_OF_EACH, MOVES
from .response import (
    Refused,
    Tracked,
    X,
    exact_number,
    ordered,
    product,
    scaled,
    summed,
    total,
)
from .rules import Context, Opaque, rule_for

_EXTREMA = frozenset({"reduce_max", "reduce_min"})


@dataclass(frozen=True)
class Cancelled:
    """A value that stopped responding although its operands respond.

    Where it is a multiple of ``x - mean(x)``, `centered` are its axes that the mean is over, and
    `whole` tells whether these are all axes of the shift.
    """

    value: int
    centered: frozenset[int] | None
    whole: bool
    quadratic: bool
    factors: frozenset[str]


class Tracker:
    """Follows one shifted value until every response has cancelled or been handed on.

    A full-size value that is merely shifted can be handed on (`delegated`): the same question
    about another value. With `keep_products`, products with other values are followed instead.
    """

    def __init__(
        self,
        graph: Graph,
        root: int,
        along: AxisSet,
        context: Callable[[Op], Context],
        keep_products: bool = False,
        stop_early: bool = True,
    ) -> None:
        """Prepare to follow `root` shifted by something uniform along `along`."""
        self.graph, self.root, self.along = graph, root, along
        self.delegated: list[tuple[int, AxisSet]] = []
        self.refusal: tuple[Op, str] | None = None
        self.cancelled: list[Cancelled] = []
        self.sums: list[tuple[Op, frozenset[int]]] = []
        # Products with other values that may still cancel, and what is computed from them.
        self._scaled: dict[int, tuple[Op, str]] = {}
        self._blame: dict[int, tuple[Op, str]] = {}
        self._context, self._keep, self._stop = context, keep_products, stop_early
        self._counts = {n for n in along.shape if isinstance(n, int)}
        whole = tuple(range(len(along.shape)))
        self._tracked = {root: Tracked({(1, ()): Fraction(1)}, {X: Fraction(1)}, whole)}

    def run(self) -> None:
        """Follow all uses, in program order."""
        queue: list[int] = []
        self._enqueue(self.root, queue)
        seen: set[int] = set()
        while queue:
            index = heapq.heappop(queue)
            if index in seen:
                continue
            seen.add(index)
            op = self.graph.ops[index]
            blame = next((self._blame[v] for v in op.inputs if v in self._blame), None)
            try:
                made = self._step(op)
            except Refused as refused:
                self.refusal = self.refusal or blame or (op, str(refused))
                if self._stop:
                    return
                continue
            for value, tracked in made:
                self._tracked[value] = tracked
                if (blame := self._scaled.get(op.index) or blame) is not None:
                    self._blame[value] = blame
                if value in self.graph.outputs:
                    self.refusal = self.refusal or (op, "is returned as an output")
                self._enqueue(value, queue)

    def _enqueue(self, value: int, queue: list[int]) -> None:
        """Look at the readers of a value; what it joins is another question at once."""
        for op, _ in self.graph.uses[value]:
            if op.name not in JOINS:
                heapq.heappush(queue, op.index)
            elif (along := self._shifted(value, self._tracked[value])) is not None:
                self.delegated.append((op.outputs[0], along))
            else:
                reason = self._blame.get(value, (op, "carries on what depends on the mean"))
                self.refusal = self.refusal or reason

    def _step(self, op: Op) -> list[tuple[int, Tracked]]:
        """Outputs of `op` that still respond and are not handed on."""
        operands = [self._tracked.get(v) for v in op.inputs]
        hit = [i for i, t in enumerate(operands) if t is not None]
        if op.name in IDENTITIES or op.name in IDENTITIES_OF_EACH:
            return self._same(op, operands, hit)
        exact, refusal = self._prefers_exact(op, operands, hit), "notices a shift of its operand"
        if not exact:
            handed = self._hand_on(op, operands, hit)
            if handed is None:
                return []
            refusal = handed
            if op.name in ("mul", "div"):
                self._scaled[op.index] = (op, handed)
        try:
            result = self._exact(op, operands, refusal)
        except Refused:
            if exact and self._hand_on(op, operands, hit) is None:
                return []
            raise
        if result is None:
            return []
        if not result.response:
            self._note_cancelled(op, operands, result)
            return []
        return [(op.outputs[0], result)]

    def _prefers_exact(self, op: Op, operands: list[Tracked | None], hit: list[int]) -> bool:
        """Whether to follow a response through `op` rather than ask about its output instead."""
        first = operands[hit[0]]
        if len(hit) > 1:
            return op.name in ("add", "sub", "mul")
        if op.name == "reduce_sum" and first is not None:
            named = (first.dims[a] for a in op.params["axes"])
            return all(d is None or self.along.uniform_along(d) for d in named)
        if op.name in ("mul", "div"):
            by_number = self.graph.scalar(op.inputs[1 - hit[0]]) is not None
            return by_number or self._keep or not self._follows_root(first)
        if op.name in ("neg", "transpose"):
            return True
        return op.name in MOVES and not self._follows_root(first)

    @staticmethod
    def _follows_root(t: Tracked | None) -> bool:
        """Whether the value has the size of the root: another question can be asked about it."""
        return t is not None and t.form is not None and X in t.form

    def _same(self, op: Op, operands: list[Tracked | None], hit: list[int]) -> list[Any]:
        if op.name == "convert_element_type" and not jnp.issubdtype(
            op.params["new_dtype"], jnp.floating
        ):
            raise Refused("converts the shifted value to another kind of number")
        return [(op.outputs[i], operands[i]) for i in hit]

    def _shifted(self, value: int, t: Tracked | None) -> AxisSet | None:
        """Along what a merely shifted value is shifted uniformly, None if it is not that."""
        if t is None or not self._pure(t):
            return None
        shape = self.graph.shape(value)
        entries = (
            ALL if d is None else self.along.entries[d] if self.along.shape[d] == n else FREE
            for d, n in zip(t.dims, shape, strict=True)
        )
        return AxisSet.of(shape, entries)

    def _hand_on(self, op: Op, operands: list[Tracked | None], hit: list[int]) -> str | None:
        """Ask the rule; None when the shifted outputs were handed on, else why not."""
        ctx, rule = self._context(op), rule_for(op.name)
        handed = []
        for i in hit:
            along = self._shifted(op.inputs[i], operands[i])
            if along is None:
                return "notices a shift of its operand"
            pushed = rule.push(ctx, i, along)
            if isinstance(pushed, Opaque):
                return pushed.why
            for output, after in pushed:
                if after.trivial and not along.trivial:
                    return "reads the shifted value across the mean"
                handed.append((op.outputs[output], after))
        self.delegated.extend(handed)
        return None

    def _exact(self, op: Op, operands: list[Tracked | None], refusal: str) -> Tracked | None:
        """The response of the output of `op`, None if it never responds."""
        name, first = op.name, operands[0]
        if name in ("argmax", "argmin") and first and self._pure(first):
            self._check_uniform(first, op.params["axes"])
            return None
        if name in MOVES and first:
            return self._move(op, first)
        if name == "reduce_sum" and first:
            return self._sum(op, first)
        if name in _EXTREMA and first and self._pure(first):
            self._check_uniform(first, op.params["axes"])
            dims = tuple(d for k, d in enumerate(first.dims) if k not in op.params["axes"])
            return Tracked(first.response, None, dims)
        if name == "neg" and first:
            return scaled(first, Fraction(-1))
        if name in ("add", "sub", "add_any"):
            return self._add(op, operands, Fraction(-1 if name == "sub" else 1))
        if name == "mul" or name == "div":
            return self._multiply(op, operands)
        if (name == "square" or (name == "integer_pow" and op.params["y"] == 2)) and first:
            return product(first, first)
        if name == "max" and self._is_minus_infinity(op, operands):
            return operands[0] or operands[1]
        raise Refused(refusal)

    @staticmethod
    def _pure(t: Tracked) -> bool:
        return set(t.response) == {(1, ())}

    def _is_minus_infinity(self, op: Op, operands: list[Tracked | None]) -> bool:
        other = [i for i in (0, 1) if operands[i] is None]
        number = self.graph.scalar(op.inputs[other[0]]) if other else None
        return number is not None and bool(np.isneginf(float(number)))

    def _check_uniform(self, t: Tracked, axes: Sequence[int]) -> None:
        for axis in axes:
            d = t.dims[axis]
            if d is not None and not self.along.uniform_along(d):
                raise Refused("reduces over positions that are shifted differently")

    def _move(self, op: Op, t: Tracked) -> Tracked:
        """Axes appear, disappear or swap; those that matter keep their order of elements."""
        if t.factors:
            raise Refused("moves the shifted value")
        before, after = self.graph.shape(op.inputs[0]), self.graph.shape(op.outputs[0])
        dims: list[int | None] = [None] * len(after)
        if op.name == "transpose":
            dims = [t.dims[d] for d in op.params["permutation"]]
        elif op.name == "broadcast_in_dim":
            for d, o in enumerate(op.params["broadcast_dimensions"]):
                dims[o] = t.dims[d] if before[d] == after[o] else None
        else:
            old = [d for d, n in enumerate(before) if n != 1]
            new = [d for d, n in enumerate(after) if n != 1]
            if [before[d] for d in old] != [after[d] for d in new]:
                raise Refused("reshapes the shifted value")
            for d, o in zip(old, new, strict=True):
                dims[o] = t.dims[d]
        return Tracked(t.response, t.form, tuple(dims))

    def _sum(self, op: Op, t: Tracked) -> Tracked:
        """``sum(x + u) = sum(x) + n u`` over axes along which u is uniform."""
        axes = op.params["axes"]
        self._check_uniform(t, axes)
        shape = self.graph.shape(op.inputs[0])
        if t.factors or not all(isinstance(shape[a], int) for a in axes):
            raise Refused("sums products with the shifted value")
        n = prod(shape[a] for a in axes)
        named = [t.dims[a] for a in axes if shape[a] != 1]
        real = frozenset(d for d in named if d is not None)
        if real and None in named:
            raise Refused("sums repeated values")
        self._counts.add(n)
        result = summed(t, real, n)
        if real and result.form is not None and len(result.form) == 1:
            (summed_over,) = result.form
            if isinstance(summed_over, tuple):
                self.sums.append((op, frozenset(summed_over)))
                self._counts.add(prod(self.along.shape[d] for d in summed_over))
        dims = tuple(d for k, d in enumerate(t.dims) if k not in axes)
        return replace(result, dims=dims)

    def _add(self, op: Op, operands: list[Tracked | None], sign: Fraction) -> Tracked:
        a, b = operands[0], operands[1] and scaled(operands[1], sign)
        if a is None or b is None:
            (t,) = (t for t in (a, b) if t is not None)
            return Tracked(t.response, None, self._aligned(op, [t]))
        dims = self._aligned(op, [a, b])
        return replace(total(a, b), dims=dims)

    def _multiply(self, op: Op, operands: list[Tracked | None]) -> Tracked:
        a, b = operands
        if a is not None and b is not None:
            if op.name == "div":
                raise Refused("divides by the shifted value")
            dims = self._aligned(op, [a, b])
            return replace(product(a, b), dims=dims)
        position = 0 if a is not None else 1
        t = operands[position]
        assert t is not None
        if op.name == "div" and position == 1:
            raise Refused("divides by the shifted value")
        dims = self._aligned(op, [t])
        number = self.graph.scalar(op.inputs[1 - position])
        if number is not None and np.isfinite(number):
            factor = exact_number(number, self._counts)
            if op.name == "div" and factor == 0:
                raise Refused("divides by zero")
            return replace(scaled(t, 1 / factor if op.name == "div" else factor), dims=dims)
        token = f"{'/' if op.name == 'div' else '*'}{op.inputs[1 - position]}"
        response = {
            (degree, ordered((*factors, token))): number
            for (degree, factors), number in t.response.items()
        }
        return Tracked(response, None, dims)

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
            if d is not None and None in column and not self.along.uniform_along(d):
                raise Refused("combines positions that are shifted differently")
            dims.append(d)
        return tuple(dims)

    def _note_cancelled(self, op: Op, operands: list[Tracked | None], result: Tracked) -> None:
        hit = [t for t in operands if t is not None]
        centered, whole = None, False
        rank = len(self.along.shape)
        aligned = len(result.dims) == rank and {*result.dims} == {*range(rank)}
        if aligned and result.form is not None and len(result.form) == 2 and X in result.form:
            (axes,) = (f for f in result.form if isinstance(f, tuple))
            n = prod(self.along.shape[d] for d in axes)
            if result.form[axes] * n == -result.form[X]:
                centered = frozenset(k for k, d in enumerate(result.dims) if d in axes)
                whole = set(axes) == set(self.along.axes)
        quadratic = any(degree > 1 for t in hit for degree, _ in t.response)
        factors = frozenset().union(*(t.factors for t in hit))
        self.cancelled.append(Cancelled(op.outputs[0], centered, whole, quadratic, factors))
