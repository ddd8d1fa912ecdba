"""LayerNorms whose mean can be left out of the program, for whoever accepts what comes of it.

That is an approximation of what the LayerNorm itself reads, and of nothing else: no other reader
sees that mean, and no other LayerNorm folds because this one has removed it.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..analysis.layer_norms import LayerNorm
from ..program.graph import Graph
from ..program.primitives import ELEMENTWISE, MOVES
from .place import Placement

_WITHIN = ELEMENTWISE | MOVES | {"reduce_sum"}
"""What a mean may pass through on its way to the deviation and the quotients of its LayerNorm."""


def why_kept(placement: Placement) -> dict[int, str]:
    """Of LayerNorms that do not fold, by position: why their mean must stay, empty if it need not.

    Exact folds that rest on a LayerNorm keep it as it is: they would be none without its mean.
    """
    nodes = placement.search.nodes
    rests = {claim[0] for claim in placement.proofs if nodes[claim].is_zero}
    left = (i for i, done in enumerate(placement.folded) if not done)
    return {i: _why_kept(placement.graph, placement.norms[i], rests) for i in left}


def _why_kept(graph: Graph, norm: LayerNorm, rests: Iterable[int]) -> str:
    if not norm.sums:
        return "its mean is not computed as a sum"
    for op in norm.sums:
        around = [op.path[: n + 1] for n in range(len(op.path))]
        if graph.mesh_axes[op.path] or any(path in graph.stand_ins for path in around):
            return "it is inside of a shard_map, or of an operation that is known as a whole only"
        if any(path in graph.sealed for path in around):
            # Its derivative is of another function, which would take the mean.
            return "it is inside of a function with a derivative rule of its own"
    own = _own_values(graph, norm)
    if own is None:
        return "something else reads its mean or its deviation, too"
    return "other LayerNorms fold because it removes its mean" if own & {*rests} else ""


def _own_values(graph: Graph, norm: LayerNorm) -> set[int] | None:
    """What is computed from the mean up to the quotients; None if it is not for these alone.

    The deviation is, too: without the mean it is another one, which nothing else may read.
    """
    todo = [v for op in norm.sums for v in op.outputs]
    found = {*todo}
    while todo:
        value = todo.pop()
        if value in graph.outputs:
            return None
        for op, _ in graph.uses[value]:
            if op.name not in _WITHIN:
                return None
            fresh = {*op.outputs} - found
            found |= fresh
            todo += fresh - norm.quotients
    return found
