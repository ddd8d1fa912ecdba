"""Elementwise primitives: sums, products by something uniform, selections, and the nonlinear rest.

Operands may be scalars or have axes of size 1 where the output is larger: such an operand is
uniform along those axes.
"""

from __future__ import annotations

import jax.numpy as jnp

from ..axes.axis_set import AxisSet
from ..axes.broadcast import lift, project
from ..program.graph import DROPOUT
from ..program.primitives import (
    COMPLEX,
    DIV,
    IDENTITIES,
    IDENTITIES_OF_EACH,
    NONLINEAR,
    SCALINGS,
    STOP,
)
from .masking import takes_up_shifts
from .registry import AxisMap, Context, Opaque, Pull, Push, Rule, register


def _pull_sum(ctx: Context, out: int, along: AxisSet) -> Pull | Opaque:
    """Every operand, along S on its own axes: zero, for one that is uniform along S.

    ``C_S (x + y) = C_S x + C_S y``. About uniformity, the answer is that of everything
    elementwise: ``f(x, y)`` varies only where x or y does.

    >>> pull(lambda x, y: x - y, (2, 3), (2, 3), along=[1])
    operand 0 along axis 1, operand 1 along axis 1
    >>> pull(lambda x, y: x - y, (2, 3), (2, 1), along=[1])
    operand 0 along axis 1, operand 1 along no axis
    >>> uniform_if(jnp.exp, (2, 3), along=[1])
    operand 0 along axis 1
    """
    return Pull(tuple((i, project(along, ctx.in_shape(i))) for i in range(len(ctx.op.inputs))))


def _push_sum(ctx: Context, operand: int, along: AxisSet) -> Push | Opaque:
    """The sum is shifted by as much, along broadcast axes, too.

    ``(x + u) + y = (x + y) + u``.

    >>> push(lambda x, y: x + y, (2, 3), (2, 3), operand=1, along=[1])
    output 0 along axis 1
    >>> push(lambda x, y: x + y, (2, 3), (2, 1), operand=1, along=[])
    output 0 along axis 1
    """
    return ((0, lift(along, ctx.out_shape())),)


def _axes_of_identity(ctx: Context, operand: int) -> AxisMap:
    """All axes stay where they are.

    ``f(x g) = f(x) g``, up to rounding. Reads no parameters.

    >>> axes(jnp.copy, (2, 3))
    {0: 0, 1: 1}
    """
    return {d: d for d in range(len(ctx.in_shape(0)))}


def _pull_convert(ctx: Context, out: int, along: AxisSet) -> Pull | Opaque:
    """A conversion between real or complex types is linear, up to rounding.

    ``C_S float32(x) = float32(C_S x)``. Reads `new_dtype`.

    >>> pull(lambda x: x.astype(jnp.bfloat16), (2, 3), along=[1])
    operand 0 along axis 1
    >>> pull(lambda x: x.astype(int), (2, 3), along=[1])
    opaque: converts between number types
    """
    if not _is_linear(ctx):
        return Opaque("converts between number types")
    return Pull(((0, along),))


def _push_convert(ctx: Context, operand: int, along: AxisSet) -> Push | Opaque:
    """A conversion between real or complex types is linear, up to rounding.

    ``float32(x + u) = float32(x) + float32(u)``. Reads `new_dtype`.

    >>> push(lambda x: x.astype(jnp.bfloat16), (2, 3), along=[1])
    output 0 along axis 1
    >>> push(lambda x: x.astype(int), (2, 3), along=[1])
    opaque: converts between number types
    """
    if not _is_linear(ctx):
        return Opaque("converts between number types")
    return ((0, along),)


def _is_linear(ctx: Context) -> bool:
    """Whether no whole numbers are made, which are rounded, or read, which cannot be centered."""
    new = ctx.params["new_dtype"]
    return jnp.issubdtype(ctx.dtype(0), jnp.inexact) and jnp.issubdtype(new, jnp.inexact)


def _axes_of_convert(ctx: Context, operand: int) -> AxisMap:
    """All axes, between real or complex types.

    ``float32(x g) = float32(x) g``, up to rounding. Reads `new_dtype`.

    >>> axes(lambda x: x.astype(jnp.float16), (2, 3))
    {0: 0, 1: 1}
    >>> axes(lambda x: x.astype(int), (2, 3))
    {}
    """
    return _axes_of_identity(ctx, operand) if _is_linear(ctx) else {}


