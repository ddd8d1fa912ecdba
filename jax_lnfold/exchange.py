"""Sums over devices that travel in one array, taken apart: ``psum(stack(a, b))[0] = psum(a)``.

Flax's one-pass norms send both of their sums so. Apart, the one that folding makes zero need not
be sent; what remains is sent together by compilers, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ._compat import (
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

_SUMS = frozenset({"psum", "psum_invariant"})
_SCALINGS = frozenset({"div", "mul"})


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
    (var,), steps = stack.outvars, list[JaxprEqn]()
    while (step := _only(readers, var)) is not None and _is_step(step, var):
        steps.append(step)
        (var,) = step.outvars
    axis, taken = stack.params["axis"], dict[int, tuple[JaxprEqn, JaxprEqn]]()
    for layer in readers.get(var, ()):
        position = _layer(layer, axis)
        squeeze = None if position is None else _only(readers, layer.outvars[0])
        if position is None or position in taken or squeeze is None:
            return None
        if squeeze.primitive.name != "squeeze" or tuple(squeeze.params["dimensions"]) != (axis,):
            return None
        taken[position] = layer, squeeze
    ends = [squeeze.outvars[0] for _, squeeze in taken.values()]
    if not any(step.primitive.name in _SUMS for step in steps) or not ends:
        return None
    if any(_kind(step.outvars[0]) != _kind(end) for step in steps for end in ends):
        return None  # the parts would have other types
    instead = {
        id(squeeze): _on_part(steps, stack.outvars[0], stack.invars[i], squeeze.outvars[0])
        for i, (_, squeeze) in taken.items()
    }
    gone = {id(eqn) for eqn in (stack, *steps, *(layer for layer, _ in taken.values()))}
    return [new for eqn in eqns if id(eqn) not in gone for new in instead.get(id(eqn), [eqn])]


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
    first = eqn.primitive.name == "mul" or eqn.invars[0] is var
    return eqn.primitive.name in _SCALINGS and len(others) == 1 and scalars and first


def _layer(eqn: Any, axis: int) -> int | None:
    """Which single layer along `axis` an equation takes whole, None if it does something else."""
    if isinstance(eqn, Jaxpr) or eqn.primitive.name != "slice":
        return None
    starts, stops = eqn.params["start_indices"], eqn.params["limit_indices"]
    shape = eqn.invars[0].aval.shape
    want = [(0, n) for n in shape]
    want[axis] = (starts[axis], starts[axis] + 1)
    return starts[axis] if [*zip(starts, stops, strict=True)] == want else None


def _kind(var: Any) -> tuple[Any, tuple[str, ...]]:
    return var.aval.dtype, varying_axes(var.aval)
