"""The public functions: fold a model, or look at what folding would do."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from .errors import FoldError
from .folded import Folded, placement_of, rewritten_program
from .options import Options, check_options
from .placement.place import Placement
from .placement.planning import make_plan
from .plan.plan import FoldPlan, check_donate
from .program.tracing import Traced, trace
from .report.build import make_report
from .report.report import Report
from .trees import check_leaves


def fold(
    apply_fn: Callable[..., Any],
    params: Any,
    *example_inputs: Any,
    donate: bool = False,
    explicit_cost: float = 2.0,
    approximate: Collection[str] = (),
    fold_affine: bool = False,
    defer_scale: bool = False,
    deferred_cost: float | None = None,
    optimize: str | None = None,
) -> Folded:
    """Turn the LayerNorms of a model into RMSNorms wherever that is exact.

    Args:
        apply_fn: any traceable function ``apply_fn(params, *inputs)``; bind keyword arguments
            with `functools.partial`.
        params: any pytree of arrays.
        *example_inputs: arrays or `jax.ShapeDtypeStruct`; the folded function takes other shapes,
            too. Without them the analysis waits for the first call ``folded(*inputs)``.
        donate: reuse the memory of edited leaves (the arrays in `params` are then deleted).
            Everything is analysed and checked before the first of them goes. Only if an edit
            itself fails or is interrupted (no memory, Ctrl-C), those edited before it are lost.
        explicit_cost: cost of an explicit centering per element, where a LayerNorm's own
            centering costs 1 (theory: minimum cut).
        approximate: with ``{"dropout"}``, elementwise dropout is taken for the identity: in a
            trace with dropout the folded program is then an approximation (the mean that dropping
            leaves is not removed), which the report says and measures. Without dropout the same
            parameters are exact. Everything else is exact always.
        fold_affine: also move scales and shifts, as of LayerNorms, into the linear layers that
            alone read what they scale (shifts only where these have biases). The scales become
            one (or zero, where the program adds 1 to them), the shifts zero, and both leave the
            program: gradients with respect to them are zero (theory, section 6). The report says
            why others stay.
        defer_scale: let matrix products read what a norm only scales, and scale their results
            instead, ``(x * r) W = (x W) * r``, where that pays: in practice behind norms whose own
            scale and shift `fold_affine` has taken up. Results are scaled in the accumulator's
            dtype, float32 or wider; what could leave the range of float16 is not deferred.
        deferred_cost: cost of scaling one element of a result, where one element of the scaled
            copy costs 1 to write and read again: a scale is deferred if its results together cost
            less than its copy. 0 defers all scales; None is a value for the backend.
        optimize: with ``"auto"``, `fold_affine` and `defer_scale` as they measured best on the
            backend (`jax.default_backend`); see `PRESETS`.

    Returns:
        The folded function and parameters, with a plan and a report.

    Raises:
        FoldError: `apply_fn` is not callable or traceable, `params` or the inputs hold other
            leaves than arrays, or an option has no such value. Nothing has been changed then.
    """
    _check_callable(apply_fn)
    options = check_options(
        explicit_cost, approximate, fold_affine, defer_scale, deferred_cost, optimize
    )
    check_donate(donate)
    check_leaves(params, "params")
    check_leaves(example_inputs, "example_inputs", abstract=True)
    folded = Folded(apply_fn, params, bool(donate), options)
    if example_inputs:
        folded._analyse(example_inputs)
    return folded


def analyze(
    apply_fn: Callable[..., Any],
    params: Any,
    *inputs: Any,
    explicit_cost: float = 2.0,
    approximate: Collection[str] = (),
    fold_affine: bool = False,
    defer_scale: bool = False,
    deferred_cost: float | None = None,
    optimize: str | None = None,
) -> Report:
    """Report what `fold` would do, without editing anything.

    `params` and `inputs` may hold `jax.ShapeDtypeStruct` leaves: no weights are needed.

    Raises:
        FoldError: as for `fold`, or the inputs that `apply_fn` needs are missing.
    """
    options = check_options(
        explicit_cost, approximate, fold_affine, defer_scale, deferred_cost, optimize
    )
    traced, placement = _analysis(apply_fn, params, inputs, options)
    rewritten, deferred = rewritten_program(traced, placement, options)
    programs = (lambda: (traced.closed, rewritten)) if traced.reusable else None
    return make_report(placement, make_plan(placement), deferred, programs)


def plan_fold(
    apply_fn: Callable[..., Any],
    params: Any,
    *inputs: Any,
    explicit_cost: float = 2.0,
    approximate: Collection[str] = (),
    fold_affine: bool = False,
    optimize: str | None = None,
) -> FoldPlan:
    """The plan that `fold` would follow, from shapes alone as in `analyze`.

    Raises:
        FoldError: as for `fold`, or the inputs that `apply_fn` needs are missing.
    """
    options = check_options(explicit_cost, approximate, fold_affine, optimize=optimize)
    return make_plan(_analysis(apply_fn, params, inputs, options)[1])


def _analysis(
    apply_fn: Callable[..., Any], params: Any, inputs: tuple[Any, ...], options: Options
) -> tuple[Traced, Placement]:
    _check_callable(apply_fn)
    check_leaves(params, "params", abstract=True)
    check_leaves(inputs, "inputs", abstract=True)
    traced = trace(apply_fn, params, inputs)
    return traced, placement_of(traced, options)


def _check_callable(apply_fn: Any) -> None:
    if not callable(apply_fn):
        raise FoldError(
            f"apply_fn: a {type(apply_fn).__name__} is not callable; pass a function of "
            "(params, *inputs), such as model.apply"
        )
