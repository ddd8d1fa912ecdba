"""What holds for every input and parameter: uniformity and tolerance (theory: transport, shifts).

Both are greatest fixpoints of "this holds if all of those hold", solved by one routine: explore
what a claim rests on, then let every direct failure spread to the claims that rest on it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import numpy as np

from ..axes.axis_set import AxisSet
from ..axes.labels import FREE
from ..program.graph import DROPOUT, Graph, Op
from ..program.primitives import NOT_CARRYING
from ..rules import Context, Opaque, has_rule, rule_of
from .assumptions import NOTHING, Assumptions
from .claims import Blocker, Claim, solve
from .shift_tracker import RETURNED, Tracker


class Facts:
    """Answers about one program. `ones` are parameter leaves known to be all ones.

    They hold for all values of other parameters, but for those that something is `assumed` of.

    `unknown` collects the operations met for which there is no rule, `dropouts` those taken for the
    identity; `visits` counts how often a rule was asked about an equation.
    """

    def __init__(
        self, graph: Graph, ones: frozenset[int] = frozenset(), assumed: Assumptions = NOTHING
    ) -> None:
        """Answer about `graph`."""
        self.graph = graph
        self.ones = ones
        self.assumed = assumed
        self.unknown: dict[int, Op] = {}
        self.dropouts: set[int] = set()
        self.visits = 0
        self._uniform: dict[Claim, Blocker | None] = {}
        self._by_inputs: dict[Claim, Blocker | None] = {}
        self._tolerant: dict[Claim, Blocker | None] = {}
        self._quiet: dict[Claim, Blocker | None] = {}  # of values that the function returns
        self._named: dict[Claim, Blocker | None] = {}  # of parameters and what they shift

    def uniform(self, value: int, along: AxisSet) -> bool:
        """Whether a value is constant on every group of `along`."""
        along = along.widened()  # groups of one position say nothing
        return along.trivial or solve((value, along), self._why_uniform, self._uniform) is None

    def varies_by_inputs_alone(self, value: int, along: AxisSet) -> bool | None:
        """Whether a value is constant on every group of `along` if the inputs are.

        So along an axis of samples or tokens, unless parameters tell them apart; None if nobody
        knows, as behind what has no rule.
        """

        def expand(claim: Claim) -> Blocker | Iterable[Claim]:
            known = self.graph.leaves.keys() | self.graph.constants.keys()
            is_input = self.graph.producer[claim[0]] is None and claim[0] not in known
            return () if is_input else self._why_uniform(claim)

        blocker = solve((value, along), expand, self._by_inputs)
        return None if blocker is not None and blocker.op is not None else blocker is None

    def intolerant(self, value: int, along: AxisSet) -> Blocker | None:
        """None if no output notices a shift of `value` that is uniform along `along`.

        The shift may differ between groups and is otherwise arbitrary (theory: tolerance).
        """
        blocker = solve((value, along), self._why_tolerant, self._tolerant)
        if blocker is None or value not in self.graph.leaves:
            return blocker
        return solve((value, along), partial(self._why_tolerant, named=True), self._named)

    def readers_notice(self, value: int, along: AxisSet) -> Blocker | None:
        """None if no output notices a shift of `value` that equations alone see.

        Where the function returns the value, it is as it was: the equations read a shifted copy.
        """
        if value not in self.graph.outputs:
            return self.intolerant(value, along)
        if (claim := (value, along)) not in self._quiet:
            found = self._why_read(claim)
            if not isinstance(found, Blocker):
                found = next(filter(None, (self.intolerant(*needed) for needed in found)), None)
            self._quiet[claim] = found
        return self._quiet[claim]

    @property
    def proved_uniform(self) -> list[Claim]:
        """Every claim that was asked about so far, and found, to be uniform."""
        return [claim for claim, blocker in self._uniform.items() if blocker is None]

    @property
    def proved_tolerant(self) -> list[Claim]:
        """Every claim whose shift, it was found so far, no output notices.

        Of a value that the function returns, it is a shift of what the equations read.
        """
        named = {c: b for c, b in self._named.items() if c[0] in self.graph.leaves}
        found = {**self._tolerant, **named, **self._quiet}
        return [claim for claim, b in found.items() if b is None]

    def context(self, op: Op) -> Context:
        """The view that a rule gets of an operation."""
        self.visits += 1
        if not has_rule(op) and op.name not in NOT_CARRYING:
            self.unknown[op.index] = op
        if op.name == DROPOUT:
            self.dropouts.add(op.index)
        return Context(self.graph, op, self.uniform)

    def _why_uniform(self, claim: Claim) -> Blocker | Iterable[Claim]:
        value, along = claim
        if along.widened().trivial or along.empty or value in self.ones:
            return ()
        if self.assumed.is_constant(value, along):
            return ()
        if (constant := self.graph.constants.get(value)) is not None:
            varies = Blocker(None, "a constant varies along the mean")
            return () if _constant_uniform(constant, along) else varies
        made = self.graph.producer[value]
        if made is None:
            return Blocker(None, "an input may vary along the mean")
        op, position = made
        rule, ctx = rule_of(op), self.context(op)
        assumed: list[Claim] = []

        def assume(operand: int, other: AxisSet) -> bool:
            """What a rule asks about another operand is one more thing to rest on."""
            assumed.append((operand, other))
            return True

        answer = rule.uniform or rule.pull
        pulled = answer(replace(ctx, is_uniform=assume), position, along)
        if isinstance(pulled, Opaque):
            return Blocker(op, "may vary along the mean")
        if not pulled.exact:
            return Blocker(None, "different values stand side by side along the mean")
        return [*assumed, *((op.inputs[i], s) for i, s in pulled.needs)]

    def _why_tolerant(self, claim: Claim, named: bool = False) -> Blocker | Iterable[Claim]:
        value, along = claim
        if value in self.graph.outputs and not along.empty:
            made = self.graph.producer[value]
            return Blocker(made[0] if made else None, RETURNED, self.graph.returned_at({value}))
        return self._why_read(claim, named)

    def _why_read(self, claim: Claim, named: bool = False) -> Blocker | Iterable[Claim]:
        """The same of a value that is read by equations only."""
        value, along = claim
        if along.empty:
            return ()
        tracker = Tracker(self.graph, value, along, self.context, named=named)
        tracker.run()
        if tracker.refusal is not None:
            again = Tracker(self.graph, value, along, self.context, True, named=named)
            again.run()
            tracker = again if again.refusal is None else tracker
        if tracker.refusal is not None:
            op, why = tracker.refusal
            at = self.graph.returned_at({*op.outputs}) if why == RETURNED else ()
            return Blocker(op, why, at)
        return tracker.delegated


def _constant_uniform(constant: object, along: AxisSet) -> bool:
    array = np.asarray(constant)
    for d, entry in enumerate(along.entries):
        for label in np.unique(along.labels(d)) if entry != FREE else ():
            group = np.take(array, np.flatnonzero(along.labels(d) == label), axis=d)
            if label >= 0 and not np.array_equal(
                group, np.broadcast_to(group.take([0], axis=d), group.shape)
            ):
                return False
    return True
