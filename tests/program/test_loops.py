"""Loops and branches: stacked layers, carries of every kind, and carries that spoil the mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jax_lnfold
from tests.helpers.contracts import (
    check_contracts,
    counts,
    fold_checked,
    relative_difference,
    removed_sums,
)
from tests.helpers.derivative_rules import with_vjp

D, L, HIDDEN = 12, 4, 20
RNG = np.random.default_rng(0)


def draw(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.standard_normal(shape) / 2 + 0.1)


PARAMS = {
    "embed": draw(7, D),
    "up": draw(L, D, HIDDEN),
    "down": draw(L, HIDDEN, D),
    "bias": draw(L, D),
    "scale": draw(L, D),
    "head": draw(D, 3),
}
INPUT = draw(2, 5, 7)
LAYERS = ("up", "down", "bias", "scale")


def block(s: jax.Array, layer: Any) -> jax.Array:
    hidden = nn.gelu((nn.standardize(s) * layer["scale"]) @ layer["up"])
    return s + hidden @ layer["down"] + layer["bias"]


def layers(p: Any) -> Any:
    return {k: p[k] for k in LAYERS}


def head(p: Any, s: jax.Array) -> jax.Array:
    return nn.standardize(s) @ p["head"]


def scanned(p: Any, x: jax.Array, **options: Any) -> jax.Array:
    s, _ = jax.lax.scan(lambda s, w: (block(s, w), None), x @ p["embed"], layers(p), **options)
    return head(p, s)


def remat(p: Any, x: jax.Array) -> jax.Array:
    body = jax.checkpoint(lambda s, w: (block(s, w), None))
    return head(p, jax.lax.scan(body, x @ p["embed"], layers(p))[0])


def tuple_carry(p: Any, x: jax.Array) -> jax.Array:
    def body(carry: Any, w: Any) -> Any:
        s = block(carry["stream"], w)
        return {"stream": s, "step": carry["step"] + 1, "power": carry["power"] * 0.5}, None

    start = {"stream": x @ p["embed"], "step": 0, "power": jnp.ones(3)}
    end, _ = jax.lax.scan(body, start, layers(p))
    return head(p, end["stream"]) * end["power"] + end["step"]


def nested(p: Any, x: jax.Array) -> jax.Array:
    groups = jax.tree.map(lambda w: w.reshape(2, 2, *w.shape[1:]), layers(p))

    def outer(s: jax.Array, group: Any) -> Any:
        return jax.lax.scan(lambda s, w: (block(s, w), None), s, group)

    return head(p, jax.lax.scan(outer, x @ p["embed"], groups)[0])


def fori(p: Any, x: jax.Array) -> jax.Array:
    def body(i: jax.Array, s: jax.Array) -> jax.Array:
        return block(s, jax.tree.map(lambda w: w[i], layers(p)))

    return head(p, jax.lax.fori_loop(0, L, body, x @ p["embed"]))


def while_loop(p: Any, x: jax.Array) -> jax.Array:
    def body(carry: Any) -> Any:
        i, s = carry
        return i + 1, block(s, jax.tree.map(lambda w: w[i], layers(p)))

    steps = (x[0, 0, 0] * 0 + L).astype(int)
    return head(p, jax.lax.while_loop(lambda c: c[0] < steps, body, (0, x @ p["embed"]))[1])


def skipping(p: Any, x: jax.Array) -> jax.Array:
    """Every other layer is skipped by a conditional."""

    def body(carry: Any, w: Any) -> Any:
        s, i = carry
        return (jax.lax.cond(i % 2 == 0, block, lambda s, w: s, s, w), i + 1), None

    (s, _), _ = jax.lax.scan(body, (x @ p["embed"], 0), layers(p))
    return head(p, s)


def shared(p: Any, x: jax.Array) -> jax.Array:
    """One layer's parameters, used in every iteration."""
    layer = jax.tree.map(lambda w: w[1], layers(p))
    s, _ = jax.lax.scan(lambda s, _: (block(s, layer), None), x @ p["embed"], length=3)
    return head(p, s)


def stacked_readers(p: Any, x: jax.Array) -> jax.Array:
    """The stream after every layer is normalised outside of the loop."""
    _, all_s = jax.lax.scan(lambda s, w: (block(s, w),) * 2, x @ p["embed"], layers(p))
    return head(p, all_s).sum(0)


def recurrence(p: Any, x: jax.Array) -> jax.Array:
    """A linear recurrence over tokens, normalised per token afterwards."""
    values = jnp.moveaxis(x @ p["embed"], 1, 0)
    decay = jax.nn.sigmoid(jnp.moveaxis(x[..., :1], 1, 0))

    def body(state: jax.Array, step: Any) -> Any:
        value, keep = step
        state = keep * state + value
        return state, state

    _, states = jax.lax.scan(body, jnp.zeros_like(values[0]), (values, decay))
    return head(p, states)


def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return jax.nn.softmax(q @ jnp.swapaxes(k, -1, -2)) @ v


kernel = with_vjp(attend)


def attention_with_a_rule(p: Any, x: jax.Array) -> jax.Array:
    """Attention with its own derivative, as kernels have, writes values into the stream."""

    def layer(s: jax.Array, w: Any) -> Any:
        n = nn.standardize(s) * w["scale"]
        values = n @ w["up"] @ w["down"] + w["bias"]
        return s + kernel(n, jnp.tanh(n), values), None

    return head(p, jax.lax.scan(layer, x @ p["embed"], layers(p))[0])


