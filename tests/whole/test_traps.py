"""Programs that look foldable and are not.

Every trap is built twice by the same function. With ``trap=True`` a naive folder, which centers
the parameters that write into a LayerNorm and drops its mean, returns wrong numbers: `Case.naive`
is that folder, spelled out. With ``trap=False`` one detail differs, the naive folder is right, and
`jax_lnfold.fold` has to fold.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.contracts import fold_checked, relative_difference
from tests.models.norm_spellings import layer_norm

Array = jax.Array
Params = dict[str, Array]
Norm = Callable[[Array], Array]

pytestmark = pytest.mark.usefixtures("explicit_ranks")

B, T, DIN, D, HID, OUT = 2, 5, 9, 12, 11, 7  # batch, tokens, and widths: all different
H, HD = 3, 4  # D = H * HD
EPS = 1e-5
WRONG = 1e-2  # a naive folder is off by at least this much, relative to the output
EXACT = 1e-12


class Case(NamedTuple):
    """A model, the naive ways to fold it, and what a sound folder does with it."""

    apply: Callable[..., Any]
    params: Any
    inputs: tuple[Any, ...]
    naive: tuple[Callable[..., Any], ...]
    folded: int
    inserted: int = 0


def make_params(**shapes: tuple[int, ...]) -> Params:
    """Random leaves whose means are far from zero, so that centering changes them."""
    rng = np.random.default_rng(sum(map(ord, "".join(shapes))))
    return {
        name: jnp.asarray(rng.normal(0.5, 1.0, shape) / (shape[0] if len(shape) > 1 else 1) ** 0.5)
        for name, shape in shapes.items()
    }


def make_input(*shape: int) -> Array:
    return jnp.asarray(np.random.default_rng(len(shape)).normal(0.3, 1.0, shape))


def centered(params: Params, *names: str) -> Params:
    """The naive edit: subtract the mean along the last axis from the leaves called `names`."""
    edits = {name: params[name] - params[name].mean(-1, keepdims=True) for name in names}
    return {**params, **edits}


def centering(apply: Callable[..., Any], *names: str, edit: Any = centered) -> Any:
    """The naive folder that centers these leaves and expects nobody to notice."""
    return lambda params, *inputs: apply(edit(params, *names), *inputs)


def grouped(params: Params, *names: str, groups: int = H) -> Params:
    """The naive edit per group of the last axis."""
    edits = {}
    for name in names:
        leaf = params[name].reshape(*params[name].shape[:-1], groups, -1)
        edits[name] = (leaf - leaf.mean(-1, keepdims=True)).reshape(params[name].shape)
    return {**params, **edits}


def rms_norm(x: Array) -> Array:
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + EPS)


def affine(x: Array, p: Params, name: str = "") -> Array:
    return x * p["g" + name] + p["c" + name]


def dense_params(**more: tuple[int, ...]) -> Params:
    """Writer ``w, b``, LayerNorm ``g, c`` and reader ``v`` of a one-norm model."""
    shapes = {"w": (DIN, D), "b": (1, 1, D), "g": (1, 1, D), "c": (1, 1, D), "v": (D, OUT)}
    return make_params(**shapes, **more)


def check(case: Case, trap: bool) -> None:
    want = case.apply(case.params, *case.inputs)
    for naive in case.naive:
        difference = relative_difference(naive(case.params, *case.inputs), want)
        assert difference > WRONG if trap else difference < EXACT
    assert trap or case.folded > 0
    report = fold_checked(case.apply, case.params, *case.inputs).report
    assert (report.n_folded, report.n_inserted) == (case.folded, case.inserted)
    assert sum(norm.folded for norm in report.norms) == case.folded
    assert (len(report.edits) > 0) == (case.folded > 0), "edits that serve no norm"
    for norm in report.norms:
        if not norm.folded:
            assert re.search(r"\w+\.py:\d+", norm.reason), f"no location in {norm.reason!r}"


trap_and_twin = pytest.mark.parametrize("trap", [True, False], ids=["trap", "twin"])


def renormed(model: Callable[..., Any], norm: Any, other: Any, edit: Any) -> tuple[Any, Any]:
    """A model, given its norm, and the naive folder, which edits leaves and takes another norm."""
    return (
        lambda p, *inputs: model(p, *inputs, norm),
        lambda p, *inputs: model(edit(p), *inputs, other),
    )


def without_means(params: Params) -> Params:
    return centered(params, "w", "b")


# --- who else reads the stream -------------------------------------------------------------------

READERS: dict[str, Callable[[Params, Array], Any]] = {
    "returned": lambda p, s: s,
    "returned in pieces": lambda p, s: jnp.split(s, (5,), axis=-1),
    "dense": lambda p, s: s @ p["u"],
    "rms norm": lambda p, s: rms_norm(s) @ p["u"],
    "l2 norm": lambda p, s: s / jnp.linalg.norm(s, axis=-1, keepdims=True),
    "gelu": lambda p, s: jax.nn.gelu(s),
    "clip": lambda p, s: jnp.clip(s, -1.0, 1.0),
    "threshold": lambda p, s: s > 0.1,
    "select on its sign": lambda p, s: jnp.where(s > 0, 1.0, 2.0),
    "cast to int": lambda p, s: (4 * s).astype(jnp.int32),
    "largest feature": lambda p, s: s.max(-1),
    "first feature": lambda p, s: s[..., 0],
    "sum of some features": lambda p, s: s[..., :5].sum(-1),
    "sum of all features": lambda p, s: s.sum(-1),
    "running sum of features": lambda p, s: jnp.cumsum(s, -1),
    "softmax over tokens": lambda p, s: jax.nn.softmax(s, axis=1),
    "layer norm over tokens": lambda p, s: layer_norm(s, 1),
    "batch norm": lambda p, s: (s - s.mean((0, 1), keepdims=True)) / s.std((0, 1), keepdims=True),
    "instance norm": lambda p, s: layer_norm(s, (1, 2)),
    "gain per feature, then a layer norm": lambda p, s: layer_norm(s * p["g"]),
    "square of one token, then a layer norm": lambda p, s: layer_norm(s.at[:, 1].apply(jnp.square)),
    "products of tokens": lambda p, s: jnp.einsum("btd,bsd->bts", s, s),
    "fourier transform": lambda p, s: jnp.fft.fft(s, axis=-1).real,
    "recurrence": lambda p, s: jax.lax.scan(
        lambda h, t: (jnp.tanh(h + t), h), jnp.zeros((B, D)), jnp.moveaxis(s, 1, 0)
    )[0],
    "branch condition": lambda p, s: jax.lax.cond(
        s.mean() > 0.1, lambda v: v, lambda v: -v, p["v"]
    ),
    "call to the host": lambda p, s: jax.pure_callback(
        np.tanh, jax.ShapeDtypeStruct(s.shape, s.dtype), s
    ),
}


@trap_and_twin
@pytest.mark.parametrize("reader", READERS)
def test_stream_has_another_reader(reader: str, trap: bool) -> None:
    """In the twin it reads what is behind the norm."""

    def apply(p: Params, x: Array) -> tuple[Array, Any]:
        stream = x @ p["w"] + p["b"]
        normed = affine(layer_norm(stream), p)
        return normed @ p["v"], READERS[reader](p, stream if trap else normed)

    params, inputs = dense_params(u=(D, OUT)), (make_input(B, T, DIN),)
    check(Case(apply, params, inputs, (centering(apply, "w", "b"),), not trap), trap)


# --- arithmetic that is almost a LayerNorm -------------------------------------------------------


def mean(x: Array) -> Array:
    return x.mean(-1, keepdims=True)


def var(x: Array) -> Array:
    return x.var(-1, keepdims=True)


def scaled(x: Array, variance: Array) -> Array:
    return x * jax.lax.rsqrt(variance + EPS)


# name: (the trap, its twin); the input has as many tokens as features where axes are confused
NEARLY: dict[str, tuple[Norm, Norm]] = {
    "mean with the wrong count": (
        lambda x: scaled(x - x.sum(-1, keepdims=True) / (D - 1), var(x)),
        lambda x: scaled(x - x.sum(-1, keepdims=True) / D, var(x)),
    ),
    "mean with a rounded factor": (
        lambda x: scaled(x - x.sum(-1, keepdims=True) * 0.08, var(x)),
        lambda x: scaled(x - x.sum(-1, keepdims=True) * (1 / D), var(x)),
    ),
    "mean with a guarded count": (
        lambda x: scaled(x - x.sum(-1, keepdims=True) / (D + 0.5), var(x)),
        lambda x: scaled(x - x.sum(-1, keepdims=True) / (D + 0.0), var(x)),
    ),
    "part of the mean": (
        lambda x: scaled(x - 0.9 * mean(x), var(x)),
        lambda x: scaled(x - 1.0 * mean(x), var(x)),
    ),
    "mean added": (lambda x: scaled(x + mean(x), var(x)), lambda x: scaled(x - mean(x), var(x))),
    "mean added back": (
        lambda x: scaled(x - mean(x), var(x)) + mean(x),
        lambda x: scaled(x - mean(x), var(x)) + var(x),
    ),
    "mean of another axis": (
        lambda x: scaled(x - x.mean(1, keepdims=True), var(x)),
        lambda x: scaled(x - x.mean(2, keepdims=True), var(x)),
    ),
    "mean of another axis as well": (
        lambda x: scaled(x - x.mean((1, 2), keepdims=True), var(x)),
        lambda x: scaled(x - x.mean((2,), keepdims=True), var(x)),
    ),
    "mean of another token": (
        lambda x: scaled(x - mean(jnp.flip(x, 1)), var(x)),
        lambda x: (lambda y: scaled(y - mean(y), var(y)))(jnp.flip(x, 1)),
    ),
    "mean of magnitudes": (
        lambda x: scaled(x - mean(jnp.abs(x)), var(x)),
        lambda x: scaled(x - mean(x), var(x)),
    ),
    "mean of clipped features": (
        lambda x: scaled(x - mean(jnp.maximum(x, 0.0)), var(x)),
        lambda x: scaled(x - mean(x), jnp.maximum(var(x), 0.0)),
    ),
    "mean along the other of two equal axes": (
        lambda x: scaled(x - x.mean(2)[:, None, :], var(x)),
        lambda x: scaled(x - x.mean(2)[:, :, None], var(x)),
    ),
    "variance without centering": (
        lambda x: scaled(x, var(x)),
        lambda x: scaled(x - mean(x), var(x)),
    ),
    "raw second moment": (
        lambda x: scaled(x - mean(x), mean(x * x)),
        lambda x: scaled(x - mean(x), mean(x * x) - mean(x) ** 2),
    ),
    "raw second moment of some weight": (
        lambda x: scaled(x - mean(x), var(x) + 0.1 * mean(x * x)),
        lambda x: scaled(x - mean(x), var(x) + 0.1 * (mean(x * x) - mean(x) * mean(x))),
    ),
    "part of the squared mean": (
        lambda x: scaled(x - mean(x), mean(x * x) - 0.5 * mean(x) ** 2),
        lambda x: scaled(x - mean(x), mean(x * x) - 1.0 * mean(x) ** 2),
    ),
    "squared mean of another token": (
        lambda x: scaled(x - mean(x), mean(x * x) + D - mean(x) * mean(jnp.flip(x, 1))),
        lambda x: scaled(x - mean(x), mean(x * x) + D - mean(x) * mean(x)),
    ),
    "spread relative to the mean": (
        lambda x: scaled(x - mean(x), var(x) / mean(x) ** 2),
        lambda x: scaled(x - mean(x), var(x) / var(x) ** 2),
    ),
}


@trap_and_twin
@pytest.mark.parametrize("name", NEARLY)
def test_nearly_a_layer_norm(name: str, trap: bool) -> None:
    norm = NEARLY[name][0 if trap else 1]

    def apply(p: Params, x: Array) -> Array:
        return affine(norm(x @ p["w"] + p["b"]), p) @ p["v"]

    tokens = D if "equal axes" in name else T
    inputs = (make_input(B, tokens, DIN),)
    check(Case(apply, dense_params(), inputs, (centering(apply, "w", "b"),), not trap), trap)


# --- programs ------------------------------------------------------------------------------------


def residual(p: Params, stream: Array, normed: Array) -> Array:
    return stream + jax.nn.gelu(normed @ p["m1"]) @ p["m2"]


def patch_merging(trap: bool) -> Case:
    """Swin: the norm after merging spans four tokens, each with a mean of its own."""
    channels, out = 4, 6

    def apply(p: Params, x: Array) -> Array:
        s = x @ p["w"] + p["b"]
        s = residual(p, s, layer_norm(s))
        s = s.reshape(B, 2, 2, 3, 2, channels).transpose(0, 1, 3, 2, 4, 5)
        s = layer_norm(s.reshape(B, 2, 3, 4 * channels) if trap else s)
        return s.reshape(B, 2, 3, 4 * channels) @ p["v"]

    params = make_params(
        w=(DIN, channels),
        b=(1, 1, 1, channels),
        m1=(channels, HID),
        m2=(HID, channels),
        v=(4 * channels, out),
    )
    naive = centering(apply, "w", "b", "m2")
    return Case(apply, params, (make_input(B, 4, 6, DIN),), (naive,), 0 if trap else 2)


def tied_table(blocks: int) -> Callable[[bool], Case]:
    """GPT-2: the logits read the embedding table."""

    def build(trap: bool) -> Case:
        def apply(p: Params, ids: Array) -> Array:
            s = p["table"][ids] + p["pos"]
            for _ in range(blocks):
                s = residual(p, s, layer_norm(s))
            return affine(layer_norm(s), p) @ (p["table"].T if trap else p["head"])

        params = make_params(
            table=(OUT, D),
            pos=(1, T, D),
            m1=(D, HID),
            m2=(HID, D),
            g=(1, 1, D),
            c=(1, 1, D),
            head=(D, OUT),
        )
        ids = jnp.asarray([[1, 0, 3, 3, 6], [2, 5, 4, 1, 0]])
        naive = centering(apply, "table", "pos", "m2")
        # one centering of the looked-up rows costs as much as the means of two norms
        worth = blocks + 1 > 2
        folded = blocks + 1 if worth or not trap else 0
        return Case(apply, params, (ids,), (naive,), folded, int(trap and worth))

    return build


def post_norm(trap: bool) -> Case:
    """BERT: the residual carries a LayerNorm's scale and bias, whose mean differs per token."""

    def model(p: Params, x: Array, norm: Norm) -> Array:
        h = norm(x @ p["w"] + p["b"])
        h = affine(h, p) if trap else h
        return norm(residual(p, h, h)) @ p["v"]

    apply, naive = renormed(model, layer_norm, rms_norm, lambda p: centered(p, "w", "b", "m2"))
    params = dense_params(m1=(D, HID), m2=(HID, D))
    return Case(apply, params, (make_input(B, T, DIN),), (naive,), 1 if trap else 2)


