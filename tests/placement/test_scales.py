"""LayerScale: merged where one linear layer can take the scale, left alone everywhere else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jax_lnfold
from tests.helpers.contracts import fold_checked

Params = dict[str, jax.Array]
Model = Callable[[Params, jax.Array], Any]

SHAPES = {"w": (7, 12), "u": (7, 12), "b": (12,), "g": (12,), "h": (12,), "v": (12, 3)}
RNG = np.random.default_rng(0)
PARAMS = {name: jnp.asarray(RNG.standard_normal(shape) + 0.3) for name, shape in SHAPES.items()}
INPUT = jnp.asarray(RNG.standard_normal((2, 5, 7)))


def head(p: Params, s: jax.Array) -> jax.Array:
    return nn.standardize(s) @ p["v"]


def masked(p: Params, x: jax.Array) -> jax.Array:
    keep = x[..., :1] > 0
    return head(p, jnp.where(keep, x @ p["w"] / 0.9, 0.0) * p["g"])


def per_head(p: Params, x: jax.Array) -> jax.Array:
    kernel = p["w"].reshape(7, 3, 4)
    s = jnp.einsum("bnd,dhk->bnhk", x, kernel).reshape(2, 5, 12)
    return head(p, (s + p["b"]) * p["g"])


def module_twice(p: Params, x: jax.Array) -> jax.Array:
    branches = ((y @ p["w"] + p["b"]) * p["g"] for y in (x, jnp.flip(x, 1)))
    return head(p, sum(branches, x @ p["u"]))


FOLDS: dict[str, tuple[Model, int]] = {
    "plain": (lambda p, x: head(p, (x @ p["w"] + p["b"]) * p["g"]), 1),
    "scale first": (lambda p, x: head(p, p["g"] * (x @ p["w"])), 1),
    "on a branch": (lambda p, x: head(p, x @ p["u"] + p["g"] * (x @ p["w"] + p["b"])), 1),
    "masked": (masked, 1),
    "module applied twice": (module_twice, 1),
    "summed over tokens": (lambda p, x: head(p, (x @ p["w"]).sum(1) * p["g"]), 1),
    "two scales": (lambda p, x: head(p, (x @ p["w"]) * p["g"] + (x @ p["u"]) * p["h"]), 2),
}


@pytest.mark.parametrize(("apply", "merged"), FOLDS.values(), ids=FOLDS)
def test_scale_is_merged(apply: Model, merged: int) -> None:
    folded = fold_checked(apply, PARAMS, INPUT)
    assert (folded.report.n_folded, folded.report.n_inserted) == (1, 0)
    assert len(folded.report.scales) == merged
    for scale in folded.report.scales:
        assert np.all(folded.params[scale.key_path] == 1)


def unscaled_read_elsewhere(p: Params, x: jax.Array) -> Any:
    s = x @ p["w"]
    return head(p, s * p["g"]), jnp.tanh(s)


LEFT: dict[str, Model] = {
    "scale squared": lambda p, x: head(p, (x @ p["w"]) * p["g"] * p["g"]),
    "scale at two depths": lambda p, x: head(p, ((x @ p["w"]) * p["g"] + x @ p["u"]) * p["g"]),
    "scale read elsewhere": lambda p, x: (head(p, (x @ p["w"]) * p["g"]), jnp.tanh(p["g"])),
    "scale returned": lambda p, x: (head(p, (x @ p["w"]) * p["g"]), p["g"]),
    "unscaled value read elsewhere": unscaled_read_elsewhere,
    "kernel read elsewhere": lambda p, x: (head(p, (x @ p["w"]) * p["g"]), jnp.tanh(x @ p["w"])),
    "after a nonlinearity": lambda p, x: head(p, jnp.tanh(x @ p["w"]) * p["g"]),
    "constant term": lambda p, x: head(p, (x @ p["w"] + 1.0) * p["g"]),
    "data term": lambda p, x: head(p, (x @ p["w"] + jnp.tile(x[..., :4], 3)) * p["g"]),
    "function of the scale": lambda p, x: head(p, (x @ p["w"]) * jnp.tanh(p["g"])),
}


@pytest.mark.parametrize("name", LEFT)
def test_scale_is_left_alone(name: str) -> None:
    folded = fold_checked(LEFT[name], PARAMS, INPUT)
    assert (folded.report.n_folded, folded.report.scales, folded.report.edits) == (0, (), ())
    assert len(folded.report.norms) == 1


def test_scale_that_serves_no_norm_is_left_alone() -> None:
    def apply(p: Params, x: jax.Array) -> Any:
        return head(p, x @ p["u"]), jnp.tanh((x @ p["w"] + p["b"]) * p["g"])

    folded = fold_checked(apply, PARAMS, INPUT)
    assert folded.report.n_folded == 1
    assert folded.report.scales == ()
    assert folded.params["g"] is PARAMS["g"]


def test_per_head_kernel_keeps_its_scale() -> None:
    """A scale over merged heads has no single axis on the kernel: sound, left alone."""
    folded = fold_checked(per_head, PARAMS, INPUT)
    assert folded.report.scales == ()


LAYERS = {
    "embed": (7, 12),
    "up": (4, 12, 5),
    "down": (4, 5, 12),
    "bias": (4, 12),
    "gamma": (4, 12),
    "v": (12, 3),
}
STACKED = {name: jnp.asarray(RNG.standard_normal(shape) + 0.3) for name, shape in LAYERS.items()}


def scanned(p: Params, x: jax.Array, shared: tuple[str, ...] = ()) -> jax.Array:
    """Residual branches with a LayerScale each; `shared` parameters are the same in all layers."""

    def layer(s: jax.Array, w: Params) -> tuple[jax.Array, None]:
        w = w | {k: p[k] for k in shared}
        y = nn.gelu(nn.standardize(s) @ w["up"]) @ w["down"] + w["bias"]
        return s + w["gamma"] * y, None

    stacks = {k: p[k] for k in ("up", "down", "bias", "gamma") if k not in shared}
    return head(p, jax.lax.scan(layer, x @ p["embed"], stacks)[0])


def nested(p: Params, x: jax.Array) -> jax.Array:
    """Two groups of two layers."""

    def layer(s: jax.Array, w: Params) -> tuple[jax.Array, None]:
        y = nn.gelu(nn.standardize(s) @ w["up"]) @ w["down"]
        return s + w["gamma"] * (y + w["bias"]), None

    def group(s: jax.Array, w: Params) -> tuple[jax.Array, None]:
        return jax.lax.scan(layer, s, w)

    stacks = {k: p[k] for k in ("up", "down", "bias", "gamma")}
    return head(p, jax.lax.scan(group, x @ p["embed"], stacks)[0])


def per_head_scale(p: Params, x: jax.Array) -> jax.Array:
    """One scale per head and feature, before the heads are joined."""

    def layer(s: jax.Array, w: Params) -> tuple[jax.Array, None]:
        y = jnp.einsum("bnh,hke->bnke", nn.gelu(nn.standardize(s) @ w["up"]), w["down"])
        return s + (w["gamma"] * (y + w["bias"])).reshape(s.shape), None

    stacks = {k: p[k] for k in ("up", "down", "bias", "gamma")}
    return head(p, jax.lax.scan(layer, x @ p["embed"], stacks)[0])


def group_layers(p: Params) -> Params:
    per_layer = ("up", "down", "bias", "gamma")
    return p | {k: p[k].reshape(2, 2, *p[k].shape[1:]) for k in per_layer}


def split_heads(p: Params) -> Params:
    ends = ("down", "bias", "gamma")
    return p | {k: p[k].reshape(*p[k].shape[:-1], 3, 4) for k in ends}


SCANS: dict[str, tuple[Model, Params, tuple[int, ...], tuple[int, ...]]] = {
    "stacked": (scanned, STACKED, (0, 1), (0, 2)),
    "nested": (nested, group_layers(STACKED), (0, 1, 2), (0, 1, 3)),
    "per head": (per_head_scale, split_heads(STACKED), (0, 1, 2), (0, 2, 3)),
}


@pytest.mark.parametrize("name", SCANS)
def test_stacked_scales_are_merged_layer_by_layer(name: str) -> None:
    apply, params, bias_axes, kernel_axes = SCANS[name]
    folded = fold_checked(apply, params, INPUT)
    assert (folded.report.n_folded, folded.report.n_inserted) == (2, 0)
    (scale,) = folded.report.scales
    assert scale.key_path == "gamma"
    assert dict(scale.targets) == {"bias": bias_axes, "down": kernel_axes}
    np.testing.assert_array_equal(folded.params["gamma"], 1)
    again = jax_lnfold.FoldPlan.from_json(folded.plan.to_json()).center(params)
    np.testing.assert_array_equal(again["down"], folded.params["down"])


def test_a_shared_scale_goes_into_every_layer() -> None:
    params = STACKED | {"gamma": STACKED["gamma"][0]}
    folded = fold_checked(lambda p, x: scanned(p, x, ("gamma",)), params, INPUT)
    assert folded.report.n_folded == 2
    assert dict(folded.report.scales[0].targets) == {"bias": (1,), "down": (2,)}


@pytest.mark.parametrize("shared", ["bias", "down"])
def test_a_stacked_scale_cannot_go_into_a_shared_parameter(shared: str) -> None:
    params = STACKED | {shared: STACKED[shared][0]}
    folded = fold_checked(lambda p, x: scanned(p, x, (shared,)), params, INPUT)
    assert (folded.report.n_folded, folded.report.scales) == (0, ())


def test_a_stacked_scale_that_is_read_elsewhere_stays() -> None:
    def apply(p: Params, x: jax.Array) -> Any:
        return scanned(p, x), p["gamma"][2]

    folded = fold_checked(apply, STACKED, INPUT)
    assert (folded.report.n_folded, folded.report.scales) == (0, ())
