"""Calls of jitted functions written out, so that what stands on both sides can be seen together.

The compiler does the same with every such call. Left as they are: calls with shardings, donation
or options of their own, and those around nothing that matters here.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from .._compat import (
    ClosedJaxpr,
    Jaxpr,
    JaxprEqn,
    Literal,
    Var,
    close,
    consts_of,
    is_plain_call,
    open_jaxpr,
)


def inlined(closed: ClosedJaxpr, around: Collection[str]) -> ClosedJaxpr:
    """The jaxpr with its calls around equations of these primitives written out, all levels."""
    jaxpr = open_jaxpr(closed)
    eqns: list[JaxprEqn] = []
    renamed: dict[Var, Any] = {}
    _write_out(jaxpr, renamed, eqns, around, {}, fresh=False)
    if not renamed:
        return closed
    outvars = [_read(a, renamed) for a in jaxpr.outvars]
    return close(jaxpr.replace(eqns=eqns, outvars=outvars), consts_of(closed))


def _write_out(
    jaxpr: Jaxpr,
    renamed: dict[Var, Any],
    eqns: list[JaxprEqn],
    around: Collection[str],
    matters: dict[int, bool],
    fresh: bool,
) -> None:
    """Add the equations of a jaxpr; `renamed` holds the names that its inputs have outside.

    One function may be called twice: with `fresh`, its variables get new names.
    """
    for eqn in jaxpr.eqns:
        invars = [_read(a, renamed) for a in eqn.invars]
        inner = eqn.params.get("jaxpr")
        if inner is not None and is_plain_call(eqn) and _matters(inner, around, matters):
            body = open_jaxpr(inner)
            within = dict(zip(body.invars, invars, strict=True))
            _write_out(body, within, eqns, around, matters, fresh=True)
            renamed |= dict(zip(eqn.outvars, (_read(a, within) for a in body.outvars), strict=True))
        else:
            outvars = [Var(v.aval) for v in eqn.outvars] if fresh else eqn.outvars
            renamed |= dict(zip(eqn.outvars, outvars, strict=True)) if fresh else {}
            eqns.append(eqn.replace(invars=invars, outvars=outvars) if renamed else eqn)


def _matters(closed: Any, around: Collection[str], known: dict[int, bool]) -> bool:
    if id(closed) not in known:
        known[id(closed)] = not consts_of(closed) and any(
            eqn.primitive.name in around
            or (is_plain_call(eqn) and _matters(eqn.params["jaxpr"], around, known))
            for eqn in open_jaxpr(closed).eqns
        )
    return known[id(closed)]


def _read(atom: Any, renamed: dict[Var, Any]) -> Any:
    return atom if isinstance(atom, Literal) else renamed.get(atom, atom)
