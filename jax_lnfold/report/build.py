"""Puts a placement into words: from what was decided to a report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import prod

import jax.numpy as jnp
import numpy as np

from ..placement.place import Placement
from ..plan.plan import FoldPlan
from ..program.graph import OTHER_MEANING, ROWS, Graph, Op
from ..program.primitives import EXCHANGES, MOVES, NOT_CARRYING
from ..rewrite.rewritten import Rewritten
from ..rules import has_rule
from .approximation import Approximation
from .events import find_events
from .names import Name, names_of
from .norms import also_of, insertions_of, norms_of
from .outcome import Programs, ScaleLeft, TiedLeaf, UntiedLeaf
from .report import Report
from .statistics import Statistics


def make_report(
    placement: Placement,
    plan: FoldPlan,
    rewritten: Rewritten,
    programs: Programs | None,
    told: Approximation | None = None,
) -> Report:
    """Put a placement into words, with what was measured of an approximation."""
    graph, facts, names = placement.graph, placement.facts, names_of(placement)
    also = also_of(placement, names, plan, rewritten)
    unknown = (facts.unknown[i] for i in sorted(facts.unknown))
    free = placement.unrestricted
    hiding = (op.location() for op in graph.ops if _may_hide_norms(graph, op))
    return Report(
        norms=norms_of(placement, names, told.damages if told else {}, also),
        insertions=insertions_of(placement, names),
        plan=plan,
        affine_left=tuple(ScaleLeft(path, why) for path, why in placement.affine_left.items()),
        deferred=rewritten.deferred,
        on_matrix_unit=rewritten.sums,
        respelled=rewritten.respelled,
        opaque=dict(Counter(op.eqn.primitive.name for op in unknown)),
        visits=facts.visits,
        rounded=_rounded(graph, plan),
        dropouts=len(facts.dropouts),
        constants=len(placement.constants) + sum(graph.fixed[v] for v in placement.explicit),
        edited_bytes=_edited_bytes(graph, plan),
        events=find_events(placement, names),
        n_operations=len(graph.ops),
        programs=programs,
        unseen=dict(Counter(hiding)),
        unrestricted=(sum(free.folded), len(insertions_of(free, names_of(free)))) if free else None,
        untied=_untied(graph, plan),
        tied=tuple(TiedLeaf(path, why) for path, why in placement.tied.items()),
        statistics=_statistics(told, names),
        approximation=told,
        unknown=placement.unknown,
    )


def _statistics(told: Approximation | None, names: Sequence[Name]) -> Statistics | None:
    """The shares that were measured, if they are of these LayerNorms."""
    found = told.statistics if told else None
    alike = found is not None and [n.title for n in found.norms] == [n.title for n in names]
    return found if alike else None


def _rounded(graph: Graph, plan: FoldPlan) -> tuple[str, ...]:
    """Key paths of edited leaves that are used with more digits than they are stored with."""
    recipes = {path: edit.recipe for path, edit in plan.leaf_edits().items()}
    computed = {p for p, r in recipes.items() if r.fill is None and not r.assumed}
    return tuple(p for v, p in graph.leaves.items() if p in computed and _is_widened(graph, v))


def _may_hide_norms(graph: Graph, op: Op) -> bool:
    """Whether it computes real numbers from such by what is no jaxpr of this program."""
    name = op.eqn.primitive.name
    if (
        op.role not in ("", OTHER_MEANING)
        or has_rule(op)
        or name in NOT_CARRYING
        or name in EXCHANGES
    ):
        return False
    return all(any(_is_real(graph, v) for v in values) for values in (op.inputs, op.outputs))


def _is_real(graph: Graph, value: int) -> bool:
    dtype = getattr(graph.avals[value], "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.floating)


def _edited_bytes(graph: Graph, plan: FoldPlan) -> int:
    edited = {path for path, edit in plan.leaf_edits().items() if not edit.recipe.assumed}
    return sum(_bytes(graph, v) for v, path in graph.leaves.items() if path in edited)


def _untied(graph: Graph, plan: FoldPlan) -> tuple[UntiedLeaf, ...]:
    """The copies are the last leaves of the tree."""
    values = [*graph.leaves][len(graph.leaves) - len(plan.copies) :]
    pairs = zip(plan.copies, values, strict=True)
    return tuple(UntiedLeaf(path, _bytes(graph, v)) for path, v in pairs)


def _bytes(graph: Graph, value: int) -> int:
    aval = graph.avals[value]
    return prod(aval.shape) * np.dtype(aval.dtype).itemsize


def _is_widened(graph: Graph, leaf: int) -> bool:
    """Whether a value, or a row of it, is converted to a dtype with more digits."""
    digits, todo = jnp.finfo(graph.avals[leaf].dtype).nmant, [leaf]
    while todo:
        for op, _ in graph.uses[todo.pop()]:
            if op.name == "convert_element_type":
                wide = op.params["new_dtype"]
                if jnp.issubdtype(wide, jnp.floating) and jnp.finfo(wide).nmant > digits:
                    return True
            elif op.name in MOVES | ROWS:
                todo += op.outputs
    return False
