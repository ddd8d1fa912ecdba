"""LayerNorms in the other spelling: where, as exact, in the same range, and with derivatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxpr_as_fun
from jax.sharding import PartitionSpec

import jax_lnfold
from jax_lnfold._compat import JaxprEqn
from jax_lnfold.program.tracing import trace
from tests.helpers.contracts import (
    assert_identical,
    iter_equations,
    relative_difference,
    snapshot,
)
from tests.helpers.interpreter import Interpreter

Array = jax.Array
Norm = Callable[[Array], Array]
WIDTH = 24


def wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def scaled(x: Array, centered: Array, variance: Array, eps: float = 1e-6) -> Array:
    return (centered * jax.lax.rsqrt(variance + eps)).astype(x.dtype)


def two_pass(x: Array, axes: Any = -1) -> Array:
    centered = wide(x) - wide(x).mean(axes, keepdims=True)
    return scaled(x, centered, jnp.square(centered).mean(axes, keepdims=True))


def by_var(x: Array) -> Array:
    mean = wide(x).mean(-1)
    return scaled(x, wide(x) - mean[..., None], wide(x).var(-1)[..., None])


def unbiased(x: Array) -> Array:
    centered = wide(x) - wide(x).sum(-1, keepdims=True) / x.shape[-1]
    variance = (centered * centered).sum(-1, keepdims=True) / (x.shape[-1] - 1)
    return (centered / jnp.sqrt(variance + 1e-3)).astype(x.dtype)


def one_pass(x: Array, axes: Any = -1) -> Array:
    mean = wide(x).mean(axes, keepdims=True)
    variance = jnp.square(wide(x)).mean(axes, keepdims=True) - jnp.square(mean)
    return scaled(x, wide(x) - mean, jnp.maximum(variance, 0))


def one_pass_of_sums(x: Array) -> Array:
    w, n = wide(x), x.shape[-1]
    total = w.sum(-1, keepdims=True)
    variance = (jnp.sum(w**2, -1, keepdims=True) - total * total / n) / n
    return scaled(x, w - total / n, variance)


SPELLINGS: dict[str, dict[str, Norm]] = {
    "one_pass": {  # what is asked for: what is there
        "two passes": two_pass,
        "var": by_var,
        "unbiased": unbiased,
        "two axes": partial(two_pass, axes=(-2, -1)),
        "jitted": jax.jit(two_pass),
        "mapped": jax.vmap(two_pass),
        "remat": jax.checkpoint(two_pass),
        "scanned": lambda x: jax.lax.scan(lambda c, y: (c, two_pass(y)), 0, x)[1],
        "branch": lambda x: jax.lax.cond(x.sum() > 0, two_pass, lambda y: y, x),
    },
    "two_pass": {
        "one pass": one_pass,
        "of sums": one_pass_of_sums,
        "two axes": partial(one_pass, axes=(-2, -1)),
        "jitted": jax.jit(one_pass),
        "mapped": jax.vmap(one_pass),
        "remat": jax.checkpoint(one_pass),
        "scanned": lambda x: jax.lax.scan(lambda c, y: (c, one_pass(y)), 0, x)[1],
    },
}
ALL = [pytest.param(s, n, id=f"{s}-{n}") for s, norms in SPELLINGS.items() for n in norms]


def model(norm: Norm) -> Callable[[Any, Array], Any]:
    """Post-LN: nothing folds, and the mean and the input have other readers."""

    def apply(p: Any, x: Array) -> Any:
        h = x + jnp.tanh(x @ p["a"]) @ p["b"]
        return norm(h), wide(h).mean(-1).astype(h.dtype)

    return apply


def params(dtype: Any = jnp.bfloat16) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    shapes = {"a": (WIDTH, 40), "b": (40, WIDTH)}
    return {k: jnp.asarray(rng.normal(size=s) / 5, dtype) for k, s in shapes.items()}


def stream(dtype: Any = jnp.bfloat16) -> Array:
    return jnp.asarray(np.random.default_rng(1).normal(size=(3, 5, WIDTH)) + 2, dtype)


def count(report: jax_lnfold.Report) -> int:
    return len(report.respelled)


@pytest.mark.parametrize(("spelling", "name"), ALL)
def test_the_same_function(spelling: str, name: str) -> None:
    """Values, gradients, and in two passes, once more analysed: the same norm.

    One pass sums what a compiler keeps of more digits, too, which is zero to nobody but us.
    """
    apply, p, x = model(SPELLINGS[spelling][name]), params(), stream()
    folded, plain = jax_lnfold.fold(apply, p, x, respell=spelling), jax_lnfold.fold(apply, p, x)
    assert count(folded.report) == 1
    assert folded.plan == plain.plan
    (norm,), (was,) = folded.report.norms, plain.report.norms
    assert norm.became == "left, respelled"
    assert (was.became, was.two_pass) == ("left", spelling == "one_pass")
    for now in jax_lnfold.analyze(folded.apply, p, x).norms if spelling == "two_pass" else ():
        assert (now.two_pass, now.axes, now.shape) == (True, was.axes, was.shape)
    assert not jax_lnfold.analyze(folded.apply, p, x, respell=spelling).respelled

    def gradients(f: Callable[..., Any]) -> Any:
        def total(p: Any, x: Array) -> Array:
            y, mean = f(p, x)
            weights = np.random.default_rng(2).normal(size=y.shape)
            return (wide(y) * weights).sum() + wide(mean).sum()

        return jax.grad(total, (0, 1))(p, x)

    before = snapshot(p)
    assert relative_difference(folded.apply(folded.params, x), apply(p, x)) < 0.02
    assert relative_difference(gradients(folded.apply), gradients(apply)) < 0.05
    assert_identical(p, before)


class Exact(Interpreter):
    """Runs a program of few digits in float64, without any rounding."""

    def _evaluate(self, eqn: JaxprEqn, values: list[Any], site: Any) -> Sequence[Any]:
        name = eqn.primitive.name
        if name == "convert_element_type" and jnp.issubdtype(values[0].dtype, jnp.floating):
            return [jnp.asarray(values[0], jnp.float64)]
        values = [
            jnp.asarray(v, jnp.float64) if jnp.issubdtype(jnp.result_type(v), jnp.floating) else v
            for v in values
        ]
        if name == "dot_general":
            eqn = eqn.replace(params=eqn.params | {"preferred_element_type": None})
        return super()._evaluate(eqn, values, site)


@pytest.mark.parametrize(("spelling", "name"), ALL)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_the_same_algebra(spelling: str, name: str, dtype: Any) -> None:
    """Where nothing is rounded, not a digit is lost: whatever the numbers are split into."""
    if name in ("scanned", "branch"):
        pytest.skip("the interpreter keeps the types of loops and branches")
    apply, p, x = model(SPELLINGS[spelling][name]), params(dtype), stream(dtype)
    folded = jax_lnfold.fold(apply, p, x, respell=spelling)
    assert count(folded.report) == 1
    more = jax.tree.map(lambda y: jnp.asarray(y, jnp.float64) * (1 + 1e-9), (p, x))
    with jax.enable_x64(True):
        more = jax.tree.map(lambda y: jnp.asarray(np.asarray(y, np.float64)), (p, x))
        want, got = (
            Exact().run(trace(f, p, (x,)).closed, more[0], (more[1],))
            for f in (apply, folded.apply)
        )
    assert relative_difference(got, want) < 1e-12
    assert want[0].dtype == np.float64


# --- digits and range -----------------------------------------------------------------------------


def rows(dtype: Any, ratio: float, outlier: float = 0.0, width: int = 768) -> Array:
    """Numbers of spread 1 with means of both signs, and one channel that stands out."""
    x = np.random.default_rng(3).normal(size=(64, width)) + ratio * np.resize([1, -1], (64, 1))
    x[:, 7] += outlier
    return jnp.asarray(x, dtype)


def sum_about_mean(norm: Norm, x: Array) -> Callable[[Array], Array]:
    """What a program takes for the sum of squares, once it is respelled."""
    folded = jax_lnfold.fold(lambda p, x: norm(x), (), x, respell="one_pass")
    program = jax.make_jaxpr(folded.apply)((), x)
    calls = [e for e in iter_equations(program) if "about_mean" in str(e.params.get("name"))]
    (call,) = calls
    run = jax.jit(jaxpr_as_fun(call.params["jaxpr"]))
    return lambda x: run(wide(x))[0]


def error(got: Array, want: np.ndarray) -> float:
    return float(np.sqrt(np.square(np.asarray(got, np.float64) - want).mean()))


RATIOS = (0, 1, 5, 30, 300, 1000, 30000)


@pytest.mark.parametrize("outlier", [0, 40, 3e3])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_as_exact(dtype: Any, outlier: float) -> None:
    """The sum to the last digits of float32, of the numbers that are stored; so the result."""
    of_one_pass = sum_about_mean(two_pass, rows(dtype, 0))
    for ratio in RATIOS:
        x = rows(dtype, ratio, outlier)
        exact = np.asarray(x, np.float64)
        centered = exact - exact.mean(-1, keepdims=True)
        sums = np.square(centered).sum(-1)
        np.testing.assert_allclose(of_one_pass(x), sums, rtol=x.shape[-1] / 2**24, atol=1e-30)
        want = centered / np.sqrt(sums[:, None] / x.shape[-1] + 1e-6)
        folded = jax_lnfold.fold(lambda p, x: two_pass(x), (), x, respell="one_pass")
        found = [error(jax.jit(f)((), x), want) for f in (folded.apply, lambda p, x: two_pass(x))]
        assert found[0] <= 1.1 * found[1] + 1e-9, f"mean / std of {ratio}"


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_one_number_that_differs(dtype: Any) -> None:
    """By one unit in the last place, below and above a power of two."""
    of_one_pass = sum_about_mean(two_pass, rows(dtype, 0))
    for base in (1.0, 256.0, 255.0, 1000.0):
        x, below = np.full((64, 768), base), jnp.nextafter(*jnp.asarray([base, 0], dtype))
        for row in range(64):
            x[row, : 12 * row + 1] = float(below)
        want = np.square(x - x.mean(-1, keepdims=True)).sum(-1)
        np.testing.assert_allclose(of_one_pass(jnp.asarray(x, dtype)), want, rtol=1e-6)


@pytest.mark.parametrize("ratio", [3, 300, 1000, 4000, 30000])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_digits_that_a_compiler_keeps(dtype: Any, ratio: float) -> None:
    """Where it leaves out a cast, they count; they never become a deviation that is not there."""
    x, y = rows(dtype, 0), rows(dtype, ratio)
    total = np.asarray(x, np.float64) + np.asarray(y, np.float64)
    centered = total - total.mean(-1, keepdims=True)
    want = centered / np.sqrt(np.square(centered).mean(-1, keepdims=True) + 1e-6)

    def apply(p: Any, x: Array, y: Array) -> Array:
        return two_pass(x + y)

    folded = jax_lnfold.fold(apply, (), x, y, respell="one_pass")
    assert count(folded.report) == 1
    as_asked = jax.jit(apply, compiler_options={"xla_allow_excess_precision": False})
    found = [error(f((), x, y), want) for f in (jax.jit(folded.apply), jax.jit(apply), as_asked)]
    assert found[0] <= 1.1 * (found[1] if ratio <= 1000 else found[2])


HUGE = (1e15, 1e18, 1.5e19, 2e19, 1e21, 1e25, 1e30, 1e35)


def test_the_same_range() -> None:
    """What overflows, or does not, is what did before; not a number more is infinite or NaN."""
    before = jax.jit(two_pass)
    folded = jax_lnfold.fold(
        lambda p, x: two_pass(x), (), rows(jnp.bfloat16, 0), respell="one_pass"
    )
    after = jax.jit(folded.apply)
    for size in HUGE:
        for ratio in (0, 3, 100):
            x = (wide(rows(jnp.bfloat16, ratio)) * (size / (1 + ratio))).astype(jnp.bfloat16)
            want, got = (np.asarray(y, np.float64) for y in (before(x), after((), x)))
            assert np.isfinite(want).all()
            np.testing.assert_allclose(got, want, rtol=0.01, atol=0.01, err_msg=f"{size} {ratio}")
    for odd in (np.inf, -np.inf, np.nan, 3e38):
        x = rows(jnp.bfloat16, 1).at[5, 3].set(odd).at[:5].set(1e-30)
        want, got = (np.asarray(y, np.float64) for y in (before(x), after((), x)))
        assert np.array_equal(np.isnan(got), np.isnan(want)), odd
        np.testing.assert_allclose(np.delete(got, 5, 0), np.delete(want, 5, 0), atol=0.01)


def test_two_passes_are_at_least_as_exact() -> None:
    for dtype, ratio in product((jnp.bfloat16, jnp.float32), RATIOS):
        x = rows(dtype, ratio, 10)
        exact = np.asarray(x, np.float64)
        centered = exact - exact.mean(-1, keepdims=True)
        want = centered / np.sqrt(np.square(centered).mean(-1, keepdims=True) + 1e-6)
        folded = jax_lnfold.fold(lambda p, x: one_pass(x), (), x, respell="two_pass")
        assert count(folded.report) == 1
        found = [error(jax.jit(f)((), x), want) for f in (folded.apply, lambda p, x: one_pass(x))]
        assert found[0] <= 1.1 * found[1] + 1e-7, f"mean / std of {ratio}"


# --- what stays -----------------------------------------------------------------------------------


def with_sums(x: Array) -> tuple[Array, Array, Array]:
    w = wide(x)
    return w, w.mean(-1, keepdims=True), jnp.square(w - w.mean(-1, keepdims=True))


def nothing_added(x: Array) -> Array:
    w, mean, squares = with_sums(x)
    return scaled(x, w - mean, squares.mean(-1, keepdims=True), 0.0)


def next_to_nothing_added(x: Array) -> Array:
    w, mean, squares = with_sums(x)
    return scaled(x, w - mean, squares.mean(-1, keepdims=True), 1e-30)


def returned_variance(x: Array) -> Any:
    w, mean, squares = with_sums(x)
    variance = squares.mean(-1, keepdims=True)
    return scaled(x, w - mean, variance), variance


def masked(x: Array) -> Array:
    w, mask = wide(x), jnp.arange(x.shape[-1]) < x.shape[-1] - 3
    centered = w - w.mean(-1, keepdims=True, where=mask)
    return scaled(x, centered, jnp.square(centered).mean(-1, keepdims=True, where=mask))


def of_other_axes(x: Array) -> Array:
    w, mean, squares = with_sums(x)
    return scaled(x, w - mean, squares.mean((-2, -1), keepdims=True))


def weighted(x: Array) -> Array:
    w, mean, squares = with_sums(x)
    return scaled(x, w - mean, (squares * jnp.arange(1.0, x.shape[-1] + 1)).mean(-1, keepdims=True))


def sealed(x: Array) -> Array:
    inner = jax.custom_vjp(partial(two_pass))
    inner.defvjp(lambda x: (two_pass(x), x), lambda x, g: (g,))
    return inner(x)


def sharded(x: Array) -> Array:
    mesh = jax.make_mesh((1,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec("i")
    return jax.shard_map(two_pass, mesh=mesh, in_specs=spec, out_specs=spec)(x)


def of_batch_and_mean_alone(x: Array) -> Array:
    return (wide(x) - wide(x).mean(-1, keepdims=True)).astype(x.dtype)


def wrong_factor(x: Array) -> Array:
    w = wide(x)
    mean = w.mean(-1, keepdims=True)
    variance = jnp.square(w).mean(-1, keepdims=True) - 0.98 * jnp.square(mean)
    return scaled(x, w - mean, variance)


def squares_read_twice(x: Array) -> Any:
    w = wide(x)
    mean, second = w.mean(-1, keepdims=True), jnp.square(w).mean(-1, keepdims=True)
    return scaled(x, w - mean, second - jnp.square(mean)), second


def of_another(x: Array) -> Array:
    w, other = wide(x), wide(x[..., ::-1])
    variance = jnp.square(w).mean(-1, keepdims=True) - jnp.square(
        (w + other).mean(-1, keepdims=True) / 2
    )
    return scaled(x, w - w.mean(-1, keepdims=True), variance)


def of_other_tokens(x: Array) -> Array:
    """As many rows as columns: beside the variance, a difference of sums of different tokens."""
    w = wide(x[:, :3])
    mean, second = w.mean(-1), jnp.square(w).mean(-1)
    odd = second.T - jnp.square(mean)
    variance = jnp.square(w - mean[..., None]).mean(-1)
    return scaled(x[:, :3], w - mean[..., None], (variance + odd)[..., None])


def about(mean: Callable[[Array], Array]) -> Norm:
    """A norm in two passes about another mean."""

    def norm(x: Array) -> Array:
        centered = wide(x) - mean(x)
        return scaled(x, centered, jnp.square(centered).mean(-1, keepdims=True))

    return norm


def rounded_mean(x: Array) -> Array:
    return wide(x.mean(-1, keepdims=True))  # JAX takes it in float32


def mean_of_rounded(x: Array) -> Array:
    return wide(x.astype(jnp.float8_e4m3fn).astype(x.dtype)).mean(-1, keepdims=True)


def mean_of_few_digits(x: Array) -> Array:
    return jax.lax.reduce_precision(wide(x).mean(-1, keepdims=True), 8, 12)


def stopped_mean(x: Array) -> Array:
    """The gradient is that of a mean that is not stopped, but second derivatives are not."""
    return jax.lax.stop_gradient(wide(x).mean(-1, keepdims=True))


STAYS: dict[str, tuple[str, Callable[[Array], Any]]] = {
    "rounded after the cast": ("one_pass", lambda x: two_pass(wide(x) * 1.1).astype(x.dtype)),
    "a result of 32 bits": ("one_pass", lambda x: two_pass(wide(x))),
    "nothing added": ("one_pass", nothing_added),
    "next to nothing added": ("one_pass", next_to_nothing_added),
    "returned variance": ("one_pass", returned_variance),
    "masked": ("one_pass", masked),
    "squares over other axes": ("one_pass", of_other_axes),
    "weighted squares": ("one_pass", weighted),
    "a derivative rule": ("one_pass", sealed),
    "inside of a shard_map": ("one_pass", sharded),
    "about a rounded mean": ("one_pass", about(rounded_mean)),
    "about a mean of rounded numbers": ("one_pass", about(mean_of_rounded)),
    "about a mean of few digits": ("one_pass", about(mean_of_few_digits)),
    "about a stopped mean": ("one_pass", about(stopped_mean)),
    "in one pass already": ("one_pass", one_pass),
    "in two passes already": ("two_pass", two_pass),
    "no norm": ("two_pass", of_batch_and_mean_alone),
    "no variance": ("two_pass", wrong_factor),
    "squares read twice": ("two_pass", squares_read_twice),
    "mean of another": ("two_pass", of_another),
    "mean of other tokens": ("two_pass", of_other_tokens),
}


@pytest.mark.parametrize("name", STAYS)
def test_what_stays(name: str) -> None:
    spelling, norm = STAYS[name]
    x = stream()
    folded = jax_lnfold.fold(lambda p, x: norm(x), (), x, respell=spelling)
    plain = jax_lnfold.fold(lambda p, x: norm(x), (), x)
    assert not folded.report.respelled
    assert str(jax.make_jaxpr(folded.apply)((), x)) == str(jax.make_jaxpr(plain.apply)((), x))


@pytest.mark.parametrize("spelling", ["one_pass", "two_pass"])
def test_stored_in_32_bits(spelling: str) -> None:
    norm = {"one_pass": two_pass, "two_pass": one_pass}[spelling]
    report = jax_lnfold.analyze(
        model(norm), params(jnp.float32), stream(jnp.float32), respell=spelling
    )
    assert count(report) == (spelling == "two_pass")


@pytest.mark.parametrize(("dtype", "longest"), [(jnp.bfloat16, 32767), (jnp.float16, 4095)])
def test_sums_that_are_exact(dtype: Any, longest: int) -> None:
    for width in (longest, longest + 1):
        x = jax.ShapeDtypeStruct((2, width), dtype)
        report = jax_lnfold.analyze(lambda p, x: two_pass(x), (), x, respell="one_pass")
        assert count(report) == (width == longest)


def test_a_folded_norm_is_none() -> None:
    def apply(p: Any, x: Array) -> Array:
        return two_pass(jnp.tanh(two_pass(x @ p["a"])))

    p = {"a": jnp.ones((WIDTH, 40), jnp.bfloat16)}
    report = jax_lnfold.analyze(apply, p, stream(), respell="one_pass")
    assert [n.became for n in report.norms] == ["folded", "left, respelled"]
    assert [r.root for r in report.respelled] == [(1, 2)]
    assert report.respelled[0].shape == (3, 5, 40)
    assert "1 LayerNorm respelled in one pass" in str(report)


PLATFORMS = {"tpu": "one_pass", "gpu": "two_pass", "cpu": ""}


@pytest.mark.parametrize("platform", PLATFORMS)
def test_the_platform_says_how(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def respelled(norm: Norm, **options: Any) -> int:
        return count(jax_lnfold.analyze(model(norm), params(), stream(), **options))

    spelling = PLATFORMS[platform]
    expected = {two_pass: int(spelling == "one_pass"), one_pass: int(spelling == "two_pass")}
    for norm, number in expected.items():
        assert respelled(norm, optimize=platform) == number
        assert respelled(norm, optimize=platform, respell=True) == number
        assert respelled(norm, optimize="cpu", respell=True) == 0
        monkeypatch.setattr(jax, "default_backend", lambda: platform)
        assert respelled(norm, respell=True) == respelled(norm, optimize="auto") == number
        assert respelled(norm) == 0
        monkeypatch.undo()


@pytest.mark.parametrize("respell", ["", "three_pass", 1, None, 0.0])
def test_bad_values(respell: Any) -> None:
    with pytest.raises(jax_lnfold.FoldError, match=r"respell: .* pass True"):
        jax_lnfold.fold(model(two_pass), params(), stream(), respell=respell)
