"""In bfloat16 and float16 a folded model is no less accurate than the original one.

Both are measured against the original program in float64, on the very numbers that the original
parameters hold. Errors are root mean squares over all logits (a maximum is one of a thousand
numbers and swings three times as much), compared by their median over the seeds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_lnfold

Array = jax.Array
Params = dict[str, Any]

LAYERS, HEADS, HEAD_DIM, HIDDEN, DIN, CLASSES = 4, 3, 16, 80, 20, 29
D = HEADS * HEAD_DIM
BATCH, TOKENS = 3, 10
FEW, SEEDS, CLOSE = 8, 32, 96  # how many seeds, by how close the claim is
LARGEST = float(np.finfo(np.float16).max)
LOW = pytest.mark.parametrize("low", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])


def layer_norm(x: Array, dtype: Any, one_pass: bool = False) -> Array:
    """Without scale and bias, statistics and result in `dtype`."""
    x = x.astype(dtype)
    mean = jnp.mean(x, -1, keepdims=True)
    if one_pass:
        variance = jnp.maximum(jnp.mean(x * x, -1, keepdims=True) - mean * mean, 0)
    else:
        variance = jnp.mean(jnp.square(x - mean), -1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + 1e-5)


@dataclass(frozen=True)
class Transformer:
    """Pre-LN, on patches or, with a `tied` head, on tokens; `low` is the dtype it computes in."""

    low: Any
    low_statistics: bool = False
    wide_stream: bool = False
    one_pass: bool = True
    qk_norm: bool = False
    layer_scale: bool = False
    tied: bool = False
    scanned: bool = True

    @property
    def wide(self) -> Any:
        return jnp.promote_types(self.low, jnp.float32)

    def norm(self, x: Array, g: Array, c: Array) -> Array:
        dtype = self.low if self.low_statistics else self.wide
        y = layer_norm(x, dtype, self.one_pass)
        return (y * g.astype(dtype) + c.astype(dtype)).astype(self.low)

    def dense(self, x: Array, w: Array, b: Array) -> Array:
        return x @ w.astype(self.low) + b.astype(self.low)

    def attention(self, h: Array, p: Params) -> Array:
        qkv = self.dense(h, p["qkv"], p["qkv_b"]).reshape(*h.shape[:2], 3, HEADS, HEAD_DIM)
        q, k, v = (qkv[:, :, i] for i in range(3))
        if self.qk_norm:
            q, k = self.norm(q, p["gq"], p["cq"]), self.norm(k, p["gk"], p["ck"])
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k).astype(self.wide) * HEAD_DIM**-0.5
        y = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits).astype(self.low), v)
        return self.dense(y.reshape(h.shape), p["out"], p["out_b"])

    def mlp(self, h: Array, p: Params) -> Array:
        h = jax.nn.gelu(self.dense(h, p["fc1"], p["fc1_b"]))
        return self.dense(h, p["fc2"], p["fc2_b"])

    def block(self, x: Array, p: Params) -> Array:
        for layer, g, c, s in ((self.attention, "g1", "c1", "s1"), (self.mlp, "g2", "c2", "s2")):
            y = layer(self.norm(x, p[g], p[c]), p)
            x = x + (y * p[s].astype(self.low) if self.layer_scale else y)
        return x

    def __call__(self, p: Params, x: Array) -> Array:
        if self.tied:
            x = p["table"].astype(self.low)[x]
        else:
            x = self.dense(x.astype(self.low), p["patch"], p["patch_b"])
        x = x + p["positions"].astype(self.low)
        x = x.astype(self.wide) if self.wide_stream else x
        if self.scanned:
            x, _ = jax.lax.scan(lambda x, q: (self.block(x, q), None), x, p["blocks"])
        else:
            for i in range(LAYERS):
                x = self.block(x, {name: leaf[i] for name, leaf in p["blocks"].items()})
        x = self.norm(x, p["g"], p["c"])
        if self.tied:
            return x @ p["table"].astype(self.low).T
        return self.dense(x, p["head"], p["head_b"])

    def draw(self, seed: int, mean: float = 0.0, outlier: float = 0.0) -> tuple[Params, Array]:
        """Parameters and an input; the stream starts at `mean`, with an `outlier` channel."""
        rng = np.random.default_rng(seed)

        def kernel(*shape: int) -> np.ndarray:
            return rng.normal(0, shape[-2] ** -0.5, shape)

        def around(value: float, *shape: int) -> np.ndarray:
            return value + 0.2 * rng.normal(size=shape)

        inner = {"qkv": 3 * D, "out": D, "fc1": HIDDEN, "fc2": D}
        p: Params = {f"{name}_b": around(0, LAYERS, n) for name, n in inner.items()}
        p |= {name: kernel(LAYERS, HIDDEN if name == "fc2" else D, n) for name, n in inner.items()}
        p |= {name: around(1, LAYERS, D) for name in ("g1", "g2", "s1", "s2")}
        p |= {name: around(0, LAYERS, D) for name in ("c1", "c2")}
        p |= {name: around("g" in name, LAYERS, HEAD_DIM) for name in ("gq", "gk", "cq", "ck")}
        p = {"blocks": p, "g": around(1, D), "c": around(0, D)}
        p |= {"patch": kernel(DIN, D), "patch_b": around(0, D)}
        p |= {"head": kernel(D, CLASSES), "head_b": around(0, CLASSES)}
        p |= {"table": rng.normal(size=(CLASSES, D)), "positions": rng.normal(size=(TOKENS, D))}
        p["positions"] += mean + outlier * (np.arange(D) == 3)
        if self.tied:
            return p, jnp.asarray(rng.integers(CLASSES, size=(BATCH, TOKENS)))
        return p, jnp.asarray(rng.normal(size=(BATCH, TOKENS, DIN)), self.low)


@partial(jax.jit, static_argnums=1)
def cast(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), tree)


# Every operation rounds to its dtype: what excess precision hides differs from program to program.
STRICT = {"xla_allow_excess_precision": False}
compiled = cache(partial(jax.jit, compiler_options=STRICT))


def error(got: Array, want: Array) -> float:
    assert got.shape == want.shape
    return float(np.sqrt(np.mean((np.asarray(got, np.float64) - np.asarray(want)) ** 2)))


@cache
def fold(model: Transformer, dtype: Any) -> tuple[jax_lnfold.Folded, Callable[..., Array]]:
    params, x = model.draw(0)
    folded = jax_lnfold.fold(model, cast(params, dtype), x)
    return folded, jax.jit(folded.apply, compiler_options=STRICT)


def measure(
    model: Transformer,
    dtype: Any,
    folds: tuple[int, int],
    seeds: int = SEEDS,
    cast_last: bool = False,
    **draw: float,
) -> tuple[float, float]:
    """Errors of the folded model over those of the original, and these over the logits' size.

    The parameters are of `dtype`; with `cast_last` they are folded in float32 and cast to it then.
    `folds` counts the LayerNorms folded and the explicit centerings inserted.
    """
    given, errors = jnp.float32 if cast_last else dtype, []
    folded, apply = fold(model, given)
    assert (folded.report.n_folded, folded.report.n_inserted) == folds
    assert len(folded.report.norms) == folds[0]
    exact, original = compiled(replace(model, low=jnp.float64)), compiled(model)
    for seed in range(seeds):
        params, x = model.draw(seed, **draw)
        params = cast(params, given)
        want = exact(cast(params, jnp.float64), x if model.tied else x.astype(jnp.float64))
        edited = cast(folded.plan.center(params), dtype)
        outputs = original(cast(params, dtype), x), apply(edited, x), 0 * want
        assert outputs[0].dtype == outputs[1].dtype == model.low
        errors.append([error(y, want) for y in outputs])
    unfolded, after, size = np.array(errors).T
    return float(np.median(after / unfolded)), float(np.median(unfolded / size))


# One block is scanned: its norms count once. Fused q and k of a block bring one norm each.
STREAM, QK, TIED, UNROLLED = (3, 0), (5, 0), (3, 1), (2 * LAYERS + 1, 0)
# Options, whether the parameters are float32, and what folds.
MODELS: dict[str, tuple[dict[str, bool], bool, tuple[int, int]]] = {
    "vit": ({}, False, STREAM),
    "unrolled, float32 parameters": ({"scanned": False, "one_pass": False}, True, UNROLLED),
    "low statistics": ({"low_statistics": True}, False, STREAM),
    "float32 stream": ({"wide_stream": True}, False, STREAM),
    "qk-norm, layer scale": ({"qk_norm": True, "layer_scale": True}, False, QK),
    "tied": ({"tied": True}, False, TIED),
    "tied, float32 parameters": ({"tied": True, "one_pass": False}, True, TIED),
}


@LOW
@pytest.mark.parametrize("name", MODELS)
def test_error_is_not_larger(name: str, low: Any) -> None:
    options, wide_params, folds = MODELS[name]
    dtype, seeds = jnp.float32 if wide_params else low, CLOSE if "wide_stream" in options else SEEDS
    ratio, original = measure(Transformer(low, **options), dtype, folds, seeds)
    assert 0.1 < original / float(jnp.finfo(low).eps) < 10
    assert ratio < 1.1


@LOW
def test_fold_then_cast(low: Any) -> None:
    """Centered parameters lose no more than the original ones by a cast that storage asks for."""
    ratio, original = measure(Transformer(jnp.float32), low, STREAM, cast_last=True)
    assert 0.1 < original / float(jnp.finfo(low).eps) < 10
    assert ratio < 1.1


@LOW
def test_fold_after_the_cast(low: Any) -> None:
    """Computing in float32 does not round weights again, folding does: so it is reported.

    Measured against the weights before the cast, that is a sixth more than the cast itself.
    """
    model = Transformer(jnp.float32)
    folded, apply = fold(model, low)
    assert {*folded.report.rounded} == {edit.key_path for edit in folded.report.edits}
    assert "Fold before you cast" in " ".join(str(folded.report).split())
    for other in (fold(Transformer(low), low), fold(model, jnp.float32)):
        assert other[0].report.rounded == ()
    ratios = []
    for seed in range(SEEDS):
        params, x = model.draw(seed)
        want = compiled(replace(model, low=jnp.float64))(cast(params, jnp.float64), x)
        stored = cast(params, low)
        after = error(apply(folded.plan.center(stored), x), want)
        ratios.append(after / error(compiled(model)(stored, x), want))
    assert 1 < np.median(ratios) < 1.25


@LOW
def test_outlier_channel(low: Any) -> None:
    """A channel of 10 times the size of the others shifts these by less than their spread."""
    ratio, _ = measure(Transformer(low), low, STREAM, outlier=10.0)
    assert ratio < 1.1


# The mean is 30 times the spread: the stream need not hold it any more, nor the statistics take
# the difference of two squares of 900.
LARGE_MEAN: dict[str, tuple[dict[str, bool], tuple[int, int], float]] = {
    "low stream": ({}, STREAM, 0.2),
    "float32 stream": ({"wide_stream": True}, STREAM, 0.4),
    "low one-pass statistics": ({"low_statistics": True}, STREAM, 0.05),
    "explicit centering": ({"tied": True}, TIED, 0.7),
}


@LOW
@pytest.mark.parametrize("name", LARGE_MEAN)
def test_large_mean_is_won(name: str, low: Any) -> None:
    options, folds, limit = LARGE_MEAN[name]
    ratio, _ = measure(Transformer(low, **options), low, folds, FEW, mean=30.0)
    assert ratio < limit


@pytest.mark.parametrize("one_pass", [True, False])
def test_float32_with_a_large_mean_is_won(one_pass: bool) -> None:
    model = Transformer(jnp.float32, one_pass=one_pass)
    ratio, _ = measure(model, jnp.float32, STREAM, FEW, mean=300.0)
    assert ratio < (1e-3 if one_pass else 0.05)


# --- the range of float16 ------------------------------------------------------------------------

ROWS, WIDTH, OUT = 6, 16, 5


def small(p: Params, x: Array, dtype: Any = jnp.float16, one_pass: bool = False) -> Array:
    """Two residual branches on rows of a table that is read by the output, too, or on a Dense."""
    p = {name: leaf.astype(dtype) for name, leaf in p.items()}
    statistics = dtype if one_pass else jnp.promote_types(dtype, jnp.float32)
    s = p["t"][x] if "t" in p else x.astype(dtype) @ p["w"] + p["b"]
    y = p["t"][0, :OUT] * jnp.asarray(2**-16, dtype) if "t" in p else 0
    for _ in range(2):
        h = layer_norm(s, statistics, one_pass).astype(dtype)
        s = s + h @ p["u"] * p["g"]
    return layer_norm(s, statistics, one_pass).astype(dtype) @ p["v"] + y


def small_params(dtype: Any, **leaves: np.ndarray) -> tuple[Params, Array]:
    """Parameters, drawn but for `leaves`, and an input."""
    rng = np.random.default_rng(0)
    shapes = {"w": (ROWS, WIDTH), "b": (WIDTH,), "u": (WIDTH, WIDTH), "v": (WIDTH, OUT)}
    p: Params = {name: rng.normal(0, 0.3, shape) for name, shape in shapes.items()}
    p |= {"g": rng.normal(1, 0.1, WIDTH), **leaves}
    x = rng.integers(ROWS, size=(3, 4)) if "t" in p else rng.normal(0, 0.1, (4, ROWS))
    return cast(p, dtype), jnp.asarray(x)


def one_low(value: float, *shape: int) -> np.ndarray:
    """All entries are `value` but one in each row: centering nearly doubles that one."""
    return np.where(np.arange(WIDTH) == 3, -value, value) * np.ones((*shape, WIDTH))


def spread(low: float, high: float, *shape: int) -> np.ndarray:
    return np.random.default_rng(1).uniform(low, high, (*shape, WIDTH))


# Values on one side of zero get smaller by centering, whatever their size; on both sides of it
# they can double, so that they must stay under half of the largest number (squares: a quarter).
NEAR_THE_LIMIT: dict[str, dict[str, np.ndarray]] = {
    "weights": {"w": spread(0.9 * LARGEST, LARGEST, ROWS)},
    "weights of both signs": {"w": spread(-LARGEST / 2, LARGEST / 2, ROWS)},
    "weights, one low": {"w": one_low(LARGEST / 2, ROWS)},
    "stream": {"b": spread(0.9 * LARGEST, 0.99 * LARGEST)},
    "stream, one low": {"b": one_low(0.49 * LARGEST)},
    "scale": {"u": spread(-1e3, 1e3, WIDTH), "g": spread(2, 4)},
    "tiny scale": {"w": spread(-1e-5, 1e-5, ROWS), "g": spread(0.5e-6, 1e-6)},
    "explicit": {"t": spread(0.9 * LARGEST, 0.99 * LARGEST, ROWS)},
    "explicit, one low": {"t": one_low(0.49 * LARGEST, ROWS) * spread(0.5, 1, ROWS)},
}


@pytest.mark.parametrize("name", NEAR_THE_LIMIT)
def test_finite_stays_finite(name: str) -> None:
    p, x = small_params(jnp.float16, **NEAR_THE_LIMIT[name])
    folded = jax_lnfold.fold(small, p, x, explicit_cost=0.9)
    assert (folded.report.n_folded, folded.report.n_inserted) == (3, int("t" in p))
    assert np.isfinite(compiled(small)(p, x)).all()
    check_small(folded, p, x)


def check_small(folded: jax_lnfold.Folded, p: Params, x: Array) -> None:
    """All is finite, and as accurate as the dtype is."""
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(folded.params))
    want = small(cast(p, jnp.float64), x, jnp.float64)
    got = jax.jit(folded.apply, compiler_options=STRICT)(folded.params, x)
    assert np.isfinite(got).all()
    assert error(got, want) < 4 * float(jnp.finfo(got.dtype).eps) * error(want, 0 * want)


@pytest.mark.parametrize(("b", "finite"), [(240 + spread(0, 60), False), (one_low(120.0), True)])
def test_squares_in_float16(b: np.ndarray, finite: bool) -> None:
    """A large mean overflows one-pass variance; without it there is nothing to overflow."""
    (p, x), fn = small_params(jnp.float16, b=b), partial(small, one_pass=True)
    folded = jax_lnfold.fold(fn, p, x)
    assert folded.report.n_folded == 3
    with jax.disable_jit():  # compiled, squares may or may not be kept in float32
        assert np.isfinite(fn(p, x)).all() == finite
    check_small(folded, p, x)


OVERFLOWS: dict[str, Callable[[float], dict[str, np.ndarray]]] = {
    "kernel": lambda largest: {"w": one_low(0.9 * largest, ROWS)},
    "bias": lambda largest: {"b": one_low(0.9 * largest)},
    "sum of a row": lambda largest: {"w": spread(0.7 * largest, 0.9 * largest, ROWS)},
    "scale": lambda largest: {"u": largest * spread(-0.01, 0.01, WIDTH), "g": spread(300, 400)},
}


@pytest.mark.parametrize(
    ("dtype", "array"),
    [(jnp.float16, np.asarray), (jnp.float16, jnp.asarray), (jnp.float32, jnp.asarray)],
    ids=["float16-numpy", "float16-jax", "float32-jax"],
)
@pytest.mark.parametrize("name", OVERFLOWS)
def test_an_edit_never_overflows(name: str, dtype: Any, array: Callable[..., Any]) -> None:
    """Finite parameters stay finite; where that cannot be, a leaf is left alone or refused."""
    leaves = OVERFLOWS[name](float(jnp.finfo(dtype).max))
    p, x = small_params(dtype, **leaves)
    p, refusal = jax.tree.map(array, p), ""
    try:
        edited = jax_lnfold.fold(partial(small, dtype=dtype), p, x, donate=True).params
    except jax_lnfold.FoldError as raised:
        edited, refusal = p, str(raised)  # nothing has been donated then
    assert all(np.isfinite(leaf).all() for leaf in edited.values())
    assert not refusal or f"'{next(iter(leaves))}'" in refusal
