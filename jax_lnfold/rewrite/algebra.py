"""Plain algebra with operands all of whose elements are known to be zero, or all to be one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..program.graph import Graph, Op
from ..program.primitives import DIV, MOVES, MUL

Numbers = list[float | None]
"""The number that all elements of an operand are, if it is known."""

_NEUTRAL = {"add": 0, "sub": 0, MUL: 1, DIV: 1}


def surviving_operand(name: str, numbers: Numbers) -> int | None:
    """Which operand a sum with zero or a product with one comes down to, if to any."""
    if name not in _NEUTRAL:
        return None
    neutral = [n == _NEUTRAL[name] for n in numbers]
    if neutral[1]:
        return 0
    return 1 if neutral[0] and name in ("add", MUL) else None


def known_result(graph: Graph, op: Op, numbers: Numbers) -> float | None:
    """The number that all elements of the result are, zero or one, if those of operands say so."""
    infer = _RESULTS.get(op.name)
    return infer(graph, op, numbers) if infer else None


def _kept(graph: Graph, op: Op, numbers: Numbers) -> float | None:
    """Moves and casts keep the number."""
    return numbers[0]


def _zero(graph: Graph, op: Op, numbers: Numbers) -> float | None:
    """``-0 = 0``, ``0**2 = 0``, ``sum(0) = 0``."""
    return 0 if numbers[0] == 0 else None


def _power(graph: Graph, op: Op, numbers: Numbers) -> float | None:
    """``0**n = 0`` for ``n > 0`` only."""
    return _zero(graph, op, numbers) if op.params["y"] > 0 else None


def _product(graph: Graph, op: Op, numbers: Numbers) -> float | None:
    """``1 * 1 = 1``, and ``0 * c = 0`` for a finite c: a known number or one in the program."""
    if numbers == [1, 1]:
        return 1
    pairs = zip(numbers, op.inputs, strict=True)
    finite = all(n is not None or _is_finite(graph, v) for n, v in pairs)
    return 0 if 0 in numbers and finite else None


def _quotient(graph: Graph, op: Op, numbers: Numbers) -> float | None:
    """``0 / c = 0`` for a finite c that is not zero."""
    divisor = op.inputs[1]
    usable = _is_finite(graph, divisor) and graph.scalar(divisor) != 0
    return 0 if numbers[0] == 0 and (usable or numbers[1] == 1) else None


def _sum(graph: Graph, op: Op, numbers: Numbers) -> float | None:
    """``0 + 0 = 0``, and ``0 + 1 = 1``, as in a scale to which the program adds one."""
    if numbers == [0, 0]:
        return 0
    added = map(graph.scalar, op.inputs)
    return 1 if 0 in numbers and any(n is not None and n == 1 for n in added) else None


def _difference(graph: Graph, op: Op, numbers: Numbers) -> float | None:
    """``0 - 0 = 0``."""
    return 0 if numbers == [0, 0] else None


def _is_finite(graph: Graph, value: int) -> bool:
    number = graph.scalar(value)
    return number is not None and bool(np.isfinite(number))


_KEEPS_NUMBERS = MOVES | frozenset(
    "convert_element_type copy stop_gradient sharding_constraint".split()
)
_RESULTS: dict[str, Callable[[Graph, Op, Numbers], float | None]] = {
    **dict.fromkeys(_KEEPS_NUMBERS, _kept),
    **dict.fromkeys(("neg", "square", "reduce_sum"), _zero),
    "integer_pow": _power,
    MUL: _product,
    DIV: _quotient,
    "add": _sum,
    "sub": _difference,
}
