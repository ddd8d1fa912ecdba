"""Deferred scaling: products read the stream itself where that is exact and pays."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import Primitive
from jax.interpreters import mlir

import jax_lnfold
from jax_lnfold.options import DEFERRED_COST, PRESETS
from jax_lnfold.rewrite.defer import defer_scales
from tests.helpers.contracts import fold_checked, iter_equations, relative_difference
from tests.models.zoo import BY_NAME

Array = jax.Array
Params = dict[str, Array]
everything = {"fold_affine": True, "defer_scale": True, "deferred_cost": 0.0}
fold = partial(fold_checked, **everything)

# Norms taken up by linear layers that read all of them, none of it through a slice or a gather.
DEFERRED = {
    "vit": 6,  # the last one is read at the class token
    "clip_vision": 4,
    "dinov2": 4,
    "qk_norm_split": 6,  # those into the heads, and the keys, whose scale the queries have taken up
    "swin_v2": 2,  # of cosine attention, one per block: the other is scaled once more
    "convnext": 0,  # a convolution between the norm and the layers
    "gpt2": 4,
    "gptj": 1,
    "clip_text": 6,
    "bert": 0,  # the residual reads the norm, too
    "dit": 0,  # modulated
}


@pytest.mark.parametrize("name", DEFERRED)
def test_zoo(name: str) -> None:
    model = BY_NAME[name].build()
    folded = jax_lnfold.fold(model.apply_fn, model.params, *model.inputs, **everything)
    want = jax.jit(model.apply_fn)(model.params, *model.inputs)
    got = jax.jit(folded.apply)(folded.params, *model.inputs)
    assert relative_difference(got, want) < 1e-12
    assert len(folded.report.deferred) == DEFERRED[name]


# --- where a scale may wait, and where it may not -------------------------------------------------

SHAPES = {"w": (12, 5), "v": (12, 3), "t": (5, 12), "e": (12, 12), "q": (2, 3, 4), "g": (12,)}


def arrays(dtype: Any = jnp.float64) -> Params:
    rng = np.random.default_rng(0)
    return {k: jnp.asarray(rng.normal(size=s) + 0.3, dtype) for k, s in SHAPES.items()}


def stream(dtype: Any = jnp.float64) -> Array:
    return jnp.asarray(np.random.default_rng(1).normal(size=(2, 7, 12)), dtype)


def rms(x: Array, axis: int = -1) -> Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis, keepdims=True) + 1e-6)


def layer_norm(x: Array) -> Array:
    return (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-6)


def plain(p: Params, x: Array) -> Array:
    return rms(x) @ p["w"]


def two_readers(p: Params, x: Array) -> Array:
    y = rms(x)
    return (y @ p["w"]).sum(-1) * (y @ p["v"]).sum(-1)


def heads(p: Params, x: Array) -> Array:
    """Normalised per head, moved, and read by one kernel per head."""
    y = rms(x.reshape(2, 7, 2, 3, 2).swapaxes(3, 4).reshape(2, 7, 2, 6)).reshape(2, 7, 2, 2, 3)
    return jnp.einsum("bthsd,hde->bhtse", y, p["q"])


def folded_norm(p: Params, x: Array) -> Array:
    return layer_norm(x @ p["e"]) @ p["w"]


def both_operands(p: Params, x: Array) -> Array:
    return jnp.einsum("btd,bsd->bts", rms(x @ p["e"]), rms(x))


def scanned(p: Params, x: Array) -> Array:
    def body(x: Array, kernel: Array) -> tuple[Array, None]:
        return x + jnp.tanh(rms(x) @ kernel) @ p["t"], None

    return jax.lax.scan(body, x, jnp.stack([p["w"], p["w"] + 1, p["w"] - 1]))[0]


def scaled_stack(p: Params, x: Array) -> Array:
    """The scales of all layers are one leaf: rows of ones are ones."""

    def body(x: Array, layer: tuple[Array, Array]) -> tuple[Array, None]:
        scale, kernel = layer
        return x + jnp.tanh((rms(x) * scale) @ kernel) @ p["t"], None

    return jax.lax.scan(body, x, (p["q"].reshape(2, 12), jnp.stack([p["w"], p["w"]])))[0]


# name: (function, how many scales wait)
WAITS: dict[str, tuple[Callable[..., Any], int]] = {
    "plain": (plain, 1),
    "kernel first": (lambda p, x: jnp.einsum("fd,btd->fbt", p["t"], rms(x)), 1),
    "divided": (lambda p, x: (x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True))) @ p["w"], 1),
    "two readers": (two_readers, 1),
    "heads": (heads, 1),
    "across devices of one map": (lambda p, x: jax.vmap(jax.vmap(lambda x: p["t"] @ rms(x)))(x), 1),
    "jitted norm": (lambda p, x: jax.jit(lambda x: jax.jit(rms)(x))(x) @ p["w"], 1),
    "folded norm": (folded_norm, 1),
    "both operands": (both_operands, 2),
    "scanned": (scanned, 1),
    "rematerialised": (lambda p, x: jax.checkpoint(lambda x: rms(x) @ p["w"])(x), 1),
    "branches": (
        lambda p, x: jax.lax.cond(x[0, 0, 0] > 0, lambda: rms(x) @ p["w"], lambda: x[..., :5]),
        1,
    ),
}


@pytest.mark.parametrize(("apply", "waiting"), WAITS.values(), ids=WAITS)
def test_deferred(apply: Callable[..., Any], waiting: int) -> None:
    x, params = stream(), arrays()
    folded = fold(apply, params, x)
    assert len(folded.report.deferred) == waiting
    got = jax.jit(jax.grad(lambda p, x: jnp.sin(folded.apply(p, x)).sum(), 1))(folded.params, x)
    want = jax.jit(jax.grad(lambda p, x: jnp.sin(apply(p, x)).sum(), 1))(params, x)
    assert relative_difference(got, want) < 1e-10
    longer = jnp.concatenate([x, x[:, ::-1] + 1], 1)
    if apply is not heads:
        assert relative_difference(folded(longer), apply(params, longer)) < 1e-12
    assert relative_difference(folded(1e3 * x), apply(params, 1e3 * x)) < 1e-12


def test_scales_in_a_scanned_stack_are_taken_up_and_leave() -> None:
    x, params = stream(), arrays()
    folded = fold_checked(scaled_stack, params, x, fold_affine=True)
    # The kernels are stacked by the program: nothing can be taken up, and nothing is.
    assert not folded.report.affine

    def stacked(p: Params, x: Array) -> Array:
        def body(x: Array, layer: tuple[Array, Array]) -> tuple[Array, None]:
            scale, kernel = layer
            return x + jnp.tanh((rms(x) * scale) @ kernel) @ p["t"], None

        return jax.lax.scan(body, x, (p["scales"], p["kernels"]))[0]

    rng = np.random.default_rng(2)
    leaves = {"scales": (3, 12), "kernels": (3, 12, 5), "t": (5, 12)}
    own = {k: jnp.asarray(rng.normal(size=s)) for k, s in leaves.items()}
    folded = fold(stacked, own, x)
    assert len(folded.report.affine) == len(folded.report.deferred) == 1


def test_products_read_the_stream_itself() -> None:
    folded = fold(two_readers, arrays(), stream())
    jaxpr = jax.make_jaxpr(folded.apply)(folded.params, stream())
    calls = [e for e in jaxpr.eqns if e.params.get("name") == "deferred_scale"]
    assert len(calls) == 2
    assert all(jaxpr.jaxpr.invars[-1] in call.invars for call in calls), "not a scaled copy"
    shapes = [e.outvars[0].aval.shape for e in jaxpr.eqns if e.primitive.name == "mul"]
    assert shapes.count((2, 7, 12)) == 1, "squares for the statistic, but no scaled copy"


def residual(p: Params, x: Array) -> Array:
    y = rms(x)
    return (y @ p["w"]) @ p["t"] + y


def returned(p: Params, x: Array) -> tuple[Array, Array]:
    y = rms(x)
    return y, y @ p["w"]


def softmax(p: Params, x: Array) -> Array:
    return jax.nn.softmax(x, -1) @ p["w"]


STAYS: dict[str, Callable[..., Any]] = {
    "residual": residual,
    "returned": returned,
    "one token": lambda p, x: rms(x)[:, 0] @ p["w"],
    "own scale": lambda p, x: (rms(x) * p["g"]) @ p["w"] + p["g"].sum(),
    # the factor differs from token to token, and tokens are summed over
    "across tokens": lambda p, x: jnp.einsum("btd,bte->bde", rms(x), x),
    "wrong axis": lambda p, x: rms(x, axis=1) @ p["w"],
    "mean remains": lambda p, x: layer_norm(x) @ p["w"],
    "softmax": softmax,
    # uniform along the features, but not a norm: the product before has the scale already
    "weights of tokens": lambda p, x: (jnp.tanh(x @ p["e"]) * x[..., :1]) @ p["w"],
    "gated": lambda p, x: (x * jax.nn.sigmoid(x * x)) @ p["w"],
}


@pytest.mark.parametrize("apply", STAYS.values(), ids=STAYS)
def test_not_deferred(apply: Callable[..., Any]) -> None:
    folded = fold(apply, arrays(), stream())
    assert folded.report.deferred == ()
    assert "deferred" not in str(folded.report)


def test_whatever_the_norm() -> None:
    """By itself, and without a fold: an RMSNorm is a norm as well."""
    folded = fold_checked(plain, arrays(), stream(), defer_scale=True, deferred_cost=0.0)
    assert len(folded.report.deferred) == 1
    assert folded.report.norms == ()


def test_somebody_elses_product() -> None:
    """A primitive that goes by the name of a product, and is none."""
    borrowed = Primitive("mul")
    borrowed.def_impl(jnp.add)
    borrowed.def_abstract_eval(lambda x, y: x)
    mlir.register_lowering(borrowed, mlir.lower_fun(jnp.add, multiple_results=False))

    def apply(p: Params, x: Array) -> Array:
        factor = jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
        return borrowed.bind(x, jnp.broadcast_to(factor, x.shape)) @ p["w"]

    assert fold(apply, arrays(), stream()).report.deferred == ()


# --- when it pays ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("apply", "cost", "deferred"),
    [
        (plain, 12 / 5 - 0.01, 1),  # 12 numbers per token are scaled, or 5
        (plain, 12 / 5 + 0.01, 0),
        (two_readers, 12 / 8 - 0.01, 1),
        (two_readers, 12 / 8 + 0.01, 0),
        (both_operands, 12 / 7 - 0.01, 2),
        (both_operands, 12 / 7 + 0.01, 0),
        (plain, 1e9, 0),
    ],
)
def test_the_cost_model(apply: Callable[..., Any], cost: float, deferred: int) -> None:
    options = {"defer_scale": True, "deferred_cost": cost}
    report = jax_lnfold.analyze(apply, arrays(), stream(), **options)
    assert len(report.deferred) == deferred


def test_the_default_cost_is_that_of_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    for backend, cost in {**DEFERRED_COST, "other": None}.items():
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        for width, pays in ((0.9, True), (1.1, False)) if cost else ((1e-6, False),):
            n = max(1, round(12 * width / (cost or 1)))
            shapes = jax.ShapeDtypeStruct((12, n), float), jax.ShapeDtypeStruct((2, 7, 12), float)
            options = [{}] + [{"optimize": backend}] * (cost is not None)
            for named in options:
                report = jax_lnfold.analyze(
                    lambda w, x: rms(x) @ w, *shapes, defer_scale=True, **named
                )
                assert bool(report.deferred) == pays, (backend, width)


def biased(p: Params, x: Array) -> Array:
    return (layer_norm(x @ p["e"]) * p["g"]) @ p["w"]


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "gpu", "tpu"])
def test_the_preset_is_what_it_says(
    backend: str, named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of the backend at hand, or of one that is named on another machine."""
    monkeypatch.setattr(jax, "default_backend", lambda: "other" if named else backend)
    optimize = backend if named else "auto"
    chosen = jax_lnfold.analyze(biased, arrays(), stream(), optimize=optimize)
    flags = dict.fromkeys(PRESETS.get(backend, ()), True)
    flags |= {"deferred_cost": DEFERRED_COST[backend]} if flags else {}
    by_hand = jax_lnfold.analyze(biased, arrays(), stream(), **flags)
    assert (chosen.affine, chosen.deferred) == (by_hand.affine, by_hand.deferred)
    assert len(chosen.affine) == ("fold_affine" in flags)
    default = jax_lnfold.analyze(biased, arrays(), stream())
    assert default.n_folded == chosen.n_folded == 1
    assert (default.affine, default.deferred) == ((), ())
    plan = jax_lnfold.plan_fold(biased, arrays(), stream(), optimize=optimize)
    assert plan.affine == chosen.affine