def factor_on_residual(shape: tuple[int, ...]) -> Callable[[bool], Case]:
    """DiT: a factor on the residual branch that varies along the features, and with the data."""

    def build(trap: bool) -> Case:
        def apply(p: Params, x: Array, factor: Array) -> Array:
            s = x @ p["w"] + p["b"]
            s = s + factor * (jax.nn.gelu(layer_norm(s) @ p["m1"]) @ p["m2"])
            return affine(layer_norm(s), p) @ p["v"]

        params = dense_params(m1=(D, HID), m2=(HID, D))
        inputs = (make_input(B, T, DIN), make_input(*(shape if trap else (*shape[:-1], 1))))
        naive = centering(apply, "w", "b", "m2")
        return Case(apply, params, inputs, (naive,), 1 if trap else 2)

    return build


def gate_from_condition(trap: bool) -> Case:
    """DiT: the gate is computed from a conditioning vector."""

    def apply(p: Params, x: Array, condition: Array) -> Array:
        gate = (condition @ p["gate"])[:, None, :]
        s = x @ p["w"] + p["b"]
        s = s + gate * (jax.nn.gelu(layer_norm(s) @ p["m1"]) @ p["m2"])
        return affine(layer_norm(s), p) @ p["v"]

    params = dense_params(m1=(D, HID), m2=(HID, D), gate=(HID, D if trap else 1))
    inputs = (make_input(B, T, DIN), make_input(B, HID))
    return Case(apply, params, inputs, (centering(apply, "w", "b", "m2"),), 1 if trap else 2)


