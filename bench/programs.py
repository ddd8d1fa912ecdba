"""The programs that are compared: a model, its folds, and the model without its norms."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun

import jax_lnfold

from .models import MODELS, NORMS

ORIGINAL, FOLDED, BOUND = "original", "folded", "norms removed"
VARIANTS = (ORIGINAL, FOLDED, BOUND)


@dataclass(frozen=True)
class Program:
    """One variant of a model: a function of (params, inputs), and the shapes of these."""

    variant: str
    apply: Callable[..., Any]
    params: Any
    x: jax.ShapeDtypeStruct
    plan: jax_lnfold.FoldPlan | None = None


def variants(name: str, batch: int, spelling: str, dtype: str) -> Iterator[Program]:
    """Every variant of a model, from shapes alone; `dtype` is that of the arithmetic."""
    entry, kind = MODELS[name], jnp.dtype(dtype)
    x = jax.ShapeDtypeStruct((batch, *entry.sample), jnp.int32 if entry.integers else kind)
    for variant in VARIANTS:
        norm = NORMS["none" if variant == BOUND else spelling]
        model = entry.make(replace(entry.config, norm=norm, dtype=kind))
        params = jax.eval_shape(model.init, jax.random.key(0), x)
        if variant == FOLDED:
            apply = folded_function(model.apply, params, x)
            plan = jax_lnfold.plan_fold(model.apply, params, x)
            yield Program(variant, apply, params, x, plan)
        else:
            yield Program(variant, model.apply, params, x)


def folded_function(apply_fn: Callable[..., Any], *shapes: Any) -> Callable[..., Any]:
    """The folded program of a model with one output, from shapes alone."""
    report = jax_lnfold.analyze(apply_fn, *shapes)
    assert report.programs is not None
    run = jaxpr_as_fun(report.programs()[1])
    return lambda *arguments: run(*jax.tree.leaves(arguments))[0]


def random_arrays(shapes: Any, seed: int = 0) -> Any:
    """Weights or inputs for shapes: normal numbers of spread 0.02, and integers below 1000."""
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(seed), len(leaves))

    def fill(key: jax.Array, s: jax.ShapeDtypeStruct) -> jax.Array:
        if jnp.issubdtype(s.dtype, jnp.integer):
            return jax.random.randint(key, s.shape, 0, 1000, s.dtype)
        return 0.02 * jax.random.normal(key, s.shape, s.dtype)

    return tree.unflatten([fill(k, s) for k, s in zip(keys, leaves, strict=True)])
