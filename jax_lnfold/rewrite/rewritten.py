"""All rewrites, one after the other."""

from __future__ import annotations

from dataclasses import dataclass

from .._compat import ClosedJaxpr
from ..options import Options
from ..placement.place import Placement
from .defer import Deferral, defer_scales
from .fold import rewrite
from .matrix_unit import MatrixSum, sums_on_matrix_unit
from .roots import Root, roots_of


@dataclass(frozen=True, slots=True)
class Rewritten:
    """A folded program, the scales that are deferred in it, and the sums that are products."""

    program: ClosedJaxpr
    deferred: tuple[Deferral, ...] = ()
    sums: tuple[MatrixSum, ...] = ()


def rewritten(closed: ClosedJaxpr, placement: Placement, options: Options) -> Rewritten:
    """The folded program, with what the options ask for."""
    program, deferred, sums = rewrite(closed, placement), (), ()
    if options.deferred_cost is not None:
        program, deferred = defer_scales(program, options.deferred_cost)
    if options.matrix_unit:
        leaves = [*placement.graph.leaves.values()]
        program, sums = sums_on_matrix_unit(program, leaves, _left(placement))
    return Rewritten(program, deferred, sums)


def _left(placement: Placement) -> set[Root]:
    """The roots of the LayerNorms that keep their mean."""
    roots = roots_of(placement.graph)
    norms = zip(placement.norms, placement.folded, strict=True)
    kept = (norm.root for norm, folded in norms if not folded and norm.root is not None)
    return {roots[root.index] for root in kept if root.index in roots}
