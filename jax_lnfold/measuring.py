"""How much of what LayerNorms read is mean: measured on data, before and after a fold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .batches import check_batches
from .errors import FoldError
from .folded import Folded, placed_again
from .folded_functions import FoldedFunctions
from .measurement.watched import Watched
from .models.folded_model import FoldedModel, on_batches
from .models.linen_modules import apply_of
from .observing import observed
from .options import check_options
from .placement.planning import placement_of
from .program.tracing import trace
from .report.statistics import Statistics
from .trees import MISSING


def measure(fn: Any, params: Any = MISSING, *batches: Any, **keywords: Any) -> Statistics:
    """Measure the share of the mean in the second moment of what each LayerNorm reads.

    That is ``E[mean**2] / E[x**2]`` over all tokens (positions of the axes that are not averaged
    over), and of ``mean**2 / mean(x**2)`` the mean, 99th percentile and maximum over tokens.
    A LayerNorm in a `scan` has one number for each iteration; in a `while_loop`, one for all of
    them. Each batch runs once, in one compiled program for all LayerNorms; arrays that are spread
    over devices stay so (inside of a `shard_map` the tokens of every device count). Sums are kept
    in float32, or float64 where activations are, and in float64 between batches. Memory does not
    grow with the number of batches.

    Args:
        fn: a function of ``(params, *inputs)``, or what `fold` returned for one. A linen module
            stands for its `apply`; an NNX or Equinox model has its parameters in itself:
            ``measure(model, *batches)``.
        params: its parameters. For a fold they are what was folded, or edited already: the
            function is measured on them, and its folded program on ``folded.plan.center(params)``.
        *batches: each of them a tuple of inputs, or a single input (everything but plain tuples),
            of the same structure, shapes and dtypes.
        **keywords: keyword arguments of the function, for all batches.

    Returns:
        One entry for each LayerNorm, in program order; `print` shows a table.
        ``folded.report.with_statistics(...)`` puts the numbers next to what was folded.

    Raises:
        FoldError: there is no batch, a batch differs from the first one in other things than its
            numbers, `fn` is no function of these arguments, or the arguments are being traced.
        TreeError: `params` or a batch holds other leaves than arrays.
        PlanMismatchError: the function notices the edits of a fold for inputs of these shapes.

    Example:
        >>> import jax, jax_lnfold
        >>> def model(params, x):
        ...     return jax.nn.standardize(x @ params["w"])  # a LayerNorm behind a linear layer
        >>> params = {"w": jax.random.normal(jax.random.key(0), (4, 8))}
        >>> x = jax.random.normal(jax.random.key(1), (3, 4))
        >>> folded = jax_lnfold.fold(model, params, x)
        >>> (norm,) = jax_lnfold.measure(folded, params, x, x + 1).norms  # two batches
        >>> bool(norm.before.share > 0.001), bool(norm.after.share < 1e-6)
        (True, True)
    """
    function, params, inputs = _function(fn, params, batches, keywords)
    check_batches(params, inputs)
    folded = fn if isinstance(fn, Folded) else None
    if folded is None:
        traced = trace(function, params, inputs[0])
        placement = placement_of(traced, check_options(2.0, (), False))
    else:
        params = folded.plan.extend(params)
        traced, placement = placed_again(folded, params, inputs[0])
    sides = [(Watched(traced.closed, placement, False), params)]
    if folded is not None:
        sides.append((Watched(traced.closed, placement, True), folded.plan.center(params)))
    return observed(traced, placement, sides, inputs)


def _function(
    fn: Any, params: Any, batches: Sequence[Any], keywords: Mapping[str, Any]
) -> tuple[Any, Any, list[tuple[Any, ...]]]:
    """The function that is measured, its parameters, and the inputs of each batch."""
    if isinstance(fn, (FoldedFunctions, FoldedModel, Mapping)):
        raise FoldError(
            f"fn: a {type(fn).__name__} is no single function; pass one of the functions, or the "
            "model that was folded, and for the numbers after a fold, fold(function, params, x)"
        )
    function = apply_of(fn)
    if not callable(function):
        raise FoldError(
            f"fn: a {type(fn).__name__} is not callable; pass a function of (params, *inputs), "
            "such as model.apply, or what fold returned"
        )
    return on_batches(function, params, batches, keywords)
