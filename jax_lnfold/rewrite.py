"""The folded program: explicit centerings put in, removed means taken out.

The jaxpr is edited equation by equation and keeps its signature, so sharding, donation and
differentiation rules survive. A sum that is proved zero becomes a zero, and plain algebra
(``x - 0``, ``0 * c``, ``0 ** 2``) removes what depended on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._compat import (
    ClosedJaxpr,
    Control,
    Jaxpr,
    JaxprEqn,
    Literal,
    Var,
    call_jaxpr,
    close,
    consts_of,
    control_flow,
    open_jaxpr,
    with_bodies,
    with_call_jaxpr,
)
from .axes import AxisSet
from .center import center_array, group_means
from .graph import CallPath
from .placement import Placement

_KEEPS_ZERO = frozenset(
    "mul neg square broadcast_in_dim reshape squeeze expand_dims transpose convert_element_type "
    "copy stop_gradient integer_pow reduce_sum sharding_constraint".split()
)


def rewrite(closed: ClosedJaxpr, placement: Placement) -> ClosedJaxpr:
    """The program of `closed` with the placement carried out."""
    return _Rewriter(placement).closed(closed, (), set())[0]


class _Rewriter:
    def __init__(self, placement: Placement) -> None:
        self.placement, self.graph = placement, placement.graph
        self.zero_sums = {
            op.index
            for norm, folded in zip(placement.norms, placement.folded, strict=True)
            if folded
            for op in norm.sums
        }

    def closed(
        self, closed: ClosedJaxpr | Jaxpr, path: CallPath, zero_inputs: set[int]
    ) -> tuple[Any, set[int]]:
        """The rewritten jaxpr and the positions of its outputs that are zero.

        Where nothing changes it is the very same jaxpr.
        """
        jaxpr = open_jaxpr(closed)
        env = self.graph.env[path]
        body, zeros = self._body(jaxpr, path, zero_inputs)
        old = consts_of(closed)
        consts = [self._constant(env[v], c) for v, c in zip(jaxpr.constvars, old, strict=True)]
        if body is jaxpr and all(a is b for a, b in zip(consts, old, strict=True)):
            return closed, zeros
        return close(body, consts), zeros

    def _constant(self, value: int, const: Any) -> Any:
        for along in self.placement.constants.get(value, ()):
            const = center_array(np.asarray(const), along)
        return const

    def _body(self, jaxpr: Jaxpr, path: CallPath, zero_inputs: set[int]) -> tuple[Jaxpr, set[int]]:
        env = self.graph.env[path]
        renamed: dict[Var, Any] = {}
        zeros: set[Var] = {jaxpr.invars[i] for i in zero_inputs}
        eqns: list[JaxprEqn] = []

        def read(atom: Any) -> Any:
            while isinstance(atom, Var) and atom in renamed:
                atom = renamed[atom]
            return atom

        def center(var: Var) -> None:
            """Center a value right where it appears, for all its readers."""
            value = env.get(var)
            if value is None or self.graph.home[value] != path:
                return
            for along in self.placement.explicit.get(value, ()):
                centered = Var(var.aval)
                if along.trivial:
                    eqns.append(_zero(centered))
                    zeros.add(centered)
                else:
                    eqns.append(_centering(read(var), along, centered))
                renamed[var] = centered

        for var in (*jaxpr.constvars, *jaxpr.invars):
            center(var)
        for index, eqn in enumerate(jaxpr.eqns):
            invars = [read(a) for a in eqn.invars]
            inner, control = call_jaxpr(eqn), control_flow(eqn)
            if control is not None:
                eqns.append(self._control(eqn, control, (*path, index), invars))
                for var in eqn.outvars:
                    center(var)
                continue
            if inner is not None:
                zero_in = {i for i, a in enumerate(invars) if isinstance(a, Var) and a in zeros}
                new, zero_out = self._call(eqn, inner, (*path, index), invars, zero_in)
                eqns.append(new)
                zeros.update(eqn.outvars[i] for i in zero_out)
                continue
            op = self.graph.op_at[path, index]
            keep = self._survivor(eqn, invars, zeros)
            if op.index in self.zero_sums or self._stays_zero(eqn, invars, zeros):
                zeros.add(eqn.outvars[0])
                eqns.append(_zero(eqn.outvars[0]))
            elif keep is not None:
                renamed[eqn.outvars[0]] = keep
            else:
                eqns.append(_reading(eqn, invars))
            for var in eqn.outvars:
                center(var)
        outvars = [read(a) for a in jaxpr.outvars]
        zero_out = {i for i, a in enumerate(outvars) if isinstance(a, Var) and a in zeros}
        if _same(eqns, jaxpr.eqns) and _same(outvars, jaxpr.outvars):
            return jaxpr, zero_out
        return jaxpr.replace(eqns=_live(eqns, outvars), outvars=outvars), zero_out

    def _call(
        self,
        eqn: JaxprEqn,
        inner: ClosedJaxpr | Jaxpr,
        path: CallPath,
        invars: list[Any],
        zero_in: set[int],
    ) -> tuple[JaxprEqn, set[int]]:
        body, zero_out = self.closed(inner, path, zero_in)
        if body is inner:
            return _reading(eqn, invars), zero_out
        return eqn.replace(params=with_call_jaxpr(eqn, body), invars=invars), zero_out

    def _control(
        self, eqn: JaxprEqn, control: Control, site: CallPath, invars: list[Any]
    ) -> JaxprEqn:
        bodies = {}
        for number, body in enumerate(control.bodies):
            new, _ = self.closed(body.jaxpr, (*site, number), set())
            if new is not body.jaxpr:
                bodies[body.key] = new
        if not bodies:
            return _reading(eqn, invars)
        return eqn.replace(params=with_bodies(eqn, bodies), invars=invars)

    def _stays_zero(self, eqn: JaxprEqn, invars: list[Any], zeros: set[Var]) -> bool:
        hit = [isinstance(a, Var) and a in zeros for a in invars]
        name = eqn.primitive.name
        if name == "div":
            return hit[0] and _is_finite(invars[1]) and invars[1].val != 0
        if name in ("add", "sub"):
            return all(hit)
        if name == "mul":
            # 0 * c needs a finite c: another zero or a number in the program.
            return any(hit) and all(h or _is_finite(a) for h, a in zip(hit, invars, strict=True))
        if name == "integer_pow" and eqn.params["y"] <= 0:
            return False
        return name in _KEEPS_ZERO and any(hit)

    def _survivor(self, eqn: JaxprEqn, invars: list[Any], zeros: set[Var]) -> Any:
        """The operand that a sum with a zero comes down to, None if there is no such thing."""
        if eqn.primitive.name not in ("add", "sub"):
            return None
        hit = [isinstance(a, Var) and a in zeros for a in invars]
        if hit == [False, True]:
            keep = invars[0]
        elif hit == [True, False] and eqn.primitive.name == "add":
            keep = invars[1]
        else:
            return None
        # A renamed result must have the very type of the old one.
        return keep if isinstance(keep, Var) and keep.aval == eqn.outvars[0].aval else None


def _is_finite(atom: Any) -> bool:
    return isinstance(atom, Literal) and bool(np.all(np.isfinite(atom.val)))


def _same(new: Sequence[Any], old: Sequence[Any]) -> bool:
    return len(new) == len(old) and all(a is b for a, b in zip(new, old, strict=True))


def _reading(eqn: JaxprEqn, invars: list[Any]) -> JaxprEqn:
    """The equation with other operands, itself if they are its own."""
    return eqn if _same(invars, eqn.invars) else eqn.replace(invars=invars)


def _centering(var: Var, along: AxisSet, result: Var) -> JaxprEqn:
    """``result = C_S var``: a call to a function of its own name.

    One mean in float32 or wider, what a LayerNorm would pay itself.
    """

    def explicit_centering(x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return (wide - group_means(wide, along, jnp)).astype(x.dtype)

    aval: Any = var.aval
    like = jax.ShapeDtypeStruct(aval.shape, aval.dtype)
    (eqn,) = open_jaxpr(jax.make_jaxpr(jax.jit(explicit_centering))(like)).eqns
    return eqn.replace(invars=[var], outvars=[result])


def _zero(var: Var) -> JaxprEqn:
    """An equation that sets `var` to zero."""
    aval: Any = var.aval
    zeros = jax.jit(lambda: jnp.zeros(aval.shape, aval.dtype))
    (eqn,) = open_jaxpr(jax.make_jaxpr(zeros)()).eqns
    if aval.shape:
        (eqn,) = open_jaxpr(eqn.params["jaxpr"]).eqns
    return eqn.replace(outvars=[var])


def _live(eqns: list[JaxprEqn], outvars: list[Any]) -> list[JaxprEqn]:
    """The equations that an output or an effect needs."""
    needed = {a for a in outvars if isinstance(a, Var)}
    kept = []
    for eqn in reversed(eqns):
        if eqn.effects or any(v in needed for v in eqn.outvars):
            needed.update(a for a in eqn.invars if isinstance(a, Var))
            kept.append(eqn)
    return kept[::-1]
