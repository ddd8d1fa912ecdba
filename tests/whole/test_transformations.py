"""A folded function under everything that JAX does to functions: derive, batch, export, share."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export, lax
from jax.experimental import checkify, io_callback
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import jax_lnfold
from jax_lnfold import TraceError, TreeError
from tests.helpers.contracts import (
    assert_drop_in,
    assert_identical,
    check_contracts,
    count_equations,
    count_reductions,
    counts,
    fold_checked,
    iter_equations,
    relative_difference,
    snapshot,
)
from tests.helpers.derivative_rules import with_jvp, with_vjp
from tests.models.zoo import BY_NAME, perturb

Array = jax.Array
Params = Any
Norm = Callable[[Array], Array]
ApplyFn = Callable[..., Any]

B, T, IN, H, HD, HID, L = 2, 5, 7, 3, 6, 20, 4  # all sizes differ, and so do their products
D = H * HD
EPS = 1e-5
EXACT, CLOSE, WRONG = 1e-12, 1e-10, 1e-3


def draw(seed: int, *shape: int) -> Array:
    """Numbers whose means are far from zero."""
    return jnp.asarray(np.random.default_rng(seed).normal(0.2, 0.5, shape))


def layer_norm(s: Array) -> Array:
    return jax.nn.standardize(s, epsilon=EPS)


def rms_norm(s: Array) -> Array:
    return s * lax.rsqrt(jnp.mean(jnp.square(s), -1, keepdims=True) + EPS)


# --- the models ----------------------------------------------------------------------------------


def block(s: Array, w: Params, norm: Norm) -> Array:
    h = norm(s) * w["g1"] + w["c1"]
    q, k, v = (jnp.einsum("btd,dhk->bthk", h, w[name]) for name in "qkv")
    weights = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k))
    s = s + jnp.einsum("bhts,bshk,hkd->btd", weights, v, w["o"]) + w["b1"]
    return mlp(s, w, norm)


def mlp(s: Array, w: Params, norm: Norm) -> Array:
    h = norm(s) * w["g2"] + w["c2"]
    return s + jax.nn.gelu(h @ w["up"]) @ w["down"] + w["b2"]


def unrolled(p: Params, x: Array, norm: Norm = layer_norm) -> Array:
    s = x @ p["embed"] + p["bias"]
    for w in p["blocks"]:
        s = block(s, w, norm)
    return norm(s) @ p["head"]


def scanned(p: Params, x: Array, norm: Norm = layer_norm) -> Array:
    s = x @ p["embed"] + p["bias"]
    s, _ = lax.scan(lambda s, w: (mlp(s, w, norm), None), s, p["blocks"])
    return norm(s) @ p["head"]


def single(p: Params, x: Array, norm: Norm = layer_norm) -> Array:
    s = x @ p["embed"] + p["bias"]
    return norm(s + jnp.tanh(norm(s) * p["gain"]) @ p["down"]) @ p["head"]


def tiny(p: Params, x: Array, norm: Norm = layer_norm) -> Array:
    return norm(x @ p["embed"]) @ p["head"]


MLP = {"g2": (D,), "c2": (D,), "up": (D, HID), "down": (HID, D), "b2": (D,)}
BLOCK = {
    **MLP,
    **dict.fromkeys(("g1", "c1", "b1"), (D,)),
    **dict.fromkeys("qkv", (D, H, HD)),
    "o": (H, HD, D),
}
ENDS = {"embed": (IN, D), "bias": (D,), "head": (D, IN)}
TINY = {"embed": draw(1, IN, D), "head": draw(2, D, IN)}
X, LONGER = draw(3, B, T, IN), draw(4, B + 1, T + 4, IN)


def beside(read: Norm) -> ApplyFn:
    """What is read of one stream, and a LayerNorm of another."""
    return lambda p, x: (read(x @ p["first"]) + layer_norm(x @ p["embed"])) @ p["head"]


def tree(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Array]:
    return {name: draw(seed + i, *shape) for i, (name, shape) in enumerate(shapes.items())}


class Model(NamedTuple):
    """A function that takes the norm as its third argument, and its fold."""

    apply: ApplyFn
    params: Params
    folded: jax_lnfold.Folded
    norms: int


def make_params(name: str) -> Params:
    ends = tree(ENDS, 10)
    if name == "unrolled":
        return {**ends, "blocks": [tree(BLOCK, 20), tree(BLOCK, 40)]}
    if name == "scanned":
        return {**ends, "blocks": tree({key: (L, *shape) for key, shape in MLP.items()}, 60)}
    return {**ends, **tree({"gain": (D,), "down": (D, D)}, 80)}


# name: (function, LayerNorms of the program, parameters that write into the stream)
MODELS = {"unrolled": (unrolled, 5, 10), "scanned": (scanned, 2, 4), "single": (single, 2, 3)}


@cache
def make_model(name: str) -> Model:
    apply, norms, edits = MODELS[name]
    params = make_params(name)
    folded = fold_checked(apply, params, X)
    report = folded.report
    assert counts(report) == (norms, norms, 0)
    assert len(report.edits) == edits
    return Model(apply, params, folded, norms)


@pytest.fixture(params=["unrolled", "scanned"])
def model(request: pytest.FixtureRequest) -> Model:
    return make_model(request.param)


@pytest.fixture
def small() -> Model:
    """The model that compiles faster."""
    return make_model("single")


def agree(*results: Any, within: float = EXACT) -> bool:
    """Whether all results equal the first one."""
    return all(relative_difference(r, results[0]) <= within for r in results[1:])


# --- transformations of the function -------------------------------------------------------------


def loss(f: ApplyFn, p: Params, x: Array) -> Array:
    return jnp.sum(jnp.sin(f(p, x)))


def tangent(x: Array) -> Array:
    return jnp.cos(7 * x)


def several(x: Array) -> Array:
    return jnp.stack([x, 2 * x, jnp.flip(x, 1)])


def jvp(f: ApplyFn) -> ApplyFn:
    return lambda p, x: jax.jvp(partial(f, p), (x,), (tangent(x),))


def linearize(f: ApplyFn) -> ApplyFn:
    def run(p: Params, x: Array) -> Any:
        y, linear = jax.linearize(partial(f, p), x)
        return y, linear(tangent(x))

    return run


def vjp(f: ApplyFn) -> ApplyFn:
    def run(p: Params, x: Array) -> Any:
        y, back = jax.vjp(partial(f, p), x)
        return y, back(tangent(y))

    return run


def grad(f: ApplyFn) -> ApplyFn:
    return jax.grad(partial(loss, f), argnums=1)


def recurrent(f: ApplyFn) -> ApplyFn:
    """The output is the next input."""
    return lambda p, x: lax.scan(lambda x, c: (f(p, x) * c, x.sum()), x, jnp.array([1.0, 0.3]))


Transform = Callable[[ApplyFn], ApplyFn]
VALUES: dict[str, Transform] = {
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "vmap": lambda f: lambda p, x: jax.vmap(f, (None, 0))(p, several(x)),
    "vmap over the last axis": lambda f: (
        lambda p, x: jax.vmap(f, (None, -1), -1)(p, jnp.moveaxis(several(x), 0, -1))
    ),
    "map": lambda f: lambda p, x: lax.map(partial(f, p), several(x)),
    "scan": recurrent,
    "fori_loop": lambda f: lambda p, x: lax.fori_loop(0, 2, lambda i, x: f(p, x) + i, x),
    "cond": lambda f: lambda p, x: lax.cond(x[0, 0, 0] > 0, f, lambda p, x: -x, p, x),
}
# name: (transformation, how many sums over the features each mean causes in it)
TRANSFORMS: dict[str, tuple[Transform, int]] = {
    **{name: (transform, 1) for name, transform in VALUES.items()},
    "jvp": (jvp, 2),
    "linearize": (linearize, 2),
    "vjp": (vjp, 2),
    "grad": (grad, 2),
    "grad of checkpoint": (lambda f: grad(jax.checkpoint(f)), 3),
    "grad of checkpoint that saves products": (
        lambda f: grad(jax.checkpoint(f, policy=jax.checkpoint_policies.dots_saveable)),
        3,
    ),
    "gradient of each example": (
        lambda f: lambda p, x: jax.vmap(grad(f), (None, 0))(p, several(x)),
        2,
    ),
    "grad of scan": (lambda f: grad(lambda p, x: recurrent(f)(p, x)[0]), 2),
    "jvp of grad": (lambda f: lambda p, x: jax.jvp(partial(grad(f), p), (x,), (tangent(x),)), 4),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transformed_functions_are_equal(name: str, small: Model) -> None:
    (transform, _), edited = TRANSFORMS[name], small.folded.params
    original, folded = (jax.jit(transform(f)) for f in (small.apply, small.folded.apply))
    want = original(small.params, X)
    assert agree(want, folded(edited, X), original(edited, X), within=CLOSE)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transformed_program_is_that_of_the_rms_norm_model(name: str, model: Model) -> None:
    transform, sums = TRANSFORMS[name]
    rms_norm_model = partial(model.apply, norm=rms_norm)
    before, after, wanted = (
        count_reductions(transform(f), model.params, X, sizes=D)
        for f in (model.apply, model.folded.apply, rms_norm_model)
    )
    assert after == wanted
    assert before - after == sums * model.norms


def test_rms_norm_model_needs_the_edited_parameters(small: Model) -> None:
    apply, params, folded = small.apply, small.params, small.folded
    want = apply(params, X)
    assert agree(want, apply(folded.params, X, rms_norm))
    assert relative_difference(apply(params, X, rms_norm), want) > WRONG
    assert relative_difference(folded.apply(params, X), want) > WRONG
    assert "unedited" in (jax_lnfold.Folded.apply.__doc__ or "")


@pytest.mark.parametrize("name", VALUES)
def test_transformed_functions_fold_by_the_same_plan(name: str, model: Model) -> None:
    folded = jax_lnfold.fold(VALUES[name](model.apply), model.params, X)
    assert folded.plan == model.folded.plan
    assert (len(folded.report.norms), folded.report.n_folded) == (model.norms, model.norms)


@pytest.mark.parametrize("transform", [jvp, vjp, grad], ids=lambda f: f.__name__)
def test_derivatives_can_be_folded(transform: Transform, small: Model) -> None:
    fold_checked(jax.jit(transform(small.apply)), small.params, X, rtol=CLOSE)


def test_hessians_of_one_norm() -> None:
    folded = fold_checked(tiny, TINY, X)
    few = X[:1, :2]

    def hessian(f: ApplyFn, p: Params) -> Array:
        return jax.jit(jax.hessian(partial(loss, f), 1))(p, few)

    want = hessian(tiny, TINY)
    assert agree(want, hessian(folded.apply, folded.params), within=CLOSE)


def test_operation_by_operation_without_jit() -> None:
    folded = fold_checked(tiny, TINY, X)
    with jax.disable_jit():
        check_contracts(tiny, TINY, folded, X)
        check_contracts(tiny, TINY, folded, LONGER)


# --- derivatives with respect to parameters ------------------------------------------------------


def through_plan(model: Model, p: Params) -> Any:
    return model.folded.apply(model.folded.plan.center(p), X)


def test_tangents_of_parameters(small: Model) -> None:
    """`center` is linear, so tangents go through it as the parameters do."""
    params, folded = small.params, small.folded
    direction = jax.tree.map(tangent, params)

    def moves(f: ApplyFn) -> ApplyFn:
        """Three ways to the derivative."""

        def run(p: Params, t: Params) -> Any:
            value, linear = jax.linearize(f, p)
            back = jax.vjp(f, p)[1](tangent(value))
            return jax.jvp(f, (p,), (t,)), linear(t), back

        return jax.jit(run)

    original = moves(lambda p: small.apply(p, X))
    want, through = (f(params, direction) for f in (original, moves(partial(through_plan, small))))
    assert agree(want, through, within=CLOSE)
    plain = moves(lambda p: folded.apply(p, X))
    centered = plain(folded.params, folded.plan.center(direction))
    assert agree(want[:2], centered[:2], within=CLOSE)
    assert agree(want[2], (folded.plan.center(centered[2][0]),), within=CLOSE)
    assert relative_difference(plain(folded.params, direction)[:2], want[:2]) > WRONG


def test_gradients_of_parameters(model: Model) -> None:
    """`center` is its own transpose: a gradient of the folded model has to be centered once."""
    params, folded, plan = model.params, model.folded, model.folded.plan
    gradient, of_folded = (jax.jit(jax.grad(partial(loss, f))) for f in (model.apply, folded.apply))
    want, raw = gradient(params, X), of_folded(folded.params, X)
    assert agree(want, plan.center(raw), gradient(folded.params, X), within=CLOSE)
    flat, _ = jax.tree_util.tree_flatten_with_path(want)
    differing = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for (path, leaf), other in zip(flat, jax.tree.leaves(raw), strict=True)
        if relative_difference(other, leaf) > CLOSE
    }
    assert differing == {edit.key_path for edit in plan.edits}


# --- ensembles -----------------------------------------------------------------------------------


def ensemble(params: Params) -> Params:
    trees = [params, *(perturb(params, seed) for seed in (1, 2))]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def test_vmap_over_an_ensemble_of_parameters(small: Model) -> None:
    members, plan = ensemble(small.params), small.folded.plan
    before = snapshot(members)
    with pytest.raises(TreeError, match="shape"):
        plan.center(members)
    centered = jax.vmap(plan.center)(members)
    assert_drop_in(centered, members)
    for i in range(3):
        one, of_one = (jax.tree.map(lambda leaf, i=i: leaf[i], t) for t in (centered, members))
        assert agree(plan.center(of_one), one, within=1e-14)
    for axes, x in (((0, None), X), ((0, 0), several(X))):
        functions = small.apply, small.folded.apply
        original, folded = (jax.jit(jax.vmap(f, axes)) for f in functions)
        assert agree(original(members, x), folded(centered, x), original(centered, x))
    assert_identical(members, before)


def test_ensemble_is_a_model_too(model: Model) -> None:
    """Folded as a whole: every edit moves along by the new leading axis."""
    report = fold_checked(
        jax.jit(jax.vmap(model.apply, (0, None))), ensemble(model.params), X
    ).report
    assert counts(report) == (model.norms, model.norms, 0)
    want = {e.key_path: tuple(a + 1 for a in e.axes) for e in model.folded.report.edits}
    assert {e.key_path: e.axes for e in report.edits} == want


# --- ahead of time -------------------------------------------------------------------------------


def abstract(tree: Any, dtype: Any = None) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype), tree)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shapes_and_dtypes_are_those_of_the_original(dtype: str, model: Model) -> None:
    for p_type, x_type in ((dtype, dtype), (dtype, "float64"), ("float64", dtype)):
        args = abstract(model.params, p_type), abstract(LONGER, x_type)
        assert jax.eval_shape(model.folded.apply, *args) == jax.eval_shape(model.apply, *args)


def test_analysis_of_an_evaluated_shape() -> None:
    shapes = jax.eval_shape(lambda: (make_params("scanned"), X))
    report = jax_lnfold.analyze(scanned, *shapes)
    assert report == jax_lnfold.analyze(scanned, make_params("scanned"), X)
    assert (report.n_folded, report.n_inserted, len(report.edits)) == (2, 0, 4)


def test_compiled_ahead_of_time(model: Model) -> None:
    args = abstract((model.params, LONGER))
    original, folded = (
        jax.jit(f).lower(*args).compile() for f in (model.apply, model.folded.apply)
    )
    edited = model.folded.params
    want = original(model.params, LONGER)
    assert agree(want, folded(edited, LONGER), original(edited, LONGER))
    before, after = original.cost_analysis(), folded.cost_analysis()
    tokens = LONGER.shape[0] * LONGER.shape[1]
    assert before["flops"] - after["flops"] >= model.norms * tokens * D
    assert after["transcendentals"] == before["transcendentals"]


def test_donated_input_is_reused(small: Model) -> None:
    x = jnp.copy(X)
    y = jax.jit(small.folded.apply, donate_argnums=1)(small.folded.params, x)
    assert x.is_deleted()
    assert agree(small.apply(small.params, X), y)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(small.folded.params))


# --- export with symbolic dimensions -------------------------------------------------------------


def symbolic(*dims: str, like: tuple[Any, ...] = (X,)) -> list[jax.ShapeDtypeStruct]:
    scope = export.SymbolicScope()
    return [
        jax.ShapeDtypeStruct(export.symbolic_shape(d, scope=scope), x.dtype)
        for d, x in zip(dims, like, strict=True)
    ]


def reload(exported: export.Exported, vjp_order: int = 0) -> export.Exported:
    return export.deserialize(exported.serialize(vjp_order=vjp_order))


def test_export_with_symbolic_batch_and_sequence(model: Model) -> None:
    args = abstract(model.params), *symbolic(f"b, t, {IN}")
    exported = reload(export.export(jax.jit(model.folded.apply))(*args))
    assert str(exported.out_avals) == str(export.export(jax.jit(model.apply))(*args).out_avals)
    original = jax.jit(model.apply)
    for x in (X, LONGER):
        assert agree(original(model.params, x), exported.call(model.folded.params, x))
    counts = [
        count_reductions(model.folded.apply, model.params, x, sizes=D) for x in (args[1], LONGER)
    ]
    assert counts == [model.norms, model.norms]


def test_export_with_gradients_for_other_platforms(small: Model) -> None:
    args = abstract(small.params), *symbolic(f"b, t, {IN}")
    platforms = ("cpu", "cuda", "tpu")
    exported = export.export(jax.jit(small.folded.apply), platforms=platforms)(*args)
    again = reload(exported, vjp_order=1)
    assert again.platforms == platforms
    want, got = (
        jax.jit(jax.grad(partial(loss, f), (0, 1)))(p, LONGER)
        for f, p in ((small.apply, small.params), (again.call, small.folded.params))
    )
    assert agree(want, (small.folded.plan.center(got[0]), got[1]), within=CLOSE)


def test_symbolic_example_makes_the_same_plan(model: Model) -> None:
    folded = jax_lnfold.fold(model.apply, model.params, *symbolic(f"b, t, {IN}"))
    assert folded.plan == model.folded.plan
    assert_identical(folded.params, snapshot(model.folded.params))


EXPORTS: dict[str, tuple[str, ...]] = {
    "vit": ("b, 8, 12, 3",),
    "mae": ("b, 8, 12, 3", "b, kept"),
    "whisper_decoder": ("b, t", "b, s, 24"),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_architectures_are_exported_with_symbolic_dimensions(name: str) -> None:
    case = BY_NAME[name]
    built = case.build()
    folded = jax_lnfold.fold(built.apply_fn, built.params, *built.inputs)
    assert (folded.report.n_folded, folded.report.n_inserted) == (case.folded, case.inserted)
    inputs = symbolic(*EXPORTS[name], like=built.inputs)
    counts = [
        count_equations("reduce_sum", folded.apply, built.params, *some)
        for some in (inputs, built.inputs)
    ]
    assert counts[0] == counts[1]
    exported = reload(export.export(jax.jit(folded.apply))(abstract(built.params), *inputs))
    want = jax.jit(built.apply_fn)(built.params, *built.other_inputs)
    assert agree(want, exported.call(folded.params, *built.other_inputs))


def pooled(s: Array) -> Array:
    return lax.reduce_window(s, 0.0, lax.add, (1, 2, 1), (1, 1, 1), "SAME")


def running(s: Array) -> Array:
    """A linear recurrence over the tokens."""
    first = jnp.zeros_like(s[:, 0])
    _, states = lax.scan(lambda h, v: (0.5 * h + v,) * 2, first, jnp.moveaxis(s, 1, 0))
    return jnp.moveaxis(states, 0, 1)


# Linear along the tokens, with one weight for all features: a zero mean stays one.
ALONG_TOKENS: dict[str, Callable[[Params, Array], Array]] = {
    "all": lambda p, s: s,
    "class token": lambda p, s: jnp.concatenate(
        [jnp.broadcast_to(p["first"], (s.shape[0], 1, D)), s], axis=1
    ),
    "padded": lambda p, s: jnp.pad(s, ((0, 0), (1, 2), (0, 0))),
    "without the first": lambda p, s: s[:, 1:],
    "last": lambda p, s: s[:, -1],
    "rolled": lambda p, s: jnp.roll(s, 1, axis=1),
    "twice": lambda p, s: jnp.concatenate([s, s], axis=1),
    "repeated": lambda p, s: jnp.repeat(s, 2, axis=1),
    "running sum": lambda p, s: jnp.cumsum(s, 1),
    "merged with the batch": lambda p, s: s.reshape(-1, D),
    "masked": lambda p, s: jnp.where(jnp.arange(s.shape[1])[:, None] < 3, s, 0.0),
    "sorted": lambda p, s: jnp.take_along_axis(
        s, jnp.broadcast_to(jnp.arange(s.shape[1])[::-1, None], (s.shape[0], s.shape[1], 1)), 1
    ),
    "with positions": lambda p, s: s + p["table"][jnp.arange(s.shape[1])],
    "mixed": lambda p, s: jnp.einsum("ts,bsd->btd", jnp.tri(s.shape[1]), s),
    "pooled": lambda p, s: pooled(s),
    "recurrence": lambda p, s: running(s),
    "map": lambda p, s: lax.map(lambda row: 2 * row, jnp.moveaxis(s, 1, 0)),
    "loop": lambda p, s: lax.fori_loop(0, s.shape[1], lambda i, s: 0.5 * s + 0.1 * s, s),
}


@pytest.mark.parametrize("name", ALONG_TOKENS)
def test_symbolic_tokens(name: str) -> None:
    def apply(p: Params, x: Array) -> Array:
        return layer_norm(ALONG_TOKENS[name](p, x @ p["embed"])) @ p["head"]

    params = {**TINY, "first": draw(6, D), "table": draw(7, 40, D)}
    folded = jax_lnfold.fold(apply, params, X)
    assert counts(folded.report) == (1, 1, 0)
    (x,) = symbolic(f"b, t, {IN}")
    assert count_reductions(apply, params, x, sizes=D) == 2
    assert count_reductions(folded.apply, params, x, sizes=D) == 1
    assert jax_lnfold.fold(apply, params, x).plan == folded.plan


def test_norm_in_a_loop_of_symbolic_length() -> None:
    def apply(p: Params, x: Array) -> Array:
        def row(values: Array) -> Array:
            return layer_norm(jnp.tanh(values @ p["first"])) + layer_norm(values @ p["embed"])

        return lax.map(row, jnp.swapaxes(x, 0, 1)) @ p["head"]

    params = {**TINY, "first": draw(6, IN, D)}
    concrete = fold_checked(jax.jit(apply), params, X)
    (x,) = symbolic(f"b, t, {IN}")
    folded = jax_lnfold.fold(apply, params, x)
    assert folded.plan == concrete.plan
    for report in (concrete.report, folded.report):
        assert [norm.folded for norm in report.norms] == [False, True]
        assert [edit.key_path for edit in report.edits] == ["embed"]
    assert [norm.count for norm in folded.report.norms] == [1, 1]
    assert count_reductions(concrete.apply, params, x, sizes=D) == 3


# --- devices -------------------------------------------------------------------------------------

ROWS, EVERYWHERE = PartitionSpec("data"), PartitionSpec()
BATCH = draw(8, 16, T, IN)


def gelu_start(p: Params, x: Array) -> Array:
    """The stream starts at a GELU, which is worth an explicit centering."""
    s = jax.nn.gelu(x @ p["embed"] + p["bias"])
    s, _ = lax.scan(lambda s, w: (mlp(s, w, layer_norm), None), s, p["blocks"])
    return layer_norm(s) @ p["head"]


def devices(*axis_types: AxisType) -> Mesh:
    return Mesh(np.array(jax.devices()), ("data",), axis_types=axis_types or None)


def data_parallel(f: ApplyFn, out: Any = ROWS, **options: Any) -> ApplyFn:
    specs = {"in_specs": (EVERYWHERE, ROWS), "out_specs": out}
    return jax.jit(jax.shard_map(f, mesh=devices(), **specs, **options))


class Spread(NamedTuple):
    """A model that is computed on several devices, its fold, and the centerings inserted."""

    apply: ApplyFn
    params: Params
    folded: jax_lnfold.Folded
    inserted: int

    @property
    def both(self) -> tuple[ApplyFn, ApplyFn]:
        return self.apply, self.folded.apply


def check_shard_map(m: Spread, check_vma: bool = True) -> None:
    """Replicated parameters, and a batch in eight parts."""
    want, edited = m.apply(m.params, BATCH), m.folded.params
    original, got = (data_parallel(f, check_vma=check_vma) for f in m.both)
    assert agree(want, got(edited, BATCH), original(edited, BATCH))
    counts = [count_reductions(f, m.params, BATCH, sizes=D) for f in (original, got)]
    assert counts == [4, 2 + m.inserted]


def check_shard_map_without_types(m: Spread) -> None:
    """Where JAX does not track what is replicated."""
    check_shard_map(m, check_vma=False)


def check_gradients(m: Spread) -> None:
    """Every device adds the gradient of its part."""

    def total(f: ApplyFn) -> ApplyFn:
        def local(p: Params, x: Array) -> Params:
            return lax.psum(jax.grad(partial(loss, f))(p, x), "data")

        return data_parallel(local, EVERYWHERE, check_vma=False)

    want = jax.jit(jax.grad(partial(loss, m.apply)))(m.params, BATCH)
    assert agree(want, total(m.apply)(m.params, BATCH), within=CLOSE)
    got = m.folded.plan.center(total(m.folded.apply)(m.folded.params, BATCH))
    assert agree(want, got, within=CLOSE)


def check_equal_local_shapes(m: Spread) -> None:
    """A part of the batch and replicated inputs of its shape are two programs."""
    same = jnp.ones_like(BATCH[:2])
    original, run = (
        data_parallel(lambda p, x, f=f: (f(p, x), f(p, same)), (ROWS, EVERYWHERE)) for f in m.both
    )
    assert agree(original(m.params, BATCH), run(m.folded.params, BATCH))


def check_compiler_partitions(m: Spread) -> None:
    """Sharded inputs of a jitted function: no device asks another one for anything."""
    placed = jax.device_put(BATCH, NamedSharding(devices(), ROWS))
    compiled = jax.jit(m.folded.apply).lower(m.folded.params, placed).compile()
    text = compiled.as_text()
    assert not any(kind in text for kind in ("all-reduce", "all-gather", "all-to-all", "permute("))
    got = compiled(m.folded.params, placed)
    assert agree(m.apply(m.params, BATCH), got)
    assert got.sharding.is_equivalent_to(placed.sharding, got.ndim)


def check_sharding_in_types(m: Spread) -> None:
    mesh = devices(AxisType.Explicit)
    with jax.set_mesh(mesh):
        x = jax.device_put(BATCH, NamedSharding(mesh, ROWS))
        trees = (
            jax.device_put(t, NamedSharding(mesh, EVERYWHERE)) for t in (m.params, m.folded.params)
        )
        want, got = (jax.jit(f)(p, x) for f, p in zip(m.both, trees, strict=True))
        assert jax.typeof(got) == jax.typeof(want)
    assert agree(m.apply(m.params, BATCH), want, got)


def check_fold_of_a_sharded_function(m: Spread) -> None:
    """The plan is that of the whole batch."""
    for check_vma in (False, True):
        again = fold_checked(data_parallel(m.apply, check_vma=check_vma), m.params, BATCH)
        assert again.plan == m.folded.plan
        assert (again.report.n_folded, again.report.n_inserted) == (2, m.inserted)


DEVICE_CHECKS = {
    f"{check.__name__.removeprefix('check_')}-{apply.__name__}": (check, apply, inserted)
    for check, apply, inserted in (
        (check_shard_map, scanned, 0),
        (check_shard_map, gelu_start, 1),
        (check_shard_map_without_types, gelu_start, 1),
        (check_gradients, single, 0),
        (check_equal_local_shapes, single, 0),
        (check_compiler_partitions, single, 0),
        (check_sharding_in_types, scanned, 0),
        (check_sharding_in_types, gelu_start, 1),
        (check_fold_of_a_sharded_function, single, 0),
    )
}


@pytest.mark.parametrize("name", DEVICE_CHECKS)
def test_eight_devices(name: str) -> None:
    assert len(jax.devices()) == 8
    check, apply, inserted = DEVICE_CHECKS[name]
    params = make_params("single" if apply is single else "scanned")
    folded = jax_lnfold.fold(apply, params, BATCH)
    assert counts(folded.report) == (2, 2, inserted)
    check(Spread(apply, params, folded, inserted))


# --- training and checkpoints --------------------------------------------------------------------

OPTIMIZER = optax.adam(1e-2)
TARGET = draw(9, B, T, IN)


def train(f: ApplyFn, params: Params, after: Callable[[Params], Params] = lambda p: p) -> Params:
    """Three steps of Adam on ``f(params, X)``."""

    @jax.jit
    def step(params: Params, state: Any) -> Any:
        gradients = jax.grad(lambda p: jnp.mean((f(p, X) - TARGET) ** 2))(params)
        updates, state = OPTIMIZER.update(gradients, state, params)
        return after(optax.apply_updates(params, updates)), state

    state = OPTIMIZER.init(params)
    for _ in range(3):
        params, state = step(params, state)
    return params


def error(p: Params, f: ApplyFn) -> float:
    return float(jnp.mean((f(p, X) - TARGET) ** 2))


def test_training_the_folded_model(small: Model) -> None:
    """Adam leaves the centered parameters, so they are centered after each of its steps."""
    apply, folded = small.apply, small.folded
    trained = train(folded.apply, folded.params, folded.plan.center)
    assert agree(trained, folded.plan.center(trained), within=1e-14)
    assert agree(apply(trained, X), folded.apply(trained, X))
    assert error(trained, apply) < 0.9 * error(folded.params, apply)
    astray = train(folded.apply, folded.params)
    assert relative_difference(folded.apply(astray, X), apply(astray, X)) > WRONG
    assert error(astray, folded.apply) < 0.9 * error(folded.params, folded.apply)


# --- when the function is traced -----------------------------------------------------------------


def test_a_thousand_calls_trace_the_function_twice() -> None:
    chex.clear_trace_counter()
    folded = jax_lnfold.fold(chex.assert_max_traces(tiny, n=2), TINY, X)
    want = tiny(TINY, X), tiny(TINY, LONGER)
    for _ in range(500):
        got = folded.apply(folded.params, X), folded.apply(folded.params, LONGER)
    assert agree(want, got)
    jitted = jax.jit(folded.apply)
    assert agree(want, (jitted(folded.params, X), jitted(folded.params, LONGER)))
    for other in (X[:, 1:], X.astype(jnp.float32)):
        with pytest.raises(TraceError, match="traced > 2 times"):
            folded.apply(folded.params, other)


@pytest.mark.parametrize("transform", [jax.jit, jax.vmap, jax.checkpoint], ids=lambda f: f.__name__)
def test_first_call_inside_a_transformation(transform: Transform) -> None:
    """What the first call finds out stays valid after the trace around it has ended."""
    folded = jax_lnfold.fold(tiny, TINY)
    assert agree(tiny(TINY, X), transform(lambda x: folded(x))(X))
    check_contracts(tiny, TINY, folded, X)


def test_fold_inside_jit() -> None:
    """The function closes over a value that is being traced."""

    @jax.jit
    def run(p: Params, gain: Array, x: Array) -> tuple[Array, Array]:
        folded = jax_lnfold.fold(lambda p, x: gain * tiny(p, x), p, x)
        assert folded.report.n_folded == 1
        return folded(x), folded.apply(folded.params, x[:1])

    want = 2.0 * tiny(TINY, X)
    assert agree((want, want[:1]), run(TINY, 2.0, X))


def random_gain(p: Params, x: Array) -> Array:
    return tiny(p, x) * jax.random.normal(jax.random.key(0), (B, T, 1))


@pytest.mark.parametrize(
    "context",
    [partial(jax.default_matmul_precision, "highest"), partial(jax.default_prng_impl, "rbg")],
    ids=["matmul precision", "random generator"],
)
def test_settings_that_change_the_trace(context: Callable[[], Any]) -> None:
    """A program that was traced under other settings is not used again."""
    folded = fold_checked(random_gain, TINY, X)
    before = random_gain(TINY, X)
    with context():
        assert agree(random_gain(TINY, X), folded(X))
        precisions = [
            [
                e.params["precision"]
                for e in iter_equations(jax.make_jaxpr(f)(TINY, X))
                if e.primitive.name == "dot_general"
            ]
            for f in (random_gain, folded.apply)
        ]
        assert precisions[0] == precisions[1]
    assert agree(before, folded(X))


# --- effects -------------------------------------------------------------------------------------

Calls = list[np.ndarray]
Watch = Callable[[Calls, Array], Array]


def watch_debug(calls: Calls, seen: Array) -> Array:
    jax.debug.callback(lambda v: calls.append(np.array(v)), seen)
    return jnp.zeros(())


def watch_ordered(calls: Calls, seen: Array) -> Array:
    io_callback(lambda v: calls.append(np.array(v)), None, seen, ordered=True)
    return jnp.zeros(())


def on_host(call: Callable[..., Array]) -> Watch:
    def host_sum(calls: Calls, v: Array) -> np.ndarray:
        calls.append(np.array(v))
        return np.tanh(np.sum(v))

    return lambda calls, seen: call(
        partial(host_sum, calls), jax.ShapeDtypeStruct((), seen.dtype), seen
    )


# name: (callback, its primitive)
WATCHES: dict[str, tuple[Watch, str]] = {
    "debug.callback": (watch_debug, "debug_callback"),
    "ordered io_callback": (watch_ordered, "io_callback"),
    "io_callback": (on_host(io_callback), "io_callback"),
    "pure_callback": (on_host(jax.pure_callback), "pure_callback"),
}
# What the callback reads of a stream and its norm, and whether a shift of the stream changes it.
SEEN: dict[str, tuple[Callable[[Array, Array], Array], bool]] = {
    "stream": (lambda s, normed: s, True),
    "mean": (lambda s, normed: s.mean(-1), True),
    "normalised": (lambda s, normed: normed, False),
    "variance": (lambda s, normed: s.var(-1), False),
}


def two_towers(p: Params, x: Array, watch: Callable[[Array, Array], Array]) -> Array:
    """The callback reads the first of two streams."""
    first, second = x @ p["first"], x @ p["embed"]
    normed = layer_norm(first)
    return (normed * (1 + watch(first, normed)) + layer_norm(second)) @ p["head"]


TOWERS = {**TINY, "first": draw(11, IN, D)}
EDITED = {False: {"embed", "first"}, True: {"embed"}}


def recorded(calls: Calls, f: ApplyFn, p: Params) -> tuple[Any, Calls]:
    """The result of ``f(p, X)`` and what the callbacks saw."""
    calls.clear()
    y = jax.block_until_ready(f(p, X))
    jax.effects_barrier()
    return y, sorted(calls, key=lambda v: float(np.sum(np.cos(v))))


@pytest.mark.parametrize(
    ("name", "seen"),
    [
        *(("debug.callback", seen) for seen in SEEN),
        *((name, seen) for name in list(WATCHES)[1:] for seen in ("stream", "normalised")),
    ],
)
def test_callbacks_of_the_model(name: str, seen: str) -> None:
    (watch, primitive), (read, notices) = WATCHES[name], SEEN[seen]
    calls: Calls = []
    apply = partial(two_towers, watch=lambda *values: watch(calls, read(*values)))
    folded = jax_lnfold.fold(apply, TOWERS, X)
    norms = folded.report.norms
    assert [norm.folded for norm in norms] == [not notices, True]
    assert {edit.key_path for edit in folded.report.edits} == EDITED[notices]
    if notices:
        assert f"`{primitive}` (test_transformations.py:" in norms[0].reason
    want, saw = recorded(calls, apply, TOWERS)
    assert len(saw) == 1
    run = folded.apply
    for f in (apply, run, jax.jit(run)):
        assert agree((want, saw), recorded(calls, f, folded.params))


@pytest.mark.parametrize("name", ["debug.callback", "ordered io_callback"])
@pytest.mark.parametrize("notices", [False, True])
def test_callbacks_in_a_loop(name: str, notices: bool) -> None:
    """Called once for every layer, and never while analysing."""
    calls: Calls = []
    watch = WATCHES[name][0]

    def apply(p: Params, x: Array) -> Array:
        def body(s: Array, up: Array) -> tuple[Array, None]:
            normed = layer_norm(s)
            seen = watch(calls, s if notices else normed)
            return s + (normed * (1 + seen)) @ up, None

        s, _ = lax.scan(body, x @ p["first"], p["layers"])
        return (layer_norm(s) + layer_norm(x @ p["embed"])) @ p["head"]

    params = {**TOWERS, "layers": draw(12, L, D, D)}
    folded = jax_lnfold.fold(apply, params, X)
    assert not calls
    assert [norm.folded for norm in folded.report.norms] == [not notices, not notices, True]
    assert len(folded.report.edits) == (1 if notices else 3)
    want, saw = recorded(calls, apply, params)
    assert len(saw) == L
    for f in (apply, folded.apply, jax.jit(folded.apply)):
        assert agree((want, saw), recorded(calls, f, folded.params))


@pytest.mark.parametrize("name", ["jit", "vmap", "map", "scan", "grad", "jvp"])
def test_callbacks_under_transformations(name: str) -> None:
    transform = TRANSFORMS[name][0]
    calls: Calls = []
    apply = partial(two_towers, watch=lambda s, normed: watch_debug(calls, normed))
    folded = jax_lnfold.fold(apply, TOWERS, X)
    assert folded.report.n_folded == 2
    want = recorded(calls, jax.jit(transform(apply)), TOWERS)
    assert len(want[1]) == {"vmap": 3, "map": 3, "scan": 2}.get(name, 1)
    got = recorded(calls, jax.jit(transform(folded.apply)), folded.params)
    assert agree(want, got, within=CLOSE)


@pytest.mark.parametrize("notices", [False, True])
def test_printing(notices: bool, capfd: pytest.CaptureFixture[str]) -> None:
    def watch(s: Array, normed: Array) -> Array:
        jax.debug.print("largest {:.6f}", (s if notices else normed).max())
        return jnp.zeros(())

    apply = partial(two_towers, watch=watch)
    folded = jax_lnfold.fold(apply, TOWERS, X)
    assert [norm.folded for norm in folded.report.norms] == [not notices, True]
    lines = []
    for f in (apply, folded.apply, jax.jit(folded.apply)):
        jax.block_until_ready(f(folded.params, X))
        jax.effects_barrier()
        lines.append(capfd.readouterr().out)
    assert lines[0].startswith("largest ")
    assert lines == [lines[0]] * 3


@pytest.mark.parametrize("notices", [False, True])
def test_checks(notices: bool) -> None:
    def apply(p: Params, x: Array) -> Array:
        def watch(s: Array, normed: Array) -> Array:
            seen = (s if notices else normed).max()
            checkify.check(seen < p["limit"], "too large: {seen}", seen=seen)
            return jnp.zeros(())

        return two_towers(p, x, watch)

    params = {**TOWERS, "limit": jnp.float64(1e3)}
    folded = jax_lnfold.fold(apply, params, X)
    assert [norm.folded for norm in folded.report.norms] == [not notices, True]
    original, run = (jax.jit(checkify.checkify(f)) for f in (apply, folded.apply))
    for limit, fails in ((1e3, False), (1e-3, True)):
        limited = {"limit": jnp.float64(limit)}
        before, want = original(params | limited, X)
        after, got = run(folded.params | limited, X)
        assert agree(want, got)
        for error in (before, after):
            assert (error.get() or "").startswith("too large: ") == fails


# --- primitives that nobody knows ----------------------------------------------------------------


def primitive(name: str, f: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """A primitive of its own that computes ``f``, a function that keeps the shape."""
    made = Primitive(name)
    made.def_impl(jax.jit(f))
    made.def_abstract_eval(lambda s: s)
    mlir.register_lowering(made, mlir.lower_fun(f, multiple_results=False))
    return made.bind


def doubled(s: Array) -> Array:
    return 2.0 * s


@pytest.mark.parametrize("reads_stream", [False, True])
def test_unknown_primitive_that_reads(reads_stream: bool) -> None:
    peek = primitive("peek", doubled)
    apply = partial(
        two_towers, watch=lambda s, normed: jnp.tanh(peek(s if reads_stream else normed))
    )
    report = fold_checked(apply, TOWERS, X).report
    assert [norm.folded for norm in report.norms] == [not reads_stream, True]
    assert {edit.key_path for edit in report.edits} == EDITED[reads_stream]
    if reads_stream:
        assert "`peek` (test_transformations.py:" in report.norms[0].reason
    fold_checked(jax.jit(apply), TOWERS, X)


@pytest.mark.parametrize("known", [False, True])
def test_unknown_primitive_that_writes(known: bool) -> None:
    """Linear, but only its name is known; the same function in known operations folds."""
    write = doubled if known else primitive("write", doubled)

    report = fold_checked(beside(lambda s: layer_norm(write(s))), TOWERS, X).report
    assert [norm.folded for norm in report.norms] == [known, True]
    if not known:
        assert "`write` (test_transformations.py:" in report.norms[0].reason


NAMESAKES: dict[str, Callable[[Array], Array]] = {
    "neg": jnp.tanh,
    "copy": jnp.abs,
    "reduce_precision": jnp.square,
    "optimization_barrier": lambda s: s * jnp.arange(1.0, D + 1),
}


@pytest.mark.parametrize("name", NAMESAKES)
def test_primitive_that_shares_its_name_with_a_known_one(name: str) -> None:
    write = primitive(name, NAMESAKES[name])

    report = fold_checked(beside(lambda s: layer_norm(write(s))), TOWERS, X).report
    assert [norm.folded for norm in report.norms] == [False, True]


# --- functions with rules of their own -----------------------------------------------------------


def with_vmap_rule(f: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """Its batched version gives three times as much, so that nobody can do without it."""
    ruled = jax.custom_batching.custom_vmap(f)
    ruled.def_vmap(lambda size, batched, s: (3.0 * jax.vmap(f)(s), True))
    return ruled


@pytest.mark.parametrize("reads_stream", [False, True])
def test_batching_rule_of_a_reader(reads_stream: bool) -> None:
    def watched(f: Callable[[Array], Array]) -> ApplyFn:
        return partial(two_towers, watch=lambda s, normed: f(s if reads_stream else normed))

    apply = watched(with_vmap_rule(jnp.tanh))
    folded = fold_checked(apply, TOWERS, X)
    assert [norm.folded for norm in folded.report.norms] == [not reads_stream, True]
    want, *got, without_rule = (
        jax.jit(jax.vmap(f, (None, 0)))(p, several(X))
        for f, p in (
            (apply, TOWERS),
            (folded.apply, folded.params),
            (apply, folded.params),
            (watched(jnp.tanh), TOWERS),
        )
    )
    assert agree(want, *got)
    assert relative_difference(without_rule, want) > WRONG


def test_batching_rule_around_the_model() -> None:
    apply = beside(with_vmap_rule(lambda s: layer_norm(s) * 2))
    folded = fold_checked(apply, TOWERS, X)
    assert folded.report.norms[-1].folded
    xs = several(X)
    want, *got = (
        jax.vmap(f, (None, 0))(p, xs)
        for f, p in ((apply, TOWERS), (folded.apply, folded.params), (apply, folded.params))
    )
    assert agree(want, *got)

    fast = fold_checked(tiny, TINY, X)
    rules = [with_vmap_rule(partial(f, p)) for f, p in ((tiny, TINY), (fast.apply, fast.params))]
    assert agree(*(jax.vmap(rule)(xs) for rule in rules))
    assert agree(3.0 * jax.vmap(partial(tiny, TINY))(xs), jax.vmap(rules[1])(xs))


@pytest.mark.parametrize("ruled", [with_jvp, with_vjp])
def test_derivative_rules_of_parts(ruled: Callable[[ApplyFn], ApplyFn]) -> None:
    """The norm and the whole model have rules that compute the true derivative."""
    whole = ruled(partial(single, norm=ruled(layer_norm)))
    params = make_params("single")
    folded = fold_checked(jax.jit(whole), params, X)
    assert (len(folded.report.norms), folded.report.n_folded) == (2, 2)
    gradient, of_folded = (
        jax.jit(jax.grad(partial(loss, f), (0, 1))) for f in (whole, folded.apply)
    )
    want, got = gradient(params, X), of_folded(folded.params, X)
    assert agree(want[1], got[1], gradient(folded.params, X)[1], within=CLOSE)
    assert agree(want[0], folded.plan.center(got[0]), within=CLOSE)


@pytest.mark.parametrize("ruled", [with_jvp, with_vjp])
def test_derivative_rules_around_the_folded_model(
    ruled: Callable[[ApplyFn], ApplyFn], small: Model
) -> None:
    apply, folded = small.apply, small.folded
    want = jax.jit(jax.value_and_grad(partial(loss, apply), 1))(small.params, X)
    got = jax.jit(jax.value_and_grad(partial(loss, ruled(folded.apply)), 1))(folded.params, X)
    assert agree(want, got, within=CLOSE)


def gate(reads_value: bool) -> Callable[[Array], Array]:
    """The identity; its derivative is stopped by size, of the values or of the gradient."""
    ruled = jax.custom_vjp(lambda s: s)
    ruled.defvjp(lambda s: (s, s), lambda s, g: (g * (jnp.abs(s if reads_value else g) < 0.4),))
    return ruled


# Values of a foldable function, but a derivative that is not its own: only values are promised.
UNTRUE_DERIVATIVES: dict[str, Callable[[Array], Array]] = {
    "rule that reads the stream": lambda s: layer_norm(gate(True)(s)),
    "rule that is not linear": lambda s: layer_norm(gate(False)(s)),
}
# What has the rule does not depend on the mean: the gradients are promised, too.
TRUE_DERIVATIVES: dict[str, Callable[[Array], Array]] = {
    "rule behind the norm": lambda s: gate(True)(layer_norm(s))
}


@pytest.mark.parametrize("name", [*UNTRUE_DERIVATIVES, *TRUE_DERIVATIVES])
def test_derivatives_that_a_function_does_not_have(name: str) -> None:
    apply = beside({**UNTRUE_DERIVATIVES, **TRUE_DERIVATIVES}[name])
    folded = fold_checked(jax.jit(apply), TOWERS, X)
    if name in UNTRUE_DERIVATIVES:
        return
    assert all(norm.folded for norm in folded.report.norms)
    gradient, of_folded = (jax.jit(jax.grad(partial(loss, f), 1)) for f in (apply, folded.apply))
    want, edited = gradient(TOWERS, X), folded.params
    assert agree(want, of_folded(edited, X), gradient(edited, X), within=CLOSE)


# --- stopped gradients ---------------------------------------------------------------------------


def mean(s: Array) -> Array:
    return s.mean(-1, keepdims=True)


def stopped(
    mean_of: Callable[[Array], Array] = mean,
    variance: Callable[[Array], Array] = lambda s: mean(jnp.square(s - mean(s))),
) -> Callable[[Array], Array]:
    """A LayerNorm with a mean and a variance of its own."""
    return lambda s: (s - mean_of(s)) * lax.rsqrt(variance(s) + EPS)


def quotient(s: Array, divisor: Callable[[Array], Array]) -> Array:
    """Exponentials that are divided by something computed from them."""
    e = jnp.exp(s - stop(s.max(-1, keepdims=True)))
    return e / divisor(e)


stop = lax.stop_gradient
# What reads the stream, and whether it has neither values nor gradients that notice a shift of it.
STOPPED: dict[str, tuple[Callable[[Array], Array], bool]] = {
    "norm of a copy": (lambda s: layer_norm(stop(s)), True),
    "copy of a norm": (lambda s: layer_norm(s) + stop(layer_norm(s)), True),
    "norm once more than its copy": (lambda s: 2 * layer_norm(s) - stop(layer_norm(s)), True),
    "norm for the values alone": (lambda s: layer_norm(s) + (s - stop(s)), False),
    "norm for the gradients alone": (lambda s: layer_norm(s) + (stop(s) - s), False),
    "mean": (stopped(lambda s: stop(mean(s))), False),
    "mean, also in the variance": (lambda s: rms_norm(s - stop(mean(s))), False),
    "mean and variance": (
        stopped(lambda s: stop(mean(s)), lambda s: stop(s.var(-1)[..., None])),
        False,
    ),
    "stream, not its mean": (lambda s: stopped(lambda t: mean(s))(stop(s)), False),
    "stream and its mean": (lambda s: (stop(s) - stop(mean(s))) * s.std(-1)[..., None], True),
    "centered stream": (lambda s: stop(s - mean(s)) / jnp.sqrt(s.var(-1) + EPS)[..., None], True),
    "variance": (stopped(variance=lambda s: stop(s.var(-1, keepdims=True))), True),
    "variance of a copy": (stopped(variance=lambda s: stop(s).var(-1, keepdims=True)), True),
    "one-pass variance": (stopped(variance=lambda s: stop(mean(s * s) - mean(s) ** 2)), True),
    "both means of the variance": (
        stopped(variance=lambda s: stop(mean(s * s)) - stop(mean(s)) ** 2),
        True,
    ),
    "first mean of the variance": (
        stopped(variance=lambda s: stop(mean(s * s)) - mean(s) ** 2),
        False,
    ),
    "second mean of the variance": (
        stopped(variance=lambda s: mean(s * s) - stop(mean(s)) ** 2),
        False,
    ),
    "one factor of a square": (stopped(variance=lambda s: mean(s * stop(s)) - mean(s) ** 2), False),
    "one factor of both squares": (
        stopped(variance=lambda s: mean(s * stop(s)) - mean(s) * stop(mean(s))),
        True,
    ),
    "softmax": (jax.nn.softmax, True),
    "logarithm of a softmax": (jax.nn.log_softmax, True),
    "square of a softmax": (lambda s: jax.nn.softmax(s) ** 2, True),
    "exponentials": (lambda s: jnp.exp(s - stop(s.max(-1, keepdims=True))), False),
    "softmax with a sink": (lambda s: quotient(s, lambda e: 1 + e.sum(-1, keepdims=True)), False),
    "softmax of parts": (lambda s: quotient(s, lambda e: e[..., :6].sum(-1, keepdims=True)), False),
    "softmax by its square": (lambda s: quotient(s, lambda e: mean(e * e)), False),
    "mean before a norm": (lambda s: layer_norm(s - stop(mean(s))), True),
    "gate": (lambda s: layer_norm(s) * stop(jnp.exp(s - mean(s))), True),
    "gate that sees the mean": (lambda s: layer_norm(s) * stop(jnp.exp(s)), False),
}


@pytest.mark.parametrize(("read", "exact"), STOPPED.values(), ids=STOPPED)
def test_gradients_where_some_are_stopped(read: Callable[[Array], Array], exact: bool) -> None:
    """All of them agree, and a mean that only values do without stays."""

    def apply(p: Params, x: Array) -> Array:
        s = x @ p["first"]
        return (read(s) + layer_norm(s) + layer_norm(x @ p["embed"])) @ p["head"]

    folded = fold_checked(jax.jit(apply), TOWERS, X)
    assert {e.key_path for e in folded.plan.edits} == ({"first", "embed"} if exact else {"embed"})
    runs: list[Callable[[Params], Array]] = [
        lambda p: apply(p, X),
        lambda p: folded.apply(folded.plan.center(p), X),
        lambda p: apply(folded.plan.center(p), X),
    ]
    want, *others = (jax.jit(jax.grad(lambda p, f=f: jnp.sum(f(p) ** 2)))(TOWERS) for f in runs)
    assert agree(want, *others, within=CLOSE)


def test_mean_that_gradients_keep_is_reported() -> None:
    def apply(p: Params, x: Array) -> Array:
        s = x @ p["first"]
        return rms_norm(s - stop(mean(s))) @ p["head"]

    (norm,) = jax_lnfold.analyze(apply, TOWERS, X).norms
    assert not norm.folded
    assert "behind `stop_gradient`, not from gradients" in norm.reason


@pytest.mark.parametrize("stops", [False, True])
@pytest.mark.parametrize("behind", [False, True], ids=["before the norm", "behind it"])
def test_scale_goes_into_a_layer_only_where_gradients_may_go(behind: bool, stops: bool) -> None:
    """``(x W) * g``: the gradient of g would become one of W, or none."""
    maybe = stop if stops else lambda s: s

    def apply(p: Params, x: Array) -> Array:
        s = x @ p["first"]
        if behind:
            return maybe(layer_norm(s) * p["gain"]) @ p["head"]
        return (layer_norm(maybe(s) * p["gain"]) + 0 * x.sum()) @ p["head"]

    report = fold_checked(apply, {**TOWERS, "gain": draw(9, D)}, X, fold_affine=behind).report
    if behind:
        assert len(report.affine) == (not stops)
    else:
        assert report.n_folded == len(report.scales) == (not stops)
