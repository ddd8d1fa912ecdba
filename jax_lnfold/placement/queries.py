"""Scales and shifts of keys that those of the queries can take up (theory, section 11).

With ``q = gq q^ + bq`` and ``k = gk k^ + bk``, the product that sums over the axes of both scales
is ``q k = (gq gk q^ + gk bq) k^ + q bk``. The last term does not vary along the keys, and where no
output notices that it is missing, the scale and shift of the keys vanish from the program. Any
product of two values will do, and without ``bk`` no more is asked: what does not notice a shift is
for the facts to say.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from math import inf

from ..analysis.facts import Facts
from ..axes.axis_set import AxisSet
from ..axes.broadcast import output_axes
from ..errors import PlanMismatchError
from ..options import Options
from ..plan.edits.queries import QueryEdit
from ..program.graph import Graph, Op
from .absorbing import AxisPlaces, CannotAbsorb, are_seen
from .affine import Walk
from .linear_readers import Source, Use, kernel_axes
from .place import Placement
from .scaled_values import Scaled


def with_queries(placement: Placement, options: Options) -> Placement:
    """The placement with every scale of keys that queries can take up, and why others stay."""
    if not options.fold_affine or options.affine_most < inf:  # there are large products
        return placement
    graph, left = placement.graph, dict(placement.affine_left)
    edited = (*placement.merges, *(e for edits in placement.found.values() for e in edits))
    busy = {path for edit in edited for path in edit.parts}
    busy |= {graph.leaves[v] for v in placement.leaf_sets}
    barred = dict.fromkeys(busy, "is edited already")
    barred |= {graph.leaves[v]: "is excluded" for v in graph.excluded}
    search = _Search(graph, [v for v, path in graph.leaves.items() if path in left], barred)
    found = search.run()
    left |= search.left
    for edit in found:
        left[edit.query] = f"it has taken up that of the keys, `{edit.key_path}`"
        del left[edit.key_path]
    return replace(placement, found={**placement.found, "queries": found}, affine_left=left)


def check_queries(edit: QueryEdit, value: Mapping[str, int], graph: Graph) -> None:
    """All products of the keys in this trace are such products, or it does not use the leaves."""
    try:
        keys = followed(graph, value[edit.key_path], rescaled=False)
        merge = merge_of(keys, followed(graph, value[edit.query], rescaled=True))
        blocker = _noticed(keys) if merge.shift is not None else None
        is_same = merge == edit and blocker is None
    except CannotAbsorb:
        is_same = False
    if not is_same and are_seen(graph, (value[path] for path in edit.parts)):
        raise PlanMismatchError(
            f"inputs: for these inputs the scale {edit.key_path!r} of keys, its shift, or that of "
            "the queries is used in another way than in the example the plan was made for; fold "
            "again with these inputs"
        )


def merge_of(keys: _Factor, queries: _Factor) -> QueryEdit:
    """How the scale of `queries` takes up that of `keys`; raises `CannotAbsorb`.

    A shift of the keys is dropped: that nobody notices remains to be shown.
    """
    graph, leaves = keys.graph, keys.graph.leaves
    path, query = leaves[keys.scale], leaves[queries.scale]
    if queries.products.keys() != {(index, 1 - position) for index, position in keys.products}:
        raise CannotAbsorb(f"it is not all that the scale `{query}` is multiplied with")
    if queries.one == 0:
        raise CannotAbsorb(f"the program adds 1 to the scale `{query}`")
    found = {_axes_of(queries, keys, use, queries.scale) for use in keys.products}
    if len(found) != 1 or None in found:
        raise CannotAbsorb(f"its axes are not all axes of the scale `{query}`")
    (axes,) = found
    assert axes is not None
    shift = None if keys.shift is None else leaves[keys.shift]
    edit = QueryEdit(path, shift, query, None, axes, one=1 if keys.one is None else keys.one)
    if queries.shift is not None:
        order = [d for d, n in enumerate(graph.shape(queries.scale)) if n != 1]
        own = [d for d, n in enumerate(graph.shape(queries.shift)) if n != 1]
        along = tuple(own[order.index(d)] for d in axes)  # a shift has the axes of its scale
        edit = replace(edit, query_shift=leaves[queries.shift], shift_axes=along)
    roles = [*edit.parts]
    for leaf in roles:
        if roles.count(leaf) > 1:
            raise CannotAbsorb(f"the parameter `{leaf}` has two roles in it")
    return edit


def _axes_of(queries: _Factor, keys: _Factor, use: Use, leaf: int) -> tuple[int, ...] | None:
    """The axes of the scale of queries that those of the keys' scale meet in one product."""
    graph, (index, position) = keys.graph, use
    sizes = graph.shape(leaf)
    own = [d for d, n in enumerate(sizes) if n != 1]
    places = queries.products[index, 1 - position].places
    source = Source(leaf, dict(zip(places, own, strict=True)), (index, 1 - position))
    return kernel_axes(graph.ops[index], position, keys.products[use].places, source)


