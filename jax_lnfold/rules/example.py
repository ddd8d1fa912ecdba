"""What a rule answers about one equation, in words: for the examples of rules, and to try a rule.

The equation is the last one of a function, or the last one of a `primitive`. Operands are shapes
(of floats) or arrays.

>>> pull(lambda x: x.T, (2, 3), along=[0])
operand 0 along axis 1
>>> push(lambda x: x[:, 1:], (2, 3), along={1: (0, 0, 1)})
output 0 along no axis
>>> pull(jnp.tanh, (2, 3), along=[0])
opaque: ...

To be zero-mean along no axis is to be zero; a shift that is uniform along no axis may be any.
Examples in docstrings of this package are run as tests, with the names of this module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..axes.axis_set import AxisSet
from ..axes.labels import FREE, Labels, canonical
from ..program.flatten import flatten
from ..program.graph import DROPOUT
from .registry import Context, Opaque, Pull, Push, rule_of

Along = Iterable[int] | Mapping[int, Sequence[int]]
"""The axes of a mean, or one group label per position (-1: outside) for each of them."""


class Words(str):
    """Text that a doctest shows without quotes."""

    __slots__ = ()
    __repr__ = str.__str__


def equation(
    fn: Callable[..., Any],
    *operands: tuple[Any, ...] | jax.Array,
    primitive: str | None = None,
    uniform: Sequence[int] = (),
) -> Context:
    """What a rule sees of the equation: its operands at the positions in `uniform` never vary."""
    avals = (
        jax.ShapeDtypeStruct(x, jnp.result_type(float)) if isinstance(x, tuple) else x
        for x in operands
    )
    graph = flatten(jax.make_jaxpr(fn)(*avals), see_through_dropout=primitive == DROPOUT)
    op = [op for op in graph.ops if primitive in (None, op.name)][-1]
    known = {op.inputs[i] for i in uniform}
    return Context(graph, op, lambda v, along: v in known or along.widened().trivial)


def axis_set(shape: Sequence[Any], along: Along) -> AxisSet:
    """The set on an array of `shape`."""
    if not isinstance(along, Mapping):
        return AxisSet.over(shape, along)
    labels = (np.asarray(along[d]) if d in along else None for d in range(len(shape)))
    return AxisSet.of(shape, [FREE if e is None else canonical(e) for e in labels])


def pull(
    fn: Callable[..., Any],
    *operands: tuple[Any, ...] | jax.Array,
    along: Along,
    out: int = 0,
    primitive: str | None = None,
    uniform: Sequence[int] = (),
) -> Words:
    """Which operands must be zero-mean, so that an output is zero-mean along a set."""
    ctx = equation(fn, *operands, primitive=primitive, uniform=uniform)
    return _words(rule_of(ctx.op).pull(ctx, out, axis_set(ctx.out_shape(out), along)))


def push(
    fn: Callable[..., Any],
    *operands: tuple[Any, ...] | jax.Array,
    along: Along,
    operand: int = 0,
    primitive: str | None = None,
    uniform: Sequence[int] = (),
) -> Words:
    """Along what the outputs are shifted uniformly, if an operand is along a set."""
    ctx = equation(fn, *operands, primitive=primitive, uniform=uniform)
    return _words(rule_of(ctx.op).push(ctx, operand, axis_set(ctx.in_shape(operand), along)))


def uniform_if(
    fn: Callable[..., Any],
    *operands: tuple[Any, ...] | jax.Array,
    along: Along,
    out: int = 0,
    primitive: str | None = None,
) -> Words:
    """Which operands must be uniform, so that an output is uniform along a set."""
    ctx = equation(fn, *operands, primitive=primitive)
    rule = rule_of(ctx.op)
    return _words((rule.uniform or rule.pull)(ctx, out, axis_set(ctx.out_shape(out), along)))


def axes(
    fn: Callable[..., Any],
    *operands: tuple[Any, ...] | jax.Array,
    operand: int = 0,
    primitive: str | None = None,
) -> Words:
    """The axes of an operand that the first output keeps, and where they are."""
    ctx = equation(fn, *operands, primitive=primitive)
    return Words(dict(rule_of(ctx.op).axes(ctx, operand)))


def _words(answer: Pull | Push | Opaque) -> Words:
    if isinstance(answer, Opaque):
        return Words(f"opaque: {answer.why}")
    if not isinstance(answer, Pull):
        return Words(", ".join(f"output {i} {_along(s)}" for i, s in answer))
    how = [] if answer.exact else ["approximate" if answer.approximate else "not exact"]
    return Words(", ".join([*(f"operand {i} {_along(s)}" for i, s in answer.needs), *how]))


def _along(along: AxisSet) -> str:
    words = []
    for d in along.axes:
        e = along.entries[d]
        words.append(f"axis {d} in groups {tuple(e)}" if isinstance(e, Labels) else f"axis {d}")
    return "along " + (" and ".join(words) or "no axis")
