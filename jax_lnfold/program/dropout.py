"""Recognises elementwise dropout: what random bits alone replace by zero.

Its mask is a boolean computed from random bits and numbers, maybe converted and scaled; the data
are chosen by it (`select_n` with a zero) or multiplied by it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .graph import Graph
from .primitives import ELEMENTWISE, MOVES, MUL, SCALINGS

_BITS = frozenset("random_bits threefry2x32 rng_bit_generator rng_uniform".split())
_KEEPS_NOISE = ELEMENTWISE | MOVES | frozenset("bitcast_convert_type concatenate slice".split())
_KEEPS_MASK = (
    MOVES | SCALINGS | frozenset("convert_element_type copy stop_gradient select_n".split())
)


def note_noise(graph: Graph, name: str, inputs: Sequence[int], outputs: Sequence[int]) -> None:
    """Remember which values are computed from random bits, and which of them are masks."""
    noisy = [v for v in inputs if v in graph.noise]
    others = (v for v in inputs if v not in graph.noise)
    numbers = all(graph.fixed[v] or graph.shape(v) == () for v in others)
    if name not in _BITS and not (noisy and numbers and name in _KEEPS_NOISE):
        return
    for value in outputs:
        is_bool = graph.avals[value].dtype == np.bool_
        from_mask = name in _KEEPS_MASK and all(v in graph.masks for v in noisy)
        graph.noise.add(value)
        if is_bool or (noisy and from_mask):
            graph.masks.add(value)


def dropped_operand(graph: Graph, name: str, inputs: Sequence[int]) -> int | None:
    """The operand of an equation that it drops at random, by position; None if there is none."""
    if name == "select_n" and len(inputs) == 3 and inputs[0] in graph.masks:
        kept = [i for i in (1, 2) if graph.scalar(inputs[i]) != 0]
    elif name == MUL and any(v in graph.masks for v in inputs):
        kept = [i for i in (0, 1) if inputs[i] not in graph.masks]
    else:
        return None
    is_data = len(kept) == 1 and not (
        inputs[kept[0]] in graph.noise or graph.fixed[inputs[kept[0]]]
    )
    return kept[0] if is_data else None
