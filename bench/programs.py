"""The programs that are compared: a model, its folds, and the model without its norms."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxpr_as_fun

import jax_lnfold
from jax_lnfold.options import DEFERRED_COST, SPELLINGS

from .models import NORMS
from .registry import MODELS

ORIGINAL, FOLDED, BOUND = "original", "folded", "norms removed"
OPTIMIZED = "optimized"
FOLDS: dict[str, dict[str, Any]] = {
    FOLDED: {},
    "folded, affine": {"fold_affine": True},
    "folded, affine, deferred": {"fold_affine": True, "defer_scale": True},
    OPTIMIZED: {"optimize": "auto"},
}
"""Variants that are folds, with the arguments of `jax_lnfold.fold`."""
PARTS: dict[str, dict[str, Any]] = {
    "folded, affine, matrix unit": {"fold_affine": True, "matrix_unit": True},
    "folded, affine, respelled": {"fold_affine": True, "respell": True},
}
"""What `optimize` turns on, one by one; on demand."""
LEFT_OUT = "means left out"
APPROXIMATE: dict[str, dict[str, Any]] = {
    LEFT_OUT: {"fold_affine": True, "approximate": {"mean"}, "budget": math.inf}
}
"""What computes something else, for comparison; on demand."""
ON_DEMAND = (*PARTS, *APPROXIMATE)
FORWARD = (ORIGINAL, *FOLDS, BOUND)
VARIANTS = (ORIGINAL, FOLDED, BOUND)  # those that are trained, too
ONLY_THE_PROGRAM = {"defer_scale", "deferred_cost", "matrix_unit", "respell"}
"""They change no parameters: no plan has them."""


@dataclass(frozen=True)
class Program:
    """One variant of a model: a function of (params, inputs), and the shapes of these."""

    variant: str
    original: Callable[..., Any]
    apply: Callable[..., Any]
    params: Any
    x: Any
    for_plan: dict[str, Any] | None = None

    @cached_property
    def plan(self) -> jax_lnfold.FoldPlan | None:
        """What a fold edits; an analysis of its own, on demand."""
        if self.for_plan is None:
            return None
        return jax_lnfold.plan_fold(self.original, self.params, self.x, **self.for_plan)


def variants(
    name: str,
    batch: int,
    spelling: str,
    dtype: str,
    *,
    length: int | None = None,
    stored: str = "float32",
    chosen: Sequence[str] = VARIANTS,
    target: str | None = None,
) -> Iterator[Program]:
    """Variants of a model from shapes alone; `dtype` is that of the arithmetic and the inputs.

    Parameters are `stored` in a dtype of their own, as they are in training. `target` is the
    backend they are to be compiled for, if it is not this machine's.
    """
    entry, kind = MODELS[name], jnp.dtype(dtype)
    x = entry.inputs(entry.config, batch, length or entry.length, kind)
    for variant in chosen:
        norm = NORMS["none" if variant == BOUND else spelling]
        model = entry.make(replace(entry.config, norm=norm, dtype=kind))
        params = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, stored),
            jax.eval_shape(model.init, jax.random.key(0), x),
        )
        yield program(variant, model.apply, params, x, target)


def program(
    variant: str, apply_fn: Callable[..., Any], params: Any, x: Any, target: str | None = None
) -> Program:
    """A variant of a function, from shapes alone."""
    if variant in APPROXIMATE:  # edits that need numbers
        options = APPROXIMATE[variant]
        folded = jax_lnfold.fold(apply_fn, random_arrays(params), x, **options)
        return Program(variant, apply_fn, folded.apply, params, x)
    folds = FOLDS | PARTS
    if variant not in folds:
        return Program(variant, apply_fn, apply_fn, params, x)
    options = dict(folds[variant])
    if target and "optimize" in options:
        options["optimize"] = target
    if target and "defer_scale" in options:
        options["deferred_cost"] = DEFERRED_COST[target]
    if target and "respell" in options:
        options["respell"] = SPELLINGS.get(target, False)
    for_plan = {key: value for key, value in options.items() if key not in ONLY_THE_PROGRAM}
    run = folded_function(apply_fn, params, x, **options)
    return Program(variant, apply_fn, run, params, x, for_plan)


def folded_function(
    apply_fn: Callable[..., Any], *shapes: Any, **options: Any
) -> Callable[..., Any]:
    """The folded program of a model, from shapes alone."""
    report = jax_lnfold.analyze(apply_fn, *shapes, **options)
    assert report.programs is not None
    run = jaxpr_as_fun(report.programs()[1])
    out = jax.tree.structure(jax.eval_shape(apply_fn, *shapes))
    return lambda *arguments: out.unflatten(run(*jax.tree.leaves(arguments)))


def random_arrays(shapes: Any, seed: int = 0) -> Any:
    """Weights or inputs for shapes: normal numbers of spread 0.02, and integers below 1000."""
    rng = np.random.default_rng(seed)

    def fill(s: jax.ShapeDtypeStruct) -> jax.Array:
        if jnp.issubdtype(s.dtype, jnp.integer):
            return jnp.asarray(rng.integers(1000, size=s.shape), s.dtype)
        return jnp.asarray(np.float32(0.02) * rng.standard_normal(s.shape, np.float32), s.dtype)

    return jax.tree.map(fill, shapes)


class SharedArrays:
    """Random parameters by key path and shape: variants of a model share their memory.

    The folds are given weights that are not centered: how long a program takes does not depend on
    what numbers it is given.
    """

    def __init__(self) -> None:
        """Nothing yet."""
        self._known: dict[Any, jax.Array] = {}

    def fill(self, shapes: Any) -> Any:
        """Arrays for shapes, new ones only where there are none."""

        def found(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
            key = jax.tree_util.keystr(path), leaf.shape, str(leaf.dtype)
            if key not in self._known:
                self._known[key] = random_arrays(leaf, seed=len(self._known))
            return self._known[key]

        return jax.tree_util.tree_map_with_path(found, shapes)
