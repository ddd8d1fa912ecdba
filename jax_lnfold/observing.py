"""Runs batches through a program that looks at what its LayerNorms read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ._compat import consts_of
from .measurement.shares import Sums, merged
from .measurement.watched import Watched
from .placement.place import Placement
from .program.tracing import Traced
from .report.names import names_of
from .report.statistics import Statistics, norm_statistics

Totals = dict[int, Sums]


def observed(
    traced: Traced,
    placement: Placement,
    sides: Sequence[tuple[Watched, Any]],
    inputs: Sequence[tuple[Any, ...]],
) -> Statistics:
    """What each LayerNorm reads, in one program or two, each with its parameters."""
    totals = _run(traced, sides, inputs) if placement.norms else [{}]
    before, after = totals[0], totals[-1] if len(totals) > 1 else {}
    return Statistics(
        tuple(
            norm_statistics(name.text, name.title, before.get(i), after.get(i))
            for i, name in enumerate(names_of(placement))
        ),
        len(inputs),
    )


def _run(
    traced: Traced, sides: Sequence[tuple[Watched, Any]], inputs: Sequence[tuple[Any, ...]]
) -> list[Totals]:
    """The sums of all batches, for each program with its parameters."""
    watched = [program for program, _ in sides]

    def run(consts: Any, each: list[Any], given: list[Any]) -> list[Totals]:
        return [w(consts, [*own, *given]) for w, own in zip(watched, each, strict=True)]

    # No outputs of the function are asked for: what only they need is not computed.
    parameters = [jax.tree.leaves(params) for _, params in sides]
    program = jax.jit(run, out_shardings=_everywhere((parameters, inputs[0])))
    totals: list[Totals] | None = None
    for batch in inputs:
        sums = program(consts_of(traced.closed), parameters, jax.tree.leaves(batch))
        new = jax.tree.map(_wide, jax.device_get(sums))
        totals = new if totals is None else jax.tree.map(_added, totals, new, is_leaf=_is_sums)
    assert totals is not None
    return totals


def _everywhere(tree: Any) -> Any:
    """Whole on all devices of the mesh that arrays are spread over: each process reads its own."""
    for x in jax.tree.leaves(tree):
        sharding = getattr(x, "sharding", None)
        if isinstance(sharding, NamedSharding) and sharding.num_devices > 1:
            return NamedSharding(sharding.mesh, PartitionSpec())
    return None


def _wide(x: np.ndarray) -> np.ndarray:
    return x.astype(np.int64 if np.issubdtype(x.dtype, np.integer) else np.float64)


def _added(one: Sums, other: Sums) -> Sums:
    with np.errstate(invalid="ignore"):  # of NaN, which stay
        return merged(Sums(*map(np.stack, zip(one, other, strict=True))), np)


def _is_sums(x: Any) -> bool:
    return isinstance(x, Sums)
