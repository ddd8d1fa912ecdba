"""`verify` measures against a reference that is in float64 throughout, and says where it is not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.experimental import io_callback
from jax.experimental import pallas as pl
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jax_lnfold
from jax_lnfold import FoldError, TreeError, center_updates
from jax_lnfold.program.tracing import trace
from jax_lnfold.widening import run_widened
from tests.models.zoo import ZOO, Case

Fn = Callable[..., Any]
LOW = {"bfloat16": jnp.bfloat16, "float16": jnp.float16, "float32": jnp.float32}
X64 = pytest.mark.parametrize("x64", [False, True], ids=["x32", "x64"])


def cast(tree: Any, dtype: Any) -> Any:
    """The tree with its floating-point leaves in another dtype."""

    def leaf(x: Any) -> Any:
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(leaf, tree)


def normal(*shape: int, dtype: Any = jnp.float32, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def widened(fn: Fn, *operands: Any) -> tuple[Any, tuple[str, ...]]:
    """The results of a function, evaluated in float64, and what could not be."""
    traced = trace(fn, operands[0], operands[1:])
    results, kept = run_widened(traced.closed, jax.tree.leaves(operands))
    return jax.tree.unflatten(traced.out_tree, results), kept


def gap(a: Any, b: Any) -> float:
    """The largest difference of two trees of arrays of the same shapes."""
    pairs = [*zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)]
    assert all(np.shape(x) == np.shape(y) for x, y in pairs)
    return max(float(np.max(np.abs(np.asarray(x) - np.asarray(y)))) for x, y in pairs)


# --- models with a dtype of their own -------------------------------------------------------------


class Block(nn.Module):
    """Pre-LN attention and MLP, the body of a scan: constants in it are exact in any dtype."""

    dtype: Any

    @nn.compact
    def __call__(self, h: jax.Array, _: None) -> tuple[jax.Array, None]:
        norm, dense = partial(nn.LayerNorm, dtype=self.dtype), partial(nn.Dense, dtype=self.dtype)
        attention = nn.MultiHeadDotProductAttention(num_heads=3, dtype=self.dtype)
        h = h + attention(norm()(h))
        return h + dense(12)(nn.relu(dense(17)(norm(use_fast_variance=False)(h)))), None


class Model(nn.Module):
    """Convolution, two scanned and rematerialised blocks, a Dense."""

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = nn.Conv(12, (3,), dtype=self.dtype)(x)
        layers = nn.scan(
            nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=2
        )
        h, _ = layers(self.dtype)(h, None)
        return nn.Dense(5, dtype=self.dtype)(nn.LayerNorm(dtype=self.dtype)(h))


def built(dtype: Any) -> tuple[Model, Any, jax.Array]:
    model, x = Model(dtype), normal(2, 9, 7)
    with jax.enable_x64(False):
        params = jax.jit(model.init)(jax.random.key(1), x)
    rng = np.random.default_rng(3)
    return model, jax.tree.map(lambda p: p + 0.1 * rng.normal(size=p.shape), params), x


@pytest.mark.parametrize("dtype", LOW.values(), ids=LOW)
def test_the_printed_errors_are_the_true_ones(dtype: Any) -> None:
    """The truth is the same model, built with ``dtype=float64``."""
    x64 = dtype == jnp.float16
    model, params, x = built(dtype)
    params = cast(params, jnp.float32)
    truth = jax.jit(Model(jnp.float64).apply)(cast(params, jnp.float64), x.astype(jnp.float64))
    with jax.enable_x64(x64):
        folded = jax_lnfold.fold(model.apply, params, x)
        assert folded.report.n_folded == 3
        check = jax_lnfold.verify(model.apply, params, folded, x)
        reference, _ = widened(model.apply, params, x)
        runs = [
            jax.jit(fn)(p, x) for fn, p in ((model.apply, params), (folded.apply, folded.params))
        ]
    errors = [gap(np.asarray(y, np.float64), truth) for y in runs]
    assert gap(reference, truth) < 1e-12  # Flax's epsilon is a float32
    close = partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-11)
    close([check.original_error, check.folded_error], errors)
    assert min(errors) > float(jnp.finfo(dtype).eps) / 64
    close(check.difference, gap(*(np.asarray(y, np.float64) for y in runs)))
    close(check.scale, np.abs(truth).max())
    assert check.not_widened == ()
    assert check.drift <= 1
    assert "not " not in str(check)


@pytest.mark.parametrize("case", ZOO, ids=str)
def test_the_zoo_is_widened_throughout(case: Case) -> None:
    model = case.build()
    params, inputs = cast((model.params, model.inputs), jnp.float32)
    got, kept = widened(model.apply_fn, params, *inputs)
    wide, wide_inputs = cast((params, inputs), jnp.float64)
    want = jax.jit(model.apply_fn)(wide, *wide_inputs)
    assert kept == ()
    # float32 constants, as of the tanh of gelu, stay what they are
    assert gap(got, want) < 2e-7 * max(1, float(jnp.abs(want).max()))


@X64
@pytest.mark.parametrize("dtype", LOW.values(), ids=LOW)
def test_dropout_drops_the_same(dtype: Any, x64: bool) -> None:
    key = jax.random.key(5)
    drop = nn.Dropout(0.25, deterministic=False)

    def fn(w: jax.Array, x: jax.Array, key: jax.Array) -> jax.Array:
        return drop.apply({}, x.astype(dtype) @ w.astype(dtype), rngs={"dropout": key})

    w, x = normal(7, 11), normal(40, 7, seed=1)
    with jax.enable_x64(x64):
        got, kept = widened(fn, w, x, key)
        mask = np.asarray(jax.jit(fn)(w, x, key)) != 0
    want = np.where(mask, np.asarray(x, np.float64) @ np.asarray(w, np.float64) / 0.75, 0)
    assert 0.6 < mask.mean() < 0.9
    assert gap(got, want) < 1e-12
    assert kept == ()


@X64
def test_random_numbers_are_those_of_the_original(x64: bool) -> None:
    def fn(p: jax.Array, key: jax.Array) -> Any:
        fold = jax.random.fold_in(jax.random.split(key)[1], 3)
        return [
            jax.random.uniform(key, (7,), jnp.float32),
            jax.random.bits(fold, (3,), jnp.uint16),
            jax.random.randint(key, (5,), 0, 9, jnp.int32),
            jax.random.bernoulli(key, jnp.float32(0.3), (50,)),
            jax.random.categorical(key, jnp.log(p)),
            jax.random.permutation(key, jnp.arange(6, dtype=jnp.int32)),
            jax.random.normal(key, (4,), jnp.float32),
        ]

    p = jnp.asarray([[0.2, 0.3, 0.5]], jnp.float32)
    with jax.enable_x64(x64):
        got, kept = widened(fn, p, jax.random.key(4))
        want = jax.jit(fn)(p, jax.random.key(4))
    assert kept == ()
    assert all(np.array_equal(a, b) for a, b in zip(got[:-1], want[:-1], strict=True))
    assert 0 < gap(got[-1], want[-1]) < 1e-6  # the inverse error function of the same number
    assert [x.dtype for x in got[1:3]] == [jnp.uint16, jnp.int32]


# --- operations -----------------------------------------------------------------------------------


@jax.custom_jvp
def own_jvp(x: jax.Array) -> jax.Array:
    return jnp.sin(x)


@jax.custom_vjp
def own_vjp(x: jax.Array) -> jax.Array:
    return jnp.sin(x)


own_jvp.defjvps(lambda t, y, x: 2 * t * jnp.cos(x))
own_vjp.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (3 * g * jnp.cos(x),))


def low(fn: Fn) -> Fn:
    """The function in bfloat16, where it is not told otherwise."""
    return lambda x: fn(x.astype(jnp.bfloat16))


def until_large(row: jax.Array) -> jax.Array:
    return lax.while_loop(lambda r: r.sum() < 10, lambda r: r + 1.5, row)


def mapped(x: jax.Array) -> jax.Array:
    mesh = jax.make_mesh((5,), ("m",), axis_types=(AxisType.Auto,))
    spec = PartitionSpec("m")

    def shard(x: jax.Array) -> jax.Array:
        total = lax.psum(jnp.sin(x), "m")
        return x * lax.fori_loop(0, 3, lambda i, c: c * 0.5 + i, total)

    return jax.shard_map(shard, mesh=mesh, in_specs=spec, out_specs=spec)(x)


# The functions in float64 are the truth: constants in them are exact in bfloat16.
WIDENED: dict[str, Fn] = {
    "cast": lambda x: x + x.astype(jnp.float16).astype(jnp.float32),
    "cast of integers": lambda x: jnp.arange(300, dtype=jnp.int32).astype(x.dtype) * x[0, 0],
    "float8": lambda x: x.astype(jnp.float8_e4m3fn).astype(x.dtype) * 2,
    "reduce_precision": lambda x: lax.reduce_precision(x, 5, 3),
    "iota": lambda x: jnp.arange(6.0, dtype=x.dtype) * x,
    "full": lambda x: jnp.full((3,), 0.5, x.dtype) * x[0, 0],
    "dot": lambda x: jnp.dot(x, x.T, preferred_element_type=jnp.float32, precision="highest"),
    "dot of two dtypes": lambda x: lax.dot(
        x, x.T.astype(jnp.float16), preferred_element_type=jnp.float32
    ),
    "dot by algorithm": lambda x: lax.dot(
        x.astype(jnp.float32), x.T.astype(jnp.float32), precision="F32_F32_F32"
    ),
    "conv": lambda x: lax.conv(x[None, None], x[None, None, :2, :2], (1, 1), "SAME"),
    "fft": lambda x: jnp.fft.irfft(jnp.fft.rfft(x.astype(jnp.float32)) ** 2),
    "complex": lambda x: lax.complex(x.astype(jnp.float32), x.astype(jnp.float32)) ** 2,
    "cumsum": lambda x: jnp.cumsum(x, 0),
    "sort": lambda x: jnp.sort(x, 0),
    "argmax": lambda x: x[jnp.argmax(x[0])],
    "top_k": lambda x: lax.top_k(x, 2),
    "gather": lambda x: x[jnp.array([3, 1])],
    "scatter": lambda x: x.at[jnp.array([3, 1])].add(x[:2]).at[0].set(0.5),
    "scatter apply": lambda x: x.at[jnp.array([1, 4])].apply(jnp.sin),
    "pooling": lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (2, 2), (1, 1), "VALID"),
    "pooling of its own": lambda x: lax.reduce_window(
        x, jnp.zeros((), x.dtype), lambda a, b: a + b * b, (2, 1), (2, 1), "VALID"
    ),
    "gradient of pooling": jax.grad(
        lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (2, 2), (2, 2), "VALID").sum()
    ),
    "generic reduction": lambda x: lax.reduce(
        x, jnp.ones((), x.dtype), lambda a, b: a * b + a, (0,)
    ),
    "cholesky": lambda x: jnp.linalg.cholesky(
        (x @ x.T).astype(jnp.float32) + 4 * jnp.eye(5, dtype=jnp.float32)
    ),
    "linear solve": lambda x: lax.custom_linear_solve(
        lambda v: 2 * v, x[0], lambda _, b: b / 2, symmetric=True
    ),
    "jit": jax.jit(jnp.sin),
    "remat": jax.checkpoint(jnp.sin),
    "custom_jvp": jax.grad(lambda x: own_jvp(x).sum()),
    "custom_vjp": jax.grad(lambda x: own_vjp(x).sum()),
    "custom_jvp, forward": own_jvp,
    "custom_vjp, forward": own_vjp,
    "composite": lambda x: lax.composite(lambda x: jnp.sin(x), "own.sin")(x),
    "scan": lambda x: lax.scan(lambda c, r: (jnp.tanh(c + r), c * r), x[0], x, reverse=True),
    "while": lambda x: lax.while_loop(
        lambda c: c[0] < 4, lambda c: (c[0] + 1, jnp.tanh(c[1])), (0, x)
    )[1],
    "while, vmapped": jax.vmap(until_large),
    "cond": lambda x: lax.cond(x[0, 0] > 0, jnp.sin, jnp.cos, x),
    "switch": lambda x: lax.switch(jnp.argmax(x[1]), [jnp.sin, jnp.cos] * 3, x),
    "platform": lambda x: lax.platform_dependent(x, cpu=jnp.sin, tpu=jnp.tan, default=jnp.cos),
    "shard_map": mapped,
    "barrier": lax.optimization_barrier,
    "nothing but integers": lambda x: jnp.arange(3, dtype=jnp.int32) + x.shape[0],
}


@X64
@pytest.mark.parametrize("name", WIDENED)
def test_operations_are_widened(name: str, x64: bool) -> None:
    x = normal(5, 6, dtype=jnp.bfloat16).astype(jnp.float32)
    exact = {"float8": lambda x: x * 2, "reduce_precision": lambda x: x, "cast": lambda x: x + x}
    exact |= {
        "fft": lambda x: jnp.fft.irfft(jnp.fft.rfft(x) ** 2),
        "complex": lambda x: lax.complex(x, x) ** 2,
        "cholesky": lambda x: jnp.linalg.cholesky(x @ x.T + 4 * jnp.eye(5)),
        "dot": lambda x: x @ x.T,
        "dot of two dtypes": lambda x: x @ x.T,
        "dot by algorithm": lambda x: x @ x.T,
    }
    with jax.enable_x64(x64):
        got, kept = widened(low(WIDENED[name]), x)
        shapes = jax.eval_shape(low(WIDENED[name]), x)
    want = jax.jit(exact.get(name, WIDENED[name]))(x.astype(jnp.float64))
    assert kept == ()
    assert gap(got, want) < 1e-12 * (1 + float(np.max(np.abs(jax.tree.leaves(want)[0]))))
    for y, shape in zip(jax.tree.leaves(got), jax.tree.leaves(shapes), strict=True):
        wide = jnp.complex128 if jnp.iscomplexobj(y) else jnp.float64
        assert y.dtype == (wide if jnp.issubdtype(shape.dtype, jnp.inexact) else shape.dtype)


def kernel(x: Any, o: Any) -> None:
    o[...] = x[...] * 3


def same(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def cut(x: jax.Array) -> jax.Array:
    """Without the last bits of the mantissa."""
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32) & ~0xFF
    return lax.bitcast_convert_type(bits, jnp.float32)


KEPT: dict[str, tuple[Fn, tuple[str, ...]]] = {
    "bits": (cut, ("bitcast_convert_type",)),
    "bits twice": (lambda x: cut(cut(x) * 3), ("2 x bitcast_convert_type",)),
    "bits in a loop": (
        lambda x: lax.fori_loop(0, 5, lambda _, c: cut(c), x),
        ("bitcast_convert_type",),
    ),
    "nextafter": (lambda x: jnp.nextafter(x, x + 1), ("nextafter",)),
    "gamma": (
        lambda x: jax.random.gamma(jax.random.key(0), x**2 + 1, dtype=x.dtype),
        ("random_gamma",),
    ),
    "pure_callback": (lambda x: jax.pure_callback(np.sin, same(x), x), ("pure_callback",)),
    "io_callback": (lambda x: io_callback(np.sin, same(x), x), ("io_callback",)),
    "pallas": (
        lambda x: pl.pallas_call(kernel, out_shape=same(x), interpret=True)(x),
        ("pallas_call",),
    ),
    "callback in a branch": (
        lambda x: lax.cond(
            x[0, 0] > 9, jnp.sin, lambda x: jax.pure_callback(np.sin, same(x), x), x
        ),
        ("pure_callback",),
    ),
}


@X64
@pytest.mark.parametrize(("fn", "names"), KEPT.values(), ids=KEPT)
def test_what_is_not_widened_is_named(fn: Fn, names: tuple[str, ...], x64: bool) -> None:
    """It computes what it does in the original, on the same numbers here."""
    x = normal(5, 6)
    with jax.enable_x64(x64):
        want = jax.jit(fn)(x)
        assert want.dtype == jnp.float32
        got, kept = widened(fn, x)
    assert got.dtype == jnp.float64
    assert gap(got, want) < 1e-6  # float32 inside of what is not named as such
    assert kept == names


def test_callbacks_get_their_own_dtype_and_prints_are_no_loss() -> None:
    seen = []

    def look(x: np.ndarray) -> np.ndarray:
        seen.append(x.dtype)
        return x

    def fn(x: jax.Array) -> jax.Array:
        jax.debug.callback(look, x)
        return jax.pure_callback(look, jax.ShapeDtypeStruct(x.shape, x.dtype), x).astype(x.dtype)

    x = normal(3)
    assert widened(fn, x)[1] == ("pure_callback",)
    assert {*seen} == {np.dtype(np.float32)}
    assert widened(lambda x: (jax.debug.callback(look, x), x)[1], x)[1] == ()
    wide = x.astype(jnp.float64)
    assert widened(fn, wide)[1] == ()  # it is in float64 as it is


def test_a_primitive_without_float64_runs_as_it_was() -> None:
    """A narrow primitive of somebody else, also by the name of one of jax's."""
    for name in ("own_kernel", "sin"):
        primitive = jax.extend.core.Primitive(name)
        primitive.def_abstract_eval(lambda x: x)
        jax.interpreters.mlir.register_lowering(
            primitive, jax.interpreters.mlir.lower_fun(lambda x: x * 2, multiple_results=False)
        )
        got, kept = widened(lambda x, p=primitive: p.bind(x) / 3, normal(4))
        assert kept == (name,)
        assert gap(got, 2 * np.asarray(normal(4), np.float64) / 3) < 1e-12


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_sharded_arrays_stay_sharded(kind: Any) -> None:
    mesh = jax.make_mesh((2, 4), ("d", "m"), axis_types=(kind, kind))

    def put(x: jax.Array, *spec: Any) -> jax.Array:
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

    def fn(w: jax.Array, x: jax.Array) -> jax.Array:
        y = (x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16)).astype(jnp.float32)
        return lax.scan(lambda c, _: (jnp.tanh(c), None), y, None, length=2)[0]

    w, x = put(normal(6, 8), None, "m"), put(normal(4, 6, seed=1), "d")
    (got, kept), want = widened(fn, w, x), np.asarray(x, np.float64) @ np.asarray(w, np.float64)
    assert kept == ()
    assert gap(got, np.tanh(np.tanh(want))) < 1e-12
    assert len({s.device for s in got.addressable_shards}) == 8
    assert got.addressable_shards[0].data.shape != got.shape


