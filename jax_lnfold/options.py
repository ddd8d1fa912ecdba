"""What a caller of `fold` may choose."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from numbers import Real
from typing import Any, NamedTuple

import jax
import numpy as np

from .errors import FoldError

APPROXIMATIONS = frozenset({"dropout", "mean"})
"""What may be approximated on request."""


DEFERRED_COST = {"cpu": 0.1, "gpu": 1.0, "tpu": 0.05}
"""What it costs to scale an element of a result, by platform: see `bench/README.md`."""
SPELLINGS = {"tpu": "one_pass", "gpu": "two_pass"}
"""How a LayerNorm that keeps its mean is spelled best, by platform; elsewhere it stays."""
PRESETS = {
    "tpu": frozenset({"fold_affine", "matrix_unit", "respell"}),
    "gpu": frozenset({"fold_affine", "respell"}),
    "cpu": frozenset({"fold_affine", "defer_scale"}),
}
"""What `optimize` turns on, by platform: what was measured to pay (`bench/README.md`)."""
MOST_PRODUCTS = {"cpu": 512}
"""Where a preset turns that on only for norms whose products outweigh them by no more than that:
so many numbers of its results may read each number of a norm, or it is left alone."""


class Values(NamedTuple):
    """What the numbers of a leaf are: equal along the `constant` axes, all zero; their `mean`."""

    constant: frozenset[int]
    zero: bool
    mean: float


@dataclass(frozen=True, slots=True)
class Options:
    """The checked options of a fold, see `fold`.

    `deferred_cost` is None if nothing is deferred, `excludes` if no key path is excluded. With
    `only_leaves` the program stays as it is: LayerNorms fold if edited parameters alone allow it.
    With `reduce_means` parameters are centered for LayerNorms that keep their mean, too.
    With `untie`, lookups may read copies of leaves. With `drop_means`, LayerNorms may do without a
    mean that is not zero, if a plan says which. With `matrix_unit`, statistics are products.
    `respell` is the spelling of LayerNorms that keep their mean, empty if they stay as they are.
    `affine_most` and `deferred_most` are the most multiplications, by the products behind it, of a
    number whose scale is taken up, or deferred.
    With `assume_values`, leaves may be taken to stay what their `values` are, by key path; None is
    what nobody here can see.
    """

    explicit_cost: float
    see_through_dropout: bool
    fold_affine: bool
    deferred_cost: float | None
    excludes: Callable[[str], bool] | None = None
    only_leaves: bool = False
    reduce_means: bool = False
    untie: bool = False
    drop_means: bool = False
    matrix_unit: bool = False
    respell: str = ""
    assume_values: bool = False
    values: Mapping[str, Values | None] = field(default_factory=dict)
    affine_most: float = math.inf
    deferred_most: float = math.inf


def check_options(
    explicit_cost: Any,
    approximate: Any,
    fold_affine: Any,
    defer_scale: Any = False,
    deferred_cost: Any = None,
    optimize: Any = None,
    exclude: Any = (),
    reduce_means: Any = False,
    untie: Any = False,
    matrix_unit: Any = False,
    assume_values: Any = False,
    respell: Any = False,
) -> Options:
    """The options; raises a `FoldError` unless they have a meaning."""
    cost = _positive(explicit_cost)
    approximations = _approximations(approximate)
    _require_bool("fold_affine", fold_affine)
    _require_bool("defer_scale", defer_scale)
    _require_bool("reduce_means", reduce_means)
    _require_bool("untie", untie)
    _require_bool("matrix_unit", matrix_unit)
    _require_bool("assume_values", assume_values)
    platform = _platform(optimize)
    target = platform or jax.default_backend()
    deferred = _deferred_cost(deferred_cost, target)
    preset, most = PRESETS.get(platform, frozenset()), MOST_PRODUCTS.get(platform, math.inf)
    return Options(
        cost,
        "dropout" in approximations,
        bool(fold_affine) or "fold_affine" in preset,
        deferred if defer_scale or "defer_scale" in preset else None,
        _excluding(exclude),
        reduce_means=bool(reduce_means),
        untie=bool(untie),
        drop_means="mean" in approximations,
        matrix_unit=bool(matrix_unit) or "matrix_unit" in preset,
        respell=_spelling(respell, target, "respell" in preset),
        assume_values=bool(assume_values),
        affine_most=math.inf if fold_affine else most,
        deferred_most=math.inf if defer_scale else most,
    )


def _excluding(exclude: Any) -> Callable[[str], bool] | None:
    """Whether a key path is excluded; None if none is."""
    if callable(exclude):
        return partial(_asked, exclude)
    is_set = isinstance(exclude, Collection) and not isinstance(exclude, (str, bytes))
    if not is_set or not all(isinstance(path, str) for path in exclude):
        raise FoldError(
            f"exclude: {exclude!r} is no set of key paths, and no function of one; pass "
            'exclude={"params/embed/embedding"}, or a function such as lambda path: "lora" in path'
        )
    return frozenset(exclude).__contains__ if exclude else None


def _asked(exclude: Callable[[str], Any], path: str) -> bool:
    try:
        return bool(exclude(path))
    except Exception as error:
        raise FoldError(
            f"exclude: failed for the key path {path!r} ({type(error).__name__}: {error}); pass a "
            "function that says of a key path, which is text, whether that leaf must stay"
        ) from error


def check_excluded(exclude: Any, paths: Iterable[str]) -> None:
    """Raise a `FoldError` if a key path that is excluded is not in the tree."""
    unknown = [] if callable(exclude) else sorted({*exclude} - {*paths})
    if unknown:
        raise FoldError(
            f"exclude: no leaf of params has the key path {unknown[0]!r}; pass key paths as a "
            "report or plan shows them"
        )


def is_positive(x: Any) -> bool:
    """Whether it is a positive number that is finite as a float."""
    try:
        return isinstance(x, Real) and 0 < float(x) < math.inf  # NaN is not
    except OverflowError:  # a whole number of hundreds of digits
        return False


def _positive(explicit_cost: Any) -> float:
    if not is_positive(explicit_cost):
        raise FoldError(f"explicit_cost: {explicit_cost!r} is not a positive number; try 2.0")
    return float(explicit_cost)


def _approximations(approximate: Any) -> list[Any]:
    is_set = isinstance(approximate, Collection) and not isinstance(approximate, (str, bytes))
    names = list(approximate) if is_set else [None]
    if not all(isinstance(name, str) and name in APPROXIMATIONS for name in names):
        raise FoldError(
            f'approximate: {approximate!r} is no set of names among {{"dropout", "mean"}}; pass '
            'approximate={"dropout"}, say, or leave it out'
        )
    return names


def _require_bool(name: str, flag: Any) -> None:
    if not isinstance(flag, (bool, np.bool_)):
        raise FoldError(f"{name}: {flag!r} is not a bool; pass True or False")


def _deferred_cost(cost: Any, platform: str) -> float:
    """The cost that was passed, or that of the platform."""
    if cost is None:
        return DEFERRED_COST.get(platform, math.inf)
    if not (is_positive(cost) or (isinstance(cost, Real) and cost in (0, math.inf))):
        raise FoldError(
            f"deferred_cost: {cost!r} is no number from 0 on; pass None for that of the backend"
        )
    return float(cost)


def _spelling(respell: Any, platform: str, preset: bool) -> str:
    """The one that was passed, or that of the platform; empty for none."""
    if isinstance(respell, str) and respell in SPELLINGS.values():
        return respell
    if not isinstance(respell, (bool, np.bool_)):
        raise FoldError(
            f'respell: {respell!r} is no bool and no spelling; pass True, "one_pass" or "two_pass"'
        )
    return SPELLINGS.get(platform, "") if respell or preset else ""


def _platform(optimize: Any) -> str:
    """The platform to choose options for, empty for none."""
    if optimize is None:
        return ""
    if optimize == "auto":
        return jax.default_backend()
    if not isinstance(optimize, str) or optimize not in DEFERRED_COST:
        names = ", ".join(f'"{name}"' for name in DEFERRED_COST)
        raise FoldError(f'optimize: {optimize!r} is not known; pass "auto", {names} or None')
    return optimize
