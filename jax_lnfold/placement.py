"""Where to center: the zero-mean graph and its cheapest cut (theory, section 3).

A node is a value with an axis set and asks "is this zero-mean at run time?". The cut weighs the
LayerNorms that keep their own mean against the centerings that would make it vanish.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from math import prod

import jax.numpy as jnp
import numpy as np

from .axes import AxisSet
from .facts import Blocker, Claim, Facts, solve
from .graph import Graph
from .mincut import MinCut
from .norms import LayerNorm, Norms, find_norms
from .rules import Opaque, rule_for
from .scales import ScaleMerge, find_merges


@dataclass(frozen=True)
class Placement:
    """The centerings of one program, and what they make of each LayerNorm.

    Leaves and values are numbers of the graph. `left` maps positions in `norms` to reasons.
    """

    graph: Graph
    norms: tuple[LayerNorm, ...]
    folded: tuple[bool, ...]
    left: dict[int, str]
    leaf_sets: dict[int, tuple[AxisSet, ...]]
    merges: tuple[ScaleMerge, ...]
    explicit: dict[int, tuple[AxisSet, ...]]
    constants: dict[int, tuple[AxisSet, ...]]

    @property
    def n_inserted(self) -> int:
        """Explicit centerings that take a mean at run time."""
        return sum(not s.trivial for sets in self.explicit.values() for s in sets)


@dataclass
class _Node:
    """How a value can be zero-mean along a set: it is, by edit, by insertion, or by its operands.

    `needs` is None where the operands cannot help; `obstacle` then says why. The costs are None
    where the way is barred.
    """

    is_zero: bool = False
    edit: bool = False
    insert: int | None = None
    needs: list[Claim] | None = None
    obstacle: Blocker | None = None
    intolerant: Blocker | None = None


@dataclass
class _Search:
    """Builds the nodes reached from the LayerNorms."""

    facts: Facts
    norms: Norms
    explicit_cost: Fraction
    fixed: Mapping[int, tuple[AxisSet, ...]] | None
    nodes: dict[Claim, _Node] = field(default_factory=dict)
    same_as: dict[Claim, Claim] = field(default_factory=dict)
    by_value: dict[int, list[AxisSet]] = field(default_factory=dict)

    def explore(self, roots: Iterable[Claim]) -> None:
        """Add everything the roots rest on; regions last, so that they can share whole values."""
        queue = deque(roots)
        regions: list[Claim] = []
        while queue or regions:
            if not queue:
                regions.sort(key=lambda c: c[0])
                queue.append(regions.pop())
                claim = queue.popleft()
            else:
                claim = queue.popleft()
                if _is_region(claim[1]) and claim not in self.nodes:
                    regions.append(claim)
                    continue
            if claim in self.nodes or claim in self.same_as:
                continue
            wider = self._wider(claim)
            if wider is not None:
                self.same_as[claim] = wider
                continue
            node = self.nodes[claim] = self._node(claim)
            self.by_value.setdefault(claim[0], []).append(claim[1])
            queue.extend(node.needs or ())

    def resolve(self, claim: Claim) -> Claim:
        """The node that answers a claim."""
        return self.same_as.get(claim, claim)

    def _wider(self, claim: Claim) -> Claim | None:
        """A node already wanted for the same value that implies this claim."""
        value, along = claim
        for other in self.by_value.get(value, ()):
            node = self.nodes[value, other]
            if other.refines(along) and node.intolerant is None:
                return value, other
        return None

    def _node(self, claim: Claim) -> _Node:
        value, along = claim
        graph = self.facts.graph
        if along.empty or self._is_zero(value, along):
            return _Node(is_zero=True)
        intolerant = self.facts.intolerant(value, along)
        node = _Node(intolerant=intolerant)
        if not jnp.issubdtype(graph.avals[value].dtype, jnp.floating):
            node.obstacle = Blocker(None, "its values are not floating-point numbers")
            return node
        if value in graph.leaves:
            node.edit = self._editable(value, along, intolerant)
            node.obstacle = intolerant or Blocker(None, "a parameter leaf is not edited by the plan")
            return node
        if value in graph.constants:
            shared = graph.in_custom_rule(value) or any(
                not along.disjoint(other) for other in self.by_value.get(value, ())
            )
            node.edit = intolerant is None and not shared and bool(graph.shape(value))
            node.obstacle = intolerant or Blocker(None, "a constant is added along the mean")
            return node
        if intolerant is None and not graph.in_custom_rule(value):
            node.insert = self._insertion_cost(value, along)
        made = graph.producer[value]
        if made is None:
            node.obstacle = Blocker(None, "it is an input of the function")
            return node
        op, position = made
        pulled = rule_for(op.name).pull(self.facts.context(op), position, along)
        if isinstance(pulled, Opaque):
            node.obstacle = Blocker(op, pulled.why)
        else:
            node.needs = [(op.inputs[i], s) for i, s in pulled.needs]
        return node

    def _is_zero(self, value: int, along: AxisSet) -> bool:
        centered = self.norms.centered.get(value)
        if centered is not None and centered.refines(along):
            return True
        constant = self.facts.graph.constants.get(value)
        return constant is not None and not np.any(np.asarray(constant))

    def _editable(self, leaf: int, along: AxisSet, intolerant: Blocker | None) -> bool:
        if self.fixed is not None:
            return any(s.refines(along) for s in self.fixed.get(leaf, ()))
        # Two edits of a leaf must not undo each other: nested or disjoint sets only.
        return intolerant is None and all(
            along.disjoint(s) or along.refines(s) or s.refines(along)
            for s in self.by_value.get(leaf, ())
            if self.nodes[leaf, s].edit
        )

    def _insertion_cost(self, value: int, along: AxisSet) -> int | None:
        if along.trivial:
            return 0  # set to zero: nothing is computed
        if any(
            not (along.disjoint(s) or along.refines(s) or s.refines(along))
            for s in self.by_value.get(value, ())
        ):
            return None
        inside = (
            int(np.count_nonzero(along.labels(d) >= 0)) if isinstance(e, tuple) else n
            for d, (e, n) in enumerate(zip(along.entries, along.shape, strict=True))
        )
        elements = prod(n for n in inside if isinstance(n, int))
        return int(self.explicit_cost * elements * _UNIT)


_UNIT = 1000  # costs are whole numbers; explicit costs keep three decimals


def _is_region(along: AxisSet) -> bool:
    return any(isinstance(e, tuple) and -1 in e for e in along.entries)


def place(
    graph: Graph,
    explicit_cost: float = 2.0,
    fixed: Mapping[int, tuple[AxisSet, ...]] | None = None,
    fixed_merges: tuple[ScaleMerge, ...] | None = None,
) -> Placement:
    """The cheapest centerings for a program.

    With `fixed` (leaf value -> sets) and `fixed_merges`, the parameter edits are given by a plan
    and only explicit centerings are chosen.
    """
    merges = find_merges(graph)
    if fixed_merges is not None:
        merges = {v: m for v, m in merges.items() if m in fixed_merges}
    placement = _place(graph, merges, explicit_cost, fixed)
    if fixed_merges is not None or not merges:
        return placement
    needed = {v: m for v, m in merges.items() if _is_needed(m, placement)}
    if len(needed) == len(merges):
        return placement
    fewer = _place(graph, needed, explicit_cost, fixed)
    return fewer if fewer.folded == placement.folded else placement


def _is_needed(merge: ScaleMerge, placement: Placement) -> bool:
    edited = {placement.graph.leaves[v] for v in placement.leaf_sets}
    return any(leaf in edited for leaf, _ in merge.targets)


def _place(
    graph: Graph,
    merges: dict[int, ScaleMerge],
    explicit_cost: float,
    fixed: Mapping[int, tuple[AxisSet, ...]] | None,
) -> Placement:
    facts = Facts(graph, frozenset(merges))
    norms = find_norms(facts)
    search = _Search(facts, norms, Fraction(explicit_cost).limit_denominator(_UNIT), fixed)
    search.explore((n.x, n.along) for n in norms.found)
    zero = _cut(search, norms.found)
    folded = tuple(search.resolve((n.x, n.along)) in zero for n in norms.found)
    explicit, edits, constants = _chosen(search, zero)
    left = {
        i: _explain(search, (n.x, n.along), zero)
        for i, n in enumerate(norms.found)
        if not folded[i]
    }
    _prove(search, zero, explicit, [n for n, f in zip(norms.found, folded, strict=True) if f])
    return Placement(
        graph, norms.found, folded, left, edits, tuple(merges.values()), explicit, constants
    )


def _cut(search: _Search, norms: Iterable[LayerNorm]) -> set[Claim]:
    """Nodes that are zero-mean in the cheapest placement; ties go to fewer edits."""
    cut = MinCut()
    # Second-rank cost: one per edit or insertion, all of them together less than one real unit.
    rank = sum(node.edit or node.insert is not None for node in search.nodes.values()) + 1
    for norm in norms:
        cut.cost_if_no(search.resolve((norm.x, norm.along)), norm.elements * _UNIT * rank)
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
    return {claim for claim in search.nodes if claim in yes}


def _chosen(
    search: _Search, zero: set[Claim]
) -> tuple[
    dict[int, tuple[AxisSet, ...]], dict[int, tuple[AxisSet, ...]], dict[int, tuple[AxisSet, ...]]
]:
    """Explicit centerings, leaf edits and constant edits."""
    explicit: dict[int, list[AxisSet]] = {}
    edits: dict[int, list[AxisSet]] = {}
    constants: dict[int, list[AxisSet]] = {}
    graph = search.facts.graph
    for claim, node in search.nodes.items():
        if claim not in zero or node.is_zero:
            continue
        value, along = claim
        if node.edit:
            (edits if value in graph.leaves else constants).setdefault(value, []).append(along)
        elif node.needs is None or not all(
            search.resolve(c) in zero or search.nodes[search.resolve(c)].is_zero
            for c in node.needs
        ):
            explicit.setdefault(value, []).append(along)
    return tuple(  # type: ignore[return-value]
        {v: _finest(sets) for v, sets in chosen.items()}
        for chosen in (explicit, edits, constants)
    )


def _finest(sets: list[AxisSet]) -> tuple[AxisSet, ...]:
    """The sets that no other one implies."""
    return tuple(s for s in sets if not any(o != s and o.refines(s) for o in sets))


def _prove(
    search: _Search,
    zero: set[Claim],
    explicit: Mapping[int, tuple[AxisSet, ...]],
    folded: Iterable[LayerNorm],
) -> None:
    """Derive every removed mean again from the edits alone; a failure is a bug of this library."""

    def expand(claim: Claim) -> Blocker | Iterable[Claim]:
        value, along = claim
        node = search.nodes[search.resolve(claim)]
        given = node.is_zero or (node.edit and search.resolve(claim) in zero)
        if given or any(s.refines(along) for s in explicit.get(value, ())):
            return ()
        return node.obstacle or Blocker(None, "") if node.needs is None else node.needs

    known: dict[Claim, Blocker | None] = {}
    for norm in folded:
        if (blocker := solve((norm.x, norm.along), expand, known)) is not None:
            raise AssertionError(f"unproved zero mean, please report this: {blocker}")


def _explain(search: _Search, root: Claim, zero: set[Claim]) -> str:
    """Why a LayerNorm keeps its mean: the nearest thing that cannot be made zero-mean for free."""
    queue, seen = deque([search.resolve(root)]), set()
    reasons: list[tuple[int, str]] = []
    while queue:
        claim = queue.popleft()
        if claim in seen:
            continue
        seen.add(claim)
        node = search.nodes[claim]
        if node.is_zero or claim in zero:
            continue
        if node.needs is None and not node.edit:
            blocker = node.obstacle or Blocker(None, "unknown")
            reasons.append((claim[0], _sentence(search, claim, blocker)))
            break
        queue.extend(search.resolve(c) for c in node.needs or ())
    if not reasons:
        return "an explicit centering would cost more than it saves"
    return reasons[0][1]


def _sentence(search: _Search, claim: Claim, blocker: Blocker) -> str:
    graph = search.facts.graph
    value = claim[0]
    if value in graph.leaves:
        return f"a parameter that feeds it cannot be centered: {blocker}"
    return f"its input is not zero-mean: {blocker}"
