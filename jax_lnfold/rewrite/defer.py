"""Deferred scaling: matrix products read a stream itself, their results are scaled instead.

``(x * r) W = (x W) * r`` for a factor ``r`` that does not vary along the axes summed over (theory,
section 6). The normalised copy ``x * r`` need not be written then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import inf, prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._compat import (
    ClosedJaxpr,
    Jaxpr,
    JaxprEqn,
    Var,
    is_explicit,
    trace_like,
)
from ..analysis.facts import Facts
from ..axes.axis_set import AxisSet
from ..axes.broadcast import output_axes, project
from ..centering import widened
from ..program.counts import products_per_element
from ..program.flatten import flatten
from ..program.graph import JOINS, CallPath, Op
from ..program.primitives import DIV, MOVES, MUL, SCALINGS
from ..rules import Opaque, rule_of
from ..trees import is_editable
from .inline import inlined
from .jaxprs import live, same
from .roots import Root, root_behind, roots_of
from .walk import Walk

_CONVERT = "convert_element_type"
_AROUND = frozenset({"dot_general", "integer_pow", "rsqrt", "sqrt", "square"})


@dataclass(frozen=True, slots=True)
class Deferral:
    """A scale that is applied to results of matrix products, in place of what these read.

    Shapes are those of what was scaled, and of the results that are scaled instead. `root` is that
    of the norm.

    Example:
        >>> from jax_lnfold import Deferral
        >>> Deferral("ViT/norm", shape=(2, 16, 32), results=((2, 16, 96),)).module
        'ViT/norm'
    """

    module: str
    shape: tuple[int, ...]
    results: tuple[tuple[int, ...], ...]
    root: Root | None = None


@dataclass(frozen=True, slots=True)
class _Reader:
    """A product that reads the scaled value by its operand `position`, after the `steps`."""

    product: Op
    position: int
    steps: tuple[Op, ...] = ()


@dataclass(frozen=True, slots=True)
class _Scale:
    """The operation `op` multiplies (divides, if that is its name) operand `base` by the other."""

    op: Op
    base: int

    @property
    def values(self) -> tuple[int, int]:
        """What is scaled, and the factor."""
        return self.op.inputs[self.base], self.op.inputs[1 - self.base]

    @property
    def atoms(self) -> tuple[Any, Any]:
        """The same in the jaxpr."""
        return self.op.eqn.invars[self.base], self.op.eqn.invars[1 - self.base]


def defer_scales(
    closed: ClosedJaxpr, cost: float, most: float = inf
) -> tuple[ClosedJaxpr, tuple[Deferral, ...]]:
    """The program with scales deferred wherever that is exact and, by the cost model, pays.

    `cost` is what it costs to scale one element of a result, where one to write and read an element
    of the scaled copy costs 1. All readers of a copy go together: it is written if one needs it.
    Where these multiply each of its elements more than `most` times, nothing is deferred.
    """
    program = inlined(closed, _AROUND)
    deferrer = _Deferrer(program, cost, most)
    result = deferrer.closed(program, ())
    return (closed if result is program else result), tuple(deferrer.deferred)


class _Deferrer(Walk):
    def __init__(self, program: ClosedJaxpr, cost: float, most: float) -> None:
        super().__init__(flatten(program))
        self.cost, self.most = cost, most
        self.facts, self.roots = Facts(self.graph), roots_of(self.graph)
        self.deferred: list[Deferral] = []

    def body(self, jaxpr: Jaxpr, path: CallPath) -> Jaxpr:
        """The jaxpr with its scales deferred, the very same one where there are none."""
        scales: dict[int, list[tuple[_Scale, _Reader]]] = {}  # by product
        ops = [self.graph.op_at.get((*path, index)) for index in range(len(jaxpr.eqns))]
        for op in ops:
            if op is not None and (found := self._deferrable(op)) is not None:
                scale, readers = found
                results = (self.graph.shape(r.product.outputs[0]) for r in readers)
                shape = self.graph.shape(op.outputs[0])
                root = self.roots.get(root_behind(self.graph, scale.values[1]))
                self.deferred.append(Deferral(op.module, shape, tuple(results), root))
                for reader in readers:
                    scales.setdefault(reader.product.index, []).append((scale, reader))
        eqns = []
        for index, (eqn, op) in enumerate(zip(jaxpr.eqns, ops, strict=True)):
            if op is not None and op.index in scales:
                eqns.append(_deferred(eqn, scales[op.index]))
            else:
                eqns.append(self.inside(eqn, (*path, index)))
        if same(eqns, jaxpr.eqns):
            return jaxpr
        return jaxpr.replace(eqns=live(eqns, jaxpr.outvars))

    def _deferrable(self, op: Op) -> tuple[_Scale, list[_Reader]] | None:
        """What the operation scales and who reads it, if the scale of a norm can be deferred."""
        if op.name not in SCALINGS or not all(isinstance(a, Var) for a in op.eqn.invars):
            return None
        readers = self._products(op.outputs[0], op.path)
        for base in (0, 1) if op.name == MUL and readers else (0,) if readers else ():
            scale = _Scale(op, base)
            if (
                all(self._is_exact(scale, reader) for reader in readers)
                and self._is_norm(scale)
                and self._pays(scale, readers)
            ):
                return scale, readers
        return None

    def _products(self, value: int, path: CallPath, steps: tuple[Op, ...] = ()) -> list[_Reader]:
        """Products of one jaxpr that read a value, moved and converted only; none if others do."""
        found: list[_Reader] = []
        if value in self.graph.outputs:
            return []
        for op, position in self.graph.uses[value]:
            if op.path == path and op.name == "dot_general":
                found.append(_Reader(op, position, steps))
            elif op.path == path and op.name in MOVES | {_CONVERT} and len(op.inputs) == 1:
                more = self._products(op.outputs[0], path, (*steps, op))
                if not more:
                    return []
                found += more
            else:
                return []
        return found

    def _is_exact(self, scale: _Scale, reader: _Reader) -> bool:
        """Whether the factor does not vary along what is summed over, and no number is lost."""
        graph, product = self.graph, reader.product
        base, factor = scale.values
        operand, result = product.inputs[reader.position], product.outputs[0]
        summed = product.params["dimension_numbers"][0][reader.position]
        along = AxisSet.over(graph.shape(operand), summed)
        for step in reversed(reader.steps):
            pulled = rule_of(step).pull(self.facts.context(step), 0, along)
            if isinstance(pulled, Opaque) or not pulled.exact:
                return False
            ((_, along),) = pulled.needs
        if graph.shape(base) != graph.shape(scale.op.outputs[0]):
            return False
        source = self._source(base)
        if not self._is_uniform(factor, along) or self._is_centered_here(
            source, along, scale.op.path
        ):
            return False
        avals = [graph.avals[v] for v in (base, factor, operand, result)]
        return (
            all(is_editable(aval.dtype) for aval in avals)
            and not any(map(is_explicit, avals))
            and self._holds(operand, source)
        )

    def _is_uniform(self, value: int, along: AxisSet) -> bool:
        """Whether what may be broadcast does not vary."""
        return self.facts.uniform(value, project(along, self.graph.shape(value)))

    def _is_centered_here(self, source: int, along: AxisSet, path: CallPath) -> bool:
        """Whether a mean is taken off at run time: what remains is a copy, too."""
        made = self.graph.producer[source]
        if made is None or made[0].path != path or made[0].name not in ("sub", "add"):
            return False
        return any(
            self._is_uniform(v, along) for v in made[0].inputs if self.graph.scalar(v) is None
        )

    def _source(self, value: int) -> int:
        """What a value was before it was converted to dtypes that hold more."""
        while (made := self.graph.producer[value]) is not None and made[0].name == _CONVERT:
            (before,) = made[0].inputs
            if not self._holds(value, before):
                break
            value = before
        return value

    def _holds(self, value: int, before: int) -> bool:
        """Whether the dtype of a value has every number in its range that another one's has."""
        kinds = [self.graph.avals[v].dtype for v in (value, before)]
        if not all(jnp.issubdtype(kind, jnp.floating) for kind in kinds):
            return False
        a, b = map(jnp.finfo, kinds)
        return a.maxexp >= b.maxexp and a.minexp <= b.minexp

    def _is_norm(self, scale: _Scale) -> bool:
        """Whether the factor is computed from squares of what it scales.

        So the base has to be there, whole, before anything can be scaled. (The denominators of a
        softmax are there sooner, and compilers know what to do with them.)
        """
        producer, (base, factor) = self.graph.producer, scale.values
        source = self._source(base)
        first = producer[source]
        start = -1 if first is None or first[0].name in JOINS else first[0].index
        todo, seen = [factor], {factor}
        while todo:
            made = producer[todo.pop()]
            if made is None or made[0].index <= start:
                continue
            if made[0].is_square and self._source(made[0].inputs[0]) == source:
                return True
            fresh = {*made[0].inputs} - seen
            seen |= fresh
            todo += fresh
        return False

    def _pays(self, scale: _Scale, readers: Sequence[_Reader]) -> bool:
        if products_per_element(self.graph, [(r.product, r.position) for r in readers]) > self.most:
            return False
        results = sum(self._elements(r.product.outputs[0]) for r in readers)
        return self.cost * results < self._elements(scale.values[0])

    def _elements(self, value: int) -> int:
        return prod(n for n in self.graph.shape(value) if isinstance(n, int))


