"""The public functions: fold a model, or look at what folding would do."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Hashable, Mapping
from numbers import Real
from typing import Any

import jax

from ._compat import ClosedJaxpr, jaxpr_as_fun
from .axes import AxisSet
from .errors import FoldError, NotAnalysedError, PlanMismatchError
from .facts import Facts
from .graph import Graph
from .placement import Placement, place, place_within
from .plan import CenterEdit, FoldPlan, LeafSpec, ScaleEdit, check_donate
from .program import Traced, signature, trace
from .report import Report, make_report
from .rewrite import rewrite
from .scales import ScaleMerge, find_merges
from .trees import check_devices, check_leaves, leaf_paths


def fold(
    apply_fn: Callable[..., Any],
    params: Any,
    *example_inputs: Any,
    donate: bool = False,
    explicit_cost: float = 2.0,
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

    Returns:
        The folded function and parameters, with a plan and a report.

    Raises:
        FoldError: `apply_fn` is not callable or traceable, `params` or the inputs hold other
            leaves than arrays, or an option has no such value. Nothing has been changed then.
    """
    _check_arguments(apply_fn, explicit_cost)
    check_donate(donate)
    check_leaves(params, "params")
    check_leaves(example_inputs, "example_inputs", abstract=True)
    folded = Folded(apply_fn, params, bool(donate), float(explicit_cost))
    if example_inputs:
        folded._analyse(example_inputs)
    return folded


def analyze(
    apply_fn: Callable[..., Any], params: Any, *inputs: Any, explicit_cost: float = 2.0
) -> Report:
    """Report what `fold` would do, without editing anything.

    `params` and `inputs` may hold `jax.ShapeDtypeStruct` leaves: no weights are needed.

    Raises:
        FoldError: as for `fold`, or the inputs that `apply_fn` needs are missing.
    """
    traced, placement = _analysis(apply_fn, params, inputs, explicit_cost)

    def programs() -> tuple[ClosedJaxpr, ClosedJaxpr]:
        return traced.closed, rewrite(traced.closed, placement)

    return make_report(placement, _make_plan(params, placement), programs)


def plan_fold(
    apply_fn: Callable[..., Any], params: Any, *inputs: Any, explicit_cost: float = 2.0
) -> FoldPlan:
    """The plan that `fold` would follow, from shapes alone as in `analyze`."""
    _, placement = _analysis(apply_fn, params, inputs, explicit_cost)
    return _make_plan(params, placement)


def _analysis(
    apply_fn: Callable[..., Any], params: Any, inputs: tuple[Any, ...], explicit_cost: float
) -> tuple[Traced, Placement]:
    _check_arguments(apply_fn, explicit_cost)
    check_leaves(params, "params", abstract=True)
    check_leaves(inputs, "inputs", abstract=True)
    traced = trace(apply_fn, params, inputs)
    return traced, place(traced.graph(), float(explicit_cost))


class Folded:
    """A folded model: a pure function `apply`, its `params`, the `plan` and the `report`."""

    def __init__(
        self, apply_fn: Callable[..., Any], params: Any, donate: bool, explicit_cost: float
    ) -> None:
        """Use `fold` instead."""
        self._apply_fn = apply_fn
        self._given: Any = params  # until the analysis has run
        self._first_call = threading.RLock()
        self._donate = donate
        self._explicit_cost = explicit_cost
        self._params: Any = None
        self._plan: FoldPlan | None = None
        self._report: Report | None = None
        self._programs: dict[Hashable, tuple[Callable[..., Any], Any]] = {}

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
        proved again for it.

        Raises:
            TreeError: `params` is not a tree of the structure and shapes that were folded, or it or
                the inputs hold other things than arrays on the same devices.
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
        self._plan.check(params)
        check_leaves(inputs, "inputs")
        traced = trace(self._apply_fn, params, inputs)
        placement = _place_again(self._plan, params, traced.graph(), self._explicit_cost)
        program = jaxpr_as_fun(rewrite(traced.closed, placement)), traced.out_tree
        if traced.reusable:
            self._programs[key] = program
        return program

    def _require_inputs(self, inputs: tuple[Any, ...]) -> None:
        """Analyse on the first call, in one thread while others wait."""
        if self._plan is None:
            with self._first_call:
                if self._plan is None:
                    check_leaves(inputs, "inputs")
                    self._analyse(inputs)

    def _analyse(self, inputs: tuple[Any, ...]) -> None:
        params = self._given
        traced = trace(self._apply_fn, params, inputs)
        placement = place(traced.graph(), self._explicit_cost)
        plan = _make_plan(params, placement)
        rewritten = rewrite(traced.closed, placement)
        program = jaxpr_as_fun(rewritten), traced.out_tree
        programs = (lambda: (traced.closed, rewritten)) if traced.reusable else None
        report = make_report(placement, plan, programs)
        key = signature(params, inputs)
        with jax.ensure_compile_time_eval():  # a first call may be traced: the edit is not
            self._params = plan.center(params, donate=self._donate)
        if traced.reusable:
            self._programs[key] = program
        self._report = report
        self._plan = plan  # other threads go ahead from now on
        self._given = None

    def _require_analysis(self, name: str) -> None:
        if self._plan is None:
            raise NotAnalysedError(
                f"{name}: not known before the first call; fold was given no example inputs, so "
                "call folded(*inputs) once, or pass inputs to fold"
            )


