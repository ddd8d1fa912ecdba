"""A stream that the function returns: its LayerNorms read a centered copy, if there are enough."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

import jax_lnfold
from tests.helpers.contracts import count_equations, fold_checked, relative_difference
from tests.helpers.derivative_rules import with_jvp

Array = jax.Array
Call = Callable[[Callable[..., Any]], Callable[..., Any]]
RNG = np.random.default_rng(0)
DEPTH = 3


def normal(*shape: int) -> Array:
    return jnp.asarray(RNG.normal(0.4, 1, shape))


PARAMS = {
    "embed": normal(5, 8),
    "first": normal(DEPTH, 8, 8),
    "last": normal(DEPTH, 8, 8),
    "head": normal(8, 3),
}
INPUT = normal(2, 6, 5)


def plain(f: Callable[..., Any]) -> Callable[..., Any]:
    return f


CALLS = {"here": plain, "jit": jax.jit, "remat": jax.checkpoint, "custom_jvp": with_jvp}


def start(p: Any, x: Array) -> Array:
    return jnp.tanh(x @ p["embed"])


def block(s: Array, first: Array, last: Array) -> Array:
    return s + jnp.tanh(nn.standardize(s) @ first) @ last


def blocks(p: Any, s: Array, depth: int = DEPTH, call: Call = plain) -> Array:
    for k in range(depth):
        s = call(block)(s, p["first"][k], p["last"][k])
    return s


def scanned(p: Any, s: Array) -> Array:
    def step(s: Array, rows: Any) -> tuple[Array, None]:
        return block(s, *rows), None

    return lax.scan(step, s, (p["first"], p["last"]))[0]


def logits(p: Any, s: Array) -> Array:
    return nn.standardize(s) @ p["head"]


# --- enough LayerNorms behind it -----------------------------------------------------------------


def in_calls(call: Call) -> Callable[..., Any]:
    def apply(p: Any, x: Array) -> Any:
        s = call(start)(p, x)
        return s, logits(p, blocks(p, s, call=call))

    return apply


def of_parameters(p: Any, x: Array) -> Any:
    s = x @ p["embed"]
    return logits(p, blocks(p, s)), {"hidden": s, "again": [s]}


def passed_through_a_call(p: Any, x: Array) -> Any:
    """The call returns what it is given, which is the stream under another name."""
    given = start(p, x)
    same, s = jax.checkpoint(lambda s: (s, blocks(p, s)))(given)
    return same, logits(p, s + same)


def an_input(p: Any, x: Array) -> Any:
    s = jnp.pad(x, ((0, 0), (0, 0), (0, 3)), constant_values=1.0)
    return logits(p, blocks(p, s)), s


def either(p: Any, x: Array) -> Array:
    return lax.cond(x[0, 0, 0] > 0, lambda: start(p, x), lambda: jnp.sin(x @ p["embed"]))


def made_and_read_in_a_call(p: Any, x: Array) -> Any:
    def inner(p: Any, x: Array) -> Any:
        s = start(p, x)
        return logits(p, blocks(p, s)), s

    return jax.jit(jax.checkpoint(inner))(p, x)


def two_of_them(p: Any, x: Array) -> Any:
    one, other = start(p, x), jnp.sin(x @ p["embed"])
    return logits(p, blocks(p, one)), one, logits(p, blocks(p, other)), other


POSITIVE: dict[str, Callable[..., Any]] = {
    **{f"in {name}": in_calls(call) for name, call in CALLS.items()},
    "of parameters": of_parameters,
    "in a scan": lambda p, x: (logits(p, scanned(p, s := start(p, x))), s),
    "passed through a call": passed_through_a_call,
    "an input": an_input,
    "of a branch": lambda p, x: (logits(p, blocks(p, s := either(p, x))), s),
    "made and read in a call": made_and_read_in_a_call,
    "two of them": two_of_them,
}


@pytest.mark.parametrize("name", POSITIVE)
def test_a_copy_is_centered(name: str) -> None:
    apply = POSITIVE[name]
    folded = fold_checked(apply, PARAMS, INPUT)
    report, streams = folded.report, 2 if name == "two of them" else 1
    assert (report.n_folded, report.n_inserted) == (len(report.norms), streams)
    before = count_equations("reduce_sum", apply, PARAMS, INPUT)
    after = count_equations("reduce_sum", folded.apply, folded.params, INPUT)
    static = 2 if name == "in a scan" else len(report.norms)  # equations, not iterations
    assert before - after == static - streams
    for insertion in report.insertions:
        assert "makes a value that is an output" in insertion.reason
        assert insertion.advice.startswith("return the normalised values instead of the stream")
    assert "embed" not in {edit.key_path for edit in report.edits}


@pytest.mark.parametrize("name", POSITIVE)
def test_gradients_through_both(name: str) -> None:
    apply = POSITIVE[name]
    folded = jax_lnfold.fold(apply, PARAMS, INPUT)

    def loss(fn: Callable[..., Any], p: Any, x: Array) -> Array:
        terms = (jnp.sum(jnp.sin(y + k)) for k, y in enumerate(jax.tree.leaves(fn(p, x))))
        return sum(terms, jnp.zeros(()))

    def trained(p: Any, x: Array) -> Array:
        return loss(folded.apply, folded.plan.center(p), x)

    want = jax.grad(lambda p, x: loss(apply, p, x), (0, 1))(PARAMS, INPUT)
    assert relative_difference(jax.grad(trained, (0, 1))(PARAMS, INPUT), want) < 1e-11


def test_what_is_returned_is_what_it_was() -> None:
    """Bit by bit: nothing is subtracted and added again."""
    folded = jax_lnfold.fold(of_parameters, PARAMS, INPUT)
    got, want = folded.apply(folded.params, INPUT)[1], of_parameters(PARAMS, INPUT)[1]
    assert relative_difference(got, want) == 0


def test_another_length_is_placed_again() -> None:
    folded = jax_lnfold.fold(of_parameters, PARAMS, INPUT)
    longer = normal(3, 9, 5)
    want = of_parameters(PARAMS, longer)
    assert relative_difference(folded(longer), want) < 1e-12


# --- near misses ---------------------------------------------------------------------------------


# Three LayerNorms read each stream, of which two read its sum with the first block, too.


def too_few(p: Any, x: Array) -> Any:
    s = start(p, x)
    return logits(p, blocks(p, s, 1)), s


def after_each_block(p: Any, x: Array) -> Any:
    streams = [start(p, x)]
    for k in range(2):
        streams.append(block(streams[-1], p["first"][k], p["last"][k]))
    return logits(p, streams[-1]), streams


def stacked_in_a_scan(p: Any, x: Array) -> Any:
    def step(s: Array, rows: Any) -> tuple[Array, Array]:
        return block(s, *rows), s

    s, streams = lax.scan(step, start(p, x), (p["first"][:2], p["last"][:2]))
    return logits(p, s), streams


def doubled_or_not(x: Array, s: Array) -> Array:
    return lax.cond(x[0, 0, 0] > 0, lambda s: s, lambda s: 2 * s, s)


def carried(p: Any, x: Array) -> Any:
    """A loop returns a multiple of it, and starts another carry from it."""
    s = start(p, x)
    kept, end = lax.fori_loop(0, 2, lambda _, c: (2 * c[0], block(c[1], *layer(p))), (s, s))
    return logits(p, blocks(p, end, 1)), kept


def layer(p: Any) -> tuple[Array, Array]:
    return p["first"][0], p["last"][0]


def read_in_two_calls(p: Any, x: Array) -> Any:
    """One copy does not reach readers inside and outside of the call that makes the stream."""

    def inner(p: Any, x: Array) -> Any:
        s = start(p, x)
        return s, blocks(p, s, 2)

    s, end = jax.checkpoint(inner)(p, x)
    return s, logits(p, end), logits(p, blocks(p, s, 2))


NEGATIVE: dict[str, Callable[..., Any]] = {
    "too few": too_few,
    "what is behind": lambda p, x: (logits(p, end := blocks(p, s := start(p, x), 2)), s, end),
    "after each block": after_each_block,
    "stacked in a scan": stacked_in_a_scan,
    "through a branch": lambda p, x: (
        logits(p, blocks(p, s := start(p, x), 2)),
        doubled_or_not(x, s),
    ),
    "moved": lambda p, x: (logits(p, blocks(p, s := start(p, x), 2)), s[:, 0]),
    "carried": carried,
    "read by a product": lambda p, x: (logits(p, blocks(p, s := start(p, x), 2)), s, s @ p["head"]),
    "read in two calls": read_in_two_calls,
}


@pytest.mark.parametrize("apply", NEGATIVE.values(), ids=NEGATIVE)
def test_no_copy_is_centered(apply: Callable[..., Any]) -> None:
    report = fold_checked(apply, PARAMS, INPUT).report
    assert (report.n_folded, report.n_inserted, report.edits) == (0, 0, ())
    reasons = " ".join(norm.reason for norm in report.norms)
    if apply is too_few:
        assert "makes a value that is an output: `[1]`; an explicit centering would cost" in reasons
    else:
        dear = apply is carried  # the centering of the carry itself, in every iteration
        assert ("would cost more" if dear else "would change the result") in reasons


def test_two_norms_are_not_enough_but_for_a_low_price() -> None:
    report = fold_checked(too_few, PARAMS, INPUT).report
    assert (len(report.norms), report.n_inserted) == (2, 0)
    folded = jax_lnfold.fold(too_few, PARAMS, INPUT, explicit_cost=1.5)
    assert (folded.report.n_folded, folded.report.n_inserted) == (2, 1)
    assert relative_difference(folded(INPUT), too_few(PARAMS, INPUT)) < 1e-12
