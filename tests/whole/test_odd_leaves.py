"""What looks wrong and is right: odd functions, leaves and shapes, folded all the same."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_lnfold
from jax_lnfold import Folded, FoldPlan, analyze, fold
from tests.helpers.contracts import (
    assert_identical,
    check_contracts,
    fold_checked,
    relative_difference,
    snapshot,
)
from tests.whole.test_bad_input import (
    DIN,
    OUT,
    B,
    Call,
    D,
    Layer,
    T,
    abstract,
    deleted,
    layer_norm,
    leaf,
    make_input,
    make_params,
    model,
    node,
    on_device,
    on_mesh,
    returns,
)

Array = jax.Array
Params = dict[str, Any]

pytestmark = pytest.mark.usefixtures("explicit_ranks")


# --- odd calls -----------------------------------------------------------------------------------


class CallableLayer(Layer):
    __call__ = Layer.apply


def prints(p: Params, x: Array) -> Array:
    print("traced with", x)
    return model(p, x)


def asks_the_host(p: Params, x: Array) -> Array:
    return model(p, jax.pure_callback(np.sin, jax.ShapeDtypeStruct(x.shape, x.dtype), x))


def changes_params(p: Params, x: Array) -> Array:
    p["w"] = p["w"] * 2 + p.pop("b").sum()
    p["new"] = p["v"]
    return layer_norm(x @ p["w"]) @ p["new"]


def same_names(*names: str) -> Call:
    """Leaves of one key path, `a/b`, as the kernel before and the one after the norm."""

    def call(p: Params, x: Array) -> Folded:
        nested, flat = names
        tree = {"a": {"b": p[nested]}, "a/b": p[flat], "c": p["b"]}
        return fold_checked(
            lambda q, x: model({nested: q["a"]["b"], flat: q["a/b"], "b": q["c"]}, x), tree, x
        )

    return call


def checked(params: Any, x: Array, *example: Any, **options: Any) -> Folded:
    """Folded with other example inputs than those that the contracts are checked on."""
    done = fold(model, params, *example, **options)
    check_contracts(model, params, done, x)
    return done


CORRECT: dict[str, tuple[Call, int]] = {
    "types as inputs": (lambda p, x: checked(p, x, abstract(x)), 1),
    "deleted inputs": (lambda p, x: checked(p, x, deleted(x)), 1),
    "integer inputs": (lambda p, x: fold_checked(model, p, (9 * x).astype(int)), 1),
    "a cost of numpy": (lambda p, x: checked(p, x, x, explicit_cost=np.float32(0.5)), 1),
    "donate of numpy": (lambda p, x: checked(p, x, x, donate=np.bool_(False)), 1),
    "a callable object": (lambda p, x: fold_checked(CallableLayer(), p, x), 1),
    "prints": (lambda p, x: fold_checked(prints, p, x), 1),
    "asks the host": (lambda p, x: fold_checked(asks_the_host, p, x), 1),
    "changes params": (lambda p, x: checked_once(changes_params, p, x), 1),
    "returns None": (lambda p, x: fold_checked(lambda p, x: (model(p, x), None)[1:], p, x), 0),
    "returns None, too": (lambda p, x: fold_checked(returns(None), p, x), 1),
    "returns numbers": (lambda p, x: fold_checked(returns({"n": 3, "b": True, "c": 2j}), p, x), 1),
    "returns numpy": (lambda p, x: fold_checked(returns(np.arange(3)), p, x), 1),
    "on another device": (lambda p, x: fold_checked(model, on_device(3, p), x), 1),
    "partly on a mesh": (
        lambda p, x: fold_checked(model, leaf("w", lambda w: on_mesh(4, w, None, "devices"))(p), x),
        1,
    ),
    "one key path twice": (same_names("w", "v"), 1),
    "one key path twice, swapped": (same_names("v", "w"), 1),
    "a container": (lambda p, x: fold_checked(model, node()(p), x), 1),
    "unhashable metadata": (lambda p, x: fold_checked(model, node(lambda: ["list"])(p), x), 1),
    "NaN": (lambda p, x: fold_checked(model, leaf("w", lambda w: w.at[1, 2].set(np.nan))(p), x), 1),
    "no features": (lambda p, x: fold_checked(model, narrow(p, 0), x), 0),
    "one feature": (lambda p, x: fold_checked(model, narrow(p, 1), x), 0),
}


def narrow(p: Params, width: int) -> Params:
    return {"w": p["w"][:, :width], "b": p["b"][..., :width], "v": p["v"][:width]}


def checked_once(apply_fn: Call, p: Params, x: Array) -> Folded:
    """For functions that change the tree they are given: each call gets a fresh one."""
    done, want = fold(apply_fn, p, x), apply_fn({**p}, x)
    assert relative_difference(done(x), want) < 1e-12
    assert relative_difference(done.apply(done.params, x), want) < 1e-12
    assert relative_difference(apply_fn({**done.params}, x), want) < 1e-12
    return done


@pytest.mark.parametrize(("call", "n_folded"), CORRECT.values(), ids=CORRECT)
def test_odd_call_is_answered(call: Callable[[Params, Array], Folded], n_folded: int) -> None:
    p, x = make_params(), make_input()
    before = snapshot((p, x))
    assert call(p, x).report.n_folded == n_folded
    assert_identical((p, x), before)


def test_function_that_is_another_one_at_every_trace() -> None:
    """Every program is proved by itself: it is that of its trace, or refused."""
    times = count()

    def moody(p: Params, x: Array) -> Array:
        s = x @ p["w"] + p["b"]
        return (layer_norm(s) if next(times) % 2 == 0 else s) @ p["v"]

    def growing(p: Params, x: Array) -> Array:
        return model(p, x) * next(times)

    p, x = make_params(), make_input()
    done = fold(moody, p, x)
    assert relative_difference(done(x), model(p, x)) < 1e-12
    with pytest.raises(jax_lnfold.PlanMismatchError, match=r"^inputs: .*'b'.* fold again"):
        done(x[:1])
    times = count(1)
    done = fold(growing, p, x)
    for factor, some in ((1, x), (2, x[:1]), (1, x), (2, x[:1])):
        assert relative_difference(done(some), model(p, some) * factor) < 1e-12


def test_analyze_without_inputs_where_none_are_needed() -> None:
    x = make_input()
    assert analyze(lambda p: model(p, x), make_params()).n_folded == 1


def test_other_weights_of_the_same_structure() -> None:
    """A plan made for one checkpoint serves the next, also after a detour through text."""
    folded = fold_checked(model, make_params(), make_input())
    other = jax.tree.map(lambda leaf: jnp.cos(3 * leaf) + 1.0, make_params())
    before = snapshot(other)
    again = FoldPlan.from_json(folded.plan.to_json())
    assert again == folded.plan
    want = model(other, make_input())
    for center in (folded.plan.center, again.center, jax.jit(folded.plan.center)):
        new = center(other)
        assert relative_difference(center(new), new) < 1e-14, "centering is a projection"
        assert relative_difference(folded.apply(new, make_input()), want) < 1e-12
        assert relative_difference(model(new, make_input()), want) < 1e-12
    assert_identical(other, before)


# --- odd leaves ----------------------------------------------------------------------------------


def test_integer_and_complex_leaves_are_not_touched() -> None:
    def apply(p: Params, x: Array) -> tuple[Array, Array]:
        wave = jnp.fft.ifft(jnp.fft.fft(x, axis=1) * p["spectrum"], axis=1).real
        return model(p, x[:, p["order"]] + wave), p["count"] + 1

    rng = np.random.default_rng(2)
    params = {
        **make_params(),
        "order": jnp.asarray([3, 1, 4, 0, 2]),
        "spectrum": jnp.asarray(rng.normal(size=(1, T, 1)) + 1j * rng.normal(size=(1, T, 1))),
        "count": jnp.int32(3),
        "flag": jnp.asarray(True),
    }
    folded = fold_checked(apply, params, make_input())
    assert (folded.report.n_folded, folded.report.n_inserted) == (1, 0)
    untouched = ("order", "spectrum", "count", "flag")
    for name in untouched:
        assert_identical(folded.params[name], snapshot(params[name]))
    assert not any(name in edit.key_path for edit in folded.report.edits for name in untouched)


@pytest.mark.parametrize("kind", ["int8", "complex"])
def test_writer_that_cannot_be_edited(kind: str) -> None:
    """An integer kernel, or one in the complex plane, stays as it is."""

    def apply(p: Params, x: Array) -> Array:
        w = p["w"] * 0.1 if kind == "int8" else p["w"]
        return layer_norm((x @ w).real + p["b"]) @ p["v"]

    params = make_params()
    rng = np.random.default_rng(3)
    params["w"] = (
        jnp.asarray(rng.integers(-9, 12, (DIN, D)), jnp.int8)
        if kind == "int8"
        else params["w"] + 1j * jnp.asarray(rng.normal(size=(DIN, D)))
    )
    folded = fold_checked(apply, params, make_input())
    assert folded.report.n_folded <= 1
    if kind == "int8":
        assert_identical(folded.params["w"], snapshot(params["w"]))


NARROW = ["float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz", "float8_e8m0fnu", "float4_e2m1fn"]
NARROW += ["int4", "uint4"]


def of_dtype(x: Any, dtype: str, array: Callable[..., Any]) -> Any:
    return array(jnp.asarray(x).astype(dtype))


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
@pytest.mark.parametrize("dtype", NARROW)
def test_writer_with_no_digits_to_spare(dtype: str, array: Callable[..., Any]) -> None:
    """It is left as integers are, whoever is asked; next to it bfloat16 is edited."""

    def apply(p: Params, x: Array) -> Array:
        return model({**p, "w": p["w"].astype(x.dtype)}, x)

    params = {**make_params(), "w": of_dtype(make_params()["w"], dtype, array)}
    plan = jax_lnfold.plan_fold(apply, abstract(params), abstract(make_input()), fold_affine=True)
    assert (plan.edits, plan.scales, plan.affine) == ((), (), ())
    folded = fold_checked(apply, params, make_input())
    assert_identical(folded.params, snapshot(params))
    report = analyze(apply, abstract(params), abstract(make_input()))
    assert (report.n_folded, report.n_inserted) == (folded.report.n_folded, 0) == (0, 0)
    (norm,) = report.norms
    assert dtype in norm.reason or ("int" in dtype and "number types" in norm.reason)
    wide = {**params, "w": make_params()["w"].astype("bfloat16")}
    assert analyze(apply, wide, make_input()).n_folded == 1


@pytest.mark.parametrize("role", ["gate", "kernel behind", "kernel before", "bias behind"])
def test_merges_leave_what_has_no_digits_to_spare(role: str) -> None:
    """Scales and shifts, and what would take them up, as float8 and next to it as bfloat16."""

    def apply(p: Params, x: Array) -> Array:
        p = {name: leaf.astype(x.dtype) for name, leaf in p.items()}
        y = layer_norm(x @ p["kernel before"] * p["gate"]) * p["g"] + p["c"]
        return y @ p["kernel behind"] + p["bias behind"]

    rng = np.random.default_rng(6)
    shapes = {"kernel before": (DIN, D)} | dict.fromkeys(("gate", "g", "c"), (1, 1, D))
    shapes |= {"kernel behind": (D, OUT), "bias behind": (1, 1, OUT)}
    params = {name: jnp.asarray(rng.normal(0.6, 1.0, shape)) for name, shape in shapes.items()}
    for dtype in ("bfloat16", "float8_e4m3fn"):
        some = {**params, role: params[role].astype(dtype)}
        plan = jax_lnfold.plan_fold(apply, some, make_input(), fold_affine=True)
        touched = role in plan.leaf_edits()
        assert touched == (dtype == "bfloat16")
    folded = fold_checked(apply, some, make_input(), fold_affine=True)
    assert_identical(folded.params[role], snapshot(some[role]))


ROUNDINGS: dict[str, tuple[Callable[[Array], Array], Callable[[Array], Array]]] = {
    "conversions": (
        lambda x: x.astype(jnp.bfloat16).astype(x.dtype),
        lambda x: x.astype(jnp.float8_e4m3fn).astype(x.dtype),
    ),
    "reduced precision": (
        lambda x: jax.lax.reduce_precision(x, 8, 7),
        lambda x: jax.lax.reduce_precision(x, 4, 3),
    ),
}


PLACES = [(kind, what) for kind in ROUNDINGS for what in ("stream", "kernel", "scale")]


@pytest.mark.parametrize(("kind", "what"), [*PLACES, ("conversions", "gate")])
def test_rounding_to_a_few_digits_notices_every_edit(kind: str, what: str) -> None:
    """What is rounded to eight bits is another value once it is centered or scaled."""

    def apply(rounded: Callable[[Array], Array], p: Params, x: Array) -> Array:
        of = {name: rounded if name == what else lambda x: x for name in ("stream", "scale")}
        kernel, gate = (rounded(p[n]) if n == what else p[n] for n in ("kernel", "gate"))
        y = layer_norm(of["stream"]((x @ kernel) * gate)) * of["scale"](p["g"])
        return y @ p["v"]

    rng = np.random.default_rng(7)
    shapes = {"kernel": (DIN, D), "gate": (1, 1, D), "g": (1, 1, D), "v": (D, OUT)}
    params = {name: jnp.asarray(rng.normal(0.6, 1.0, shape)) for name, shape in shapes.items()}
    fine, coarse = (partial(apply, rounded) for rounded in ROUNDINGS[kind])
    before = jax_lnfold.plan_fold(fine, params, make_input(), fold_affine=True)
    after = fold_checked(coarse, params, make_input(), fold_affine=True).plan
    assert len(after.leaf_edits()) < len(before.leaf_edits()) == 4


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(value: float) -> None:
    """They spoil what they spoiled before, and nothing else."""

    def apply(p: Params, x: Array, ids: Array) -> dict[str, Array]:
        rows = layer_norm(p["table"][ids] + p["b"])
        return {"rows": rows @ p["v"], "columns": model(p, x)}

    params = make_params()
    params["table"] = jnp.asarray(np.random.default_rng(4).normal(size=(OUT, D)))
    params["table"] = params["table"].at[3, 2].set(value)
    params["w"] = params["w"].at[0, 1].set(value)
    ids = jnp.asarray([[0, 3, 1, 2, 6], [4, 5, 5, 2, 0]])
    x = make_input()
    folded = fold_checked(apply, params, x, ids)
    assert (folded.report.n_folded, folded.report.n_inserted) == (2, 0)
    rows = np.asarray(folded(x, ids)["rows"])
    bad = np.asarray(ids == 3)
    assert np.isnan(rows[bad]).all()
    assert np.isfinite(rows[~bad]).all()


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_mean_does_not_overflow_where_the_weights_do_not(array: Callable[..., Any]) -> None:
    largest = np.finfo(np.float16).max
    params = {name: array(np.asarray(leaf, np.float16)) for name, leaf in make_params().items()}
    signs = np.where(np.arange(D) < 3, -1, 1)
    params["w"] = array((0.5 * largest * signs * np.ones((DIN, 1))).astype(np.float16))
    folded = fold(model, params, make_input().astype(jnp.float16))
    assert folded.report.n_folded == 1
    want = 0.5 * float(largest) * (signs - signs.mean())
    assert relative_difference(folded.params["w"], np.tile(want, (DIN, 1))) < 1e-3


@pytest.mark.parametrize("kind", ["numpy", "read-only numpy", "jax", "mixed"])
def test_arrays_of_the_caller_are_not_changed(kind: str) -> None:
    params: Params = {name: np.array(leaf) for name, leaf in make_params().items()}
    if kind == "read-only numpy":
        for leaf in params.values():
            leaf.flags.writeable = False
    if kind in ("jax", "mixed"):
        params["w"] = jnp.asarray(params["w"])
    if kind == "jax":
        params = jax.tree.map(jnp.asarray, params)
    leaves = dict(params)
    folded = fold_checked(model, params, make_input())
    assert folded.report.n_folded == 1
    for name, leaf in leaves.items():
        assert params[name] is leaf
        assert isinstance(folded.params[name], np.ndarray) == isinstance(leaf, np.ndarray)


# --- nothing to do -------------------------------------------------------------------------------


def norm_of_the_input(p: Params, x: Array) -> Array:
    return layer_norm(x)


NOTHING: dict[str, tuple[Call, int]] = {
    "no norm": (lambda p, x: jax.nn.gelu(x @ p["w"] + p["b"]) @ p["v"], 0),
    "norm of the input": (norm_of_the_input, 1),
    "no use of params": (lambda p, x: jnp.sin(x), 0),
    "constant": (lambda p, x: jnp.ones(3), 0),
}


@pytest.mark.parametrize(("apply_fn", "norms"), NOTHING.values(), ids=NOTHING)
def test_nothing_to_fold(apply_fn: Callable[..., Any], norms: int) -> None:
    params = make_params()
    folded = fold_checked(apply_fn, params, make_input())
    report = folded.report
    assert (report.n_folded, report.n_inserted, report.edits) == (0, 0, ())
    assert len(report.norms) == norms
    assert_identical(folded.params, snapshot(params))
    assert "LayerNorm" in str(report)


@pytest.mark.parametrize("params", [{}, None, ()], ids=repr)
def test_params_without_leaves(params: Any) -> None:
    folded = fold_checked(norm_of_the_input, params, make_input())
    assert folded.report.n_folded == 0
    assert folded.params == params


# --- shapes at the edge --------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2])
def test_few_features(width: int) -> None:
    """Over one feature the mean is the value itself: zero times infinity must not appear."""

    def apply(p: Params, x: Array) -> Array:
        s = layer_norm(x @ p["w"][:, :width] + p["b"][..., :width])
        return (s + 1.0) @ p["v"][:width]

    folded = fold_checked(apply, make_params(), make_input())
    assert folded.report.n_inserted == 0
    assert np.isfinite(np.asarray(folded(make_input()))).all()


@pytest.mark.parametrize("shape", [(0, T, DIN), (B, 0, DIN), (1, 1, DIN)], ids=str)
def test_no_tokens_or_one(shape: tuple[int, ...]) -> None:
    folded = fold_checked(model, make_params(), make_input(*shape))
    assert folded.report.n_folded == 1 or 0 in shape  # no element, no cost
    check_contracts(model, make_params(), folded, make_input())


def test_scalars_and_python_numbers_as_leaves() -> None:
    def apply(p: Params, x: Array) -> Array:
        return model(p, x * p["gain"]) * p["temperature"]

    params = {**make_params(), "gain": 2.0, "temperature": jnp.asarray(0.5)}
    x = make_input()
    folded = fold(apply, params, x)
    assert folded.report.n_folded == 1
    assert params["gain"] == 2.0
    assert relative_difference(folded.apply(folded.params, x), apply(params, x)) < 1e-12
    assert relative_difference(apply(folded.params, x), apply(params, x)) < 1e-12
