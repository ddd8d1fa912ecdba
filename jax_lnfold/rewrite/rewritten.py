"""All rewrites, one after the other."""

from __future__ import annotations

from dataclasses import dataclass

from .._compat import ClosedJaxpr
from ..options import Options
from ..placement.place import Placement
from .defer import Deferral, defer_scales
from .fold import rewrite
from .matrix_unit import MatrixSum, sums_on_matrix_unit


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
        program, sums = sums_on_matrix_unit(program, [*placement.graph.leaves.values()])
    return Rewritten(program, deferred, sums)
