"""The public functions: fold a model, or look at what folding would do."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable
from dataclasses import replace
from typing import Any

import jax

from ._compat import ClosedJaxpr, is_tracer, jaxpr_as_fun
from .defer import Deferral, defer_scales
from .describe import make_report
from .difference import float_outputs, largest, largest_difference
from .errors import FoldError, NotAnalysedError
from .kept import ApplyFn, FreshLock, Programs
from .options import Options, check_options
from .placement import Placement, place
from .plan import FoldPlan, check_donate
from .planning import make_plan, place_again, with_affine
from .program import Traced, signature, trace
from .report import Report
from .rewrite import rewrite
from .trees import check_devices, check_leaves


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
    rewritten, deferred = _rewritten(traced, placement, options)
    programs = (lambda: (traced.closed, rewritten)) if traced.reusable else None
    return make_report(placement, make_plan(params, placement), deferred, programs)


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
    return make_plan(params, _analysis(apply_fn, params, inputs, options)[1])


def _analysis(
    apply_fn: Callable[..., Any], params: Any, inputs: tuple[Any, ...], options: Options
) -> tuple[Traced, Placement]:
    _check_callable(apply_fn)
    check_leaves(params, "params", abstract=True)
    check_leaves(inputs, "inputs", abstract=True)
    traced = trace(apply_fn, params, inputs)
    return traced, _placed(traced, options)


class Folded:
    """A folded model: a pure function `apply`, its `params`, the `plan` and the `report`."""

    def __init__(
        self, apply_fn: Callable[..., Any], params: Any, donate: bool, options: Options
    ) -> None:
        """Use `fold` instead."""
        self._apply_fn = ApplyFn(apply_fn)
        self._given: Any = params  # until the analysis has run
        self._first_call = FreshLock()
        self._donate = donate
        self._options = options
        self._params: Any = None
        self._plan: FoldPlan | None = None
        self._report: Report | None = None
        self._programs = Programs()

    @property
    def params(self) -> Any:
        """The edited tree: structure, shapes, dtypes and shardings of the original."""
        self._require_analysis("params")
        return self._params

    @property
    def plan(self) -> FoldPlan:
        """The edits as plain data."""
        self._require_analysis("plan")
        assert self._plan is not None
        return self._plan

    @property
    def report(self) -> Report:
        """One entry per LayerNorm of the example trace."""
        self._require_analysis("report")
        assert self._report is not None
        return self._report

    def __call__(self, *inputs: Any) -> Any:
        """Short for ``folded.apply(folded.params, *inputs)``."""
        self._require_inputs(inputs)
        return self.apply(self._params, *inputs)

    def apply(self, params: Any, *inputs: Any) -> Any:
        """The folded function: pure and traceable (jit, grad, vmap).

        `params` must be `self.params`, or another tree edited with ``plan.center``: of unedited
        parameters this is another function, which nothing tells from a right answer. Every new
        combination of shapes and dtypes is traced once, and the facts that the plan relies on are
        proved again for it. So `params` may have other sizes than those that were folded, along
        axes that no mean is taken over: two of ten members of an ensemble, say.

        Raises:
            TreeError: `params` has not the leaves that were folded, their sizes along other axes
                differ, or it or the inputs hold other things than arrays on the same devices.
            TraceError: `apply_fn` cannot be traced with these inputs.
            PlanMismatchError: the program for these inputs notices the edits of the plan.
        """
        self._require_inputs(inputs)
        try:
            key = signature(params, inputs)
            run, out_tree = self._programs.get(key) or self._prepare(key, params, inputs)
            results = run(*jax.tree.leaves((params, inputs)))
        except FoldError:
            raise
        except Exception as error:  # what an argument may have to do with it is found out now
            check_leaves(params, "params")
            check_leaves(inputs, "inputs")
            if isinstance(error, ValueError):
                check_devices(params, inputs)
            raise
        return jax.tree.unflatten(out_tree, results)

    def _prepare(
        self, key: Hashable, params: Any, inputs: tuple[Any, ...]
    ) -> tuple[Callable[..., Any], Any]:
        """The program for a new signature: later calls with the same one need no checks."""
        assert self._plan is not None
        plan = self._plan.fitted(params, whole=True)
        check_leaves(inputs, "inputs")
        traced = trace(self._apply_fn.function, params, inputs)
        graph = traced.graph(self._options.see_through_dropout)
        placement = place_again(plan, params, graph, self._options.explicit_cost)
        rewritten, _ = _rewritten(traced, placement, self._options)
        program = jaxpr_as_fun(rewritten), traced.out_tree
        if traced.reusable:
            self._programs.put(key, program)
        return program

    def _require_inputs(self, inputs: tuple[Any, ...]) -> None:
        """Analyse on the first call, in one thread while others wait."""
        if self._plan is None:
            with self._first_call.lock:
                if self._plan is None:
                    check_leaves(inputs, "inputs")
                    self._analyse(inputs)

    def _analyse(self, inputs: tuple[Any, ...]) -> None:
        params = self._given
        traced = trace(self._apply_fn.function, params, inputs)
        placement = _placed(traced, self._options)
        plan = make_plan(params, placement)
        rewritten, deferred = _rewritten(traced, placement, self._options)
        program = jaxpr_as_fun(rewritten), traced.out_tree
        programs = (lambda: (traced.closed, rewritten)) if traced.reusable else None
        report = make_report(placement, plan, deferred, programs)
        key = signature(params, inputs)
        measured = report.dropouts > 0 and not any(map(_is_abstract, jax.tree.leaves(inputs)))
        original = _run(traced.closed, params, inputs) if measured else []
        with jax.ensure_compile_time_eval():  # a first call may be traced: the edit is not
            self._params = plan.center(params, donate=self._donate)
        if measured:
            difference = largest_difference(original, _run(rewritten, self._params, inputs))
            report = replace(report, deviation=difference / (largest(original) or 1.0))
        if traced.reusable:
            self._programs.put(key, program)
        self._report = report
        self._plan = plan  # other threads go ahead from now on
        self._given = None

    def _require_analysis(self, name: str) -> None:
        if self._plan is None:
            raise NotAnalysedError(
                f"{name}: not known before the first call; fold was given no example inputs, so "
                "call folded(*inputs) once, or pass inputs to fold"
            )


def _placed(traced: Traced, options: Options) -> Placement:
    placement = place(traced.graph(options.see_through_dropout), options.explicit_cost)
    return with_affine(placement) if options.fold_affine else placement


def _rewritten(
    traced: Traced, placement: Placement, options: Options
) -> tuple[ClosedJaxpr, tuple[Deferral, ...]]:
    """The folded program."""
    rewritten = rewrite(traced.closed, placement)
    if options.deferred_cost is None:
        return rewritten, ()
    return defer_scales(rewritten, options.deferred_cost)


def _check_callable(apply_fn: Any) -> None:
    if not callable(apply_fn):
        raise FoldError(
            f"apply_fn: a {type(apply_fn).__name__} is not callable; pass a function of "
            "(params, *inputs), such as model.apply"
        )


def _is_abstract(x: Any) -> bool:
    return isinstance(x, jax.ShapeDtypeStruct) or is_tracer(x)


def _run(program: ClosedJaxpr, params: Any, inputs: tuple[Any, ...]) -> list[jax.Array]:
    return float_outputs(jax.jit(jaxpr_as_fun(program))(*jax.tree.leaves((params, inputs))))
