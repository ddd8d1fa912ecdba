"""What `fold` returns for several functions of one parameter tree."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from .errors import FoldError, TraceError
from .folded import Folded, analysed, edited, tracing
from .options import Options
from .placement.planning import follow, make_plan
from .plan.plan import FoldPlan
from .program.joint import joined, whole_weights
from .program.tracing import Traced
from .report.build import make_report
from .report.report import Report
from .report.summary import in_short
from .rewrite.rewriter import rewrite
from .rewrite.rewritten import Rewritten
from .trees import check_leaves


class FoldedFunctions(Mapping[str, Folded]):
    """Functions of one parameter tree, folded together: a mapping from their names.

    They share the edited `params` and the `plan`, which is the optimum for all of them together.
    The `report` is about all of them: its modules and places begin with the function's name; that
    of one function alone is ``functions[name].report``.

    Example:
        >>> import jax, jax_lnfold
        >>> def encode(params, x):
        ...     return jax.nn.standardize(x @ params["w"])
        >>> def score(params, x):
        ...     return encode(params, x) @ params["v"]
        >>> w, v = jax.random.normal(jax.random.key(0), (2, 4, 4))
        >>> params, x = {"w": w, "v": v}, jax.random.normal(jax.random.key(1), (3, 4))
        >>> functions, inputs = {"encode": encode, "score": score}, {"encode": x, "score": x[:1]}
        >>> served = jax_lnfold.fold(functions, params, inputs)
        >>> served["score"].apply(served.params, x).shape
        (3, 4)
    """

    def __init__(self, functions: Mapping[str, Folded], plan: FoldPlan, report: Report) -> None:
        """Use `fold` instead."""
        self._functions = dict(functions)
        self.plan, self.report = plan, report

    def __repr__(self) -> str:
        """The names, and what became of the LayerNorms of all together, in one line."""
        return f"<FoldedFunctions {', '.join(map(repr, self))}: {in_short(self.report)}>"

    @property
    def params(self) -> Any:
        """The edited tree, which all functions read."""
        return next(iter(self._functions.values())).params

    def __getitem__(self, name: str) -> Folded:
        """One folded function."""
        return self._functions[name]

    def __iter__(self) -> Iterator[str]:
        """The names of the functions."""
        return iter(self._functions)

    def __len__(self) -> int:
        """How many functions there are."""
        return len(self._functions)


def trace_together(
    functions: Mapping[str, Callable[..., Any]],
    params: Any,
    inputs: Mapping[str, tuple[Any, ...]],
    weights: Any,
    plan: FoldPlan | None = None,
) -> Traced:
    """The program that runs all of these functions, each as often as its weight says.

    With a plan, `params` is the tree that it is for.
    """
    runs = whole_weights(weights, [*functions])
    traced = {name: _traced(name, fn, params, inputs[name], plan) for name, fn in functions.items()}
    return joined(traced, runs)


def _traced(
    name: str, fn: Callable[..., Any], params: Any, inputs: tuple[Any, ...], plan: FoldPlan | None
) -> Traced:
    try:
        return tracing(plan)(fn, params, inputs)
    except TraceError as error:
        raise TraceError(
            f"apply_fn[{name!r}]: {str(error).removeprefix('apply_fn: ')}. Every function is given "
            "all of params: wrap one that takes a part, as in lambda p, *x: f(p['part'], *x)"
        ) from error.__cause__


def fold_together(
    functions: Mapping[str, Callable[..., Any]],
    params: Any,
    inputs: Mapping[str, tuple[Any, ...]],
    donate: bool,
    options: Options,
    weights: Any,
    plan: FoldPlan | None,
    center: bool,
) -> FoldedFunctions:
    """One plan for all of these functions, proved for all of them before any edit."""
    joint = trace_together(functions, params, inputs, weights, plan)
    if plan is None:
        (joint, placement), center = analysed(joint, options), True
        plan = make_plan(placement)
        params = plan.extend(params)
    else:
        plan = plan.fitted(params, whole=True, abstract=not center)
        graph = joint.graph(options.see_through_dropout)
        placement = follow(plan, graph, options.explicit_cost)
    made = Rewritten(rewrite(joint.closed, placement))
    report = make_report(placement, plan, made, lambda: (joint.closed, made.program))
    folded = {
        n: Folded(fn, params, False, options, plan, edits=False) for n, fn in functions.items()
    }
    # Each is looked at, and what is approximate run, before the edit: then `params` may be donated.
    finish = [each._look(inputs[name])[1] for name, each in folded.items()]
    params = edited(plan, params, donate) if center else params
    for finished in finish:
        finished(params)
    measured = [d for each in folded.values() if (d := each.report.deviation) is not None]
    report = replace(report, deviation=max(measured, default=None))
    return FoldedFunctions(folded, plan, report)


def are_functions(x: Any) -> bool:
    """Whether it is a mapping of functions, at least one."""
    return isinstance(x, Mapping) and bool(x) and all(map(callable, x.values()))


def check_functions(
    functions: Mapping[Any, Any], given: tuple[Any, ...], argument: str
) -> dict[str, tuple[Any, ...]]:
    """The inputs of each function; raises a `FoldError` unless they are in the `argument`."""
    if names := [name for name in functions if not isinstance(name, str)]:
        raise FoldError(f"apply_fn: {names[0]!r} is no name of a function; pass text")
    (inputs,) = given if len(given) == 1 else (None,)
    if not isinstance(inputs, Mapping) or {*inputs} != {*functions}:
        raise FoldError(
            f"{argument}: not one mapping with the inputs of {', '.join(functions)}; pass "
            "{name: (input, ...)} with a tuple for each function"
        )
    found = {n: x if isinstance(x, tuple) else (x,) for n, x in inputs.items()}
    for name, each in found.items():
        check_leaves(each, f"{argument}[{name!r}]", abstract=True)
    return found
