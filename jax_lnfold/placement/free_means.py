"""Leaves whose means only LayerNorms see that keep their own mean anyway: free to be chosen."""

from __future__ import annotations

from dataclasses import dataclass

from ..axes.axis_set import AxisSet
from ..axes.labels import ALL, FREE
from .place import Placement, feeding


@dataclass(frozen=True)
class FreeMeans:
    """For each leaf (a value) with means to choose, their groups; and who sees them.

    `feeds` lists the leaves that write into the mean of each LayerNorm that keeps it, by its
    position, and `through` the values on the way.
    """

    groups: dict[int, AxisSet]
    feeds: dict[int, tuple[int, ...]]
    through: frozenset[int]


def free_means(placement: Placement, plain: Placement) -> FreeMeans:
    """What `placement`, which reduces means, centers and `plain`, which does not, leaves alone."""
    graph = placement.graph
    needed = {plain.graph.leaves[v] for v in plain.leaf_sets}
    groups = {
        v: sets[0]
        for v, sets in placement.leaf_sets.items()
        if len(sets) == 1
        and graph.leaves[v] not in needed
        and all(entry in (ALL, FREE) for entry in sets[0].entries)
    }
    zero = {claim for claim in placement.zero if claim[0] not in groups}
    feeds, through = dict[int, tuple[int, ...]](), set[int]()
    for i, norm in enumerate(placement.norms):
        if not placement.folded[i]:
            leaves, seen = feeding(placement.search, [(norm.x, norm.along)], zero)
            found = dict.fromkeys(v for v, _ in leaves if v in groups)
            if found:
                feeds[i] = tuple(found)
                through |= {value for value, _ in seen} | {norm.x}
    return FreeMeans(groups, feeds, frozenset(through))
