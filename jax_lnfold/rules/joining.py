"""Primitives that put arrays side by side or take them apart."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from ..axes.axis_set import AxisSet
from ..axes.broadcast import embed_or_free
from ..axes.labels import FREE
from .registry import Context, Opaque, Pull, Push, Rule, register


def _parts(ctx: Context, axis: int, sizes: Sequence[int]) -> list[list[slice]]:
    """The positions of each part along `axis`."""
    whole = [slice(0, n, 1) for n in (ctx.in_shape(0))]
    starts = accumulate(sizes, initial=0)  # sums of symbolic sizes, too
    return [
        [*whole[:axis], slice(a, a + n, 1), *whole[axis + 1 :]]
        for a, n in zip(starts, sizes, strict=False)
    ]


def _pull_split(ctx: Context, out: int, along: AxisSet) -> Pull | Opaque:
    """Part k of the operand: a region of it.

    ``C_S x[part] = (C_S' x)[part]``. Reads `axis` and `sizes`.

    >>> pull(lambda x: jax.lax.split(x, (2, 4), 1), (3, 6), out=1, along=[1])
    operand 0 along axis 1 in groups (-1, -1, 0, 0, 0, 0)
    """
    positions = _parts(ctx, ctx.params["axis"], ctx.params["sizes"])[out]
    before = embed_or_free(along, ctx.in_shape(0), positions)
    return Opaque("splits along the mean") if before is None else Pull(((0, before),))


def _push_split(ctx: Context, operand: int, along: AxisSet) -> Push | Opaque:
    """Every part is shifted by its part of the shift.

    ``(x + u)[part] = x[part] + u[part]``. Reads `axis` and `sizes`.

    >>> push(lambda x: jax.lax.split(x, (2, 4), 1), (3, 6), along={1: (0, 0, 0, 0, 1, 1)})
    output 0 along axis 1, output 1 along axis 1 in groups (0, 0, 1, 1)
    """
    parts = _parts(ctx, ctx.params["axis"], ctx.params["sizes"])
    return tuple((k, along.select(part)) for k, part in enumerate(parts))


def _joined(ctx: Context) -> list[list[slice]]:
    axis = ctx.params["dimension"]
    return _parts(ctx, axis, [ctx.in_shape(i)[axis] for i in range(len(ctx.op.inputs))])


def _pull_concatenate(ctx: Context, out: int, along: AxisSet) -> Pull | Opaque:
    """Each operand on its own stretch: the whole is zero-mean if every stretch is.

    ``mean_S(concat(x_i)) = 0`` if all ``mean_S_i(x_i) = 0``. Reads `dimension`.

    >>> pull(lambda x, y: jnp.concatenate([x, y], 1), (3, 2), (3, 4), along=[0])
    operand 0 along axis 0, operand 1 along axis 0
    >>> pull(lambda x, y: jnp.concatenate([x, y], 1), (3, 2), (3, 4), along=[1])
    operand 0 along axis 1, operand 1 along axis 1, not exact
    """
    axis = ctx.params["dimension"]
    sets = [along.select(part) for part in _joined(ctx)]
    needs = tuple((i, s) for i, s in enumerate(sets) if not s.empty)
    # Stretches that are uniform may still differ from each other.
    return Pull(needs, exact=along.entries[axis] == FREE)


def _push_concatenate(ctx: Context, operand: int, along: AxisSet) -> Push | Opaque:
    """A stretch of the whole is shifted, and nothing else.

    ``concat(x + u, y) = concat(x, y) + concat(u, 0)``. Reads `dimension`.

    >>> push(lambda x, y: jnp.concatenate([x, y], 1), (3, 2), (3, 4), along=[1])
    output 0 along axis 1 in groups (0, 0, -1, -1, -1, -1)
    """
    after = embed_or_free(along, ctx.out_shape(), _joined(ctx)[operand])
    return Opaque("concatenates along the mean") if after is None else ((0, after),)


def _layer(shape: Sequence[int], axis: int, position: int) -> list[slice]:
    """The positions with one index along `axis`."""
    return [
        slice(position, position + 1, 1) if d == axis else slice(0, n, 1)
        for d, n in enumerate(shape)
    ]


def _without(along: AxisSet, axis: int) -> AxisSet:
    """The set of a single layer, without the axis of the layers."""
    keep = [d for d in range(len(along.shape)) if d != axis]
    return AxisSet.of([along.shape[d] for d in keep], [along.entries[d] for d in keep])


def _with(along: AxisSet, axis: int) -> AxisSet:
    """The set of a single layer, with the axis of the layers."""
    shape, entries = list(along.shape), list(along.entries)
    shape.insert(axis, 1)
    entries.insert(axis, FREE)
    return AxisSet.of(shape, entries)


def _pull_unstack(ctx: Context, out: int, along: AxisSet) -> Pull | Opaque:
    """Output k is layer k: a region of the operand.

    ``C_S x[k] = (C_S' x)[k]``. Reads `axis`.

    >>> pull(lambda x: jnp.unstack(x, axis=1), (3, 2, 4), out=1, along=[1])
    operand 0 along axis 1 in groups (-1, 0) and axis 2
    """
    axis, shape = ctx.params["axis"], ctx.in_shape(0)
    before = embed_or_free(_with(along, axis), shape, _layer(shape, axis, out))
    return Opaque("takes layers apart along the mean") if before is None else Pull(((0, before),))


def _push_unstack(ctx: Context, operand: int, along: AxisSet) -> Push | Opaque:
    """Every layer is shifted by its layer of the shift.

    ``(x + u)[k] = x[k] + u[k]``. Reads `axis`.

    >>> push(lambda x: jnp.unstack(x, axis=1), (3, 2, 4), along={1: (-1, 0), 2: (0, 0, 1, 1)})
    output 1 along axis 1 in groups (0, 0, 1, 1)
    """
    axis = ctx.params["axis"]
    layers = (along.select(_layer(along.shape, axis, k)) for k in range(len(ctx.op.outputs)))
    return tuple((k, _without(layer, axis)) for k, layer in enumerate(layers) if not layer.empty)


def _pull_stack(ctx: Context, out: int, along: AxisSet) -> Pull | Opaque:
    """Each operand on its own layer: the whole is zero-mean if every layer is.

    ``mean_S(stack(x_k)) = 0`` if all ``mean_S'(x_k) = 0``. Reads `axis`.

    >>> pull(lambda x, y: jnp.stack([x, y], 1), (3, 4), (3, 4), along=[2])
    operand 0 along axis 1, operand 1 along axis 1
    >>> pull(lambda x, y: jnp.stack([x, y], 1), (3, 4), (3, 4), along=[1, 2])
    operand 0 along axis 1, operand 1 along axis 1, not exact
    """
    axis = ctx.params["axis"]
    layers = (along.select(_layer(along.shape, axis, i)) for i in range(len(ctx.op.inputs)))
    needs = ((i, _without(layer, axis)) for i, layer in enumerate(layers) if not layer.empty)
    return Pull(tuple(needs), exact=along.entries[axis] == FREE)


def _push_stack(ctx: Context, operand: int, along: AxisSet) -> Push | Opaque:
    """A layer of the whole is shifted, and nothing else.

    ``stack(x + u, y) = stack(x, y) + stack(u, 0)``. Reads `axis`.

    >>> push(lambda x, y: jnp.stack([x, y], 1), (3, 4), (3, 4), operand=1, along=[1])
    output 0 along axis 1 in groups (-1, 0) and axis 2
    """
    axis, shape = ctx.params["axis"], ctx.out_shape()
    after = embed_or_free(_with(along, axis), shape, _layer(shape, axis, operand))
    return Opaque("stacks along the mean") if after is None else ((0, after),)


register("split", Rule(_pull_split, _push_split))
register("concatenate", Rule(_pull_concatenate, _push_concatenate))
register("unstack", Rule(_pull_unstack, _push_unstack))
register("stack", Rule(_pull_stack, _push_stack))
