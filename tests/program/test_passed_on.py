"""Which outputs are inputs: what calls, loops and branches pass on, and what they change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jax_lnfold.program.passed_on import passed_on, passes_all_on

Array = jax.Array
A, B = jnp.zeros((4, 3)), jnp.zeros((3, 4))


def scan(body: Callable[[Any, Any], Any], **options: Any) -> Callable[[Array, Array], Any]:
    return lambda a, b: jax.lax.scan(body, b, a, **options)


def loop(body: Callable[[Any], Any]) -> Callable[[Array, Array], Any]:
    return lambda a, b: jax.lax.while_loop(lambda c: c[0].sum() < 1, body, (a, b))


def branches(*each: Callable[..., Any]) -> Callable[[Array, Array], Any]:
    return lambda a, b: jax.lax.switch((a.sum() > 0).astype(int), each, a, b)


CASES: dict[str, tuple[Callable[[Array, Array], Any], list[int | None]]] = {
    "swapped": (lambda a, b: (b, a), [1, 0]),
    "changed": (lambda a, b: (a, b + 0), [0, None]),
    "calls": (jax.jit(lambda a, b: jax.remat(jax.jit(lambda x: (x, x * 2)))(a)), [0, None]),
    "derivative rule": (lambda a, b: jax.nn.relu(a), [None]),
    "there and back": (lambda a, b: (a.T.T, jnp.moveaxis(jnp.moveaxis(b, 0, 1), 0, 1)), [0, 1]),
    "rows": (scan(lambda c, x: (c, x)), [1, 0]),
    "rows in reverse": (scan(lambda c, x: (c, x), reverse=True), [1, 0]),
    "rows that change": (scan(lambda c, x: (c, x + 1)), [1, None]),
    "rows in reverse order": (lambda a, b: scan(lambda c, x: (c, x))(a[::-1], b), [1, None]),
    "carry for rows": (scan(lambda c, x: (c, c[0, :3])), [1, None]),
    "carry that changes": (scan(lambda c, x: (c * 2, x)), [None, 0]),
    "carries kept": (loop(lambda c: (c[0], c[1])), [0, 1]),
    "carry that changes in a loop": (loop(lambda c: (c[0] + 1, c[1])), [None, 1]),
    "carries swapped": (
        lambda a, b: jax.lax.fori_loop(0, 3, lambda i, c: (c[1], c[0]), (a, a + 1)),
        [None, None],
    ),
    "branches": (branches(lambda a, b: (a, b), lambda a, b: (a, b)), [0, 1]),
    "branches that differ": (branches(lambda a, b: (a, b), lambda a, b: (a, b * 2)), [0, None]),
}


@pytest.mark.parametrize(("fn", "want"), CASES.values(), ids=CASES)
def test_inputs_are_found(fn: Callable[[Array, Array], Any], want: list[int | None]) -> None:
    found = passed_on(jax.make_jaxpr(fn)(A, B).jaxpr)
    assert [f.position if f is not None else None for f in found] == want
    assert all(f is None or f.in_place for f in found)


def test_axes_are_followed() -> None:
    """The array is the input, with its axes in another order: that is not the input."""
    x = jnp.zeros((2, 3, 4))

    def moved(x: Array) -> Array:
        return jax.jit(lambda y: y.transpose(1, 0, 2))(x.transpose(2, 0, 1))

    (found,) = passed_on(jax.make_jaxpr(moved)(x).jaxpr)
    assert found == (0, (0, 2, 1))
    assert moved(x).shape == x.transpose(found.axes).shape == (2, 4, 3)
    there_and_back = jax.make_jaxpr(lambda x: x.transpose(2, 0, 1).transpose(1, 2, 0))(x)
    assert passes_all_on(there_and_back.jaxpr) == [True]
    assert passes_all_on(jax.make_jaxpr(lambda x: jnp.swapaxes(x, 0, 1))(x).jaxpr) == [False]