def select_features(trap: bool) -> Case:
    """A choice between two writers, made per feature; the twin chooses per token."""

    def apply(p: Params, x: Array, choice: Array) -> Array:
        return affine(layer_norm(jnp.where(choice, x @ p["w"], x @ p["w2"])), p) @ p["v"]

    inputs = (make_input(B, T, DIN), make_input(B, T, D if trap else 1) > 0.3)
    return Case(apply, dense_params(w2=(DIN, D)), inputs, (centering(apply, "w", "w2"),), not trap)


def joined_features(trap: bool) -> Case:
    """Two writers side by side: their joint mean is not the mean of either."""

    def apply(p: Params, x: Array) -> Array:
        left, right = x @ p["w"] + p["b"], x @ p["w2"]
        if trap:
            return affine(layer_norm(jnp.concatenate([left, right], -1)), p) @ p["v"]
        s = jnp.concatenate([layer_norm(left), layer_norm(right)], -1)
        return affine(s, p) @ p["v"]

    wide = D + HID
    params = make_params(
        w=(DIN, D), b=(1, 1, D), w2=(DIN, HID), g=(1, 1, wide), c=(1, 1, wide), v=(wide, OUT)
    )
    naive = centering(apply, "w", "b", "w2")
    return Case(apply, params, (make_input(B, T, DIN),), (naive,), 0 if trap else 2)


