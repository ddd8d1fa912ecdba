"""What a user could change about a model so that a LayerNorm folds, where there is such a thing."""

from __future__ import annotations

from .facts import Blocker
from .graph import Graph, Op
from .placement import Placement, Reason
from .planning import TRAINING
from .primitives import ELEMENTWISE, IDENTITIES, MOVES, NONLINEAR, OPAQUE, STOP
from .rules import RULES, is_nonlinear


def advice(placement: Placement, reason: Reason) -> str:
    """One clause for a LayerNorm that is left, or a centering inserted, for this reason.

    Empty where nothing helps short of another architecture.
    """
    graph = placement.graph
    if reason.leaf is not None and reason.obstacle is not None:
        return _to_keep_quiet(graph, reason.obstacle, reason.leaf)
    if reason.noticed is not None:
        return _to_keep_quiet(graph, reason.noticed)
    if reason.obstacle is None or reason.obstacle.op is None:
        return ""
    op = reason.obstacle.op
    if op.index in graph.dropouts:
        return TRAINING
    if op.name in ("mul", "div"):
        if op.module and op.module in {norm.module for norm in placement.norms}:
            return "normalise inside the branch (pre-LN): here a LayerNorm's scale writes last"
        if any(graph.data_free[v] for v in op.inputs):
            return "merge this scale into the linear layer before it"
        if _sources(graph, op.inputs[0]) & _sources(graph, op.inputs[1]):
            return "end with a linear layer after this nonlinearity"
        return "gate by one number per token or per head instead of one per channel"
    if is_nonlinear(op.name):
        return "end with a linear layer after this nonlinearity"
    if op.name in RULES:
        return ""
    last = "end with a linear layer after it"
    if op.name in OPAQUE:
        return last
    return f"write this operation with primitives that have a rule, or {last}"


def _to_keep_quiet(graph: Graph, noticed: Blocker, leaf: int | None = None) -> str:
    """How to keep an operation from noticing a shift of the stream or of a parameter."""
    op = noticed.op
    if op is not None and op.index in graph.dropouts:
        return TRAINING
    if op is None or noticed.is_output:
        return "return the normalised values instead of the stream itself"
    if leaf is not None and _reads(graph, op, leaf):
        return "give this operation a parameter of its own (untie it)"
    if op.name in ("dot_general", "conv_general_dilated", *NONLINEAR):
        return "let this operation read the stream through a LayerNorm"
    return ""


def _reads(graph: Graph, op: Op, value: int) -> bool:
    """Whether an operation reads a value as it is, or moved or converted."""
    todo = [value]
    while todo:
        for use, _ in graph.uses[todo.pop()]:
            if use.index == op.index:
                return True
            if use.name in MOVES | IDENTITIES | {STOP}:
                todo += use.outputs
    return False


def _sources(graph: Graph, value: int) -> set[int]:
    """The values that a value is computed from element by element, itself included."""
    found, todo = {value}, [value]
    while todo:
        made = graph.producer[todo.pop()]
        if made is not None and made[0].name in ELEMENTWISE:
            fresh = [v for v in made[0].inputs if v not in found and not graph.fixed[v]]
            found.update(fresh)
            todo += fresh
    return found
