"""A program whose lookups in some leaves read copies of these, by substitution in its jaxpr.

Copies are inputs of their own. While a copy equals its leaf, it does not matter which of both an
equation reads, so every choice of reads is exact. Here all lookups read the copy, nothing else
does: so every trace of a function agrees on who reads what, whatever its shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

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
    has_effects,
    open_jaxpr,
    params_of_more,
    with_bodies,
    with_call_jaxpr,
)
from .primitives import MOVES

_PASSING = MOVES | frozenset("convert_element_type copy pcast pvary sharding_constraint".split())
"""Operations of one operand that a lookup may read in place of a leaf."""


def looked_up(closed: ClosedJaxpr) -> frozenset[int]:
    """The positions of the inputs that lookups read which could read copies."""
    return _Untying().looked_up(closed)


def with_copies(closed: ClosedJaxpr, positions: Sequence[int], at: int) -> ClosedJaxpr:
    """The program in which lookups read copies of the inputs at these positions.

    The copies are inputs, too, in this order, before the input that was at position `at`.
    """
    return _Untying().extended(closed, positions, at)


class _Body(NamedTuple):
    """A jaxpr in an equation, with the operands of the equation that are its first inputs."""

    jaxpr: Any
    operands: Sequence[int]
    key: tuple[str, int | None] | None = None


class _Untying:
    def __init__(self) -> None:
        self.known: dict[int, frozenset[int]] = {}

    def looked_up(self, closed: Any) -> frozenset[int]:
        """The positions of the inputs that lookups read, as they are or moved."""
        jaxpr = open_jaxpr(closed)
        if id(jaxpr) not in self.known:
            read: set[Any] = set()
            for eqn in reversed(jaxpr.eqns):
                read.update(eqn.invars[i] for i in self._reads(eqn, read) if _is_var(eqn, i))
            self.known[id(jaxpr)] = frozenset(i for i, v in enumerate(jaxpr.invars) if v in read)
        return self.known[id(jaxpr)]

    def _reads(self, eqn: JaxprEqn, read: set[Any]) -> Iterable[int]:
        """The operands that lookups behind an equation or inside of it read."""
        if _is_lookup(eqn) or (_passes(eqn) and eqn.outvars[0] in read):
            return (0,)
        inside = ((body.operands, self.looked_up(body.jaxpr)) for body in _bodies(eqn))
        return [i for operands, found in inside for k, i in enumerate(operands) if k in found]

    def extended(self, closed: Any, positions: Sequence[int], at: int) -> ClosedJaxpr:
        """A jaxpr that takes copies of the inputs at these positions, before that at `at`."""
        jaxpr = open_jaxpr(closed)
        copies = {jaxpr.invars[i]: Var(jaxpr.invars[i].aval) for i in positions}
        invars = [*jaxpr.invars[:at], *copies.values(), *jaxpr.invars[at:]]
        eqns = _Copies(copies, self._call).equations(jaxpr)
        return close(jaxpr.replace(invars=invars, eqns=eqns), consts_of(closed))

    def _call(self, eqn: JaxprEqn, copies: _Copies) -> JaxprEqn:
        """A call, loop or conditional that takes copies of what lookups in it read."""
        bodies = _bodies(eqn)
        reads = {i for i in self._reads(eqn, set()) if _is_var(eqn, i) and copies.has(eqn, i)}
        positions = sorted(reads)
        params = params_of_more(eqn, positions) if positions else None
        if params is None:
            return eqn
        at = bodies[-1].operands[-1] + 1
        taken = [copies.of(eqn.invars[i]) for i in positions]
        invars = [*eqn.invars[:at], *taken, *eqn.invars[at:]]
        new = {}
        for body in bodies:
            inner = [body.operands.index(i) for i in positions]
            new[body.key] = self.extended(body.jaxpr, inner, len(body.operands))
        made = eqn.replace(params=params, invars=invars)
        own = {key: body for key, body in new.items() if key is not None}
        params = with_bodies(made, own) if own else with_call_jaxpr(made, new[None])
        return made.replace(params=params)


class _Copies:
    """The copies that the equations of one jaxpr can read, moved like what they are copies of."""

    def __init__(self, copies: dict[Var, Var], call: Callable[..., JaxprEqn]) -> None:
        self.copies, self.call = dict(copies), call
        self.moves: dict[Var, JaxprEqn] = {}
        self.eqns: list[JaxprEqn] = []

    def equations(self, jaxpr: Jaxpr) -> list[JaxprEqn]:
        """The equations, lookups reading copies."""
        for eqn in jaxpr.eqns:
            if _passes(eqn) and self.has(eqn, 0):
                self.moves[eqn.outvars[0]] = eqn
            elif _is_lookup(eqn) and self.has(eqn, 0):
                eqn = eqn.replace(invars=[self.of(eqn.invars[0]), *eqn.invars[1:]])
            elif _bodies(eqn):
                eqn = self.call(eqn, self)
            self.eqns.append(eqn)
        return self.eqns

    def has(self, eqn: JaxprEqn, position: int) -> bool:
        """Whether there is a copy of an operand."""
        var = eqn.invars[position]
        return _is_var(eqn, position) and (var in self.copies or var in self.moves)

    def of(self, var: Any) -> Var:
        """The copy of a value, which is moved now if it has not been."""
        if var not in self.copies:
            eqn = self.moves[var]
            moved = Var(var.aval)
            self.eqns.append(eqn.replace(invars=[self.of(eqn.invars[0])], outvars=[moved]))
            self.copies[var] = moved
        return self.copies[var]


def _is_var(eqn: JaxprEqn, position: int) -> bool:
    return isinstance(eqn.invars[position], Var)


def _is_lookup(eqn: JaxprEqn) -> bool:
    """Whether it takes rows of its first operand at positions that are computed."""
    if eqn.primitive.name == "dynamic_slice":  # one row; several of them are a part of the table
        table: Any = eqn.invars[0].aval
        taken = zip(eqn.params["slice_sizes"], table.shape, strict=True)
        return any(n == 1 != size for n, size in taken)
    return eqn.primitive.name == "gather"


def _passes(eqn: JaxprEqn) -> bool:
    return eqn.primitive.name in _PASSING and len(eqn.invars) == 1


def _bodies(eqn: JaxprEqn) -> list[_Body]:
    """The jaxprs in an equation that copies can be passed to."""
    # A derivative rule is about the operands that there are; positions of effects are, too.
    if eqn.primitive.name in CUSTOM_RULES or has_effects(eqn):
        return []
    if (control := control_flow(eqn)) is not None:
        bodies = control.bodies[-1:] if control.is_loop else control.bodies
        return [_Body(b.jaxpr, b.operands, b.key) for b in bodies if b.operands]
    inner = call_jaxpr(eqn)
    return [] if inner is None else [_Body(inner, range(len(eqn.invars)))]
