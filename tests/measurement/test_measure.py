"""The share of the mean that LayerNorms read, against NumPy at activations that are caught."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_lnfold
from jax_lnfold import FoldError, MeanShare, PlanMismatchError, Statistics, TreeError, measure
from jax_lnfold.folded import placed_again
from jax_lnfold.rules.partitions import centered
from tests.helpers.interpreter import Interpreter
from tests.models.zoo import BY_NAME

RNG = np.random.default_rng(0)
WIDTH = 2.0 ** (1 / 8)
"""How much too large a percentile may be, relative to the true one."""


def draw(*shape: int, offset: float = 0.3) -> jax.Array:
    return jnp.asarray(RNG.standard_normal(shape) + offset)


def norm(x: jax.Array, axis: Any = -1) -> jax.Array:
    centered = x - x.mean(axis, keepdims=True)
    return centered / jnp.sqrt(jnp.square(centered).mean(axis, keepdims=True) + 1e-6)


def expected(x: Any, axis: Any = -1) -> tuple[float, float, float, float]:
    """Share, mean, 99th percentile (nearest rank) and maximum, in NumPy."""
    x = np.asarray(x, np.float64)
    mean, square = x.mean(axis).reshape(-1), np.square(x).mean(axis).reshape(-1)
    shares = np.sort(mean**2 / np.where(square, square, 1))
    rank = shares[int(np.ceil(0.99 * len(shares))) - 1]
    return (mean**2).mean() / square.mean(), shares.mean(), rank, shares[-1]


def check(
    found: MeanShare | None, x: Any, axis: Any = -1, index: Any = (), rtol: float = 1e-9
) -> None:
    assert found is not None
    share, mean, rank, largest = expected(x, axis)
    np.testing.assert_allclose(found.share[index], share, rtol=rtol)
    np.testing.assert_allclose(found.mean[index], mean, rtol=rtol)
    np.testing.assert_allclose(found.maximum[index], largest, rtol=rtol)
    assert rank * (1 - 1e-6) <= found.percentile_99[index] <= rank * WIDTH * (1 + 1e-6)


def caught(apply_fn: Callable[..., Any], params: Any, inputs: tuple[Any, ...]) -> list[np.ndarray]:
    """What each `nn.LayerNorm` is called with."""
    seen: list[np.ndarray] = []

    def look(call: Any, args: Any, keywords: Any, context: Any) -> Any:
        if isinstance(context.module, nn.LayerNorm) and context.method_name == "__call__":
            seen.append(np.asarray(args[0]))
        return call(*args, **keywords)

    with nn.intercept_methods(look):
        apply_fn(params, *inputs)
    return seen


def caught_folded(folded: jax_lnfold.Folded, inputs: tuple[Any, ...]) -> list[np.ndarray]:
    """What each LayerNorm of the folded program reads, its centerings made by other code."""
    traced, placement = placed_again(folded, folded.params, inputs)
    seen: dict[int, np.ndarray] = {}

    def look(value: int, x: Any) -> Any:
        for along in (*placement.explicit.get(value, ()), *placement.constants.get(value, ())):
            x = centered(np.asarray(x), along)
        return seen.setdefault(value, x)

    Interpreter(placement.graph, look).run(traced.closed, folded.params, inputs)
    return [seen[each.x] for each in placement.norms]


# --- against NumPy -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "swin", "dit", "convnext"])
def test_shares_of_models(name: str) -> None:
    """Before and after a fold, of which the means that are left are those of centered weights."""
    model = BY_NAME[name].build()
    folded = jax_lnfold.fold(model.apply_fn, model.params, *model.inputs)
    got = measure(folded, model.params, model.inputs)
    before = caught(model.apply_fn, model.params, model.inputs)
    for side, want in (("before", before), ("after", caught_folded(folded, model.inputs))):
        assert len(want) == len(got.norms) == len(folded.report.norms)
        for found, x, told in zip(got.norms, want, folded.report.norms, strict=True):
            assert found.path == told.path
            assert found.tokens == x[..., 0].size
            if side == "after" and told.folded:
                assert found.after is not None
                assert found.after.maximum < 1e-28
            else:
                check(getattr(found, side), x)
    assert all(found.before.share > 1e-4 for found in got.norms)


@pytest.mark.parametrize("name", ["gpt2", "clip_vision", "mixer_narrow", "qk_norm_stacked"])
def test_folded_norms_read_no_mean(name: str) -> None:
    """Explicit centerings, constants and heads of fused projections, too."""
    model = BY_NAME[name].build()
    folded = jax_lnfold.fold(model.apply_fn, model.params, *model.inputs)
    got = measure(folded, model.params, model.other_inputs)
    plain = measure(model.apply_fn, model.params, model.other_inputs)
    for found, other, told in zip(got.norms, plain.norms, folded.report.norms, strict=True):
        assert found.before.share == other.before.share > 1e-5
        assert other.after is None
        assert (found.after.maximum < 1e-26) == told.folded


def test_batches_add_up() -> None:
    """Many batches are one large batch, whatever the scales of their numbers."""
    params, x = {"w": draw(5, 12)}, draw(6, 7, 5) * np.logspace(-3, 3, 6)[:, None, None]

    def fn(params: Any, x: jax.Array) -> jax.Array:
        return norm(x @ params["w"])

    one, many = measure(fn, params, x), measure(fn, params, *x)
    check(one.norms[0].before, x @ params["w"])
    for name in ("share", "mean", "percentile_99", "maximum"):
        whole, parts = (getattr(found.norms[0].before, name) for found in (one, many))
        np.testing.assert_allclose(parts, whole, rtol=1e-12)
    assert one.norms[0].tokens == many.norms[0].tokens == 42
    assert (one.n_batches, many.n_batches) == (1, 6)


def test_percentiles_are_told_from_the_largest() -> None:
    """Of 1000 tokens with shares over many orders of magnitude."""
    mean = np.logspace(-6, -1, 1000)[RNG.permutation(1000)]
    x = np.tile([1.0, -1.0, 1.0, -1.0], (1000, 1)) + mean[:, None]
    found = measure(lambda p, x: norm(x) * p, jnp.ones(()), x).norms[0].before
    check(found, x)
    assert found.percentile_99 < 0.995 * found.maximum


@pytest.mark.parametrize("axis", [1, (0, 2), (0, 1)])
def test_axes(axis: Any) -> None:
    x = draw(3, 4, 5)
    got = measure(lambda p, x: norm(x, axis) * p, jnp.ones(()), x)
    check(
        got.norms[0].before, np.moveaxis(x, axis, range(np.size(axis))), tuple(range(np.size(axis)))
    )


def test_groups_of_one_axis() -> None:
    """A norm for each head of a fused axis."""
    x = draw(3, 4, 10)
    got = measure(lambda p, x: norm((x * p).reshape(3, 4, 2, 5)).reshape(x.shape), jnp.ones(()), x)
    (only,) = got.norms
    assert only.tokens == 24
    check(only.before, x.reshape(3, 4, 2, 5))


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(np.float32, 1e30), (np.float32, 1e-30), (jnp.bfloat16, 1e30), (np.float64, 1e250)],
)
def test_squares_stay_in_range(dtype: Any, scale: float) -> None:
    x = (draw(7, 16) * scale).astype(dtype)
    got = measure(lambda p, x: norm(x) * p, jnp.ones((), dtype), x)
    wide = np.asarray(x, np.float64) / scale
    check(got.norms[0].before, wide, rtol=1e-9 if dtype is np.float64 else 1e-5)


def test_padding_has_no_mean() -> None:
    x = draw(6, 5).at[2:4].set(0.0)
    got = measure(lambda p, x: norm(x) * p, jnp.ones(()), x).norms[0]
    check(got.before, x)
    nothing = measure(lambda p, x: norm(x) * p, jnp.ones(()), jnp.zeros((6, 5))).norms[0]
    assert nothing.before.share == nothing.before.maximum == 0


# --- programs in programs ------------------------------------------------------------------------


def layers(x: jax.Array, w: jax.Array) -> list[jax.Array]:
    """The inputs of the norms of a stack."""
    found = []
    for each in w:
        found.append(x)
        x = x + norm(x) @ each
    return found


def step(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
    return x + norm(x) @ w, None


@pytest.mark.parametrize("reverse", [False, True])
def test_scans_have_a_number_for_each_iteration(reverse: bool) -> None:
    w, x = draw(4, 6, 6), draw(5, 6)
    got = measure(lambda w, x: jax.lax.scan(step, x, w, reverse=reverse)[0], w, x, x)
    (only,) = got.norms
    assert only.tokens.tolist() == [10] * 4
    for i, each in enumerate(layers(x, w[::-1] if reverse else w)):
        check(only.before, each, index=3 - i if reverse else i)
    assert str(got).count("[") >= 4


def test_scans_in_scans_and_calls() -> None:
    w, x = draw(2, 3, 6, 6), draw(5, 6)

    @jax.checkpoint
    def outer(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
        return jax.jit(lambda x: jax.lax.scan(step, x, w)[0])(x), None

    (only,) = measure(lambda w, x: jax.lax.scan(outer, x, w)[0], w, x).norms
    assert only.tokens.shape == (2, 3)
    for i, each in enumerate(layers(x, w.reshape(6, 6, 6))):
        check(only.before, each, index=divmod(i, 3))


def test_while_loops_have_one_number_for_all() -> None:
    w, x = draw(6, 6), draw(5, 6)

    def fn(w: jax.Array, x: jax.Array, n: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, n, lambda _, x: x + norm(x) @ w, x)

    (only,) = measure(fn, w, (x, 3), (2 * x, 3)).norms
    inputs = [*layers(x, [w] * 3), *layers(2 * x, [w] * 3)]
    assert only.tokens == 30
    check(only.before, np.concatenate(inputs))
    (none,) = measure(fn, w, (x, 0)).norms
    assert none.tokens == 0
    assert np.isnan(none.before.share)


def test_loops_with_scans_inside() -> None:
    w, x = draw(3, 6, 6), draw(5, 6)

    def fn(w: jax.Array, x: jax.Array, n: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, n, lambda _, x: jax.lax.scan(step, x, w)[0], x)

    (only,) = measure(fn, w, (x, 2)).norms
    inputs = layers(x, [*w, *w])
    for i in range(3):
        check(only.before, np.concatenate([inputs[i], inputs[i + 3]]), index=i)


def test_loops_that_end_on_a_norm_leave_it_out() -> None:
    """What decides whether a loop goes on cannot return anything; what else there is, is told."""

    def fn(p: jax.Array, x: jax.Array) -> jax.Array:
        x = norm(x * p)
        return jax.lax.while_loop(lambda x: norm(x * p + x**2).max() < -5, lambda x: x - p, x)

    x = draw(4, 6)
    got = measure(fn, draw(6), x)
    assert [n.before is None for n in got.norms] == [False, True]
    assert got.left_out == (got.norms[1].path,)
    assert "Not measured: " in str(got)
    several = measure(jax.vmap(fn, (None, 0)), draw(6), draw(3, 4, 6))
    assert len(several.left_out) == 1


def test_branches_count_what_runs() -> None:
    x = draw(4, 6)

    def fn(p: jax.Array, x: jax.Array, i: jax.Array) -> jax.Array:
        return jax.lax.switch(i, [lambda x: norm(x * p), lambda x: norm(x + p), jnp.sin], x)

    p = draw(6)
    first, second = measure(fn, p, (x, 0), (x, 1), (2 * x, 0)).norms
    check(first.before, np.concatenate([x * p, 2 * x * p]))
    check(second.before, x + p)
    _, never = measure(fn, p, (x, 0)).norms
    assert never.tokens == 0
    assert np.isnan(never.before.maximum)
    assert measure(fn, p, (x, 0)).not_finite == ()


def test_derivative_rules_and_vmap() -> None:
    @jax.custom_jvp
    def rule(x: jax.Array) -> jax.Array:
        return norm(x)

    rule.defjvp(lambda x, t: (norm(*x), t[0]))
    x = draw(3, 4, 6)
    got = measure(lambda p, x: jax.vmap(jax.vmap(lambda x: rule(x * p)))(x), jnp.ones(6), x)
    check(got.norms[0].before, x)
    assert got.norms[0].tokens == 12


# --- devices -------------------------------------------------------------------------------------


def mesh(kind: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_arrays_that_are_spread_stay_so(kind: AxisType) -> None:
    w, x = draw(6, 12), draw(4, 5, 6)
    on = mesh(kind)
    spread_w = jax.device_put(w, NamedSharding(on, P(None, "model")))
    spread_x = jax.device_put(x, NamedSharding(on, P("data")))
    with jax.set_mesh(on):
        (only,) = measure(lambda w, x: norm(jnp.sin(x) @ w), spread_w, spread_x).norms
    check(only.before, np.sin(x) @ w)
    assert only.tokens == 20


@pytest.mark.parametrize("check_vma", [False, True])
@pytest.mark.parametrize("spec", [P("data", "model"), P("data"), P(None, "model"), P()], ids=str)
def test_shard_map(spec: P, check_vma: bool) -> None:
    """Features over devices, tokens over devices, or the same tokens on all of them."""
    x, w = draw(4, 12), draw(3, 12)
    over = "model" in spec

    def shard_norm(x: jax.Array) -> jax.Array:
        if not over:
            return norm(x)
        c = x - jax.lax.pmean(x.mean(-1, keepdims=True), "model")
        var = jax.lax.pmean(jnp.square(c).mean(-1, keepdims=True), "model")
        return c * jax.lax.rsqrt(var + 1e-6)

    def body(w: jax.Array, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, w: (x + jnp.sin(shard_norm(x) * w), None), x, w)[0]

    part = P(None, "model") if over else P()
    fn = jax.shard_map(
        body, mesh=mesh(), in_specs=(part, spec), out_specs=spec, check_vma=check_vma
    )
    (only,) = measure(fn, w, x).norms
    assert only.tokens.shape == (3,)
    for i in range(3):
        check(only.before, x, index=i)
        x = x + np.sin(norm(x) * w[i])


# --- odd numbers and bad input -------------------------------------------------------------------


def two(p: Any, x: jax.Array) -> jax.Array:
    """Two norms, of which the first does not see what is odd about the second half of `p`."""
    with jax.named_scope("first"):
        y = norm(x * p["a"])
    with jax.named_scope("second"):
        return norm(jnp.sin(y) * p["b"])


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_told(odd: float) -> None:
    p, x = {"a": draw(6), "b": draw(6).at[2].set(odd)}, draw(4, 6)
    got = measure(two, p, x, x)
    first, second = got.norms
    check(first.before, np.concatenate([x * p["a"]] * 2))
    numbers = second.before.share, second.before.mean, second.before.maximum
    assert np.isnan([*numbers, second.before.percentile_99]).all()
    assert got.not_finite == ("second",)
    assert "nan" in str(got)
    assert "Infinite or NaN activations: second." in str(got)
    one_token = x.at[1, 3].set(odd)
    both = measure(two, {**p, "b": p["a"]}, x, one_token)
    assert both.not_finite == ("first", "second")
    assert both.norms[0].tokens == 8


def test_functions_without_norms() -> None:
    for fn in (lambda p, x: x * p, lambda p, x: norm((x * p)[:, :1])):  # one element has no mean
        got = measure(fn, jnp.ones(6), draw(4, 6))
        assert got.norms == ()
        assert str(got) == "No LayerNorm found."
        assert "No LayerNorm" in got._repr_html_()


X = np.ones((4, 6))
BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "no batch": (lambda: measure(two, {"a": X[0], "b": X[0]}), "batches: there is none"),
    "no params": (lambda: measure(two), "params: missing"),
    "shape": (lambda: measure(norm, X, (), (X,)), r"batches\[1\]: its inputs"),
    "smaller": (
        lambda: measure(lambda p, x: norm(x * p), X[0], X, X[:2]),
        r"batches\[1\]: input '0' is \(2, 6\) float64, and \(4, 6\) float64 in the first",
    ),
    "dtype": (
        lambda: measure(lambda p, x: norm(x * p), X[0], X, X.astype("f4")),
        r"batches\[1\]: .*float32",
    ),
    "structure": (
        lambda: measure(lambda p, x: norm(x["x"] * p), X[0], {"x": X}, {"y": X}),
        r"batches\[1\]: its inputs have another structure",
    ),
    "function": (lambda: measure(X, X, X), "fn: a ndarray is not callable"),
    "functions": (lambda: measure({"f": norm}, X, X), "fn: a dict is no single function"),
    "leaf": (lambda: measure(lambda p, x: norm(x), X, "x"), r"batches\[0\]: leaf .* is a str"),
    "shapes": (
        lambda: measure(lambda p, x: norm(x), X, jax.ShapeDtypeStruct((2, 3), float)),
        "ShapeDtypeStruct",
    ),
    "traced": (
        lambda: jax.jit(lambda x: measure(lambda p, x: norm(x), X, x).n_batches)(X),
        r"batches\[0\]: being traced",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    call, words = BAD[name]
    with pytest.raises(FoldError, match=words):
        call()


def test_trees_that_do_not_fit_a_fold() -> None:
    p, x = {"w": draw(5, 6)}, draw(4, 5)

    def fn(p: Any, x: jax.Array, wide: bool = False) -> jax.Array:
        y = x @ p["w"]
        return jnp.sin(y) if wide else norm(y)

    folded = jax_lnfold.fold(fn, p, x)
    with pytest.raises(TreeError, match="not the tree that was folded"):
        measure(folded, {"v": p["w"]}, x)
    with pytest.raises(PlanMismatchError):
        measure(folded, p, x, wide=True)
    twice = measure(folded, folded.params, x).norms[0]
    assert twice.before.maximum < 1e-28
    assert twice.after.maximum < 1e-28


# --- models, keywords, reports -------------------------------------------------------------------


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, offset: jax.Array) -> jax.Array:
        y = nn.Dense(6, param_dtype=float)(x) + offset
        return nn.LayerNorm()(y) if train else y


def test_linen_modules_and_keywords() -> None:
    x, offset = draw(4, 5), draw(6)
    variables = Linen().init(jax.random.key(0), x, train=True, offset=offset)
    got = measure(Linen(), variables, x, 2 * x, train=True, offset=offset)
    kernel = variables["params"]["Dense_0"]["kernel"]
    check(got.norms[0].before, np.concatenate([x @ kernel, 2 * x @ kernel]) + offset)
    assert measure(Linen(), variables, x, train=False, offset=offset).norms == ()


class Nnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.linear, self.norm = nnx.Linear(5, 6, rngs=rngs), nnx.LayerNorm(6, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(self.linear(x))


def test_models() -> None:
    x = jnp.asarray(draw(4, 5), jnp.float32)
    model = Nnx(nnx.Rngs(0))
    (only,) = measure(model, x, (x + 1,)).norms
    check(only.before, np.concatenate([model.linear(x), model.linear(x + 1)]), rtol=1e-4)
    with pytest.raises(FoldError, match="fn: a FoldedModel"):
        measure(jax_lnfold.fold(model, x), x)
    small = eqx.nn.Sequential([eqx.nn.Linear(5, 6, key=jax.random.key(0)), eqx.nn.LayerNorm(6)])
    (only,) = measure(small, x[0], x[1]).norms
    check(only.before, jax.vmap(small[0])(x[:2]), rtol=1e-4)


def test_reports_with_statistics() -> None:
    model = BY_NAME["swin"].build()
    folded = jax_lnfold.fold(model.apply_fn, model.params, *model.inputs)
    found = measure(folded, model.params, model.inputs)
    report = folded.report.with_statistics(found)
    assert report == folded.report
    assert folded.report.statistics is None
    text, plain = str(report), str(folded.report)
    assert "share of mean" in text
    assert "share of mean" not in plain
    assert "measured on 1 batch." in text
    assert "<th>share of mean</th>" in report._repr_html_()
    stage = [n for n in found.norms if "stage_2" in n.path]
    low, high = (f(n.before.share for n in stage) for f in (min, max))
    assert f"<td>{low:.1g} to {high:.1g} -&gt; " in report._repr_html_()
    other = measure(lambda p, x: norm(x * p), jnp.ones(6), draw(4, 6))
    with pytest.raises(FoldError, match="statistics: of other LayerNorms"):
        folded.report.with_statistics(other)
    with pytest.raises(FoldError, match="statistics: a dict is not what `measure` returns"):
        folded.report.with_statistics({})


def test_what_is_shown() -> None:
    p, x = {"a": draw(6), "b": draw(6)}, draw(4, 6)
    got = measure(two, p, x)
    assert isinstance(got, Statistics)
    assert repr(got) == "<Statistics: 2 LayerNorms of 1 batch>"
    head, first, *_ = str(got).splitlines()
    assert head.split() == "LayerNorm tokens share of mean mean of tokens 99 % maximum".split()
    assert first.split()[:3] == ["first", "4", f"{got.norms[0].before.share:.2g}"]
    assert "<td>first</td><td>4</td>" in got._repr_html_()


def test_one_compilation_for_all_batches() -> None:
    calls = []

    def fn(p: jax.Array, x: jax.Array) -> jax.Array:
        calls.append(1)
        return norm(x * p)

    measure(fn, jnp.ones(6), *[draw(4, 6) for _ in range(5)])
    assert len(calls) == 1
