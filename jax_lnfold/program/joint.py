"""Several functions of one parameter tree as one program, so that one plan is the optimum of all.

All functions side by side are a function of the tree, too: a leaf tolerates a shift if it does so
in each of them, and the cheapest cut is the cheapest for all together (theory, section 10).
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from math import lcm
from typing import Any

import jax

from .._compat import jaxpr_as_fun, open_jaxpr, shape_like
from ..errors import FoldError
from ..options import is_positive
from .tracing import Traced


def joined(traced: Mapping[str, Traced], weights: Mapping[str, int]) -> Traced:
    """The program that runs all of these programs; each as often as its weight says.

    Its modules are those of the functions, behind their names; its outputs are by name, too.
    """
    first = next(iter(traced.values()))
    n_leaves, operands = len(first.leaves), dict[str, list[Any]]()
    for name, t in traced.items():
        operands[name] = [shape_like(v.aval) for v in open_jaxpr(t.closed).invars]

    def all_of_them(leaves: list[Any], inputs: dict[str, list[Any]]) -> list[list[Any]]:
        results = []
        for name, t in traced.items():
            with jax.named_scope(name):
                results.append(jax.jit(jaxpr_as_fun(t.closed))(*leaves, *inputs[name]))
        return results

    leaves = next(iter(operands.values()))[:n_leaves]
    inputs = {name: every[n_leaves:] for name, every in operands.items()}
    closed = jax.make_jaxpr(all_of_them)(leaves, inputs)
    outputs = ((f"[{name!r}]", *path) for name, t in traced.items() for path in t.output_paths)
    runs = tuple(weights[name] for name in traced)
    return Traced(closed, None, first.leaves, tuple(outputs), runs)


def whole_weights(weights: Any, names: list[str]) -> dict[str, int]:
    """The weight of each function as a whole number, in the same proportion; by default 1 each.

    In proportion to 0.1 %, which is for weights like 1/3.

    Raises:
        FoldError: `weights` is no mapping of these names to positive numbers.
    """
    if weights is None:
        return dict.fromkeys(names, 1)
    if not isinstance(weights, Mapping) or {*weights} != {*names}:
        raise FoldError(
            f"weights: {weights!r} is no mapping with a number for each of {', '.join(names)}; "
            "pass how often each function runs, or leave it out"
        )
    bad = {name: weight for name, weight in weights.items() if not is_positive(weight)}
    if bad:
        name, weight = next(iter(bad.items()))
        raise FoldError(
            f"weights: {weight!r} of {name!r} is not a positive number; pass how often it runs, or "
            "leave out a function that never does"
        )
    exact = {name: Fraction(float(weights[name])) for name in names}
    unit = min(1, *exact.values())  # what is below 1 would lose its proportion by rounding
    near = {name: (weight / unit).limit_denominator(1000) for name, weight in exact.items()}
    common = lcm(*(weight.denominator for weight in near.values()))
    return {name: int(weight * common) for name, weight in near.items()}