def _pull_each(ctx: Context, out: int, along: AxisSet) -> Pull | Opaque:
    """Output i is operand i.

    ``C_S y_i = C_S x_i``.

    >>> barrier = lambda x, y: jax.lax.optimization_barrier((x, y))
    >>> pull(barrier, (2, 3), (4, 5), out=1, along=[1])
    operand 1 along axis 1
    """
    return Pull(((out, along),))


def _push_each(ctx: Context, operand: int, along: AxisSet) -> Push | Opaque:
    """Output i is operand i.

    ``(x + u)_i = x_i + u_i``.

    >>> barrier = lambda x, y: jax.lax.optimization_barrier((x, y))
    >>> push(barrier, (2, 3), (4, 5), operand=1, along=[1])
    output 1 along axis 1
    """
    return ((operand, along),)


def _pull_mul(ctx: Context, out: int, along: AxisSet) -> Pull | Opaque:
    """One operand, if the other is uniform along S; of a quotient, the dividend.

    ``C_S (x * g) = (C_S x) * g``.

    >>> pull(lambda x, g: x * g, (2, 3), (2, 1), along=[1])
    operand 0 along axis 1
    >>> pull(lambda x, g: x * g, (2, 3), (1, 3), along=[1])
    opaque: scales the positions along the mean unequally
    >>> pull(lambda x, g: x / g, (2, 1), (2, 3), along=[1])
    opaque: scales the positions along the mean unequally
    """
    if not jnp.issubdtype(ctx.dtype(0), jnp.inexact):  # division rounds, and nothing is centered
        return Opaque("computes with integers")
    sets = [project(along, ctx.in_shape(i)) for i in (0, 1)]
    # As (factor, carrier); a quotient is not linear in its divisor.
    ways = ((1, 0),) if ctx.op.name == DIV else ((1, 0), (0, 1))
    carriers = [other for factor, other in ways if ctx.uniform(factor, sets[factor])]
    if not carriers:
        return Opaque("scales the positions along the mean unequally")
    carrier = min(carriers, key=lambda i: sets[i].trivial)  # rather zero-mean than zero
    return Pull(((carrier, sets[carrier]),))


def _push_mul(ctx: Context, operand: int, along: AxisSet) -> Push | Opaque:
    """The shift of a product is uniform along the axes of S where the other operand is, too.

    ``(x + u) * g = x * g + u * g``.

    >>> push(lambda x, g: x * g, (2, 3), (1, 3), along=[0, 1])
    output 0 along axis 0
    >>> push(lambda x, g: x * g, (2, 3), (1, 3), along=[1])
    opaque: scales the positions along the mean unequally
    >>> push(lambda x, g: x / g, (2, 3), (2, 1), operand=1, along=[0])
    opaque: divides by the shifted value
    """
    if not jnp.issubdtype(ctx.dtype(0), jnp.inexact):
        return Opaque("computes with integers")
    if ctx.op.name == DIV and operand == 1:
        return Opaque("divides by the shifted value")
    shifted = _uniform_too(ctx, 1 - operand, lift(along, ctx.out_shape()))
    if shifted.trivial and not along.trivial:
        return Opaque("scales the positions along the mean unequally")
    return ((0, shifted),)


def _uniform_too(ctx: Context, position: int, along: AxisSet) -> AxisSet:
    """The finer set that leaves out the axes along which an operand varies."""
    shape = ctx.in_shape(position)
    if ctx.uniform(position, project(along, shape)):
        return along
    for d in along.axes:
        single = along.free(o for o in along.axes if o != d)
        if not ctx.uniform(position, project(single, shape)):
            along = along.free([d])
    return along


def _pull_select(ctx: Context, out: int, along: AxisSet) -> Pull | Opaque:
    """Every case, if the choice is uniform along S: then it picks whole groups.

    ``C_S select(p, x, y) = select(p, C_S x, C_S y)``.

    >>> pull(jnp.where, (2, 3), (2, 3), (2, 3), along=[1], uniform=[0])
    operand 1 along axis 1, operand 2 along axis 1
    >>> pull(jnp.where, (2, 3), (2, 3), (2, 3), along=[1])
    opaque: chooses differently along the mean
    """
    if not ctx.uniform(0, project(along, ctx.in_shape(0))):
        return Opaque("chooses differently along the mean")
    return Pull(tuple((i, along) for i in range(1, len(ctx.op.inputs))))


