"""The chosen centerings against every other choice: none is cheaper."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import combinations, product
from math import prod

import jax
import jax.numpy as jnp
import numpy as np

from jax_lnfold.analysis.claims import Claim
from jax_lnfold.analysis.facts import Facts
from jax_lnfold.analysis.layer_norms import find_norms
from jax_lnfold.axes.axis_set import AxisSet
from jax_lnfold.placement.layer_scale import find_merges
from jax_lnfold.placement.place import Placement, place_within
from jax_lnfold.program.graph import Graph
from jax_lnfold.program.tracing import trace
from jax_lnfold.rules import Opaque, rule_of
from tests.helpers.contracts import fold_checked
from tests.models.networks import Network, random_network

LARGEST = 9
"""Values that an explicit centering may be put at: every subset of them is tried."""


class Choices:
    """Everything that could be centered for the LayerNorms of a program.

    `given` is zero-mean anyway, `needs` are the operands that make a claim true; `edits` are free
    and `insertions` cost elements. Nothing here knows of wider claims, nodes or cuts.
    """

    def __init__(self, facts: Facts) -> None:
        self.facts, self.graph = facts, facts.graph
        self.norms = find_norms(facts)
        self.given: set[Claim] = set()
        self.needs: dict[Claim, list[Claim] | None] = {}
        self.edits: dict[int, list[AxisSet]] = {}
        self.insertions: dict[Claim, Fraction] = {}
        todo = [(n.x, n.along) for n in self.norms.found]
        while todo:
            claim = todo.pop()
            if claim not in self.needs:
                self.needs[claim] = self.look_at(*claim)
                todo.extend(self.needs[claim] or ())

    def look_at(self, value: int, along: AxisSet) -> list[Claim] | None:
        graph = self.graph
        made, centered = graph.producer[value], self.norms.centered.get(value)
        if along.empty or (centered is not None and centered.refines(along)):
            self.given.add((value, along))
            return []
        if not jnp.issubdtype(graph.avals[value].dtype, jnp.floating):
            return None
        tolerant = self.facts.readers_notice(value, along) is None
        if value in graph.leaves or value in graph.constants:
            tolerant = self.facts.intolerant(value, along) is None
            if not np.any(graph.constants.get(value, True)):
                self.given.add((value, along))
            elif tolerant and (value in graph.leaves or graph.is_editable_constant(value)):
                self.edits.setdefault(value, []).append(along)
            return None
        reachable = not graph.is_sealed(value) and graph.centered_at(value) is not None
        if tolerant and reachable and graph.on_one_device(value, along):
            free = Fraction(1, 1000) if graph.fixed[value] else 1
            self.insertions[value, along] = size(along) * graph.trips[graph.home[value]] * free
        if made is None:
            return None
        op, position = made
        pulled = rule_of(op).pull(self.facts.context(op), position, along)
        if isinstance(pulled, Opaque):
            return None
        return [(op.inputs[i], s) for i, s in pulled.needs]

    def zero(self, centered: Iterable[Claim]) -> set[Claim]:
        """Claims that hold when these values are centered; loops are proved by induction."""
        sets: dict[int, list[AxisSet]] = {}
        for value, along in centered:
            sets.setdefault(value, []).append(along)
        holds = set(self.needs)
        while True:
            fails = {
                (v, s)
                for v, s in holds - self.given
                if not any(other.refines(s) for other in sets.get(v, ()))
                and (self.needs[v, s] is None or not holds.issuperset(self.needs[v, s] or ()))
            }
            if not fails:
                return holds
            holds -= fails

    def cheapest(self, explicit_cost: Fraction) -> Fraction:
        """The least cost over all sets of centerings that do not undo each other."""
        return min(
            sum((explicit_cost * self.insertions[c] for c in chosen), Fraction())
            + self.kept_means({*edits, *chosen})
            for edits in self.compatible_edits()
            for chosen in subsets(self.insertions)
            if all_compatible(chosen)
        )

    def kept_means(self, centered: Iterable[Claim]) -> int:
        zero = self.zero(centered)
        return sum(n.elements for n in self.norms.found if (n.x, n.along) not in zero)

    def compatible_edits(self) -> Iterator[list[Claim]]:
        """Largest families of edits, one for each way to settle conflicts."""
        per_value = []
        for value, sets in self.edits.items():
            families = [c for c in subsets([(value, s) for s in sets]) if all_compatible(c)]
            largest = [c for c in families if not any({*c} < {*o} for o in families)]
            per_value.append(largest)
        for families in product(*per_value):
            yield [claim for family in families for claim in family]


def subsets(claims: Iterable[Claim]) -> list[tuple[Claim, ...]]:
    claims = list(claims)
    return [c for n in range(len(claims) + 1) for c in combinations(claims, n)]


def all_compatible(claims: Iterable[Claim]) -> bool:
    pairs = combinations(claims, 2)
    return all(a[0] != b[0] or a[1].compatible(b[1]) for a, b in pairs)


def size(along: AxisSet) -> int:
    """Elements inside the region, none where they are set to zero."""
    if along.trivial:
        return 0
    return prod(int(np.count_nonzero(along.labels(d) >= 0)) for d in range(len(along.shape)))


def cost_of(placement: Placement, explicit_cost: Fraction) -> Fraction:
    graph: Graph = placement.graph
    kept = sum(n.elements for n, f in zip(placement.norms, placement.folded, strict=True) if not f)
    inserted = Fraction()
    for value, sets in placement.explicit.items():
        free = Fraction(1, 1000) if graph.fixed[value] else 1
        inserted += sum(size(s) for s in sets) * graph.trips[graph.home[value]] * free
    return kept + explicit_cost * inserted


def compare(network: Network, explicit_cost: Fraction) -> Counter[str]:
    graph = trace(network.apply, network.params, network.inputs).graph()
    merges = find_merges(graph)
    facts = Facts(graph, frozenset(merges))
    choices = Choices(facts)
    if len(choices.insertions) > LARGEST:
        return Counter(too_large=1)
    placement = place_within(facts, merges, float(explicit_cost))
    got, best = cost_of(placement, explicit_cost), choices.cheapest(explicit_cost)
    assert got == best, f"{network}: {float(got)} instead of {float(best)}"
    return Counter(
        compared=1,
        inserted=bool(placement.explicit),
        folded=any(placement.folded),
        several=best > 0,
    )


def test_no_placement_is_cheaper() -> None:
    found: Counter[str] = Counter()
    for number in range(120):
        explicit_cost = [Fraction(1, 4), Fraction(3, 4), Fraction(2)][number // 3 % 3]
        found += compare(random_network(number, 2, 5), explicit_cost)
    assert found["compared"] > 60
    assert min(found["inserted"], found["folded"], found["several"]) > 10


def test_overlapping_norms_that_keep_their_means_are_no_obstacle() -> None:
    """They would undo each other's centerings, and notice them: neither is made."""

    def norm(x: jax.Array) -> jax.Array:
        return (x - x.mean(-1, keepdims=True)) / (x.std(-1, keepdims=True) + 0.1)

    def apply(w: jax.Array, x: jax.Array) -> list[jax.Array]:
        s = x @ w
        return [norm(s[..., :6]), norm(s[..., 4:]), norm(s)]

    rng = np.random.default_rng(0)
    w, x = jnp.asarray(rng.normal(0.5, 1, (7, 12))), jnp.asarray(rng.normal(0.5, 1, (2, 5, 7)))
    report = fold_checked(apply, w, x).report
    assert [n.folded for n in report.norms] == [False, False, True]
    assert (len(report.edits), report.n_inserted) == (1, 0)
