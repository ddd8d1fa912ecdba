"""All rewrites, one after the other."""

from __future__ import annotations

from dataclasses import dataclass

from .._compat import ClosedJaxpr
from ..options import Options
from ..placement.place import Placement
from .defer import Deferral, defer_scales
from .matrix_unit import MatrixSum, sums_on_matrix_unit
from .respell import Respelled, respelled
from .rewriter import rewrite
from .roots import Root, roots_of


@dataclass(frozen=True, slots=True)
class Rewritten:
    """A folded program, the scales that are deferred in it, and the sums that are products.

    `respelled` are the LayerNorms that keep their mean, where they are spelled otherwise.
    """

    program: ClosedJaxpr
    deferred: tuple[Deferral, ...] = ()
    sums: tuple[MatrixSum, ...] = ()
    respelled: tuple[Respelled, ...] = ()


def rewritten(closed: ClosedJaxpr, placement: Placement, options: Options) -> Rewritten:
    """The folded program, with what the options ask for."""
    program, deferred, sums, others = rewrite(closed, placement), (), (), ()
    leaves = [*placement.graph.leaves.values()]
    if options.deferred_cost is not None:
        program, deferred = defer_scales(program, options.deferred_cost, options.deferred_most)
    if options.matrix_unit:
        program, sums = sums_on_matrix_unit(program, leaves, _left(placement))
    if options.respell:
        program, others = respelled(program, leaves, options.respell)
    return Rewritten(program, deferred, sums, others)


def _left(placement: Placement) -> set[Root]:
    """The roots of the LayerNorms that keep their mean."""
    roots = roots_of(placement.graph)
    gone = placement.dropped | {i for i, folded in enumerate(placement.folded) if folded}
    kept = (norm.root for i, norm in enumerate(placement.norms) if i not in gone)
    return {roots[root.index] for root in kept if root is not None and root.index in roots}
