"""What a caller of `fold` may choose."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np

from .errors import FoldError

APPROXIMATIONS = frozenset({"dropout"})
"""What may be approximated on request."""


@dataclass(frozen=True, slots=True)
class Options:
    """The checked options of a fold, see `fold`."""

    explicit_cost: float
    see_through_dropout: bool
    fold_affine: bool


def check_options(explicit_cost: Any, approximate: Any, fold_affine: Any) -> Options:
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
    if not isinstance(fold_affine, (bool, np.bool_)):
        raise FoldError(f"fold_affine: {fold_affine!r} is not a bool; pass True or False")
    return Options(float(explicit_cost), "dropout" in names, bool(fold_affine))
