"""How much arithmetic there is around a value."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from .graph import Graph, Op


def products_per_element(graph: Graph, reads: Iterable[tuple[Op, int]]) -> float:
    """How often `dot_general`s multiply each element that they read, by these operands, on average.

    A loop runs all of them as often, so its length is no matter.
    """
    elements, products = dict[int, int](), 0
    for op, position in reads:
        value, summed = op.inputs[position], op.params["dimension_numbers"][0][position]
        shape = graph.shape(value)
        elements[value] = _size(shape)
        products += _size(graph.shape(op.outputs[0])) * _size([shape[d] for d in summed])
    return products / max(1, sum(elements.values()))


def _size(shape: Iterable[object]) -> int:
    return prod(n for n in shape if isinstance(n, int))