# --- low precision --------------------------------------------------------------------------------


def flax_like(p: Params, x: Array, dtype: Any) -> Array:
    """Statistics in float32 of a narrow stream."""
    return rms(x.astype(jnp.float32)).astype(dtype) @ p["w"].astype(dtype)


def dots(folded: jax_lnfold.Folded, *inputs: Any) -> list[Any]:
    jaxpr = jax.make_jaxpr(folded.apply)(folded.params, *inputs)
    return [e for e in iter_equations(jaxpr) if e.primitive.name == "dot_general"]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
def test_the_accumulator_carries_the_scale(dtype: Any) -> None:
    apply, params = partial(flax_like, dtype=dtype), arrays(jnp.float32)
    exact = [np.asarray(v, np.float64) for v in (params["w"].astype(dtype), stream(dtype))]
    y = exact[1] / np.sqrt((exact[1] ** 2).mean(-1, keepdims=True) + 1e-6)
    want = y @ exact[0]
    folded = jax_lnfold.fold(apply, params, stream(dtype), **everything)
    assert len(folded.report.deferred) == 1
    (dot,) = dots(folded, stream(dtype))
    assert [v.aval.dtype for v in dot.invars] == [dtype, dtype]
    assert dot.outvars[0].aval.dtype == jnp.float32
    errors = [
        np.sqrt(np.mean((np.asarray(found, np.float64) - want) ** 2))
        for found in (folded(stream(dtype)), apply(params, stream(dtype)))
    ]
    assert errors[0] < 1.05 * errors[1], "one rounding less: the normalised copy"


