"""Linear layers that need not see what is left of the mean of a LayerNorm (theory, section 12).

``x = g * n + b`` with ``1'n = 0``: a reader ``x W + c`` is what it was with ``W + (1/g) a'`` and
``c - (b'(1/g)) a'``, whatever ``a`` is. With ``a = -g'W / D`` it does not see a mean left in ``n``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from heapq import heappop, heappush

from ..axes.axis_set import AxisSet
from ..errors import PlanMismatchError
from ..plan.edits.affine import AffineReader
from ..plan.edits.hide import HideEdit, HidingReader
from ..plan.plan import FoldPlan
from ..program.graph import Op
from ..program.primitives import DIV, IDENTITIES, MUL
from .absorbing import CannotAbsorb, are_seen, candidates, carried
from .linear_readers import Use, kernel_axes, source_of, summed_axes, with_bias
from .place import Placement


def hidden_means(placement: Placement, plan: FoldPlan) -> dict[int, HideEdit]:
    """By the position of a LayerNorm, how linear layers can be made blind to its mean.

    Nothing else is done to a leaf that has a part in it, by the plan that the placement follows; no
    leaf has one in two.
    """
    graph, found = placement.graph, dict[int, HideEdit]()
    busy = {path for edits in plan.sections.values() for edit in edits for path in edit.parts}
    busy |= {graph.leaves[v] for v in graph.excluded}
    for leaf in candidates(graph):
        walk = Walk(placement, leaf)
        if graph.leaves[leaf] in busy or walk.size is None:
            continue
        edit = walk.run(busy)
        position = walk.position
        if edit is not None and position is not None and position not in found:
            found[position] = edit
            busy |= {*edit.parts}
    return found


def check_hidden(edits: Iterable[HideEdit], value: Mapping[str, int], placement: Placement) -> None:
    """Every reader of a plan is one in this trace, or is not there."""
    for edit in edits:
        here = Walk(placement, value[edit.key_path]).run(())
        same = here is not None and here.shift == edit.shift
        known = {*here.readers} if here is not None and same else set[HidingReader]()
        paths = {p for r in edit.readers if r not in known for p in (r.kernel, r.bias) if p}
        if are_seen(placement.graph, (value[path] for path in paths)):
            raise PlanMismatchError(
                f"inputs: for these inputs the scale {edit.key_path!r}, or what reads it, is used "
                "in another way than in the example the plan was made for; fold again with these "
                "inputs"
            )


@dataclass(frozen=True, slots=True)
class _Scaled:
    """A value with the scale along the axis `place`, from `start` on: alone, or times ``n``.

    Every position of other axes is the scale times one number, or ``g * n``, plus the shift if
    `shifted`. If there is a `start`, or more behind, it is joined with other features.
    """

    place: int
    start: int = 0
    normed: bool = False
    shifted: bool = False


class Walk:
    """Follows one scale forward to the linear layers that read what it scales, and no further.

    Neither scale nor shift changes: what else reads them, or what they make, is of no interest.
    """

    def __init__(self, placement: Placement, scale: int) -> None:
        """Prepare to follow the leaf value `scale`; `size` is None if it has several axes."""
        self.facts, self.graph = placement.facts, placement.graph
        self.scale, self.norms = scale, placement.norms
        self.centered = placement.search.norms.centered
        sizes = {d: n for d, n in enumerate(self.graph.shape(scale)) if n != 1}
        self.size = next(iter(sizes.values())) if len(sizes) == 1 else None
        self.position: int | None = None
        self._start = _Scaled(next(iter(sizes), 0))
        self._shift: int | None = None
        self._readers: list[HidingReader] = []

    def run(self, busy: Iterable[str]) -> HideEdit | None:
        """The edit, of readers with no leaf among the `busy` ones; None if there is no reader."""
        graph, states = self.graph, dict[int, _Scaled]()
        todo, done = list[int](), -1

        def reach(value: int, state: _Scaled) -> None:
            states[value] = state
            for op, _ in graph.uses[value]:
                heappush(todo, op.index)

        if self.size is not None:
            reach(self.scale, self._start)
        while todo:
            if (index := heappop(todo)) == done:
                continue
            done, op = index, graph.ops[index]
            hits = [i for i, v in enumerate(op.inputs) if v in states]
            if len(hits) == 1 and (made := self._after(op, hits[0], states[op.inputs[hits[0]]])):
                reach(op.outputs[0], made)
        return self._edit({*busy})

    def _edit(self, busy: set[str]) -> HideEdit | None:
        leaves = self.graph.leaves
        path, shift = leaves[self.scale], None if self._shift is None else leaves[self._shift]
        taken, readers = {path, shift}, list[HidingReader]()
        for reader in self._readers:
            own = {reader.kernel, reader.bias} - {None}
            alike = (reader.bias is None) == (shift is None)
            if alike and not own & {*taken, *busy} and len(own) == 2 - (shift is None):
                readers.append(reader)
                taken |= own
        if not readers or (shift is not None and shift in busy | {path}):
            return None
        return HideEdit(path, shift, tuple(readers))

    def _after(self, op: Op, hit: int, state: _Scaled) -> _Scaled | None:
        """What a result is, None if it is not followed further."""
        graph = self.graph
        if not self._is_plain(op):
            return None
        if op.name == "dot_general":
            self._read(op, hit, state)
            return None
        if op.name == "concatenate":
            if op.params["dimension"] != state.place:
                return None
            before = (graph.shape(v)[state.place] for v in op.inputs[:hit])
            return replace(state, start=state.start + sum(before))
        if (axes := carried(graph, op)) is not None:
            place = axes.get(state.place)
            return replace(state, place=place) if isinstance(place, int) else None
        if not all(self._is_whole(v, state) for v in (op.inputs[hit], *op.outputs)):
            return None
        if op.name == MUL or (op.name == DIV and hit == 0):
            return None if state.shifted else self._times(op.inputs[1 - hit], state)
        return self._plus(op, hit, state) if op.name == "add" else None

    def _is_plain(self, op: Op) -> bool:
        """Whether it stands in no `shard_map`, nor in what is known as a whole only."""
        graph, around = self.graph, (op.path[: n + 1] for n in range(len(op.path)))
        hidden = any(p in graph.sealed or p in graph.stand_ins for p in around)
        return not graph.mesh_axes[op.path] and not hidden

    def _is_whole(self, value: int, state: _Scaled) -> bool:
        shape = self.graph.shape(value)  # whose other axes may be of one element, and repeated
        return state.start == 0 and state.place < len(shape) and shape[state.place] == self.size

    def _times(self, other: int, state: _Scaled) -> _Scaled | None:
        """By a number for each token, or by what has no mean, which makes it ``g * n``."""
        if self._is_number(other, state.place):
            return state
        source = None if state.normed else self._without_mean(other, state.place)
        if source is None:
            return None
        own = (i for i, n in enumerate(self.norms) if any(v == source for v, _ in n.centered))
        self.position = next(own, self.position)
        return replace(state, normed=True)

    def _is_number(self, value: int, place: int) -> bool:
        """Whether it is the same for all features."""
        shape = self.graph.shape(value)
        if place >= len(shape):
            return shape == ()
        return self.facts.uniform(value, AxisSet.over(shape, [place]))

    def _without_mean(self, value: int, place: int) -> int | None:
        """What is centered, and is this value, or this is a multiple of, by a number per token."""
        along = AxisSet.over(self.graph.shape(value), [place])
        centered = self.centered.get(value)
        if centered is not None and centered.refines(along):
            return value
        op, _ = self.graph.producer[value] or (None, 0)
        if op is None or op.name not in {MUL, DIV, *IDENTITIES}:
            return None
        first, *rest = op.inputs
        if op.name == MUL and self._is_number(first, place):
            first, rest = rest[0], [first]
        alike = self.graph.shape(first)[place:] == self.graph.shape(value)[place:]
        if not alike or not all(self._is_number(v, place) for v in rest):
            return None
        return self._without_mean(first, place)

    def _plus(self, op: Op, hit: int, state: _Scaled) -> _Scaled | None:
        """The shift, a leaf along the same axis; the same one everywhere."""
        found = source_of(self.graph, op, 1 - hit)
        if not state.normed or state.shifted or found is None:
            return None
        sizes = {d: n for d, n in enumerate(self.graph.shape(found.leaf)) if n != 1}
        alike = [*sizes.values()] == [self.size] and found.origins.get(state.place) in sizes
        if not alike or self._shift not in (None, found.leaf):
            return None
        self._shift = found.leaf
        return replace(state, shifted=True)

    def _read(self, op: Op, hit: int, state: _Scaled) -> None:
        """Note a product with a kernel that sums over the features, and nobody else reads."""
        if not state.normed or [*summed_axes(op, hit)] != [state.place]:
            return
        kernel = source_of(self.graph, op, 1 - hit)
        along = kernel and kernel_axes(op, hit, (state.place,), kernel)
        if not kernel or not along or not self._is_own(kernel.leaf, kernel.use):
            return
        reader = AffineReader(self.graph.leaves[kernel.leaf], along)
        if state.shifted:
            try:
                reader, use = with_bias(self.graph, op, 1 - hit, kernel, reader)
            except CannotAbsorb:
                return
            value = next(v for v, path in self.graph.leaves.items() if path == reader.bias)
            if reader.summed != along or not self._is_own(value, use):
                return
        self._readers.append(HidingReader(reader.kernel, along[0], state.start, reader.bias))

    def _is_own(self, leaf: int, use: Use) -> bool:
        """Whether this is the only use of a leaf."""
        uses = [(op.index, position) for op, position in self.graph.uses[leaf]]
        return uses == [use] and leaf not in self.graph.outputs