def _deferred(product: JaxprEqn, scales: Sequence[tuple[_Scale, _Reader]]) -> JaxprEqn:
    """``(x W) * r``: a call to a function of its own name that takes the place of a product.

    The scale meets the result in the dtype of the accumulator, float32 or wider, so that a sum of
    unscaled numbers cannot leave the range of float16.
    """
    avals: list[Any] = [*(a.aval for a in product.invars), product.outvars[0].aval]
    ranks, result = [len(aval.shape) for aval in avals[:2]], avals[2]
    numbers = product.params["dimension_numbers"]
    asked = product.params["preferred_element_type"] or result.dtype
    wide = widened(asked)

    def deferred_scale(*arrays: jax.Array) -> jax.Array:
        operands, factors = list(arrays[:2]), []
        for factor, (scale, reader) in zip(arrays[2:], scales, strict=True):
            factor = jnp.broadcast_to(factor, scale.atoms[0].aval.shape)
            for step in reader.steps:
                bind = partial(step.eqn.primitive.bind, **step.params)
                operands[reader.position] = bind(operands[reader.position])
                factor = factor if step.name == _CONVERT else bind(factor)
            factors.append(_along_result(factor, numbers, ranks, reader.position, result.shape))
        y = product.primitive.bind(*operands, **{**product.params, "preferred_element_type": wide})
        for factor, (scale, _) in zip(factors, scales, strict=True):
            scaled = lax.div if scale.op.name == DIV else lax.mul
            y = scaled(y, factor.astype(wide))
        return y.astype(result.dtype)

    operands = list(product.invars)
    for scale, reader in scales:
        operands[reader.position] = scale.atoms[0]
    invars = [*operands, *(scale.atoms[1] for scale, _ in scales)]
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
