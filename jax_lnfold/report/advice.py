"""What a user could change about a model so that a LayerNorm folds, where there is such a thing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..analysis.claims import Blocker
from ..analysis.layer_norms import LayerNorm
from ..axes.axis_set import AxisSet
from ..placement.place import Placement
from ..placement.planning import TRAINING
from ..placement.reasons import Reason
from ..printable import printable
from ..program.graph import Graph, Op
from ..program.primitives import (
    DIV,
    ELEMENTWISE,
    IDENTITIES,
    MOVES,
    MUL,
    NOT_CARRYING,
    PRODUCTS,
    SCALINGS,
    STOP,
)
from ..rules import has_rule, is_nonlinear
from ..trees import is_editable
from .names import Name

_SAME = IDENTITIES | MOVES | {STOP}
_SUMS = _SAME | frozenset("add add_any sub neg".split())
_LAST = "end with a linear layer after"
_BEFORE_JOINING = (
    "normalise before positions are joined: this LayerNorm takes one mean of several together, "
    "where each would lose its own"
)
_KNOWN_BEFORE = "store this, which is made of parameters alone, as a parameter"


def advice(placement: Placement, reason: Reason, names: Sequence[Name]) -> str:
    """One clause for a LayerNorm that is left, or a centering inserted, for this reason.

    Empty where nothing helps short of another architecture. The names are those of the LayerNorms.
    """
    graph = placement.graph
    if reason.leaf is not None and reason.obstacle is not None:
        return _to_keep_quiet(placement, reason.obstacle, reason.leaf)
    if reason.noticed is not None:
        return _to_keep_quiet(placement, reason.noticed)
    if reason.obstacle is not None and reason.obstacle.is_output:
        return _to_keep_quiet(placement, reason.obstacle)
    if reason.obstacle is None:
        return ""
    op = reason.obstacle.op
    if op is None:
        return _without_operation(graph, reason)
    if op.index in graph.dropouts:
        return TRAINING
    if any(v in graph.noise for v in op.outputs):
        return "center this noise, or draw one number per token"
    if graph.data_free[op.outputs[0]]:
        return _KNOWN_BEFORE
    if op.name in SCALINGS:
        return _to_scale_evenly(placement, reason, op, names)
    if is_nonlinear(op):
        return _after_nonlinearity(reason)
    if has_rule(op):
        return ""
    if op.name in NOT_CARRYING:
        return f"{_LAST} it"
    return f"write this operation with primitives that have a rule, or {_LAST} it"


def _without_operation(graph: Graph, reason: Reason) -> str:
    """About what the program is given."""
    value = reason.claim[0] if reason.claim else None
    known = graph.leaves.keys() | graph.constants.keys()
    if value is None or value in known or graph.producer[value] is not None:
        return ""
    if not is_editable(graph.avals[value].dtype):
        return ""
    return "center this input before the call, or begin with a linear layer"


def _after_nonlinearity(reason: Reason) -> str:
    if reason.product is None:
        return f"{_LAST} this nonlinearity"
    return f"{_LAST} this nonlinearity, along the mean: the product behind it is along other axes"


def _to_scale_evenly(placement: Placement, reason: Reason, op: Op, names: Sequence[Name]) -> str:
    """About a product, or quotient, whose factors both vary along the mean."""
    graph, norms = placement.graph, placement.search.norms
    factors = _factors(graph, op)
    if (i := _with_root(norms.found, factors)) is not None:
        return f"normalise inside the branch (pre-LN): here {_whose_scale(names[i])} writes last"
    if _with_root(norms.of_batch, factors) is not None:
        return "normalise inside the branch: here a BatchNorm's scale writes last"
    if op.name == MUL and _sources(graph, op.inputs[0]) & _sources(graph, op.inputs[1]):
        return _after_nonlinearity(reason)
    scales = [v for v in op.inputs[op.name == DIV :] if graph.data_free[v]]
    if scales:
        first, last = op.inputs
        return _to_merge(placement, reason, scales[0], first if scales[0] == last else last)
    if op.name == DIV:
        return _after_nonlinearity(reason)
    return "gate by one number per token or per head instead of one per channel"


def _to_merge(placement: Placement, reason: Reason, scale: int, scaled: int) -> str:
    """About a scale that is known without the data."""
    graph = placement.graph
    if reason.claim is None or not _is_vector(placement, scale, reason.claim[1]):
        return ""
    if _is_linear_layer(graph, scaled):
        return "merge this scale into the linear layer before it"
    return f"{_LAST} this scale"


def _is_vector(placement: Placement, scale: int, along: AxisSet) -> bool:
    """Whether a scale varies along the mean only: a linear layer could take it up."""
    shape = placement.graph.shape(scale)
    others = (d for d in range(len(shape)) if d not in along.axes)
    return placement.facts.uniform(scale, AxisSet.over(shape, others))


def _is_linear_layer(graph: Graph, value: int) -> bool:
    """Whether a value is the result of a linear layer, maybe with a bias, scales or moved."""
    todo, found = [value], False
    while todo:
        made = graph.producer[value := todo.pop()]
        if graph.data_free[value]:
            continue
        if made is None:
            return False
        op, known = made[0], [graph.data_free[v] for v in made[0].inputs]
        if op.name in PRODUCTS and any(known):
            found = True
        elif op.name in _SUMS or (op.name in SCALINGS and known[-1]):
            todo += op.inputs
        elif op.name == MUL and known[0]:
            todo.append(op.inputs[1])
        else:
            return False
    return found


def _factors(graph: Graph, op: Op) -> set[int]:
    """The operations whose results an operation multiplies, itself included."""
    found, todo = {op.index}, [op]
    while todo:
        current = todo.pop()
        if current.name in _SAME or current.name in ("mul", "div", "neg"):
            makers = (graph.producer[v] for v in current.inputs)
            fresh = {m[0].index: m[0] for m in makers if m and m[0].index not in found}
            found.update(fresh)
            todo += fresh.values()
    return found


def _whose_scale(name: Name) -> str:
    """The scale of a LayerNorm, by its name unless the reason says it: a module, or a line."""
    if name.module or not name.part:
        return "a LayerNorm's scale"
    return f"the scale of the LayerNorm `{printable(name.text)}`"


def _with_root(norms: Iterable[LayerNorm], operations: set[int]) -> int | None:
    """Which of the norms has its root among these operations, if one has."""
    roots = (norm.root for norm in norms)
    found = (i for i, root in enumerate(roots) if root is not None and root.index in operations)
    return next(found, None)


def _to_keep_quiet(placement: Placement, noticed: Blocker, leaf: int | None = None) -> str:
    """How to keep an operation from noticing a shift of the stream or of a parameter."""
    graph, op = placement.graph, noticed.op
    if op is not None and op.index in graph.dropouts:
        return TRAINING
    if noticed.is_output:
        return _to_return_less(graph, noticed)
    if op is None:
        return ""
    if leaf is not None and (_reads(graph, op, leaf) or all(graph.data_free[v] for v in op.inputs)):
        return "give this operation a parameter of its own (untie it)"
    if any(op.index == s.index for norm in placement.norms for s in norm.sums):
        return _BEFORE_JOINING
    if op.name in PRODUCTS or not has_rule(op) or is_nonlinear(op):
        return "let this operation read the stream through a LayerNorm"
    return ""


def _to_return_less(graph: Graph, noticed: Blocker) -> str:
    """About outputs that are the stream itself; of others, the only one that is left is named."""
    cure = "return the normalised values instead of the stream itself"
    tops = {path[0] for _, path in graph.output_paths if path}
    others = tops - {path[0] for path in noticed.outputs if path}
    if len(graph.output_paths) == len(noticed.outputs):
        return cure
    cure += ". Or leave this output out"
    if len(tops) == 2 and len(others) == 1 and "<" not in (rest := others.pop()):
        cure += f": `lambda params, *inputs: apply(params, *inputs){rest}`"
    return cure


def _reads(graph: Graph, op: Op, value: int) -> bool:
    """Whether an operation reads a value as it is, or moved or converted."""
    todo = [value]
    while todo:
        for use, _ in graph.uses[todo.pop()]:
            if use.index == op.index:
                return True
            if use.name in _SAME:
                todo += use.outputs
    return False


def _sources(graph: Graph, value: int) -> set[int]:
    """The values that a value is computed from element by element, itself included."""
    found, todo = {value}, [value]
    while todo:
        made = graph.producer[todo.pop()]
        if made is not None and made[0].name in ELEMENTWISE:
            fresh = [v for v in made[0].inputs if v not in found and not graph.data_free[v]]
            found.update(fresh)
            todo += fresh
    return found
