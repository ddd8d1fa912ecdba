"""Sums over devices that travel in one array, taken apart: ``psum(stack(a, b))[0] = psum(a)``.

Flax's one-pass norms send both of their sums so. Apart, the one that folding makes zero need not
be sent; what remains is sent together by compilers, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .._compat import (
    CUSTOM_RULES,
    ClosedJaxpr,
    Jaxpr,
    JaxprEqn,
    Var,
    call_jaxpr,
    close,
    consts_of,
    control_flow,
    open_jaxpr,
    varying_axes,
    with_bodies,
    with_call_jaxpr,
)
from .primitives import MUL, SCALINGS

_SUMS = frozenset({"psum", "psum_invariant"})


def taken_apart(closed: ClosedJaxpr) -> ClosedJaxpr:
    """The program with such sums apart; the very same one where there are none."""
    return _Splitter().closed(closed)


class _Splitter:
    def __init__(self) -> None:
        self.done: dict[int, tuple[Any, Any]] = {}  # functions called twice stay one

    def closed(self, closed: Any) -> Any:
        if id(closed) not in self.done:
            jaxpr = open_jaxpr(closed)
            body = self._body(jaxpr)
            new = closed if body is jaxpr else close(body, consts_of(closed))
            self.done[id(closed)] = closed, new
        return self.done[id(closed)][1]

    def _body(self, jaxpr: Jaxpr) -> Jaxpr:
        eqns = [self._inside(eqn) for eqn in jaxpr.eqns]
        stacks = [eqn for eqn in eqns if eqn.primitive.name == "stack"]
        readers: dict[Any, list[Any]] = {}
        for reader in (*eqns, jaxpr) if stacks else ():
            atoms = reader.outvars if reader is jaxpr else reader.invars
            for atom in atoms:
                if isinstance(atom, Var):
                    readers.setdefault(atom, []).append(reader)
        for stack in stacks:
            eqns = _apart(eqns, stack, readers) or eqns
        unchanged = all(a is b for a, b in zip(eqns, jaxpr.eqns, strict=False))
        return jaxpr if unchanged and len(eqns) == len(jaxpr.eqns) else jaxpr.replace(eqns=eqns)

    def _inside(self, eqn: JaxprEqn) -> JaxprEqn:
        """The equation with the sums in its own jaxprs taken apart."""
        if (control := control_flow(eqn)) is not None:
            new = {body.key: self.closed(body.jaxpr) for body in control.bodies}
            changed = any(new[body.key] is not body.jaxpr for body in control.bodies)
            return eqn.replace(params=with_bodies(eqn, new)) if changed else eqn
        inner = call_jaxpr(eqn)
        if inner is None or eqn.primitive.name in CUSTOM_RULES:
            return eqn
        body = self.closed(inner)
        return eqn if body is inner else eqn.replace(params=with_call_jaxpr(eqn, body))


def _apart(
    eqns: Sequence[JaxprEqn], stack: JaxprEqn, readers: dict[Any, list[Any]]
) -> list[JaxprEqn] | None:
    """The equations with one stack taken apart, None if it does not come to sums of its parts."""
    steps = _steps(stack, readers)
    (whole,) = (steps or [stack])[-1].outvars
    firsts = readers.get(whole, [])
    layers = [_layers(first, stack.params["axis"], readers) for first in firsts]
    if not _sum_parts(steps, [parts for _, parts in layers]):
        return None
    gone = {id(eqn) for eqn in (stack, *steps, *firsts)}
    var = stack.outvars[0]
    instead = {
        id(last): [eqn for i, end in parts for eqn in _on_part(steps, var, stack.invars[i], end)]
        for last, parts in layers
    }
    kept = (instead.get(id(eqn), [] if id(eqn) in gone else [eqn]) for eqn in eqns)
    return [eqn for group in kept for eqn in group]


def _steps(stack: JaxprEqn, readers: dict[Any, list[Any]]) -> list[JaxprEqn]:
    """What is done to all of the stack, one after the other: sums over devices and scalings."""
    (var,), steps = stack.outvars, list[JaxprEqn]()
    while (step := _only(readers, var)) is not None and _is_step(step, var):
        steps.append(step)
        (var,) = step.outvars
    return steps


def _sum_parts(steps: Sequence[JaxprEqn], layers: Sequence[list[tuple[int, Var]]]) -> bool:
    """Whether the steps sum, and nothing but single layers of their result is read, each once."""
    parts = [part for some in layers for part in some]
    sums = any(step.primitive.name in _SUMS for step in steps)
    alone = all(layers) and len({i for i, _ in parts}) == len(parts) > 0
    # Else the steps on a part would make other types than those on the stack.
    alike = all(_kind(step.outvars[0]) == _kind(end) for step in steps for _, end in parts)
    return sums and alone and alike


def _on_part(steps: Sequence[JaxprEqn], var: Var, part: Any, end: Var) -> list[JaxprEqn]:
    """The steps from the stack `var`, on one of its parts, the last one with the result `end`."""
    eqns = []
    for step in steps:
        result = end if step is steps[-1] else Var(end.aval)
        invars = [part if atom is var else atom for atom in step.invars]
        eqns.append(step.replace(invars=invars, outvars=[result]))
        (var,), part = step.outvars, result
    return eqns


def _only(readers: dict[Any, list[Any]], var: Any) -> JaxprEqn | None:
    """The equation that alone reads a variable, if there is one."""
    found = readers.get(var, ())
    return found[0] if len(found) == 1 and not isinstance(found[0], Jaxpr) else None


def _is_step(eqn: JaxprEqn, var: Any) -> bool:
    """Whether it sums the stack `var` over devices, or scales all of it by one number."""
    others = [atom for atom in eqn.invars if atom is not var]
    if eqn.primitive.name in _SUMS:
        return not others
    scalars = all(not getattr(atom.aval, "shape", ()) for atom in others)
    first = eqn.primitive.name == MUL or eqn.invars[0] is var
    return eqn.primitive.name in SCALINGS and len(others) == 1 and scalars and first


def _layers(
    eqn: Any, axis: int, readers: dict[Any, list[Any]]
) -> tuple[Any, list[tuple[int, Var]]]:
    """The equation that makes single layers along `axis`, beginning with `eqn`, and these layers.

    There are none if it does something else.
    """
    if isinstance(eqn, Jaxpr):
        return eqn, []
    if eqn.primitive.name == "unstack" and eqn.params["axis"] == axis:
        return eqn, [*enumerate(eqn.outvars)]
    squeeze = _only(readers, eqn.outvars[0]) if eqn.primitive.name == "slice" else None
    if squeeze is None or squeeze.primitive.name != "squeeze":
        return eqn, []
    starts, stops = eqn.params["start_indices"], eqn.params["limit_indices"]
    want = [(0, n) for n in eqn.invars[0].aval.shape]
    want[axis] = (starts[axis], starts[axis] + 1)
    whole = [*zip(starts, stops, strict=True)] == want and set(eqn.params["strides"] or {1}) == {1}
    alone = tuple(squeeze.params["dimensions"]) == (axis,)
    return squeeze, [(starts[axis], squeeze.outvars[0])] if whole and alone else []


def _kind(var: Any) -> tuple[Any, tuple[str, ...]]:
    return var.aval.dtype, varying_axes(var.aval)
