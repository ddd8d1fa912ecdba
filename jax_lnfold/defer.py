"""Deferred scaling: matrix products read a stream itself, their results are scaled instead.

``(x * r) W = (x W) * r`` for a factor ``r`` that does not vary along the axes summed over (theory,
section 6). The normalised copy ``x * r`` need not be written then.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ._compat import (
    ClosedJaxpr,
    Jaxpr,
    JaxprEqn,
    Var,
    call_jaxpr,
    close,
    consts_of,
    control_flow,
    is_explicit,
    open_jaxpr,
    trace_like,
    with_bodies,
    with_call_jaxpr,
)
from .axes import AxisSet
from .facts import Facts
from .flatten import flatten
from .graph import CallPath
from .inline import inlined
from .local import CONVERT, Local, Reader, dtype_of, holds, name_of, shape_of
from .rewrite import live, same
from .rules import Opaque, rule_for
from .rules.contraction import output_axes
from .rules.elementwise import project

_AROUND = frozenset({"dot_general", "integer_pow", "rsqrt", "sqrt", "square"})


@dataclass(frozen=True, slots=True)
class Deferral:
    """A scale that is applied to results of matrix products, in place of what these read.

    Shapes are those of what was scaled, and of the results that are scaled instead.
    """

    module: str
    shape: tuple[int, ...]
    results: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class _Scaled:
    """``base * factor``, or ``base / factor`` if it `divides`."""

    base: Any
    factor: Any
    divides: bool


def defer_scales(closed: ClosedJaxpr, cost: float) -> tuple[ClosedJaxpr, tuple[Deferral, ...]]:
    """The program with scales deferred wherever that is exact and, by the cost model, pays.

    `cost` is what it costs to scale one element of a result, where one to write and read an element
    of the scaled copy costs 1. All readers of a copy go together: it is written if one needs it.
    """
    program = inlined(closed, _AROUND)
    deferrer = _Deferrer(program, cost)
    result = deferrer.closed(program, ())
    return (closed if result is program else result), tuple(deferrer.deferred)


class _Deferrer:
    def __init__(self, program: ClosedJaxpr, cost: float) -> None:
        self.graph, self.cost = flatten(program, 0), cost
        self.facts = Facts(self.graph)
        self.deferred: list[Deferral] = []

    def closed(self, closed: Any, path: CallPath) -> Any:
        """The jaxpr with its scales deferred, the very same one where there are none."""
        jaxpr = open_jaxpr(closed)
        if path in self.graph.sealed or self.graph.lanes.get(path, True):
            return closed
        body = self._body(jaxpr, path)
        return closed if body is jaxpr else close(body, consts_of(closed))

    def _body(self, jaxpr: Jaxpr, path: CallPath) -> Jaxpr:
        scales: dict[int, list[tuple[_Scaled, Reader]]] = {}
        local = Local(jaxpr)
        for eqn in jaxpr.eqns:
            if (found := self._deferrable(eqn, local, path)) is not None:
                scaled, readers = found
                self.deferred.append(self._described(eqn, readers, local, path))
                for reader in readers:
                    scales.setdefault(reader.index, []).append((scaled, reader))
        eqns = []
        for index, eqn in enumerate(jaxpr.eqns):
            new = self._inside(eqn, (*path, index))
            eqns.append(_deferred(eqn, scales[index]) if index in scales else new)
        if same(eqns, jaxpr.eqns):
            return jaxpr
        return jaxpr.replace(eqns=live(eqns, jaxpr.outvars))

    def _inside(self, eqn: JaxprEqn, site: CallPath) -> JaxprEqn:
        """The equation with the scales in its own jaxprs deferred."""
        if site in self.graph.op_at or site in self.graph.stand_ins:
            return eqn
        if (control := control_flow(eqn)) is not None:
            new = {b.key: self.closed(b.jaxpr, (*site, i)) for i, b in enumerate(control.bodies)}
            changed = any(new[b.key] is not b.jaxpr for b in control.bodies)
            return eqn.replace(params=with_bodies(eqn, new)) if changed else eqn
        inner = call_jaxpr(eqn)
        body = None if inner is None else self.closed(inner, site)
        if body is inner or body is None:
            return eqn
        return eqn.replace(params=with_call_jaxpr(eqn, body))

    def _deferrable(
        self, eqn: JaxprEqn, local: Local, path: CallPath
    ) -> tuple[_Scaled, list[Reader]] | None:
        """What the equation scales and who reads it, if the scale of a norm can be deferred."""
        name = name_of(eqn)
        if name not in ("mul", "div") or not all(isinstance(a, Var) for a in eqn.invars):
            return None
        readers = local.products(eqn.outvars[0])
        if not readers:
            return None
        x, y = eqn.invars
        for scaled in (_Scaled(x, y, name == "div"), *[_Scaled(y, x, False)] * (name == "mul")):
            if (
                all(self._is_exact(scaled, r, eqn, local, path) for r in readers)
                and local.is_norm(scaled.base, scaled.factor)
                and self._pays(scaled, readers, local)
            ):
                return scaled, readers
        return None

    def _is_exact(
        self, scaled: _Scaled, reader: Reader, eqn: JaxprEqn, local: Local, path: CallPath
    ) -> bool:
        """Whether the factor does not vary along what is summed over, and no number is lost."""
        product = local.jaxpr.eqns[reader.index]
        operand: Any = product.invars[reader.position].aval
        summed = product.params["dimension_numbers"][0][reader.position]
        along = AxisSet.over(operand.shape, summed)
        for step in reversed(reader.steps):
            op = self.graph.op_at[(*path, local.index[step.outvars[0]])]
            pulled = rule_for(op.name).pull(self.facts.context(op), 0, along)
            if isinstance(pulled, Opaque) or not pulled.exact:
                return False
            ((_, along),) = pulled.needs
        env = self.graph.env[path]
        factor = project(along, shape_of(scaled.factor))  # it may be broadcast
        if shape_of(scaled.base) != shape_of(eqn.outvars[0]):
            return False
        if not self.facts.uniform(env[scaled.factor], factor):
            return False
        if self._is_centered_here(local.source(scaled.base), along, local, path):
            return False
        avals = [scaled.base.aval, scaled.factor.aval, product.outvars[0].aval]
        kinds = [a.dtype for a in (*avals, operand)]
        return (
            all(jnp.issubdtype(kind, jnp.floating) for kind in kinds)
            and not any(map(is_explicit, avals))
            and holds(operand.dtype, dtype_of(local.source(scaled.base)))
        )

    def _is_centered_here(self, source: Any, along: AxisSet, local: Local, path: CallPath) -> bool:
        """Whether a mean is taken off at run time: what remains is a copy, too."""
        made = local.maker(source)
        if made is None or name_of(made) not in ("sub", "add"):
            return False
        operands = (a for a in made.invars if isinstance(a, Var))
        env = self.graph.env[path]
        return any(self.facts.uniform(env[a], project(along, shape_of(a))) for a in operands)

    def _pays(self, scaled: _Scaled, readers: Iterable[Reader], local: Local) -> bool:
        results = sum(_elements(local.jaxpr.eqns[r.index].outvars[0]) for r in readers)
        return self.cost * results < _elements(scaled.base)

    def _described(
        self, eqn: JaxprEqn, readers: Iterable[Reader], local: Local, path: CallPath
    ) -> Deferral:
        results = (shape_of(local.jaxpr.eqns[r.index].outvars[0]) for r in readers)
        module = self.graph.op_at[(*path, local.index[eqn.outvars[0]])].module
        return Deferral(module, shape_of(eqn.outvars[0]), tuple(results))


def _deferred(product: JaxprEqn, scales: Sequence[tuple[_Scaled, Reader]]) -> JaxprEqn:
    """``(x W) * r``: a call to a function of its own name that takes the place of a product.

    The scale meets the result in the dtype of the accumulator, float32 or wider, so that a sum of
    unscaled numbers cannot leave the range of float16.
    """
    result: Any = product.outvars[0].aval
    ranks = [len(shape_of(a)) for a in product.invars]
    numbers = product.params["dimension_numbers"]
    asked = product.params["preferred_element_type"] or result.dtype
    wide = jnp.promote_types(asked, jnp.float32)

    def deferred_scale(*arrays: jax.Array) -> jax.Array:
        operands, factors = list(arrays[:2]), []
        for factor, (scaled, reader) in zip(arrays[2:], scales, strict=True):
            factor = jnp.broadcast_to(factor, shape_of(scaled.base))
            for step in reader.steps:
                bind = step.primitive.bind
                operands[reader.position] = bind(operands[reader.position], **step.params)
                factor = factor if step.primitive.name == CONVERT else bind(factor, **step.params)
            factors.append(_along_result(factor, numbers, ranks, reader.position, result.shape))
        y = product.primitive.bind(*operands, **{**product.params, "preferred_element_type": wide})
        for factor, (scaled, _) in zip(factors, scales, strict=True):
            y = lax.div(y, factor.astype(wide)) if scaled.divides else y * factor.astype(wide)
        return y.astype(result.dtype)

    operands = list(product.invars)
    for scaled, reader in scales:
        operands[reader.position] = scaled.base
    invars = [*operands, *(scaled.factor for scaled, _ in scales)]
    (eqn,) = trace_like(jax.jit(deferred_scale), *(a.aval for a in invars)).eqns
    return eqn.replace(invars=invars, outvars=product.outvars)


def _along_result(
    factor: jax.Array, numbers: Any, ranks: Sequence[int], operand: int, shape: tuple[int, ...]
) -> jax.Array:
    """A factor of an operand, which does not vary along what is summed over, for the result."""
    summed, batch = numbers
    place = output_axes(numbers, ranks, operand) | {d: i for i, d in enumerate(batch[operand])}
    kept = sorted(place, key=lambda d: place[d])
    first = factor
    for d in summed[operand]:
        first = lax.slice_in_dim(first, 0, 1, axis=d)
    first = lax.transpose(first, (*kept, *summed[operand])).reshape([factor.shape[d] for d in kept])
    return lax.broadcast_in_dim(first, shape, [place[d] for d in kept])


def _elements(atom: Any) -> int:
    return prod(n for n in shape_of(atom) if isinstance(n, int))
