"""Compares a folded model with its original, in the dtype given and against float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

from .errors import FoldError
from .folded import Folded
from .output_differences import float_outputs, largest, largest_difference, squares
from .printable import counted
from .program.calls import call, with_keywords
from .program.tracing import trace
from .training import drift_of
from .trees import check_devices, check_leaves
from .widening import run_widened


@dataclass(frozen=True, slots=True)
class Verification:
    """Largest absolute differences over all real and complex outputs.

    `original_error` and `folded_error` are measured against the original program with every float
    in float64, `difference` between original and folded in the dtypes given. `scale` is the
    largest magnitude of the reference. `not_widened` names the primitives of the original that
    float64 does not reach, as ``name`` or ``2 x name``: what they round, the reference rounds, too.
    `drift` says how far the parameters of the folded program are off what the plan centers, in
    units of what rounding explains (float; at most 1 of `folded.params`). Above 1, `folded_error`
    measures that the parameters are not those of a fold, and not what folding costs. `left_out`
    counts LayerNorms, by name, of which the plan leaves out a mean that is not zero; `deviation` is
    the relative error of the folded program's outputs against the original's on these inputs, as
    the budget of `fold` has it.

    Example:
        >>> import jax_lnfold
        >>> print(jax_lnfold.Verification(1e-6, 2e-6, 1.5e-6, 3.0, not_widened=("pure_callback",)))
        largest error against float64: original 1e-06, folded 2e-06; largest difference 1.5e-06 \
(outputs up to 3); not in float64: pure_callback
    """

    original_error: float
    folded_error: float
    difference: float
    scale: float
    not_widened: tuple[str, ...] = ()
    drift: float = 0.0
    left_out: int = 0
    deviation: float = 0.0

    def __str__(self) -> str:
        """The figures in one line."""
        kept = f"; not in float64: {', '.join(self.not_widened)}" if self.not_widened else ""
        off = f"; parameters not centered, by {self.drift:.3g} roundings" if self.drift > 1 else ""
        if self.left_out:
            means = f"the mean left out of {counted(self.left_out, 'LayerNorm')}"
            off += f"; {means}, relative error of the outputs {self.deviation:.2g}"
        return (
            f"largest error against float64: original {self.original_error:.3g}, folded "
            f"{self.folded_error:.3g}; largest difference {self.difference:.3g} "
            f"(outputs up to {self.scale:.3g}){kept}{off}"
        )


def verify(
    apply_fn: Callable[..., Any],
    params: Any,
    folded: Folded,
    *inputs: Any,
    edited: Any = None,
    **keywords: Any,
) -> Verification:
    """Run the original and the folded program, compiled, on `inputs` and measure their errors.

    The original runs on `params`, the folded program on `edited`. The reference is the program of
    the original, as traced with these arguments, in which every float is a float64: parameters,
    inputs, intermediate values, and what the function casts to a narrower dtype. Random numbers
    are the same and constants have the values that the program holds (a bfloat16 0.1 is 0.1001).
    What float64 does not reach, as callbacks, kernels and bit patterns, runs in its own dtype and
    is named in the result.

    Args:
        apply_fn: the function that was folded.
        params: its parameters: those that were folded, or after training, the trained ones.
        folded: what `fold` returned.
        *inputs: arrays; different shapes than those of the fold will do.
        edited: the parameters for the folded program, `folded.params` if None. After training with
            `center_updates` pass the trained tree both here and as `params`: its `drift` is
            measured.
        **keywords: keyword arguments of `apply_fn`.

    Returns:
        The largest errors of both programs, and their difference.

    Raises:
        FoldError: `folded` is not a fold of `apply_fn`, an argument is not fit for it, or the
            outputs have no floating-point array to compare.
        TreeError: `edited` is not a tree of arrays like those that were folded.

    Example:
        >>> import jax, jax_lnfold
        >>> def model(params, x):
        ...     return jax.nn.standardize(x @ params["w"])  # a LayerNorm behind a linear layer
        >>> params = {"w": jax.random.normal(jax.random.key(0), (4, 8))}
        >>> x = jax.random.normal(jax.random.key(1), (3, 4))
        >>> folded = jax_lnfold.fold(model, params, x)
        >>> jax_lnfold.verify(model, params, folded, x).folded_error < 1e-5
        True
        >>> trained = {"w": params["w"] + 1}  # off what the plan centers
        >>> jax_lnfold.verify(model, trained, folded, x, edited=trained).drift > 1
        True
    """
    if not isinstance(folded, Folded):
        raise FoldError(
            f"folded: a {type(folded).__name__} is no fold of one function of parameters; pass "
            "fold(apply_fn, params, *inputs), of several functions one by its name"
        )
    edited = folded.params if edited is None else edited
    inputs = with_keywords(inputs, keywords)
    check_leaves(params, "params")
    check_leaves(edited, "edited")
    check_leaves(inputs, "inputs")
    plan = folded.plan.fitted(edited, whole=True, argument="edited")
    check_devices(params, inputs)
    check_devices(edited, inputs)
    traced = trace(apply_fn, params, inputs)
    original = float_outputs(jax.jit(partial(call, apply_fn))(params, inputs))
    result = float_outputs(jax.jit(folded.apply)(edited, *inputs))
    if not original:
        raise FoldError(
            "apply_fn: returns no floating-point array, so there is nothing to compare; return the "
            "values before an argmax or the like"
        )
    if [x.shape for x in original] != [x.shape for x in result]:
        raise FoldError(
            "folded: returns other shapes than apply_fn; pass fold(apply_fn, params, *inputs)"
        )
    outputs, not_widened = run_widened(traced.closed, jax.tree.leaves((params, inputs)))
    reference = float_outputs(outputs)
    return Verification(
        original_error=largest_difference(original, reference),
        folded_error=largest_difference(result, reference),
        difference=largest_difference(original, result),
        scale=largest(reference),
        not_widened=not_widened,
        drift=drift_of(plan, edited),
        left_out=len(plan.dropped),
        deviation=squares(original, result).error,
    )