# --- verify ---------------------------------------------------------------------------------------


def test_verify_says_what_is_not_in_float64() -> None:
    def model(p: Any, x: jax.Array) -> jax.Array:
        return nn.standardize(cut(x @ p["w"])) @ p["v"]

    p, x = {"w": normal(6, 8), "v": normal(8, 3, seed=1)}, normal(4, 6, seed=2)
    check = jax_lnfold.verify(model, p, jax_lnfold.fold(model, p, x), x)
    assert check.not_widened == ("bitcast_convert_type",)
    assert str(check).endswith("; not in float64: bitcast_convert_type")


def test_strict_promotion() -> None:
    def norm(h: jax.Array) -> jax.Array:
        d = h - h.mean(-1, keepdims=True)
        return d * lax.rsqrt((d * d).mean(-1, keepdims=True) + jnp.asarray(1e-5, h.dtype))

    def model(p: Any, x: jax.Array) -> jax.Array:
        return norm(x @ p["w"]) @ p["v"]

    p = {"w": normal(6, 8, dtype=jnp.bfloat16), "v": normal(8, 3, dtype=jnp.bfloat16, seed=1)}
    x = normal(4, 6, dtype=jnp.bfloat16, seed=2)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        check = jax_lnfold.verify(model, p, jax_lnfold.fold(model, p, x), x)
    assert check.not_widened == ()
    assert 1e-4 < check.folded_error < 0.1