# name: (function, LayerNorms in the program, how often the first one runs)
FOLDS: dict[str, tuple[Callable[..., Any], int, int]] = {
    "scan": (scanned, 2, L),
    "scan reversed": (lambda p, x: scanned(p, x, reverse=True), 2, L),
    "scan unrolled": (lambda p, x: scanned(p, x, unroll=2), 2, L),
    "scan with remat": (remat, 2, L),
    "carry of several values": (tuple_carry, 2, L),
    "nested scans": (nested, 2, L),
    "fori_loop": (fori, 2, L),
    "while_loop": (while_loop, 2, 1),
    "layers skipped by cond": (skipping, 2, L),
    "shared layer": (shared, 2, 3),
    "stacked outputs": (stacked_readers, 2, L),
    "linear recurrence": (recurrence, 1, 1),
    "attention with a derivative rule": (attention_with_a_rule, 2, L),
}


@pytest.mark.parametrize(("apply", "norms", "count"), FOLDS.values(), ids=FOLDS)
def test_folds_through_the_loop(apply: Callable[..., Any], norms: int, count: int) -> None:
    folded = fold_checked(apply, PARAMS, INPUT)
    report = folded.report
    assert counts(report) == (norms, norms, 0)
    assert report.norms[0].count == count
    check_contracts(apply, PARAMS, folded, draw(3, 4, 7))
    assert removed_sums(apply, PARAMS, folded, INPUT) == norms


@pytest.mark.parametrize("apply", [scanned, attention_with_a_rule])
def test_gradients_through_a_folded_scan(apply: Callable[..., Any]) -> None:
    folded = jax_lnfold.fold(apply, PARAMS, INPUT)
    want, got = (
        jax.grad(lambda x, f=f, p=p: jnp.sum(jnp.sin(f(p, x))))(INPUT)
        for f, p in ((apply, PARAMS), (folded.apply, folded.params))
    )
    assert relative_difference(got, want) < 1e-11


def test_gelu_start_costs_one_centering_outside_of_the_loop() -> None:
    def apply(p: Any, x: jax.Array) -> jax.Array:
        start = nn.gelu(x @ p["embed"])
        return head(p, jax.lax.scan(lambda s, w: (block(s, w), None), start, layers(p))[0])

    report = fold_checked(apply, PARAMS, INPUT).report
    assert (report.n_folded, report.n_inserted) == (2, 1)


def leaky_output(p: Any, x: jax.Array) -> Any:
    s, _ = jax.lax.scan(lambda s, w: (block(s, w), None), x @ p["embed"], layers(p))
    return head(p, s), s


def leaky_stack(p: Any, x: jax.Array) -> Any:
    s, norms = jax.lax.scan(lambda s, w: (block(s, w), jnp.abs(s).max()), x @ p["embed"], layers(p))
    return head(p, s), norms


def read_one_iteration_later(p: Any, x: jax.Array) -> Any:
    """What a layer writes is read raw by the next one, through another carry."""

    def body(carry: Any, w: Any) -> Any:
        s, last, seen = carry
        return (block(s, w), s, seen + jnp.tanh(last)), None

    start = x @ p["embed"]
    (s, _, seen), _ = jax.lax.scan(body, (start, start * 0, start * 0), layers(p))
    return head(p, s), seen


def nonlinear_carry(p: Any, x: jax.Array) -> jax.Array:
    s, _ = jax.lax.scan(lambda s, w: (jnp.tanh(block(s, w)), None), x @ p["embed"], layers(p))
    return head(p, s)


def nonlinear_branch(p: Any, x: jax.Array) -> jax.Array:
    s = jax.lax.cond(x[0, 0, 0] > 0, lambda s: s + 0.5 * s, jnp.tanh, x @ p["embed"])
    return head(p, s)


def branch_on_the_stream(p: Any, x: jax.Array) -> jax.Array:
    s = x @ p["embed"]
    return jax.lax.cond(s[0, 0, 0] > 0.3, head, lambda p, s: -head(p, s), p, s)


def loop_until_the_stream_is_large(p: Any, x: jax.Array) -> jax.Array:
    layer = jax.tree.map(lambda w: w[1], layers(p))
    start = (jnp.zeros((), int), x @ p["embed"])
    end = jax.lax.while_loop(
        lambda c: (jnp.abs(c[1]).max() < 3) & (c[0] < 5),
        lambda c: (c[0] + 1, block(c[1], layer)),
        start,
    )
    return head(p, end[1])


def mean_over_iterations(p: Any, x: jax.Array) -> jax.Array:
    """A LayerNorm whose mean spans the loop's own axis as well."""
    _, all_s = jax.lax.scan(lambda s, w: (s + w @ p["head"].sum(1),) * 2, draw(5) * 0, p["scale"])
    return nn.standardize(all_s, axis=(0, 1)) * x.sum()


# name: (function, what its reasons name)
LEFT: dict[str, tuple[Callable[..., Any], str]] = {
    "leaky output": (leaky_output, ""),
    "leaky stack": (leaky_stack, ""),
    "read one iteration later": (read_one_iteration_later, "carry 0 of `scan` "),
    "nonlinear carry": (nonlinear_carry, "carry 0 of `scan` "),
    "nonlinear branch": (nonlinear_branch, ""),
    "branch on the stream": (branch_on_the_stream, ""),
    "until the stream is large": (loop_until_the_stream_is_large, "carry 1 of `while` "),
}


@pytest.mark.parametrize(("apply", "carry"), LEFT.values(), ids=LEFT)
def test_is_left_alone(apply: Callable[..., Any], carry: str) -> None:
    report = fold_checked(apply, PARAMS, INPUT).report
    assert (report.n_folded, report.n_inserted, report.edits) == (0, 0, ())
    assert report.norms
    where = f"{carry}(test_loops.py:" if carry else "test_loops.py:"
    assert all(where in norm.reason for norm in report.norms)


def test_mean_over_iterations_is_sound() -> None:
    fold_checked(mean_over_iterations, PARAMS, INPUT)
