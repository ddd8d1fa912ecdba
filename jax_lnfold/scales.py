"""LayerScale: per-feature parameter scales that a linear layer before them can absorb.

``(h W + b) * g = h (W * g) + b * g``. With ``g`` then set to one, a centering passes the product.
A scale can be merged when every use of it multiplies a value whose every contribution ends in
parameters that are used for nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp

from .graph import Graph, Op
from .rules.contraction import output_axes
from .rules.elementwise import IDENTITIES


@dataclass(frozen=True, slots=True)
class ScaleMerge:
    """Multiply `targets` by the scale, then set the scale to one. Leaves are given by position.

    Each target is (leaf, axis): the scale runs along that axis.
    """

    scale: int
    targets: tuple[tuple[int, int], ...]


class _CannotAbsorb(Exception):
    pass


def find_merges(graph: Graph) -> dict[int, ScaleMerge]:
    """All scales that can be merged, by leaf value."""
    merges: dict[int, ScaleMerge] = {}
    taken: set[int] = set()
    for value, leaf in graph.leaves.items():
        aval = graph.avals[value]
        if not jnp.issubdtype(aval.dtype, jnp.floating) or sum(n != 1 for n in aval.shape) != 1:
            continue
        try:
            absorbed = _Absorber(graph, value).run()
        except _CannotAbsorb:
            continue
        targets = tuple(sorted((graph.leaves[v], d) for v, d in absorbed.items()))
        if targets and not any(t in taken or t == leaf for t, _ in targets) and leaf not in taken:
            merges[value] = ScaleMerge(leaf, targets)
            taken.update(t for t, _ in targets)
            taken.add(leaf)
    return merges


class _Absorber:
    """Pushes one scale back from its products into the parameters that feed them."""

    def __init__(self, graph: Graph, scale: int) -> None:
        self.graph, self.scale = graph, scale
        shape = graph.shape(scale)
        self.axis = next(d for d, n in enumerate(shape) if n != 1)
        self.size = shape[self.axis]
        self.absorbed: dict[int, int] = {}  # leaf value -> axis
        self.followed: set[tuple[int, int]] = set()  # uses of leaves that end in a product

    def run(self) -> dict[int, int]:
        self._follow(self.scale, self.axis)
        for leaf in self.absorbed:
            if any((op.index, i) not in self.followed for op, i in self.graph.uses[leaf]):
                raise _CannotAbsorb  # something else reads the unscaled parameter
        return self.absorbed

    def _follow(self, value: int, axis: int) -> None:
        """Find the products of the scale, through reshapes and casts of it."""
        if value in self.graph.outputs:
            raise _CannotAbsorb
        for op, position in self.graph.uses[value]:
            shape = self.graph.shape(op.outputs[0])
            if op.name == "mul" and op.inputs[0] != op.inputs[1]:
                other = 1 - position
                if shape[axis] != self.size:
                    raise _CannotAbsorb
                self._absorb(op, other, axis)
            elif op.name == "broadcast_in_dim":
                self._follow(op.outputs[0], op.params["broadcast_dimensions"][axis])
            elif op.name in ("reshape", "squeeze", "expand_dims"):
                kept = [d for d, n in enumerate(shape) if n != 1]
                if len(kept) != 1:
                    raise _CannotAbsorb
                self._follow(op.outputs[0], kept[0])
            elif op.name == "convert_element_type":
                self._follow(op.outputs[0], axis)
            else:
                raise _CannotAbsorb

    def _absorb(self, user: Op, position: int, axis: int) -> None:
        """Scale operand `position` of `user` along `axis`, by scaling what it is made of."""
        graph, value = self.graph, user.inputs[position]
        number = graph.scalar(value)
        if number is not None and number == 0:
            return
        shape = graph.shape(value)
        floating = jnp.issubdtype(graph.avals[value].dtype, jnp.floating)
        if not floating or len(shape) <= axis or shape[axis] != self.size:
            raise _CannotAbsorb
        if value in graph.leaves:
            use = (user.index, position)
            if use in self.followed or self.absorbed.setdefault(value, axis) != axis:
                raise _CannotAbsorb  # scaled twice over, or along two axes
            self.followed.add(use)
            return
        made = graph.producer[value]
        if made is None or len(graph.uses[value]) != 1 or value in graph.outputs:
            raise _CannotAbsorb
        for operand, before in self._sources(made[0], axis):
            self._absorb(made[0], operand, before)

    def _sources(self, op: Op, axis: int) -> list[tuple[int, int]]:
        """Operands of `op`, with axes, that scaling its output along `axis` comes down to."""
        shape, params = self.graph.shape, op.params
        if op.name == "neg" or op.name in IDENTITIES:
            return [(0, axis)]
        if op.name in ("add", "sub", "add_any", "select_n"):
            terms = range(1 if op.name == "select_n" else 0, len(op.inputs))
            return [(i, axis) for i in terms]
        if op.name in ("mul", "div"):
            free = [self.graph.data_free[v] for v in op.inputs]
            return [(1 if op.name == "mul" and free[0] and not free[1] else 0, axis)]
        if op.name == "dot_general":
            ranks = [len(shape(v)) for v in op.inputs]
            for operand in (0, 1):
                axes = output_axes(params["dimension_numbers"], ranks, operand)
                found = [(operand, d) for d, o in axes.items() if o == axis]
                if found:
                    return found
        if op.name == "conv_general_dilated":
            numbers = params["dimension_numbers"]
            if axis == numbers.out_spec[1] and params["batch_group_count"] == 1:
                return [(1, numbers.rhs_spec[0])]
        if op.name == "transpose":
            return [(0, params["permutation"][axis])]
        if op.name == "broadcast_in_dim" and axis in params["broadcast_dimensions"]:
            return [(0, params["broadcast_dimensions"].index(axis))]
        if op.name in ("reshape", "squeeze", "expand_dims"):
            before, after = shape(op.inputs[0]), shape(op.outputs[0])
            old, new = ([d for d, n in enumerate(sizes) if n != 1] for sizes in (before, after))
            if [before[d] for d in old] == [after[d] for d in new]:
                return [(0, old[new.index(axis)])]
            if before[-1] == after[-1] and axis == len(after) - 1:
                return [(0, len(before) - 1)]
        raise _CannotAbsorb
