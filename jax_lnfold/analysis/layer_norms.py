"""Finds the LayerNorms of a program by how their arithmetic responds to a shift.

A LayerNorm over axes S of ``x`` is a value that does not respond to a shift of ``x`` uniform along
S, divided by the root of a variance that does not respond either. BatchNorm with stored
statistics, RMSNorm and softmax lack one of the two; with statistics of the batch, a BatchNorm has
both, but the samples share them.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Any

import jax.numpy as jnp

from ..axes.axis_set import AxisSet
from ..axes.broadcast import project
from ..axes.labels import ALL
from ..program.graph import Graph, Op
from ..program.primitives import MOVES, MUL, SCALINGS
from ..rules import Context, Opaque, rule_of
from .claims import Claim
from .facts import Facts
from .shift_tracker import Cancelled, Tracker

_CASTS = frozenset({"convert_element_type", "copy", "stop_gradient", "name", "reduce_precision"})
# What a centered value passes through on its way to the quotient, and a variance besides.
_SCALING = (
    _CASTS | SCALINGS | MOVES | frozenset("neg sharding_constraint optimization_barrier".split())
)
_CARRIES = _SCALING | frozenset("add sub max min clamp pow sqrt rsqrt integer_pow select_n".split())
Sum = tuple[Op, list[Claim]]
SumsOf = dict[int, list[tuple[Op, AxisSet]]]
_ROOTS = frozenset({"rsqrt", "sqrt", "pow"})


@dataclass(frozen=True)
class LayerNorm:
    """One LayerNorm of the program.

    `x` and `along` are its input and the axes it averages over, `sums` the equations that compute
    the sum of ``x`` over `along`. It runs `count` times in one call, on `elements` numbers in all.
    `two_pass` if the variance is a mean of squares of centered numbers, not a difference of means.
    `root` is the equation that makes a deviation of the variance, `centered` are multiples of
    ``x`` without its mean, with their axes, and `quotients` what is divided by the deviation.
    """

    x: int
    along: AxisSet
    sums: tuple[Op, ...]
    elements: int
    count: int
    two_pass: bool = False
    root: Op | None = None
    centered: frozenset[Claim] = frozenset()
    quotients: frozenset[int] = frozenset()

    @property
    def module(self) -> str:
        """The path of the module it stands in; empty if modules leave no names."""
        return self.root.module if self.root else ""


@dataclass(frozen=True)
class Norms:
    """All LayerNorms in program order, and the values that are zero-mean because of a centering.

    `of_batch` are those that are none, as all samples share their statistics.
    """

    found: tuple[LayerNorm, ...]
    centered: dict[int, AxisSet]
    of_batch: tuple[LayerNorm, ...] = ()


def find_norms(facts: Facts) -> Norms:
    """Every LayerNorm of the program, foldable or not."""
    sums = _sums(facts.graph)
    search = _Search(facts, sums)
    for x, along in _candidates(facts.graph, sums):
        search.follow(x, along)
    norms = [search.found[root] for root in sorted(search.found)]
    of_batch = tuple(n for n in norms if _is_of_batch(facts, n))
    return Norms(tuple(n for n in norms if n not in of_batch), search.centered, of_batch)


class _Search:
    """Shifts one candidate after the other and collects what is invariant because of a norm."""

    def __init__(self, facts: Facts, sums: Iterable[Sum]) -> None:
        self.graph, self.context = facts.graph, facts.context
        self.sums_of: SumsOf = {}
        for op, claims in sums:
            for value, axes in claims:
                self.sums_of.setdefault(value, []).append((op, axes))
        self.found: dict[int, LayerNorm] = {}  # by the equation of the root
        self.centered: dict[int, AxisSet] = {}
        self.source: dict[Claim, LayerNorm] = {}  # what a centered value is centered from

    def follow(self, x: int, along: AxisSet) -> None:
        """Shift `x` along `along`, and look at what cancels.

        Products with other values are asked about, or are followed, too: spellings differ in where
        they scale. What stands behind `stop_gradient` has a shift of its own, or else that of the
        rest: then values cancel, though their derivatives need not.
        """
        met_stop = False
        for stops, keep_products in product((True, False), repeat=2):
            if not (stops or met_stop):
                break
            tracker = Tracker(
                self.graph, x, along, self.context, keep_products, False, stops, named=True
            )
            tracker.run()
            met_stop = met_stop or tracker.met_stop
            if tracker.cancelled:
                self._note(tracker, stops)

    def _note(self, tracker: Tracker, stops: bool) -> None:
        """Take down the centered values and the norms that a tracker has come upon."""
        x, along = claim = tracker.root, tracker.along
        whole = frozenset(along.axes)
        sums = [op for op, axes in tracker.arithmetic.sums if axes == whole]
        # A mean taken of a value that has none already belongs to the norm that removed it.
        origin = self.source.get(claim)
        norm = origin or LayerNorm(x, along, (), *_size(self.graph, x))
        norm = replace(norm, sums=_in_order((*sums, *norm.sums)))
        if stops:  # else the gradients of what is centered may have a mean
            self._note_centered(tracker.cancelled, norm)
        known = {claim} if origin else set[Claim]()
        roots = _normalising_roots(self.graph, tracker, self.sums_of, {v for v, _ in known})
        known |= _centered(self.graph, tracker.cancelled)
        for root, two_pass, quotients in roots:
            if (before := self.found.get(root.index)) is not None:
                norm = replace(norm, sums=_in_order((*norm.sums, *before.sums)))
                known, quotients = known | before.centered, quotients | before.quotients
            self.found[root.index] = replace(
                norm, two_pass=two_pass, root=root, centered=frozenset(known), quotients=quotients
            )

    def _note_centered(self, cancelled: Iterable[Cancelled], norm: LayerNorm) -> None:
        for c in cancelled:
            if c.centered:
                along = AxisSet.over(self.graph.shape(c.value), c.centered)
                self.centered[c.value] = along
                if c.whole:
                    self.source[c.value, along] = norm


def _centered(graph: Graph, cancelled: Iterable[Cancelled]) -> set[Claim]:
    """Those that are multiples of a value without all of its mean."""
    return {
        (c.value, AxisSet.over(graph.shape(c.value), c.centered))
        for c in cancelled
        if c.whole and c.centered
    }


def _is_of_batch(facts: Facts, norm: LayerNorm) -> bool:
    """Whether all samples share the statistics, as in a BatchNorm that trains.

    The mean is then over axes that inputs vary along, and leaves none but those that parameters
    vary along: one number for each channel.
    """
    graph = facts.graph
    shape = graph.shape(norm.x)
    rank = len(shape) - len(graph.mesh_axes_of(norm.x))
    own = [op.params["axes"] for op in norm.sums if graph.shape(op.inputs[0]) == shape]
    averaged = {*norm.along.axes, *(own[0] if own else ())}  # axes of size 1 are none of `along`

    def of_samples(axis: int) -> bool | None:
        return facts.varies_by_inputs_alone(norm.x, AxisSet.over(shape, [axis]))

    kept = [d for d in range(rank) if d not in averaged]
    given = any(d < rank and of_samples(d) for d in averaged)
    return given and bool(kept) and all(of_samples(d) is False for d in kept)


def _in_order(ops: Iterable[Op]) -> tuple[Op, ...]:
    """Each of the equations once, in program order."""
    by_index = {op.index: op for op in ops}
    return tuple(by_index[i] for i in sorted(by_index))


def _sums(graph: Graph) -> list[Sum]:
    """Every sum, with what it is a sum of: (value, axes summed over), the nearest one first.

    A sum is seen through casts, constant factors, moved axes and sums over other axes, such as
    the local sums of a feature that is spread over devices.
    """
    found = []
    for op in graph.ops:
        if op.name != "reduce_sum":
            continue
        claims: list[Claim] = []
        here: Claim | None = _summed(graph, op)
        while here is not None and jnp.issubdtype(graph.avals[here[0]].dtype, jnp.floating):
            claims.append(here)
            here = _before(graph, *here)
        found.append((op, claims))
    return found


def _summed(graph: Graph, op: Op, along: AxisSet | None = None) -> Claim:
    """What a sum is a sum of; `along` what its result is summed over later."""
    x, axes = op.inputs[0], set(op.params["axes"])
    later = iter(range(len(graph.shape(op.outputs[0]))))
    kept = {d: next(later) for d in range(len(graph.shape(x))) if d not in axes}
    more = {d for d, o in kept.items() if along is not None and along.entries[o] == ALL}
    return x, AxisSet.over(graph.shape(x), axes | more)


def _before(graph: Graph, value: int, along: AxisSet) -> Claim | None:
    """The operand that sums of `value` are sums of, up to a constant factor."""
    moved = False
    while (made := graph.producer[value]) is not None:
        op, x = made[0], unscaled(graph, made[0])
        if op.name == "reduce_sum":
            return _summed(graph, op, along)
        if x is not None:
            value, along = x, project(along, graph.shape(x))
            if not moved:
                return value, along
        elif op.name in MOVES:
            moved = True
            pulled = rule_of(op).pull(Context(graph, op, lambda *_: False), 0, along)
            if isinstance(pulled, Opaque):
                return None
            ((_, along),) = pulled.needs
            value = op.inputs[0]
        else:
            return None
    return None


def _candidates(graph: Graph, sums: Iterable[Sum]) -> Iterable[Claim]:
    """Inputs of sums that may be those of a LayerNorm: (value, axes summed over)."""
    seen: dict[Claim, None] = {}
    for _, claims in sums:
        for x, along in claims:
            made = graph.producer[x]
            if not (along.trivial or (made and made[0].name in _CASTS)):
                seen[x, along] = None
    return seen


def unscaled(graph: Graph, op: Op) -> int | None:
    """The operand of which `op` makes a constant multiple, if it does."""
    if op.name in _CASTS or op.name == "neg":
        return op.inputs[0]
    for factor, other in ((1, 0), (0, 1)) if op.name == MUL else ((1, 0),):
        if op.name in SCALINGS and graph.scalar(op.inputs[factor]) is not None:
            return op.inputs[other]
    return None


def _normalising_roots(
    graph: Graph, tracker: Tracker, sums_of: SumsOf, known: set[int]
) -> list[tuple[Op, bool, frozenset[int]]]:
    """Roots of a variance by which a value without a mean (`known` ones included) is scaled.

    With each, whether the variance takes a second pass: it is a mean of squares of that value; and
    what is scaled.
    """
    cancelled = tracker.cancelled
    variances = {c.value for c in cancelled if c.quadratic}
    squares = _mean_squares(graph, sums_of, cancelled)
    if not variances and not squares:
        return []
    second = {op.index for op in _uses_within(graph, _reach(graph, squares, stop=_ROOTS))}
    centered = {c.value for c in cancelled if c.whole}
    numerators = _reach(graph, centered | known, through=_SCALING)
    readers = _uses_within(graph, _reach(graph, variances | squares, stop=_ROOTS))
    roots = (op for op in readers if op.name in _ROOTS)
    scaled = ((op, _quotients(graph, op, numerators, cancelled)) for op in roots)
    return [(op, op.index in second, made) for op, made in scaled if made]


def _quotients(
    graph: Graph, root: Op, numerators: set[int], cancelled: Iterable[Cancelled]
) -> frozenset[int]:
    """Products of what is made of the root and one of the `numerators`, or what has cancelled."""
    scales = _reach(graph, set(root.outputs), avoid=numerators)
    factors = {f"{sign}{v}" for v in scales for sign in "*/"}
    products = {
        use.outputs[0]
        for v in scales
        for use, _ in graph.uses[v]
        if _joins(use, v, numerators, scales)
    }
    return frozenset(products.union(c.value for c in cancelled if c.factors & factors))


def _joins(op: Op, scale: int, numerators: set[int], scales: set[int]) -> bool:
    """Whether `op` multiplies or divides a centered value, not itself a scale, by `scale`."""
    if op.name not in SCALINGS:
        return False
    other = op.inputs[1] if op.inputs[0] == scale else op.inputs[0]
    return other in numerators and other not in scales


def _mean_squares(graph: Graph, sums_of: SumsOf, cancelled: Iterable[Cancelled]) -> set[int]:
    """Sums over S of squares of values centered along S: two-pass variances."""
    found: set[int] = set()
    for c in cancelled:
        if c.whole and c.centered:
            squares = _squares(graph, c.value)
            sums = (read for v in squares for read in sums_of.get(v, ()))
            found |= {op.outputs[0] for op, summed in sums if c.centered <= {*summed.axes}}
    return found


def _squares(graph: Graph, value: int) -> set[int]:
    """Squares of a value, casts between them included."""
    copies = _reach(graph, {value}, through=_CASTS)
    return {op.outputs[0] for v in copies for op, _ in graph.uses[v] if op.is_square}


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
