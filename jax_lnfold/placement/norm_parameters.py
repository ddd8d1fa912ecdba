"""The scale or shift of a LayerNorm: the parameter by whose place in the tree people know it.

``y = s (x - mean(x)) / deviation + c``, in whatever order a program multiplies. What is found here
names things; nothing is edited by it.
"""

from __future__ import annotations

from collections.abc import Container
from heapq import heappop, heappush
from typing import NamedTuple

from ..analysis.facts import Facts
from ..analysis.layer_norms import LayerNorm, unscaled
from ..axes.axis_set import AxisSet
from ..axes.labels import FREE, Entry
from ..program.graph import Graph, Op
from ..program.primitives import ELEMENTWISE, IDENTITIES, IDENTITIES_OF_EACH, MOVES, MUL, SCALINGS
from ..rules import Context, Opaque, axis_map, rule_of
from .absorbing import carried

_SUMS = frozenset({"add", "sub"})
_OF_DEVIATIONS = frozenset("clamp integer_pow max min pow rsqrt sqrt".split())
_ROWS_BY_NUMBER = frozenset({"dynamic_slice", "gather"})


def parameter_of(facts: Facts, norm: LayerNorm) -> int | None:
    """The leaf value that is the scale of a LayerNorm, or else its shift, if it has one.

    Of several scales it is the first in program order. It varies along the axes of the norm, and
    besides along such axes only as parameters tell apart: the members of an ensemble.
    """
    return _Search(facts, norm).run()


class _Normalised(NamedTuple):
    """A value with the axes of the norm in it, and what it is made of that no scale is in yet."""

    along: AxisSet
    bare: int | None


class _Found(NamedTuple):
    """A scale, or a shift, which comes after all scales, and the equation that reads it."""

    is_shift: bool
    at: int
    leaf: int


class _Search:
    """Looks for what multiplies one norm, or is added to it: in its quotients and behind them."""

    def __init__(self, facts: Facts, norm: LayerNorm) -> None:
        self.facts, self.graph = facts, facts.graph
        self.quotients = norm.quotients
        self.inputs = {norm.x: norm.along} | dict(norm.centered)
        value = norm.x
        while (made := self.graph.producer[value]) and made[0].name == "convert_element_type":
            self.inputs.setdefault(value := made[0].inputs[0], norm.along)
        self.roots = {*(norm.root.outputs if norm.root else ())}
        self.found: list[_Found] = []

    def run(self) -> int | None:
        for value in self.quotients:
            if (made := self._normalised(value)) is not None:
                self._look_into(value, made, {}, may_add=True)
                self._follow(value, made.along)
        return min(self.found).leaf if self.found else None

    def _normalised(self, quotient: int) -> _Normalised | None:
        """The axes of the norm in a quotient, from the nearest input of the norm in it."""
        graph, todo = self.graph, [quotient]
        read_by: dict[int, Op | None] = {quotient: None}
        for value in todo:
            if value in self.inputs:
                break
            made = graph.producer[value]
            if made is not None and made[0].name in MOVES | ELEMENTWISE:
                fresh = [v for v in made[0].inputs if v not in read_by and graph.shape(v)]
                read_by.update(dict.fromkeys(fresh, made[0]))
                todo += fresh
        else:
            return None
        along: AxisSet | None = self.inputs[value]
        bare: int | None = value
        while along is not None and (op := read_by[value]) is not None:
            value = op.outputs[0]
            if op.name in MOVES:
                along, bare = _after(graph, op, along), None
        return along and _Normalised(along, bare)

    def _look_into(
        self, value: int, made: _Normalised, seen: dict[int, bool], may_add: bool
    ) -> bool:
        """Note the factors of a quotient, and its terms if it is a sum; whether it is of the norm.

        The other factors of a factor that is not are none of the norm's: they scale that.
        """
        if value in self.inputs or value in self.roots:
            return True
        if self.graph.shape(value) != made.along.shape:
            return False  # one number for all elements
        if value not in seen:
            seen[value] = False
            if (maker := self.graph.producer[value]) is not None:
                seen[value] = self._look_into_operands(maker[0], made, seen, may_add)
        return seen[value]

    def _look_into_operands(
        self, op: Op, made: _Normalised, seen: dict[int, bool], may_add: bool
    ) -> bool:
        is_sum = op.name in _SUMS
        if op.name in MOVES:
            before = _before(self.graph, op, made.along)
            inner = before and _Normalised(before, None)
            return bool(inner) and self._look_into(op.inputs[0], inner, seen, may_add)
        if is_sum and not may_add and not _adds_number(self.graph, op):
            return False
        if not (is_sum or op.name in SCALINGS | _OF_DEVIATIONS or _is_same(self.graph, op)):
            return False
        further = may_add and (is_sum or _is_same(self.graph, op))
        own = [self._look_into(v, made, seen, further) for v in op.inputs]
        for position, is_own in enumerate(own):
            scales = op.name == MUL
            if any(own) and not is_own and (scales or (is_sum and may_add)):
                self._note(op, position, made)
        return any(own)

    def _follow(self, quotient: int, along: AxisSet) -> None:
        """Note the products with a parameter, and the sums, that come next behind a quotient."""
        graph, sets, todo = self.graph, {quotient: along}, list[int]()

        def reach(value: int, there: AxisSet | None) -> None:
            if there is not None and value not in sets:
                sets[value] = there
            for op, _ in graph.uses[value] if value in sets else ():
                heappush(todo, op.index)

        reach(quotient, along)
        done = -1
        while todo:
            if (index := heappop(todo)) == done:
                continue
            done, op = index, graph.ops[index]
            position = next(i for i, v in enumerate(op.inputs) if v in sets)
            value = op.inputs[position]
            if op.name in IDENTITIES_OF_EACH:
                reach(op.outputs[position], sets[value])
            elif op.name in MOVES:
                reach(op.outputs[0], _after(graph, op, sets[value]))
            elif _is_same(graph, op) or _is_sum_of_own(graph, op, sets):
                reach(op.outputs[0], sets[value])
            elif op.name == MUL or op.name in _SUMS:
                self._note(op, 1 - position, _Normalised(sets[value], value))

    def _note(self, op: Op, position: int, made: _Normalised) -> None:
        """Take down an operand if it is a parameter, moved, along the axes of the norm."""
        leaf = _leaf_behind(self.graph, op.inputs[position])
        if leaf is not None and self._fits(op.inputs[position], made):
            self.found.append(_Found(op.name != MUL, op.index, leaf))

    def _fits(self, value: int, made: _Normalised) -> bool:
        """Whether a value varies along axes of the norm, and others as parameters alone do."""
        rank = len(self.graph.shape(value))

        def one(of: int, axis: int) -> AxisSet:
            return AxisSet.over(self.graph.shape(of), [axis])

        varies = [d for d in range(rank) if not self.facts.uniform(value, one(value, d))]
        others = {*varies} - {*made.along.axes}
        if not others or len(others) == len(varies):
            return not others
        # Samples and tokens are no members: a parameter along these is a gate of its own.
        bare, by_inputs = made.bare, self.facts.varies_by_inputs_alone
        if bare is None or len(self.graph.shape(bare)) != rank:
            return False
        return all(by_inputs(bare, one(bare, d)) is False for d in others)


