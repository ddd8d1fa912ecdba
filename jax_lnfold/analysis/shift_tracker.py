"""Follows a shift of one value through the arithmetic around it, until it cancels or goes on.

``mean(x**2)`` responds to ``x -> x + u`` with ``2 sum(x) u / n + u**2``, and so does
``mean(x)**2``: their difference does not respond. This recognises the arithmetic of a LayerNorm in
every spelling, and nothing that only resembles it. Numbers are exact fractions; ``1/n`` is the
reciprocal of a number of positions, rounded to the dtype of the program. `stop_gradient` makes a
copy with a shift of its own, so that derivatives do not respond either.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from math import prod

import jax.numpy as jnp

from ..axes.axis_set import AxisSet
from ..axes.labels import ALL, FREE
from ..program.graph import JOINS, Graph, Op
from ..program.primitives import (
    CONCATENATE,
    IDENTITIES,
    IDENTITIES_OF_EACH,
    MOVES,
    MUL,
    SCALINGS,
    SLICE,
    STOP,
)
from ..rules import Context, Opaque, no_push, rule_of
from .shift_algebra import Refused, Sum, Tracked, X, stopped
from .shift_rules import Arithmetic

RETURNED = "makes a value that is an output"
"""What is said of the operation whose result a function returns."""


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
    Without `stops`, `stop_gradient` is taken for the identity: then derivatives may respond.
    `named` is for shifts of parameters: other values stay what their equations say (see
    `Arithmetic`), which a centering put in between would change.
    """

    def __init__(
        self,
        graph: Graph,
        root: int,
        along: AxisSet,
        context: Callable[[Op], Context],
        keep_products: bool = False,
        stop_early: bool = True,
        stops: bool = True,
        named: bool = False,
    ) -> None:
        """Prepare to follow `root` shifted by something uniform along `along`."""
        self.graph, self.root, self.along = graph, root, along
        self.delegated: list[tuple[int, AxisSet]] = []
        self.refusal: tuple[Op, str] | None = None
        self.cancelled: list[Cancelled] = []
        self.arithmetic = Arithmetic(graph, along, named)
        self.met_stop = False
        # Operations after which responses may still cancel, and what is computed from them.
        self._suspects: dict[int, tuple[Op, str]] = {}
        self._blame: dict[int, tuple[Op, str]] = {}
        self._context, self._keep, self._stop = context, keep_products, stop_early
        self._stops = stops
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
                if (blame := self._suspects.get(op.index) or blame) is not None:
                    self._blame[value] = blame
                if value in self.graph.outputs:
                    self.refusal = self.refusal or (op, RETURNED)
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
        if op.name == STOP and self._stops:
            self.met_stop = True
            (copied,) = (stopped(t) for t in operands if t is not None)
            return self._unless_cancelled(op, operands, copied)
        # A cast to another kind of number may lose the shift, or a part of it: it is no identity.
        if op.name in IDENTITIES | IDENTITIES_OF_EACH | {STOP} and not self._changes_kind(op):
            return [(op.outputs[i], t) for i, t in enumerate(operands) if t is not None]
        if (part := self._part(op, operands[0])) is not None:
            return [(op.outputs[0], part)]
        if (along := self._rejoined(op, operands)) is not None:
            self.delegated.append((op.outputs[0], along))
            return []
        if self._prefers_exact(op, operands, hit):
            try:
                return self._follow(op, operands, "notices a shift of its operand")
            except Refused:
                if self._hand_on(op, operands, hit) is None:
                    return []
                raise
        why_not = self._hand_on(op, operands, hit)
        if why_not is None:
            return []
        if op.name in SCALINGS:
            self._suspects[op.index] = (op, why_not)
        return self._follow(op, operands, why_not)

    def _follow(
        self, op: Op, operands: list[Tracked | None], refusal: str
    ) -> list[tuple[int, Tracked]]:
        """The output of `op` by arithmetic, if it responds."""
        result = self.arithmetic.respond(op, operands, refusal)
        if result is None:
            return []
        if result.response and not stopped(result).response:
            why = (
                "takes a shift away from the values but, behind `stop_gradient`, not from gradients"
            )
            self._suspects[op.index] = (op, why)
        return self._unless_cancelled(op, operands, result)

    def _unless_cancelled(
        self, op: Op, operands: list[Tracked | None], result: Tracked
    ) -> list[tuple[int, Tracked]]:
        """The output of `op`, if it responds."""
        if result.response:
            return [(op.outputs[0], result)]
        self._note_cancelled(op, operands, result)
        return []

    def _part(self, op: Op, t: Tracked | None) -> Tracked | None:
        """A part of what is shifted by one number along the axes that are cut, to be joined again.

        Each part by itself would be noticed by a norm of several of them.
        """
        if op.name != SLICE or t is None or not t.is_shift:
            return None
        if {reader.name for reader, _ in self.graph.uses[op.outputs[0]]} != {CONCATENATE}:
            return None
        shapes = (self.graph.shape(v) for v in (op.inputs[0], op.outputs[0]))
        cut = [n != m for n, m in zip(*shapes, strict=True)]
        dims = self._varying(t)
        if any(d is not None and gone for d, gone in zip(dims, cut, strict=True)):
            return None
        return replace(t, form=None, dims=dims)

    def _rejoined(self, op: Op, operands: list[Tracked | None]) -> AxisSet | None:
        """Along what a whole is shifted, if all of its parts are shifted by the same."""
        first = operands[0]
        if op.name != CONCATENATE or first is None or not first.is_shift:
            return None
        for t in operands:
            alike = t is not None and t.response == first.response
            if t is None or not alike or self._varying(t) != self._varying(first):
                return None
        along, axis = self._shifted(op.inputs[0], first), op.params["dimension"]
        if along is None or self._varying(first)[axis] is not None:
            return None
        entries = (ALL if d == axis else entry for d, entry in enumerate(along.entries))
        return AxisSet.of(self.graph.shape(op.outputs[0]), entries)

    def _varying(self, t: Tracked) -> tuple[int | None, ...]:
        """The axes of the root along which the shift differs."""
        uniform = self.along.uniform_along
        return tuple(None if d is None or uniform(d) else d for d in t.dims)

    def _prefers_exact(self, op: Op, operands: list[Tracked | None], hit: list[int]) -> bool:
        """Whether to follow a response through `op` rather than ask about its output instead."""
        first = operands[hit[0]]
        if len(hit) > 1:
            return op.name in ("add", "sub", MUL)
        if op.name == "reduce_sum" and first is not None:
            named = (first.dims[a] for a in op.params["axes"])
            return all(d is None or self.along.uniform_along(d) for d in named)
        if op.name in SCALINGS:
            by_number = self.arithmetic.number(op.inputs[1 - hit[0]]) is not None
            return by_number or self._keep or not self._follows_root(first)
        if op.name in ("neg", "transpose"):
            return True
        return op.name in MOVES and not self._follows_root(first)

    @staticmethod
    def _follows_root(t: Tracked | None) -> bool:
        """Whether the value has the size of the root: another question can be asked about it."""
        return t is not None and any(isinstance(f, Sum) and not f.axes for f in t.form or ())

    def _changes_kind(self, op: Op) -> bool:
        """Whether it converts between real, complex and whole numbers."""
        if op.name != "convert_element_type":
            return False
        dtypes = self.graph.avals[op.inputs[0]].dtype, op.params["new_dtype"]
        return any(not jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes)

    def _shifted(self, value: int, t: Tracked | None) -> AxisSet | None:
        """Along what a merely shifted value is shifted uniformly, None if it is not that."""
        if t is None or not t.is_shift:
            return None
        shape = self.graph.shape(value)
        entries = (
            ALL if d is None else self.along.entries[d] if self.along.shape[d] == n else FREE
            for d, n in zip(t.dims, shape, strict=True)
        )
        return AxisSet.of(shape, entries)

    def _hand_on(self, op: Op, operands: list[Tracked | None], hit: list[int]) -> str | None:
        """Ask the rule; None when the shifted outputs were handed on, else why not."""
        ctx, rule = self._context(op), rule_of(op)
        handed = []
        for i in hit:
            along = self._shifted(op.inputs[i], operands[i])
            if along is None:
                return no_push(ctx, i, self.along).why
            pushed = rule.push(ctx, i, along)
            if isinstance(pushed, Opaque):
                return pushed.why
            for output, after in pushed:
                if after.trivial and not along.trivial:
                    return "reads the shifted value across the mean"
                handed.append((op.outputs[output], after))
        self.delegated.extend(handed)
        return None

    def _note_cancelled(self, op: Op, operands: list[Tracked | None], result: Tracked) -> None:
        hit = [t for t in operands if t is not None]
        centered, whole = None, False
        rank = len(self.along.shape)
        aligned = len(result.dims) == rank and {*result.dims} == {*range(rank)}
        if aligned and result.form is not None and len(result.form) == 2:
            first, second = sorted(result.form)  # x has no axes and comes first
            n = prod(self.along.shape[d] for d in second.axes)
            alike = first == X._replace(stopped=second.stopped)
            if alike and result.form[second] * n == -result.form[first]:
                centered = frozenset(k for k, d in enumerate(result.dims) if d in second.axes)
                whole = set(second.axes) == set(self.along.axes)
        quadratic = any(degree > 1 for t in hit for degree, _ in t.response)
        factors = frozenset().union(*(t.factors for t in hit))
        self.cancelled.append(Cancelled(op.outputs[0], centered, whole, quadratic, factors))