def overlapping_slices(trap: bool) -> Case:
    """A norm over some columns of a projection, and a nonlinearity over others that overlap."""
    split = 8

    def apply(p: Params, x: Array) -> tuple[Array, Array]:
        s = x @ p["w"] + p["b"]
        rest = s[..., split - 2 if trap else split :]
        return layer_norm(s[..., :split]) @ p["v"][:split], jax.nn.gelu(rest)

    def naive(p: Params, x: Array) -> tuple[Array, Array]:
        parts = {name: p[name][..., :split] for name in "wb"}
        edits = {name: p[name].at[..., :split].set(centered(parts, name)[name]) for name in parts}
        return apply({**p, **edits}, x)

    return Case(apply, dense_params(), (make_input(B, T, DIN),), (naive,), 0 if trap else 1)


def regrouped_tokens(width: int) -> Callable[[bool], Case]:
    """A reshape that makes groups which cross tokens; the twin's groups divide a token."""

    def build(trap: bool) -> Case:
        tokens, group = 4, width if trap else HD

        def apply(p: Params, x: Array) -> Array:
            s = (x @ p["w"] + p["b"]).reshape(B, -1, group)
            return layer_norm(s).reshape(B, tokens, D) @ p["v"]

        split = centering(apply, "w", "b", edit=grouped)
        naive = (centering(apply, "w", "b"), split) if trap else (split,)
        return Case(apply, dense_params(), (make_input(B, tokens, DIN),), naive, not trap)

    return build


