"""Rules for operations that read, or replace, whole rows at positions that are computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..axes.axis_set import AxisSet
from ..axes.labels import FREE, Entry
from .registry import Context, Opaque, Pull, Push, Rule, register

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


register("dynamic_slice", _lookup(_rows_of_dynamic_slice))
register("gather", _lookup(_rows_of_gather, _batches_of_gather))
register("dynamic_update_slice", _update(_rows_of_update, source=1))
register("scatter scatter-add scatter-sub", _update(_rows_of_scatter, source=2))
