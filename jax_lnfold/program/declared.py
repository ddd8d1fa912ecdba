"""Calls of functions that somebody declared to be LayerNorms: one equation each.

The equation holds three programs of the same operands: what it computes, the same for values that
are zero-mean already, and a plain one that says what it means. Every one is batched with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from .._compat import (
    ClosedJaxpr,
    JaxprEqn,
    call_primitive,
    jaxpr_as_fun,
    opaque_primitive,
    outside_of_meshes,
)


@dataclass(frozen=True, eq=False)
class DeclaredCall:
    """One call as it was made, before any `vmap`, traced on types of no mesh.

    `program` is what is called, `twin` what computes the same where the norm is given no mean, and
    `reference` a plain program for both; `measurable` if that can be computed and compared, and
    `scale_free` if it leaves an epsilon out. `owner` and `key` tell which calls are alike.
    """

    name: str
    program: ClosedJaxpr
    twin: ClosedJaxpr
    reference: ClosedJaxpr
    measurable: bool
    scale_free: bool
    tolerance: float | None
    owner: Any
    key: Any

    def __repr__(self) -> str:
        """Its name, as in a jaxpr that is printed."""
        return self.name


def _batched(
    operands: Sequence[Any], axes: Sequence[Any], params: dict[str, Any]
) -> tuple[list[Any], list[int]]:
    """The call for many samples: its programs, each for many samples."""
    plain = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands]
    made = {name: _vmapped(params[name], axes, operands) for name in ("program", "twin")}
    with outside_of_meshes():
        made["reference"] = _vmapped(params["reference"], axes, plain)
    results = _CALL.bind(*operands, **{**params, **made})
    return results, [0] * len(results)


def _vmapped(
    closed: ClosedJaxpr | None, axes: Sequence[Any], operands: Sequence[Any]
) -> ClosedJaxpr | None:
    if closed is None:
        return None
    return jax.make_jaxpr(jax.vmap(jaxpr_as_fun(closed), in_axes=tuple(axes)))(*operands)


_CALL = call_primitive("declared_layer_norm", "program", _batched)
AFTER_NORM = opaque_primitive("after_declared_norm")
"""What a reference does behind the norm, where nobody said."""


def call_declared(
    call: DeclaredCall, program: ClosedJaxpr, twin: ClosedJaxpr, operands: Sequence[Any]
) -> list[Any]:
    """The call in a trace; both programs are traced where it stands."""
    return _CALL.bind(*operands, program=program, twin=twin, reference=call.reference, call=call)


def declared_call(eqn: JaxprEqn) -> DeclaredCall | None:
    """The call that an equation is, None if it is something else."""
    return eqn.params["call"] if eqn.primitive is _CALL else None


def meaning(eqn: JaxprEqn) -> ClosedJaxpr | None:
    """The plain program that an equation computes, None where there is none to look into."""
    return eqn.params["reference"] if eqn.primitive is _CALL else None


def of_zero_mean(eqn: JaxprEqn) -> JaxprEqn:
    """The call with the twin in its place, which has no mean to take."""
    params = {**eqn.params, "program": eqn.params["twin"], "twin": None, "reference": None}
    return eqn.replace(params=params)
