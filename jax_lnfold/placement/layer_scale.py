"""LayerScale: per-feature parameter scales that a linear layer before them can absorb.

``(h W + b) * g = h (W * g) + b * g``. With ``g`` then set to one, a centering passes the product.
A scale can be merged when every use of it multiplies a value whose every contribution ends in
parameters that are used for nothing else. Scales stacked over the layers of a loop are merged
into parameters stacked in the same way.
"""

from __future__ import annotations

from ..plan.edits.scale import ScaleEdit
from ..program.graph import Graph, Op
from ..program.primitives import DIV, IDENTITIES, MUL, SCALINGS
from ..rules import axis_map
from ..trees import is_editable
from .absorbing import AxisPlaces, CannotAbsorb, candidates, carried, moved_places


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
        if absorbed and value not in absorbed and not parts & (taken | graph.excluded):
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

    def _fits(self, value: int, places: AxisPlaces) -> bool:
        """Whether the value has the axes of the scale, at least one of them outside of loops."""
        shape, sizes = self.graph.shape(value), self.graph.shape(self.scale)
        axes = [(p, sizes[d]) for p, d in zip(places, self.axes, strict=True) if isinstance(p, int)]
        return bool(axes) and all(p < len(shape) and shape[p] == n for p, n in axes)

    def _follow(self, value: int, places: AxisPlaces) -> None:
        """Find the products of the scale, through reshapes, casts and rows of it."""
        if value in self.graph.outputs:
            raise CannotAbsorb
        for op, position in self.graph.uses[value]:
            result = op.outputs[0] if op.outputs else value
            other = op.inputs[1 - position] if op.name in SCALINGS else value
            if other != value and self.graph.scalar(other) is not None:
                if op.name == DIV and position == 1:
                    raise CannotAbsorb
                self._follow(result, places)
            elif op.name == MUL and other != value:
                if not self._fits(result, places):
                    raise CannotAbsorb
                self._absorb(op, 1 - position, places)
            elif (axes := carried(self.graph, op)) is not None:
                self._follow(result, moved_places(places, axes))
            else:
                raise CannotAbsorb

    def _absorb(self, user: Op, position: int, places: AxisPlaces) -> None:
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

    def _sources(self, op: Op, places: AxisPlaces) -> list[tuple[int, AxisPlaces]]:
        """Operands of `op`, with places, that scaling its output comes down to."""
        if op.name == "neg" or op.name in IDENTITIES:
            return [(0, places)]
        if op.name in ("add", "sub", "add_any", "select_n"):
            terms = range(1 if op.name == "select_n" else 0, len(op.inputs))
            return [(i, places) for i in terms]
        if op.name in SCALINGS:
            free = [self.graph.data_free[v] for v in op.inputs]
            return [(1 if op.name == MUL and free[0] and not free[1] else 0, places)]
        for operand in range(len(op.inputs)):
            axes = axis_map(self.graph, op, operand)
            if {p for p in places if isinstance(p, int)} <= {*axes.values()}:
                before = {o: d for d, o in axes.items()}
                return [(operand, tuple(before.get(p, p) for p in places))]
        raise CannotAbsorb
