"""Statistics as products with ones: where, as exact as sums, and nothing spreads that was apart."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_lnfold
from jax_lnfold.analysis.facts import Facts
from jax_lnfold.program.tracing import trace
from jax_lnfold.rewrite.groups import STEPS, agree, groups_of
from jax_lnfold.rewrite.ones_products import parts_of_squares
from tests.helpers.contracts import iter_equations, relative_difference

Array = jax.Array
Params = dict[str, Array]
H, D, WIDTH = 3, 8, 160
fold = partial(jax_lnfold.fold, matrix_unit=True)


def params(dtype: Any = jnp.bfloat16) -> Params:
    rng = np.random.default_rng(0)
    shapes = {"w": (WIDTH, 3 * H * D), "b": (3 * H * D,), "e": (WIDTH, WIDTH), "t": (50, WIDTH)}
    return {k: jnp.asarray(rng.normal(size=s) + 0.1, dtype) for k, s in shapes.items()}


def stream(dtype: Any = jnp.bfloat16) -> Array:
    return jnp.asarray(np.random.default_rng(1).normal(size=(2, 130, WIDTH)), dtype)


def widened(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def rounded(y: Array, like: Array) -> Array:
    """In 16 bits, as the results of norms are in low precision; float64 stays."""
    return y.astype(jnp.bfloat16 if like.dtype == jnp.float32 else like.dtype)


def rms(x: Array) -> Array:
    w = widened(x)
    return rounded(w * jax.lax.rsqrt(jnp.mean(jnp.square(w), -1, keepdims=True) + 1e-6), x)


def one_pass(x: Array) -> Array:
    w = widened(x)
    mean = w.mean(-1, keepdims=True)
    variance = jnp.square(w).mean(-1, keepdims=True) - jnp.square(mean)
    return rounded((w - mean) * jax.lax.rsqrt(jnp.maximum(variance, 0) + 1e-6), x)


def heads(p: Params, x: Array, norm: Callable[[Array], Array] = rms) -> Any:
    qkv = x @ p["w"] + p["b"]
    q, k, v = jnp.split(qkv.reshape(*x.shape[:2], 3 * H, D), 3, axis=2)
    return norm(q), norm(k), v


def interleaved(p: Params, x: Array) -> Any:
    qkv = (x @ p["w"] + p["b"]).reshape(*x.shape[:2], H, 3, D)
    return rms(qkv[:, :, :, 0]), rms(qkv[:, :, :, 1])


def heads_first(p: Params, x: Array) -> Any:
    q = (x @ p["w"])[..., : H * D].reshape(*x.shape[:2], H, D).transpose(0, 2, 1, 3)
    return rms(q)


def tokens_in_one_axis(p: Params, x: Array) -> Any:
    qkv = (x.reshape(-1, WIDTH) @ p["w"]).reshape(*x.shape[:2], 3, H, D)
    return rms(qkv[:, :, 1]), rms(qkv[:, :, 0])


def kernels_of_heads(p: Params, x: Array) -> Any:
    return rms(jnp.einsum("btd,dhe->bthe", x, p["w"].reshape(WIDTH, 3 * H, D)))


def first_norm(p: Params, x: Array) -> Any:
    first = jnp.broadcast_to(p["t"][:1], (2, 1, WIDTH))
    return rms(jnp.concatenate([first, x], axis=1)) @ p["w"]


def embedded(p: Params, x: Array) -> Any:
    ids = (jnp.abs(x[..., 0].astype(jnp.float32)) * 10).astype(int) % 50
    first = p["t"][ids]
    norms = [first, first + x @ p["e"], first - jnp.tanh(x) @ p["e"]]  # one centering for three
    return [one_pass(y) @ p["w"] for y in norms], p["t"]


def scanned(p: Params, x: Array) -> Any:
    def body(x: Array, kernel: Array) -> tuple[Array, None]:
        return rms(x) @ kernel, None

    return jax.lax.scan(body, x, jnp.stack([p["e"], p["e"] + 1]))[0]


# name: (function, sums that are products)
BETTER: dict[str, tuple[Callable[..., Any], int]] = {
    "heads": (heads, 2),
    "interleaved": (interleaved, 2),
    "heads first": (heads_first, 1),
    "tokens in one axis": (tokens_in_one_axis, 2),
    "kernels of heads": (kernels_of_heads, 1),
    "jitted": (lambda p, x: jax.jit(heads)(p, x), 2),
    "first norm": (first_norm, 1),
    "explicit centering": (embedded, 2),
    "scanned": (scanned, 1),
    "mapped": (lambda p, x: jax.vmap(lambda x: heads(p, x[None]))(x), 2),
}


SAME = [
    pytest.param(*BETTER[name], dtype, id=f"{name}-{dtype}", marks=marks)
    for name in BETTER
    for dtype, marks in (
        ("bfloat16", ()),
        ("float32", () if name in ("heads", "first norm") else pytest.mark.slow),
    )
]


@pytest.mark.parametrize(("apply", "count", "dtype"), SAME)
def test_the_same_function(apply: Callable[..., Any], count: int, dtype: str) -> None:
    """Values and gradients."""
    p, x = params(jnp.dtype(dtype)), stream(jnp.dtype(dtype))
    folded, plain = fold(apply, p, x), jax_lnfold.fold(apply, p, x)
    sums = folded.report.on_matrix_unit
    if dtype == "bfloat16":
        assert len(sums) == count
    else:  # sums of both signs need numbers of bfloat16
        assert sums
        assert all(s.squares for s in sums)

    def all_of(f: jax_lnfold.Folded) -> Any:
        def loss(p: Any, x: Array) -> tuple[Array, Any]:
            results = jax.tree.leaves(f.apply(p, x))
            return sum((jnp.sin(widened(y)).sum() for y in results), jnp.zeros(())), results

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(f.params, x)

    assert relative_difference(all_of(folded), all_of(plain)) < 2e-2


def test_other_numbers_of_tokens() -> None:
    p, x = params(), stream()
    folded, longer = fold(heads, p, x), jnp.concatenate([x, x[:, ::-1]], axis=1)
    assert folded.report.on_matrix_unit
    assert relative_difference(folded(longer), heads(p, longer)) < 2e-2


def one_number(p: Params, x: Array) -> Any:
    return jnp.square(x @ p["e"]).sum(-1)


def in_float32(x: Array) -> Array:
    w = widened(x)
    return w * jax.lax.rsqrt(jnp.mean(jnp.square(w), -1, keepdims=True) + 1e-6)


def long_rows(p: Params, x: Array) -> Any:
    return rms(x @ p["w"])


LEFT: dict[str, Callable[..., Any]] = {
    "epilogue": long_rows,
    "epilogue behind a residual": lambda p, x: rms(x @ p["e"] + jnp.tanh(x)),
    "epilogue of a reshaped product": lambda p, x: rms(
        (x.reshape(-1, WIDTH) @ p["e"]).reshape(x.shape) + x
    ),
    "no root": one_number,
    "mean that stays": lambda p, x: one_pass(x) @ p["w"],
    "result in float32": lambda p, x: heads(p, x, in_float32),
    "few tokens": lambda p, x: heads(p, x[:, :120]),
    "few features": lambda p, x: rms(x[..., :100]),
    "across tokens": lambda p, x: rms((x @ p["w"]).swapaxes(1, 2)),
    "every other feature": lambda p, x: rms((x @ p["w"])[..., ::2]),
    "strided heads": lambda p, x: rms((x @ p["w"]).reshape(2, 130, D, -1).swapaxes(2, 3)),
}


@pytest.mark.parametrize("apply", LEFT.values(), ids=LEFT)
def test_left_alone(apply: Callable[..., Any]) -> None:
    report = jax_lnfold.analyze(apply, params(), stream(), matrix_unit=True)
    assert report.on_matrix_unit == ()
    assert "matrix unit" not in str(report)


def test_float64_is_left_alone() -> None:
    p, x = params(jnp.float64), stream(jnp.float64)
    assert fold(heads, p, x).report.on_matrix_unit == ()
    assert fold(heads, params(), stream()).report.on_matrix_unit


def test_shards_are_left_alone() -> None:
    mesh = jax.make_mesh((1,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec
    spread = partial(jax.shard_map, mesh=mesh, in_specs=(spec(), spec("batch")))
    apply = spread(heads, out_specs=spec("batch"))
    assert jax_lnfold.analyze(heads, params(), stream(), matrix_unit=True).on_matrix_unit
    assert not jax_lnfold.analyze(apply, params(), stream(), matrix_unit=True).on_matrix_unit


# --- as exact as a sum ----------------------------------------------------------------------------

SPREADS: dict[str, Callable[[np.random.Generator, np.ndarray], np.ndarray]] = {
    "centered": lambda rng, x: x,
    "mean of 10": lambda rng, x: x + 10,
    "mean of 1000": lambda rng, x: x + 1000,
    "outlier channel": lambda rng, x: x * np.where(np.arange(x.shape[-1]) == 5, 1000, 1),
    "large": lambda rng, x: x * 1e3,
    "small": lambda rng, x: x * 1e-2,
    "of all sizes": lambda rng, x: x * np.exp(2 * rng.normal(size=x.shape)),
}


def one_projection(p: Params, x: Array) -> Any:
    return one_pass((x @ p["w"].astype(x.dtype)).reshape(1, 280, 20, 8))


def three_projections(p: Params, x: Array) -> Any:
    qkv = (x @ p["w"].astype(x.dtype)).reshape(1, 280, 4, 5, 8)
    return jnp.stack([rms(qkv[:, :, 0]), one_pass(qkv[:, :, 1]), qkv[:, :, 2]])


def one_norm(p: Params, x: Array) -> Any:
    return rms(x) @ p["w"].astype(x.dtype)


# Every operation rounds to its dtype. Else a compiler may leave out the cast between a product and
# a norm that it makes in one operation, and that differs from program to program.
compiled = partial(jax.jit, compiler_options={"xla_allow_excess_precision": False})
SEEDS = 3


@pytest.mark.parametrize("apply", [one_projection, three_projections, one_norm])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_as_near_to_float64(apply: Callable[..., Any], dtype: str) -> None:
    """As the original, in root mean squares, whose kernel is stored in float32."""
    p = {"w": jnp.asarray(np.random.default_rng(0).normal(0, WIDTH**-0.5, (WIDTH, WIDTH)))}
    low = {"w": p["w"].astype(jnp.float32)}
    p = {"w": low["w"].astype(jnp.float64)}
    folded = fold(apply, low, jnp.zeros((1, 280, WIDTH), dtype))
    assert len(folded.report.on_matrix_unit) == (2 if apply is three_projections else 1)
    assert all(norm.folded for norm in folded.report.norms)
    exact, original, rewritten = map(compiled, (apply, apply, folded.apply))
    for name, spread in SPREADS.items():
        errors = []
        for seed in range(SEEDS):
            rng = np.random.default_rng(seed)
            x = jnp.asarray(spread(rng, rng.normal(size=(1, 280, WIDTH))), dtype)
            want = np.asarray(exact(p, x.astype(jnp.float64)))
            outputs = original(low, x), rewritten(folded.params, x)
            errors.append([float(np.sqrt(np.mean(np.square(y - want)))) for y in outputs])
        before, after = np.array(errors).T
        assert np.median(after / before) < 1.1, name
        assert np.all(after < 1.3 * before), name


@pytest.mark.parametrize(
    "dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow), "float32"]
)
@pytest.mark.parametrize("apply", [heads, first_norm])
def test_what_is_not_finite_stays_where_it_is(dtype: str, apply: Callable[..., Any]) -> None:
    p, x = params(jnp.dtype(dtype)), stream(jnp.dtype(dtype))
    folded = fold(apply, p, x)
    assert folded.report.on_matrix_unit
    original, rewritten = jax.jit(apply), jax.jit(folded.apply)
    leaf = "b" if apply is heads else "w"
    for bad in (np.nan, -np.nan, -np.inf, float(jnp.finfo(dtype).max) / 4):
        for at in ((5, 6), (5, 70), (70,)):
            number = jnp.asarray(bad, dtype)
            spoilt = {**p, leaf: p[leaf].at[..., np.array(at)].set(number)}
            tokens = x.at[0, 3, 7].set(number) if apply is first_norm else x
            want, got = original(spoilt, tokens), rewritten(spoilt, tokens)
            for w, g in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
                w, g = np.asarray(w, np.float64), np.asarray(g, np.float64)
                np.testing.assert_array_equal(np.isfinite(g), np.isfinite(w))
                np.testing.assert_allclose(g, w, rtol=2e-2, atol=2e-2)


def test_nan_wins_over_many_infinities() -> None:
    p, x = params(), stream()
    folded = fold(heads, p, x)
    b = p["b"].at[:7].set(np.inf).at[7].set(np.nan).at[8:24].set(np.inf)
    want, got = heads({**p, "b": b}, x), folded.apply({**p, "b": b}, x)
    one, other = (np.asarray(y[0], np.float32) for y in (want, got))
    np.testing.assert_array_equal(one, other)


def test_parts_hold_all_digits() -> None:
    assert [parts_of_squares(t) for t in (jnp.bfloat16, jnp.float16, jnp.float32)] == [2, 3, 3]


# --- groups ---------------------------------------------------------------------------------------


def random_view(rng: np.random.Generator) -> tuple[Callable[[Any], Any], int]:
    """Moves of the features of an array of (3, 5, 24) and an axis that is summed then."""
    reshapes = ([24], [4, 6], [6, 4], [2, 3, 4], [3, 8])
    shape = reshapes[rng.integers(len(reshapes))]
    cut, part = int(rng.integers(len(shape))), int(rng.integers(2))
    order = [0, 1, *(2 + rng.permutation(len(shape)))] if rng.integers(2) else None

    def view(x: Any) -> Any:
        x = jnp.split(x.reshape(3, 5, *shape), [shape[cut] // 2], axis=2 + cut)[part]
        return x if order is None else x.transpose(order)

    return view, 2 + int(rng.integers(len(shape)))


def test_groups_of_random_views() -> None:
    """Numbers put into the groups come out of the sums; the rules of transport agree."""
    rng, found = np.random.default_rng(0), 0
    for _ in range(40):
        view, axis = random_view(rng)
        x = rng.normal(size=(3, 5, 24))
        traced = trace(lambda p, x, view=view, axis=axis: view(x).sum(axis), {}, (x,))
        graph = traced.graph()
        (op,) = (op for op in graph.ops if op.name == "reduce_sum")
        steps = chain(graph, op.inputs[0])
        shape, summed = graph.shape(0), graph.shape(op.inputs[0])
        groups = groups_of(shape, 2, steps, op.params["axes"])
        if groups is None:
            continue
        found += 1
        assert agree(groups, Facts(graph), shape, 2, steps, op.params["axes"], summed)
        sums = np.stack([x[..., f : f + groups.size].sum(-1) for f in groups.first], -1)
        sums = sums.reshape(3, 5, *groups.kept).transpose(groups.order)
        np.testing.assert_allclose(sums, view(x).sum(axis), rtol=1e-12)
        for wrong in ({"start": groups.start + 1}, {"size": groups.size - 1}):
            other = type(groups)(**{**fields(groups), **wrong})
            assert not agree(other, Facts(graph), shape, 2, steps, op.params["axes"], summed)
    assert 10 < found < 40


def fields(groups: Any) -> dict[str, Any]:
    return {name: getattr(groups, name) for name in type(groups).__slots__}


def chain(graph: Any, value: int) -> list[Any]:
    """The steps between the array and what is summed, in order."""
    found: list[Any] = []
    while (made := graph.producer[value]) is not None:
        assert made[0].name in STEPS
        found.append(made)
        value = made[0].inputs[0]
    return found[::-1]


# --- options and the report -----------------------------------------------------------------------


class Attention(nn.Module):
    """Two blocks of attention with norms of queries and keys."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        norm = partial(nn.LayerNorm, dtype=jnp.bfloat16)
        dense = partial(nn.Dense, dtype=jnp.bfloat16)
        for i in range(2):
            y = norm(name=f"norm_{i}")(x)
            qkv = dense(3 * 16, name=f"qkv_{i}")(y).reshape(*x.shape[:2], 3, 2, 8)
            q, k = (norm(name=f"{n}_norm_{i}")(qkv[:, :, j]) for j, n in enumerate("qk"))
            y = jax.nn.dot_product_attention(q, k, qkv[:, :, 2]).reshape(*x.shape[:2], 16)
            x = x + dense(x.shape[-1], name=f"out_{i}")(y)
        return x


