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
    trace_like,
    varying_axes,
    with_bodies,
    with_call_jaxpr,
)
from .axes import AxisSet
from .center import center_array, group_means
from .graph import CallPath
from .placement import Placement

_KEEPS_ZERO = frozenset(
    "mul neg square broadcast_in_dim reshape squeeze transpose convert_element_type "
    "copy stop_gradient integer_pow reduce_sum sharding_constraint".split()
)


def rewrite(closed: ClosedJaxpr, placement: Placement) -> ClosedJaxpr:
    """The program of `closed` with the placement carried out."""
    rewriter = _Rewriter(placement)
    rewritten, _ = rewriter.closed(closed, (), set())
    if rewriter.centered != placement.explicit.keys():
        raise AssertionError("a centering found no place in the program, please report this")
    return rewritten


class _Rewriter:
    def __init__(self, placement: Placement) -> None:
        self.placement, self.graph = placement, placement.graph
        self.centered: set[int] = set()
        self.zero_sums = {
            op.index
            for norm, folded in zip(placement.norms, placement.folded, strict=True)
            if folded
            for op in norm.sums
        }
        value = {i: v for v, i in self.graph.leaves.items()}
        self.filled = {value[m.scale]: 1.0 for m in placement.affine}
        self.filled |= {value[m.shift]: 0.0 for m in placement.affine if m.shift is not None}

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

    def _literal(self, atom: Any, value: int) -> Any:
        if not isinstance(atom, Literal) or value not in self.placement.constants:
            return atom
        return Literal(self._constant(value, atom.val), atom.aval)

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
            if value is None or self.graph.home[value] != path or value in self.centered:
                return
            for spread in self.placement.explicit.get(value, ()):
                self.centered.add(value)
                along = self.graph.on_one_device(value, spread)
                assert along is not None
                centered = Var(var.aval)
                if along.trivial:
                    eqns.extend(_zero(centered))
                    zeros.add(centered)
                else:
                    eqns.append(_centering(read(var), along, centered))
                renamed[var] = centered

        for var in (*jaxpr.constvars, *jaxpr.invars):
            center(var)
            if not path and (number := self.filled.get(env[var])) is not None:
                known = renamed[var] = Var(var.aval)
                eqns += _filled(known, number)
                zeros.update({known} if number == 0 else ())
        for index, eqn in enumerate(jaxpr.eqns):
            invars, site = [read(a) for a in eqn.invars], (*path, index)
            if site in self.graph.op_at:
                pairs = zip(invars, self.graph.op_at[site].inputs, strict=True)
                invars = [self._literal(a, v) for a, v in pairs]
            if site in self.graph.op_at or site in self.graph.stand_ins:
                if self._is_zero(eqn, site, invars, zeros):
                    zeros.add(eqn.outvars[0])
                    eqns += _zero(eqn.outvars[0]) or [_reading(eqn, invars)]
                elif (keep := self._survivor(eqn, site, invars, zeros)) is not None:
                    renamed[eqn.outvars[0]] = keep
                else:
                    eqns.append(_reading(eqn, invars))
            elif (control := control_flow(eqn)) is not None:
                eqns.append(self._control(eqn, control, site, invars))
            else:
                new, zero_out = self._call(eqn, site, invars, zeros)
                eqns.append(new)
                zeros.update(eqn.outvars[i] for i in zero_out)
            for var in eqn.outvars:
                center(var)
        outvars = [read(a) for a in jaxpr.outvars]
        zero_out = _positions(outvars, zeros)
        if _same(eqns, jaxpr.eqns) and _same(outvars, jaxpr.outvars):
            return jaxpr, zero_out
        return jaxpr.replace(eqns=_live(eqns, outvars), outvars=outvars), zero_out

    def _call(
        self, eqn: JaxprEqn, site: CallPath, invars: list[Any], zeros: set[Var]
    ) -> tuple[JaxprEqn, set[int]]:
        inner = call_jaxpr(eqn)
        assert inner is not None
        body, zero_out = self.closed(inner, site, _positions(invars, zeros))
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

    def _is_zero(self, eqn: JaxprEqn, site: CallPath, invars: list[Any], zeros: set[Var]) -> bool:
        """Whether the result is proved zero, or made of what is."""
        hit = [isinstance(a, Var) and a in zeros for a in invars]
        if (stand_in := self.graph.stand_ins.get(site)) is not None:
            arrays = [h for h, a in zip(hit, eqn.invars, strict=True) if isinstance(a, Var)]
            _, zero_out = self.closed(stand_in, site, {i for i, h in enumerate(arrays) if h})
            return len(zero_out) == len(eqn.outvars) == 1
        op = self.graph.op_at[site]
        name = op.name
        if op.index in self.zero_sums:
            return True
        if name == "div":
            return hit[0] and self._is_finite(op.inputs[1]) and self.graph.scalar(op.inputs[1]) != 0
        if name in ("add", "sub"):
            return all(hit)
        if name == "mul":
            # 0 * c needs a finite c: another zero or a number in the program.
            pairs = zip(hit, op.inputs, strict=True)
            return any(hit) and all(h or self._is_finite(v) for h, v in pairs)
        if name == "integer_pow" and eqn.params["y"] <= 0:
            return False
        return name in _KEEPS_ZERO and any(hit)

    def _is_finite(self, value: int) -> bool:
        number = self.graph.scalar(value)
        return number is not None and bool(np.isfinite(number))

    def _survivor(self, eqn: JaxprEqn, site: CallPath, invars: list[Any], zeros: set[Var]) -> Any:
        """The operand that a sum with a zero comes down to, None if there is no such thing."""
        op, name = self.graph.op_at.get(site), eqn.primitive.name
        if name not in ("add", "sub") or (op is not None and op.name != name):
            return None
        hit = [isinstance(a, Var) and a in zeros for a in invars]
        if hit == [False, True]:
            keep = invars[0]
        elif hit == [True, False] and name == "add":
            keep = invars[1]
        else:
            return None
        # A renamed result must have the very type of the old one.
        return keep if isinstance(keep, Var) and keep.aval == eqn.outvars[0].aval else None


def _positions(atoms: Sequence[Any], zeros: set[Var]) -> set[int]:
    return {i for i, a in enumerate(atoms) if isinstance(a, Var) and a in zeros}


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

    (eqn,) = trace_like(jax.jit(explicit_centering), var.aval).eqns
    return eqn.replace(invars=[var], outvars=[result])


def _filled(var: Var, number: float) -> list[JaxprEqn]:
    """Equations that set `var`, which is no scalar, to a number."""
    (*before, last) = trace_like(lambda x: jnp.full_like(x, number), var.aval).eqns
    return [*before, last.replace(outvars=[var])]


def _zero(var: Var) -> list[JaxprEqn]:
    """Equations that set `var` to zero; none for a scalar that varies over devices."""
    aval: Any = var.aval
    if aval.shape:
        return _filled(var, 0)
    if varying_axes(aval):
        return []
    zero = jax.jit(lambda: jnp.zeros((), aval.dtype))
    (*before, last) = open_jaxpr(jax.make_jaxpr(zero)()).eqns
    return [*before, last.replace(outvars=[var])]


def _live(eqns: list[JaxprEqn], outvars: list[Any]) -> list[JaxprEqn]:
    """The equations that an output or an effect needs."""
    needed = {a for a in outvars if isinstance(a, Var)}
    kept = []
    for eqn in reversed(eqns):
        if eqn.effects or any(v in needed for v in eqn.outvars):
            needed.update(a for a in eqn.invars if isinstance(a, Var))
            kept.append(eqn)
    return kept[::-1]
