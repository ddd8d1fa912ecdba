"""Whether the last digits of a value show in what a program returns."""

from __future__ import annotations

from collections.abc import Iterable

import jax.numpy as jnp

from ..program.graph import Graph
from ..program.primitives import ELEMENTWISE, MOVES


def is_rounded(graph: Graph, values: Iterable[int], bits: int) -> bool:
    """Whether all that is made of `values` is rounded to few bits before it is read otherwise."""
    todo = list(values)
    seen = {*todo}
    while todo:
        value = todo.pop()
        dtype = graph.avals[value].dtype
        if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits <= bits:
            continue
        if value in graph.outputs:
            return False
        for use, _ in graph.uses[value]:
            if use.name not in ELEMENTWISE | MOVES:
                return False
            todo += {*use.outputs} - seen
            seen |= {*use.outputs}
    return True
