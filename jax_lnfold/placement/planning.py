"""Between placements, which speak of values in a graph, and plans, which speak of key paths."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from ..analysis.facts import Facts
from ..axes.axis_set import AxisSet
from ..errors import Bug, PlanFormatError, PlanMismatchError
from ..plan.edits.affine import AffineEdit
from ..plan.edits.center import CenterEdit
from ..plan.edits.scale import ScaleEdit
from ..plan.file import LeafSpec
from ..plan.plan import FoldPlan
from ..program.graph import Graph
from .absorbing import CannotAbsorb
from .affine import find_affine, merge_of
from .layer_scale import find_merges
from .place import Placement, place_within

TRAINING = (
    'this is dropout: fold the model as it runs without it, or pass approximate={"dropout"} to '
    "fold, which takes it for the identity in training"
)
"""What to do about dropout in the way."""


def make_plan(placement: Placement) -> FoldPlan:
    """The placement's edits of parameters."""
    graph = placement.graph
    try:
        return FoldPlan(
            leaves=tuple(LeafSpec(path, graph.shape(v)) for v, path in graph.leaves.items()),
            edits=tuple(
                CenterEdit(graph.leaves[v], along)
                for v, sets in sorted(placement.leaf_sets.items())
                for along in sets
            ),
            scales=placement.merges,
            affine=placement.affine,
        )
    except PlanFormatError as error:
        raise Bug(f"apply_fn: no plan can be made for it ({error.__cause__})") from error


def with_affine(placement: Placement) -> Placement:
    """The placement with every scale and shift that linear layers can take up, and it leaves."""
    graph = placement.graph
    merged = {merge.key_path for merge in placement.merges}
    busy = {path for merge in placement.merges for path in merge.parts}
    busy |= {graph.leaves[v] for v in placement.leaf_sets}
    found, left = find_affine(graph)
    for value, merge in [*found.items()]:
        if {merge.key_path, merge.shift} & busy:
            left[value] = "it, or its shift, is edited already so that a LayerNorm folds"
            del found[value]
    words = {graph.leaves[v]: why for v, why in left.items() if graph.leaves[v] not in merged}
    return replace(placement, affine=tuple(found.values()), affine_left=words)


def place_again(plan: FoldPlan, graph: Graph, explicit_cost: float) -> Placement:
    """A placement for another trace, with the parameter edits of `plan` proved harmless in it."""
    value = {path: v for v, path in graph.leaves.items()}
    fixed: dict[int, tuple[AxisSet, ...]] = {}
    for edit in plan.edits:
        leaf = value[edit.key_path]
        fixed[leaf] = (*fixed.get(leaf, ()), edit.along)
    facts = Facts(graph, frozenset(value[s.key_path] for s in plan.scales))
    merges = _merges_again(plan, value, graph)
    _check_centerings(facts, fixed)
    placement = place_within(facts, merges, explicit_cost, fixed)
    for affine in plan.affine:
        _check_affine(affine, value, graph)
    return replace(placement, affine=plan.affine)


def _merges_again(plan: FoldPlan, value: Mapping[str, int], graph: Graph) -> dict[int, ScaleEdit]:
    """The scales that this trace merges, as `plan` does; it need not use all of them."""
    found, merges = find_merges(graph), dict[int, ScaleEdit]()
    for edit in plan.scales:
        scale = value[edit.key_path]
        here = found.get(scale)
        if here is not None and {*here.targets} == {*edit.targets}:
            merges[scale] = here
        elif _are_seen(graph, (value[path] for path in edit.parts)):
            raise PlanMismatchError(
                f"inputs: for these inputs the scale {edit.key_path!r} is used in another way than "
                "in the example the plan was made for; fold again with these inputs"
            )
    return merges


def _check_affine(edit: AffineEdit, value: Mapping[str, int], graph: Graph) -> None:
    """Not all readers of the plan need be in this trace, but none may be another one."""
    try:
        here = merge_of(graph, value[edit.key_path])
        same = replace(here, readers=edit.readers) == edit and {*here.readers} <= {*edit.readers}
        seen = {*here.parts} if same else set()
    except CannotAbsorb:
        seen = set[str]()
    if _are_seen(graph, (value[path] for path in {*edit.parts} - seen)):
        raise PlanMismatchError(
            f"inputs: for these inputs the scale {edit.key_path!r}, or what takes it up, is used "
            "in another way than in the example the plan was made for; fold again with these inputs"
        )


def _are_seen(graph: Graph, leaves: Iterable[int]) -> bool:
    """Whether the program uses one of these leaf values."""
    return any(graph.uses[leaf] or leaf in graph.outputs for leaf in leaves)


def _check_centerings(facts: Facts, fixed: Mapping[int, tuple[AxisSet, ...]]) -> None:
    """Raise a `PlanMismatchError` if this trace notices a centering of the plan."""
    graph = facts.graph
    for leaf, sets in fixed.items():
        for along in sets:
            if (blocker := facts.intolerant(leaf, along)) is not None:
                dropped = blocker.op is not None and blocker.op.index in graph.dropouts
                raise PlanMismatchError(
                    f"inputs: for these inputs the centering of {graph.leaves[leaf]!r} would be "
                    f"noticed: {blocker}; {TRAINING if dropped else 'fold again with these inputs'}"
                )