def test_the_report_says_what_each_norm_became(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # else names end in the middle
    model, x = Attention(), jnp.zeros((2, 130, 24), jnp.bfloat16)
    p = jax.eval_shape(model.init, jax.random.key(0), x)

    def became(**options: Any) -> dict[str, str]:
        report = jax_lnfold.analyze(model.apply, p, x, fold_affine=True, **options)
        assert all(norm.became in str(report) for norm in report.norms if norm.folded)
        return {norm.path.split("/")[-1]: norm.became for norm in report.norms}

    found = became(matrix_unit=True)
    for i in range(2):
        assert found[f"norm_{i}"].startswith("left")
        assert found[f"q_norm_{i}"] == "folded, matrix unit"
        assert found[f"k_norm_{i}"] == "folded, affine, matrix unit"
    found = became(defer_scale=True, deferred_cost=0.0)
    assert found["k_norm_1"] == "folded, affine, deferred"
    assert found["q_norm_1"] == "folded"


def test_one_product_for_queries_and_keys() -> None:
    folded = fold(heads, params(), stream())
    jaxpr = jax.make_jaxpr(folded.apply)(folded.params, stream())
    products = [e for e in iter_equations(jaxpr) if e.primitive.name == "dot_general"]
    assert len(products) == 1 + 2, "its own, and one for each part of the squares"
    assert {e.outvars[0].aval.shape for e in products[1:]} == {(2, 130, 2 * H)}
