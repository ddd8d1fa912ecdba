"""What is known of results whose operands are all zero or all one, against the results."""

from __future__ import annotations

import operator
from collections.abc import Callable
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_lnfold.program.flatten import flatten
from jax_lnfold.rewrite.algebra import Numbers, known_result, surviving_operand

ANY = np.asarray([0.0, 1.0, -2.5, np.inf, -np.inf, np.nan], np.float32)
"""What an operand may be of which nothing is known."""
Fn = Callable[..., jax.Array]
ONE: dict[str, Fn] = {
    "neg": jnp.negative,
    "square": jax.lax.square,
    "reduce_sum": jnp.sum,
    "cube": lambda x: jax.lax.integer_pow(x, 3),
    "zeroth power": lambda x: jax.lax.integer_pow(x, 0),
    "reciprocal": lambda x: jax.lax.integer_pow(x, -1),
    "reshape": lambda x: x.reshape(2, 3),
    "cast": lambda x: x.astype(jnp.bfloat16),
    "exp": jnp.exp,
    "tanh": jnp.tanh,
}
TWO: dict[str, Fn] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "max": jnp.maximum,
}
FIXED = {f"{name} {c}": c for name in TWO for c in (0.0, 1.0, 2.5, float("inf"), float("nan"))}
CASES: dict[str, tuple[Fn, int]] = {
    **{name: (fn, 1) for name, fn in ONE.items()},
    **{name: (fn, 2) for name, fn in TWO.items()},
    **{name: (lambda x, n=name, c=c: TWO[n.split()[0]](x, c), 1) for name, c in FIXED.items()},
    **{
        f"{c} {name.split()[0]}": (lambda x, n=name, c=c: TWO[n.split()[0]](c, x), 1)
        for name, c in FIXED.items()
    },
}


def last_operation(fn: Fn, operands: int) -> tuple[Any, Any, list[bool]]:
    """The graph, its last operation, and which of the operands of that are operands of `fn`."""
    shapes = [jax.ShapeDtypeStruct(ANY.shape, jnp.float32)] * operands
    graph = flatten(jax.make_jaxpr(fn)(*shapes))
    op = graph.ops[-1]
    return graph, op, [v < operands for v in op.inputs]


@pytest.mark.parametrize("name", CASES)
def test_what_is_known_is_true(name: str) -> None:
    fn, operands = CASES[name]
    graph, op, given = last_operation(fn, operands)
    for numbers in product((0.0, 1.0, None), repeat=operands):
        own = iter(numbers)
        known = known_result(graph, op, [next(own) if g else None for g in given])
        if known is None:
            continue
        ranges = [ANY if n is None else [n] for n in numbers]
        for values in product(*ranges):
            filled = [jnp.full(ANY.shape, v, jnp.float32) for v in values]
            np.testing.assert_array_equal(fn(*filled), known, err_msg=f"{name} {values}")


@pytest.mark.parametrize(
    ("name", "numbers", "known"),
    [
        ("add", [0, 0], 0),
        ("add", [0, 1], None),  # only with a one of the program, as in ``1 + scale``
        ("add 1.0", [0], 1),
        ("add 2.5", [0], None),
        ("1.0 add", [0], 1),
        ("sub", [0, 0], 0),
        ("sub 1.0", [0], None),
        ("mul", [1, 1], 1),
        ("mul", [0, 1], 0),
        ("mul", [0, None], None),  # it may be infinite
        ("mul 2.5", [0], 0),
        ("mul inf", [0], None),
        ("mul nan", [0], None),
        ("div", [0, 1], 0),
        ("div", [0, None], None),
        ("div", [None, 0], None),
        ("div 2.5", [0], 0),
        ("div 0.0", [0], None),
        ("div inf", [0], None),
        ("2.5 div", [0], None),
        ("cube", [0], 0),
        ("zeroth power", [0], None),
        ("reciprocal", [0], None),
        ("square", [1], None),
        ("reduce_sum", [0], 0),
        ("reduce_sum", [1], None),
        ("reshape", [1], 1),
        ("cast", [0], 0),
        ("exp", [0], None),
    ],
)
def test_what_is_known(name: str, numbers: Numbers, known: float | None) -> None:
    graph, op, given = last_operation(*CASES[name])
    own = iter(numbers)
    found = known_result(graph, op, [next(own) if g else None for g in given])
    assert (found, type(found)) == (known, type(known))


@pytest.mark.parametrize("name", TWO)
def test_what_survives_is_the_result(name: str) -> None:
    found = set()
    for numbers in product((0.0, 1.0, None), repeat=2):
        if (position := surviving_operand(name, [*numbers])) is not None:
            x, y = (ANY if n is None else np.full_like(ANY, n) for n in numbers)
            np.testing.assert_array_equal(TWO[name](x, y), (x, y)[position])
            found.add((numbers, position))
    both = {((0.0, None), 1), ((None, 0.0), 0)}
    ones = {((1.0, None), 1), ((None, 1.0), 0)}
    of_data = {
        "add": both,
        "sub": both - {((0.0, None), 1)},
        "mul": ones,
        "div": {*ones} - {((1.0, None), 1)},
    }
    assert {f for f in found if None in f[0]} == of_data.get(name, set())
