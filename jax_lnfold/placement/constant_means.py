"""The constant part of means that stay: a shift that is a parameter, taken out by another one.

In post-LN, ``x + f(x)`` with ``x = g * n + b`` has the mean of ``g * n``, which is another one for
every token, and that of ``b``. What nobody notices is the mean of the bias of f's last layer, so it
becomes ``-mean(b)`` (theory, section 12).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import isfinite
from typing import Any, NamedTuple

import numpy as np

from ..analysis.claims import Claim
from ..axes.axis_set import AxisSet
from ..axes.labels import ALL
from ..plan.edits.means import MeanEdit
from ..plan.plan import FoldPlan
from ..program.graph import Graph
from ..program.primitives import IDENTITIES, MOVES
from ..rules import Context, Opaque, rule_of
from .place import Placement

_SIGNS = {"add": (1, 1), "add_any": (1, 1), "sub": (1, -1), "neg": (-1,)}


class _Term(NamedTuple):
    """A leaf that is added to what a LayerNorm reads, or taken from it, by itself."""

    sign: int
    leaf: int
    whole: bool
    """Whether its mean is one number."""


def without_constants(plan: FoldPlan, placement: Placement, values: Mapping[str, Any]) -> FoldPlan:
    """The plan with means of biases that take out those of other leaves, which have `values`."""
    graph = placement.graph
    kept = [norm for norm, done in zip(placement.norms, placement.folded, strict=True) if not done]
    found = [[*_terms(graph, (norm.x, norm.along))] for norm in kept]
    means = dict(_balanced(found, _free(placement, found), plan, graph.leaves, values))
    paths = {edit.key_path for edit in means.values()}
    centered = tuple(edit for edit in plan.edits if edit.key_path not in paths)
    added = tuple(means[leaf] for leaf in sorted(means))
    return replace(plan, edits=centered, means=(*plan.means, *added))


def _free(placement: Placement, found: Sequence[Sequence[_Term]]) -> dict[int, AxisSet]:
    """Leaves that are one term of one LayerNorm, and whose mean no exact fold needs to be zero."""
    needed = {value for value, _ in placement.proofs}
    times = Counter(term.leaf for terms in found for term in terms)
    sets = placement.leaf_sets.items()
    return {v: s[0] for v, s in sets if len(s) == 1 and v not in needed and times[v] == 1}


def _balanced(
    found: Sequence[Sequence[_Term]],
    free: Mapping[int, AxisSet],
    plan: FoldPlan,
    names: Mapping[int, str],
    values: Mapping[str, Any],
) -> Iterator[tuple[int, MeanEdit]]:
    """For each LayerNorm a bias, if it has one, with minus the mean of all shifts."""
    edited = {path for path, edit in plan.leaf_edits().items() if not edit.recipe.assumed}
    for terms in found:
        bias = next((t for t in terms if t.leaf in free and t.whole), None)
        shifts = [t for t in terms if names[t.leaf] not in edited]
        if bias is not None and all(t.whole for t in shifts):
            total = sum(t.sign * _mean(values[names[t.leaf]]) for t in shifts)
            if total and isfinite(total):
                mean = -bias.sign * total
                yield bias.leaf, MeanEdit(names[bias.leaf], free[bias.leaf], (mean,))


def _terms(graph: Graph, claim: Claim) -> Iterator[_Term]:
    """The leaves whose mean is a term of the mean of a value, for every token alike."""
    todo = [(1, claim)]
    while todo:
        sign, (value, along) = todo.pop()
        if value in graph.leaves:
            yield _Term(sign, value, all(entry == ALL for entry in along.entries))
            continue
        made = graph.producer[value]
        if made is None or made[0].name not in _SIGNS.keys() | IDENTITIES | MOVES:
            continue
        op, position = made
        pulled = rule_of(op).pull(Context(graph, op, lambda *_: False), position, along)
        if not isinstance(pulled, Opaque):
            signs = _SIGNS.get(op.name, (1,))
            todo += [(sign * signs[i], (op.inputs[i], needed)) for i, needed in pulled.needs]


def _mean(value: Any) -> float:
    return float(np.asarray(value, np.float64).mean())