def grouped_convolution(trap: bool) -> Case:
    """The output features of different groups read different inputs: only a group has a mean."""

    def apply(p: Params, x: Array) -> Array:
        s = jax.lax.conv_general_dilated(
            x, p["kernel"], (1,), "SAME", dimension_numbers=("NTC", "TIO", "NTC"),
            feature_group_count=H,
        )  # fmt: skip
        s = s + p["b"]
        s = layer_norm(s) if trap else layer_norm(s.reshape(B, T, H, HD)).reshape(B, T, D)
        return affine(s, p) @ p["v"]

    per_group = centering(apply, "kernel", "b", edit=grouped)
    params = dense_params(kernel=(3, DIN // H, D))
    naive = (per_group, centering(apply, "kernel", "b")) if trap else (per_group,)
    return Case(apply, params, (make_input(B, T, DIN),), naive, not trap)


def depthwise_convolution(trap: bool) -> Case:
    """ConvNeXt: with one channel per group nothing is left to center."""

    def apply(p: Params, x: Array) -> Array:
        s = jax.lax.conv_general_dilated(
            x, p["kernel"], (1,), "SAME", dimension_numbers=("NTC", "TIO", "NTC"),
            feature_group_count=D if trap else 1,
        )  # fmt: skip
        return affine(layer_norm(s + p["b"]), p) @ p["v"]

    params = dense_params(kernel=(3, 1 if trap else D, D))
    naive = centering(apply, "kernel", "b")
    return Case(apply, params, (make_input(B, T, D),), (naive,), not trap)


def depthwise_reader(trap: bool) -> Case:
    """A depthwise convolution turns a shift common to all channels into one per channel."""

    def apply(p: Params, x: Array) -> Array:
        s = x @ p["w"] + p["b"]
        normed = layer_norm(s)
        mixed = jax.lax.conv_general_dilated(
            s if trap else normed, p["kernel"], (1,), "SAME",
            dimension_numbers=("NTC", "TIO", "NTC"), feature_group_count=D,
        )  # fmt: skip
        return affine(mixed + normed, p) @ p["v"]

    params = dense_params(kernel=(3, 1, D))
    return Case(apply, params, (make_input(B, T, DIN),), (centering(apply, "w", "b"),), not trap)


def group_norm(trap: bool) -> Case:
    """GroupNorm: the mean spans the positions, so a position may have a mean of its own."""

    def apply(p: Params, x: Array) -> Array:
        s = (x @ p["w"] + p["b"][None]).reshape(B, 3, 5, H, HD)
        s = layer_norm(s, (1, 2, 4) if trap else 4)
        return affine(s.reshape(B, 15, D), p) @ p["v"]

    per_group = centering(apply, "w", "b", edit=grouped)
    return Case(apply, dense_params(), (make_input(B, 3, 5, DIN),), (per_group,), not trap)


def attention_output(trap: bool) -> Case:
    """A joint norm of all heads: attention mixes each head's values with weights of its own."""

    def apply(p: Params, x: Array) -> Array:
        q, k, v = ((x @ p[name]).reshape(B, T, H, HD) for name in ("wq", "wk", "w"))
        weights = jax.nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k))
        mixed = jnp.einsum("bhts,bshd->bthd", weights, v)
        s = layer_norm(mixed, (2, 3) if trap else 3)
        return affine(s.reshape(B, T, D), p) @ p["v"]

    per_head = centering(apply, "w", edit=grouped)
    params = dense_params(wq=(DIN, D), wk=(DIN, D))
    naive = (per_head, centering(apply, "w")) if trap else (per_head,)
    return Case(apply, params, (make_input(B, T, DIN),), naive, not trap)


