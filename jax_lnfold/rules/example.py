"""Asks the rules about one equation: the examples of all rules do, and whoever tries a new one may.

The equation is the last one of a function, or the last one of a `primitive`. Operands are shapes
(of floats) or arrays, and answers are words:

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

from ..axes import FREE, AxisSet, Labels, canonical
from ..flatten import flatten
from ..graph import DROPOUT
from .registry import Context, Opaque, Pull, Push, rule_for

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
    """What a rule sees of the equation.

    The operands of the equation named in `uniform`, by position, are taken to vary along nothing.
    """
    avals = (
        jax.ShapeDtypeStruct(x, jnp.result_type(float)) if isinstance(x, tuple) else x
        for x in operands
    )
    graph = flatten(jax.make_jaxpr(fn)(*avals), 0, see_through_dropout=primitive == DROPOUT)
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
    return _operands(rule_for(ctx.op.name).pull(ctx, out, axis_set(ctx.out_shape(out), along)))


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
    answer = rule_for(ctx.op.name).push(ctx, operand, axis_set(ctx.in_shape(operand), along))
    return _opaque(answer) if isinstance(answer, Opaque) else _listed("output", answer)


def uniform_if(
    fn: Callable[..., Any],
    *operands: tuple[Any, ...] | jax.Array,
    along: Along,
    out: int = 0,
    primitive: str | None = None,
) -> Words:
    """Which operands must be uniform, so that an output is uniform along a set."""
    ctx = equation(fn, *operands, primitive=primitive)
    rule = rule_for(ctx.op.name)
    return _operands((rule.uniform or rule.pull)(ctx, out, axis_set(ctx.out_shape(out), along)))


def _operands(answer: Pull | Opaque) -> Words:
    if isinstance(answer, Opaque):
        return _opaque(answer)
    how = "" if answer.exact else ", approximate" if answer.approximate else ", not exact"
    return Words(_listed("operand", answer.needs) + how)


def _opaque(answer: Opaque) -> Words:
    return Words(f"opaque: {answer.why}")


def _listed(word: str, sets: Push) -> Words:
    return Words(", ".join(f"{word} {i} along {_axes(s)}" for i, s in sets))


def _axes(along: AxisSet) -> str:
    pairs = ((d, along.entries[d]) for d in along.axes)
    words = (
        f"axis {d}" + (f" in groups {tuple(e)}" if isinstance(e, Labels) else "") for d, e in pairs
    )
    return " and ".join(words) or "no axis"
