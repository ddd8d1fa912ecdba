"""Scales and shifts that the linear layers behind them can take up (theory, section 6).

``(x * g + c) W + b = x (g W) + (c W + b)``. With ``g`` then set to one and ``c`` to zero, both
vanish from the program. A scale can be taken up when every reader of ``x * g + c`` is a linear
layer whose kernel nobody else reads, a shift when these layers have a bias of their own, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp

from .graph import CallPath, Graph, Op
from .primitives import IDENTITIES
from .rules.contraction import output_axes
from .scales import CannotAbsorb, Places, candidates, kept_axes, renumbered
from .trees import is_editable

Origins = Mapping[int, int | CallPath]
"""Axis of a value -> axis of the leaf it is made of."""


@dataclass(frozen=True, slots=True)
class Reader:
    """A linear layer, by the positions of its leaves in the tree.

    The axes of the scale with more than one element run along `axes` of the kernel. The layer sums
    over the `summed` axes; the rest are those of the bias, in their order.
    """

    kernel: int
    axes: tuple[int, ...]
    bias: int | None = None
    summed: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class AffineMerge:
    """Take the scale and the shift at these leaves (positions) up into the readers."""

    scale: int
    shift: int | None
    readers: tuple[Reader, ...]


def find_affine(graph: Graph) -> dict[int, AffineMerge]:
    """All scales that can be taken up, by leaf value; no leaf has a part in two of them."""
    found: dict[int, AffineMerge] = {}
    taken: set[int] = set()
    for value in candidates(graph):
        try:
            merge = _Walk(graph, value).run()
        except CannotAbsorb:
            continue
        parts = {merge.scale, merge.shift}
        parts |= {leaf for r in merge.readers for leaf in (r.kernel, r.bias)}
        if merge.readers and not parts & taken:
            found[value] = merge
            taken |= parts - {None}
    return found


class _Walk:
    """Follows one scale forward to the linear layers that read what it scales."""

    def __init__(self, graph: Graph, scale: int) -> None:
        self.graph, self.scale = graph, scale
        self.axes = tuple(d for d, n in enumerate(graph.shape(scale)) if n != 1)
        self.scaled: set[int] = {scale}
        self.shift: int | None = None  # leaf value
        self.readers: dict[Reader, None] = {}
        self.followed: set[tuple[int, int]] = set()  # uses of leaves

    def run(self) -> AffineMerge:
        """The merge; raises `CannotAbsorb`."""
        graph = self.graph
        self._follow(self.scale, self.axes, shifted=False)
        parts = {leaf for r in self.readers for leaf in (r.kernel, r.bias) if leaf is not None}
        touched = [v for v, i in graph.leaves.items() if i in parts or v == self.shift]
        if any((op.index, i) not in self.followed for v in touched for op, i in graph.uses[v]):
            raise CannotAbsorb  # something else reads the parameter
        if any(v in graph.outputs for v in touched):
            raise CannotAbsorb
        shift = None if self.shift is None else graph.leaves[self.shift]
        return AffineMerge(graph.leaves[self.scale], shift, tuple(self.readers))

    def _follow(self, value: int, places: Places, shifted: bool) -> None:
        graph = self.graph
        if value in graph.outputs:
            raise CannotAbsorb
        self.scaled.add(value)
        for op, position in graph.uses[value]:
            result = op.outputs[0] if op.outputs else value
            others = [v for i, v in enumerate(op.inputs) if i != position]
            if any(v in self.scaled for v in others):
                raise CannotAbsorb  # squared, say
            if op.name == "dot_general":
                self._read(op, position, places, shifted)
            elif op.name in IDENTITIES:
                if not jnp.issubdtype(graph.avals[result].dtype, jnp.floating):
                    raise CannotAbsorb
                self._follow(result, places, shifted)
            elif op.name == "broadcast_in_dim":
                moved = renumbered(places, op.params["broadcast_dimensions"])
                self._follow(result, moved, shifted)
            elif op.name in ("reshape", "squeeze"):
                self._follow(result, renumbered(places, kept_axes(graph, value, result)), shifted)
            elif op.name == "transpose":
                back = {p: i for i, p in enumerate(op.params["permutation"])}
                self._follow(result, renumbered(places, back), shifted)
            elif op.name == "slice":
                sizes = [
                    (graph.shape(value)[p], graph.shape(result)[p])
                    for p in places
                    if isinstance(p, int)
                ]
                if any(n != m for n, m in sizes):
                    raise CannotAbsorb
                self._follow(result, places, shifted)
            elif op.name == "loop_slice":
                rows = (op.path if p == 0 else p - 1 if isinstance(p, int) else p for p in places)
                self._follow(result, tuple(rows), shifted)
            elif (op.name == "mul" or (op.name == "div" and position == 0)) and not shifted:
                self._follow(result, places, shifted)
            elif op.name == "add" and not shifted:
                self._add_shift(op, 1 - position, places)
                self._follow(result, places, shifted=True)
            else:
                raise CannotAbsorb

    def _add_shift(self, op: Op, position: int, places: Places) -> None:
        """The other term must be one leaf, along the axes of the scale."""
        leaf, origins = self._origin(op, position)
        sizes = self.graph.shape(leaf)
        along = tuple(origins.get(p) if isinstance(p, int) else 0 for p in places)
        axes = tuple(d for d, n in enumerate(sizes) if n != 1)
        if along != axes or self.shift not in (None, leaf):
            raise CannotAbsorb
        if [sizes[d] for d in axes] != [self.graph.shape(self.scale)[d] for d in self.axes]:
            raise CannotAbsorb
        self.shift = leaf

    def _read(self, op: Op, position: int, places: Places, shifted: bool) -> None:
        """A product that sums over the axes of the scale."""
        contracted, batch = op.params["dimension_numbers"]
        pairs = dict(zip(contracted[position], contracted[1 - position], strict=True))
        kernel, origins = self._origin(op, 1 - position)
        along = []
        for p in places:
            if isinstance(p, int) and p not in pairs:
                raise CannotAbsorb
            along.append(origins.get(pairs[p]) if isinstance(p, int) else origins.get(p))
        if None in along or len({*along}) < len(along):
            raise CannotAbsorb
        leaf = self.graph.leaves[kernel]
        if not shifted:
            self.readers[Reader(leaf, tuple(along))] = None
            return
        if batch[0]:
            raise CannotAbsorb
        ranks = [len(self.graph.shape(v)) for v in op.inputs]
        free = output_axes(op.params["dimension_numbers"], ranks, 1 - position)
        made_of = {o: origins.get(d) for d, o in free.items()}  # axis of the product -> kernel
        bias, bias_axes = self._bias(op.outputs[0], made_of, origins)
        summed = tuple(sorted(origins[d] for d in pairs.values() if d in origins))
        rest = [d for d, n in enumerate(self.graph.shape(kernel)) if n != 1 and d not in summed]
        if [*bias_axes] != rest:
            raise CannotAbsorb
        self.readers[Reader(leaf, tuple(along), bias, summed)] = None

    def _bias(
        self, value: int, made_of: Mapping[int, object], origins: Mapping[object, int]
    ) -> tuple[int, tuple[int, ...]]:
        """The leaf that is added to a product, with the axes of the kernel it runs along."""
        graph = self.graph
        while True:
            uses = graph.uses[value]
            if len(uses) != 1 or value in graph.outputs:
                raise CannotAbsorb
            (op, position), *_ = uses
            if op.name == "add":
                break
            if op.name not in IDENTITIES:
                raise CannotAbsorb
            value = op.outputs[0]
        leaf, own = self._origin(op, 1 - position)
        kernel_axis = {own[a]: made_of.get(a) for a in own if isinstance(a, int)}
        kernel_axis |= {own[p]: origins.get(p) for p in own if not isinstance(p, int)}
        axes = [d for d, n in enumerate(graph.shape(leaf)) if n != 1]
        along = [k for d in axes if isinstance(k := kernel_axis.get(d), int)]
        if len(along) < len(axes):
            raise CannotAbsorb
        return graph.leaves[leaf], tuple(along)

    def _origin(self, op: Op, position: int) -> tuple[int, dict]:
        """The leaf that an operand is, moved and converted only, and where its axes come from.

        An axis of the operand is mapped to an axis of the leaf, and so is a loop that takes it
        row by row.
        """
        graph, value = self.graph, op.inputs[position]
        origins: dict = {d: d for d in range(len(graph.shape(value)))}
        use = (op.index, position)
        while value not in graph.leaves:
            made = graph.producer[value]
            if made is None or len(graph.uses[value]) != 1 or value in graph.outputs:
                raise CannotAbsorb
            before, use = made[0], (made[0].index, 0)
            if before.name in IDENTITIES:
                back = {d: d for d in range(len(graph.shape(value)))}
            elif before.name == "transpose":
                back = dict(enumerate(before.params["permutation"]))
            elif before.name == "broadcast_in_dim":
                back = {o: i for i, o in enumerate(before.params["broadcast_dimensions"])}
            elif before.name in ("reshape", "squeeze"):
                back = kept_axes(graph, value, before.inputs[0])
            elif before.name == "loop_slice":
                back = {d: d + 1 for d in range(len(graph.shape(value)))}
            else:
                raise CannotAbsorb
            origins = {a: back[d] for a, d in origins.items() if d in back}
            if before.name == "loop_slice":
                origins[before.path] = 0
            value = before.inputs[0]
        if not is_editable(graph.avals[value].dtype):
            raise CannotAbsorb
        self.followed.add(use)
        sizes = graph.shape(value)
        return value, {a: d for a, d in origins.items() if sizes[d] != 1}
