"""Masks by numbers so low that they take up every shift, and who may read what is masked so."""

from __future__ import annotations

import numpy as np

from ..program.graph import Graph
from ..program.primitives import IDENTITIES, MOVES, STOP

LOWEST = -9e29
"""The last digit of such a number, in any dtype that has it, is worth 1e14 or more."""
_SAME = IDENTITIES | MOVES | {STOP}


def takes_up_shifts(graph: Graph, number: np.ndarray, masked: int) -> bool:
    """Whether the value `masked`, in which elements are `number`, is as if they were shifted, too.

    ``-inf + u`` is -inf. Of a finite ``c + u`` only rounding leaves c: that holds as long as nobody
    adds to it what it is short of zero, so the differences from its maximum must be all that is
    computed of the value, in which every other number is lost: a softmax.
    """
    if np.isneginf(number):
        return True
    return float(number) <= LOWEST and _is_compared_with_maximum(graph, masked)


def _is_compared_with_maximum(graph: Graph, value: int) -> bool:
    """Whether all that reads a value takes its maximum, or subtracts that."""
    same, differences = [value], list[int]()
    for v in same:
        if v in graph.outputs:
            return False
        for op, position in graph.uses[v]:
            if op.name in _SAME:
                same += op.outputs
            elif op.name == "sub" and position == 0:
                differences.append(op.inputs[1])
            elif op.name not in ("reduce_max", "argmax"):
                return False
    return all(_is_maximum(graph, v, same) for v in differences)


def _is_maximum(graph: Graph, value: int, of: list[int]) -> bool:
    """Whether a value is the maximum of one of these, and maybe of numbers as low as a mask."""
    while (made := graph.producer[value]) is not None:
        op, numbers = made[0], [graph.scalar(v) for v in made[0].inputs]
        low = [number is not None and float(number) <= LOWEST for number in numbers]
        if op.name == "reduce_max":
            return op.inputs[0] in of
        if op.name == "max" and any(low):
            value = op.inputs[1 - low.index(True)]
        elif op.name in _SAME:
            value = op.inputs[0]
        else:
            return False
    return False
