"""Scales and shifts of LayerNorms go into the linear layers behind them, where that is exact."""

from __future__ import annotations

import json
import re
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
from safetensors.numpy import load_file, save_file

import jax_lnfold
from jax_lnfold import FoldPlan, PlanFormatError, PlanMismatchError, TreeError
from jax_lnfold.checkpoints.center import center_checkpoint
from jax_lnfold.report.summary import summary
from jax_lnfold.trees import leaf_paths
from tests.helpers.contracts import (
    check_contracts,
    count_equations,
    fold_checked,
    relative_difference,
    snapshot,
)
from tests.models.zoo import BY_NAME, perturb

fold_affine = partial(fold_checked, fold_affine=True)

# Norms whose scale and shift only linear layers read, all of them with a bias.
TAKEN_UP = {
    "vit": 7,  # the last one through the choice of the class token
    "mae": 4,  # the last one is returned
    "clip_vision": 4,  # the first writes into the stream, the projection has no bias
    "dinov2": 4,  # the last one is pooled
    "beit": 3,  # keys have no bias in the first two
    "vit_normalize_qk": 5,  # queries take up the scale of keys, not linear layers
    "qk_norm_stacked": 5,
    "qk_norm_split": 5,
    "mixer_wide": 2,  # half of the norms are read across tokens, the last one is pooled
    "mixer_narrow": 2,
    "dit": 0,  # norms without parameters
    "swin": 12,  # not those before windows are merged, or pooled
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
    assert TAKEN_UP.keys() == BY_NAME.keys()


@pytest.mark.parametrize("name", TAKEN_UP)
def test_zoo(name: str) -> None:
    case = BY_NAME[name]
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
MORE = {"t": (5, 12), "h": (12, 3, 4), "hb": (3, 4), "e": (12,), "tokens": (7, 5), "mix": (7, 4)}
MORE |= {f"{name}s": (3, *shape) for name, shape in SHAPES.items()}  # of an ensemble
ROWS = {"g": (1, 12), "c": (1, 1, 12), "b": (1, 5)}
Params = dict[str, jax.Array]
Apply = Callable[[Params, jax.Array], Any]


def arrays(**shapes: tuple[int, ...]) -> Params:
    rng = np.random.default_rng(0)
    return {k: jnp.asarray(rng.normal(size=s) + 0.5) for k, s in (SHAPES | shapes).items()}


def stream(dtype: Any = jnp.float64) -> jax.Array:
    return jax.random.normal(jax.random.key(1), (2, 7, 12), dtype)


def scaled(p: Params, x: jax.Array) -> jax.Array:
    return nn.standardize(x) * p["g"]


def norm(p: Params, x: jax.Array) -> jax.Array:
    return scaled(p, x) + p["c"]


def dense(p: Params, y: jax.Array) -> jax.Array:
    return y @ p["w"] + p["b"]


def plain(p: Params, x: jax.Array) -> jax.Array:
    return dense(p, norm(p, x))


def two_readers(p: Params, x: jax.Array) -> jax.Array:
    y = norm(p, x)
    return dense(p, y).sum(-1) + (y @ p["v"] + p["d"]).sum(-1)


def by_hand(make: Callable[..., jax.Array]) -> Apply:
    """From the parameters, the input, its mean and one over its deviation to the normed input."""

    def apply(p: Params, x: jax.Array) -> jax.Array:
        mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        return dense(p, make(p, x, mean, jax.lax.rsqrt(var + 1e-6)))

    return apply


def converted(p: Params, x: jax.Array) -> jax.Array:
    y = norm({k: v.astype(jnp.float64) for k, v in p.items()}, x)
    return y.astype(jnp.float64) @ p["w"].astype(jnp.float64) + p["b"]


def rolled(p: Params, x: jax.Array) -> jax.Array:
    """As shifted windows, with a part of the features as it was."""
    first, *rest = jnp.split(norm(p, x), [2, 8], axis=-1)
    return dense(p, jnp.concatenate([jnp.roll(first, 2, axis=1), *rest], -1))


def shifted_tokens(p: Params, x: jax.Array) -> jax.Array:
    """As in ProGen: half of the features are those of the token before."""
    y = scaled(p, x)
    before = jnp.pad(y[..., :6], [(0, 0), (1, 0), (0, 0)])[:, :-1]
    token = jnp.concatenate([jnp.zeros((len(x), 1, 12)), y[:, 1:]], 1)
    return dense(p, jnp.concatenate([before, token[..., 6:]], -1))


# name: (function, leaves that change)
TAKEN: dict[str, tuple[Apply, str]] = {
    "plain": (plain, "g c w b"),
    "two readers": (two_readers, "g c w b v d"),
    "no shift": (lambda p, x: scaled(p, x) @ p["w"], "g w"),
    # As Flax writes it: the scale multiplies one over the deviation
    "scale first": (by_hand(lambda p, x, m, r: (x - m) * (r * p["g"]) + p["c"]), "g c w b"),
    "kernel turned": (lambda p, x: norm(p, x) @ p["t"].T + p["b"], "g c t b"),
    "heads": (lambda p, x: jnp.einsum("btd,dhf->bthf", norm(p, x), p["h"]) + p["hb"], "g c h hb"),
    "one token": (lambda p, x: dense(p, norm(p, x)[:, 0]), "g c w b"),
    "shared twice": (lambda p, x: plain(p, x) + plain(p, x[:, ::-1] * 2), "g c w b"),
    "converted": (converted, "g c w b"),
    "a row": (plain, "g c w b"),
    "turned result": (
        lambda p, x: jnp.einsum("btd,df->fbt", norm(p, x), p["w"]).transpose(1, 2, 0) + p["b"],
        "g c w b",
    ),
    # As Equinox writes it: there is a transpose between the product and the bias
    "vmapped": (
        lambda p, x: jax.vmap(jax.vmap(lambda token: p["t"] @ token + p["b"]))(norm(p, x)),
        "g c t b",
    ),
    "flattened": (
        lambda p, x: (norm(p, x).reshape(-1, 12) @ p["w"]).reshape(*x.shape[:2], 5) + p["b"],
        "g c w b",
    ),
    "ensemble": (
        lambda p, x: jax.vmap(plain, in_axes=(0, None))({k: p[f"{k}s"] for k in "gcwb"}, x),
        "gs cs ws bs",
    ),
    # As Keras writes it: the mean is subtracted from the shift
    "one product": (
        by_hand(lambda p, x, m, r: x * (k := r * p["g"]) + (-m * k + p["c"])),
        "g c w b",
    ),
    "two products": (
        by_hand(lambda p, x, m, r: p["g"] * x * r + (p["c"] - p["g"] * m * r)),
        "g c w b",
    ),
    # As Penzai writes it
    "an einsum": (
        lambda p, x: dense(p, jnp.einsum("btd,d->btd", nn.standardize(x), p["g"]) + p["c"]),
        "g c w b",
    ),
    # As Haiku writes a norm without an offset
    "offset zero": (lambda p, x: dense(p, scaled(p, x) + jnp.zeros((), x.dtype)), "g w"),
    "tokens mixed first": (
        lambda p, x: dense(p, jnp.einsum("btd,tc->bcd", scaled(p, x), x[0, :, :3])),
        "g w",
    ),
    "rolled": (rolled, "g c w b"),
    "shifted tokens": (shifted_tokens, "g w"),
}


@pytest.mark.parametrize("name", TAKEN)
def test_taken_up(name: str) -> None:
    apply, touched = TAKEN[name]
    params, x = arrays(**MORE, **(ROWS if name == "a row" else {})), stream()
    folded = fold_affine(apply, params, x)
    check_contracts(apply, params, folded, x[:1, :4])
    assert len(folded.report.affine) == 1
    changed = {k for k in params if not np.array_equal(params[k], folded.params[k])}
    assert changed == {*touched.split()}
    both = [count_equations("mul", f, params, x) for f in (apply, folded.apply)]
    assert both[1] <= both[0]


def read(change: Callable[..., jax.Array], of: Apply = norm) -> Apply:
    """A linear layer that reads what `change` makes of the norm, or of its part `of` it."""
    return lambda p, x: dense(p, change(of(p, x)))


def joined(change: Callable[..., list[jax.Array]], of: Apply = norm, axis: int = -1) -> Apply:
    return read(lambda y: jnp.concatenate(change(y), axis), of)


def halves(y: jax.Array) -> list[jax.Array]:
    return jnp.split(y, 2, axis=-1)


def bias_of_a_part(p: Params, x: jax.Array) -> jax.Array:
    y = norm(p, x) @ p["w"]
    return jnp.concatenate([y[..., :3] + p["b"][:3], y[..., 3:]], -1)


ANOTHER = "`add` .* adds other parts or axes of what it scales"
JOINS = "joins what it scales with something"
NONE = "only a bias .* none is added .* kernel"
LEFT: dict[str, tuple[Apply, str]] = {
    "read by the residual": (
        lambda p, x: (y := norm(p, x)) + dense(p, y) @ p["w"].T,
        "`add` .* adds to what is scaled and",
    ),
    "returned": (lambda p, x: (plain(p, x), norm(p, x)), "what it scales is returned"),
    "a reader without bias": (
        lambda p, x: dense(p, y := norm(p, x)).sum(-1) + (y @ p["v"]).sum(-1),
        f"{NONE} `v`",
    ),
    "bias read twice": (
        lambda p, x: plain(p, x) + jnp.tanh(p["b"]),
        "`tanh` .* reads the parameter `b`, too",
    ),
    "kernel read twice": (
        lambda p, x: plain(p, x) + x @ p["w"],
        "`dot_general` .* reads the parameter `w`, too",
    ),
    "shift read twice": (lambda p, x: plain(p, x + p["c"]), "reads the parameter `c`, too"),
    "scale squared": (read(lambda y: y * y, scaled), "`mul` .* reads what it scales twice"),
    "nonlinear": (read(jnp.tanh), r"`tanh` \(test_affine.py:\d+\) reads what it scales"),
    "shift scaled by data": (
        lambda p, x: dense(p, norm(p, x) * x[..., :1]),
        "`mul` .* what is scaled and shifted",
    ),
    "bias of a scaled product": (lambda p, x: 2.0 * (norm(p, x) @ p["w"]) + p["b"], f"{NONE} `w`"),
    "bias per token": (
        lambda p, x: norm(p, x) @ p["w"] + p["tokens"],
        "`tokens` is no bias of the kernel `w`",
    ),
    "tokens mixed": (
        lambda p, x: jnp.einsum("btd,ts->bsd", norm(p, x), p["mix"]),
        "`dot_general` .* is scaled and shifted",
    ),
    "two shifts": (
        lambda p, x: dense(p, norm(p, x) + p["e"]),
        "`add` .* adds to what is scaled and shifted",
    ),
    "shift of data": (
        lambda p, x: dense(p, scaled(p, x) + x),
        "adds to it what is no parameter as it is stored",
    ),
    "features cut": (
        lambda p, x: norm(p, x)[..., :6] @ p["w"][:6] + p["b"],
        "`dot_general` .* reads a part of what it scales",
    ),
    "shift subtracted": (
        lambda p, x: dense(p, scaled(p, x) - p["c"]),
        "`sub` .* subtracts from what it scales",
    ),
    "negated": (read(lambda y: -y), "`neg` .* scales what is scaled and shifted"),
    "shifted twice": (
        lambda p, x: dense(p, norm(p, x) + norm(p, jnp.sin(x))),
        f"{ANOTHER}, or its",
    ),
    "turned sum": (
        read(lambda y: y + y.mT, lambda p, x: norm(p, x[:, :1] * x[:, :1].mT)),
        f"{ANOTHER}, or its",
    ),
    "bias of a part": (bias_of_a_part, f"{NONE} `w`"),
    "halves swapped": (joined(lambda y: halves(y)[::-1]), f"`concatenate` .* {JOINS}"),
    "halves added": (lambda p, x: sum(halves(norm(p, x))) @ p["w"][:6] + p["b"], ANOTHER),
    "one half twice": (joined(lambda y: halves(y)[:1] * 2), f"`concatenate` .* {JOINS}"),
    "every other": (
        joined(lambda y: [y[..., ::2], y[..., 1::2]]),
        "leaves out elements of it|`gather` .* reads what it scales",
    ),
    "one feature repeated": (
        lambda p, x: dense(p, scaled(p, x)[..., :1] * x),
        "`mul` .* repeats a part of it",
    ),
    "one feature added": (read(lambda y: y + y[..., :1], scaled), "`add` .* repeats a part of it"),
    "one feature broadcast": (
        read(lambda y: jnp.broadcast_to(y[..., :1], y.shape), scaled),
        "its axes are cut, repeated, merged",
    ),
    "one of the scale": (
        lambda p, x: dense(p, nn.standardize(x) * (jnp.ones(12) + p["g"][:1])),
        "`add` .* repeats a part of it",
    ),
    "padded": (read(lambda y: jnp.pad(y, [(0, 0), (0, 1), (0, 0)])), f"`pad` .* {JOINS} else"),
    "features padded": (
        read(lambda y: jnp.pad(y, [(0, 0), (0, 0), (1, 0)])[..., :-1], scaled),
        f"`pad` .* {JOINS} else",
    ),
    "joined with ones": (
        joined(lambda y: [jnp.ones((2, 1, 12)), y], scaled, axis=1),
        "`concatenate` .* joins what it scales with",
    ),
    "regrouped": (
        read(lambda y: y.reshape(2, 7, 3, 4).swapaxes(2, 3).reshape(2, 7, 12)),
        "its axes are cut, repeated, merged",
    ),
}


@pytest.mark.parametrize(("apply", "reason"), LEFT.values(), ids=LEFT)
def test_left(apply: Apply, reason: str) -> None:
    params, x = arrays(**MORE), stream()
    folded = fold_affine(apply, params, x)
    assert not folded.report.affine
    for key in ("g", "w", "b"):
        np.testing.assert_array_equal(folded.params[key], params[key])
    (left,) = folded.report.affine_left
    assert left.key_path == "g"
    assert re.search(reason, left.reason)
    assert f"Scale `g` stays: {left.reason}." in summary(folded.report)
    assert not jax_lnfold.analyze(apply, params, x).affine_left


def test_what_scales_no_data_is_no_scale() -> None:
    """Learned queries go through a linear layer, too."""

    def apply(p: Params, x: jax.Array) -> jax.Array:
        return nn.standardize(x) @ (p["g"] @ p["w"] + p["b"] + p["v"].T @ p["w"]).T

    params, x = arrays(), jnp.ones((2, 7, 5))
    report = jax_lnfold.analyze(apply, params, x, fold_affine=True)
    assert (report.affine, report.affine_left) == ((), ())


def test_a_line_for_each_reason() -> None:
    """What differs in numbers only has one line."""

    def apply(p: Any, x: jax.Array) -> jax.Array:
        for layer in p["layers"]:
            x = jnp.tanh(norm(layer, x)) @ layer["w"]
            x = (nn.standardize(x) * layer["h"]) * (x @ layer["v"])
        return x

    layer = arrays(w=(12, 12), v=(12, 12), h=(12,))
    params, x = {"layers": [layer] * 3}, jnp.ones((2, 7, 12))
    lines = summary(jax_lnfold.analyze(apply, params, x, fold_affine=True))
    (tanh,) = [line for line in lines if "`tanh`" in line]
    assert tanh.startswith("Scales `layers/{0-2}/g` stay: `tanh` (test_affine.py:")
    assert sum(line.startswith("Scale") for line in lines) == 3  # `h` of the last is returned


# --- scales that are stored as what is added to one ----------------------------------------------


def plus_one(p: Params, x: jax.Array) -> jax.Array:
    return dense(p, nn.standardize(x) * (1 + p["g"]) + p["c"])


PLUS_ONE: dict[str, tuple[Apply, bool]] = {
    "1 + s": (plus_one, True),
    "s + ones": (
        lambda p, x: dense(p, nn.standardize(x) * (p["g"].reshape(1, 12) + jnp.ones(12))),
        True,
    ),
    # As layers that share a norm
    "twice": (lambda p, x: plus_one(p, x) * plus_one(p, jnp.sin(x)), True),
    "s as well": (lambda p, x: dense(p, nn.standardize(x) * (1 + p["g"]) * p["g"]), False),
    "1 - s": (lambda p, x: dense(p, nn.standardize(x) * (1 - p["g"])), False),
    "2 + s": (lambda p, x: dense(p, nn.standardize(x) * (2 + p["g"])), False),
    "1 + 2 s": (lambda p, x: dense(p, nn.standardize(x) * (1 + 2 * p["g"])), False),
}


@pytest.mark.parametrize(("apply", "taken"), PLUS_ONE.values(), ids=PLUS_ONE)
def test_one_is_added(apply: Apply, taken: bool) -> None:
    params, x = arrays(), stream()
    folded = fold_affine(apply, params, x)
    plan = folded.plan
    assert FoldPlan.from_json(plan.to_json()) == plan
    assert [edit.one for edit in plan.affine] == [0] * taken
    assert [scale.key_path for scale in folded.report.affine_left] == ["g"] * (not taken)
    assert (folded.params["g"] == (0 if taken else params["g"])).all()
    if taken:  # nothing is left of it in the program
        added = [count_equations("add", f, params, x) for f in (apply, folded.apply)]
        assert added[1] < added[0]


def test_one_in_plan_files() -> None:
    """A version of its own, written where it is needed only."""
    params, x = arrays(), jnp.ones((2, 7, 12))
    texts = [
        jax_lnfold.plan_fold(apply, params, x, fold_affine=True).to_json()
        for apply in (plain, plus_one)
    ]
    three, four = map(json.loads, texts)
    assert (three["version"], four["version"]) == (3, 4)
    assert four["affine"][0].pop("one") == 0
    assert three == four | {"version": 3}
    with pytest.raises(PlanFormatError, match="KeyError: 'one'"):
        FoldPlan.from_json(json.dumps(four))
    for one in (2, -1, 0.0, True, None):
        four["affine"][0]["one"] = one
        with pytest.raises(PlanFormatError, match="does not stand for one in 'g'"):
            FoldPlan.from_json(json.dumps(four))


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("host", [False, True])
def test_one_is_added_before_rounding(dtype: Any, host: bool) -> None:
    """Also where the leaf holds less than half a unit of one."""
    params = {k: v.astype(dtype) for k, v in arrays().items()} | {"g": jnp.full(12, 1e-3, dtype)}
    plan = jax_lnfold.plan_fold(plus_one, params, jnp.ones((2, 7, 12), dtype), fold_affine=True)
    got = plan.center(jax.tree.map(np.asarray, params) if host else params)
    scale, kernel = (np.asarray(params[k], np.float64) for k in ("g", "w"))
    want = (1 + scale)[:, None] * kernel
    error = np.abs(np.asarray(got["w"], np.float64) - want) / np.abs(want)
    wide = jnp.float64 if host else jnp.promote_types(dtype, jnp.float32)
    assert error.max() <= float(jnp.finfo(dtype).eps) / 2 + float(jnp.finfo(wide).eps)


def trained(
    apply: Apply, folded: jax_lnfold.Folded, x: jax.Array, steps: int
) -> tuple[Any, optax.GradientTransformation]:
    """Parameters after some steps of Adam by the gradient of `apply`, and the optimiser."""
    tx = optax.chain(optax.adam(1e-2), jax_lnfold.center_updates(folded.plan))

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        grads = jax.grad(lambda p: (apply(p, x) ** 2).sum())(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, grads

    params, state = folded.params, tx.init(folded.params)
    for _ in range(steps):
        params, state, grads = step(params, state)
        if "g" in grads:  # the original's gradient moves the scale
            assert np.abs(grads["g"]).min() > 0
    assert relative_difference(params, folded.params) > 1e-3
    return params, tx


def test_training_keeps_what_one_is_added_to() -> None:
    params, x = arrays(), stream()
    folded = jax_lnfold.fold(plus_one, params, x, fold_affine=True)
    params, tx = trained(plus_one, folded, x, 3)
    np.testing.assert_array_equal(params["g"], 0)
    assert relative_difference(folded.apply(params, x), plus_one(params, x)) < 1e-12
    with pytest.raises(TreeError, match="'g' is not centered as the plan centers it"):
        tx.init(folded.params | {"g": jnp.ones(12)})


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
    assert {first.key_path, second.key_path} == {"params/layers/norm/scale", "params/last/scale"}
    (reader,) = next(e for e in folded.report.affine if "layers" in e.key_path).readers
    assert (reader.axes, reader.summed) == ((0, 1), (1,))


def test_bfloat16_rounds_once() -> None:
    wide, x = arrays(), stream(jnp.bfloat16)
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


def plan_data() -> dict[str, Any]:
    apply, params, x = stacked()
    return json.loads(jax_lnfold.plan_fold(apply, params, x, fold_affine=True).to_json())


@pytest.mark.parametrize("name", BROKEN)
def test_broken_plan_files(name: str) -> None:
    data = plan_data()
    BROKEN[name](data["affine"][0])
    with pytest.raises(PlanFormatError, match="text: broken plan"):
        FoldPlan.from_json(json.dumps(data))


@pytest.mark.parametrize("part", ["key_path", "shift"])
def test_what_is_taken_up_is_not_edited_besides(part: str) -> None:
    data = plan_data()
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
    params, _ = trained(folded.apply, folded, x, 5)
    assert relative_difference(folded.apply(params, x), apply(params, x)) < 1e-11


def test_another_trace() -> None:
    """A call that leaves out a reader is fine, one that reads the norm otherwise is not."""

    def apply(p: Params, x: jax.Array, how: jax.Array | None = None) -> jax.Array:
        if how is None:
            return two_readers(p, x)
        if how.ndim == 0:
            return plain(p, x).sum(-1)
        return two_readers(p, x) + norm(p, x).sum(-1)

    params, x = arrays(), stream()
    folded = fold_affine(apply, params, x)
    check_contracts(apply, params, folded, x, jnp.ones(()))
    with pytest.raises(PlanMismatchError, match="scale 'g', or what takes it up, is used in"):
        folded.apply(folded.params, x, jnp.ones(3))


OTHERWISE: dict[str, Callable[..., Any]] = {
    "the scale is returned": lambda p, x: p["g"],
    "the kernel is returned": lambda p, x: p["w"][1:],
    "the bias is returned": lambda p, x: (plus_one(p, x), p["b"]),
    "nothing is added": lambda p, x: plain(p, x),
    "no shift": lambda p, x: dense(p, nn.standardize(x) * (1 + p["g"])),
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_another_trace_that_sees_the_edit(name: str) -> None:
    def apply(p: Params, x: jax.Array) -> Any:
        return plus_one(p, x) if x.ndim == 3 else OTHERWISE[name](p, x)

    params, x = arrays(), stream()
    folded = fold_affine(apply, params, x)
    check_contracts(apply, params, folded, x[:1])
    with pytest.raises(PlanMismatchError, match="scale 'g', or what takes it up, is used in"):
        folded.apply(folded.params, x[0])
