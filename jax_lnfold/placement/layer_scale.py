"""LayerScale: per-feature parameter scales that a linear layer before them can absorb.

``(h W + b) * g = h (W * g) + b * g``. With ``g`` then set to one, a centering passes the product.
A scale can be merged when every use of it multiplies a value whose every contribution ends in
parameters that are used for nothing else. Scales stacked over the layers of a loop are merged
into parameters stacked in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

from ..axes.broadcast import output_axes
from ..plan.edits import ScaleEdit
from ..program.graph import CallPath, Graph, Op
from ..program.primitives import IDENTITIES, MOVES
from ..trees import is_editable

Place = int | CallPath
"""An axis of a value, or the loop that takes it row by row."""
Places = tuple[Place, ...]
"""Where the axes of a scale are in a value."""


class CannotAbsorb(Exception):
    """A parameter has a use that rules out the merge: why, in words."""


def candidates(graph: Graph) -> list[int]:
    """Leaf values that may be scales: numbers that can be edited, more than one."""
    avals = ((value, graph.avals[value]) for value in graph.leaves)
    return [v for v, a in avals if is_editable(a.dtype) and {*a.shape} - {1}]


def find_merges(graph: Graph) -> dict[int, ScaleEdit]:
    """All scales that can be merged, by leaf value."""
    merges: dict[int, ScaleEdit] = {}
    taken: set[int] = set()
    for value in candidates(graph):
        try:
            absorbed = _Absorber(graph, value).run()
        except CannotAbsorb:
            continue
        parts = {value, *absorbed}
        if absorbed and value not in absorbed and not parts & taken:
            targets = tuple((graph.leaves[v], absorbed[v]) for v in sorted(absorbed))
            merges[value] = ScaleEdit(graph.leaves[value], targets)
            taken |= parts
    return merges


class _Absorber:
    """Pushes one scale back from its products into the parameters that feed them."""

    def __init__(self, graph: Graph, scale: int) -> None:
        self.graph, self.scale = graph, scale
        self.axes = tuple(d for d, n in enumerate(graph.shape(scale)) if n != 1)
        self.absorbed: dict[int, tuple[int, ...]] = {}  # leaf value -> axes
        self.followed: set[tuple[int, int]] = set()  # uses of leaves that end in a product

    def run(self) -> dict[int, tuple[int, ...]]:
        self._follow(self.scale, self.axes)
        for leaf in self.absorbed:
            others = {(op.index, i) for op, i in self.graph.uses[leaf]} - self.followed
            if others or leaf in self.graph.outputs:
                raise CannotAbsorb  # something else reads the unscaled parameter
        return self.absorbed

    def _fits(self, value: int, places: Places) -> bool:
        """Whether the value has the axes of the scale, at least one of them outside of loops."""
        shape, sizes = self.graph.shape(value), self.graph.shape(self.scale)
        axes = [(p, sizes[d]) for p, d in zip(places, self.axes, strict=True) if isinstance(p, int)]
        return bool(axes) and all(p < len(shape) and shape[p] == n for p, n in axes)

    def _follow(self, value: int, places: Places) -> None:
        """Find the products of the scale, through reshapes, casts and rows of it."""
        if value in self.graph.outputs:
            raise CannotAbsorb
        for op, position in self.graph.uses[value]:
            result = op.outputs[0] if op.outputs else value
            other = op.inputs[1 - position] if op.name in ("mul", "div") else value
            if other != value and self.graph.scalar(other) is not None:
                if op.name == "div" and position == 1:
                    raise CannotAbsorb
                self._follow(result, places)
            elif op.name == "mul" and other != value:
                if not self._fits(result, places):
                    raise CannotAbsorb
                self._absorb(op, 1 - position, places)
            elif (axes := carried(self.graph, op)) is not None:
                self._follow(result, renumbered(places, axes))
            else:
                raise CannotAbsorb

    def _absorb(self, user: Op, position: int, places: Places) -> None:
        """Scale operand `position` of `user`, by scaling what it is made of."""
        graph, value = self.graph, user.inputs[position]
        number = graph.scalar(value)
        if number is not None and number == 0:
            return
        if not is_editable(graph.avals[value].dtype):
            raise CannotAbsorb
        if not self._fits(value, places):
            raise CannotAbsorb
        if value in graph.leaves:
            axes = tuple(p for p in places if isinstance(p, int))
            use = (user.index, position)
            known = self.absorbed.setdefault(value, axes)
            if use in self.followed or known != axes or len(axes) != len(places):
                raise CannotAbsorb  # scaled twice over, along other axes, or not layer by layer
            self.followed.add(use)
            return
        made = graph.producer[value]
        if made is None or len(graph.uses[value]) != 1 or value in graph.outputs:
            raise CannotAbsorb
        for operand, before in self._sources(made[0], places):
            self._absorb(made[0], operand, before)

    def _sources(self, op: Op, places: Places) -> list[tuple[int, Places]]:
        """Operands of `op`, with places, that scaling its output comes down to."""
        if op.name == "neg" or op.name in IDENTITIES:
            return [(0, places)]
        if op.name in ("add", "sub", "add_any", "select_n"):
            terms = range(1 if op.name == "select_n" else 0, len(op.inputs))
            return [(i, places) for i in terms]
        if op.name in ("mul", "div"):
            free = [self.graph.data_free[v] for v in op.inputs]
            return [(1 if op.name == "mul" and free[0] and not free[1] else 0, places)]
        if op.name == "loop_slice":
            rows = (0 if p == op.path else p + 1 if isinstance(p, int) else p for p in places)
            return [(0, tuple(rows))]
        found = [self._source(op, p) for p in places if isinstance(p, int)]
        (operand, _), *rest = found
        if any(other != operand for other, _ in rest):
            raise CannotAbsorb
        axes = iter(axis for _, axis in found)
        return [(operand, tuple(next(axes) if isinstance(p, int) else p for p in places))]

    def _source(self, op: Op, axis: int) -> tuple[int, int]:
        """The operand of `op`, with its axis, that axis `axis` of the output stems from."""
        shape, params = self.graph.shape, op.params
        if op.name == "dot_general":
            ranks = [len(shape(v)) for v in op.inputs]
            for operand in (0, 1):
                axes = output_axes(params["dimension_numbers"], ranks, operand)
                for d, o in axes.items():
                    if o == axis:
                        return operand, d
        if op.name == "conv_general_dilated":
            numbers = params["dimension_numbers"]
            if axis == numbers.out_spec[1] and params["batch_group_count"] == 1:
                return 1, numbers.rhs_spec[0]
        if op.name == "reduce_sum":
            kept = [d for d in range(len(shape(op.inputs[0]))) if d not in params["axes"]]
            return 0, kept[axis]
        if op.name == "transpose":
            return 0, params["permutation"][axis]
        if op.name == "broadcast_in_dim" and axis in params["broadcast_dimensions"]:
            return 0, params["broadcast_dimensions"].index(axis)
        if op.name in ("reshape", "squeeze"):
            back = kept_axes(shape(op.outputs[0]), shape(op.inputs[0]))
            if axis in back:
                return 0, back[axis]
        raise CannotAbsorb


def kept_axes(before: Sequence[int], after: Sequence[int]) -> dict[int, int]:
    """Axis before -> axis after a reshape, for those that keep their size and their stride."""
    old, new = (
        {(prod(shape[d + 1 :]), n): d for d, n in enumerate(shape) if 0 not in shape[d + 1 :]}
        for shape in (before, after)
    )
    return {old[key]: new[key] for key in old if key in new and key[1] != 1}


def carried(graph: Graph, op: Op) -> Mapping[int, Place] | None:
    """Where the axes of the operand are in the result, if all `op` does is move and convert it.

    An axis that is taken row by row is in the loop. What is cut, repeated, merged or split is
    nowhere.
    """
    if op.name not in MOVES | IDENTITIES | {"slice", "loop_slice"}:
        return None
    before, after = graph.shape(op.inputs[0]), graph.shape(op.outputs[0])
    if op.name == "broadcast_in_dim":
        axes = enumerate(map(int, op.params["broadcast_dimensions"]))  # they may be NumPy's
        return {d: o for d, o in axes if before[d] == after[o]}
    if op.name == "transpose":
        return {int(p): d for d, p in enumerate(op.params["permutation"])}
    if op.name == "loop_slice":
        return {0: op.path} | {d + 1: d for d in range(len(after))}
    if op.name in ("reshape", "squeeze"):
        return kept_axes(before, after)
    if not is_editable(graph.avals[op.outputs[0]].dtype):
        return None
    return {d: d for d, (n, m) in enumerate(zip(before, after, strict=True)) if n == m}


def renumbered(places: Places, axes: Mapping[int, Place]) -> Places:
    """Where the axes are after a value was moved; those in loops stay."""
    if any(isinstance(p, int) and p not in axes for p in places):
        raise CannotAbsorb("its axes are cut, repeated, merged or split")
    return tuple(axes[p] if isinstance(p, int) else p for p in places)
