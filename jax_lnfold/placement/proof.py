"""Removed means derived again from the edits alone, and what rests on an approximation."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping

from ..analysis.claims import Blocker, Claim, solve
from ..axes.axis_set import AxisSet
from ..errors import Bug
from .zero_mean import ZeroMeanGraph


def is_given(
    search: ZeroMeanGraph,
    claim: Claim,
    zero: Container[Claim],
    explicit: Mapping[int, tuple[AxisSet, ...]],
) -> bool:
    """Whether a value is edited or centered as claimed, or is so by itself."""
    value, along = claim
    resolved = search.resolve(claim)
    node = search.nodes[resolved]
    given = node.is_zero or (node.edit and resolved in zero)
    return given or any(s.refines(along) for s in explicit.get(value, ()))


def rests_on(
    search: ZeroMeanGraph,
    claim: Claim,
    zero: Container[Claim],
    explicit: Mapping[int, tuple[AxisSet, ...]],
) -> Blocker | Iterable[Claim]:
    """What a claim follows from: nothing if the value is edited or centered there."""
    if is_given(search, claim, zero, explicit):
        return ()
    node = search.nodes[search.resolve(claim)]
    return node.obstacle or Blocker(None, "") if node.needs is None else node.needs


def prove(
    search: ZeroMeanGraph,
    zero: Container[Claim],
    explicit: Mapping[int, tuple[AxisSet, ...]],
    roots: Iterable[Claim],
) -> None:
    """Derive every removed mean again from the edits alone; a failure is a bug of this library."""
    known: dict[Claim, Blocker | None] = {}
    for root in roots:
        blocker = solve(root, lambda claim: rests_on(search, claim, zero, explicit), known)
        if blocker is not None:
            raise Bug(f"apply_fn: a removed mean is not proved ({blocker})")


def resting_on_approximations(
    search: ZeroMeanGraph,
    zero: Container[Claim],
    explicit: Mapping[int, tuple[AxisSet, ...]],
    roots: Mapping[int, Claim],
) -> frozenset[int]:
    """Which roots do not follow from the edits without an approximation."""
    if not any(node.approximate for node in search.nodes.values()):
        return frozenset()

    def expand(claim: Claim) -> Blocker | Iterable[Claim]:
        needs = rests_on(search, claim, zero, explicit)
        approximate = needs and search.nodes[search.resolve(claim)].approximate
        return Blocker(None, "") if approximate else needs

    known: dict[Claim, Blocker | None] = {}
    return frozenset(i for i, root in roots.items() if solve(root, expand, known) is not None)


def derived_from(
    search: ZeroMeanGraph,
    zero: Container[Claim],
    explicit: Mapping[int, tuple[AxisSet, ...]],
    roots: Iterable[Claim],
) -> set[Claim]:
    """All that the roots rest on: edited leaves, what has no mean by itself, and all between."""
    todo, seen = [*roots], set[Claim]()
    while todo:
        claim = search.resolve(todo.pop())
        if claim not in seen:
            seen.add(claim)
            needs = rests_on(search, claim, zero, explicit)
            todo += () if isinstance(needs, Blocker) else needs
    return seen