def test_float16_does_not_overflow() -> None:
    """A product of what is not yet scaled leaves the range of float16, its scaled result not."""
    x, params = 3e4 * jnp.sign(stream(jnp.float16)), arrays(jnp.float32)
    params["w"] = jnp.abs(params["w"]) * jnp.sign(x[0, 0, :, None])
    apply = partial(flax_like, dtype=jnp.float16)
    want = np.asarray(apply(params, x), np.float64)
    assert np.isfinite(want).all()
    assert not np.isfinite(np.asarray(x @ params["w"].astype(jnp.float16))).all()
    folded = jax_lnfold.fold(apply, params, x, **everything)
    assert len(folded.report.deferred) == 1
    assert relative_difference(folded(x), want.astype(np.float16)) < 2e-3


def test_a_wide_stream_is_not_squeezed_into_float16() -> None:
    x, params = 1e5 * stream(jnp.float32), arrays(jnp.float32)
    for dtype, deferred in ((jnp.float16, 0), (jnp.bfloat16, 1), (jnp.float32, 1)):
        folded = jax_lnfold.fold(partial(flax_like, dtype=dtype), params, x, **everything)
        assert len(folded.report.deferred) == deferred
        assert np.isfinite(np.asarray(folded(x), np.float32)).all()
    single = partial(flax_like, dtype=jnp.float32)
    folded = jax_lnfold.fold(lambda p, x: single(p, x.astype(jnp.float32)), params, stream())
    assert folded.report.deferred == ()


def test_what_changes_nothing_is_the_very_same_program() -> None:
    for apply, same in ((softmax, True), (plain, False)):
        closed = jax.make_jaxpr(apply)(arrays(), stream())
        assert (defer_scales(closed, 0.0)[0] is closed) == same


def test_symbolic_sizes() -> None:
    folded = fold(folded_norm, arrays(), stream())
    b, t = jax.export.symbolic_shape("b, t")
    shape = jax.ShapeDtypeStruct((b, t, 12), float)
    leaves = jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype), folded.params)
    exported = jax.export.export(jax.jit(folded.apply))(leaves, shape)
    x = jnp.concatenate([stream(), stream()], 1)[:1]
    got = exported.call(folded.params, x)
    assert relative_difference(got, folded_norm(arrays(), x)) < 1e-12
    assert "deferred_scale" in exported.mlir_module()