def _noticed(keys: _Factor) -> str | None:
    """What notices numbers that are added to the products and do not vary along the keys."""
    for index, position in keys.products:
        graph, op = keys.graph, keys.graph.ops[index]
        ranks = [len(graph.shape(v)) for v in op.inputs]
        free = output_axes(op.params["dimension_numbers"], ranks, position).values()
        facts = Facts(graph)
        blocker = facts.intolerant(op.outputs[0], AxisSet.over(graph.shape(op.outputs[0]), free))
        if blocker is not None:
            return str(blocker)
        if facts.dropouts:  # taken for the identity, which it is not
            return "it is hidden only if nothing is dropped"
    return None


def followed(graph: Graph, scale: int, rescaled: bool) -> _Factor:
    """The products that the leaf value `scale` ends in, none for a scale of linear layers.

    Raises `CannotAbsorb`.
    """
    factor = _Factor(graph, scale, rescaled)
    readers = factor.run().readers
    if readers and factor.products:
        raise CannotAbsorb(f"the kernel `{readers[0].kernel}` reads what it scales, too")
    return factor


class _Factor(Walk):
    """Follows one scale forward to the products with other values that sum over its axes.

    They are in `products`, as operation and operand. If it may be `rescaled`, what is scaled and
    shifted may be multiplied as a whole, by anything: so queries may, but of keys that would be a
    shift that varies along the keys.
    """

    def __init__(self, graph: Graph, scale: int, rescaled: bool) -> None:
        super().__init__(graph, scale)
        self.rescaled = rescaled
        self.products: dict[Use, Scaled] = {}

    def _times(self, op: Op, state: Scaled, places: AxisPlaces) -> Scaled:
        """As a whole, it is scaled by all that comes later, too."""
        if self.rescaled and state.shifted:
            return replace(state, places=places)
        return super()._times(op, state, places)

    def _reader(self, op: Op, position: int, state: Scaled) -> None:
        """Kernels are for linear layers; else it is one of two factors."""
        if self.graph.data_free[op.inputs[1 - position]]:
            return super()._reader(op, position, state)
        if state.raw:
            raise CannotAbsorb(f"{op.location()} reads it as it is")
        self.products[op.index, position] = state


class _Search:
    """Finds pairs among leaf values that may be scales, and in `left` why others have no part.

    No leaf has a part in two of them; those in `barred` have none, for the reason given there.
    """

    def __init__(self, graph: Graph, scales: Collection[int], barred: Mapping[str, str]) -> None:
        self.graph, self.barred = graph, dict(barred)
        self.left: dict[str, str] = {}
        self.keys = self._factors(scales, False, self.left)
        self.queries = self._factors(scales, True, {})  # what is in the way of keys says more
        self.noticed = {scale: _noticed(keys) for scale, keys in self.keys.items()}

    def run(self) -> tuple[QueryEdit, ...]:
        """The pairs; of two factors those are the keys of which a shift would not be noticed."""
        found: list[QueryEdit] = []
        for scale in sorted(self.keys, key=lambda scale: self.noticed[scale] is not None):
            path = self.graph.leaves[scale]
            try:
                edit = self._paired(scale)
            except CannotAbsorb as why:
                self.left[path] = str(why)
            else:
                found.append(edit)
                self.barred |= dict.fromkeys(edit.parts, "is merged with another scale")
        return tuple(found)

    def _factors(
        self, scales: Collection[int], rescaled: bool, left: dict[str, str]
    ) -> dict[int, _Factor]:
        found = {}
        for scale in scales:
            try:
                factor = followed(self.graph, scale, rescaled)
            except CannotAbsorb as why:
                left[self.graph.leaves[scale]] = str(why)
            else:
                if factor.products:
                    found[scale] = factor
        return found

    def _paired(self, scale: int) -> QueryEdit:
        """The merge into the first scale that can take up that of keys; or `CannotAbsorb`."""
        keys, noticed = self.keys[scale], self.noticed[scale]
        if keys.shift is not None and noticed is not None:
            raise CannotAbsorb(f"its shift cannot be dropped: {noticed}")
        index, position = next(iter(keys.products))
        where = self.graph.ops[index].location()
        reason = f"{where} multiplies it with what has no scale that could take it up"
        for queries in self.queries.values():
            if (index, 1 - position) in queries.products:
                try:
                    return self._allowed(merge_of(keys, queries))
                except CannotAbsorb as why:
                    reason = str(why)
        raise CannotAbsorb(reason)

    def _allowed(self, edit: QueryEdit) -> QueryEdit:
        for leaf in edit.parts:
            if leaf in self.barred:
                raise CannotAbsorb(f"the parameter `{leaf}` {self.barred[leaf]}")
        return edit