def _push_select(ctx: Context, operand: int, along: AxisSet) -> Push | Opaque:
    """The case chosen is shifted as before, the others are not, along the axes of a uniform choice.

    ``select(p, x + u, y) = select(p, x, y) + select(p, u, 0)``. A mask by -inf, or in a softmax by
    a number so low that it takes up every shift, passes all of it: ``select(p, x + u, -inf)`` is
    ``select(p, x, -inf) + u``, as ``-inf + u = -inf``.

    >>> push(jnp.where, (2, 3), (2, 3), (2, 3), operand=1, along=[1], uniform=[0])
    output 0 along axis 1
    >>> push(jnp.where, (2, 3), (2, 3), (2, 3), operand=1, along=[1])
    opaque: chooses differently along the mean
    >>> push(lambda p, x: jnp.where(p, x, -jnp.inf), (2, 3), (2, 3), operand=2, along=[1])
    output 0 along axis 1
    >>> push(lambda p, x: jnp.where(p, x, -1e9), (2, 3), (2, 3), operand=2, along=[1])
    opaque: chooses differently along the mean
    """
    if operand == 0:
        return Opaque("chooses by the shifted value")
    if all(_takes_up_shifts(ctx, i) for i in range(1, len(ctx.op.inputs)) if i != operand):
        return ((0, along),)
    shifted = _uniform_too(ctx, 0, along)
    if shifted.trivial and not along.trivial:
        return Opaque("chooses differently along the mean")
    return ((0, shifted),)


def _takes_up_shifts(ctx: Context, position: int) -> bool:
    """Whether all elements of an operand are one number that is none the worse for a shift."""
    number = ctx.scalar(position)
    if number is None or not jnp.issubdtype(number.dtype, jnp.floating):
        return False
    return takes_up_shifts(ctx.graph, number, ctx.op.outputs[0])


def _pull_dropout(ctx: Context, out: int, along: AxisSet) -> Pull | Opaque:
    """As it is where whole groups are dropped; else, on request, as if nothing were: approximate.

    ``C_S (x * mask) ~= (C_S x) * mask``.

    >>> def drop(x, key):
    ...     return jnp.where(jax.random.bernoulli(key, 0.9, (2, 3)), x, 0.0)
    >>> pull(drop, (2, 3), jax.random.key(0), along=[1], primitive="dropout")
    operand 2 along axis 1, approximate
    >>> pull(drop, (2, 3), jax.random.key(0), along=[1], primitive="dropout", uniform=[0])
    operand 1 along axis 1, operand 2 along axis 1
    """
    # The name of the operation is its role, dropout; the primitive says how it drops.
    rule = _pull_select if ctx.op.eqn.primitive.name == "select_n" else _pull_mul
    exact = rule(ctx, out, along)
    if isinstance(exact, Pull):
        return exact
    data = ctx.graph.dropouts[ctx.op.index]
    need = data, project(along, ctx.in_shape(data))
    return Pull((need,), exact=False, approximate=True)


def _push_dropout(ctx: Context, operand: int, along: AxisSet) -> Push | Opaque:
    """As if nothing were dropped.

    ``(x + u) * mask ~= x * mask + u``.

    >>> def drop(x, key):
    ...     return jnp.where(jax.random.bernoulli(key, 0.9, (2, 3)), x, 0.0)
    >>> push(drop, (2, 3), jax.random.key(0), operand=2, along=[1], primitive="dropout")
    output 0 along axis 1
    """
    if operand != ctx.graph.dropouts[ctx.op.index]:  # what is dropped depends on the mask
        return Opaque("drops by the shifted value")
    return ((0, lift(along, ctx.out_shape())),)


register("add sub neg add_any", Rule(_pull_sum, _push_sum))
register(COMPLEX, Rule(_pull_sum, _push_sum))  # C_S is real, so it passes real and imaginary parts
register(IDENTITIES - {"convert_element_type"}, Rule(_pull_sum, _push_sum, axes=_axes_of_identity))
register(STOP, Rule(_pull_sum, _push_sum))
register("convert_element_type", Rule(_pull_convert, _push_convert, _pull_sum, _axes_of_convert))
register(IDENTITIES_OF_EACH, Rule(_pull_each, _push_each))
register(SCALINGS, Rule(_pull_mul, _push_mul, _pull_sum))
register("select_n", Rule(_pull_select, _push_select))

register(DROPOUT, Rule(_pull_dropout, _push_dropout))

# Opaque to means and shifts, but uniform where all operands are.
register(NONLINEAR, Rule(uniform=_pull_sum))