def test_complex_outputs_are_compared() -> None:
    def model(p: Any, x: jax.Array) -> jax.Array:
        return jnp.fft.fft(nn.standardize(x @ p["w"]))

    p, x = {"w": normal(6, 8)}, normal(4, 6, seed=2)
    folded = jax_lnfold.fold(model, p, x)
    check = jax_lnfold.verify(model, p, folded, x)
    want = model(cast(p, jnp.float64), x.astype(jnp.float64))
    true = gap(np.asarray(jax.jit(model)(p, x), np.complex128), want)
    np.testing.assert_allclose(check.original_error, true, rtol=1e-4)


def test_equal_infinities_are_no_difference() -> None:
    def model(p: Any, x: jax.Array) -> jax.Array:
        y = nn.standardize(x @ p["w"])
        return jnp.where(jnp.arange(8) < 3, y, -jnp.inf)

    p, x = {"w": normal(6, 8)}, normal(4, 6, seed=2)
    check = jax_lnfold.verify(model, p, jax_lnfold.fold(model, p, x), x)
    assert max(check.original_error, check.folded_error, check.difference) < 1e-5
    assert check.scale == np.inf
    lost = jax_lnfold.verify(lambda p, x: model(p, x) * jnp.nan, p, jax_lnfold.fold(model, p, x), x)
    assert np.isnan(lost.original_error)


