"""Scales and shifts of LayerNorms go into the linear layers behind them, where that is exact."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contracts import (
    check_contracts,
    count_equations,
    fold_checked,
    relative_difference,
    snapshot,
)
from safetensors.numpy import load_file, save_file
from zoo import ZOO, perturb

import jax_lnfold
from jax_lnfold import FoldError, FoldPlan, PlanFormatError, PlanMismatchError
from jax_lnfold.checkpoints import center_checkpoint
from jax_lnfold.trees import leaf_paths

fold_affine = partial(fold_checked, fold_affine=True)
ZOO_BY_NAME = {str(case): case for case in ZOO}

# Norms whose scale and shift only linear layers read, all of them with a bias.
TAKEN_UP = {
    "vit": 7,  # the last one through the choice of the class token
    "mae": 4,  # the last one is returned
    "clip_vision": 4,  # the first writes into the stream, the projection has no bias
    "dinov2": 4,  # the last one is pooled
    "beit": 3,  # keys have no bias in the first two
    "vit_normalize_qk": 5,  # queries and keys are multiplied with each other
    "qk_norm_stacked": 5,
    "qk_norm_split": 5,
    "mixer_wide": 2,  # half of the norms are read across tokens, the last one is pooled
    "mixer_narrow": 2,
    "dit": 0,  # norms without parameters
    "swin": 6,  # not those before windows are padded, merged, or pooled
    "swin_v2": 0,  # norms write into the stream
    "convnext": 4,  # not those that a convolution reads
    "gpt2": 4,  # the tied head has no bias
    "gpt_untied": 4,
    "gptj": 1,  # attention has no biases
    "gpt_neox": 4,
    "opt": 4,
    "bloom": 4,
    "clip_text": 6,
    "bert": 1,  # a stream is read by the residual, but for the last one
    "bart": 2,
    "whisper_encoder": 2,  # keys have no bias
    "whisper_decoder": 4,
}


def test_every_model_of_the_zoo_is_here() -> None:
    assert TAKEN_UP.keys() == ZOO_BY_NAME.keys()


@pytest.mark.parametrize("name", TAKEN_UP)
def test_zoo(name: str) -> None:
    case = ZOO_BY_NAME[name]
    model = case.build("mean_var" if name in ("vit", "gpt2") else "one_pass")
    folded = jax_lnfold.fold(model.apply_fn, model.params, *model.inputs, fold_affine=True)
    report, original = folded.report, jax.jit(model.apply_fn)
    want = original(model.params, *model.inputs)
    got = jax.jit(folded.apply)(folded.params, *model.inputs)
    assert relative_difference(got, want) < 1e-12
    assert relative_difference(original(folded.params, *model.inputs), want) < 1e-12
    assert (report.n_folded, report.n_inserted) == (case.folded, case.inserted)
    assert len(report.affine) == TAKEN_UP[name]
    leaves = dict(leaf_paths(folded.params))
    for edit in report.affine:
        assert (np.asarray(leaves[edit.key_path]) == 1).all()
        assert edit.shift is not None
        assert (np.asarray(leaves[edit.shift]) == 0).all()
    if report.affine:
        assert f"{2 * len(report.affine)} scales and shifts taken up" in repr(report)


# --- what can be taken up, and what only looks like it -------------------------------------------

SHAPES = {"g": (12,), "c": (12,), "w": (12, 5), "b": (5,), "v": (12, 3), "d": (3,)}
Params = dict[str, jax.Array]


def arrays(**shapes: tuple[int, ...]) -> Params:
    rng = np.random.default_rng(0)
    return {k: jnp.asarray(rng.normal(size=s) + 0.5) for k, s in (SHAPES | shapes).items()}


def norm(p: Params, x: jax.Array) -> jax.Array:
    return nn.standardize(x) * p["g"] + p["c"]


def plain(p: Params, x: jax.Array) -> jax.Array:
    return norm(p, x) @ p["w"] + p["b"]


def two_readers(p: Params, x: jax.Array) -> jax.Array:
    y = norm(p, x)
    return (y @ p["w"] + p["b"]).sum(-1) + (y @ p["v"] + p["d"]).sum(-1)


def no_shift(p: Params, x: jax.Array) -> jax.Array:
    return (nn.standardize(x) * p["g"]) @ p["w"]


def scale_first(p: Params, x: jax.Array) -> jax.Array:
    """As Flax writes it: the scale multiplies one over the deviation."""
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return ((x - mean) * (jax.lax.rsqrt(var + 1e-6) * p["g"]) + p["c"]) @ p["w"] + p["b"]


def turned(p: Params, x: jax.Array) -> jax.Array:
    return jnp.einsum("btd,df->fbt", norm(p, x), p["w"]).transpose(1, 2, 0) + p["b"]


def kernel_turned(p: Params, x: jax.Array) -> jax.Array:
    return norm(p, x) @ p["t"].T + p["b"]


def heads(p: Params, x: jax.Array) -> jax.Array:
    return jnp.einsum("btd,dhf->bthf", norm(p, x), p["h"]) + p["hb"]


def one_token(p: Params, x: jax.Array) -> jax.Array:
    return norm(p, x)[:, 0] @ p["w"] + p["b"]


def shared_twice(p: Params, x: jax.Array) -> jax.Array:
    return plain(p, x) + plain(p, x[:, ::-1] * 2)


def converted(p: Params, x: jax.Array) -> jax.Array:
    y = norm({k: v.astype(jnp.float64) for k, v in p.items()}, x)
    return y.astype(jnp.float64) @ p["w"].astype(jnp.float64) + p["b"]


TAKEN = {
    "plain": (plain, {"g", "c", "w", "b"}, {}),
    "two readers": (two_readers, {"g", "c", "w", "b", "v", "d"}, {}),
    "no shift": (no_shift, {"g", "w"}, {}),
    "scale first": (scale_first, {"g", "c", "w", "b"}, {}),
    "kernel turned": (kernel_turned, {"g", "c", "t", "b"}, {"t": (5, 12)}),
    "heads": (heads, {"g", "c", "h", "hb"}, {"h": (12, 3, 4), "hb": (3, 4)}),
    "one token": (one_token, {"g", "c", "w", "b"}, {}),
    "shared twice": (shared_twice, {"g", "c", "w", "b"}, {}),
    "converted": (converted, {"g", "c", "w", "b"}, {}),
    "a row": (plain, {"g", "c", "w", "b"}, {"g": (1, 12), "c": (1, 1, 12), "b": (1, 5)}),
}


@pytest.mark.parametrize("name", TAKEN)
def test_taken_up(name: str) -> None:
    apply, touched, shapes = TAKEN[name]
    params, x = arrays(**shapes), jax.random.normal(jax.random.key(1), (2, 7, 12), jnp.float64)
    folded = fold_affine(apply, params, x)
    check_contracts(apply, params, folded, x[:1, :4])
    assert len(folded.report.affine) == 1
    changed = {k for k in params if not np.array_equal(params[k], folded.params[k])}
    assert changed == touched
    both = [count_equations("mul", f, params, x) for f in (apply, folded.apply)]
    assert both[1] <= both[0]


def read_by_the_residual(p: Params, x: jax.Array) -> jax.Array:
    y = norm(p, x)
    return y + (y @ p["w"] + p["b"]) @ p["w"].T


def returned(p: Params, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return plain(p, x), norm(p, x)


def reader_without_bias(p: Params, x: jax.Array) -> jax.Array:
    y = norm(p, x)
    return (y @ p["w"] + p["b"]).sum(-1) + (y @ p["v"]).sum(-1)


def bias_read_twice(p: Params, x: jax.Array) -> jax.Array:
    return plain(p, x) + jnp.tanh(p["b"])


def kernel_read_twice(p: Params, x: jax.Array) -> jax.Array:
    return plain(p, x) + x @ p["w"]


def shift_read_twice(p: Params, x: jax.Array) -> jax.Array:
    return plain(p, x + p["c"])


def scale_squared(p: Params, x: jax.Array) -> jax.Array:
    y = nn.standardize(x) * p["g"]
    return (y * y) @ p["w"] + p["b"]


def nonlinear(p: Params, x: jax.Array) -> jax.Array:
    return jnp.tanh(norm(p, x)) @ p["w"] + p["b"]


def shift_scaled_by_data(p: Params, x: jax.Array) -> jax.Array:
    return (norm(p, x) * x[..., :1]) @ p["w"] + p["b"]


def bias_scaled(p: Params, x: jax.Array) -> jax.Array:
    return 2.0 * (norm(p, x) @ p["w"]) + p["b"]


def bias_per_token(p: Params, x: jax.Array) -> jax.Array:
    return norm(p, x) @ p["w"] + p["tokens"]


def mixed_tokens(p: Params, x: jax.Array) -> jax.Array:
    return jnp.einsum("btd,ts->bsd", norm(p, x), p["mix"])


def two_shifts(p: Params, x: jax.Array) -> jax.Array:
    return (norm(p, x) + p["e"]) @ p["w"] + p["b"]


def shift_of_data(p: Params, x: jax.Array) -> jax.Array:
    return (nn.standardize(x) * p["g"] + x) @ p["w"] + p["b"]


def features_cut(p: Params, x: jax.Array) -> jax.Array:
    return norm(p, x)[..., :6] @ p["w"][:6] + p["b"]


LEFT: dict[str, tuple[Callable[..., Any], dict[str, tuple[int, ...]]]] = {
    "read by the residual": (read_by_the_residual, {}),
    "returned": (returned, {}),
    "a reader without bias": (reader_without_bias, {}),
    "bias read twice": (bias_read_twice, {}),
    "kernel read twice": (kernel_read_twice, {}),
    "shift read twice": (shift_read_twice, {}),
    "scale squared": (scale_squared, {}),
    "nonlinear": (nonlinear, {}),
    "shift scaled by data": (shift_scaled_by_data, {}),
    "bias of a scaled product": (bias_scaled, {}),
    "bias per token": (bias_per_token, {"tokens": (7, 5)}),
    "tokens mixed": (mixed_tokens, {"mix": (7, 4)}),
    "two shifts": (two_shifts, {"e": (12,)}),
    "shift of data": (shift_of_data, {}),
    "features cut": (features_cut, {}),
    "turned result": (turned, {}),  # right, but not followed
}


@pytest.mark.parametrize("name", LEFT)
def test_left(name: str) -> None:
    apply, shapes = LEFT[name]
    params, x = arrays(**shapes), jax.random.normal(jax.random.key(1), (2, 7, 12), jnp.float64)
    folded = fold_affine(apply, params, x)
    assert not folded.report.affine
    for key in ("g", "w", "b"):
        np.testing.assert_array_equal(folded.params[key], params[key])


def test_the_edit_is_the_formula() -> None:
    params, x = arrays(), jnp.ones((2, 7, 12))
    plan = jax_lnfold.plan_fold(plain, params, x, fold_affine=True)
    p = {k: np.asarray(v) for k, v in params.items()}
    got = plan.center(params)
    np.testing.assert_allclose(got["w"], p["g"][:, None] * p["w"], rtol=1e-14)
    np.testing.assert_allclose(got["b"], p["b"] + p["c"] @ p["w"], rtol=1e-14)
    assert got["v"] is params["v"]


# --- stacks, precision, plans, training ----------------------------------------------------------


class Stacked(nn.Module):
    """Pre-LN layers in a scan."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
                y = nn.gelu(nn.Dense(17, name="up")(nn.LayerNorm(name="norm")(x)))
                return x + nn.Dense(12, name="down")(y), None

        layers = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        x, _ = layers(name="layers")(nn.Dense(12, name="stem")(x), None)
        return nn.Dense(5, name="head")(nn.LayerNorm(name="last")(x))


