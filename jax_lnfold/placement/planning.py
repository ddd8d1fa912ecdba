"""Between placements, which speak of values in a graph, and plans, which speak of key paths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..analysis.facts import Facts
from ..axes.axis_set import AxisSet
from ..errors import PlanFormatError, PlanMismatchError
from ..plan.edits import AffineEdit, AffineReader, CenterEdit, LeafSpec, ScaleEdit
from ..plan.plan import FoldPlan
from ..program.graph import Graph
from ..trees import leaf_paths
from .affine import AffineMerge, find_affine, merge_of
from .layer_scale import CannotAbsorb, ScaleMerge, find_merges
from .linear_readers import Reader
from .place import Placement, place_within

TRAINING = (
    'this is dropout: fold the model as it runs without it, or pass approximate={"dropout"} to '
    "fold, which takes it for the identity in training"
)
"""What to do about dropout in the way."""


def make_plan(params: Any, placement: Placement) -> FoldPlan:
    """The placement's parameter edits, with key paths instead of leaf numbers."""
    try:
        return _plan(params, placement)
    except PlanFormatError as error:
        raise PlanFormatError(
            f"apply_fn: no plan can be made for it ({error.__cause__}); nothing was changed: this "
            "is a bug of jax_lnfold, please report it"
        ) from error


def _plan(params: Any, placement: Placement) -> FoldPlan:
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
        affine=tuple(
            AffineEdit(
                key_path=paths[m.scale],
                shift=None if m.shift is None else paths[m.shift],
                readers=tuple(
                    AffineReader(
                        paths[r.kernel], r.axes, None if r.bias is None else paths[r.bias], r.summed
                    )
                    for r in m.readers
                ),
                one=m.one,
            )
            for m in placement.affine
        ),
    )


def with_affine(placement: Placement) -> Placement:
    """The placement with every scale and shift that linear layers can take up, and it leaves."""
    graph = placement.graph
    merged = {m.scale for m in placement.merges}
    targets = {leaf for m in placement.merges for leaf, _ in m.targets}
    busy = merged | targets | {graph.leaves[v] for v in placement.leaf_sets}
    found, left = find_affine(graph)
    for value, merge in [*found.items()]:
        if {merge.scale, merge.shift} & busy:
            left[value] = ("it, or its shift, is edited already so that a LayerNorm folds",)
            del found[value]
    words = {graph.leaves[v]: why for v, why in left.items() if graph.leaves[v] not in merged}
    return replace(placement, affine=tuple(found.values()), affine_left=words)


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
    placement = place_within(facts, merges, explicit_cost, fixed)
    return replace(placement, affine=_affine_again(plan, index, value, graph))


def _affine_again(
    plan: FoldPlan, index: Mapping[str, int], value: Mapping[int, int], graph: Graph
) -> tuple[AffineMerge, ...]:
    """The affine edits of `plan` as merges of this trace, in which not all readers need appear."""
    merges = []
    for edit in plan.affine:
        readers = {
            Reader(index[r.kernel], r.axes, None if r.bias is None else index[r.bias], r.summed)
            for r in edit.readers
        }
        shift = None if edit.shift is None else index[edit.shift]
        merge = AffineMerge(index[edit.key_path], shift, tuple(readers), edit.one)
        try:
            here = merge_of(graph, value[merge.scale])
        except CannotAbsorb:
            here = None
        same = here is not None and replace(here, readers=merge.readers) == merge
        if here is None or not same or not {*here.readers} <= readers:
            here = None
        seen = set() if here is None else {*here.parts}
        if any(_is_seen(graph, value[leaf]) for leaf in {*merge.parts} - seen):
            raise PlanMismatchError(
                f"inputs: for these inputs the scale {edit.key_path!r}, or what takes it up, is "
                "used in another way than in the example the plan was made for; fold again with "
                "these inputs"
            )
        merges.append(merge)
    return tuple(merges)


def _is_seen(graph: Graph, leaf: int) -> bool:
    return bool(graph.uses[leaf]) or leaf in graph.outputs


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
        seen = any(_is_seen(graph, value[i]) for i in touched)
        if seen and merges.get(value[scale.scale]) != scale:
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
