"""Between placements, which speak of values in a graph, and plans, which speak of key paths."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .axes import AxisSet
from .errors import PlanMismatchError
from .facts import Facts
from .graph import Graph
from .placement import Placement, place_within
from .plan import CenterEdit, FoldPlan, LeafSpec, ScaleEdit
from .scales import ScaleMerge, find_merges
from .trees import leaf_paths

TRAINING = (
    'this is dropout: fold the model as it runs without it, or pass approximate={"dropout"} to '
    "fold, which takes it for the identity in training"
)
"""What to do about dropout in the way."""


def make_plan(params: Any, placement: Placement) -> FoldPlan:
    """The placement's parameter edits, with key paths instead of leaf numbers."""
    graph = placement.graph
    paths = [path for path, _ in leaf_paths(params)]
    shapes = {i: graph.shape(v) for v, i in graph.leaves.items()}
    edits = ((graph.leaves[v], along) for v, sets in placement.leaf_sets.items() for along in sets)
    return FoldPlan(
        leaves=tuple(LeafSpec(path, shapes[i]) for i, path in enumerate(paths)),
        edits=tuple(CenterEdit(paths[i], along) for i, along in sorted(edits, key=lambda e: e[0])),
        scales=tuple(
            ScaleEdit(paths[m.scale], tuple((paths[i], axes) for i, axes in m.targets))
            for m in placement.merges
        ),
    )


def place_again(plan: FoldPlan, params: Any, graph: Graph, explicit_cost: float) -> Placement:
    """A placement for another trace, with the parameter edits of `plan` proved harmless in it."""
    index = {path: i for i, (path, _) in enumerate(leaf_paths(params))}
    value = {i: v for v, i in graph.leaves.items()}
    scales = tuple(
        ScaleMerge(index[s.key_path], tuple(sorted((index[p], axes) for p, axes in s.targets)))
        for s in plan.scales
    )
    merges = find_merges(graph)
    fixed: dict[int, tuple[AxisSet, ...]] = {}
    for edit in plan.edits:
        leaf = value[index[edit.key_path]]
        fixed[leaf] = (*fixed.get(leaf, ()), edit.along)
    facts = Facts(graph, frozenset(value[s.scale] for s in scales))
    _check_edits(facts, fixed, scales, merges, value, plan)
    merges = {v: m for v, m in merges.items() if m in scales}
    return place_within(facts, merges, explicit_cost, fixed)


def _check_edits(
    facts: Facts,
    fixed: Mapping[int, tuple[AxisSet, ...]],
    scales: tuple[ScaleMerge, ...],
    merges: Mapping[int, ScaleMerge],
    value: Mapping[int, int],
    plan: FoldPlan,
) -> None:
    """Raise a `PlanMismatchError` if this trace notices an edit of the plan."""
    graph = facts.graph
    for scale, edit in zip(scales, plan.scales, strict=True):
        touched = (scale.scale, *(leaf for leaf, _ in scale.targets))
        if merges.get(value[scale.scale]) != scale and any(graph.uses[value[i]] for i in touched):
            raise PlanMismatchError(
                f"inputs: for these inputs the scale {edit.key_path!r} is used in another way than "
                "in the example the plan was made for; fold again with these inputs"
            )
    for leaf, sets in fixed.items():
        for along in sets:
            if (blocker := facts.intolerant(leaf, along)) is not None:
                path = plan.leaves[graph.leaves[leaf]].key_path
                dropped = blocker.op is not None and blocker.op.index in graph.dropouts
                raise PlanMismatchError(
                    f"inputs: for these inputs the centering of {path!r} would be noticed: "
                    f"{blocker}; {TRAINING if dropped else 'fold again with these inputs'}"
                )
