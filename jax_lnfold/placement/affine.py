"""Scales and shifts that the linear layers behind them can take up (theory, section 6).

``(x * g + c) W + b = x (g W) + (c W + b)``. With ``g`` then set to one and ``c`` to zero, both
vanish from the program. A scale can be taken up when every reader of ``x * g + c`` is a linear
layer whose kernel nobody else reads, a shift when these layers have a bias of their own, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from heapq import heappop, heappush
from math import inf

from ..errors import PlanMismatchError
from ..options import Options
from ..plan.edits.affine import AffineEdit, AffineReader
from ..program.counts import products_per_element
from ..program.graph import Graph, Op
from ..program.primitives import DIV, LINEAR, MUL
from .absorbing import AxisPlaces, CannotAbsorb, are_seen, candidates, carried, moved_places
from .linear_readers import axes_of_product, kernel_axes, source_of, summed_axes, with_bias
from .place import Placement
from .scaled_values import Scaled, moved


def with_affine(placement: Placement, options: Options) -> Placement:
    """The placement with every scale and shift that linear layers can take up, and it leaves."""
    if not options.fold_affine:
        return placement
    graph = placement.graph
    merged = {merge.key_path for merge in placement.merges}
    busy = {path for merge in placement.merges for path in merge.parts}
    busy |= {graph.leaves[v] for v in placement.leaf_sets}
    excluded = {graph.leaves[v] for v in graph.excluded}
    found, left = find_affine(graph, options.affine_most)
    for value, merge in [*found.items()]:
        # What is merged or centered, and then filled, would not be what the layers take up.
        if {merge.key_path, merge.shift} & busy:
            left[value] = "it, or its shift, is edited already so that a LayerNorm folds"
            del found[value]
        elif kept := [path for path in merge.parts if path in excluded]:
            left[value] = f"`{kept[0]}` is excluded"
            del found[value]
    words = {graph.leaves[v]: why for v, why in left.items() if graph.leaves[v] not in merged}
    found_too = {**placement.found, "affine": tuple(found.values())}
    return replace(placement, found=found_too, affine_left=words)


def check_affine(edit: AffineEdit, value: Mapping[str, int], graph: Graph) -> None:
    """Not all readers of the plan need be in this trace, but none may be another one."""
    try:
        here = merge_of(graph, value[edit.key_path])
        same = replace(here, readers=edit.readers) == edit and {*here.readers} <= {*edit.readers}
        seen = {*here.parts} if same else set()
    except CannotAbsorb:
        seen = set[str]()
    if are_seen(graph, (value[path] for path in {*edit.parts} - seen)):
        raise PlanMismatchError(
            f"inputs: for these inputs the scale {edit.key_path!r}, or what takes it up, is used "
            "in another way than in the example the plan was made for; fold again with these inputs"
        )


def find_affine(graph: Graph, most: float = inf) -> tuple[dict[int, AffineEdit], dict[int, str]]:
    """The scales that can be taken up, and why all others cannot, by leaf value.

    No leaf has a part in two of them. Those are left that scale numbers which products multiply
    more than `most` times each: what is saved there is nothing beside the products.
    """
    found: dict[int, AffineEdit] = {}
    left: dict[int, str] = {}
    taken: set[str] = set()
    order = [*graph.leaves.values()]
    for value in candidates(graph):
        if not _scales_data(graph, value):
            continue
        try:
            walk = Walk(graph, value)
            merge = walk.run()
            if products_per_element(graph, walk.reads) > most:
                raise CannotAbsorb("beside the products behind it nothing would be saved")
            if shared := taken.intersection(merge.parts):
                raise CannotAbsorb(f"`{min(shared, key=order.index)}` takes up another scale")
        except CannotAbsorb as why:
            left[value] = str(why)
        else:
            found[value] = merge
            taken.update(merge.parts)
    return found, left


def merge_of(graph: Graph, scale: int) -> AffineEdit:
    """How the leaf value `scale` is taken up; raises `CannotAbsorb` with the words for a report."""
    return Walk(graph, scale).run()


def _scales_data(graph: Graph, leaf: int) -> bool:
    """Whether a leaf, moved, or with something added that depends on no data, multiplies data."""
    todo, seen = [leaf], {leaf}
    while todo:
        for op, position in graph.uses[todo.pop()]:
            others = [v for i, v in enumerate(op.inputs) if i != position]
            free = all(graph.data_free[v] for v in others)
            product = op.name == MUL or (op.name == "dot_general" and not summed_axes(op, position))
            if product and not free:
                return True
            if carried(graph, op) is not None or (free and (product or op.name in ("add", "sub"))):
                todo += {*op.outputs} - seen
                seen.update(op.outputs)
    return False


class Walk:
    """Follows one scale forward to the linear layers that read what it scales."""

    def __init__(self, graph: Graph, scale: int) -> None:
        """Prepare to follow the leaf value `scale`."""
        self.graph, self.scale = graph, scale
        self.scaled: dict[int, Scaled] = {}
        self.todo: list[int] = []  # operations that read them, as a heap: operands come first
        self.one: int | None = None
        self.shift: int | None = None  # leaf value
        self.readers: dict[AffineReader, None] = {}
        self.reads: list[tuple[Op, int]] = []  # the same, as they read what is scaled
        self.followed: set[tuple[int, int]] = set()  # uses of leaves

    def run(self) -> AffineEdit:
        """The merge; raises `CannotAbsorb`."""
        graph, done = self.graph, -1
        sizes = {d: n for d, n in enumerate(graph.shape(self.scale)) if n != 1}
        first = Scaled((*sizes,), (*sizes.values(),), (0,) * len(sizes), raw=True)
        self._reach(self.scale, first)
        while self.todo:
            if (index := heappop(self.todo)) != done:
                self._step(graph.ops[index])
            done = index
        shift = None if self.shift is None else graph.leaves[self.shift]
        one = 1 if self.one is None else self.one
        merge = AffineEdit(graph.leaves[self.scale], shift, tuple(self.readers), one)
        self._check(merge)
        return merge

    def _check(self, merge: AffineEdit) -> None:
        """Every leaf has one role, and nothing but the readers reads it."""
        graph, kernels = self.graph, [r.kernel for r in merge.readers]
        for kernel in kernels:
            if kernels.count(kernel) > 1:
                raise CannotAbsorb(f"its kernel `{kernel}` is read in two ways, or with two biases")
        roles = [*merge.parts]
        for leaf in roles:
            if roles.count(leaf) > 1:
                raise CannotAbsorb(f"the parameter `{leaf}` has two roles in it")
        for reader in merge.readers:
            if merge.shift is not None and reader.bias is None:  # plans have no words for it
                words = f"the kernel `{reader.kernel}` reads it without the shift `{merge.shift}`"
                raise CannotAbsorb(words)
        for value, leaf in graph.leaves.items():
            if leaf not in roles or value == self.scale:
                continue
            for op, position in graph.uses[value]:
                if (op.index, position) not in self.followed:
                    raise CannotAbsorb(f"{op.location()} reads the parameter `{leaf}`, too")
            if value in graph.outputs:
                raise CannotAbsorb(f"the parameter `{leaf}` is returned")

    def _reach(self, value: int, state: Scaled) -> None:
        if value in self.graph.outputs:
            raise CannotAbsorb("it is returned" if state.raw else "what it scales is returned")
        self.scaled[value] = state
        for op, _ in self.graph.uses[value]:
            heappush(self.todo, op.index)

    def _step(self, op: Op) -> None:
        states = [self.scaled.get(v) for v in op.inputs]
        hits = [i for i, state in enumerate(states) if state is not None]
        if op.name in LINEAR:  # which may repeat an axis of size 1 that a part of it has
            for value, state in zip(op.inputs, states, strict=True):
                shapes = self.graph.shape(value), self.graph.shape(op.outputs[0])
                if state is not None and not state.is_alike(*shapes):
                    raise CannotAbsorb(f"{op.location()} repeats a part of it")
        if op.name in ("add", "sub"):
            self._reach(op.outputs[0], self._sum(op, hits))
        elif (results := moved(self.graph, op, states)) is not None:
            for value, state in zip(op.outputs, results, strict=True):
                self._reach(value, state)
        elif len(hits) > 1:
            raise CannotAbsorb(f"{op.location()} reads what it scales twice")
        elif op.name in (MUL, "neg") or (op.name == DIV and hits == [0]):
            state = self.scaled[op.inputs[hits[0]]]
            self._reach(op.outputs[0], self._times(op, state, state.places))
        elif op.name == "dot_general":
            self._product(op, hits[0], self.scaled[op.inputs[hits[0]]])
        else:
            raise CannotAbsorb(f"{op.location()} reads what it scales")

    def _means(self, one: int) -> None:
        """The scale is the leaf plus ``1 - one``, everywhere."""
        if self.one not in (None, one):
            raise CannotAbsorb("it is read as it is, and with 1 added")
        self.one = one

    def _times(self, op: Op, state: Scaled, places: AxisPlaces) -> Scaled:
        """Something that is linear in a value."""
        if state.shifted:
            raise CannotAbsorb(f"{op.location()} scales what is scaled and shifted")
        if state.raw:
            self._means(1)
        return replace(state, places=places, raw=False)

    def _sum(self, op: Op, hits: Sequence[int]) -> Scaled:
        """A sum of two such values, or of one with a parameter, which is the shift."""
        minus = op.name == "sub"
        states = [self.scaled.get(v) for v in op.inputs]
        if minus and states[1] is not None:  # so would be its shift
            states[1] = self._times(op, states[1], states[1].places)
        if len(hits) > 1:
            return self._joint(op, *filter(None, states))
        state, other = states[hits[0]], 1 - hits[0]
        assert state is not None
        number = self.graph.scalar(op.inputs[other])
        if number is not None and number == 0:
            return state
        if number is not None and number == 1 and state.raw and not minus:
            self._means(0)
            return replace(state, raw=False)
        if minus and other == 1:
            raise CannotAbsorb(f"{op.location()} subtracts from what it scales")
        if state.shifted:
            raise CannotAbsorb(f"{op.location()} adds to what is scaled and shifted")
        linear = self._times(op, state, state.places)
        self._add_shift(op, other, linear)
        return replace(linear, shifted=True)

    def _joint(self, op: Op, one: Scaled, other: Scaled) -> Scaled:
        if one.raw or other.raw:
            raise CannotAbsorb(f"{op.location()} adds it to what it scales")
        either = replace(one, shifted=one.shifted or other.shifted)
        if (one.shifted and other.shifted) or either != replace(other, shifted=either.shifted):
            words = (
                f"{op.location()} adds other parts or axes of what it scales, or its shift twice"
            )
            raise CannotAbsorb(words)
        return either

    def _add_shift(self, op: Op, position: int, state: Scaled) -> None:
        """The other term must be one leaf, along the axes of the scale."""
        graph, found = self.graph, source_of(self.graph, op, position)
        if found is None:
            raise CannotAbsorb(f"{op.location()} adds to it what is no parameter as it is stored")
        leaf, sizes = graph.leaves[found.leaf], graph.shape(found.leaf)
        axes = [d for d, n in enumerate(sizes) if n != 1]
        whole = state.is_whole(graph.shape(op.inputs[position]))
        same = whole and tuple(sizes[d] for d in axes) == state.sizes
        if not same or [*map(found.origins.get, state.places)] != axes:
            raise CannotAbsorb(f"the parameter `{leaf}`, which is added to it, has other axes")
        if self.shift not in (None, found.leaf):
            known = graph.leaves[self.shift]
            raise CannotAbsorb(f"the parameters `{known}` and `{leaf}` shift it")
        self.shift = found.leaf
        self.followed.add(found.use)

    def _product(self, op: Op, position: int, state: Scaled) -> None:
        """A product that sums over the axes of the scale reads it; another one passes it on."""
        graph, places = self.graph, state.places
        if not {*summed_axes(op, position)}.intersection(places):
            there = moved_places(places, axes_of_product(graph, op, position))
            self._reach(op.outputs[0], self._times(op, state, there))
            return
        if not state.is_whole(graph.shape(op.inputs[position])):
            raise CannotAbsorb(f"{op.location()} reads a part of what it scales")
        self._reader(op, position, state)

    def _reader(self, op: Op, position: int, state: Scaled) -> None:
        """A product that sums over the axes of the scale: a linear layer takes it up."""
        graph, places = self.graph, state.places
        kernel = source_of(graph, op, 1 - position)
        if kernel is None:
            raise CannotAbsorb(
                f"{op.location()} multiplies it with what is no parameter as it is stored"
            )
        leaf, along = graph.leaves[kernel.leaf], kernel_axes(op, position, places, kernel)
        if along is None:
            raise CannotAbsorb(f"its axes are not all axes of the kernel `{leaf}`")
        if state.raw:
            self._means(1)
        self.followed.add(kernel.use)
        reader = AffineReader(leaf, along)
        if state.shifted:
            reader, use = with_bias(graph, op, 1 - position, kernel, reader)
            self.followed.add(use)
        self.readers[reader] = None
        self.reads.append((op, position))
