"""LayerNorms that fold because of what values are: scales that are constant, means of shifts.

In post-LN the mean of ``g * n`` is zero for every token if ``g`` is the same number for all
features, and that of ``b`` is a number that a bias takes out (theory, section 12). That is no
property of the program, so it is asked for, and a plan says what has to stay so: as little as the
LayerNorms rest on that would not fold otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np

from .._compat import is_tracer
from ..analysis.assumptions import Assumptions
from ..analysis.facts import Facts
from ..axes.axis_set import AxisSet
from ..centering import widened
from ..options import Values
from ..plan.edits.assumed import CENTERED, CONSTANT, STATES, AssumedEdit
from ..program.graph import Graph
from ..rules import rule_of
from ..trees import is_editable
from .balancing import balanced
from .place import Placement

Place = Callable[[Assumptions], Placement]


def values_of(leaves: Sequence[tuple[str, Any]]) -> dict[str, Values | None]:
    """What there is to assume of leaves (key path, array); None of those that are not at hand."""
    found, looks = dict[str, Values | None](), dict[str, Any]()
    for path, x in leaves:
        abstract = isinstance(x, jax.ShapeDtypeStruct) or is_tracer(x)
        if abstract or not getattr(x, "is_fully_addressable", True):
            found[path] = None
        elif is_editable((x := x if isinstance(x, jax.Array) else np.asarray(x)).dtype):
            looks[path] = (_looked if isinstance(x, jax.Array) else _look)(x)
    for path, (mean, zero, *along) in jax.device_get(looks).items():
        if np.isfinite(mean):  # then all numbers are
            axes = frozenset(d for d, same in enumerate(along) if same)
            found[path] = Values(axes, bool(zero), float(mean))
    return found


def _look(x: Any) -> list[Any]:
    """The mean, whether all numbers are zero, and along which axes they are all equal."""
    same = [(x == x[(slice(None),) * d + (slice(1),)]).all() for d in range(x.ndim)]
    wide = x.astype(widened(x.dtype))
    mean = wide.sum() / max(x.size, 1)
    return [mean + (wide - mean).sum() / max(x.size, 1), (x == 0).all(), *same]


_looked = jax.jit(_look)


def assuming(plain: Placement, place: Place, values: Mapping[str, Values | None]) -> Placement:
    """The placement, or one that saves more as leaves have these `values`, by key path."""
    graph, place = plain.graph, partial(balanced, place)
    unknown = tuple(path for path, value in values.items() if value is None)
    plain = replace(plain, unknown=unknown)
    allowed = _allowed(graph, values)
    full = place(allowed)
    if _saved(full) <= _saved(plain):
        return plain
    found = _unspoilt(place, allowed.of(_needed(full)))
    if _saved(found) < _saved(full):
        found = max(found, _unspoilt(place, allowed), key=_saved)
    return replace(found, unknown=unknown) if _saved(found) > _saved(plain) else plain


def _allowed(graph: Graph, values: Mapping[str, Values | None]) -> Assumptions:
    """What may be assumed: nothing of what is excluded."""
    known = {
        v: x for v, p in graph.leaves.items() if v not in graph.excluded if (x := values.get(p))
    }
    axes = {v: () if x.zero else range(len(graph.shape(v))) for v, x in known.items()}
    sets = {v: AxisSet.over(graph.shape(v), axes[v]) for v in known}
    means = {v: x.mean for v, x in known.items() if not x.zero}
    centered = {v: along for v, along in sets.items() if known[v].zero or not along.trivial}
    return Assumptions({v: x.constant for v, x in known.items()}, centered, means)


def _saved(placement: Placement) -> tuple[int, int]:
    """How many numbers the LayerNorms have that fold, and how few centerings are inserted."""
    pairs = zip(placement.norms, placement.folded, strict=True)
    return sum(norm.elements for norm, done in pairs if done), -len(placement.explicit)


def _needed(placement: Placement) -> set[int]:
    """The leaves whose values are asked about when everything is derived again."""
    facts = Facts(placement.graph, placement.facts.ones, placement.facts.assumed)
    zeros, nodes = list[tuple[int, AxisSet]](), placement.search.nodes
    for value, along in placement.proofs:
        node = nodes[value, along]
        zeros += [(value, along)] * node.assumed
        if node.needs is not None and not node.is_zero:
            op, position = placement.graph.producer[value] or (None, 0)
            assert op is not None
            rule_of(op).pull(facts.context(op), position, along)
    for value, sets in (*placement.leaf_sets.items(), *placement.explicit.items()):
        for along in sets:
            facts.readers_notice(value, along)
    return {v for v, _ in (*_asked(facts), *zeros)}


def _asked(facts: Facts) -> Iterator[tuple[int, AxisSet]]:
    """Claims about leaves that were found to be uniform because of their values."""
    return ((v, s) for v, s in facts.proved_uniform if facts.assumed.is_constant(v, s))


def _unspoilt(place: Place, assumed: Assumptions) -> Placement:
    """The placement that assumes no more than this, and nothing of leaves that it edits."""
    while True:
        placement = place(assumed)
        edits = _edits(placement)
        spoilt = _edited(placement) & {edit.key_path for edit in edits}
        if not spoilt:
            return replace(placement, found={**placement.found, "assumed": edits})
        leaves = placement.graph.leaves
        assumed = assumed.of({v for v, path in leaves.items() if path not in spoilt})


def _edits(placement: Placement) -> tuple[AssumedEdit, ...]:
    """What the placement rests on, a single thing of each leaf."""
    graph, axes, centered = placement.graph, dict[int, set[int]](), dict[int, list[AxisSet]]()
    for value, along in _asked(placement.facts):
        axes.setdefault(value, set()).update(along.axes)
    for (value, along), node in placement.search.nodes.items():
        if node.assumed:
            centered.setdefault(value, []).append(along)
    edits = []
    for value in sorted(axes.keys() | centered.keys()):
        sets, shape = centered.get(value, []), graph.shape(value)
        along = sets[0] if sets else AxisSet.over(shape, axes[value])
        if sets and (len(sets) > 1 or value in axes):
            along = AxisSet.over(shape, ())  # zero: projections on several things need not commute
        mean = placement.facts.assumed.means.get(value, 0.0) if sets else 0.0
        edits.append(AssumedEdit(graph.leaves[value], along, CENTERED if sets else CONSTANT, mean))
    return tuple(edits)


def _edited(placement: Placement) -> set[str]:
    """Key paths of leaves that are edited."""
    edits = (*placement.merges, *(e for edits in placement.found.values() for e in edits))
    paths = {path for edit in edits for path in edit.parts}
    return paths | {placement.graph.leaves[v] for v in placement.leaf_sets}


def assumptions_of(edits: Sequence[AssumedEdit], value: Mapping[str, int]) -> Assumptions:
    """What a plan takes for granted, of leaves that have these values in a trace."""
    sets = {
        state: {value[e.key_path]: e.along for e in edits if e.state == state} for state in STATES
    }
    constant = {v: frozenset(along.axes) for v, along in sets[CONSTANT].items()}
    return Assumptions(
        constant, sets[CENTERED], {value[e.key_path]: e.mean for e in edits if e.mean}
    )