def masked_norm(trap: bool) -> Case:
    """Flax: with a mask over the features the mean that is removed is not the whole mean."""
    mask = jnp.arange(D)[None, None] < 7 if trap else None

    def model(p: Params, x: Array, norm: nn.Module) -> Array:
        return affine(norm.apply({}, x @ p["w"] + p["b"], mask=mask), p) @ p["v"]

    layer_norm, rms_norm = (
        nn.LayerNorm(use_scale=False, use_bias=False),
        nn.RMSNorm(use_scale=False),
    )
    apply, naive = renormed(model, layer_norm, rms_norm, without_means)
    return Case(apply, dense_params(), (make_input(B, T, DIN),), (naive,), not trap)


def other_center(center: Norm) -> Callable[[bool], Case]:
    """A norm around another center: shifts do not matter, yet the center is not zero."""

    def build(trap: bool) -> Case:
        def model(p: Params, x: Array, center: Norm) -> Array:
            s = x @ p["w"] + p["b"]
            return affine(rms_norm(s - center(s)), p) @ p["v"]

        apply, naive = renormed(model, center if trap else mean, jnp.zeros_like, without_means)
        return Case(apply, dense_params(), (make_input(B, T, DIN),), (naive,), not trap)

    return build


def shared_writer(trap: bool) -> Case:
    """A module called twice: a leaf can be edited only if all of its uses agree."""

    def apply(p: Params, x: Array, y: Array) -> tuple[Array, Array]:
        first, second = (z @ p["w"] + p["b"] for z in (x, y))
        return layer_norm(first) @ p["v"], jax.nn.gelu(second) if trap else layer_norm(second)

    inputs = (make_input(B, T, DIN), make_input(B, 1, DIN))
    return Case(apply, dense_params(), inputs, (centering(apply, "w", "b"),), 0 if trap else 2)


