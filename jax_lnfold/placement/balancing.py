"""Means that are numbers: of a shift, taken out by that of a bias in the sum that a norm reads.

A value that a placement takes to be zero-mean may have a mean after all, the same number in every
group, if it rests on a leaf that has one. Sums, differences and moves pass such a number on; all
else must be given values without. So a LayerNorm folds if the numbers in what it reads cancel
(theory, section 12).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import fsum, isfinite
from sys import float_info

from ..analysis.assumptions import Assumptions
from ..analysis.claims import Blocker, Claim, solve
from ..plan.edits.assumed import has_one_mean
from ..plan.edits.means import MeanEdit
from ..program.primitives import IDENTITIES, MOVES
from .place import Placement
from .proof import derived_from, is_given, rests_on

SIGNS = {"add": (1, 1), "add_any": (1, 1), "sub": (1, -1), "neg": (-1,)}
"""Sums, with the sign of each operand."""
ADDITIVE = SIGNS.keys() | IDENTITIES | MOVES
"""Primitives that pass on a mean that is the same number in every group."""


@dataclass(frozen=True)
class Balance:
    """The means of leaves (`means`, by value; others have none) in what a placement derives."""

    placement: Placement
    means: Mapping[int, float]
    zero: frozenset[Claim] = field(init=False)

    def __post_init__(self) -> None:
        """What is zero-mean by the placement, once for many look-ups."""
        object.__setattr__(self, "zero", frozenset(self.placement.zero))

    @property
    def roots(self) -> Iterator[Claim]:
        """What the LayerNorms read that fold."""
        search = self.placement.search
        for norm, done in zip(self.placement.norms, self.placement.folded, strict=True):
            if done:
                yield search.resolve((norm.x, norm.along))

    def failing(self) -> list[Claim]:
        """The roots that have a mean, or whose claim rests on something that has."""
        known: dict[Claim, Blocker | None] = {}
        return [root for root in self.roots if solve(root, self._needs, known) is not None]

    def leaves_of(self, roots: Iterable[Claim]) -> set[int]:
        """The leaves with a mean that roots rest on."""
        search, explicit = self.placement.search, self.placement.explicit
        found = derived_from(search, self.zero, explicit, roots)
        return {value for value, _ in found} & self.means.keys()

    def summed(self, claim: Claim) -> tuple[Counter[int], list[Claim]]:
        """How often each leaf is added in a value, and what else the claim rests on."""
        search, explicit = self.placement.search, self.placement.explicit
        producer = search.facts.graph.producer
        times, todo, rest = Counter[int](), Counter({claim: 1}), list[Claim]()
        while todo:
            # What is computed last comes first, so that each value is met once.
            value, along = max(
                todo, key=lambda c: -1 if (p := producer[c[0]]) is None else p[0].index
            )
            n, made = todo.pop((value, along)), producer[value]
            if is_given(search, (value, along), self.zero, explicit):
                times[value] += n
            elif made is None or made[0].name not in ADDITIVE:
                rest.append((value, along))
            else:
                needs = search.nodes[value, along].needs or ()
                signs = SIGNS.get(made[0].name, (1,) * len(needs))
                for sign, needed in zip(signs, map(search.resolve, needs), strict=True):
                    todo[needed] += sign * n
        return times, rest

    def _needs(self, claim: Claim) -> Blocker | Iterable[Claim]:
        """What has to be without a mean so that a value is."""
        times, rest = self.summed(claim)
        if total_of(times, self.means):
            return Blocker(None, "a mean is left")
        search, explicit = self.placement.search, self.placement.explicit
        found = list[Claim]()
        for other in rest:
            needs = rests_on(search, other, self.zero, explicit)
            if isinstance(needs, Blocker):
                return needs
            found += map(search.resolve, needs)
        return found

    def spoilt(self) -> set[int]:
        """Leaves to do without, so that less fails; none if nothing does."""
        if not (failing := self.failing()):
            return set()
        spoilt = self.leaves_of(failing)
        if shifts := spoilt - self.placement.leaf_sets.keys():
            return shifts
        groups = [self.leaves_of([root]) for root in self.roots]
        while more := [group for group in groups if group & spoilt and group - spoilt]:
            spoilt = spoilt.union(*more)
        return spoilt


def total_of(times: Mapping[int, int], means: Mapping[int, float]) -> float:
    """The mean of a sum of leaves that have `means`, zero if all there is are roundings."""
    terms = [n * means[leaf] for leaf, n in times.items() if leaf in means]
    total = fsum(terms)
    return total if abs(total) > 8 * float_info.epsilon * fsum(map(abs, terms)) else 0.0


def balanced(place: Callable[[Assumptions], Placement], assumed: Assumptions) -> Placement:
    """The placement that assumes as much of this as biases take out of what LayerNorms read."""
    while True:
        placement = place(assumed)
        names, sets = placement.graph.leaves, placement.leaf_sets
        used = {v for (v, _), node in placement.search.nodes.items() if node.assumed}
        shifts = {v: mean for v, mean in assumed.means.items() if v in used}
        means = dict(_biases(placement, shifts))
        uniform = {v for v, s in placement.facts.proved_uniform if assumed.is_constant(v, s)}
        spoilt = Balance(placement, {**shifts, **means}).spoilt()
        spoilt = spoilt or uniform & shifts.keys()  # one thing is assumed of each leaf
        if not spoilt:
            edits = tuple(MeanEdit(names[v], sets[v][0], (means[v],)) for v in sorted(means))
            return replace(placement, found={**placement.found, "means": edits})
        assumed = assumed.without_means(spoilt)


def _biases(placement: Placement, shifts: Mapping[int, float]) -> Iterator[tuple[int, float]]:
    """Of each LayerNorm that folds a bias, if it has one, with minus the mean of the shifts."""
    sets, balance, settled = placement.leaf_sets, Balance(placement, shifts), dict[int, float]()
    for root in balance.roots:
        times, _ = balance.summed(root)
        total = total_of(times, {**shifts, **settled})
        free = [v for v, n in times.items() if n and len(sets.get(v, ())) == 1 and v not in settled]
        for leaf in filter(lambda v: has_one_mean(sets[v][0]), free):
            settled[leaf] = -total / times[leaf]
            total = 0.0
    return ((leaf, mean) for leaf, mean in settled.items() if mean and isfinite(mean))
