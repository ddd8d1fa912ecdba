"""Puts a placement into words: from what was decided to a report."""

from __future__ import annotations

from collections import Counter
from math import prod

import jax.numpy as jnp
import numpy as np

from ..analysis.layer_norms import LayerNorm
from ..placement.place import Placement
from ..placement.reasons import Reason
from ..plan.plan import FoldPlan
from ..program.graph import OTHER_MEANING, ROWS, Graph, Location, Op
from ..program.primitives import EXCHANGES, MOVES, NOT_CARRYING
from ..rewrite.defer import Deferral
from ..rules import RULES
from .advice import advice
from .events import find_events
from .outcome import Insertion, Norm, Programs, ScaleLeft
from .report import Report


def make_report(
    placement: Placement,
    plan: FoldPlan,
    deferred: tuple[Deferral, ...],
    programs: Programs | None,
) -> Report:
    """Put a placement into words."""
    graph, facts = placement.graph, placement.facts
    unknown = (facts.unknown[i] for i in sorted(facts.unknown))
    hiding = (op.location() for op in graph.ops if _may_hide_norms(graph, op))
    return Report(
        norms=tuple(_norm(placement, i) for i in range(len(placement.norms))),
        insertions=_insertions(placement),
        plan=plan,
        affine_left=tuple(ScaleLeft(path, why) for path, why in placement.affine_left.items()),
        deferred=deferred,
        opaque=dict(Counter(op.eqn.primitive.name for op in unknown)),
        visits=facts.visits,
        rounded=_rounded(graph, plan),
        dropouts=len(facts.dropouts),
        constants=len(placement.constants) + sum(graph.fixed[v] for v in placement.explicit),
        edited_bytes=_edited_bytes(graph, plan),
        events=find_events(placement),
        n_operations=len(graph.ops),
        programs=programs,
        unseen=dict(Counter(hiding)),
    )


def _norm(placement: Placement, i: int) -> Norm:
    """What became of the LayerNorm at position `i`."""
    graph, norm, reason = placement.graph, placement.norms[i], placement.left.get(i)
    rank = _local_rank(graph, norm.x)
    return Norm(
        path=norm.module or "(top level)",
        axes=tuple(d for d in norm.along.axes if d < rank),
        shape=graph.shape(norm.x)[:rank],
        count=norm.count,
        folded=placement.folded[i],
        reason=str(reason or ""),
        mesh_axes=_mesh_axes(graph, norm),
        two_pass=norm.two_pass,
        blocker=_blocker(reason),
        advice=advice(placement, reason) if reason else "",
        approximate=i in placement.approximate,
    )


def _insertions(placement: Placement) -> tuple[Insertion, ...]:
    """Explicit centerings that are computed in a call: the compiler does those of constants."""
    graph = placement.graph
    return tuple(
        Insertion(
            _origin(placement, value),
            graph.on_one_device(value, along) or along,
            _why_inserted(placement.inserted[value]),
            advice(placement, placement.inserted[value]),
        )
        for value, sets in sorted(placement.explicit.items())
        for along in sets
        if not along.trivial and not graph.fixed[value]
    )


def _rounded(graph: Graph, plan: FoldPlan) -> tuple[str, ...]:
    """Key paths of edited leaves that are used with more digits than they are stored with."""
    computed = {p for p, edit in plan.leaf_edits().items() if edit.recipe.fill is None}
    return tuple(p for v, p in graph.leaves.items() if p in computed and _is_widened(graph, v))


def _may_hide_norms(graph: Graph, op: Op) -> bool:
    """Whether it computes real numbers from such by what is no jaxpr of this program."""
    name = op.eqn.primitive.name
    if (
        op.role not in ("", OTHER_MEANING)
        or name in RULES
        or name in NOT_CARRYING
        or name in EXCHANGES
    ):
        return False
    return all(any(_is_real(graph, v) for v in values) for values in (op.inputs, op.outputs))


def _is_real(graph: Graph, value: int) -> bool:
    dtype = getattr(graph.avals[value], "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.floating)


def _edited_bytes(graph: Graph, plan: FoldPlan) -> int:
    edited = plan.leaf_edits()
    avals = (graph.avals[v] for v, path in graph.leaves.items() if path in edited)
    return sum(prod(aval.shape) * np.dtype(aval.dtype).itemsize for aval in avals)


def _why_inserted(reason: Reason) -> str:
    if reason.obstacle is None or reason.leaf is None:
        return str(reason.obstacle or "")
    return f"a parameter that feeds it cannot be centered, as {reason.obstacle}{reason.named}"


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


def _blocker(reason: Reason | None) -> Location | None:
    """What stands in the way: of centering the input, or else of the centering it needs."""
    found = (reason.obstacle, reason.noticed) if reason else ()
    return next((b.op.location() for b in found if b is not None and b.op is not None), None)


def _local_rank(graph: Graph, value: int) -> int:
    return len(graph.shape(value)) - len(graph.mesh_axes_of(value))


def _mesh_axes(graph: Graph, norm: LayerNorm) -> tuple[str, ...]:
    start = _local_rank(graph, norm.x)
    return tuple(graph.mesh_axes_of(norm.x)[d - start][0] for d in norm.along.axes if d >= start)


def _origin(placement: Placement, value: int) -> str:
    made = placement.graph.producer[value]
    return str(made[0].location()) if made else "an input of the function"
