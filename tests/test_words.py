"""Every sentence of a report is true of the program, and its advice is of use.

Small programs, one for each kind of thing in the way, stand next to others that look alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jax_lnfold
from jax_lnfold.report import Report

D = 12
NO_MEAN = "does not carry a zero mean from its operands to its result"
NONLINEARITY = "end with a linear layer after this nonlinearity"
LAST = "end with a linear layer after it"
REWRITE = f"write this operation with primitives that have a rule, or {LAST}"

strange = jax.extend.core.Primitive("strange")
strange.def_impl(jnp.sin)
strange.def_abstract_eval(lambda s: s)

PARAMS: dict[str, jax.ShapeDtypeStruct] = {
    name: jax.ShapeDtypeStruct(shape, jnp.float32)
    for name, shape in {
        "stem": (7, D),
        "first": (D, D),
        "second": (D, D),
        "head": (D, 3),
    }.items()
}
X = jax.ShapeDtypeStruct((2, 5, 7), jnp.float32)
Start = Callable[[Any, jax.Array], jax.Array]


def report_of(apply: Callable[..., Any], params: Any = PARAMS, x: Any = X) -> Report:
    return jax_lnfold.analyze(apply, params, x)


def stream(start: Start) -> Callable[[Any, jax.Array], jax.Array]:
    """Two pre-LN layers and a head on a stream that begins with `start`."""

    def apply(p: Any, x: jax.Array) -> jax.Array:
        s = start(p, x)
        for name in ("first", "second"):
            s = s + jax.nn.standardize(s) @ p[name]
        return jax.nn.standardize(s) @ p["head"]

    return apply


def stem(p: Any, x: jax.Array) -> jax.Array:
    return x @ p["stem"]


def pooled(combine: Callable[..., Any], first: float) -> Start:
    def start(p: Any, x: jax.Array) -> jax.Array:
        return lax.reduce_window(stem(p, x), first, combine, (1, 2, 1), (1, 1, 1), "SAME")

    return start


def on_host(p: Any, x: jax.Array) -> jax.Array:
    return jax.pure_callback(np.sin, jax.ShapeDtypeStruct((2, 5, D), x.dtype), stem(p, x))


class Told(NamedTuple):
    """What is said of a centering inserted where a stream begins."""

    start: Start
    primitive: str
    why: str
    advice: str


STARTS: dict[str, Told] = {
    "tanh": Told(lambda p, x: jnp.tanh(stem(p, x)), "tanh", NO_MEAN, NONLINEARITY),
    "max pooling": Told(pooled(lax.max, -jnp.inf), "reduce_window_max", NO_MEAN, NONLINEARITY),
    "min pooling": Told(pooled(lax.min, jnp.inf), "reduce_window_min", NO_MEAN, NONLINEARITY),
    "largest so far": Told(
        lambda p, x: lax.cummax(stem(p, x), axis=1), "cummax", NO_MEAN, NONLINEARITY
    ),
    "softmax": Told(lambda p, x: jax.nn.softmax(stem(p, x)), "exp", NO_MEAN, NONLINEARITY),
    "an order": Told(
        lambda p, x: jnp.sort(stem(p, x)),
        "sort",
        "passes on neither means nor shifts, as it puts in an order",
        LAST,
    ),
    "a primitive of somebody else": Told(
        lambda p, x: strange.bind(stem(p, x)),
        "strange",
        "has no rule: what it does to means and shifts is not known",
        REWRITE,
    ),
    "a callback": Told(
        on_host,
        "pure_callback",
        "is not looked into, as it runs a program that is no jaxpr, or not here",
        REWRITE,
    ),
}


@pytest.mark.parametrize("case", STARTS)
def test_where_a_stream_begins(case: str) -> None:
    told = STARTS[case]
    (insertion,) = report_of(stream(told.start)).insertions
    assert insertion.reason.startswith(f"`{told.primitive}` (test_words.py:")
    assert insertion.reason.endswith(f") {told.why}")
    assert insertion.advice == told.advice


@pytest.mark.parametrize("case", STARTS)
def test_a_linear_layer_last_is_a_cure(case: str) -> None:
    def start(p: Any, x: jax.Array) -> jax.Array:
        return STARTS[case].start(p, x) @ p["last"]

    last = {"last": jax.ShapeDtypeStruct((D, D), jnp.float32)}
    report = report_of(stream(start), PARAMS | last)
    assert (report.n_folded, report.n_inserted) == (3, 0)


def test_average_pooling_needs_no_words() -> None:
    report = report_of(stream(pooled(lax.add, 0.0)))
    assert (report.n_folded, report.n_inserted) == (3, 0)


def test_only_what_has_no_rule_is_counted() -> None:
    unknown = {"a primitive of somebody else": "strange", "a callback": "pure_callback"}
    for case, told in STARTS.items():
        expected = {unknown[case]: 1} if case in unknown else {}
        assert report_of(stream(told.start)).opaque == expected


@pytest.mark.parametrize(
    ("read", "why"),
    [
        (jnp.tanh, "notices a shift of its operand"),
        (jnp.sort, "passes on neither means nor shifts, as it puts in an order"),
        (strange.bind, "has no rule: what it does to means and shifts is not known"),
    ],
)
def test_who_else_reads_a_stream(read: Callable[[Any], Any], why: str) -> None:
    def apply(p: Any, x: jax.Array) -> Any:
        s = stem(p, x)
        return jax.nn.standardize(s) @ p["head"], read(s)

    (norm,) = report_of(apply).norms
    assert norm.reason.endswith(f") {why}")
