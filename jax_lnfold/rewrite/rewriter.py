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
from ..program.declared import of_zero_mean
from ..program.graph import CallPath
from .algebra import Numbers, known_result, surviving_operand
from .jaxprs import live, reading, same

Known = dict[Var, float]
"""Values of a jaxpr all of whose elements are known to be 0, or all to be 1."""


def rewrite(closed: ClosedJaxpr, placement: Placement) -> ClosedJaxpr:
    """The program of `closed` with the placement carried out."""
    rewriter = _Rewriter(placement)
    rewritten, _ = rewriter.closed(closed, (), {})
    if rewriter.centered != placement.explicit.keys():
        raise Bug("apply_fn: a centering found no place in the program")
    return rewritten


def twins(placement: Placement) -> set[CallPath]:
    """Where a call that is declared to be a LayerNorm is made its RMS twin: all its norms fold."""
    folds: dict[CallPath, list[bool]] = {}
    for norm, folded in zip(placement.norms, placement.folded, strict=True):
        site = norm.root and placement.graph.declared_at(norm.root)
        if site is not None:
            folds.setdefault(site, []).append(folded)
    return {site for site, folded in folds.items() if all(folded)}


class _Rewriter:
    def __init__(self, placement: Placement) -> None:
        self.placement, self.graph = placement, placement.graph
        self.centered: set[int] = set()
        self.zero_sums = {
            op.index
            for i, norm in enumerate(placement.norms)
            if placement.folded[i] or i in placement.dropped
            for op in norm.sums
        }
        self.twins = twins(placement)
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
        body, outputs = _Body(self, jaxpr, path, inputs).rewritten()
        old = consts_of(closed)
        consts = [self._edited(env[v], c) for v, c in zip(jaxpr.constvars, old, strict=True)]
        if body is jaxpr and all(a is b for a, b in zip(consts, old, strict=True)):
            return closed, outputs
        return close(body, consts), outputs

    def _edited(self, value: int, const: Any) -> Any:
        for along in self.placement.constants.get(value, ()):
            const = center_array(np.asarray(const), along)
        return const

    def literal(self, atom: Any, value: int) -> Any:
        """An operand: a number in the program is centered where the placement says so."""
        if not isinstance(atom, Literal) or value not in self.placement.constants:
            return atom
        return Literal(self._edited(value, atom.val), atom.aval)

    def known_result(self, eqn: JaxprEqn, site: CallPath, numbers: Numbers) -> float | None:
        """The number that every element of the result is proved to be, if it is zero or one."""
        if (stand_in := self.graph.stand_ins.get(site)) is not None:
            arrays = [n for n, a in zip(numbers, eqn.invars, strict=True) if isinstance(a, Var)]
            given = {i: n for i, n in enumerate(arrays) if n is not None}
            _, results = self.closed(stand_in, site, given)
            return results[0] if len(results) == len(eqn.outvars) == 1 else None
        op = self.graph.op_at[site]
        return 0 if op.index in self.zero_sums else known_result(self.graph, op, numbers)


