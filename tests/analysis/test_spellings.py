"""A LayerNorm is recognised by what it computes, however it is spelled.

Every spelling sits in ``norm(x @ w + b) @ v`` and has to fold; the same spelling without its mean
is an RMSNorm and must not be taken for a LayerNorm.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.lax import rsqrt

import jax_lnfold
from tests.helpers.contracts import (
    check_contracts,
    count_reductions,
    fold_checked,
    relative_difference,
    snapshot,
)
from tests.helpers.derivative_rules import with_jvp, with_vjp

Array = jax.Array
Axes = tuple[int, ...]
Mean = Callable[[Array, Axes], Any]
Apply = Callable[[Any, Array], Array]
Params = dict[str, Array]
Formula = Callable[..., Array]

pytestmark = pytest.mark.usefixtures("explicit_ranks")

B, T, DIN, OUT = 2, 5, 9, 7
EPS = 1e-3


def make_params(features: tuple[int, ...], dtype: Any = jnp.float64) -> Params:
    rng = np.random.default_rng(len(features))
    shapes = {"w": (DIN, *features), "b": features, "g": features, "c": features}
    params = {name: rng.normal(0.5, 1.0, shape) for name, shape in shapes.items()}
    params["v"] = rng.normal(0.1, 0.3, (*features, OUT))
    return {name: jnp.asarray(leaf, dtype) for name, leaf in params.items()}


def make_input(*shape: int, dtype: Any = jnp.float64) -> Array:
    return jnp.asarray(np.random.default_rng(len(shape)).normal(0.3, 1.0, shape), dtype)


def leading(leaf: Array) -> Array:
    """The leaf with the two leading axes that explicit rank promotion asks for."""
    return jax.lax.expand_dims(leaf, (0, 1))


def model(norm: Callable[..., Array], axes: Axes, scaled: bool = True) -> Apply:
    """``norm(x @ w + b, scale, bias) @ v``; without scale and bias these are one and zero."""

    def apply(p: Params, x: Array) -> Array:
        s = jnp.tensordot(x, p["w"], 1) + leading(p["b"])
        g, c = (leading(p["g"]), leading(p["c"])) if scaled else (1.0, 0.0)
        return jnp.tensordot(norm(s, g, c), p["v"], len(axes))

    return apply


def axes_of(features: tuple[int, ...]) -> Axes:
    return tuple(range(-len(features), 0))


# --- formulas ------------------------------------------------------------------------------------
# Each takes the input, scale, bias, the mean to subtract, which near misses make zero, and axes.


def plain_mean(x: Array, axes: Axes) -> Array:
    return jnp.mean(x, axes, keepdims=True)


def no_mean(x: Array, axes: Axes) -> float:
    return 0.0


def count(x: Array, axes: Axes) -> int:
    return int(np.prod([x.shape[axis] for axis in axes]))


def sums_of_squares(x: Array, axes: Axes) -> Array:
    return jnp.sum(x * x, axes, keepdims=True)


def slope_and_intercept_of(x: Array, g: Any, c: Any, m: Any, v: Array) -> Array:
    a = rsqrt(v + EPS) * g
    return x * a + (c - m * a)


def slope_and_intercept_apart(x: Array, g: Any, c: Any, m: Any, v: Array) -> Array:
    a = rsqrt(v + EPS) * g
    return (x * a - m * a) + c


def product_written_twice(x: Array, g: Any, c: Any, m: Any, axes: Axes) -> Array:
    r = rsqrt(plain_mean(jnp.square(x - m), axes) + EPS)
    return x * (r * g) + (c - (g * r) * m)


def product_grouped_differently(x: Array, g: Any, c: Any, m: Any, axes: Axes) -> Array:
    r = rsqrt(plain_mean(jnp.square(x), axes) - m * m + EPS)
    return g * x * r + (c - m * (r * g))


def root_taken_twice(x: Array, g: Any, c: Any, m: Any, axes: Axes) -> Array:
    v = plain_mean(jnp.square(x - m), axes) + EPS
    return g / jnp.sqrt(v) * x + (c - m / jnp.sqrt(v) * g)


def statistics_without_kept_axes(x: Array, g: Any, c: Any, m: Any, axes: Axes) -> Array:
    d = x - m
    r = rsqrt(jnp.mean(d * d, axes) + EPS)
    return d * r.reshape(r.shape + (1,) * len(axes)) * g + c


OF_THE_MEAN: dict[str, Callable[..., Array]] = {
    "two_pass": lambda x, g, c, m, axes: (
        (d := x - m) / jnp.sqrt(plain_mean(d * d, axes) + EPS) * g + c
    ),
    "two_pass_squared_again": lambda x, g, c, m, axes: (
        (x - m) * rsqrt(plain_mean(jnp.square(x - m), axes) + EPS) * g + c
    ),
    "one_pass": lambda x, g, c, m, axes: (
        (x - m) * rsqrt(plain_mean(x * x, axes) - m * m + EPS) * g + c
    ),
    "one_pass_clipped": lambda x, g, c, m, axes: (
        (x - m) * (rsqrt(jnp.maximum(0.0, plain_mean(jnp.square(x), axes) - m**2) + EPS) * g) + c
    ),
    "one_pass_sums": lambda x, g, c, m, axes: (
        g
        * ((x - m) / jnp.sqrt((sums_of_squares(x, axes) - m * m * (n := count(x, axes))) / n + EPS))
        + c
    ),
    "scale_with_the_root": lambda x, g, c, m, axes: (
        (d := x - m) * (g * rsqrt(plain_mean(d * d, axes) + EPS)) + c
    ),
    "slope_and_intercept": lambda x, g, c, m, axes: slope_and_intercept_of(
        x, g, c, m, plain_mean(jnp.square(x - m), axes)
    ),
    "slope_and_intercept_one_pass": lambda x, g, c, m, axes: slope_and_intercept_apart(
        x, g, c, m, plain_mean(jnp.square(x), axes) - m * m
    ),
    "product_written_twice": product_written_twice,
    "product_grouped_differently": product_grouped_differently,
    "root_taken_twice": root_taken_twice,
    "eps_outside_the_root": lambda x, g, c, m, axes: (
        g * (d := x - m) / (jnp.sqrt(plain_mean(d * d, axes)) + EPS) + c
    ),
    "power_of_minus_half": lambda x, g, c, m, axes: (
        (d := x - m) * jnp.power(plain_mean(d**2, axes) + EPS, -0.5) * g + c
    ),
    "reciprocal_of_the_root": lambda x, g, c, m, axes: (
        (d := x - m) * (1 / jnp.sqrt(plain_mean(d * d, axes) + EPS)) * g + c
    ),
    "norm_of_the_vector": lambda x, g, c, m, axes: (
        (d := x - m) / jnp.sqrt(sums_of_squares(d, axes) + EPS) * np.sqrt(count(x, axes)) * g + c
    ),
    "statistics_without_kept_axes": statistics_without_kept_axes,
}


def given_its_mean(formula: Callable[..., Array]) -> Formula:
    return lambda x, g, c, axes, mean: formula(x, g, c, mean(x, axes), axes)


def features_first(x: Array, g: Any, c: Any, axes: Axes, mean: Mean) -> Array:
    x = jnp.moveaxis(x, axes, tuple(range(len(axes))))
    first = tuple(range(len(axes)))
    d = x - mean(x, first)
    d = d * rsqrt(plain_mean(d * d, first) + EPS)
    return jnp.moveaxis(d, first, axes) * g + c


def flattened(x: Array, g: Any, c: Any, axes: Axes, mean: Mean) -> Array:
    flat = x.reshape(*x.shape[: -len(axes)], -1)
    d = flat - mean(flat, (-1,))
    return (d * rsqrt(plain_mean(d * d, (-1,)) + EPS)).reshape(x.shape) * g + c


FORMULAS = {name: given_its_mean(formula) for name, formula in OF_THE_MEAN.items()}
one_pass, two_pass, one_pass_clipped, slope_and_intercept = (
    FORMULAS[name] for name in "one_pass two_pass one_pass_clipped slope_and_intercept".split()
)
FORMULAS |= {"features_first": features_first, "flattened": flattened}

# Formulas whose variance brings a mean of its own: without `mean` they are no RMSNorm either.
OWN_MEAN: dict[str, Callable[..., Array]] = {
    "jnp_var": lambda x, g, c, m, axes: (
        (x - m) * rsqrt(jnp.var(x, axes, keepdims=True) + EPS) * g + c
    ),
    "jnp_std": lambda x, g, c, m, axes: (x - m) / (jnp.std(x, axes, keepdims=True) + EPS) * g + c,
    "jnp_std_unbiased": lambda x, g, c, m, axes: (
        g * (x - m) / (jnp.std(x, axes, ddof=1, keepdims=True) + EPS) + c
    ),
    "var_of_the_centered": lambda x, g, c, m, axes: (
        (d := x - m) * rsqrt(jnp.var(d, axes, keepdims=True) + EPS) * g + c
    ),
}
VARIANCES = {name: given_its_mean(formula) for name, formula in OWN_MEAN.items()}
jnp_var = VARIANCES["jnp_var"]


def standardize(x: Array, g: Any, c: Any, axes: Axes, mean: Mean) -> Array:
    return jax.nn.standardize(x, axis=axes, epsilon=EPS) * g + c


def check_folds(
    apply: Apply, features: tuple[int, ...], params: Any = None, sums: tuple[int, ...] | None = None
) -> None:
    """One LayerNorm is found and folded at no cost, and only the second moment is still summed.

    `sums` are the sizes of the axes that are summed, where a reshape makes others of `features`.
    """
    params = make_params(features) if params is None else params
    x, sums = make_input(B, T, DIN), sums or features
    folded = fold_checked(apply, params, x)
    report = folded.report
    assert (report.n_folded, report.n_inserted) == (1, 0)
    assert [norm.folded for norm in report.norms] == [True]
    assert count_reductions(apply, params, x, sizes=sums) >= 2
    assert count_reductions(folded.apply, folded.params, x, sizes=sums) == 1
    check_contracts(apply, params, folded, make_input(B + 1, T - 2, DIN))


def check_left_alone(apply: Apply, params: Any, finds_nothing: bool = True) -> None:
    """Nothing folds; with `finds_nothing`, there was no LayerNorm to begin with."""
    folded = fold_checked(apply, params, make_input(B, T, DIN))
    report = folded.report
    assert (report.n_folded, report.n_inserted, report.edits) == (0, 0, ())
    assert not any(norm.folded for norm in report.norms)
    if finds_nothing:
        assert report.norms == ()


def check_sound(apply: Apply, params: Any) -> None:
    """At most one LayerNorm is found; it may be folded, if the result is right."""
    report = fold_checked(apply, params, make_input(B, T, DIN)).report
    assert report.n_folded <= len(report.norms) <= 1
    assert report.n_inserted == 0


def bound(formula: Callable[..., Array], axes: Axes, mean: Mean = plain_mean) -> Any:
    return lambda x, g, c: formula(x, g, c, axes, mean)


@pytest.mark.parametrize(
    ("scaled", "features"), [(True, (12,)), (False, (3, 4))], ids=["scaled", "plain, two axes"]
)
@pytest.mark.parametrize("name", [*FORMULAS, *VARIANCES, "standardize"])
def test_formula(name: str, scaled: bool, features: tuple[int, ...]) -> None:
    axes = axes_of(features)
    formula = {**FORMULAS, **VARIANCES, "standardize": standardize}[name]
    sums = (12,) if name == "flattened" else features
    check_folds(model(bound(formula, axes), axes, scaled), features, sums=sums)


@pytest.mark.parametrize("name", FORMULAS)
def test_formula_without_its_mean(name: str) -> None:
    check_left_alone(model(bound(FORMULAS[name], (-1,), no_mean), (-1,)), make_params((12,)))


@pytest.mark.parametrize("name", ["jnp_var", "jnp_std", "jnp_std_unbiased"])
def test_input_that_is_not_centered_over_its_deviation(name: str) -> None:
    apply = model(bound(VARIANCES[name], (-1,), no_mean), (-1,))
    check_left_alone(apply, make_params((12,)), finds_nothing=False)


# What multiplies the input, what the mean, and whether they are the same: of the root's reciprocal
# r and the scales g and h.
SLOPES: dict[str, tuple[Callable[..., Any], Callable[..., Any], bool]] = {
    "wide": (
        lambda r, g, h: r * g,
        lambda r, g, h: r * jnp.broadcast_to(g, (*r.shape[:2], 12)),
        True,
    ),
    "function": (lambda r, g, h: r * g, lambda r, g, h: jax.jit(jnp.multiply)(g, r), True),
    "both scales": (lambda r, g, h: h * (r * g), lambda r, g, h: g * (h * r), True),
    "quotient": (lambda r, g, h: g / (h / r), lambda r, g, h: r * (g / h), True),
    "parts": (lambda r, g, h: r * g[..., :], lambda r, g, h: r * g[..., ::1], True),
    "numbers": (lambda r, g, h: r * (g * 2.0), lambda r, g, h: 4.0 * (r / 2.0) * g, True),
    "computed": (lambda r, g, h: r * jnp.exp(g + h), lambda r, g, h: jnp.exp(h + g) * r, True),
    "other scale": (lambda r, g, h: r * g, lambda r, g, h: r * h, False),
    "one scale more": (lambda r, g, h: r * g, lambda r, g, h: r * g * h, False),
    "other number": (lambda r, g, h: r * (g * 2.0), lambda r, g, h: r * g, False),
    "square": (lambda r, g, h: r * g, lambda r, g, h: r * g * g, False),
    "divided": (lambda r, g, h: r * g, lambda r, g, h: r / g, False),
    "other quotient": (lambda r, g, h: g / (h / r), lambda r, g, h: r * (h / g), False),
    "not commutative": (lambda r, g, h: r * (g - h), lambda r, g, h: r * (h - g), False),
    "other sum": (lambda r, g, h: r * (g + 1.0), lambda r, g, h: r * (g + 2.0), False),
    "other part": (lambda r, g, h: r * g[..., :1], lambda r, g, h: r * g[..., 1:2], False),
    "other power": (lambda r, g, h: r * g**2, lambda r, g, h: r * g**3, False),
    "other axes": (lambda r, g, h: r, lambda r, g, h: jnp.swapaxes(r[:, :2], 0, 1)[:, :1], False),
    "reversed": (lambda r, g, h: r * g, lambda r, g, h: r * g[..., ::-1], False),
}


@pytest.mark.parametrize("name", SLOPES)
def test_slope_of_the_mean(name: str) -> None:
    """``x * a + (c - mean(x) * b)`` is a LayerNorm if a and b are equal, however they are made."""
    slope, of_mean, same = SLOPES[name]

    def apply(p: Params, x: Array) -> Array:
        s = jnp.tensordot(x, p["w"], 1) + leading(p["b"])
        m, (g, c) = plain_mean(s, (-1,)), (leading(p["g"]), leading(p["c"]))
        r = rsqrt(plain_mean(jnp.square(s - m), (-1,)) + EPS)
        y = s * slope(r, g, c) + (c - m * of_mean(r, g, c))
        return jnp.tensordot(y, p["v"], 1)

    if same:
        check_folds(apply, (12,))
    else:
        check_left_alone(apply, make_params((12,)))


def test_slope_of_the_iteration_before() -> None:
    """Equal equations of two iterations compute different numbers."""

    def apply(p: Params, x: Array, before: bool) -> Array:
        def step(a: Array, x: Array) -> tuple[Array, Array]:
            s = jnp.tensordot(x, p["w"], 1) + p["b"]
            m = s.mean()
            b = rsqrt(jnp.square(s - m).mean() + EPS) * p["g"]
            return b, s * (a if before else b) + (p["c"] - m * b)

        _, y = jax.lax.scan(step, jnp.zeros(12), x)
        return y @ p["v"]

    params, x = make_params((12,)), make_input(T, DIN)
    counts = [
        fold_checked(lambda p, x, b=before: apply(p, x, b), params, x).report.n_folded
        for before in (False, True)
    ]
    assert counts == [1, 0]


@pytest.mark.parametrize("twice", [False, True])
def test_centering_of_one_of_two_equal_values(twice: bool) -> None:
    """What is equal by its equations is so no longer once one of both is centered."""

    def apply(p: Params, x: Array) -> tuple[Array, Array]:
        s, t = (jnp.tanh(jnp.tensordot(x, p["w"], 1)) for _ in range(2))
        first, second = (y * 3.0 * x[..., :1] for y in (s, t))
        normed = sum(two_pass(s * k, 1.0, 0.0, (-1,), plain_mean) for k in (1.0, 2.0, 3.0, 4.0))
        nothing = s * first - s * second - (t * first - t * second) if twice else s - s
        return jnp.tensordot(normed, p["v"], 1), nothing

    report = fold_checked(apply, make_params((12,)), make_input(B, T, DIN)).report
    assert report.n_folded == (0 if twice else 4)


# --- means ---------------------------------------------------------------------------------------


MEANS: dict[str, Mean] = {
    "sum over the count": lambda x, axes: jnp.sum(x, axes, keepdims=True) / count(x, axes),
    "sum times the fraction": lambda x, axes: (
        jnp.sum(x, axes, keepdims=True) * (1 / count(x, axes))
    ),
    "sum over an array": lambda x, axes: (
        jnp.sum(x, axes, keepdims=True) / jnp.asarray(count(x, axes), x.dtype)
    ),
    "average": lambda x, axes: jnp.average(x, axes, keepdims=True),
    "mean expanded again": lambda x, axes: jnp.expand_dims(jnp.mean(x, axes), axes),
    "mean broadcast": lambda x, axes: jnp.broadcast_to(plain_mean(x, axes), x.shape),
}
# Sums of something else than the input: they may be left alone, but not mistaken for another mean.
OTHER_MEANS: dict[str, Mean] = {
    "fraction inside the sum": lambda x, axes: jnp.sum(
        x * (1 / count(x, axes)), axes, keepdims=True
    ),
    "mean of the negative": lambda x, axes: -plain_mean(-x, axes),
    "halves of twice the mean": lambda x, axes: plain_mean(2 * x, axes) / 2,
    "product with ones": lambda x, axes: x @ jnp.full((12, 1), 1 / 12),
    "product with threes": lambda x, axes: x @ jnp.full((12, 1), 3 / 12),
    "einsum": lambda x, axes: jnp.einsum("btd->bt", x)[..., None] / 12,
    "einsum with ones": lambda x, axes: jnp.einsum("btd,d->bt", x, jnp.ones(12))[..., None] / 12,
    "mean of means": lambda x, axes: jnp.mean(
        jnp.mean(x.reshape(B, -1, 3, 4), -1), -1, keepdims=True
    ),
    "mean of two halves": lambda x, axes: (
        (plain_mean(x[..., :6], axes) + plain_mean(x[..., 6:], axes)) / 2
    ),
    "running sum": lambda x, axes: jnp.cumsum(x, -1)[..., -1:] / 12,
    "average of given weights": lambda x, axes: jnp.average(
        x, -1, weights=jnp.full(12, 2.0), keepdims=True
    ),
    "average of other weights": lambda x, axes: jnp.average(
        x, -1, weights=jnp.arange(1.0, 13.0), keepdims=True
    ),
    "nanmean": lambda x, axes: jnp.nanmean(x, axes, keepdims=True),
}


@pytest.mark.parametrize(
    ("formula", "features"),
    [(one_pass, (12,)), (two_pass, (3, 4)), (slope_and_intercept, (12,))],
    ids=["one-pass", "two-pass, two axes", "slope and intercept"],
)
@pytest.mark.parametrize("name", MEANS)
def test_mean(name: str, formula: Any, features: tuple[int, ...]) -> None:
    axes = axes_of(features)
    check_folds(model(bound(formula, axes, MEANS[name]), axes), features)


@pytest.mark.parametrize("formula", [one_pass, two_pass], ids=["one_pass", "two_pass"])
@pytest.mark.parametrize("name", OTHER_MEANS)
def test_mean_that_may_be_left_alone(name: str, formula: Any) -> None:
    check_sound(model(bound(formula, (-1,), OTHER_MEANS[name]), (-1,)), make_params((12,)))


def negative_mean_added(x: Array, g: Any, c: Any) -> Array:
    d = x + -plain_mean(x, (-1,))
    return d * rsqrt(plain_mean(d * d, (-1,)) + EPS) * g + c


def everything_computed_again(x: Array, g: Any, c: Any) -> Array:
    """Nothing is shared: the mean, the variance and the numerator each reshape the input anew."""

    def again() -> Array:
        return x.reshape(B * T, 12)

    d = again() - plain_mean(again(), (-1,))
    return (d / jnp.sqrt(jnp.var(again(), -1, keepdims=True) + EPS)).reshape(x.shape) * g + c


def over_the_cube_root(x: Array, g: Any, c: Any) -> Array:
    """No LayerNorm, but centered."""
    d = x - plain_mean(x, (-1,))
    return d / jnp.cbrt(plain_mean(d * d, (-1,)) + EPS) * g + c


OTHER_FORMULAS = (negative_mean_added, everything_computed_again, over_the_cube_root)


@pytest.mark.parametrize("norm", OTHER_FORMULAS)
def test_formula_that_may_be_left_alone(norm: Any) -> None:
    check_sound(model(norm, (-1,)), make_params((12,)))


# --- wrappers ------------------------------------------------------------------------------------


def per_token(norm: Callable[..., Array]) -> Callable[..., Array]:
    """Equinox: a function of one token, mapped over tokens and then over the batch."""

    def token(x: Array, g: Array, c: Array) -> Array:
        return norm(x[None, None], g, c)[0, 0]

    over_tokens = jax.vmap(token, (0, None, None))
    return jax.vmap(over_tokens, (0, None, None))


WRAPPERS: dict[str, Callable[[Callable[..., Array]], Callable[..., Array]]] = {
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "custom_jvp": with_jvp,
    "custom_vjp": with_vjp,
    "vmap": per_token,
    "jit of custom_vjp": lambda norm: jax.jit(with_vjp(norm)),
    "checkpoint of jit": lambda norm: jax.checkpoint(jax.jit(norm)),
    "jit of vmap": lambda norm: jax.jit(per_token(norm)),
    "named_call": lambda norm: jax.named_call(norm, name="norm"),
}
WRAPPED = {name: FORMULAS[name] for name in ("one_pass_clipped", "two_pass")} | {"jnp_var": jnp_var}


@pytest.mark.parametrize("formula", WRAPPED)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped(wrapper: str, formula: str) -> None:
    norm = WRAPPERS[wrapper](bound(WRAPPED[formula], (-1,)))
    check_folds(model(norm, (-1,)), (12,))


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrapped_without_its_mean(wrapper: str) -> None:
    norm = WRAPPERS[wrapper](bound(two_pass, (-1,), no_mean))
    check_left_alone(model(norm, (-1,)), make_params((12,)))


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_gradient_of_the_input(wrapper: str) -> None:
    """The same function of the input has the same derivative."""
    apply = model(WRAPPERS[wrapper](bound(two_pass, (-1,))), (-1,))
    params, x = make_params((12,)), make_input(B, T, DIN)
    folded = fold_checked(apply, params, x)
    assert folded.report.n_folded == 1

    def loss(fn: Apply, params: Any, x: Array) -> Array:
        return jnp.sum(jnp.sin(fn(params, x)))

    want = jax.grad(loss, 2)(apply, params, x)
    got = jax.grad(loss, 2)(folded.apply, folded.params, x)
    assert float(jnp.abs(want).max()) > 1e-3
    assert relative_difference(got, want) < 1e-11


@pytest.mark.parametrize("transform", ["jit", "vmap"])
def test_whole_program_transformed(transform: str) -> None:
    """Equinox: the program is a function of one token, or of one that was compiled before."""
    inner = model(bound(two_pass, (-1,)), (-1,))

    def token(p: Params, x: Array) -> Array:
        return inner(p, x[None, None])[0, 0]

    mapped = jax.vmap(jax.vmap(token, (None, 0)), (None, 0))
    check_folds(jax.jit(inner) if transform == "jit" else mapped, (12,))


# --- low precision -------------------------------------------------------------------------------


def statistics_in_float32(x: Array, g: Any, c: Any, axes: Axes, mean: Mean) -> Array:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return one_pass_clipped(wide, g, c, axes, mean).astype(x.dtype)


def mean_in_float32(x: Array, g: Any, c: Any, axes: Axes, mean: Mean) -> Array:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    d = x - mean(wide, axes).astype(x.dtype)
    v = plain_mean(jnp.square(d.astype(wide.dtype)), axes)
    return d * rsqrt(v + EPS).astype(x.dtype) * g + c


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("formula", [statistics_in_float32, mean_in_float32, two_pass, jnp_var])
def test_low_precision(formula: Any, dtype: Any) -> None:
    """Against double precision the folded model is no less accurate than the original one."""
    apply = model(bound(formula, (-1,)), (-1,))
    params, x = make_params((12,), dtype), make_input(4, 50, DIN, dtype=dtype)
    before = snapshot(params)
    folded = jax_lnfold.fold(apply, params, x)
    assert (folded.report.n_folded, folded.report.n_inserted) == (1, 0)
    exact = apply(jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params), x.astype(float))

    def error(y: Array) -> float:
        assert y.dtype == dtype
        return float(jnp.sqrt(jnp.mean((y.astype(jnp.float64) - exact) ** 2)))

    original = error(apply(params, x))
    resolution = float(jnp.finfo(dtype).eps) * float(jnp.abs(exact).max())
    assert original < 10 * resolution
    assert error(folded.apply(folded.params, x)) < 1.25 * original
    assert error(apply(folded.params, x)) < 1.25 * original
    check_contracts(apply, params, folded, x, rtol=30 * resolution, before=before)


# --- Flax ----------------------------------------------------------------------------------------

LINEN: dict[str, dict[str, Any]] = {
    "default": {},
    "two-pass": {"use_fast_variance": False},
    "no bias": {"use_bias": False},
    "no scale": {"use_scale": False},
    "neither": {"use_scale": False, "use_bias": False, "use_fast_variance": False},
    "two axes": {"reduction_axes": (-2, -1), "feature_axes": (-2, -1)},
    "two axes, scale of one": {"reduction_axes": (-2, -1), "feature_axes": -1},
    "two axes, two-pass": {
        "reduction_axes": (-2, -1),
        "feature_axes": (-2, -1),
        "use_fast_variance": False,
    },
}


class Linen(nn.Module):
    features: tuple[int, ...]
    norm: nn.Module

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.DenseGeneral(self.features, param_dtype=jnp.float64)(x)
        return nn.DenseGeneral(OUT, axis=axes_of(self.features), param_dtype=jnp.float64)(
            self.norm(x)
        )


def random_like(shapes: Any) -> Any:
    rng = np.random.default_rng(5)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0.3, 0.5, leaf.shape)), shapes)


def linen(norm: nn.Module, features: tuple[int, ...]) -> tuple[Apply, Any]:
    module = Linen(features, norm)
    shapes = jax.eval_shape(module.init, jax.random.key(0), make_input(B, T, DIN))
    return module.apply, random_like(shapes)


@pytest.mark.parametrize("options", LINEN.values(), ids=LINEN)
def test_linen(options: dict[str, Any]) -> None:
    features = (3, 4) if "reduction_axes" in options else (12,)
    apply, params = linen(nn.LayerNorm(param_dtype=jnp.float64, **options), features)
    check_folds(apply, features, params)


def test_linen_without_its_mean() -> None:
    check_left_alone(*linen(nn.RMSNorm(param_dtype=jnp.float64), (12,)))


def test_linen_group_norm_of_features_alone() -> None:
    """Over the features of one position this is a LayerNorm per group; it need not be seen."""
    norm = nn.GroupNorm(num_groups=3, reduction_axes=(-1,), param_dtype=jnp.float64)
    apply, params = linen(norm, (12,))
    check_sound(apply, params)


class NNX(nnx.Module):
    def __init__(self, norm: nnx.Module, features: int, rngs: nnx.Rngs) -> None:
        self.writer = nnx.Linear(DIN, features, param_dtype=jnp.float64, rngs=rngs)
        self.norm = norm
        self.reader = nnx.Linear(features, OUT, param_dtype=jnp.float64, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.reader(self.norm(self.writer(x)))


def nnx_model(norm: type[nnx.Module], **options: Any) -> tuple[Apply, Any]:
    def create() -> NNX:
        rngs = nnx.Rngs(0)
        return NNX(norm(12, param_dtype=jnp.float64, rngs=rngs, **options), 12, rngs)

    graph, shapes = nnx.split(nnx.eval_shape(create))
    return lambda state, x: nnx.merge(graph, state)(x), random_like(shapes)


@pytest.mark.parametrize(
    "options", [options for name, options in LINEN.items() if "axes" not in name]
)
def test_nnx(options: dict[str, Any]) -> None:
    apply, state = nnx_model(nnx.LayerNorm, **options)
    check_folds(apply, (12,), state)


def test_nnx_without_its_mean() -> None:
    check_left_alone(*nnx_model(nnx.RMSNorm))


def test_report_names_the_module() -> None:
    """The path of a norm leads to the module that a user would look for."""
    apply, params = linen(nn.LayerNorm(param_dtype=jnp.float64), (12,))
    (norm,) = jax_lnfold.analyze(apply, params, make_input(B, T, DIN)).norms
    assert (norm.folded, norm.count) == (True, 1)
    assert (norm.shape, norm.axes) == ((B, T, 12), (2,))
    assert "norm" in norm.path


# --- what is no LayerNorm, though its arithmetic is ----------------------------------------------


class Stack(nn.Module):
    """Convolutions, pooling, grouped convolutions and joined channels before a norm of `kind`."""

    kind: Callable[[], Callable[[Array], Array]]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.relu(self.kind()(nn.Conv(8, (3, 3))(x)))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = jnp.concatenate([x, self.kind()(nn.Conv(8, (3, 3), feature_group_count=8)(x))], -1)
        return nn.Dense(OUT)(self.kind()(x))


def stacked(kind: Callable[[], Callable[[Array], Array]], *shape: int) -> jax_lnfold.Report:
    model, x = Stack(kind), make_input(*shape)
    variables = model.init(jax.random.key(0), x)
    apply = lambda v, x: model.apply(v, x, mutable=["batch_stats"])  # noqa: E731
    return jax_lnfold.analyze(apply, variables, x)


@pytest.mark.parametrize("samples", [1, 3])
def test_statistics_of_the_batch(samples: int) -> None:
    """One number per channel for all samples: that is a BatchNorm in training."""
    two_pass = partial(nn.BatchNorm, use_running_average=False, use_fast_variance=False)
    for kind in (partial(nn.BatchNorm, use_running_average=False), two_pass):
        assert stacked(kind, samples, 6, 4, 3).norms == ()


@pytest.mark.parametrize("samples", [1, 3])
def test_statistics_of_every_sample(samples: int) -> None:
    for kind in (nn.LayerNorm, nn.InstanceNorm):
        assert len(stacked(kind, samples, 6, 4, 3).norms) == 3


def normalise(s: Array, *axes: int) -> Array:
    return (s - plain_mean(s, axes)) * rsqrt(jnp.var(s, axes, keepdims=True) + EPS)


def per_sample(fn: Callable[..., Array]) -> Callable[..., Array]:
    return jax.vmap(fn, in_axes=(None, 0), axis_name="batch")


def synchronised(p: Params, x: Array) -> Array:
    """Means over all positions of one sample, then over the samples."""
    s = jnp.tensordot(x, p["w"], 1)
    m, square = (jax.lax.pmean(plain_mean(y, (0,)), "batch") for y in (s, s * s))
    return (s - m) * rsqrt(square - m * m + EPS)


# What normalises, and whether all samples share the statistics.
OF_THE_BATCH: dict[str, tuple[Apply, bool]] = {
    "samples and tokens": (lambda p, x: normalise(jnp.tensordot(x, p["w"], 1), 0, 1), True),
    "samples, features in two axes": (
        lambda p, x: normalise(jnp.tensordot(x, p["w"].reshape(DIN, 3, 4), 1), 0, 1),
        True,
    ),
    "vmap": (per_sample(synchronised), True),
    "behind attention": (
        lambda p, x: normalise(jax.nn.softmax(x @ x.mT) @ jnp.tensordot(x, p["w"], 1), 0, 1),
        True,
    ),
    "behind another": (
        lambda p, x: normalise(normalise(jnp.tensordot(x, p["w"], 1), 2) * p["g"], 0, 1),
        True,
    ),
    "tokens": (lambda p, x: normalise(jnp.tensordot(x, p["w"], 1), 1), False),
    "samples": (lambda p, x: normalise(jnp.tensordot(x, p["w"], 1), 0), False),
    "features": (lambda p, x: normalise(jnp.tensordot(x, p["w"], 1), 2), False),
    "features of a sample": (per_sample(lambda p, x: normalise(x @ p["w"], 1)), False),
    "features of the input": (lambda p, x: normalise(x, 2) @ p["w"], False),
    "everything": (lambda p, x: normalise(jnp.tensordot(x, p["w"], 1), 0, 1, 2), False),
    "tokens mixed by parameters": (
        lambda p, x: normalise(jnp.einsum("btd,df->bft", x, p["w"])[:1] * p["w"][0, 0], 0, 1),
        False,
    ),
}


@pytest.mark.parametrize("name", OF_THE_BATCH)
def test_who_shares_the_statistics(name: str) -> None:
    apply, shared = OF_THE_BATCH[name]
    with jax.numpy_rank_promotion("allow"):
        report = jax_lnfold.analyze(apply, make_params((12,)), make_input(B, T, DIN))
    assert len(report.norms) == (name == "behind another" if shared else 1)
