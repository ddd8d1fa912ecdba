"""Where to center: the zero-mean graph and its cheapest cut (theory, section 3).

A node is a value with an axis set and asks "is this zero-mean at run time?". The cut weighs the
LayerNorms that keep their own mean against the centerings that would make it vanish.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from ..analysis.facts import Blocker, Claim, Facts, solve
from ..analysis.layer_norms import LayerNorm, find_norms
from ..axes.axis_set import AxisSet
from ..plan.edits.affine import AffineEdit
from ..plan.edits.scale import ScaleEdit
from ..printable import printable
from ..program.garbage import collector_paused
from ..program.graph import Graph, Op
from ..program.primitives import PRODUCTS
from .layer_scale import find_merges
from .min_cut import MinCut
from .zero_mean import UNIT, ZeroMeanGraph


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a LayerNorm keeps its mean.

    The `obstacle` keeps its input from being zero-mean, `noticed` is what would notice an explicit
    centering of the input (None: it would only cost too much). `carry` is the loop on the way from
    one to the other, `product` a matrix product of data there, which leaves the axes of the mean
    alone. `leaf` is the parameter that the obstacle keeps from being edited, if any, with its
    `leaf_path` unless it is all about the stream or an output; `claim` says of which value, along
    which axes, the obstacle keeps the mean.
    """

    obstacle: Blocker | None
    noticed: Blocker | None
    carry: Op | None = None
    leaf: int | None = None
    leaf_path: str = ""
    product: Op | None = None
    claim: Claim | None = None

    @property
    def named(self) -> str:
        """Which parameter it is, to be put behind a clause."""
        return f"; this parameter is `{printable(self.leaf_path)}`" if self.leaf_path else ""

    def __str__(self) -> str:
        """The reason as a sentence without its stop."""
        carry = f"carry {self.carry.carry} of {self.carry.location()}" if self.carry else ""
        if self.noticed is None:
            remedy = "an explicit centering would cost more than it saves"
        else:
            remedy = f"an explicit centering would change the result: {self.noticed}"
        if self.obstacle is None:
            return remedy
        if self.leaf is not None:
            why = f": {self.obstacle}{self.named}"
            return f"a parameter that feeds {carry or 'it'} cannot be centered{why}"
        spoilt = f"{carry} cannot be kept so: " if carry else ""
        return f"its input is not zero-mean: {spoilt}{self.obstacle}; {remedy}"


