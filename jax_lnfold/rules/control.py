"""What loops and conditionals do to one value: join, take a row, stack rows.

A carry is its first value or the next one, a branch result that of any branch: a claim about it
is a claim about all of them. In a loop such a claim may come to rest on itself, which is an
induction over the iterations.
"""

from __future__ import annotations

from ..axes.axis_set import AxisSet
from ..axes.labels import FREE
from ..program.graph import JOINS
from .registry import AxisMap, Context, Opaque, Pull, Push, Rule, register


def _pull_join(ctx: Context, out: int, along: AxisSet) -> Pull | Opaque:
    """All inputs: the output is one of them, which one is known at run time only.

    ``C_S (x or y) = C_S x or C_S y``.

    >>> def branch(p, x, y):
    ...     return jax.lax.cond(p, lambda: x, lambda: y)
    >>> pull(branch, jnp.array(True), (2, 3), (2, 3), along=[1])
    operand 0 along axis 1, operand 1 along axis 1
    """
    return Pull(tuple((i, along) for i in range(len(ctx.op.inputs))))


def _push_join(ctx: Context, operand: int, along: AxisSet) -> Push | Opaque:
    """Whichever input the output is, its shift is that of the output.

    ``(x + u) or y = (x or y) + (u or 0)``.

    >>> loop = lambda x: jax.lax.fori_loop(0, 4, lambda i, x: x + x, x)
    >>> push(loop, (2, 3), along=[1], primitive="loop_carry")
    output 0 along axis 1
    """
    return ((0, along),)


def _pull_slice(ctx: Context, out: int, along: AxisSet) -> Pull | Opaque:
    """Every row of the stacked operand, as the loop reads them all.

    ``C_S xs[i] = (C_S' xs)[i]`` for all i.

    >>> loop = lambda xs: jax.lax.scan(lambda c, x: (c + x, c), jnp.zeros(3), xs)
    >>> pull(loop, (4, 3), along=[0], primitive="loop_slice")
    operand 0 along axis 1
    """
    return Pull(((0, AxisSet.of(ctx.in_shape(0), (FREE, *along.entries))),))


def _push_slice(ctx: Context, operand: int, along: AxisSet) -> Push | Opaque:
    """A row is shifted as the stack is along its other axes.

    ``(xs + u)[i] = xs[i] + u[i]``.

    >>> loop = lambda xs: jax.lax.scan(lambda c, x: (c + x, c), jnp.zeros(3), xs)
    >>> push(loop, (4, 3), along=[0, 1], primitive="loop_slice")
    output 0 along axis 0
    """
    return ((0, AxisSet.of(ctx.out_shape(), along.entries[1:])),)


def _axes_of_row(ctx: Context, operand: int) -> AxisMap:
    """The first axis is in the loop, by its path; the others stay.

    ``(x g)[i] = x[i] g[i]``. Reads no parameters.

    >>> axes(lambda x: jax.lax.map(jnp.tanh, x), (5, 3), primitive="loop_slice")
    {0: (0, 0), 1: 0}
    """
    return {0: ctx.op.path} | {d + 1: d for d in range(len(ctx.out_shape()))}


def _axes_of_one_row(ctx: Context, operand: int) -> AxisMap:
    """All axes but the first, which no other row is in.

    ``(x g)[i] = x[i] g``. Reads no parameters.

    >>> mesh = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    >>> p = jax.sharding.PartitionSpec()
    >>> same = jax.shard_map(lambda x: x * 2, mesh=mesh, in_specs=p, out_specs=p)
    >>> axes(same, (5, 3), primitive="device_row")
    {1: 0, 2: 1}
    """
    return {d + 1: d for d in range(len(ctx.out_shape()))}


def _pull_stack(ctx: Context, out: int, along: AxisSet) -> Pull | Opaque:
    """The row of every iteration, for S on its axes.

    ``C_S stack(x_i) = stack(C_S' x_i)``.

    >>> loop = lambda xs: jax.lax.scan(lambda c, x: (c + x, c), jnp.zeros(3), xs)
    >>> pull(loop, (4, 3), along=[1], primitive="loop_stack")
    operand 0 along axis 0
    >>> pull(loop, (4, 3), along=[0], primitive="loop_stack")
    opaque: stacks the results of a loop along the mean
    """
    before = AxisSet.of(ctx.in_shape(0), along.entries[1:])
    if before.trivial and not along.trivial:  # a mean over iterations: rows may cancel each other
        return Opaque("stacks the results of a loop along the mean")
    # Rows that are uniform may still differ from each other.
    return Pull(((0, before),), exact=along.entries[0] == FREE)


def _push_stack(ctx: Context, operand: int, along: AxisSet) -> Push | Opaque:
    """Rows are shifted by something else in every iteration.

    ``stack(x_i + u_i) = stack(x_i) + stack(u_i)``.

    >>> loop = lambda xs: jax.lax.scan(lambda c, x: (c + x, c), jnp.zeros(3), xs)
    >>> push(loop, (4, 3), along=[0], primitive="loop_stack")
    output 0 along axis 1
    """
    return ((0, AxisSet.of(ctx.out_shape(), (FREE, *along.entries))),)


register(JOINS, Rule(_pull_join, _push_join))
register("loop_slice", Rule(_pull_slice, _push_slice, axes=_axes_of_row))
register("device_row", Rule(_pull_slice, _push_slice, axes=_axes_of_one_row))
register("loop_stack", Rule(_pull_stack, _push_stack))
