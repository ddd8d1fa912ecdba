"""Primitives that move elements without computing: reshapes, slices, joins, look-ups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..axes.axis_set import ALL, FREE, AxisSet, Entry, Labels, canonical
from .registry import Context, Opaque, Pull, Push, Rule, register


def _pull_transpose(ctx: Context, out: int, along: AxisSet) -> Pull | Opaque:
    """The axes of S where they come from.

    ``C_S x^T = (C_S' x)^T``. Reads `permutation`.

    >>> pull(lambda x: x.transpose(1, 2, 0), (2, 3, 4), along=[0])
    operand 0 along axis 1
    """
    order = ctx.params["permutation"]
    entries = tuple(along.entries[order.index(d)] for d in range(len(order)))
    return Pull(((0, AxisSet(ctx.in_shape(0), entries)),))


def _push_transpose(ctx: Context, operand: int, along: AxisSet) -> Push | Opaque:
    """The axes of S where they go to.

    ``(x + u)^T = x^T + u^T``. Reads `permutation`.

    >>> push(lambda x: x.transpose(1, 2, 0), (2, 3, 4), along=[0])
    output 0 along axis 2
    """
    entries = tuple(along.entries[d] for d in ctx.params["permutation"])
    return ((0, AxisSet(ctx.out_shape(), entries)),)


def _pull_reshape(ctx: Context, out: int, along: AxisSet) -> Pull | Opaque:
    """Groups stay groups; they must still be a product over the axes of the operand.

    ``C_S reshape(x) = reshape(C_S' x)``.

    >>> pull(lambda x: x.reshape(5, 2, 3), (5, 6), along=[2])
    operand 0 along axis 1 in groups (0, 0, 0, 1, 1, 1)
    >>> pull(lambda x: x.reshape(5, 6), (5, 3, 2), along=[1])
    operand 0 along axis 1 and axis 2
    >>> pull(lambda x: x.reshape(5, 6), (5, 3, 2), along={1: (0, 0, 0, 1, 1, 1)})
    opaque: reshapes across the mean
    """
    before, exact = _reshaped(along, ctx.in_shape(0))
    return Opaque("reshapes across the mean") if before is None else Pull(((0, before),), exact)


def _push_reshape(ctx: Context, operand: int, along: AxisSet) -> Push | Opaque:
    """Groups stay groups; they must still be a product over the axes of the output.

    ``reshape(x + u) = reshape(x) + reshape(u)``.

    >>> push(lambda x: x.reshape(5, 2, 3), (5, 6), along={1: (0, 0, 0, 1, 1, 1)})
    output 0 along axis 2
    >>> push(lambda x: x.reshape(5, 2, 3), (5, 6), along={1: (0, 0, 1, 1, 2, 2)})
    opaque: reshapes across the mean
    """
    after, _ = _reshaped(along, ctx.out_shape())
    return Opaque("reshapes across the mean") if after is None else ((0, after),)


def _reshaped(along: AxisSet, shape: Sequence[Any]) -> tuple[AxisSet | None, bool]:
    """The set after a reshape, and whether it asks for no more than before.

    Regions, or else single axes, are given up for a finer set if there is no product of axes.
    """
    wide = along.widened()
    same = along.reshape(shape) or wide.reshape(shape)
    if same is not None:
        return same, True
    finer = (wide.free([d]).reshape(shape) for d in wide.axes)
    return next((s for s in finer if s is not None and not s.trivial), None), False


def _pull_broadcast(ctx: Context, out: int, along: AxisSet) -> Pull | Opaque:
    """New axes repeat the operand: a mean along them is the operand itself.

    ``C_S broadcast(x) = broadcast(C_S' x)``. Reads `broadcast_dimensions`.

    >>> pull(lambda x: jnp.broadcast_to(x, (2, 3)), (3,), along=[1])
    operand 0 along axis 0
    >>> pull(lambda x: jnp.broadcast_to(x, (2, 3)), (3,), along=[0])
    operand 0 along no axis
    """
    pairs = zip(ctx.params["broadcast_dimensions"], ctx.in_shape(0), strict=True)
    entries = (along.entries[o] if along.shape[o] == n else FREE for o, n in pairs)
    return Pull(((0, AxisSet.of(ctx.in_shape(0), entries)),))


def _push_broadcast(ctx: Context, operand: int, along: AxisSet) -> Push | Opaque:
    """A shift is repeated, too: it is uniform along new axes.

    ``broadcast(x + u) = broadcast(x) + broadcast(u)``. Reads `broadcast_dimensions`.

    >>> push(lambda x: jnp.broadcast_to(x, (2, 3)), (3,), along=[])
    output 0 along axis 0
    """
    entries: list[Entry] = [ALL] * len(ctx.out_shape())
    for d, o in enumerate(ctx.params["broadcast_dimensions"]):
        if ctx.in_shape(0)[d] == ctx.out_shape()[o]:
            entries[o] = along.entries[d]
    return ((0, AxisSet.of(ctx.out_shape(), entries)),)


def _pull_tile(ctx: Context, out: int, along: AxisSet) -> Pull | Opaque:
    """Copies side by side: a mean along axes that are not repeated.

    ``C_S tile(x) = tile(C_S x)``. Reads `reps`.

    >>> pull(lambda x: jnp.tile(x, (1, 2)), (5, 3), along=[0])
    operand 0 along axis 0
    >>> pull(lambda x: jnp.tile(x, (1, 2)), (5, 3), along=[0, 1])
    operand 0 along axis 0, not exact
    """
    kept = along.free(_repeated(ctx))
    # Uniform along the other axes only, a copy varies along a repeated one with several positions.
    exact = all(along.entries[d] == FREE or ctx.in_shape(0)[d] == 1 for d in _repeated(ctx))
    return Pull(((0, AxisSet.of(ctx.in_shape(0), kept.entries)),), exact)


def _push_tile(ctx: Context, operand: int, along: AxisSet) -> Push | Opaque:
    """The shift is repeated, too: it stays uniform along the other axes.

    ``tile(x + u) = tile(x) + tile(u)``. Reads `reps`.

    >>> push(lambda x: jnp.tile(x, (1, 2)), (5, 3), along=[0, 1])
    output 0 along axis 0
    >>> push(lambda x: jnp.tile(x, (1, 2)), (5, 1), along=[0])
    output 0 along axis 0 and axis 1
    """
    repeated = _repeated(ctx)
    entries = (
        # Groups of a repeated axis would have to be repeated, too; one position simply is.
        e if d not in repeated else ALL if along.shape[d] == 1 else FREE
        for d, e in enumerate(along.entries)
    )
    return ((0, AxisSet.of(ctx.out_shape(), entries)),)


def _repeated(ctx: Context) -> list[int]:
    return [d for d, reps in enumerate(ctx.params["reps"]) if reps != 1]


def _pull_rev(ctx: Context, out: int, along: AxisSet) -> Pull | Opaque:
    """The groups of a reversed axis in reverse order.

    ``C_S rev(x) = rev(C_S' x)`` with ``S' = rev(S)``. Reads `dimensions`.

    >>> pull(lambda x: jnp.flip(x, 1), (2, 3), along={1: (0, 0, 1)})
    operand 0 along axis 1 in groups (0, 1, 1)
    """
    return Pull(((0, _reversed(ctx, along)),))


def _push_rev(ctx: Context, operand: int, along: AxisSet) -> Push | Opaque:
    """The groups of a reversed axis in reverse order.

    ``rev(x + u) = rev(x) + rev(u)``. Reads `dimensions`.

    >>> push(lambda x: jnp.flip(x, 1), (2, 3), along={1: (0, 0, 1)})
    output 0 along axis 1 in groups (0, 1, 1)
    """
    return ((0, _reversed(ctx, along)),)


def _reversed(ctx: Context, along: AxisSet) -> AxisSet:
    flipped = set(ctx.params["dimensions"])
    entries = (
        canonical(e.array[::-1]) if d in flipped and isinstance(e, Labels) else e
        for d, e in enumerate(along.entries)
    )
    return AxisSet.of(along.shape, entries)


def _slices(ctx: Context) -> list[slice]:
    """The positions that a `slice` reads, with whole axes written as ``slice(0, n, 1)``."""
    starts, stops = ctx.params["start_indices"], ctx.params["limit_indices"]
    strides = ctx.params["strides"] or (1,) * len(starts)
    return [slice(*bounds) for bounds in zip(starts, stops, strides, strict=True)]


def embed_or_free(along: AxisSet, shape: Sequence[Any], positions: list[slice]) -> AxisSet | None:
    """The set on the whole array; axes too long or symbolic get every position instead."""
    found = along.embed(shape, positions)
    if found is not None:
        return found
    touched = [d for d, s in enumerate(positions) if s != slice(0, shape[d], 1)]
    if any(along.entries[d] != FREE for d in touched):  # every position would not be the same set
        return None
    return AxisSet.of(shape, along.entries)


def _pull_slice(ctx: Context, out: int, along: AxisSet) -> Pull | Opaque:
    """Only the positions that are read need to be zero-mean: a region.

    ``C_S x[a:b] = (C_S' x)[a:b]``. Reads `start_indices`, `limit_indices` and `strides`.

    >>> pull(lambda x: x[:, 1:3], (2, 4), along=[1])
    operand 0 along axis 1 in groups (-1, 0, 0, -1)
    """
    before = embed_or_free(along, ctx.in_shape(0), _slices(ctx))
    return Opaque("slices along the mean") if before is None else Pull(((0, before),))


def _push_slice(ctx: Context, operand: int, along: AxisSet) -> Push | Opaque:
    """The slice is shifted by the slice of the shift.

    ``(x + u)[a:b] = x[a:b] + u[a:b]``. Reads `start_indices`, `limit_indices` and `strides`.

    >>> push(lambda x: x[:, 1:], (2, 4), along={1: (0, 0, 1, 1)})
    output 0 along axis 1 in groups (0, 1, 1)
    """
    return ((0, along.select(_slices(ctx))),)


def _padding(ctx: Context) -> tuple[list[slice], bool]:
    """Where the operand lands in the output, and whether it lands there whole."""
    positions, whole = [], True
    for (low, high, interior), m in zip(ctx.params["padding_config"], ctx.out_shape(), strict=True):
        whole = whole and low >= 0 and high >= 0
        positions.append(slice(low, m - high, interior + 1))
    return positions, whole


def _pull_pad(ctx: Context, out: int, along: AxisSet) -> Pull | Opaque:
    """Zeros add nothing to a mean that is zero.

    ``mean_S(pad(x)) = 0`` if ``mean_S'(x) = 0``. Reads `padding_config`.

    >>> pull(lambda x: jax.lax.pad(x, 0.0, [(0, 0, 0), (1, 2, 0)]), (2, 3), along=[1])
    operand 0 along axis 1, not exact
    >>> pull(lambda x: jax.lax.pad(x, 1.0, [(0, 0, 0), (1, 2, 0)]), (2, 3), along=[1])
    opaque: pads with something else than zeros
    """
    positions, whole = _padding(ctx)
    # Where positions are cut off, the others need not cancel; not known is not zero, either.
    if not whole or ctx.scalar(1) != 0:
        return Opaque("pads with something else than zeros")
    # Never exact: what is uniform on the operand differs from the zeros around it.
    return Pull(((0, along.select(positions)),), exact=False)


def _push_pad(ctx: Context, operand: int, along: AxisSet) -> Push | Opaque:
    """The region where the operand lands is shifted, and nothing else, whatever is padded with.

    ``pad(x + u, v) = pad(x, v) + pad(u, 0)``. Reads `padding_config`.

    >>> push(lambda x: jax.lax.pad(x, 1.0, [(0, 0, 0), (1, 2, 0)]), (2, 3), along=[1])
    output 0 along axis 1 in groups (-1, 0, 0, 0, -1, -1)
    >>> push(lambda x: jax.lax.pad(x, 1.0, [(0, 0, 0), (-1, 0, 0)]), (2, 3), along=[1])
    opaque: pads by a negative amount
    """
    positions, whole = _padding(ctx)
    if operand == 1:
        return Opaque("pads with the shifted value")
    if not whole:  # positions are cut off: `positions` do not say where the others land
        return Opaque("pads by a negative amount")
    after = embed_or_free(along, ctx.out_shape(), positions)
    return Opaque("pads along the mean") if after is None else ((0, after),)


# Look-ups and updates of whole rows. Some axes are indexed; on the others ("row axes") whole
# slices are moved, so a mean along row axes is the same before and after. An axis of which a part
# is moved is none, as which part is known at run time only.


def _rows_of_dynamic_slice(ctx: Context) -> dict[int, int]:
    return {d: d for d, n in enumerate(ctx.out_shape()) if n == ctx.in_shape(0)[d]}


def _rows_of_gather(ctx: Context) -> dict[int, int]:
    numbers, sizes = ctx.params["dimension_numbers"], ctx.params["slice_sizes"]
    dropped = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    kept = [d for d in range(len(sizes)) if d not in dropped]
    pairs = zip(kept, numbers.offset_dims, strict=True)
    return {d: o for d, o in pairs if sizes[d] == ctx.in_shape(0)[d]}


def _batches_of_gather(ctx: Context) -> list[tuple[int, int, int]]:
    """Batch axes, of which every row has indices of its own: of the table, indices and output."""
    numbers = ctx.params["dimension_numbers"]
    kept = [o for o in range(len(ctx.out_shape())) if o not in numbers.offset_dims]
    pairs = zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True)
    return [(d, i, kept[i]) for d, i in pairs]


def _rows_of_scatter(ctx: Context) -> dict[int, int]:
    numbers = ctx.params["dimension_numbers"]
    dropped = {*numbers.inserted_window_dims, *numbers.operand_batching_dims}
    kept = [d for d in range(len(ctx.in_shape(0))) if d not in dropped]
    pairs = zip(kept, numbers.update_window_dims, strict=True)
    return {d: u for d, u in pairs if ctx.in_shape(0)[d] == ctx.in_shape(2)[u]}


def _rows_of_update(ctx: Context) -> dict[int, int]:
    return {d: d for d, n in enumerate(ctx.in_shape(1)) if n == ctx.in_shape(0)[d]}


Rows = Callable[[Context], dict[int, int]]
"""Row axes of the operand -> axes of the output of a look-up, or of the updates."""
Batches = Callable[[Context], list[tuple[int, int, int]]]


def _map_rows(along: AxisSet, shape: Sequence[Any], rows: dict[int, int]) -> AxisSet:
    """The set on an array of `shape` that has the entry of axis d on axis ``rows[d]``."""
    entries: list[Entry] = [FREE] * len(shape)
    for d, o in rows.items():
        entries[o] = along.entries[d]
    return AxisSet.of(shape, entries)


def _no_batches(ctx: Context) -> list[tuple[int, int, int]]:
    return []


def _lookup(rows_of: Rows, batches_of: Batches = _no_batches) -> Rule:
    """Look-ups: the table, for S on row axes.

    ``C_S table[i] = (C_S' table)[i]`` and ``(table + u)[i] = table[i] + u[i]``. A batch axis along
    which the indices do not vary is as good as a row axis. Reads `dimension_numbers`, `slice_sizes`
    and `fill_value` of a gather.

    >>> rows, entries = lambda t: t[jnp.array([2, 0])], lambda t: t[:, jnp.array([2, 0])]
    >>> pull(rows, (5, 3), along=[1])
    operand 0 along axis 1
    >>> pull(entries, (5, 3), along=[1])
    opaque: picks single elements along the mean
    >>> push(rows, (5, 3), along=[0, 1])
    output 0 along axis 1
    >>> batch = jax.vmap(lambda t, i: t[i])
    >>> pull(batch, (2, 5, 3), jnp.zeros((2, 4), int), along=[0], uniform=[1])
    operand 0 along axis 0
    >>> pull(lambda x, i: jax.lax.dynamic_slice_in_dim(x, i, 2), (5, 3), jnp.array(1), along=[1])
    operand 0 along axis 1
    """

    def repeated(ctx: Context, along: AxisSet, of_output: bool) -> dict[int, int]:
        found = {}
        for d, i, o in batches_of(ctx):
            shape, entry = ctx.in_shape(1), along.entries[o if of_output else d]
            entries = (entry if k == i else FREE for k in range(len(shape)))
            if ctx.uniform(1, AxisSet.of(shape, entries)):
                found[d] = o
        return found

    def pull(ctx: Context, out: int, along: AxisSet) -> Pull | Opaque:
        rows = {o: d for d, o in (rows_of(ctx) | repeated(ctx, along, True)).items()}
        before = _map_rows(along, ctx.in_shape(0), rows)
        if before.trivial and not along.trivial:  # the elements picked need not cancel
            return Opaque("picks single elements along the mean")
        if not _fills_with_zeros(ctx):
            return Opaque("fills missing rows with a constant")
        return Pull(((0, before),), exact=set(along.axes) <= set(rows))

    def push(ctx: Context, operand: int, along: AxisSet) -> Push | Opaque:
        if operand:
            return Opaque("uses the shifted value as an index")
        # Along the axes that are indexed, a row that is missing is not shifted.
        rows = rows_of(ctx) | repeated(ctx, along, False)
        return ((0, _map_rows(along, ctx.out_shape(), rows)),)

    return Rule(pull, push)


def _fills_with_zeros(ctx: Context) -> bool:
    """Rows outside the table are NaN (then the mean is, too) or zero, if filled at all."""
    fill = ctx.params.get("fill_value")
    return fill is None or fill == 0 or fill != fill


def _computes(ctx: Context) -> bool:
    """Whether rows are replaced by any function of them: ``x.at[i].apply(f)`` is a `scatter`."""
    return ctx.op.name == "scatter" and ctx.params["update_jaxpr"] is not None


def _update(rows_of: Rows, source: int) -> Rule:
    """Rows of the operand replaced or increased by rows of `updates`: both, for S on row axes.

    ``C_S set(x, i, v) = set(C_S x, i, C_S' v)`` and
    ``set(x + u, i, v) = set(x, i, v) + set(u, i, 0)``. Reads `dimension_numbers` and `update_jaxpr`
    of a scatter.

    >>> rows = lambda x, v: x.at[jnp.array([2, 0])].set(v)
    >>> pull(rows, (5, 3), (2, 3), along=[1])
    operand 0 along axis 1, operand 2 along axis 1
    >>> pull(rows, (5, 3), (2, 3), along=[0])
    opaque: writes single elements along the mean
    >>> push(rows, (5, 3), (2, 3), operand=2, along=[0, 1])
    output 0 along axis 1
    >>> pull(lambda x: x.at[jnp.array([2, 0])].apply(jnp.exp), (5, 3), along=[1])
    opaque: computes with the rows that it replaces
    >>> update = lambda x, v, i: jax.lax.dynamic_update_slice_in_dim(x, v, i, 0)
    >>> pull(update, (5, 3), (2, 3), jnp.array(1), along=[1])
    operand 0 along axis 1, operand 1 along axis 1
    """

    def pull(ctx: Context, out: int, along: AxisSet) -> Pull | Opaque:
        if _computes(ctx):
            return Opaque("computes with the rows that it replaces")
        rows = rows_of(ctx)
        # Along the other axes, some positions are written and some are not.
        kept = along.free(d for d in along.axes if d not in rows)
        if kept.trivial and not along.trivial:
            return Opaque("writes single elements along the mean")
        updates = _map_rows(kept, ctx.in_shape(source), rows)
        return Pull(((0, kept), (source, updates)), exact=kept == along)

    def push(ctx: Context, operand: int, along: AxisSet) -> Push | Opaque:
        if _computes(ctx):
            return Opaque("computes with the rows that it replaces")
        rows = rows_of(ctx)
        if operand == 0:
            return ((0, along.free(d for d in along.axes if d not in rows)),)
        if operand != source:
            return Opaque("uses the shifted value as an index")
        back = {u: d for d, u in rows.items()}
        return ((0, _map_rows(along, ctx.out_shape(), back)),)

    return Rule(pull, push)


register("transpose", Rule(_pull_transpose, _push_transpose))
register("reshape squeeze", Rule(_pull_reshape, _push_reshape))
register("broadcast_in_dim", Rule(_pull_broadcast, _push_broadcast))
register("tile", Rule(_pull_tile, _push_tile))
register("rev", Rule(_pull_rev, _push_rev))
register("slice", Rule(_pull_slice, _push_slice))
register("pad", Rule(_pull_pad, _push_pad))
register("dynamic_slice", _lookup(_rows_of_dynamic_slice))
register("gather", _lookup(_rows_of_gather, _batches_of_gather))
register("dynamic_update_slice", _update(_rows_of_update, source=1))
register("scatter scatter-add scatter-sub", _update(_rows_of_scatter, source=2))
