"""What loops and conditionals do to one value: join, take a row, stack rows.

A carry is its first value or the next one, a branch result that of any branch: a claim about it
is a claim about all of them. In a loop such a claim may come to rest on itself, which is an
induction over the iterations.
"""

from __future__ import annotations

from ..axes import FREE, AxisSet
from ..graph import JOINS
from .registry import Context, Opaque, Pull, Push, Rule, register


def _pull_join(ctx: Context, out: int, along: AxisSet) -> Pull | Opaque:
    return Pull(tuple((i, along) for i in range(len(ctx.op.inputs))))


def _push_join(ctx: Context, operand: int, along: AxisSet) -> Push | Opaque:
    return ((0, along),)


def _pull_slice(ctx: Context, out: int, along: AxisSet) -> Pull | Opaque:
    """Every row of the stacked operand."""
    return Pull(((0, AxisSet.of(ctx.in_shape(0), (FREE, *along.entries))),))


def _push_slice(ctx: Context, operand: int, along: AxisSet) -> Push | Opaque:
    return ((0, AxisSet.of(ctx.out_shape(), along.entries[1:])),)


def _pull_stack(ctx: Context, out: int, along: AxisSet) -> Pull | Opaque:
    before = AxisSet.of(ctx.in_shape(0), along.entries[1:])
    if before.trivial and not along.trivial:
        return Opaque("stacks the results of a loop along the mean")
    return Pull(((0, before),), exact=along.entries[0] == FREE)


def _push_stack(ctx: Context, operand: int, along: AxisSet) -> Push | Opaque:
    return ((0, AxisSet.of(ctx.out_shape(), (FREE, *along.entries))),)


register(JOINS, Rule(_pull_join, _push_join))
register("loop_slice", Rule(_pull_slice, _push_slice))
register("loop_stack", Rule(_pull_stack, _push_stack))
