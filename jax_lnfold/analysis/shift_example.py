"""How a function responds to a shift, in words: for the examples in `arithmetic`, and to try one.

The first operand, x, is shifted by u, which is uniform along some axes; ``v1`` is operand 1. Behind
`stop_gradient` they are x', u' and v1'. What is multiplied rather than shifted is ``times exp(r)``.
Operands are given as in `rules.example`.

>>> respond(lambda x: jnp.mean(x**2, 1), (2, 3), along=[1])
2/3 sum(x, 1) u + u**2
>>> respond(lambda x: jnp.mean(x**2, 1) - jnp.mean(x, 1) ** 2, (2, 3), along=[1])
0
>>> respond(jnp.tanh, (2, 3), along=[1])
refused: ...
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import jax

from ..program.primitives import STOP
from ..rules.example import Along, Words, axis_set, equation
from .shift_algebra import STOPPED_SHIFT, Factor, Refused, Sum, Term, Tracked, X, stopped
from .shift_rules import Arithmetic


def respond(fn: Callable[..., Any], *operands: tuple[Any, ...] | jax.Array, along: Along) -> Words:
    """By how much the output of the last equation changes when the first operand is shifted."""
    graph, root = equation(fn, *operands).graph, 0
    shifted = axis_set(graph.shape(root), along)
    arithmetic, axes = Arithmetic(graph, shifted, named=True), tuple(range(len(shifted.shape)))
    tracked = {root: Tracked({(1, ()): Fraction(1)}, {X: Fraction(1)}, axes)}
    for op in graph.ops:
        read = [tracked.get(v) for v in op.inputs]
        try:
            if op.name == STOP and read[0]:
                made = stopped(read[0])
            else:
                made = arithmetic.respond(op, read, "notices a shift") if any(read) else None
        except Refused as refused:
            return Words(f"refused: {refused}")
        if made is not None:
            tracked[op.outputs[0]] = made
    last = tracked.get(graph.ops[-1].outputs[0])
    if last is None or not last.response:
        return Words("0")
    response = " + ".join(_words(*term) for term in sorted(last.response.items(), key=str))
    return Words(f"times exp({response})" if last.grows else response)


def _words(term: Term, number: Fraction) -> str:
    degree, factors = term
    behind = factors.count(STOPPED_SHIFT)
    times = "" if number == 1 else "-" if number == -1 else f"{number} "
    words = [_name(f) for f in factors if f != STOPPED_SHIFT]
    for shift, power in (("u", degree - behind), (STOPPED_SHIFT, behind)):
        words += [shift if power == 1 else f"{shift}**{power}"] if power else []
    return times + " ".join(words)


def _name(factor: Factor) -> str:
    if isinstance(factor, Sum):
        x, axes = "x'" if factor.stopped else "x", factor.axes
        return f"sum({x}, {axes[0] if len(axes) == 1 else axes})" if axes else x
    how, value = factor.lstrip("'")[0], factor.lstrip("'")[1:]
    return f"{'1/' if how == '/' else ''}v{value}{factor[: -len(value) - 1]}"
