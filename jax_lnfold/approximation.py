"""Leaves out means of LayerNorms that are not zero, as many as an error of the outputs allows.

What feeds them is centered and fitted first, so that little of a mean is left; then the cheapest
go, by the damage that each does alone, and all together are measured (theory, section 12).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ._compat import ClosedJaxpr, consts_of, jaxpr_as_fun
from .batches import check_batches
from .calibration import Calibration
from .dropping import droppable, without_means
from .errors import FoldError
from .fitting import NOT_FINITE, Fit
from .folded import planned
from .measurement.switched import Switched
from .measurement.watched import Watched
from .observing import observed
from .options import Options
from .output_differences import (
    LogitDifference,
    Squares,
    float_outputs,
    logit_difference,
    squares,
)
from .placement.free_means import free_means
from .placement.hiding import hidden_means
from .placement.place import Placement
from .placement.planning import follow, make_plan, placement_of
from .plan.edits.drop import DropEdit
from .plan.edits.hide import HideEdit
from .plan.plan import FoldPlan
from .program.tracing import Traced, trace
from .report.approximation import Approximation
from .rewrite.rewritten import rewritten
from .trees import first_line, leaf_paths

HELD_OUT = 5
"""Every fifth batch is held out of the fit, and at least the last one."""
SPREAD = 100
"""Means are hidden behind scales of which no number is so many times smaller than the largest."""


def approximated(
    apply_fn: Callable[..., Any],
    params: Any,
    example: tuple[Any, ...],
    options: Options,
    wanted: Calibration,
) -> tuple[FoldPlan, Approximation]:
    """The plan that leaves out means as far as the budget goes, and what was measured.

    Raises:
        FoldError: there are not enough batches, they do not fit, or there is nothing to measure.
        TraceError: `apply_fn` cannot be traced with a batch.
    """
    if not wanted.batches and wanted.budget == math.inf:
        if not example:
            raise FoldError("example_inputs: missing; pass them to fold, as there is no batch")
        return _unmeasured(trace(apply_fn, params, example), params, options)
    _check_batches(params, example, wanted.batches)
    held_out = [i for i in range(len(wanted.batches)) if i % HELD_OUT == HELD_OUT - 1]
    held_out = held_out or [len(wanted.batches) - 1]
    fitted = [batch for i, batch in enumerate(wanted.batches) if i not in held_out]
    traced = trace(apply_fn, params, wanted.batches[0])
    plan = _with_means(traced, params, fitted, options)
    placement = follow(plan, traced.graph(options.see_through_dropout), options.explicit_cost)
    held = [wanted.batches[i] for i in held_out]
    trial = _Trial(traced, placement, plan, params, held, options)
    budget = trial.error_of_cast() if wanted.budget is None else wanted.budget
    plan, told = trial.run(budget, wanted.logits)
    sides = [(params, False), (trial.edited, True)]
    statistics = observed(
        traced,
        placement,
        [(Watched(traced.closed, placement, after), own) for own, after in sides],
        held,
    )
    return plan, replace(
        told,
        default=wanted.budget is None,
        fitted=len(fitted),
        held_out=len(held),
        statistics=statistics,
    )


def _unmeasured(traced: Traced, params: Any, options: Options) -> tuple[FoldPlan, Approximation]:
    """All means left out that can be, of a program whose parameters are centered only."""
    options = replace(options, reduce_means=True)
    plan = planned(placement_of(traced, options), options, params)
    graph = traced.graph(options.see_through_dropout)
    can, kept = droppable(follow(plan, graph, options.explicit_cost))
    plan = replace(plan, dropped=tuple(map(DropEdit, can)))
    return plan, Approximation(math.inf, kept=kept)


def _check_batches(params: Any, example: tuple[Any, ...], batches: Sequence[Any]) -> None:
    """There are at least two, alike, and inputs of the same kind as the example."""
    if len(batches) < 2:
        raise FoldError(
            f"calibrate: {'no batch' if not batches else 'one batch only'}; pass two or more, as "
            "means are fitted to some, and the error is measured on others"
        )
    try:
        check_batches(params, batches, "fold")
    except FoldError as error:
        words = str(error)
        if not words.startswith("batches"):
            raise
        raise type(error)(f"calibrate{words.removeprefix('batches')}") from None
    if example and _kinds(example) != _kinds(batches[0]):
        raise FoldError(
            "calibrate: batches have another structure, or arrays of another rank or dtype, than "
            "the example inputs; pass inputs like those that the function will be given"
        )


def _kinds(inputs: tuple[Any, ...]) -> Any:
    leaves, structure = jax.tree.flatten(inputs)
    abstract = [x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x) for x in leaves]
    return structure, [(len(x.shape), x.dtype) for x in abstract]


def _with_means(
    traced: Traced, params: Any, batches: Sequence[tuple[Any, ...]], options: Options
) -> FoldPlan:
    """The plan that centers what nobody notices, with means that are fitted to the batches."""
    both = [placement_of(traced, replace(options, reduce_means=on)) for on in (True, False)]
    plan, free = make_plan(both[0]), free_means(*both)
    found = Fit(traced, both[0], free, plan.center(params), batches[0]).run(plan, batches)
    if (norm := next((n.path for n in found.norms if n.why == NOT_FINITE), None)) is not None:
        raise FoldError(
            f"calibrate: in a batch, what the LayerNorm {norm} reads is infinite or NaN, so that "
            "no means can be fitted; leave such inputs out"
        )
    return found.plan


class _Program(NamedTuple):
    """A function of parameter leaves and input leaves, and parameters for it."""

    run: Callable[[list[Any], list[Any]], Sequence[Any]]
    leaves: list[Any]


@dataclass
class _Trial:
    """Programs run on batches that nothing was fitted to, and compared with the original."""

    traced: Traced
    placement: Placement
    plan: FoldPlan
    params: Any
    batches: Sequence[tuple[Any, ...]]
    options: Options

    def __post_init__(self) -> None:
        """Run the original."""
        self.edited = self.plan.center(self.params)
        self._original = _Program(_compiled(self.traced.closed), jax.tree.leaves(self.params))
        self._given = [jax.tree.leaves(batch) for batch in self.batches]
        self._want = [self._original.run(self._original.leaves, given) for given in self._given]
        for outputs in self._want:
            if not (floats := float_outputs(outputs)):
                raise FoldError(
                    "apply_fn: returns no floating-point array, so that no error can be measured; "
                    "return the values before an argmax or the like"
                )
            if any(bool(jnp.isnan(x).any()) for x in floats):
                raise FoldError(
                    "calibrate: the outputs of apply_fn for a batch are NaN; leave such inputs out"
                )

    def error_of_cast(self) -> float:
        """The error that a cast of the weights to bfloat16 makes."""
        leaves = [*map(_cast, self._original.leaves)]
        error = self._error(_Program(self._original.run, leaves))
        if error == 0:
            raise FoldError(
                "budget: a cast of these weights to bfloat16 changes no output, so there is no "
                "error to go by; pass a number, such as 5e-3"
            )
        return error

    def run(self, budget: float, logits: Callable[[Any], Any] | None) -> tuple[FoldPlan, Any]:
        """The plan with as many means left out as the budget allows, and what was measured."""
        can, kept = droppable(self.placement)
        switched = self._switched([*can.values()])
        names, total = [*can], len(can)
        hidden = self._hide(can, switched) if budget else {}
        exact = switched(range(total))
        alone = [switched({*range(total)} - {n}) for n in range(total)]
        order = sorted(range(total), key=lambda n: (math.isnan(alone[n]), alone[n]))
        count = _most(total, lambda k: switched(order[k:]) <= budget) if budget else 0
        while True:
            left_out = [names[n] for n in sorted(order[:count])]
            plan = replace(
                self.plan,
                dropped=tuple(map(DropEdit, left_out)),
                hidden=tuple(edit for name in left_out for edit in hidden.get(name, ())),
            )
            program = self._folded(plan)
            error = self._error(program)
            if error <= budget or not count:
                break
            count //= 2  # its own rounding is above the budget
        told = Approximation(
            budget=budget,
            deviation=error,
            exact=exact,
            damages=dict(zip(names, alone, strict=True)),
            kept=kept,
        )
        return plan, told if logits is None else self._with_logits(told, program, logits)

    def _hide(
        self, can: Mapping[str, Sequence[int]], switched: Callable[[Iterable[int]], float]
    ) -> dict[str, list[HideEdit]]:
        """Makes readers blind to the means, by name, if that is better with all of these left out.

        It is so to first order in what a reader sees, but not in what goes around it.
        """
        edits = hidden_means(self.placement, self.plan)
        leaves = dict(leaf_paths(self.params))
        far = {i: e for i, e in edits.items() if _is_level(leaves[e.key_path])}
        found = {name: [far[i] for i in own if i in far] for name, own in can.items()}
        before, centered = switched(()), self.edited
        every = tuple(edit for some in found.values() for edit in some)
        self.edited = replace(self.plan, hidden=every).center(self.params)
        if every and switched(()) < before:
            return found
        self.edited = centered
        return {}

    def _switched(self, groups: Sequence[Sequence[int]]) -> Callable[[Iterable[int]], float]:
        """The error of the program in which only some of the groups have a mean."""
        closed = self.traced.closed

        @jax.jit
        def run(consts: Any, leaves: list[Any], given: list[Any], switches: Any) -> list[Any]:
            program = Switched(closed, self.placement, groups, switches)
            return program.outputs(consts, [*leaves, *given])

        def error(on: Iterable[int]) -> float:
            switches = np.isin(np.arange(len(groups)), [*on])
            leaves = jax.tree.leaves(self.edited)
            return self._error(
                _Program(lambda own, given: run(consts_of(closed), own, given, switches), leaves)
            )

        return error

    def _folded(self, plan: FoldPlan) -> _Program:
        """What `fold` will return."""
        placement = without_means(self.placement, plan)
        made = rewritten(self.traced.closed, placement, self.options)
        return _Program(_compiled(made.program), jax.tree.leaves(self.edited))

    def _error(self, program: _Program) -> float:
        found = []
        for given, want in zip(self._given, self._want, strict=True):
            outputs = program.run(program.leaves, given)
            found.append(squares(float_outputs(want), float_outputs(outputs)))
        return reduce(lambda a, b: Squares(a[0] + b[0], a[1] + b[1]), found).error

    def _with_logits(
        self, told: Approximation, program: _Program, logits: Callable[[Any], Any]
    ) -> Approximation:
        found = []
        for given, want in zip(self._given, self._want, strict=True):
            outputs = program.run(program.leaves, given)
            both = (self._picked(logits, each) for each in (want, outputs))
            found.append(logit_difference(*both))
        total = LogitDifference(*map(sum, zip(*found, strict=True)))
        divergence, agreement = (x / max(1, total.rows) for x in total[:2])
        return replace(told, divergence=max(divergence, 0.0), agreement=agreement)

    def _picked(self, logits: Callable[[Any], Any], outputs: Sequence[Any]) -> list[jax.Array]:
        try:
            found = logits(jax.tree.unflatten(self.traced.out_tree, outputs))
        except Exception as error:
            raise FoldError(
                f"logits: failed on the outputs ({type(error).__name__}: {first_line(error)}); "
                "pass a function that picks the logits from what apply_fn returns"
            ) from error
        picked = float_outputs(found)
        if not picked or any(x.ndim == 0 or jnp.iscomplexobj(x) for x in picked):
            raise FoldError(
                "logits: picks no real array with an axis of classes; pass a function that "
                "picks the logits from what apply_fn returns"
            )
        return picked


def _compiled(closed: ClosedJaxpr) -> Callable[[list[Any], list[Any]], Sequence[Any]]:
    program = jax.jit(jaxpr_as_fun(closed))
    return lambda leaves, given: program(*leaves, *given)


def _is_level(scale: Any) -> bool:
    """Whether a division by these numbers loses few digits."""
    sizes = jnp.abs(scale)
    return bool(jnp.min(sizes) * SPREAD > jnp.max(sizes))


def _cast(x: Any) -> Any:
    """A weight after a cast to bfloat16 and back."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    return x.astype(jnp.bfloat16).astype(x.dtype)


def _most(total: int, fits: Callable[[int], bool]) -> int:
    """The largest count that fits, if all smaller ones do; each that is returned was asked."""
    low, high = 0, total + 1
    count = total
    while high - low > 1:
        low, high = (count, high) if fits(count) else (low, count)
        count = (low + high) // 2
    return low