# --- other parameters than those that were folded -------------------------------------------------


def trained(keep: bool) -> tuple[Fn, jax_lnfold.Folded, Any, jax.Array]:
    """A model after a step of Adam, with the constraint kept or not."""
    model, params, x = built(jnp.float32)
    folded = jax_lnfold.fold(model.apply, cast(params, jnp.float32), x)
    last = [center_updates(folded.plan)] if keep else []
    tx = optax.chain(optax.adam(0.01), *last)

    @jax.jit
    def step(p: Any) -> Any:
        grads = jax.grad(lambda p: jnp.sum(jnp.sin(folded.apply(p, x))))(p)
        return optax.apply_updates(p, tx.update(grads, tx.init(p), p)[0])

    return model.apply, folded, step(folded.params), x


def test_trained_parameters() -> None:
    fn, folded, params, x = trained(keep=True)
    check = jax_lnfold.verify(fn, params, folded, x, edited=params)
    assert check.drift <= 1
    assert max(check.original_error, check.folded_error) < 1e-5 * check.scale
    # folded.params are another model by now
    assert jax_lnfold.verify(fn, params, folded, x).folded_error > 1e-3


def test_drift_is_told_from_the_error_of_folding() -> None:
    fn, folded, params, x = trained(keep=False)
    check = jax_lnfold.verify(fn, params, folded, x, edited=params)
    assert check.drift > 1000
    assert check.folded_error > 1e-4 > 10 * check.original_error
    assert f"not centered, by {check.drift:.3g} roundings" in str(check)
    mended = jax_lnfold.verify(fn, params, folded, x, edited=folded.plan.center(params))
    assert mended.drift <= 1
    assert mended.folded_error < 1e-5 * mended.scale
    assert "centered" not in str(mended)


