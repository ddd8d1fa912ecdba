"""The folded program: what is taken out, what is put in, and what stays the very same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jax_lnfold
from tests.helpers.contracts import count_equations, fold_checked, iter_equations

RNG = np.random.default_rng(0)
PARAMS = {k: jnp.asarray(RNG.standard_normal((7, 7)) + 0.2) for k in "abcde"}
INPUT = jnp.asarray(RNG.standard_normal((2, 5, 7)))


def names(fn: Any, *args: Any) -> list[str]:
    return [eqn.primitive.name for eqn in iter_equations(jax.make_jaxpr(fn)(*args))]


def test_program_without_norms_is_the_same() -> None:
    def apply(p: Any, x: jax.Array) -> jax.Array:
        return jax.nn.softmax(jax.nn.relu(x @ p["a"]) @ p["b"])

    folded = jax_lnfold.fold(apply, PARAMS, INPUT)
    assert names(folded.apply, PARAMS, INPUT) == names(apply, PARAMS, INPUT)
    assert all(folded.params[k] is PARAMS[k] for k in PARAMS)


def test_nothing_of_the_mean_is_left() -> None:
    def apply(p: Any, x: jax.Array) -> jax.Array:
        s = x @ p["a"]
        mean = jnp.mean(s, -1, keepdims=True)
        var = jnp.mean(s * s, -1, keepdims=True) - mean**2
        return ((s - mean) * jax.lax.rsqrt(var + 0.1)) @ p["b"]

    folded = fold_checked(apply, PARAMS, INPUT)
    left = names(folded.apply, folded.params, INPUT)
    assert left.count("reduce_sum") == 1
    assert "sub" not in left
    assert "integer_pow" not in left


def test_norm_behind_a_call_is_rewritten_per_call_site() -> None:
    """One jitted norm, called on a value that can be centered and on one that cannot."""
    norm = jax.jit(nn.standardize)

    def apply(p: Any, x: jax.Array) -> jax.Array:
        return norm(x @ p["a"]) @ p["b"] + norm(jnp.tanh(x)) @ p["c"] + norm(x @ p["d"]) @ p["e"]

    folded = fold_checked(apply, PARAMS, INPUT)
    assert [n.folded for n in folded.report.norms] == [True, False, True]
    assert count_equations("reduce_sum", apply, PARAMS, INPUT) == 6
    assert count_equations("reduce_sum", folded.apply, folded.params, INPUT) == 4


def test_one_insertion_serves_all_readers() -> None:
    def apply(p: Any, x: jax.Array) -> jax.Array:
        s = jnp.tanh(x)
        for k in "abcd":
            s = s + nn.standardize(s) @ p[k]
        return nn.standardize(s) @ p["e"]

    folded = fold_checked(apply, PARAMS, INPUT)
    assert (folded.report.n_folded, folded.report.n_inserted) == (5, 1)
    assert "`tanh` (test_rewrite.py:" in folded.report.insertions[0].after
    assert names(folded.apply, folded.params, INPUT).count("reduce_sum") == 10 - 5 + 1


def test_value_set_to_zero_costs_no_mean() -> None:
    """A data-dependent shift, uniform along the features, that only a LayerNorm reads."""

    def apply(p: Any, x: jax.Array) -> jax.Array:
        shift = jnp.tanh(x).sum(-1, keepdims=True)
        return nn.standardize(x @ p["a"] + shift) @ p["b"]

    folded = fold_checked(apply, PARAMS, INPUT)
    assert (folded.report.n_folded, folded.report.n_inserted) == (1, 0)
    left = names(folded.apply, folded.params, INPUT)
    assert "tanh" not in left
    assert left.count("reduce_sum") == 1


def test_rewriting_twice_changes_nothing_more() -> None:
    def apply(p: Any, x: jax.Array) -> jax.Array:
        return nn.standardize(x @ p["a"]) @ p["b"]

    once = jax_lnfold.fold(apply, PARAMS, INPUT)
    twice = jax_lnfold.fold(once.apply, once.params, INPUT)
    assert twice.report.norms == ()
    assert names(twice.apply, twice.params, INPUT) == names(once.apply, once.params, INPUT)


OFFSETS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "sum": lambda s, x: s + 2.0,
    "difference": lambda s, x: 3.0 - s,
    "choice per token": lambda s, x: jnp.where(x[..., :1] > 0, 2.0, s) - 1.5,
}


@pytest.mark.parametrize("name", OFFSETS)
def test_a_number_added_to_the_stream_is_taken_out(name: str) -> None:
    """It is uniform along the mean: the LayerNorm removed it, and so does the folded program."""

    def apply(p: Any, x: jax.Array) -> jax.Array:
        return jax.nn.standardize(OFFSETS[name](x @ p["a"], x))

    def leaky(p: Any, x: jax.Array) -> Any:
        s = OFFSETS[name](x @ p["a"], x)
        return jax.nn.standardize(s), s

    report = fold_checked(apply, PARAMS, INPUT).report
    assert (report.n_folded, report.n_inserted) == (1, 0)
    assert fold_checked(leaky, PARAMS, INPUT).report.n_folded == 0
