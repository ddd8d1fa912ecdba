"""Keyword arguments: arrays are inputs, flags are bound, each value in a program of its own."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jax_lnfold
from jax_lnfold import FoldError, fold


class Net(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False, shift: Any = None) -> jax.Array:
        x = nn.Dense(12)(x) if shift is None else nn.Dense(12)(x + shift)
        calls = self.variable("cache", "calls", lambda: jnp.zeros(()))
        if self.is_mutable_collection("cache"):
            calls.value += 1
        x = nn.Dropout(0.5, deterministic=not train)(nn.LayerNorm()(x))
        return nn.Dense(5)(x)

    def half(self, x: jax.Array) -> jax.Array:
        return self(x) / 2


MODEL, X = Net(), jax.random.normal(jax.random.key(0), (3, 7))
PARAMS = MODEL.init(jax.random.key(1), X)["params"]
APPLY = MODEL.apply


def apply(params: Any, *inputs: Any, **keywords: Any) -> Any:
    return APPLY({"params": params, "cache": {"calls": jnp.zeros(())}}, *inputs, **keywords)


KEY = jax.random.key(3)
CALLS: dict[str, tuple[dict[str, Any], int]] = {
    "none": ({}, 1),
    "a flag": ({"train": False}, 1),
    "an array": ({"shift": jnp.arange(7.0)}, 1),
    "an array of NumPy": ({"shift": np.arange(7.0)}, 1),
    "a flag and keys": ({"train": True, "rngs": {"dropout": KEY}}, 1),
    "a list of names": ({"mutable": ["cache"]}, 1),
    "a set of names": ({"mutable": {"cache"}, "train": False}, 1),
    "a method": ({"method": Net.half}, 1),
    "the name of a method": ({"method": "half"}, 1),
}


@pytest.mark.parametrize("case", CALLS)
def test_keywords_of_the_function(case: str) -> None:
    keywords, n_folded = CALLS[case]
    folded = fold(apply, PARAMS, X, **keywords)
    assert folded.report.n_folded == n_folded
    want = apply(PARAMS, X, **keywords)
    for got in (
        folded(X, **keywords),
        folded.apply(folded.params, X, **keywords),
        jax.jit(lambda p, x: folded.apply(p, x, **keywords))(folded.params, X),
        apply(folded.params, X, **keywords),
    ):
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), got, want)
    found = jax_lnfold.verify(apply, PARAMS, folded, X, **keywords)
    assert max(found.original_error, found.folded_error) < 1e-5
    assert jax_lnfold.analyze(apply, PARAMS, X, **keywords).n_folded == n_folded
    assert jax_lnfold.plan_fold(apply, PARAMS, X, **keywords) == folded.plan


def test_every_value_is_a_call_of_its_own() -> None:
    folded = fold(apply, PARAMS, X, train=False)
    for keywords, _ in CALLS.values():
        for _ in range(2):
            got, want = folded(X, **keywords), apply(PARAMS, X, **keywords)
            jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), got, want)
    other = {"shift": jnp.arange(7.0) * 3}
    np.testing.assert_allclose(folded(X, **other), apply(PARAMS, X, **other), atol=1e-6)


def test_programs_are_kept_by_what_is_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    folded, traced = fold(apply, PARAMS, X), list[Any]()
    trace = jax_lnfold.folded.trace
    monkeypatch.setattr(
        "jax_lnfold.folded.trace", lambda *given: (traced.append(given), trace(*given))[1]
    )
    for keywords in ({"mutable": ["cache"]}, {"mutable": ("cache",)}, {"shift": X[0]}) * 3:
        folded(X, **keywords)
    folded(X, shift=X[1])
    assert len(traced) == 3


BAD: dict[str, tuple[Any, str]] = {
    "what cannot be compared": (
        lambda: fold(apply, PARAMS, X, train=bytearray(b"x")),
        r"train: a bytearray is no array.*functools.partial\(apply_fn, train=",
    ),
    "what the function does not know": (
        lambda: fold(apply, PARAMS, X, traim=False),
        "apply_fn: cannot be traced .*traim",
    ),
    "no example inputs": (
        lambda: fold(apply, PARAMS, train=False),
        "train: without example inputs",
    ),
    "several functions": (
        lambda: fold({"net": apply}, PARAMS, {"net": X}, train=False),
        "train: which function it is for is not known",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_keywords(case: str) -> None:
    make, message = BAD[case]
    with pytest.raises(FoldError, match=message):
        make()