BAD_EDITED: dict[str, tuple[Fn, str]] = {
    "part": (lambda p: {"w": p["w"]}, "edited: not the tree that was folded .*missing v"),
    "more": (lambda p: {**p, "z": p["v"]}, "edited: not the tree that was folded .*unknown z"),
    "text": (lambda p: {**p, "w": "w"}, "edited: leaf 'w' is a str"),
    "types": (lambda p: jax.eval_shape(lambda p: p, p), "edited: leaf 'v' is a ShapeDtypeStruct"),
    "integers": (lambda p: {**p, "w": p["w"].astype(int)}, "edited: leaf 'w' has dtype int64"),
    "shape": (lambda p: {**p, "w": p["w"][:, :5]}, "edited: leaf 'w'"),
}


@pytest.mark.parametrize("name", BAD_EDITED)
def test_bad_edited_is_refused(name: str) -> None:
    def model(p: Any, x: jax.Array) -> jax.Array:
        return nn.standardize(x @ p["w"]) @ p["v"]

    p, x = {"w": normal(6, 8), "v": normal(8, 3, seed=1)}, normal(4, 6, seed=2)
    folded, (change, said) = jax_lnfold.fold(model, p, x), BAD_EDITED[name]
    with pytest.raises(TreeError, match=said) as raised:
        jax_lnfold.verify(model, p, folded, x, edited=change(p))
    assert isinstance(raised.value, FoldError)
