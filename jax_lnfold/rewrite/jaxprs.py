"""Equations and jaxprs while they are rewritten."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .._compat import (
    JaxprEqn,
    Var,
)


def same(new: Sequence[Any], old: Sequence[Any]) -> bool:
    """Whether these are the very same objects."""
    return len(new) == len(old) and all(a is b for a, b in zip(new, old, strict=True))


def reading(eqn: JaxprEqn, invars: list[Any]) -> JaxprEqn:
    """The equation with other operands, itself if they are its own."""
    return eqn if same(invars, eqn.invars) else eqn.replace(invars=invars)


def live(eqns: list[JaxprEqn], outvars: list[Any]) -> list[JaxprEqn]:
    """The equations that an output or an effect needs."""
    needed = {a for a in outvars if isinstance(a, Var)}
    kept = []
    for eqn in reversed(eqns):
        if eqn.effects or any(v in needed for v in eqn.outvars):
            needed.update(a for a in eqn.invars if isinstance(a, Var))
            kept.append(eqn)
    return kept[::-1]