def statistic_returned(trap: bool) -> Case:
    """The mean that the norm subtracts is also an output; the twin returns the variance."""

    def apply(p: Params, x: Array) -> tuple[Array, Array]:
        s = x @ p["w"] + p["b"]
        m = mean(s)
        v = mean((s - m) ** 2)
        return scaled(s - m, v) @ p["v"], m if trap else v

    inputs = (make_input(B, T, DIN),)
    return Case(apply, dense_params(), inputs, (centering(apply, "w", "b"),), not trap)


def mean_of_other_writer(trap: bool) -> Case:
    """The mean of one projection is subtracted from another one by the same weights."""

    def apply(p: Params, x: Array, y: Array) -> Array:
        s, other = x @ p["w"] + p["b"], y @ p["w"] + p["b"]
        return affine(scaled(s - mean(other if trap else s), var(s)), p) @ p["v"]

    inputs = (make_input(B, T, DIN), make_input(B, T, DIN) ** 2)
    return Case(apply, dense_params(), inputs, (centering(apply, "w", "b"),), not trap)


PROGRAMS: dict[str, Callable[[bool], Case]] = {
    "patch merging": patch_merging,
    "tied table, worth one centering": tied_table(blocks=2),
    "tied table, not worth one": tied_table(blocks=0),
    "post-norm residual": post_norm,
    "gate per feature": factor_on_residual((B, 1, D)),
    "gate per feature for the whole batch": factor_on_residual((1, 1, D)),
    "dropout mask per feature": factor_on_residual((B, T, D)),
    "gate from a condition": gate_from_condition,
    "selection per feature": select_features,
    "features of two writers": joined_features,
    "overlapping columns": overlapping_slices,
    "group of two tokens": regrouped_tokens(2 * D),
    "group across two tokens": regrouped_tokens(8),
    "grouped convolution": grouped_convolution,
    "depthwise convolution": depthwise_convolution,
    "depthwise convolution as a reader": depthwise_reader,
    "group norm": group_norm,
    "norm of all heads": attention_output,
    "masked norm": masked_norm,
    "mean where a mask says": other_center(
        lambda x: x.mean(-1, keepdims=True, where=jnp.arange(D)[None, None] < 7)
    ),
    "mean of some features": other_center(lambda x: mean(x[..., :-3])),
    "weighted mean": other_center(lambda x: x @ jax.nn.softmax(jnp.linspace(0.0, 2.0, D))[:, None]),
    "first feature as the center": other_center(lambda x: x[..., :1]),
    "median as the center": other_center(lambda x: jnp.median(x, -1, keepdims=True)),
    "maximum as the center": other_center(lambda x: x.max(-1, keepdims=True)),
    "shared writer": shared_writer,
    "statistic returned": statistic_returned,
    "mean of another writer": mean_of_other_writer,
}