@dataclass(frozen=True)
class Placement:
    """The centerings of one program, and what they make of each LayerNorm.

    Leaves and values are numbers of the graph that the `search` is about. `left` maps positions in
    `norms` to reasons, `inserted` says why what feeds a value of `explicit` was not centered
    instead, `zero` lists what is zero-mean at run time once the centerings are made. The positions
    in `approximate` are of folded norms that rest on a dropout taken for the identity. What is in
    `affine` is taken up by the linear layers behind it; `affine_left` says of other scales, by key
    path, why not.
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
    affine: tuple[AffineEdit, ...] = ()
    affine_left: dict[str, str] = field(default_factory=dict)

    @property
    def facts(self) -> Facts:
        """What was found out about the program."""
        return self.search.facts

    @property
    def graph(self) -> Graph:
        """The program."""
        return self.facts.graph


def place(graph: Graph, explicit_cost: float = 2.0) -> Placement:
    """The cheapest centerings for a program, with the fewest scales merged that they need."""
    merges = find_merges(graph)
    placement = place_within(Facts(graph, frozenset(merges)), merges, explicit_cost)
    needed = {v: m for v, m in merges.items() if _is_needed(m, placement)}
    if len(needed) == len(merges):
        return placement
    fewer = place_within(Facts(graph, frozenset(needed)), needed, explicit_cost)
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
    explicit = _by_value(c for c in zero if _is_inserted(search, c, zero))
    edits = _by_value(c for c in zero if search.nodes[c].edit)
    left = {
        i: _explain(search, (n.x, n.along), zero)
        for i, n in enumerate(norms.found)
        if not folded[i]
    }
    roots = {i: (n.x, n.along) for i, n in enumerate(norms.found) if folded[i]}
    _prove(search, zero, explicit, roots.values())
    return Placement(
        search=search,
        norms=norms.found,
        folded=folded,
        left=left,
        leaf_sets={v: sets for v, sets in edits.items() if v in graph.leaves},
        merges=tuple(merges.values()),
        explicit=explicit,
        inserted={v: _explain(search, (v, sets[0]), zero) for v, sets in explicit.items()},
        constants={v: sets for v, sets in edits.items() if v not in graph.leaves},
        zero=(*zero, *(c for c, node in search.nodes.items() if node.is_zero)),
        approximate=_approximate(search, zero, explicit, roots),
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


def _rests_on(
    search: ZeroMeanGraph,
    claim: Claim,
    zero: Container[Claim],
    explicit: Mapping[int, tuple[AxisSet, ...]],
) -> Blocker | Iterable[Claim]:
    """What a claim follows from: nothing if the value is edited or centered there."""
    value, along = claim
    resolved = search.resolve(claim)
    node = search.nodes[resolved]
    given = node.is_zero or (node.edit and resolved in zero)
    if given or any(s.refines(along) for s in explicit.get(value, ())):
        return ()
    return node.obstacle or Blocker(None, "") if node.needs is None else node.needs


def _prove(
    search: ZeroMeanGraph,
    zero: Container[Claim],
    explicit: Mapping[int, tuple[AxisSet, ...]],
    roots: Iterable[Claim],
) -> None:
    """Derive every removed mean again from the edits alone; a failure is a bug of this library."""
    known: dict[Claim, Blocker | None] = {}
    for root in roots:
        blocker = solve(root, lambda claim: _rests_on(search, claim, zero, explicit), known)
        if blocker is not None:
            raise AssertionError(f"unproved zero mean, please report this: {blocker}")


def _approximate(
    search: ZeroMeanGraph,
    zero: Container[Claim],
    explicit: Mapping[int, tuple[AxisSet, ...]],
    roots: Mapping[int, Claim],
) -> frozenset[int]:
    """Which roots do not follow from the edits without an approximation."""
    if not any(node.approximate for node in search.nodes.values()):
        return frozenset()

    def expand(claim: Claim) -> Blocker | Iterable[Claim]:
        needs = _rests_on(search, claim, zero, explicit)
        approximate = needs and search.nodes[search.resolve(claim)].approximate
        return Blocker(None, "") if approximate else needs

    known: dict[Claim, Blocker | None] = {}
    return frozenset(i for i, root in roots.items() if solve(root, expand, known) is not None)


def _explain(search: ZeroMeanGraph, root: Claim, zero: Container[Claim]) -> Reason:
    """Why a value is not zero-mean for free: the nearest thing that cannot be made so."""
    start = search.resolve(root)
    queue, reached_from = deque([start]), {start: start}
    while queue:
        claim = queue.popleft()
        node = search.nodes[claim]
        if claim != start and (node.is_zero or claim in zero or node.edit):
            continue
        if node.needs is None and node.obstacle is not None:
            chain = [claim]
            while chain[-1] != start:
                chain.append(reached_from[chain[-1]])
            return _reason(search, chain, node.obstacle)
        for needed in map(search.resolve, node.needs or ()):
            if needed not in reached_from:
                reached_from[needed] = claim
                queue.append(needed)
    return Reason(None, search.nodes[start].intolerant)


def _reason(search: ZeroMeanGraph, chain: Sequence[Claim], obstacle: Blocker) -> Reason:
    """The reason for the last claim of `chain`, each of which rests on the one before it."""
    graph = search.facts.graph
    makers = [made[0] for value, _ in chain if (made := graph.producer[value]) is not None]
    carry = next((op for op in makers if op.carry is not None), None)
    leaf, noticed = chain[0][0], search.nodes[chain[-1]].intolerant
    if leaf not in graph.leaves:
        # Without this obstacle, what the function returns would be in the way of every edit.
        returned = (search.facts.intolerant(*c) for c in reversed(chain) if c[0] in graph.outputs)
        if noticed is None and (nearest := next(filter(None, returned), None)) is not None:
            return Reason(nearest, noticed, carry, claim=chain[0])
        behind = makers if not graph.data_free[leaf] else ()
        product = next((op for op in behind if op.name in PRODUCTS and op != obstacle.op), None)
        return Reason(obstacle, noticed, carry, product=product, claim=chain[0])
    # A parameter's shift may pass what a token's own does not: the stream's reason is the nearer.
    known = noticed if search.nodes[chain[0]].intolerant else None
    why = known or obstacle
    path = "" if known or why.is_output else graph.leaves[leaf]
    return Reason(why, noticed, carry, leaf, path, claim=chain[0])
