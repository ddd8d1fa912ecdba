"""Declared LayerNorms: as they were outside of a fold, and in one what the plain spelling is."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jax_lnfold
from tests.helpers.contracts import (
    check_contracts,
    count_equations,
    counts,
    fold_checked,
    relative_difference,
)
from tests.kernels.kernels import (
    KernelNorm,
    add_norm,
    added,
    ln,
    norm,
    norm_linear,
    pallas_norm,
    projected,
    rms,
    with_affine,
)
from tests.models.zoo import BY_NAME, NORMS

Array = jax.Array
CALL = "declared_layer_norm"
RNG = np.random.default_rng(0)


def draw(*shape: int) -> Array:
    return jnp.asarray(RNG.normal(size=shape))


X, G, B = draw(8, 3, 6), draw(6), draw(6)


def twins(fn: Callable[..., Any], *args: Any) -> int:
    """How many calls of a program are of twins."""
    return str(jax.make_jaxpr(fn)(*args)).count("twin=None")


# --- the same function ---------------------------------------------------------------------------


def loss(fn: Any) -> Any:
    return lambda *args: jnp.sum(jnp.cos(fn(*args)))


SAME: dict[str, Callable[[Any], Any]] = {
    "itself": lambda f: f,
    "jit": jax.jit,
    "vmap": lambda f: jax.vmap(f, (1, None, None), 2),
    "vmap of scales": lambda f: jax.vmap(f, (None, 0, 0)),
    "grad": lambda f: jax.grad(loss(f), (0, 1, 2)),
    "grad of vmap": lambda f: jax.grad(loss(jax.vmap(f, (1, None, None))), (0, 1)),
    "remat": lambda f: jax.jit(jax.grad(jax.checkpoint(loss(f)), (0, 2))),
    "scan": lambda f: jax.jit(
        lambda x, g, b: jax.lax.scan(lambda c, _: (f(c, g, b), c[0]), x, None, length=3)
    ),
    "cond": lambda f: jax.jit(lambda x, g, b: jax.lax.cond(x.sum() > 0, f, f, x, g, b)),
    "values closed over": lambda f: jax.jit(lambda x, g, b: loss(lambda y: f(y, g, b))(x)),
}


@pytest.mark.parametrize("name", SAME)
def test_the_same_bits_outside_of_a_fold(name: str) -> None:
    args = (X, draw(4, 6), draw(4, 6)) if name == "vmap of scales" else (X, G, B)
    one, other = (jax.tree.leaves(SAME[name](f)(*args)) for f in (norm, ln))
    assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_the_same_program_is_compiled() -> None:
    one, other = (jax.jit(lambda *a, f=f: f(*a)).lower(X, G, B).as_text() for f in (norm, ln))
    assert one == other
    assert "declared" not in one


def test_exported_with_any_batch() -> None:
    sizes = jax.export.symbolic_shape("b,3,6")
    exported = jax.export.export(jax.jit(norm))(jax.ShapeDtypeStruct(sizes, float), G, B)
    assert np.array_equal(exported.call(X, G, B), jax.jit(ln)(X, G, B))


def test_what_has_effects_is_called_as_it_is() -> None:
    def tells(x: Array) -> Array:
        jax.debug.print("here")
        return ln(x, G, B)

    declared = jax_lnfold.layer_norm(tells, rms=lambda x: rms(x, G, B))
    assert count_equations(CALL, declared, X) == 0


# --- in a fold -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit", "gpt2", "gpt_untied", "dit"])
def test_models_fold_as_with_the_plain_spelling(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(NORMS, "kernel", KernelNorm)
    known = BY_NAME[name]
    built = known.build("kernel")
    folded = fold_checked(built.apply_fn, built.params, *built.inputs)
    assert counts(folded.report) == (known.norms, known.folded, known.inserted)
    check_contracts(built.apply_fn, built.params, folded, *built.other_inputs)
    assert {n.kernel for n in folded.report.norms} == {"hidden_norm"}
    assert twins(folded.apply, folded.params, *built.inputs) == known.folded


def stream(p: Any, x: Array, norm: Any = norm) -> Array:
    h = x @ p["embed"]
    for block in p["blocks"]:
        h = h + jnp.tanh(norm(h, *block["norm"]) @ block["w"] + block["b"]) @ block["v"]
    return norm(h, *p["norm"]) @ p["head"] + p["c"]


P0 = {
    "embed": draw(4, 6),
    "blocks": [
        {"norm": (draw(6), draw(6)), "w": draw(6, 5), "b": draw(5), "v": draw(5, 6)}
        for _ in range(2)
    ],
    "norm": (draw(6), draw(6)),
    "head": draw(6, 3),
    "c": draw(3),
}
INPUT = draw(8, 2, 4)


def mesh(kind: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
    return jax.make_mesh((4,), ("d",), axis_types=(kind,))


def scanned(p: Any, x: Array) -> Array:
    """The blocks as one, stacked, in a loop."""
    blocks = jax.tree.map(lambda *leaves: jnp.stack(leaves), *p["blocks"])
    return _scan({**p, "blocks": blocks}, x)


def _scan(p: Any, x: Array) -> Array:
    def step(h: Array, block: Any) -> tuple[Array, None]:
        return h + jnp.tanh(norm(h, *block["norm"]) @ block["w"] + block["b"]) @ block["v"], None

    h, _ = jax.lax.scan(step, x @ p["embed"], p["blocks"])
    return norm(h, *p["norm"]) @ p["head"] + p["c"]


def spread(p: Any, x: Array, check_vma: bool = True) -> Array:
    sharded = jax.shard_map(
        stream, mesh=mesh(), in_specs=(P(), P("d")), out_specs=P("d"), check_vma=check_vma
    )
    return sharded(p, x)


FOLDED: dict[str, Callable[..., Any]] = {
    "plain": stream,
    "jit": jax.jit(stream),
    "vmap": lambda p, x: jax.vmap(stream, (None, 1), 1)(p, x),
    "vmap of single tokens": lambda p, x: jax.vmap(jax.vmap(stream, (None, 0)), (None, 1))(p, x),
    "remat": lambda p, x: jax.checkpoint(stream)(p, x),
    "shard_map": spread,
    "shard_map without types": partial(spread, check_vma=False),
    "shard_map in vmap": lambda p, x: jax.vmap(spread, (None, 1), 1)(p, x),
}


@pytest.mark.parametrize("name", FOLDED)
def test_folds_wherever_it_stands(name: str) -> None:
    fn = FOLDED[name]
    folded = fold_checked(fn, P0, INPUT)
    assert counts(folded.report) == (3, 3, 0)
    assert twins(folded.apply, folded.params, INPUT) == 3
    plain = jax_lnfold.plan_fold(partial(stream, norm=with_affine), P0, INPUT)
    assert folded.plan.edits == plain.edits


def test_folds_in_a_loop() -> None:
    stacked = {**P0, "blocks": jax.tree.map(lambda *x: jnp.stack(x), *P0["blocks"])}
    folded = fold_checked(_scan, stacked, INPUT)
    assert counts(folded.report) == (2, 2, 0)
    assert folded.report.norms[0].count == 2


def test_gradients_are_those_of_the_constrained_model() -> None:
    folded = jax_lnfold.fold(stream, P0, INPUT)

    def gradient(fn: Any, p: Any) -> Any:
        return jax.grad(lambda p: jnp.sum(jnp.cos(fn(p, INPUT))))(p)

    got, want = (folded.plan.center(gradient(fn, folded.params)) for fn in (folded.apply, stream))
    assert relative_difference(got, want) < 1e-12
    assert twins(jax.grad(lambda p: folded.apply(p, INPUT).sum()), folded.params) == 0


def test_scales_and_shifts_are_taken_up_through_it() -> None:
    folded = fold_checked(stream, P0, INPUT, fold_affine=True)
    plain = jax_lnfold.fold(partial(stream, norm=with_affine), P0, INPUT, fold_affine=True)
    assert folded.plan == plain.plan
    assert len(folded.plan.affine) == 3
    (undeclared,) = jax_lnfold.fold(
        partial(stream, norm=jax_lnfold.layer_norm(ln, rms=rms)), P0, INPUT, fold_affine=True
    ).plan.affine or (None,)
    assert undeclared is None


def test_reports_say_its_name_and_place() -> None:
    report = jax_lnfold.fold(stream, P0, INPUT).report
    assert [n.path for n in report.norms] == ["blocks/0/norm", "blocks/1/norm", "norm"]
    assert "in hidden_norm" in str(report)
    left = jax_lnfold.fold(lambda p, x: norm(x, *p["norm"]), P0, draw(2, 6)).report
    assert counts(left) == (1, 0, 0)
    noticed = jax_lnfold.fold(lambda p, x: jnp.exp(x @ p["embed"]) @ p["w"], {**P0, "w": G}, INPUT)
    assert not noticed.report.norms


def test_a_mean_that_stays_keeps_the_function() -> None:
    """The stream is returned: so the norm behind it takes the mean, as it did."""

    def returned(p: Any, x: Array) -> tuple[Array, Array]:
        h = jnp.tanh(x @ p["embed"])
        return norm(h, *p["norm"]), h

    folded = fold_checked(returned, P0, INPUT)
    assert counts(folded.report) == (1, 0, 0)
    assert twins(folded.apply, folded.params, INPUT) == 0


def test_an_explicit_centering_stands_before_it() -> None:
    def after(p: Any, x: Array) -> Array:
        h = jnp.tanh(x @ p["embed"])
        return norm(h, *p["norm"]) + norm(h, G, B) + norm(h, B, G)

    folded = fold_checked(after, P0, INPUT)
    assert counts(folded.report) == (3, 3, 1)
    assert twins(folded.apply, folded.params, INPUT) == 3


def decode(p: Any, cache: Any, token: Array, at: Array) -> tuple[Array, Any]:
    """One step of a GPT with a cache of keys and values."""
    h, caches = p["table"][token][:, None], []
    for block, (keys, values) in zip(p["blocks"], cache, strict=True):
        q, k, v = jnp.split(norm(h, *block["norm"]) @ block["qkv"], 3, -1)
        keys = jax.lax.dynamic_update_slice(keys, k, (0, at, 0))
        values = jax.lax.dynamic_update_slice(values, v, (0, at, 0))
        seen = jnp.arange(keys.shape[1]) <= at
        scores = jnp.where(seen, q @ keys.swapaxes(1, 2), -jnp.inf)
        h = h + jax.nn.softmax(scores) @ values @ block["out"]
        h = h + jax.nn.gelu(norm(h, *block["norm2"]) @ block["w"]) @ block["v"]
        caches.append((keys, values))
    return (norm(h, *p["norm"]) @ p["head"])[:, 0], caches


def test_gpt_with_a_cache() -> None:
    block = {"norm": (6,), "qkv": (6, 18), "out": (6, 6), "norm2": (6,), "w": (6, 9), "v": (9, 6)}
    blocks = [
        {k: (draw(*s), draw(*s)) if "norm" in k else draw(*s) for k, s in block.items()}
        for _ in range(2)
    ]
    p = {"table": draw(11, 6), "blocks": blocks, "norm": (G, B), "head": draw(6, 11)}
    empty = [(jnp.zeros((2, 4, 6)), jnp.zeros((2, 4, 6))) for _ in blocks]
    token = jnp.array([3, 7])
    folded = fold_checked(decode, p, empty, token, jnp.int64(0))
    assert counts(folded.report) == (5, 5, 0)
    want = got = empty
    for at in range(4):
        (a, want), (b, got) = (
            decode(p, want, token, jnp.int64(at)),
            folded(got, token, jnp.int64(at)),
        )
        assert relative_difference(b, a) < 1e-12


# --- fused ---------------------------------------------------------------------------------------


def fused(p: Any, x: Array, add: Any, read: Any) -> Array:
    """A stream whose sums are made by the kernels that normalise them."""
    h, y = x @ p["embed"], jnp.zeros((*x.shape[:-1], 6))
    for block in p["blocks"]:
        n, h = add(h, y, *block["norm"])
        y = jnp.tanh(n @ block["w"] + block["b"]) @ block["v"]
    _, h = add(h, y, *p["norm"])
    return read(h, *p["norm"], p["head"], p["c"])


def test_fused_kernels_fold_as_what_they_are() -> None:
    folded = fold_checked(partial(fused, add=add_norm, read=norm_linear), P0, INPUT)
    plain = fold_checked(partial(fused, add=added, read=projected), P0, INPUT)
    assert counts(folded.report) == counts(plain.report) == (3, 3, 0)
    assert folded.plan.edits == plain.plan.edits
    assert {n.kernel for n in folded.report.norms} == {"add_norm", "norm_linear"}


def test_a_returned_sum_of_a_fused_kernel_is_not_shifted() -> None:
    def both(p: Any, x: Array) -> Any:
        n, h = add_norm(x @ p["embed"], x @ p["other"], *p["norm"])
        return n, h

    folded = fold_checked(both, {**P0, "other": draw(4, 6)}, INPUT)
    assert folded.report.n_folded == 0


def test_a_sum_that_is_centered_behind_a_fused_kernel_is_not_centered_in_it() -> None:
    def twice(p: Any, x: Array) -> Any:
        a, h = add_norm(jnp.tanh(x @ p["embed"]), jnp.tanh(x @ p["other"]), *p["norm"])
        return a, norm(h, *p["norm"]), norm(h, B, G), norm(h, G, B)

    folded = fold_checked(twice, {**P0, "other": draw(4, 6)}, INPUT)
    assert counts(folded.report) == (4, 0, 0)


def test_other_axes_and_operands_that_nobody_declared() -> None:
    def masked(x: Array, keep: Array, n: int) -> Array:
        c = x - x.mean((0, 2), keepdims=True)
        return keep * jnp.tanh(c / jnp.sqrt((c * c).mean((0, 2), keepdims=True))) * n

    def masked_rms(x: Array, keep: Array, n: int) -> Array:
        return keep * jnp.tanh(x / jnp.sqrt((x * x).mean((0, 2), keepdims=True))) * n

    declared = jax_lnfold.layer_norm(masked, rms=masked_rms, axis=(0, -1))

    def fn(p: Any, x: Array, keep: Array) -> Array:
        h = jnp.einsum("bi,ijkl->bjkl", x, p["w"])
        return jax.vmap(declared, (0, None, None))(h, keep, 3)

    p = {"w": draw(4, 2, 5, 3)}
    keep = jnp.arange(5)[None, :, None] % 2
    folded = fold_checked(fn, p, draw(7, 4), keep)
    assert counts(folded.report) == (1, 1, 0)
    assert folded.report.norms[0].axes == (1, 3)


def test_pallas_under_shard_map() -> None:
    def shard(p: Any, x: Array) -> Array:
        return stream(p, x, norm=pallas_norm)

    fn = jax.shard_map(
        shard, mesh=mesh(), in_specs=(P(), P("d")), out_specs=P("d"), check_vma=False
    )
    folded = fold_checked(fn, P0, INPUT)
    assert counts(folded.report) == (3, 3, 0)


# --- errors --------------------------------------------------------------------------------------

declare: Any = jax_lnfold.layer_norm
ERRORS: dict[str, tuple[Callable[[], Any], str]] = {
    "rms": (lambda: declare(ln, rms=3), "rms: a int is not callable"),
    "fn": (lambda: declare("ln", rms=rms), "fn: a str is not callable"),
    "axis": (lambda: jax_lnfold.layer_norm(ln, rms=rms, axis=()), "axis: \\(\\) is no axis"),
    "scale": (lambda: jax_lnfold.layer_norm(ln, rms=rms, scale=0), "scale: 0 is no argument"),
    "name of a scale": (
        lambda: jax_lnfold.layer_norm(ln, rms=rms, shift="beta"),
        "shift: 'beta' is no argument behind the first one",
    ),
    "tolerance": (
        lambda: jax_lnfold.layer_norm(ln, rms=rms, tolerance=-1),
        "tolerance: -1 is no positive number",
    ),
    "axis of x": (
        lambda: jax.jit(jax_lnfold.layer_norm(ln, rms=rms, axis=3))(X, G, B),
        "axis: \\(3,\\) are no axes of x, which has 3",
    ),
    "dtype of the twin": (
        lambda: jax.jit(jax_lnfold.layer_norm(ln, rms=lambda *a: rms(*a).astype("float32")))(
            X, G, B
        ),
        "rms: returns float32\\[8, 3, 6\\] where .* returns float64\\[8, 3, 6\\]",
    ),
    "results of the reference": (
        lambda: jax.jit(jax_lnfold.layer_norm(ln, rms=rms, reference=lambda *a: a))(X, G, B),
        "reference: returns",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    run, words = ERRORS[name]
    with pytest.raises(jax_lnfold.FoldError, match=words):
        run()


def test_a_mean_of_single_numbers_is_nobodys() -> None:
    folded = fold_checked(lambda p, x: norm(x @ p["w"], p["g"], p["b"]), {
        "w": draw(4, 1), "g": draw(1), "b": draw(1)
    }, draw(3, 4))  # fmt: skip
    assert not folded.report.norms


def defaults(x: Any, g: Any = None, b: Any = None, mean: bool = True) -> Any:
    y = with_affine(x, 1.0, 0.0, mean)
    y = y if g is None else y * g
    return y if b is None else y + b


@pytest.mark.parametrize("given", [(), (G,), (None, B), (G, B)])
def test_a_scale_and_a_shift_that_have_defaults_need_not_be_passed(given: Any) -> None:
    fn = jax_lnfold.layer_norm(defaults, rms=partial(defaults, mean=False), scale="g", shift="b")
    folded = fold_checked(lambda p, x: fn(x @ p["w"], *given), {"w": draw(5, 6)}, draw(3, 5))
    assert folded.report.n_folded == 1


@pytest.mark.parametrize("constant", [False, True])
def test_scales_that_are_closed_over(constant: bool) -> None:
    """Both functions read one array, which is one operand; what it does there, nobody says."""

    def model(p: Any, x: Array) -> Array:
        g = G if constant else p["g"]
        kernel = jax_lnfold.layer_norm(
            lambda x: with_affine(x, g, p["b"]), rms=lambda x: with_affine(x, g, p["b"], False)
        )
        return kernel(x @ p["w"]) @ p["v"]

    p = {"w": draw(5, 6), "g": G, "b": B, "v": draw(6, 2)}
    folded = fold_checked(model, p, draw(3, 5), fold_affine=True)
    assert folded.report.n_folded == 1
    assert not folded.report.affine