@trap_and_twin
@pytest.mark.parametrize("name", PROGRAMS)
def test_program_is_not_folded_naively(name: str, trap: bool) -> None:
    check(PROGRAMS[name](trap), trap)


# --- a folder may do better than nothing here, but not what the naive one does --------------------


def either(model: Callable[..., Any], norm: Norm, *more: Array, **options: Any) -> Case:
    apply, naive = renormed(model, norm, rms_norm, options.get("edit", without_means))
    inputs = (make_input(B, T, DIN), *more)
    return Case(apply, dense_params(), inputs, (naive,), options.get("folded", 1))


def one_norm(p: Params, x: Array, norm: Norm) -> Array:
    return affine(norm(x @ p["w"] + p["b"]), p) @ p["v"]


def offset_per_token() -> Case:
    """A summand that is the same for all features of a token cannot be centered, only dropped."""

    def model(p: Params, x: Array, offset: Array, norm: Norm) -> Array:
        return affine(norm(x @ p["w"] + p["b"] + offset), p) @ p["v"]

    return either(model, layer_norm, make_input(B, T, 1))


def offset_after_the_mean() -> Case:
    """``x + 0.5 - mean(x)`` ignores shifts of ``x``, and still is not centered."""
    return either(one_norm, lambda s: scaled(s + 0.5 - mean(s), var(s)))


def norms_of_nested_groups() -> Case:
    """A norm over all features and one per head: only the coarser centering suits both."""

    def model(p: Params, x: Array, norm: Norm) -> tuple[Array, Array]:
        s = x @ p["w"] + p["b"]
        return norm(s) @ p["v"], norm(s.reshape(B, T, H, HD))

    return either(model, layer_norm, edit=lambda p: grouped(p, "w", "b"))


def variance_of_another_token() -> Case:
    """The variance ignores shifts of whichever token it is taken from."""
    return either(one_norm, lambda s: scaled(s - mean(s), var(jnp.flip(s, 1))), folded=2)


def quantised_kernel() -> Case:
    """Integers have no room for a mean: the centered kernel cannot be stored."""

    def apply(p: Params, x: Array) -> Array:
        return affine(layer_norm(x @ (p["q"].astype(x.dtype) * 0.01) + p["b"]), p) @ p["v"]

    def naive(p: Params, x: Array) -> Array:
        q = p["q"] - p["q"].mean(-1, keepdims=True)
        return apply({**centered(p, "b"), "q": q.astype(jnp.int8) // 2 * 2}, x)

    q = jnp.asarray(np.random.default_rng(7).integers(-9, 12, (DIN, D)), jnp.int8)
    return Case(apply, {**dense_params(), "q": q}, (make_input(B, T, DIN),), (naive,), 1)


def mask_that_is_undone() -> Case:
    """A mask so low that it takes up every shift, until something as large is added."""
    keep = jnp.broadcast_to(jnp.arange(D) % 3 > 0, (B, T, D))

    def apply(p: Params, x: Array) -> tuple[Array, Array]:
        s = x @ p["w"] + p["b"]
        kept = jnp.where(keep, s, -1e30) + jnp.where(keep, 0, 1e30)
        return layer_norm(s), layer_norm(kept)

    def naive(p: Params, x: Array) -> tuple[Array, Array]:
        return apply(centered(p, "w", "b"), x)

    return Case(apply, dense_params(), (make_input(B, T, DIN),), (naive,), 0)


EITHER_WAY: tuple[Callable[[], Case], ...] = (
    mask_that_is_undone,
    offset_per_token,
    offset_after_the_mean,
    norms_of_nested_groups,
    variance_of_another_token,
    quantised_kernel,
)


@pytest.mark.parametrize("build", EITHER_WAY, ids=lambda build: build.__name__)
def test_sound_with_or_without_a_fold(build: Callable[[], Case]) -> None:
    case = build()
    want = case.apply(case.params, *case.inputs)
    assert relative_difference(case.naive[0](case.params, *case.inputs), want) > WRONG
    report = fold_checked(case.apply, case.params, *case.inputs).report
    assert report.n_folded <= case.folded
