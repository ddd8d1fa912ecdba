"""What a caller of `fold` may choose."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from numbers import Real
from typing import Any

import jax
import numpy as np

from .errors import FoldError

APPROXIMATIONS = frozenset({"dropout"})
"""What may be approximated on request."""


DEFERRED_COST = {"cpu": 0.1, "gpu": 0.1, "tpu": 0.05}
"""What it costs to scale an element of a result, by backend: see `bench/README.md`."""
PRESETS = {"tpu": frozenset({"fold_affine"})}
"""What ``optimize="auto"`` turns on, by backend: what was measured to pay (`bench/README.md`)."""


@dataclass(frozen=True, slots=True)
class Options:
    """The checked options of a fold, see `fold`; `deferred_cost` is None if nothing is deferred."""

    explicit_cost: float
    see_through_dropout: bool
    fold_affine: bool
    deferred_cost: float | None


def check_options(
    explicit_cost: Any,
    approximate: Any,
    fold_affine: Any,
    defer_scale: Any = False,
    deferred_cost: Any = None,
    optimize: Any = None,
) -> Options:
    """Raise a `FoldError` unless the options have a meaning."""
    if not (isinstance(explicit_cost, Real) and 0 < float(explicit_cost) < math.inf):
        raise FoldError(f"explicit_cost: {explicit_cost!r} is not a positive number; try 2.0")
    is_set = isinstance(approximate, Collection) and not isinstance(approximate, (str, bytes))
    names = list(approximate) if is_set else [None]
    if not all(isinstance(name, str) and name in APPROXIMATIONS for name in names):
        raise FoldError(
            f'approximate: {approximate!r} is no set of names among {{"dropout"}}; pass '
            'approximate={"dropout"}, or leave it out'
        )
    for name, flag in (("fold_affine", fold_affine), ("defer_scale", defer_scale)):
        if not isinstance(flag, (bool, np.bool_)):
            raise FoldError(f"{name}: {flag!r} is not a bool; pass True or False")
    if deferred_cost is None:
        deferred_cost = DEFERRED_COST.get(jax.default_backend(), math.inf)
    elif not (isinstance(deferred_cost, Real) and float(deferred_cost) >= 0):  # NaN is not
        raise FoldError(
            f"deferred_cost: {deferred_cost!r} is no number from 0 on; pass None for that of the "
            "backend"
        )
    if optimize not in (None, "auto"):
        raise FoldError(f'optimize: {optimize!r} is not known; pass "auto" or None')
    preset: frozenset[str] = frozenset()
    if optimize == "auto":
        preset = PRESETS.get(jax.default_backend(), preset)
    return Options(
        float(explicit_cost),
        "dropout" in names,
        bool(fold_affine) or "fold_affine" in preset,
        float(deferred_cost) if defer_scale or "defer_scale" in preset else None,
    )
