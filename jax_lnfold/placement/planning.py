"""Between placements, which speak of values in a graph, and plans, which speak of key paths."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from ..analysis.assumptions import NOTHING, Assumptions
from ..analysis.facts import Facts
from ..axes.axis_set import AxisSet
from ..errors import Bug, PlanFormatError, PlanMismatchError
from ..options import Options
from ..plan.edits.assumed import has_one_mean
from ..plan.edits.center import CenterEdit
from ..plan.edits.scale import ScaleEdit
from ..plan.file import LeafSpec
from ..plan.plan import FoldPlan
from ..program.graph import Graph
from ..program.tracing import Traced
from .absorbing import are_seen
from .affine import check_affine, with_affine
from .assuming import assuming, assumptions_of
from .balancing import Balance
from .hiding import check_hidden
from .layer_scale import find_merges
from .place import Placement, place, place_within
from .queries import check_queries, with_queries

TRAINING = (
    'this is dropout: fold the model as it runs without it, or pass approximate={"dropout"} to '
    "fold, which takes it for the identity in training"
)
"""What to do about dropout in the way."""


class Finder(NamedTuple):
    """How edits of one kind are found, of those that serve no LayerNorm.

    `find` adds them to a placement if the options ask for them; `check` raises a
    `PlanMismatchError` if another trace, with leaf values by key path, would notice one of a plan.
    """

    find: Callable[[Placement, Options], Placement]
    check: Callable[[Any, Mapping[str, int], Graph], None]


FINDERS: dict[str, Finder] = {
    "affine": Finder(with_affine, check_affine),
    "queries": Finder(with_queries, check_queries),
}
"""By the section of a plan that they fill, in the order in which they search."""


def place_all(graph: Graph, options: Options) -> Placement:
    """The cheapest centerings for a program, and all other edits that the options ask for."""

    def placed(assumed: Assumptions) -> Placement:
        placement = place(graph, options.explicit_cost, options.reduce_means, assumed)
        for finder in FINDERS.values():
            placement = finder.find(placement, options)
        return placement

    plain = placed(NOTHING)
    return assuming(plain, placed, options.values) if options.values else plain


def placement_of(traced: Traced, options: Options, kept: Container[str] = frozenset()) -> Placement:
    """Where the program is centered, and what is merged; leaves that are `kept` are not edited."""
    graph = traced.graph(options.see_through_dropout)
    graph.only_leaves = options.only_leaves
    graph.excluded = frozenset(v for v, path in graph.leaves.items() if path in kept)
    placement = place_all(graph, options)
    if options.excludes is None:
        return placement
    graph.excluded |= {v for v, path in graph.leaves.items() if options.excludes(path)}
    return replace(place_all(graph, options), unrestricted=placement)


def make_plan(placement: Placement) -> FoldPlan:
    """The placement's edits of parameters."""
    graph = placement.graph
    given = {edit.key_path for edit in placement.found.get("means", ())}
    try:
        return FoldPlan(
            leaves=tuple(LeafSpec(path, graph.shape(v)) for v, path in graph.leaves.items()),
            edits=tuple(
                CenterEdit(graph.leaves[v], along)
                for v, sets in sorted(placement.leaf_sets.items())
                for along in sets
                if graph.leaves[v] not in given
            ),
            scales=placement.merges,
            **placement.found,
        )
    except PlanFormatError as error:
        raise Bug(f"apply_fn: no plan can be made for it ({error.__cause__})") from error


def follow(plan: FoldPlan, graph: Graph, explicit_cost: float) -> Placement:
    """`place_again` with a plan that a caller passed, which another function may be in the way of.

    Raises:
        PlanMismatchError: this trace would notice an edit of the plan.
    """
    try:
        return place_again(plan, graph, explicit_cost)
    except PlanMismatchError as error:
        raise PlanMismatchError(
            f"plan: {str(error).removeprefix('inputs: ')}, or fold the functions together, as in "
            "fold({name: function, ...}, params, {name: inputs, ...}), which makes a plan that all "
            "of them tolerate"
        ) from None


def place_again(plan: FoldPlan, graph: Graph, explicit_cost: float) -> Placement:
    """A placement for another trace, with the parameter edits of `plan` proved harmless in it."""
    value = {path: v for v, path in graph.leaves.items()}
    fixed: dict[int, tuple[AxisSet, ...]] = {}
    for edit in plan.edits:
        leaf = value[edit.key_path]
        fixed[leaf] = (*fixed.get(leaf, ()), edit.along)
    ones = frozenset(value[s.key_path] for s in plan.scales)
    assumed = assumptions_of(plan.assumed, value)
    facts = Facts(graph, ones, assumed)
    merges = _merges_again(plan, value, graph)
    _check_centerings(facts, fixed)
    # Not `fixed`: no LayerNorm may rest on a leaf whose mean is another number than zero, ...
    _check_centerings(facts, {value[e.key_path]: (e.along,) for e in plan.means})
    given = {value[e.key_path]: e for e in plan.means if assumed.means and has_one_mean(e.along)}
    while True:  # ... unless that cancels with what is assumed of others
        also = {leaf: (edit.along,) for leaf, edit in given.items()}
        placement = place_within(facts, merges, explicit_cost, {**fixed, **also})
        means = {leaf: edit.means[0] for leaf, edit in given.items()}
        if not (spoilt := Balance(placement, {**facts.assumed.means, **means}).spoilt()):
            break
        facts = Facts(graph, ones, facts.assumed.without_means(spoilt))
        given = {leaf: edit for leaf, edit in given.items() if leaf not in spoilt}
    found = {name: plan.sections[name] for name in FINDERS}
    for name, edits in found.items():
        for edit in edits:
            FINDERS[name].check(edit, value, graph)
    check_hidden(plan.hidden, value, placement)
    kept = ("means", "dropped", "assumed", "hidden")
    rest = {name: plan.sections[name] for name in kept}
    return replace(placement, found={**found, **rest})


def _merges_again(plan: FoldPlan, value: Mapping[str, int], graph: Graph) -> dict[int, ScaleEdit]:
    """The scales that this trace merges, as `plan` does; it need not use all of them."""
    found, merges = find_merges(graph), dict[int, ScaleEdit]()
    for edit in plan.scales:
        scale = value[edit.key_path]
        here = found.get(scale)
        if here is not None and {*here.targets} == {*edit.targets}:
            merges[scale] = here
        elif are_seen(graph, (value[path] for path in edit.parts)):
            raise PlanMismatchError(
                f"inputs: for these inputs the scale {edit.key_path!r} is used in another way than "
                "in the example the plan was made for; fold again with these inputs"
            )
    return merges


def _check_centerings(facts: Facts, fixed: Mapping[int, tuple[AxisSet, ...]]) -> None:
    """Raise a `PlanMismatchError` if this trace notices a centering of the plan.

    That is, a shift by any numbers: so it tolerates means other than zero, too.
    """
    graph = facts.graph
    for leaf, sets in fixed.items():
        for along in sets:
            if (blocker := facts.intolerant(leaf, along)) is not None:
                dropped = blocker.op is not None and blocker.op.index in graph.dropouts
                raise PlanMismatchError(
                    f"inputs: for these inputs the centering of {graph.leaves[leaf]!r} would be "
                    f"noticed: {blocker}; {TRAINING if dropped else 'fold again with these inputs'}"
                )
