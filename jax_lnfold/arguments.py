"""What callers of `fold`, `analyze`, `plan_fold` pass, as far as its parts must fit together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from .errors import FoldError, TreeError
from .folded import is_abstract
from .folded_functions import are_functions, check_functions
from .options import Options
from .placement.assuming import values_of
from .plan.plan import FoldPlan
from .printable import counted
from .program.calls import with_keywords
from .trees import MISSING, check_leaves


def check_untie(options: Options, model: Any, plan: FoldPlan | None) -> None:
    """Copies are for functions of parameters, in a plan of their own."""
    if options.untie and options.drop_means:
        raise FoldError(
            'untie: not together with approximate={"mean"}; leave one of both out, or untie the '
            "leaf in the model"
        )
    if model is not None and (options.untie or (plan is not None and plan.untied)):
        raise FoldError(
            "untie: a model that holds its parameters has no place for a copy; fold a function of "
            "its parameters, such as lambda params, x: nnx.merge(graphdef, params)(x)"
        )
    if options.untie and plan is not None:
        raise FoldError("untie: a plan is followed with the copies it has; leave one of both out")


def check_assume(options: Options, plan: FoldPlan | None) -> None:
    """What is assumed is found with a plan of its own."""
    if not options.assume_values:
        return
    other = 'approximate={"mean"}' if options.drop_means else "untie" if options.untie else None
    if other is not None:
        raise FoldError(f"assume_values: not together with {other}; leave one of both out")
    if plan is not None:
        raise FoldError("assume_values: a plan is followed as it is; leave one of both out")


def with_values(options: Options, leaves: list[tuple[str, Any]]) -> Options:
    """The options with what there is to assume of the leaves, if it was asked for."""
    return replace(options, values=values_of(leaves)) if options.assume_values else options


def inputs_of_each(
    functions: Mapping[Any, Any],
    given: tuple[Any, ...],
    keywords: Mapping[str, Any],
    argument: str,
) -> dict[str, tuple[Any, ...]]:
    """The inputs of several functions, by name; keywords are not for several."""
    if keywords:
        raise FoldError(
            f"{next(iter(keywords))}: which function it is for is not known; bind keywords of "
            "several functions with functools.partial"
        )
    return check_functions(functions, given, argument)


def inputs_of_one(given: tuple[Any, ...], keywords: Mapping[str, Any]) -> tuple[Any, ...]:
    """The example inputs of one function, if any, with its keywords."""
    if keywords and not given:
        raise FoldError(
            f"{next(iter(keywords))}: without example inputs there is nothing to trace; pass them, "
            "too, or pass keywords to the folded function only"
        )
    inputs = with_keywords(given, keywords)
    check_leaves(inputs, "example_inputs", abstract=True)
    return inputs


def check_no_weights(weights: Any) -> None:
    """Weights are for several functions."""
    if weights is not None:
        raise FoldError("weights: there is one function only; leave it out, or pass a mapping")


def check_no_means(options: Options) -> None:
    """Means are left out by `fold` of one function only."""
    if options.drop_means:
        raise FoldError(
            'approximate: "mean" is for fold of one function, as it is measured on data; fold the '
            "functions one by one, or leave it out"
        )


def check_follow(plan: Any, center: Any, options: Options) -> None:
    """A plan is one, and followed as what it is."""
    if plan is not None and not isinstance(plan, FoldPlan):
        raise FoldError(
            f"plan: a {type(plan).__name__} is no FoldPlan; pass folded.plan, or what "
            "FoldPlan.from_json reads"
        )
    if plan is not None and plan.dropped and not options.drop_means:
        raise FoldError(
            f"plan: leaves out the means of {counted(len(plan.dropped), 'LayerNorm')}, which is an "
            'approximation; pass approximate={"mean"}, too, to follow it, or plan.exact'
        )
    if not isinstance(center, (bool, np.bool_)):
        raise FoldError(f"center: {center!r} is not a bool; pass True or False")
    if center and plan is None:
        raise FoldError("center: there is no plan to center with; pass plan=, or leave it out")


def followed(plan: FoldPlan, params: Any, center: Any) -> Any:
    """The tree to fold: with the copies that the plan edits, or else as the plan leaves it.

    Of leaves without values it is not asked how they are.
    """
    if center:
        return plan.extend(params)
    if any(map(is_abstract, jax.tree.leaves(params))):
        plan.fitted(params, abstract=True)
        return params
    plan.fitted(params).check_assumed(params)
    if (path := plan.not_centered(params)) is not None:
        raise TreeError(
            f"params: leaf {path!r} is not centered as the plan says; pass center=True to edit it, "
            "or plan.center(params)"
        )
    return params


def check_given(apply_fn: Any, params: Any, inputs: tuple[Any, ...]) -> None:
    """There is a function, and something that may be parameters, in this order."""
    if not callable(apply_fn) and not are_functions(apply_fn):
        cure = (
            "pass a function of (params, *inputs), such as model.apply, or several of them by name"
        )
        if callable(getattr(apply_fn, "apply", None)):
            cure = "pass its .apply"
        elif any(map(callable, (params, *inputs))):
            cure = "the function comes first: fold(apply_fn, params, *inputs)"
        raise FoldError(f"apply_fn: a {type(apply_fn).__name__} is not callable; {cure}")
    if params is MISSING:
        raise FoldError("params: missing; pass fold(apply_fn, params, *inputs)")
    if callable(params) and any(leaf is params for leaf in jax.tree.leaves(params)):
        raise FoldError(
            f"params: a {type(params).__name__} is no tree of arrays; pass "
            "fold(apply_fn, params, *inputs), or of a model, fold(model, *inputs)"
        )
