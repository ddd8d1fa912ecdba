"""Primitives that move elements without computing: reshapes, slices, joins, look-ups."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from ..axes.axis_set import AxisSet
from ..axes.broadcast import embed_or_free
from ..axes.labels import ALL, FREE, Entry, Labels, canonical
from .registry import AxisMap, Context, Opaque, Pull, Push, Rule, register


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


def _axes_of_transpose(ctx: Context, operand: int) -> AxisMap:
    """All axes are there, in another order.

    ``transpose(x g) = transpose(x) g``. Reads `permutation`.

    >>> axes(lambda x: x.T, (2, 3))
    {1: 0, 0: 1}
    """
    return {int(d): o for o, d in enumerate(ctx.params["permutation"])}


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


def _axes_of_reshape(ctx: Context, operand: int) -> AxisMap:
    """Axes that keep their size and what lies behind them, so the order of their elements.

    ``reshape(x g) = reshape(x) g``. Reads no parameters.

    >>> axes(lambda x: x.reshape(2, 1, 12), (2, 3, 4))
    {0: 0}
    """
    old, new = (
        {(prod(shape[d + 1 :]), n): d for d, n in enumerate(shape) if 0 not in shape[d + 1 :]}
        for shape in (ctx.in_shape(0), ctx.out_shape())
    )
    return {d: new[key] for key, d in old.items() if key in new and key[1] != 1}


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


def _axes_of_broadcast(ctx: Context, operand: int) -> AxisMap:
    """Axes that are not repeated.

    ``broadcast(x g) = broadcast(x) g``. Reads `broadcast_dimensions`.

    >>> axes(lambda x: jnp.broadcast_to(x, (2, 5, 3)), (2, 1, 3))
    {0: 0, 2: 2}
    """
    pairs = enumerate(map(int, ctx.params["broadcast_dimensions"]))  # they may be NumPy's
    return {d: o for d, o in pairs if ctx.in_shape(0)[d] == ctx.out_shape()[o]}


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


def _axes_of_slice(ctx: Context, operand: int) -> AxisMap:
    """Axes that are not cut.

    ``slice(x g) = slice(x) g``. Reads no parameters.

    >>> axes(lambda x: x[1:], (2, 3))
    {1: 1}
    """
    return {d: d for d, n in enumerate(ctx.in_shape(0)) if n == ctx.out_shape()[d]}


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


register("transpose", Rule(_pull_transpose, _push_transpose, axes=_axes_of_transpose))
register("reshape squeeze", Rule(_pull_reshape, _push_reshape, axes=_axes_of_reshape))
register("broadcast_in_dim", Rule(_pull_broadcast, _push_broadcast, axes=_axes_of_broadcast))
register("tile", Rule(_pull_tile, _push_tile))
register("rev", Rule(_pull_rev, _push_rev))
register("slice", Rule(_pull_slice, _push_slice, axes=_axes_of_slice))
register("pad", Rule(_pull_pad, _push_pad))