def _is_same(graph: Graph, op: Op) -> bool:
    """Whether it makes a constant multiple of its operand."""
    return op.name in IDENTITIES or unscaled(graph, op) is not None


def _is_sum_of_own(graph: Graph, op: Op, own: Container[int]) -> bool:
    """Whether it adds nothing but numbers of the program to what is of the norm."""
    others = (v for v in op.inputs if v not in own)
    return op.name in _SUMS and all(graph.scalar(v) is not None for v in others)


def _adds_number(graph: Graph, op: Op) -> bool:
    return any(graph.scalar(v) is not None for v in op.inputs)


def _after(graph: Graph, op: Op, along: AxisSet) -> AxisSet | None:
    """The set on the result of a move; None if it is none there."""
    shape = graph.shape(op.outputs[0])
    if op.name == "reshape":
        pushed = rule_of(op).push(Context(graph, op, lambda *_: False), 0, along)
        return None if isinstance(pushed, Opaque) else pushed[0][1]
    entries: list[Entry] = [FREE] * len(shape)
    for before, after in axis_map(graph, op).items():
        if isinstance(after, int):
            entries[after] = along.entries[before]
    return AxisSet.of(shape, entries)


def _before(graph: Graph, op: Op, along: AxisSet) -> AxisSet | None:
    """The set on the operand of a move; None if it is none there."""
    pulled = rule_of(op).pull(Context(graph, op, lambda *_: False), 0, along)
    return None if isinstance(pulled, Opaque) else pulled.needs[0][1]


def _leaf_behind(graph: Graph, value: int) -> int | None:
    """The leaf that a value is: moved, or a row of it, times or plus a number of the program."""
    while value not in graph.leaves:
        if (made := graph.producer[value]) is None:
            return None
        op, position = made
        numbers = [graph.scalar(v) is not None for v in op.inputs]
        if op.name in IDENTITIES_OF_EACH:
            value = op.inputs[position]
        elif op.name in _SUMS and any(numbers):
            value = op.inputs[numbers.index(False)] if not all(numbers) else op.inputs[0]
        elif (multiple := unscaled(graph, op)) is not None:
            value = multiple
        elif carried(graph, op) is not None or _takes_row(graph, op):
            value = op.inputs[0]
        else:
            return None
    return value


def _takes_row(graph: Graph, op: Op) -> bool:
    """Whether it takes a part of an array that constants and the counters of loops alone choose."""
    if op.name not in _ROWS_BY_NUMBER:
        return False
    todo = [*op.inputs[1:]]
    seen = {*todo}
    while todo:
        value = todo.pop()
        if value in graph.constants or graph.fixed[value]:
            continue
        if (made := graph.producer[value]) is None:
            return False
        todo += {*made[0].inputs} - seen
        seen.update(made[0].inputs)
    return True