def stacked() -> tuple[Any, Any, jax.Array]:
    x = jax.random.normal(jax.random.key(1), (2, 7), jnp.float64)
    return Stacked().apply, perturb(Stacked().init(jax.random.key(0), x)), x


def test_layers_in_a_scan() -> None:
    apply, params, x = stacked()
    folded = fold_affine(apply, params, x)
    assert folded.report.n_folded == 2
    (first, second) = folded.report.affine
    assert {first.key_path, second.key_path} == {
        "params/layers/norm/scale",
        "params/last/scale",
    }
    (reader,) = next(e for e in folded.report.affine if "layers" in e.key_path).readers
    assert (reader.axes, reader.summed) == ((0, 1), (1,))


def test_bfloat16_rounds_once() -> None:
    wide, x = arrays(), jax.random.normal(jax.random.key(1), (2, 7, 12), jnp.bfloat16)
    params = {k: v.astype(jnp.bfloat16) for k, v in wide.items()}
    folded = jax_lnfold.fold(plain, params, x, fold_affine=True)
    exact = {k: np.asarray(v, np.float64) for k, v in params.items()}
    want = np.float32(exact["b"] + exact["c"] @ exact["w"])
    np.testing.assert_array_equal(folded.params["b"], want.astype(jnp.bfloat16))
    assert folded.params["w"].dtype == jnp.bfloat16
    reference = plain({k: jnp.asarray(v) for k, v in exact.items()}, x.astype(jnp.float64))
    original = relative_difference(plain(params, x).astype(jnp.float64), reference)
    got = relative_difference(folded.apply(folded.params, x).astype(jnp.float64), reference)
    assert got < 2 * original


