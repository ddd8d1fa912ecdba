"""The folded program: explicit centerings put in, removed means taken out.

The jaxpr is edited equation by equation and keeps its signature, so sharding, donation and
differentiation rules survive. A sum that is proved zero becomes a zero, a scale that was taken up a
one, and plain algebra (``x - 0``, ``0 * c``, ``0 ** 2``, ``x * 1``) removes what depended on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._compat import (
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
from ..axes.axis_set import AxisSet
from ..centering import group_means, widened
from ..errors import Bug
from ..placement.place import Placement
from ..plan.leaf import center_array
from ..program.graph import CallPath
from ..program.primitives import DIV, MOVES, MUL
from .jaxprs import live, reading, same

_KEEPS_NUMBERS = MOVES | frozenset(
    "convert_element_type copy stop_gradient sharding_constraint".split()
)
_KEEPS_ZERO = frozenset("neg square integer_pow reduce_sum".split())

_NEUTRAL = {"add": 0, "sub": 0, MUL: 1, DIV: 1}

Known = dict[Var, float]
"""Values of a jaxpr all of whose elements are known to be 0, or all to be 1."""
Numbers = list[float | None]
"""The number that all elements of an operand are, if it is known."""


def rewrite(closed: ClosedJaxpr, placement: Placement) -> ClosedJaxpr:
    """The program of `closed` with the placement carried out."""
    rewriter = _Rewriter(placement)
    rewritten, _ = rewriter.closed(closed, (), {})
    if rewriter.centered != placement.explicit.keys():
        raise Bug("apply_fn: a centering found no place in the program")
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
        value = {path: v for v, path in self.graph.leaves.items()}
        changes = (c for edits in placement.found.values() for e in edits for c in e.changes())
        fills = ((value[path], change.recipe.fill) for path, change in changes)
        self.filled = {leaf: number for leaf, number in fills if number is not None}

    def closed(
        self, closed: ClosedJaxpr | Jaxpr, path: CallPath, inputs: Mapping[int, float]
    ) -> tuple[Any, dict[int, float]]:
        """The rewritten jaxpr and the outputs, by position, whose numbers are known.

        Where nothing changes it is the very same jaxpr.
        """
        jaxpr = open_jaxpr(closed)
        env = self.graph.env[path]
        body, outputs = self._body(jaxpr, path, inputs)
        old = consts_of(closed)
        consts = [self._edited(env[v], c) for v, c in zip(jaxpr.constvars, old, strict=True)]
        if body is jaxpr and all(a is b for a, b in zip(consts, old, strict=True)):
            return closed, outputs
        return close(body, consts), outputs

    def _edited(self, value: int, const: Any) -> Any:
        for along in self.placement.constants.get(value, ()):
            const = center_array(np.asarray(const), along)
        return const

    def _literal(self, atom: Any, value: int) -> Any:
        if not isinstance(atom, Literal) or value not in self.placement.constants:
            return atom
        return Literal(self._edited(value, atom.val), atom.aval)

    def _body(
        self, jaxpr: Jaxpr, path: CallPath, inputs: Mapping[int, float]
    ) -> tuple[Jaxpr, dict[int, float]]:
        env = self.graph.env[path]
        renamed: dict[Var, Any] = {}
        returned: dict[int, Any] = {}  # values that outputs see as they were
        known: Known = {jaxpr.invars[i]: number for i, number in inputs.items()}
        eqns: list[JaxprEqn] = []

        def read(atom: Any) -> Any:
            while isinstance(atom, Var) and atom in renamed:
                atom = renamed[atom]
            return atom

        def center(var: Var) -> None:
            """Center a value right where it appears, for all equations that read it."""
            value = env.get(var)
            if value is None or value in self.centered or self.graph.centered_at(value) != path:
                return
            if value in self.graph.outputs:
                returned[value] = read(var)
            for spread in self.placement.explicit.get(value, ()):
                self.centered.add(value)
                along = self.graph.on_one_device(value, spread)
                assert along is not None
                centered = Var(var.aval)
                if along.trivial:
                    eqns.extend(_constant(centered, 0))
                    known[centered] = 0
                else:
                    eqns.append(_centering(read(var), along, centered))
                renamed[var] = centered

        for var in (*jaxpr.constvars, *jaxpr.invars):
            center(var)
            if not path and (number := self.filled.get(env[var])) is not None:
                filled = renamed[var] = Var(var.aval)
                eqns += _constant(filled, number)
                known[filled] = number
        for index, eqn in enumerate(jaxpr.eqns):
            invars, site = [read(a) for a in eqn.invars], (*path, index)
            if site in self.graph.op_at:
                pairs = zip(invars, self.graph.op_at[site].inputs, strict=True)
                invars = [self._literal(a, v) for a, v in pairs]
            if site in self.graph.op_at or site in self.graph.stand_ins:
                numbers = [known.get(a) if isinstance(a, Var) else None for a in invars]
                if (number := self._number(eqn, site, numbers)) is not None:
                    (result,) = eqn.outvars
                    known[result] = number
                    eqns += _constant(result, number) or [reading(eqn, invars)]
                elif (keep := self._survivor(eqn, site, invars, numbers)) is not None:
                    renamed[eqn.outvars[0]] = keep
                else:
                    eqns.append(reading(eqn, invars))
            elif (control := control_flow(eqn)) is not None:
                eqns.append(self._control(eqn, control, site, invars, known))
            else:
                new, results = self._call(eqn, site, invars, known)
                eqns.append(new)
                known |= {eqn.outvars[i]: number for i, number in results.items()}
            for var in eqn.outvars:
                center(var)
        values = (env.get(a) if isinstance(a, Var) else None for a in jaxpr.outvars)
        pairs = zip(values, jaxpr.outvars, strict=True)
        outvars = [returned[v] if v in returned else read(a) for v, a in pairs]
        results = _by_position(outvars, known)
        if same(eqns, jaxpr.eqns) and same(outvars, jaxpr.outvars):
            return jaxpr, results
        return jaxpr.replace(eqns=live(eqns, outvars), outvars=outvars), results

    def _call(
        self, eqn: JaxprEqn, site: CallPath, invars: list[Any], known: Known
    ) -> tuple[JaxprEqn, dict[int, float]]:
        inner = call_jaxpr(eqn)
        assert inner is not None
        body, results = self.closed(inner, site, _by_position(invars, known))
        if body is inner:
            return reading(eqn, invars), results
        return eqn.replace(params=with_call_jaxpr(eqn, body), invars=invars), results

    def _control(
        self, eqn: JaxprEqn, control: Control, site: CallPath, invars: list[Any], known: Known
    ) -> JaxprEqn:
        bodies = {}
        for number, body in enumerate(control.bodies):
            # Rows of ones are ones; of carries nothing is known.
            before, rows = ([invars[i] for i in part] for part in (body.operands, control.slices))
            read = [*before, *[None] * len(control.carries), *rows]
            new, _ = self.closed(body.jaxpr, (*site, number), _by_position(read, known))
            if new is not body.jaxpr:
                bodies[body.key] = new
        if not bodies:
            return reading(eqn, invars)
        return eqn.replace(params=with_bodies(eqn, bodies), invars=invars)

    def _number(self, eqn: JaxprEqn, site: CallPath, numbers: Numbers) -> float | None:
        """The number that every element of the result is proved to be, if it is zero or one."""
        if (stand_in := self.graph.stand_ins.get(site)) is not None:
            arrays = [n for n, a in zip(numbers, eqn.invars, strict=True) if isinstance(a, Var)]
            given = {i: n for i, n in enumerate(arrays) if n is not None}
            _, results = self.closed(stand_in, site, given)
            return results[0] if len(results) == len(eqn.outvars) == 1 else None
        op = self.graph.op_at[site]
        name = op.name
        if op.index in self.zero_sums:
            return 0
        if name in _KEEPS_NUMBERS:
            return numbers[0]
        if name == MUL and numbers == [1, 1]:
            return 1
        hit = [n == 0 for n in numbers]
        if name == DIV:
            finite = self._is_finite(op.inputs[1]) and self.graph.scalar(op.inputs[1]) != 0
            return 0 if hit[0] and (finite or numbers[1] == 1) else None
        if name in ("add", "sub"):
            added = map(self.graph.scalar, op.inputs)
            one = name == "add" and any(hit) and any(n is not None and n == 1 for n in added)
            return 0 if all(hit) else 1 if one else None
        if name == MUL:
            # 0 * c needs a finite c: a known number or one in the program.
            pairs = zip(numbers, op.inputs, strict=True)
            finite = all(n is not None or self._is_finite(v) for n, v in pairs)
            return 0 if any(hit) and finite else None
        if name == "integer_pow" and eqn.params["y"] <= 0:
            return None
        return 0 if name in _KEEPS_ZERO and any(hit) else None

    def _is_finite(self, value: int) -> bool:
        number = self.graph.scalar(value)
        return number is not None and bool(np.isfinite(number))

    def _survivor(self, eqn: JaxprEqn, site: CallPath, invars: list[Any], numbers: Numbers) -> Any:
        """The operand that a sum with zero or a product with one comes down to, else None."""
        op, name = self.graph.op_at.get(site), eqn.primitive.name
        if name not in _NEUTRAL or (op is not None and op.name != name):
            return None
        neutral = [n == _NEUTRAL[name] for n in numbers]
        if neutral[1]:
            keep = invars[0]
        elif neutral[0] and name in ("add", MUL):
            keep = invars[1]
        else:
            return None
        # A renamed result must have the very type of the old one.
        return keep if isinstance(keep, Var) and keep.aval == eqn.outvars[0].aval else None


def _by_position(atoms: Sequence[Any], known: Known) -> dict[int, float]:
    return {i: known[a] for i, a in enumerate(atoms) if isinstance(a, Var) and a in known}


def _centering(var: Var, along: AxisSet, result: Var) -> JaxprEqn:
    """``result = C_S var``: a call to a function of its own name.

    One mean in float32 or wider, what a LayerNorm would pay itself.
    """

    def explicit_centering(x: jax.Array) -> jax.Array:
        wide = x.astype(widened(x.dtype))
        return (wide - group_means(wide, along, jnp)).astype(x.dtype)

    (eqn,) = trace_like(jax.jit(explicit_centering), var.aval).eqns
    return eqn.replace(invars=[var], outvars=[result])


def _constant(var: Var, number: float) -> list[JaxprEqn]:
    """Equations that set `var` to a number; none for a scalar that varies over devices."""
    aval: Any = var.aval
    if aval.shape:
        (*before, last) = trace_like(lambda x: jnp.full_like(x, number), aval).eqns
        return [*before, last.replace(outvars=[var])]
    if varying_axes(aval):
        return []
    scalar = jax.jit(lambda: jnp.full((), number, aval.dtype))
    (*before, last) = open_jaxpr(jax.make_jaxpr(scalar)()).eqns
    return [*before, last.replace(outvars=[var])]
