"""Declarations that are wrong are refused with the numbers, by the test itself and by `fold`."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_lnfold
from jax_lnfold import FoldError, check_layer_norm, layer_norm
from tests.kernels.kernels import (
    add_norm,
    added,
    hidden,
    ln,
    norm,
    norm_linear,
    normalised,
    pallas_norm,
    rms,
    with_affine,
)

X, G = jax.ShapeDtypeStruct((4, 5, 6), float), jax.ShapeDtypeStruct((6,), float)
W, C = jax.ShapeDtypeStruct((6, 3), float), jax.ShapeDtypeStruct((3,), float)


@pytest.mark.parametrize(
    ("fn", "example"),
    [
        (norm, (X, G, G)),
        (pallas_norm, (X, G, G)),
        (add_norm, (X, X, G, G)),
        (norm_linear, (X, G, G, W, C)),
        (layer_norm(ln, rms=rms), (X, G, G)),
        (layer_norm(ln, rms=rms, scale=1), (X, G, G)),
        (layer_norm(partial(normalised, mean=True), rms=partial(normalised, mean=False)), (X,)),
    ],
)
def test_right_declarations_pass(fn: Any, example: Any) -> None:
    found = check_layer_norm(fn, *example)
    measured = found.shift, found.twin, found.shift_gradient, found.twin_gradient
    assert all(x is not None and x < 1e-11 for x in measured)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("fn", [norm, pallas_norm])
def test_what_is_rounding_passes(fn: Any, dtype: str) -> None:
    x, g = (jax.ShapeDtypeStruct(a.shape, dtype) for a in (X, G))
    found = check_layer_norm(fn, x, g, g)
    assert found.tolerance == pytest.approx(2 * float(jnp.finfo(dtype).eps) ** (2 / 3))
    assert max(found.shift, found.twin) < found.tolerance


def wrong_slope(x: Any, g: Any, b: Any) -> Any:
    """The twin with the derivative of something else."""
    f = jax.custom_vjp(partial(with_affine, mean=False))
    f.defvjp(
        lambda *a: (with_affine(*a, mean=False), a),
        lambda a, t: tuple(1.5 * s for s in jax.vjp(partial(with_affine, mean=False), *a)[1](t)),
    )
    return f(x, g, b)


def no_derivative(*_: Any) -> Any:
    raise NotImplementedError


def flat_twin(x: Any, g: Any, b: Any) -> Any:
    f = jax.custom_vjp(partial(with_affine, mean=False))
    f.defvjp(no_derivative, no_derivative)
    return f(x, g, b)


def other_eps(x: Any, g: Any, b: Any) -> Any:
    return normalised(x, False, 1e-3) * g + b


def of_groups(x: Any, g: Any, b: Any) -> Any:
    """A GroupNorm: two means for each token."""
    y = normalised(x.reshape(*x.shape[:-1], 2, -1), True).reshape(x.shape)
    return y * g + b


def nan_where_shifted(x: Any, g: Any, b: Any) -> Any:
    return jnp.where(jnp.abs(x.mean(-1, keepdims=True)) < 1e-3, ln(x, g, b), jnp.nan)


DECLARED: Any = {"scale": 1, "shift": 2}
WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "an RMSNorm": (lambda: layer_norm(rms, rms=rms), "notices a shift of x along axis 2"),
    "an RMSNorm that is declared to the end": (
        lambda: layer_norm(rms, rms=rms, **DECLARED),
        "notices a shift of x along axis 2",
    ),
    "another axis": (lambda: layer_norm(ln, rms=rms, axis=1), "along axis 1"),
    "too many axes": (lambda: layer_norm(ln, rms=rms, axis=(0, -1)), "rms differs from"),
    "a GroupNorm": (lambda: layer_norm(of_groups, rms=rms, **DECLARED), "declared to be"),
    "a twin with another epsilon": (lambda: layer_norm(ln, rms=other_eps), "rms differs from"),
    "a twin with an epsilon that only small inputs notice": (
        lambda: layer_norm(
            lambda x, g, b: normalised(x, True, 1e-14) * g + b,
            rms=lambda x, g, b: normalised(x, False, 2e-14) * g + b,
        ),
        "rms differs from .* with a spread of 0.00098",
    ),
    "a twin without the shift": (
        lambda: layer_norm(ln, rms=lambda x, g, b: rms(x, g, 0 * b)),
        "rms differs from",
    ),
    "a twin with another derivative": (lambda: layer_norm(ln, rms=wrong_slope), "gradients by"),
    "a twin without a derivative": (
        lambda: layer_norm(ln, rms=flat_twin),
        "rms: cannot be differentiated, and .* can; give it a derivative",
    ),
    "a scale that is 1 + s": (
        lambda: layer_norm(
            lambda x, g, b: ln(x, 1 + g, b), rms=lambda x, g, b: rms(x, 1 + g, b), **DECLARED
        ),
        "declared to be",
    ),
    "scale and shift exchanged": (
        lambda: layer_norm(ln, rms=rms, scale=2, shift=1),
        "declared to be",
    ),
    "NaN": (lambda: layer_norm(nan_where_shifted, rms=rms), "values differ by nan"),
    "a reference of something else": (
        lambda: layer_norm(ln, rms=rms, reference=lambda x, g, b: ln.fun(x, g, 2 * b)),
        "differs from what it is declared to be",
    ),
    "a reference with two": (
        lambda: layer_norm(
            lambda x, g, b: ln(ln(x, g, b), b, g),
            rms=lambda x, g, b: ln(rms(x, g, b), b, g),
            reference=lambda x, g, b: with_affine(with_affine(x, g, b), b, g),
        ),
        "reference: .* has 2 LayerNorms; declare kernels that have one",
    ),
    "a reference without a LayerNorm": (
        lambda: layer_norm(ln, rms=rms, reference=partial(with_affine, mean=False)),
        "reference: .* has no LayerNorm of its operands in it",
    ),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_epsilon_of_a_twin_counts(dtype: str) -> None:
    """Those of torch and of Llama, which numbers of size 1 cannot tell apart in these dtypes."""
    x, g = (jax.ShapeDtypeStruct(a.shape, dtype) for a in (X, G))

    def of(eps: float, mean: bool) -> Any:
        def kernel(x: Any, g: Any) -> Any:
            return (normalised(x.astype(jnp.float32), mean, eps) * g).astype(x.dtype)

        return kernel

    check_layer_norm(of(1e-5, True), x, g, rms=of(1e-5, False), scale=1)
    with pytest.raises(FoldError, match=r"rms differs from .* with a spread of 0\.00"):
        check_layer_norm(of(1e-5, True), x, g, rms=of(1e-6, False), scale=1)


def masked(x: Any, mask: Any, mean: bool = True) -> Any:
    """The LayerNorm of what a mask lets through: where some is not, its mean is another one."""
    n = mask.sum(-1, keepdims=True)
    c = (x - mean * (x * mask).sum(-1, keepdims=True) / n) * mask
    return c * jax.lax.rsqrt((c * c).sum(-1, keepdims=True) / n + 1e-6)


def of_tokens(x: Any, mask: Any, mean: bool = True) -> Any:
    """The mask is of whole tokens."""
    return jnp.where(mask[..., None], normalised(x, mean), 0)


@pytest.mark.parametrize("dtype", [bool, np.int32])
def test_masks_and_flags_have_zeros_and_ones(dtype: Any) -> None:
    whole, part = jax.ShapeDtypeStruct(X.shape, dtype), jax.ShapeDtypeStruct(X.shape[:-1], dtype)
    with pytest.raises(FoldError, match="rms differs from masked where x is zero-mean"):
        check_layer_norm(masked, X, whole, rms=partial(masked, mean=False))
    check_layer_norm(of_tokens, X, part, rms=partial(of_tokens, mean=False))
    flag = jax.ShapeDtypeStruct((), dtype)

    def off(x: Any, on: Any) -> Any:
        return jnp.where(on != 0, normalised(x, False), 2 * normalised(x, False))

    with pytest.raises(FoldError, match="rms differs from"):
        check_layer_norm(lambda x, on: normalised(x, True), X, flag, rms=off)
    # What is given is taken as it is.
    check_layer_norm(lambda x, on: normalised(x, True), X, np.ones((), dtype), rms=off)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_declarations_are_refused_with_the_numbers(name: str) -> None:
    make, words = WRONG[name]
    with pytest.raises(FoldError, match=words) as refused:
        check_layer_norm(make(), X, G, G)
    if "tolerance" in str(refused.value):
        found = re.search(
            r"values differ by (\S+?),? .*the tolerance is (\S+);", str(refused.value)
        )
        assert found is not None


def model(p: Any, x: Any, norm: Any) -> Any:
    return norm(x @ p["w"], p["g"], p["b"])


PARAMS = {"w": np.eye(4, 6) + 0.3, "g": np.linspace(0.5, 2, 6), "b": np.linspace(-1, 1, 6)}
INPUT = np.random.default_rng(1).normal(size=(3, 4))


def test_fold_tests_once_and_before_anything_is_edited() -> None:
    wrong = layer_norm(rms, rms=rms, name="mine")
    with pytest.raises(FoldError, match="layer_norm: mine notices a shift"):
        jax_lnfold.fold(partial(model, norm=wrong), PARAMS, INPUT)
    with pytest.raises(FoldError, match="layer_norm: mine notices a shift"):
        jax_lnfold.analyze(partial(model, norm=wrong), PARAMS, INPUT)
    runs = []

    def counted(*args: Any) -> Any:
        runs.append(args)
        return ln(*args)

    right = layer_norm(counted, rms=rms)
    for _ in range(2):
        assert jax_lnfold.fold(partial(model, norm=right), PARAMS, INPUT).report.n_folded == 1
    assert len(right.passed) == 1


class Settings:
    """All look alike when they are printed."""

    def __init__(self, eps: float) -> None:
        self.eps = eps

    def __repr__(self) -> str:
        return "Settings()"


def test_a_test_speaks_for_the_programs_that_it_saw() -> None:
    """Not for what a function does with other settings, or when what it reads has changed."""
    own = {"eps": 1e-6, "array": np.full(6, 2.0)}

    def twin(x: Any, settings: Any) -> Any:
        return normalised(x, False, own["eps"] + settings.eps) * own["array"]

    kernel = layer_norm(lambda x, settings: normalised(x, True) * np.full(6, 2.0), rms=twin)

    def fold(settings: Any) -> int:
        def fn(p: Any, x: Any) -> Any:
            return kernel(x @ p["w"], settings)

        return jax_lnfold.fold(fn, {"w": np.eye(4, 6) + 0.3}, INPUT).report.n_folded

    assert [fold(Settings(0.0)), fold(Settings(0.0))] == [1, 1]
    assert len(kernel.passed) == 1
    for change in ({"eps": 1e-2}, {"array": np.arange(6.0)}):
        own |= change
        with pytest.raises(FoldError, match="rms differs"):
            fold(Settings(0.0))
        own |= {"eps": 1e-6, "array": np.full(6, 2.0)}
    with pytest.raises(FoldError, match="rms differs"):
        fold(Settings(0.1))


def test_the_test_can_be_switched_off() -> None:
    """For kernels that do not run where the model is folded."""

    def elsewhere(x: Any, g: Any, b: Any) -> Any:
        return jax.ffi.ffi_call("no_such_kernel", jax.ShapeDtypeStruct(x.shape, x.dtype))(x, g, b)

    with pytest.raises(FoldError, match=r"cannot be tested here .* declare it with check=False"):
        jax_lnfold.fold(partial(model, norm=layer_norm(elsewhere, rms=elsewhere)), PARAMS, INPUT)
    trusted = layer_norm(elsewhere, rms=elsewhere, check=False)
    assert jax_lnfold.analyze(partial(model, norm=trusted), PARAMS, INPUT).n_folded == 1


def test_a_tolerance_can_be_passed() -> None:
    kernel = layer_norm(ln, rms=lambda x, g, b: rms(x, 1.001 * g, b), tolerance=1e-2)
    assert check_layer_norm(kernel, X, G, G).twin > 1e-5
    with pytest.raises(FoldError, match="is declared already"):
        check_layer_norm(kernel, X, G, G, rms=rms)
    assert check_layer_norm(ln, X, G, G, rms=rms, axis=-1).twin < 1e-12


def test_kernels_without_derivatives_are_compared_by_values() -> None:
    def forward_only(x: Any, g: Any, b: Any) -> Any:
        return jax.pure_callback(
            lambda *a: np.asarray(with_affine(*a)), jax.ShapeDtypeStruct(x.shape, x.dtype), x, g, b
        )

    found = check_layer_norm(layer_norm(forward_only, rms=rms), X, G, G)
    assert found.shift_gradient is None
    assert found.twin < 1e-12


def test_a_fused_kernel_without_a_reference_is_refused() -> None:
    """Its sum would be a result that no shift moves."""
    fused = layer_norm(hidden(added), rms=hidden(partial(added, mean=False)))
    with pytest.raises(FoldError, match="notices a shift"):
        check_layer_norm(fused, X, X, G, G)
