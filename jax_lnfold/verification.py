"""Compares a folded model with its original, in the dtype given and against float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .errors import FoldError
from .folded import Folded
from .output_differences import float_outputs, largest, largest_difference
from .program.tracing import trace
from .trees import check_devices, check_leaves


@dataclass(frozen=True, slots=True)
class Verification:
    """Largest absolute differences over all floating-point outputs.

    `original_error` and `folded_error` are measured against the original function run with
    float64 parameters and inputs, `difference` between original and folded in the dtype given.
    `scale` is the largest magnitude of the reference.
    """

    original_error: float
    folded_error: float
    difference: float
    scale: float

    def __str__(self) -> str:
        """The figures in one line."""
        return (
            f"largest error against float64: original {self.original_error:.3g}, folded "
            f"{self.folded_error:.3g}; largest difference {self.difference:.3g} "
            f"(outputs up to {self.scale:.3g})"
        )


def verify(apply_fn: Callable[..., Any], params: Any, folded: Folded, *inputs: Any) -> Verification:
    """Run the original and the folded program, compiled, on `inputs` and measure their errors.

    The reference is `apply_fn` with every floating-point leaf of `params` and `inputs` in float64;
    computations that the function itself pins to a narrower dtype stay there.

    Raises:
        FoldError: `folded` is not a fold of `apply_fn`, an argument is not fit for it, or the
            outputs have no floating-point array to compare.
    """
    if not isinstance(folded, Folded):
        raise FoldError(
            f"folded: a {type(folded).__name__} is not what `fold` returns; pass "
            "fold(apply_fn, params, *inputs)"
        )
    check_leaves(params, "params")
    check_leaves(inputs, "inputs")
    check_devices(params, inputs)
    trace(apply_fn, params, inputs)
    original = float_outputs(jax.jit(apply_fn)(params, *inputs))
    result = float_outputs(jax.jit(folded.apply)(folded.params, *inputs))
    if not original:
        raise FoldError(
            "apply_fn: returns no floating-point array, so there is nothing to compare; return the "
            "values before an argmax or the like"
        )
    if [x.shape for x in original] != [x.shape for x in result]:
        raise FoldError(
            "folded: returns other shapes than apply_fn; pass fold(apply_fn, params, *inputs)"
        )
    with jax.enable_x64(True):
        wide_params, wide_inputs = jax.tree.map(_widen, (params, inputs))
        reference = float_outputs(jax.jit(apply_fn)(wide_params, *wide_inputs))
    return Verification(
        original_error=largest_difference(original, reference),
        folded_error=largest_difference(result, reference),
        difference=largest_difference(original, result),
        scale=largest(reference),
    )


def _widen(x: Any) -> Any:
    floating = hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)
    return jnp.asarray(np.asarray(x, np.float64)) if floating else x
