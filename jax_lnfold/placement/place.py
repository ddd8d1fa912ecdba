"""Where to center: the zero-mean graph and its cheapest cut (theory, section 3).

A node is a value with an axis set and asks "is this zero-mean at run time?". The cut weighs the
LayerNorms that keep their own mean against the centerings that would make it vanish.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from ..analysis.assumptions import NOTHING, Assumptions
from ..analysis.claims import Claim
from ..analysis.facts import Facts
from ..analysis.layer_norms import LayerNorm, find_norms
from ..axes.axis_set import AxisSet
from ..plan.edits.scale import ScaleEdit
from ..program.garbage import collector_paused
from ..program.graph import Graph
from .layer_scale import find_merges
from .min_cut import MinCut
from .proof import derived_from, prove, resting_on_approximations
from .reasons import Reason, explain
from .zero_mean import UNIT, ZeroMeanGraph


@dataclass(frozen=True)
class Placement:
    """The centerings of one program, and what they make of each LayerNorm.

    Leaves and values are numbers of the graph that the `search` is about. `left` maps positions in
    `norms` to reasons, `inserted` says why what feeds a value of `explicit` was not centered
    instead, `zero` lists what is zero-mean at run time once the centerings are made. The positions
    in `approximate` are of folded norms that rest on a dropout taken for the identity, those in
    `dropped` of norms that are not folded, but lose their mean on request. Edits that
    serve no LayerNorm are in `found`, by the section of a plan; `affine_left` says of scales, by
    key path, why no linear layer behind them takes them up; `tied` says of leaves why they are not
    untied by a copy; `unknown` are leaves whose values are not at hand. If leaves are excluded,
    `unrestricted` is the placement without that.
    """

    search: ZeroMeanGraph
    norms: tuple[LayerNorm, ...]
    folded: tuple[bool, ...]
    left: dict[int, Reason]
    leaf_sets: dict[int, tuple[AxisSet, ...]]
    merges: tuple[ScaleEdit, ...]
    explicit: dict[int, tuple[AxisSet, ...]]
    inserted: dict[int, Reason]
    constants: dict[int, tuple[AxisSet, ...]]
    zero: tuple[Claim, ...]
    approximate: frozenset[int] = frozenset()
    found: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    affine_left: dict[str, str] = field(default_factory=dict)
    unrestricted: Placement | None = None
    tied: dict[str, str] = field(default_factory=dict)
    dropped: frozenset[int] = frozenset()
    unknown: tuple[str, ...] = ()

    @property
    def facts(self) -> Facts:
        """What was found out about the program."""
        return self.search.facts

    @property
    def proofs(self) -> set[Claim]:
        """All that the folded norms rest on."""
        folded = (n for n, done in zip(self.norms, self.folded, strict=True) if done)
        roots = ((norm.x, norm.along) for norm in folded)
        return derived_from(self.search, {*self.zero}, self.explicit, roots)

    @property
    def graph(self) -> Graph:
        """The program."""
        return self.facts.graph


def place(
    graph: Graph,
    explicit_cost: float = 2.0,
    reduce_means: bool = False,
    assumed: Assumptions = NOTHING,
) -> Placement:
    """The cheapest centerings for a program, with the fewest scales merged that they need.

    With `reduce_means`, leaves that feed LayerNorms which keep their mean are centered, too.
    """
    merges = find_merges(graph)
    facts = Facts(graph, frozenset(merges), assumed)
    placement = place_within(facts, merges, explicit_cost, reduce_means=reduce_means)
    needed = {v: m for v, m in merges.items() if _is_needed(m, placement)}
    if len(needed) == len(merges):
        return placement
    facts = Facts(graph, frozenset(needed), assumed)
    fewer = place_within(facts, needed, explicit_cost, reduce_means=reduce_means)
    return fewer if fewer.folded == placement.folded else placement


def _is_needed(merge: ScaleEdit, placement: Placement) -> bool:
    edited = {placement.graph.leaves[v] for v in placement.leaf_sets}
    return any(path in edited for path, _ in merge.targets)


@collector_paused()
def place_within(
    facts: Facts,
    merges: Mapping[int, ScaleEdit],
    explicit_cost: float,
    fixed: Mapping[int, tuple[AxisSet, ...]] | None = None,
    reduce_means: bool = False,
) -> Placement:
    """The cheapest centerings once `merges` (scale value -> merge) are made.

    With `fixed` (leaf value -> sets) the parameter edits are given, by a plan, and only explicit
    centerings are chosen.
    """
    graph = facts.graph
    norms = find_norms(facts)
    search = ZeroMeanGraph(facts, norms, Fraction(explicit_cost).limit_denominator(UNIT), fixed)
    search.explore((n.x, n.along) for n in norms.found)
    zero = _cut(search, norms.found)
    folded = tuple(search.resolve((n.x, n.along)) in zero for n in norms.found)
    if reduce_means:
        kept = ((n.x, n.along) for n, done in zip(norms.found, folded, strict=True) if not done)
        zero |= dict.fromkeys(feeding(search, kept, zero)[0])
    explicit = _by_value(c for c in zero if _is_inserted(search, c, zero))
    edits = _by_value(c for c in zero if search.nodes[c].edit)
    left = {
        i: explain(search, (n.x, n.along), zero) for i, n in enumerate(norms.found) if not folded[i]
    }
    roots = {i: (n.x, n.along) for i, n in enumerate(norms.found) if folded[i]}
    prove(search, zero, explicit, roots.values())
    return Placement(
        search=search,
        norms=norms.found,
        folded=folded,
        left=left,
        leaf_sets={v: sets for v, sets in edits.items() if v in graph.leaves},
        merges=tuple(merges.values()),
        explicit=explicit,
        inserted={v: explain(search, (v, sets[0]), zero) for v, sets in explicit.items()},
        constants={v: sets for v, sets in edits.items() if v not in graph.leaves},
        zero=(*zero, *(c for c, node in search.nodes.items() if node.is_zero)),
        approximate=resting_on_approximations(search, zero, explicit, roots),
    )


def _cut(search: ZeroMeanGraph, norms: Iterable[LayerNorm]) -> dict[Claim, None]:
    """Nodes that are zero-mean in the cheapest placement; ties go to fewer edits."""
    cut = MinCut()
    # Second-rank cost: one per edit or insertion, all of them together less than one real unit.
    rank = sum(node.edit or node.insert is not None for node in search.nodes.values()) + 1
    for norm in norms:
        cut.cost_if_no(search.resolve((norm.x, norm.along)), norm.elements * UNIT * rank)
    for claim, node in search.nodes.items():
        if node.is_zero:
            continue
        if node.edit:
            cut.cost_if_yes(claim, 0 if search.fixed is not None else 1)
            continue
        by_operands = ("operands", *claim)
        if node.insert is None:
            cut.implies(claim, by_operands)
        else:
            cut.implies(claim, by_operands, node.insert * rank + 1)
        if node.needs is None:
            cut.cost_if_yes(by_operands, None)
        for needed in node.needs or ():
            cut.implies(by_operands, search.resolve(needed))
    _, yes = cut.solve()
    return {claim: None for claim in search.nodes if claim in yes}  # in the order of discovery


def feeding(
    search: ZeroMeanGraph, roots: Iterable[Claim], zero: Container[Claim]
) -> tuple[list[Claim], set[Claim]]:
    """Leaves that write into the mean of some values, and may be centered; and all on the way.

    All of them may be at once: conflicts are barred in the search, and what no output notices
    whatever the other parameters are, none notices after other edits.
    """
    todo, seen = deque(map(search.resolve, roots)), set[Claim]()
    found = []
    while todo:
        claim = todo.popleft()
        node = search.nodes[claim]
        if claim in seen or claim in zero or node.is_zero:
            continue
        seen.add(claim)
        if node.edit and claim[0] in search.facts.graph.leaves:
            found.append(claim)
        todo += map(search.resolve, node.needs or ())
    return found, seen


def _is_inserted(search: ZeroMeanGraph, claim: Claim, zero: Container[Claim]) -> bool:
    """Whether a value that is zero-mean is so by an explicit centering."""
    node = search.nodes[claim]
    needs = None if node.needs is None else [search.resolve(c) for c in node.needs]
    given = node.is_zero or node.edit
    return not given and (
        needs is None or not all(c in zero or search.nodes[c].is_zero for c in needs)
    )


def _by_value(claims: Iterable[Claim]) -> dict[int, tuple[AxisSet, ...]]:
    """The axis sets of each value, without those that another one implies."""
    sets: dict[int, list[AxisSet]] = {}
    for value, along in claims:
        sets.setdefault(value, []).append(along)
    return {
        value: tuple(s for s in group if not any(o != s and o.refines(s) for o in group))
        for value, group in sets.items()
    }
