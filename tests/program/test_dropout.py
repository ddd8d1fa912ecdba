"""Dropout is noticed, named, and taken for the identity only where that was asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jax_lnfold
from jax_lnfold import PlanMismatchError
from tests.helpers.contracts import fold_checked, relative_difference

APPROXIMATE = frozenset({"dropout"})
Drop = Callable[[jax.Array, jax.Array], jax.Array]
RATE = 0.3


def linen(x: jax.Array, key: jax.Array) -> jax.Array:
    return nn.Dropout(RATE, deterministic=False).apply({}, x, rngs={"dropout": key})


def by_mask(x: jax.Array, key: jax.Array) -> jax.Array:
    return x * (jax.random.bernoulli(key, 1 - RATE, x.shape) / (1 - RATE)).astype(x.dtype)


DROPOUTS: dict[str, Drop] = {
    "linen": linen,
    "nnx": lambda x, key: nnx.Dropout(RATE, deterministic=False)(x, rngs=key),
    "equinox": lambda x, key: eqx.nn.Dropout(RATE)(x, key=key),
    "haiku": lambda x, key: hk.dropout(key, RATE, x),
    "mask": by_mask,
    "scaled mask": lambda x, key: (
        jnp.where(jax.random.uniform(key, x.shape) < 1 - RATE, 1 / (1 - RATE), 0.0) * x
    ),
    "raw key": lambda x, key: by_mask(x, jax.random.key_data(key)),
}
NOT_DROPOUTS: dict[str, Drop] = {
    "zero or another value": lambda x, key: jnp.where(
        jax.random.bernoulli(key, RATE, x.shape), x, x[:, ::-1]
    ),
    "drops by data": lambda x, key: jnp.where(x > 0, x, 0.0),
    "drops by data and noise": lambda x, key: jnp.where(
        jax.random.uniform(key, x.shape) < x, x, 0.0
    ),
    "gaussian": lambda x, key: x * (1 + 0.3 * jax.random.normal(key, x.shape)),
    "one left": lambda x, key: jnp.where(jax.random.bernoulli(key, RATE, x.shape), x, 1.0),
    "squared": lambda x, key: linen(x * x, key),
}


def network(drop: Drop) -> Any:
    """``LN(x + drop(layer(LN(x))))``; without a key it does not drop."""

    def apply(params: Any, x: jax.Array, key: jax.Array | None = None) -> jax.Array:
        x = x @ params["stem"]
        y = jax.nn.gelu(nn.standardize(x) @ params["up"]) @ params["down"]
        x = x + (y if key is None else drop(y, key))
        return nn.standardize(x) @ params["head"]

    rng = np.random.default_rng(0)
    shapes = {"stem": (7, 64), "up": (64, 17), "down": (17, 64), "head": (64, 5)}
    params = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
    return apply, params, jnp.asarray(rng.normal(size=(2, 3, 7)))


KEY = jax.random.key(3)


@pytest.mark.parametrize("drop", DROPOUTS.values(), ids=DROPOUTS)
def test_dropout_as_packages_write_it(drop: Drop) -> None:
    apply, params, x = network(drop)
    exact = fold_checked(apply, params, x, KEY)
    assert [norm.folded for norm in exact.report.norms] == [True, False]
    assert 'approximate={"dropout"}' in exact.report.norms[1].advice
    assert exact.report.dropouts == 0
    folded = jax_lnfold.fold(apply, params, x, KEY, approximate=APPROXIMATE)
    assert [norm.folded for norm in folded.report.norms] == [True, True]
    assert [norm.approximate for norm in folded.report.norms] == [False, True]
    assert {edit.key_path for edit in folded.report.edits} == {"stem", "down"}
    want, got = apply(params, x, KEY), folded.apply(folded.params, x, KEY)
    deviation = float(jnp.abs(want - got).max() / jnp.abs(want).max())
    assert folded.report.deviation == pytest.approx(deviation, rel=1e-9)
    assert 1e-4 < deviation < 0.5
    text = " ".join(str(folded.report).split())
    assert f"deviation {deviation:.2g} of the largest output" in text
    assert "folded approximately" in text
    # Without dropout the same parameters are exact.
    assert relative_difference(folded.apply(folded.params, x), apply(params, x)) < 1e-12
    assert relative_difference(apply(folded.params, x), apply(params, x)) < 1e-12


@pytest.mark.parametrize("drop", NOT_DROPOUTS.values(), ids=NOT_DROPOUTS)
def test_what_only_resembles_dropout(drop: Drop) -> None:
    apply, params, x = network(drop)
    folded = fold_checked(apply, params, x, KEY, approximate=APPROXIMATE)
    assert [norm.folded for norm in folded.report.norms] == [True, False]
    assert not any(norm.approximate for norm in folded.report.norms)
    assert "approximate" not in folded.report.norms[1].advice


def test_whole_branches_are_dropped_exactly() -> None:
    """Stochastic depth drops all features of a token: nothing is approximated."""

    def drop(x: jax.Array, key: jax.Array) -> jax.Array:
        return nn.Dropout(RATE, broadcast_dims=(1, 2), deterministic=False).apply(
            {}, x, rngs={"dropout": key}
        )

    apply, params, x = network(drop)
    for approximate in ((), APPROXIMATE):
        folded = fold_checked(apply, params, x, KEY, approximate=approximate)
        assert folded.report.n_folded == 2
        assert not any(norm.approximate for norm in folded.report.norms)


def test_a_trace_with_dropout_is_refused() -> None:
    apply, params, x = network(linen)
    folded = jax_lnfold.fold(apply, params, x)
    assert folded.report.n_folded == 2
    with pytest.raises(PlanMismatchError, match=r'dropout.*approximate=\{"dropout"\}'):
        folded.apply(folded.params, x, KEY)
    allowed = jax_lnfold.fold(apply, params, x, approximate=APPROXIMATE)
    assert allowed.plan == folded.plan
    assert allowed.report.dropouts == 0
    assert allowed.report.deviation is None
    got = allowed.apply(allowed.params, x, KEY)
    assert 1e-4 < relative_difference(got, apply(params, x, KEY)) < 0.5


def test_dropout_in_a_scan() -> None:
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
            y = nn.gelu(nn.Dense(17)(nn.LayerNorm()(x)))
            return x + nn.Dropout(RATE, deterministic=False)(nn.Dense(64)(y)), None

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            split = {"params": True, "dropout": True}
            layers = nn.scan(Layer, variable_axes={"params": 0}, split_rngs=split, length=3)
            return nn.LayerNorm()(layers()(nn.Dense(64)(x), None)[0])

    net, x = Net(), jnp.ones((2, 7))
    shapes = jax.eval_shape(net.init, {"params": KEY, "dropout": KEY}, x)

    def apply(params: Any, x: jax.Array, key: jax.Array) -> jax.Array:
        return net.apply(params, x, rngs={"dropout": key})

    assert jax_lnfold.analyze(apply, shapes, x, KEY).n_folded == 0
    report = jax_lnfold.analyze(apply, shapes, x, KEY, approximate=["dropout"])
    assert report.n_folded == 2
    assert all(norm.approximate for norm in report.norms)
    assert report.deviation is None
    assert "not measured: pass arrays to fold" in " ".join(str(report).split())


def test_training_with_dropout_goes_on() -> None:
    """Gradients of the approximate program are close to those of the LayerNorm model."""
    apply, params, x = network(linen)
    folded = jax_lnfold.fold(apply, params, x, KEY, approximate=APPROXIMATE)

    def grads(function: Any) -> jax.Array:
        tree = jax.grad(lambda p: jnp.sum(function(p, x, KEY) ** 2))(folded.params)
        return jnp.concatenate([jnp.ravel(tree[name]) for name in ("head", "up")])

    a, b = grads(apply), grads(folded.apply)
    assert float(a @ b / jnp.linalg.norm(a) / jnp.linalg.norm(b)) > 0.95
