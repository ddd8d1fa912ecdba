"""Linear layers as readers of a scaled value: which leaves are their kernel and their bias."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..axes.broadcast import output_axes
from ..plan.edits.affine import AffineReader
from ..program.graph import Graph, Op
from ..trees import is_editable
from .absorbing import AxisPlace, AxisPlaces, CannotAbsorb, carried

Origins = Mapping[AxisPlace, int]
"""Axis of a value, or loop that takes it row by row -> axis of a leaf."""

Use = tuple[int, int]
"""An operation by its index, and which operand of it."""


@dataclass(frozen=True, slots=True)
class Source:
    """The leaf value that an operand is, moved and converted only, and the use of it.

    An axis of the operand, or a loop that takes it row by row, is mapped to its axis of the leaf.
    """

    leaf: int
    origins: Origins
    use: Use


def _moved(origins: Origins, axes: Mapping[int, AxisPlace]) -> Origins:
    """The same for another value, whose axes these axes are."""
    kept = ((a, d) for a, d in origins.items() if a in axes or not isinstance(a, int))
    return {axes[a] if isinstance(a, int) else a: d for a, d in kept}


def source_of(graph: Graph, op: Op, position: int) -> Source | None:
    """The source of an operand, if it is a leaf and what is made of the leaf has no other use."""
    value, use = op.inputs[position], (op.index, position)
    origins: dict[AxisPlace, int] = {d: d for d in range(len(graph.shape(value)))}
    while value not in graph.leaves:
        made = graph.producer[value]
        if made is None or len(graph.uses[value]) != 1 or value in graph.outputs:
            return None
        axes, use = carried(graph, made[0]), (made[0].index, 0)
        if axes is None:
            return None
        back = {after: before for before, after in axes.items()}
        loops = {loop: d for loop, d in back.items() if not isinstance(loop, int)}
        origins = {a: back[d] for a, d in origins.items() if d in back} | loops
        value = made[0].inputs[0]
    if not is_editable(graph.avals[value].dtype):
        return None  # its digits cannot take up a factor
    sizes = graph.shape(value)
    return Source(value, {a: d for a, d in origins.items() if sizes[d] != 1}, use)


def summed_axes(op: Op, operand: int) -> Sequence[int]:
    """The axes of an operand that a product sums over."""
    return op.params["dimension_numbers"][0][operand]


def axes_of_product(graph: Graph, op: Op, operand: int) -> dict[int, int]:
    """Axis of an operand -> axis of the product, where it is not summed over."""
    numbers = op.params["dimension_numbers"]
    batch = {d: o for o, d in enumerate(numbers[1][operand])}
    return batch | output_axes(numbers, [len(graph.shape(v)) for v in op.inputs], operand)


def kernel_axes(
    op: Op, position: int, places: AxisPlaces, kernel: Source
) -> tuple[int, ...] | None:
    """The axes of the kernel that those of operand `position` at `places` run along."""
    contracted, batch = op.params["dimension_numbers"]
    pairs: dict[int, int] = {}
    for numbers in (contracted, batch):
        pairs |= zip(numbers[position], numbers[1 - position], strict=True)
    there = [pairs.get(p) if isinstance(p, int) else p for p in places]
    along = [kernel.origins[p] for p in there if p is not None and p in kernel.origins]
    return tuple(along) if len({*along}) == len(places) else None


def with_bias(
    graph: Graph, op: Op, operand: int, kernel: Source, reader: AffineReader
) -> tuple[AffineReader, Use]:
    """The reader with the leaf that is added to its product, and the use of that leaf.

    The leaf runs along all axes of the kernel that are not summed over, in their order.
    """
    sums, sizes = summed_axes(op, operand), graph.shape(op.inputs[operand])
    if any(sizes[d] != 1 and d not in kernel.origins for d in sums):
        raise CannotAbsorb(f"the kernel `{reader.kernel}` is repeated along an axis of the sum")
    summed = tuple(sorted(kernel.origins[d] for d in sums if d in kernel.origins))
    axes = axes_of_product(graph, op, operand)
    made_of = _moved(kernel.origins, axes)
    bias, made_of = _added(graph, op.outputs[0], made_of, reader.kernel)
    along = {d: made_of.get(a) for a, d in bias.origins.items()}
    rest = (d for d, n in enumerate(graph.shape(kernel.leaf)) if n != 1 and d not in summed)
    own = (d for d, n in enumerate(graph.shape(bias.leaf)) if n != 1)
    leaf = graph.leaves[bias.leaf]
    if [along.get(d) for d in own] != [*rest]:
        raise CannotAbsorb(f"the parameter `{leaf}` is no bias of the kernel `{reader.kernel}`")
    return replace(reader, bias=leaf, summed=summed), bias.use


def _added(graph: Graph, value: int, made_of: Origins, kernel: str) -> tuple[Source, Origins]:
    """What is added to a product, and what the axes of the product are made of by then."""
    while len(graph.uses[value]) == 1 and value not in graph.outputs:
        ((op, position),) = graph.uses[value]
        if op.name == "add" and (found := source_of(graph, op, 1 - position)) is not None:
            return found, made_of
        if (axes := carried(graph, op)) is None:
            break
        made_of = _moved(made_of, axes)
        value = op.outputs[0]
    raise CannotAbsorb(
        f"only a bias could take up its shift, and none is added right behind the kernel `{kernel}`"
    )