class _Body:
    """A jaxpr while it is rewritten: the new equations, what they read, and what is known of it."""

    def __init__(
        self, rewriter: _Rewriter, jaxpr: Jaxpr, path: CallPath, inputs: Mapping[int, float]
    ) -> None:
        self.rewriter, self.jaxpr, self.path = rewriter, jaxpr, path
        self.graph, self.placement = rewriter.graph, rewriter.placement
        self.env = self.graph.env[path]
        self.renamed: dict[Var, Any] = {}
        self.returned: dict[int, Any] = {}  # values that outputs see as they were
        self.known: Known = {jaxpr.invars[i]: number for i, number in inputs.items()}
        self.eqns: list[JaxprEqn] = []

    def rewritten(self) -> tuple[Jaxpr, dict[int, float]]:
        """The new jaxpr, the very same where nothing changes, and the outputs that are known."""
        jaxpr = self.jaxpr
        for var in (*jaxpr.constvars, *jaxpr.invars):
            self._center(var)
            self._fill(var)
        for index, eqn in enumerate(jaxpr.eqns):
            self._equation(eqn, (*self.path, index))
            for var in eqn.outvars:
                self._center(var)
        outvars = [self._output(atom) for atom in jaxpr.outvars]
        results = _by_position(outvars, self.known)
        if same(self.eqns, jaxpr.eqns) and same(outvars, jaxpr.outvars):
            return jaxpr, results
        return jaxpr.replace(eqns=live(self.eqns, outvars), outvars=outvars), results

    def _read(self, atom: Any) -> Any:
        while isinstance(atom, Var) and atom in self.renamed:
            atom = self.renamed[atom]
        return atom

    def _output(self, atom: Any) -> Any:
        value = self.env.get(atom) if isinstance(atom, Var) else None
        return self.returned[value] if value in self.returned else self._read(atom)

    def _center(self, var: Var) -> None:
        """Center a value right where it appears, for all equations that read it."""
        value, centered_values = self.env.get(var), self.rewriter.centered
        if value is None or value in centered_values:
            return
        if self.graph.centered_at(value) != self.path:
            return
        if value in self.graph.outputs:
            self.returned[value] = self._read(var)
        for spread in self.placement.explicit.get(value, ()):
            centered_values.add(value)
            along = self.graph.on_one_device(value, spread)
            assert along is not None
            centered = Var(var.aval)
            if along.trivial:
                self.eqns += _constant(centered, 0)
                self.known[centered] = 0
            else:
                self.eqns.append(_centering(self._read(var), along, centered))
            self.renamed[var] = centered

    def _fill(self, var: Var) -> None:
        """Put a number in place of a scale or shift that linear layers have taken up."""
        number = None if self.path else self.rewriter.filled.get(self.env[var])
        if number is not None:
            filled = self.renamed[var] = Var(var.aval)
            self.eqns += _constant(filled, number)
            self.known[filled] = number

    def _equation(self, eqn: JaxprEqn, site: CallPath) -> None:
        invars = [self._read(atom) for atom in eqn.invars]
        if (op := self.graph.op_at.get(site)) is not None:
            pairs = zip(invars, op.inputs, strict=True)
            invars = [self.rewriter.literal(atom, value) for atom, value in pairs]
        if op is not None or site in self.graph.stand_ins:
            self._operation(eqn, site, invars)
        elif (control := control_flow(eqn)) is not None:
            self._control(eqn, control, site, invars)
        else:
            self._call(eqn, site, invars)

    def _operation(self, eqn: JaxprEqn, site: CallPath, invars: list[Any]) -> None:
        """A number where the result is known, the operand that is left of it, or the operation."""
        numbers = [self.known.get(a) if isinstance(a, Var) else None for a in invars]
        if (number := self.rewriter.known_result(eqn, site, numbers)) is not None:
            (result,) = eqn.outvars
            self.known[result] = number
            self.eqns += _constant(result, number) or [reading(eqn, invars)]
        elif (left := self._surviving(eqn, site, invars, numbers)) is not None:
            self.renamed[eqn.outvars[0]] = left
        else:
            eqn = of_zero_mean(eqn) if site in self.rewriter.twins else eqn
            self.eqns.append(reading(eqn, invars))

    def _surviving(
        self, eqn: JaxprEqn, site: CallPath, invars: list[Any], numbers: Numbers
    ) -> Var | None:
        op = self.graph.op_at.get(site)
        position = surviving_operand(op.name if op else eqn.primitive.name, numbers)
        left = None if position is None else invars[position]
        # A renamed result must have the very type of the old one.
        return left if isinstance(left, Var) and left.aval == eqn.outvars[0].aval else None

    def _call(self, eqn: JaxprEqn, site: CallPath, invars: list[Any]) -> None:
        inner = call_jaxpr(eqn)
        assert inner is not None
        body, results = self.rewriter.closed(inner, site, _by_position(invars, self.known))
        self.known |= {eqn.outvars[i]: number for i, number in results.items()}
        if body is inner:
            self.eqns.append(reading(eqn, invars))
        else:
            params = with_call_jaxpr(eqn, body)
            self.eqns.append(eqn.replace(params=params, invars=invars))

    def _control(self, eqn: JaxprEqn, control: Control, site: CallPath, invars: list[Any]) -> None:
        bodies = {}
        for number, body in enumerate(control.bodies):
            # Rows of ones are ones; of carries nothing is known.
            before, rows = ([invars[i] for i in part] for part in (body.operands, control.slices))
            read = [*before, *[None] * len(control.carries), *rows]
            known = _by_position(read, self.known)
            new, _ = self.rewriter.closed(body.jaxpr, (*site, number), known)
            if new is not body.jaxpr:
                bodies[body.key] = new
        if bodies:
            self.eqns.append(eqn.replace(params=with_bodies(eqn, bodies), invars=invars))
        else:
            self.eqns.append(reading(eqn, invars))


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
