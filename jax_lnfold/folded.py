"""What `fold` returns: the folded function with its parameters, plan and report."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from copy import copy
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from ._compat import ClosedJaxpr, is_tracer, jaxpr_as_fun
from .dropping import without_means
from .errors import FoldError, NotAnalysedError
from .kernels.check import check_declared
from .options import Options
from .output_differences import float_outputs, largest, largest_difference
from .placement.constant_means import without_constants
from .placement.place import Placement
from .placement.planning import follow, make_plan, place_again, placement_of
from .placement.untying import place_untied
from .plan.plan import FoldPlan
from .program.calls import with_keywords
from .program.tracing import Traced, signature, trace, trace_untied
from .program_cache import ApplyFn, FreshLock, Programs
from .report.approximation import Approximation
from .report.build import make_report
from .report.report import Report
from .report.summary import in_short
from .rewrite.rewritten import rewritten
from .trees import check_devices, check_leaves
from .untied import without_sharing


class Folded:
    """A folded model: a pure function `apply`, its `params`, the `plan` and the `report`.

    Made by `fold`. ``folded(*inputs)`` is short for ``folded.apply(folded.params, *inputs)``. It
    keeps the programs of the last 256 signatures, until `jax.clear_caches`, and none of them in a
    copy or a pickle.

    Example:
        >>> import jax, jax_lnfold
        >>> def model(params, x):
        ...     return jax.nn.standardize(x @ params["w"])  # a LayerNorm behind a linear layer
        >>> params = {"w": jax.random.normal(jax.random.key(0), (4, 8))}
        >>> x = jax.random.normal(jax.random.key(1), (3, 4))
        >>> folded = jax_lnfold.fold(model, params, x)
        >>> jax.vmap(folded.apply, (None, 0))(folded.params, x[None]).shape
        (1, 3, 8)
        >>> newer = folded.plan.center({"w": 2 * params["w"]})  # of another checkpoint
        >>> folded.apply(newer, x).shape
        (3, 8)
    """

    def __init__(
        self,
        apply_fn: Callable[..., Any],
        params: Any,
        donate: bool,
        options: Options,
        plan: FoldPlan | None = None,
        edits: bool = True,
        told: Approximation | None = None,
    ) -> None:
        """Use `fold` instead; `told` is what was measured when the plan was made."""
        self._followed, self._edits, self._told = plan, edits, told
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
        """The edited tree: structure, shapes, dtypes and shardings of the original.

        With leaves untied, it is an `Untied` whose `params` is that tree.
        """
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

    def __repr__(self) -> str:
        """What became of the LayerNorms, in one line."""
        if self._report is None:
            return "<Folded: not analysed before its first call>"
        return f"<Folded: {in_short(self._report)}>"

    def without_params(self) -> Folded:
        """The same with the shapes of the parameters, for somebody who keeps these elsewhere."""
        made = copy(self)
        made._params = shapes_of(self.params)
        return made

    def of_another(self, apply_fn: Callable[..., Any]) -> Folded:
        """Another function of these parameters, which must tolerate the plan; analysed when called.

        It holds the shapes of the parameters only.
        """
        return Folded(apply_fn, shapes_of(self.params), False, self._options, self.plan, False)

    def __call__(self, *inputs: Any, **keywords: Any) -> Any:
        """Short for ``folded.apply(folded.params, *inputs, **keywords)``."""
        inputs = with_keywords(inputs, keywords)
        self._require_inputs(inputs)
        return self.apply(self._params, *inputs)

    def apply(self, params: Any, *inputs: Any, **keywords: Any) -> Any:
        """The folded function: pure and traceable (jit, grad, vmap).

        `params` must be `self.params`, or another tree edited with ``plan.center``: of unedited
        parameters this is another function, which nothing tells from a right answer. Every new
        combination of shapes and dtypes is traced once, and the facts that the plan relies on are
        proved again for it. So `params` may have other sizes than those that were folded, along
        axes that no mean is taken over: two of ten members of an ensemble, say.

        Keywords are those of the folded function, none of which is remembered from `fold`: arrays
        (and trees of them) are inputs like all others; flags, names and functions are bound, each
        value making a program of its own.

        Args:
            params: edited parameters, see above.
            *inputs: arrays, of any shapes that the original function takes.
            **keywords: keyword arguments of the original function.

        Returns:
            What the original function returns, up to rounding.

        Raises:
            TreeError: `params` has not the leaves that were folded, their sizes along other axes
                differ, or it or the inputs hold other things than arrays on the same devices.
            TraceError: `apply_fn` cannot be traced with these inputs.
            PlanMismatchError: the program for these inputs notices the edits of the plan.
        """
        inputs = with_keywords(inputs, keywords)
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
        traced, placement = self._placed_again(params, inputs)
        made = rewritten(traced.closed, placement, self._options)
        program = jaxpr_as_fun(made.program), traced.out_tree
        if traced.reusable:
            self._programs.put(key, program)
        return program

    def _placed_again(self, params: Any, inputs: tuple[Any, ...]) -> tuple[Traced, Placement]:
        """The program of the original function, and what the plan is in it."""
        plan = self.plan.fitted(params, whole=True)
        check_leaves(inputs, "inputs")
        traced = tracing(plan)(self._apply_fn.function, params, inputs)
        graph = traced.graph(self._options.see_through_dropout)
        placement = place_again(plan, graph, self._options.explicit_cost)
        return traced, without_means(placement, plan)

    def _require_inputs(self, inputs: tuple[Any, ...]) -> None:
        """Analyse on the first call, in one thread while others wait."""
        if self._plan is None:
            with self._first_call.lock:
                if self._plan is None:
                    check_leaves(inputs, "inputs")
                    self._analyse(inputs)

    def _analyse(self, inputs: tuple[Any, ...]) -> None:
        """Find, or prove, the plan and edit the parameters as it says."""
        plan, finish = self._look(inputs)
        with jax.ensure_compile_time_eval():  # a first call may be traced: the edit is not
            params = edited(plan, self._given, self._donate) if self._edits else self._given
        finish(params)

    def _look(self, inputs: tuple[Any, ...]) -> tuple[FoldPlan, Callable[[Any], None]]:
        """The plan, and what there is to do once the parameters are edited."""
        params = self._given
        traced = tracing(self._followed)(self._apply_fn.function, params, inputs)
        if self._followed is None:
            traced, placement = analysed(traced, self._options)
            plan = planned(placement, self._options, params)
            params = plan.extend(params)
        else:
            plan = self._followed.fitted(params, whole=True, abstract=not self._edits)
            graph = traced.graph(self._options.see_through_dropout)
            placement = follow(plan, graph, self._options.explicit_cost)
            placement = without_means(placement, plan)
        check_declared(placement.graph)
        made = rewritten(traced.closed, placement, self._options)
        program = jaxpr_as_fun(made.program), traced.out_tree
        programs = (lambda: (traced.closed, made.program)) if traced.reusable else None
        report = make_report(placement, plan, made, programs, self._told)
        key = signature(params, inputs)
        abstract = any(map(is_abstract, jax.tree.leaves((self._given, inputs))))
        measured = report.dropouts > 0 and not abstract
        original = _run(traced.closed, params, inputs) if measured else []

        def finish(edited: Any) -> None:
            self._params, self._report = edited, report
            if measured:
                difference = largest_difference(original, _run(made.program, edited, inputs))
                deviation = difference / (largest(original) or 1.0)
                self._report = replace(report, deviation=deviation)
            if traced.reusable:
                self._programs.put(key, program)
            self._plan = plan  # other threads go ahead from now on
            self._given = None

        return plan, finish

    def _require_analysis(self, name: str) -> None:
        if self._plan is None:
            raise NotAnalysedError(
                f"{name}: not known before the first call; fold was given no example inputs, so "
                "call folded(*inputs) once, or pass inputs to fold"
            )


def placed_again(folded: Folded, params: Any, inputs: tuple[Any, ...]) -> tuple[Traced, Placement]:
    """The program of the function that was folded, and what the plan of the fold is in it.

    Raises:
        TreeError, TraceError, PlanMismatchError: as for `Folded.apply`.
    """
    return folded._placed_again(params, inputs)


def tracing(plan: FoldPlan | None) -> Callable[..., Traced]:
    """How a function is traced with the tree of a plan that is there already."""
    return trace_untied if plan is not None and plan.untied else trace


def analysed(traced: Traced, options: Options) -> tuple[Traced, Placement]:
    """The placement, and the program that it is of: with `untie`, that of a tree with copies."""
    if options.untie:
        return place_untied(traced, options)
    return traced, placement_of(traced, options)


def planned(placement: Placement, options: Options, params: Any) -> FoldPlan:
    """The placement's edits; with `reduce_means`, constants go as far as `params` have values."""
    plan = make_plan(placement)
    leaves = jax.tree.leaves(params)
    if not options.reduce_means or plan.untied or not all(map(_is_at_hand, leaves)):
        return plan
    values = dict(zip(placement.graph.leaves.values(), leaves, strict=True))
    return without_constants(plan, placement, values)


def edited(plan: FoldPlan, params: Any, donate: bool) -> Any:
    """The tree that a fold returns: edited, with memory of its own for every copy."""
    return without_sharing(plan.center(plan.extend(params), donate=donate))


def shapes_of(params: Any) -> Any:
    """The tree with types in place of numbers."""
    return jax.tree.map(_shape_of, params)


def _shape_of(x: Any) -> jax.ShapeDtypeStruct:
    dtype = x.dtype if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x).dtype
    return jax.ShapeDtypeStruct(np.shape(x), dtype)


def is_abstract(x: Any) -> bool:
    """Whether a leaf has no numbers here: a shape, or what is being traced."""
    return isinstance(x, jax.ShapeDtypeStruct) or is_tracer(x)


def _is_at_hand(x: Any) -> bool:
    """Whether this process has all numbers of a leaf."""
    return not is_abstract(x) and getattr(x, "is_fully_addressable", True)


def _run(program: ClosedJaxpr, params: Any, inputs: tuple[Any, ...]) -> list[jax.Array]:
    return float_outputs(jax.jit(jaxpr_as_fun(program))(*jax.tree.leaves((params, inputs))))