def test_plan_file() -> None:
    apply, params, x = stacked()
    plan = jax_lnfold.plan_fold(apply, params, x, fold_affine=True)
    data = json.loads(plan.to_json())
    assert data["version"] == 3
    assert FoldPlan.from_json(plan.to_json()) == plan
    without = jax_lnfold.plan_fold(apply, params, x)
    assert json.loads(without.to_json())["version"] == 2
    assert (plan.edits, plan.scales) == (without.edits, without.scales)


BROKEN: dict[str, Callable[[dict[str, Any]], Any]] = {
    "an unknown leaf": lambda e: e.update(key_path="x"),
    "a shift of another size": lambda e: e.update(shift="params/stem/bias_"),
    "no bias for a shift": lambda e: e["readers"][0].update(bias=None),
    "axes that do not fit": lambda e: e["readers"][0].update(axes=[1]),
    "nothing summed": lambda e: e["readers"][0].update(summed=[]),
    "an axis that is not there": lambda e: e["readers"][0].update(summed=[7]),
    "one leaf in two parts": lambda e: e.update(shift=e["key_path"]),
    "no readers": lambda e: e.pop("readers"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_plan_files(name: str) -> None:
    apply, params, x = stacked()
    data = json.loads(jax_lnfold.plan_fold(apply, params, x, fold_affine=True).to_json())
    BROKEN[name](data["affine"][0])
    with pytest.raises(PlanFormatError, match="text: broken plan"):
        FoldPlan.from_json(json.dumps(data))


@pytest.mark.parametrize("part", ["key_path", "shift"])
def test_what_is_taken_up_is_not_edited_besides(part: str) -> None:
    apply, params, x = stacked()
    data = json.loads(jax_lnfold.plan_fold(apply, params, x, fold_affine=True).to_json())
    path = data["affine"][0][part]
    (shape,) = (leaf["shape"] for leaf in data["leaves"] if leaf["key_path"] == path)
    along = {"shape": shape, "entries": ["all"] * len(shape)}
    data["edits"].append({"key_path": path, "along": along})
    with pytest.raises(PlanFormatError, match=f"leaf '{path}' is taken up, and edited besides"):
        FoldPlan.from_json(json.dumps(data))


def test_checkpoint(tmp_path: Path) -> None:
    apply, params, x = stacked()
    plan = jax_lnfold.plan_fold(apply, params, x, fold_affine=True)
    tree = jax.tree.map(np.asarray, params)
    save_file(dict(leaf_paths(tree)), tmp_path / "in.safetensors")
    center_checkpoint(plan, tmp_path / "in.safetensors", tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    for path, want in leaf_paths(plan.center(tree)):
        assert found[path].tobytes() == np.asarray(want).tobytes(), path


def test_donation() -> None:
    params, x = arrays(), jnp.ones((2, 7, 12))
    want = jax_lnfold.fold(plain, params, x, fold_affine=True).params
    before = snapshot(params)
    folded = jax_lnfold.fold(plain, params, x, fold_affine=True, donate=True)
    assert all(params[k].is_deleted() for k in ("g", "c", "w", "b"))
    assert not params["v"].is_deleted()
    assert relative_difference(folded.params, want) == 0
    assert relative_difference(want["v"], before["v"]) == 0


def test_training_keeps_scales_and_shifts() -> None:
    apply, params, x = stacked()
    folded = jax_lnfold.fold(apply, params, x, fold_affine=True)
    tx = optax.chain(optax.adam(1e-2), jax_lnfold.center_updates(folded.plan))

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        grads = jax.grad(lambda p: (folded.apply(p, x) ** 2).sum())(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    trained, state = folded.params, tx.init(folded.params)
    for _ in range(5):
        trained, state = step(trained, state)
    assert relative_difference(trained, folded.params) > 1e-3
    assert relative_difference(folded.apply(trained, x), apply(trained, x)) < 1e-11


def test_another_trace() -> None:
    """A call that leaves out a reader is fine, one that reads the norm otherwise is not."""

    def apply(p: Params, x: jax.Array, how: jax.Array | None = None) -> jax.Array:
        if how is None:
            return two_readers(p, x)
        if how.ndim == 0:
            return plain(p, x).sum(-1)
        return two_readers(p, x) + norm(p, x).sum(-1)

    params, x = arrays(), jax.random.normal(jax.random.key(1), (2, 7, 12), jnp.float64)
    folded = fold_affine(apply, params, x)
    check_contracts(apply, params, folded, x, jnp.ones(()))
    with pytest.raises(PlanMismatchError, match="scale 'g', or what takes it up, is used in"):
        folded.apply(folded.params, x, jnp.ones(3))


@pytest.mark.parametrize("value", [None, "yes", 2, {"g"}])
def test_option(value: Any) -> None:
    for call in (jax_lnfold.fold, jax_lnfold.analyze, jax_lnfold.plan_fold):
        with pytest.raises(FoldError, match=r"^fold_affine: .* is not a bool"):
            call(plain, arrays(), jnp.ones((2, 7, 12)), fold_affine=value)