def _check_arguments(apply_fn: Any, explicit_cost: float) -> None:
    if not callable(apply_fn):
        raise FoldError(
            f"apply_fn: a {type(apply_fn).__name__} is not callable; pass a function of "
            "(params, *inputs), such as model.apply"
        )
    if not (isinstance(explicit_cost, Real) and 0 < explicit_cost < math.inf):
        raise FoldError(f"explicit_cost: {explicit_cost!r} is not a positive number; try 2.0")


def _make_plan(params: Any, placement: Placement) -> FoldPlan:
    """The placement's parameter edits, with key paths instead of leaf numbers."""
    graph = placement.graph
    paths = [path for path, _ in leaf_paths(params)]
    shapes = {i: graph.shape(v) for v, i in graph.leaves.items()}
    edits = ((graph.leaves[v], along) for v, sets in placement.leaf_sets.items() for along in sets)
    return FoldPlan(
        leaves=tuple(LeafSpec(path, shapes[i]) for i, path in enumerate(paths)),
        edits=tuple(CenterEdit(paths[i], along) for i, along in sorted(edits, key=lambda e: e[0])),
        scales=tuple(
            ScaleEdit(paths[m.scale], tuple((paths[i], axes) for i, axes in m.targets))
            for m in placement.merges
        ),
    )


def _place_again(plan: FoldPlan, params: Any, graph: Graph, explicit_cost: float) -> Placement:
    """A placement for another trace, with the parameter edits of `plan` proved harmless in it."""
    index = {path: i for i, (path, _) in enumerate(leaf_paths(params))}
    value = {i: v for v, i in graph.leaves.items()}
    scales = tuple(
        ScaleMerge(index[s.key_path], tuple(sorted((index[p], axes) for p, axes in s.targets)))
        for s in plan.scales
    )
    merges = find_merges(graph)
    fixed: dict[int, tuple[AxisSet, ...]] = {}
    for edit in plan.edits:
        leaf = value[index[edit.key_path]]
        fixed[leaf] = (*fixed.get(leaf, ()), edit.along)
    facts = Facts(graph, frozenset(value[s.scale] for s in scales))
    _check_edits(facts, fixed, scales, merges, value, plan)
    merges = {v: m for v, m in merges.items() if m in scales}
    return place_within(facts, merges, explicit_cost, fixed)


def _check_edits(
    facts: Facts,
    fixed: Mapping[int, tuple[AxisSet, ...]],
    scales: tuple[ScaleMerge, ...],
    merges: Mapping[int, ScaleMerge],
    value: Mapping[int, int],
    plan: FoldPlan,
) -> None:
    """Raise a `PlanMismatchError` if this trace notices an edit of the plan."""
    graph = facts.graph
    for scale, edit in zip(scales, plan.scales, strict=True):
        touched = (scale.scale, *(leaf for leaf, _ in scale.targets))
        if merges.get(value[scale.scale]) != scale and any(graph.uses[value[i]] for i in touched):
            raise PlanMismatchError(
                f"inputs: for these inputs the scale {edit.key_path!r} is used in another way than "
                "in the example the plan was made for; fold again with these inputs"
            )
    for leaf, sets in fixed.items():
        for along in sets:
            if (blocker := facts.intolerant(leaf, along)) is not None:
                path = plan.leaves[graph.leaves[leaf]].key_path
                raise PlanMismatchError(
                    f"inputs: for these inputs the centering of {path!r} would be noticed: "
                    f"{blocker}; fold again with these inputs"
                )
