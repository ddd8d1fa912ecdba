"""Statistics of norms on the matrix unit: sums of squares, and of what is centered, as products.

Where a sum is not the epilogue of the product that writes what it sums, a TPU's compiler makes an
operation of its own of it. As a product with ones it is nearly free (theory, section 12). A norm
over heads reads slices of one product: the ones are then block-diagonal, over all of its features.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._compat import ClosedJaxpr, Jaxpr, JaxprEqn, Var, is_explicit, trace_like
from ..analysis.facts import Facts
from ..analysis.layer_norms import find_norms
from ..program.flatten import flatten
from ..program.graph import CallPath, Op
from ..program.primitives import (
    ELEMENTWISE,
    IDENTITIES,
    MOVES,
    PRODUCTS,
    SCALINGS,
)
from .groups import STEPS, Groups, Step, agree, groups_of
from .inline import inlined
from .jaxprs import live, same
from .ones_products import as_before, group_sums, parts_of_squares
from .walk import Walk

_AROUND = frozenset("reduce_sum square integer_pow rsqrt sqrt split slice reshape".split())
_CONVERT = "convert_element_type"
_ROOTS = frozenset({"rsqrt", "sqrt", "pow"})
_TO_THE_ROOT = SCALINGS | MOVES | frozenset("add sub max min clamp select_n".split()) | IDENTITIES
WIDEST_PART = 128
"""The matrix unit sums at least so many numbers at once: narrower single sums gain nothing."""


@dataclass(frozen=True, slots=True)
class MatrixSum:
    """A sum that is a product with ones: of a norm's squares, or else of its input.

    `root` is the operation that makes the norm's deviation of it, by its number in the program.
    """

    module: str
    shape: tuple[int, ...]
    squares: bool
    root: int | None = None


@dataclass(frozen=True, slots=True)
class _Sum:
    """The sum `op` of what is read of the value `base` after `steps`, squared by `square` if any."""

    op: Op
    base: int
    atom: Any
    leading: int
    steps: tuple[Step, ...]
    square: Op | None
    groups: Groups


def sums_on_matrix_unit(
    closed: ClosedJaxpr, leaves: Sequence[str]
) -> tuple[ClosedJaxpr, tuple[MatrixSum, ...]]:
    """The program with statistics of norms as products wherever they are no product's epilogue.

    Their derivatives stay what they were. The first inputs are the parameters named by `leaves`.
    """
    program = inlined(closed, _AROUND)
    rewriter = _Rewriter(program, leaves)
    result = rewriter.closed(program, ())
    return (closed if result is program else result), tuple(rewriter.made)


class _Rewriter(Walk):
    def __init__(self, program: ClosedJaxpr, leaves: Sequence[str]) -> None:
        super().__init__(flatten(program, leaves))
        self.facts = Facts(self.graph)
        self.means = {op.index for norm in find_norms(self.facts).found for op in norm.sums}
        self.made: list[MatrixSum] = []

    def body(self, jaxpr: Jaxpr, path: CallPath) -> Jaxpr:
        """The jaxpr with sums as products, the very same one where there are none."""
        ops = [self.graph.op_at.get((*path, index)) for index in range(len(jaxpr.eqns))]
        found = [s for op in ops if op is not None and (s := self._sum(op)) is not None]
        together: dict[Any, list[_Sum]] = {}
        for s in found:
            together.setdefault((s.base, s.leading, s.square is None), []).append(s)
        first = {some[0].op.index: some for some in together.values()}
        gone = {s.op.index for s in found}
        eqns: list[JaxprEqn] = []
        for index, (eqn, op) in enumerate(zip(jaxpr.eqns, ops, strict=True)):
            if op is not None and op.index in first:
                eqns.append(_as_product(first[op.index], self.graph.avals))
            if op is None or op.index not in gone:
                eqns.append(self.inside(eqn, (*path, index)))
        if same(eqns, jaxpr.eqns):
            return jaxpr
        self.made += [self._told(s) for s in found]
        return jaxpr.replace(eqns=live(eqns, jaxpr.outvars))

    def _told(self, s: _Sum) -> MatrixSum:
        root = self._root(s.op) if s.square else None
        shape = self.graph.shape(s.op.inputs[0])
        return MatrixSum(s.op.module, shape, s.square is not None, root)

    def _sum(self, op: Op) -> _Sum | None:
        """What the operation sums, if that is better done, and can be, by a product."""
        if op.name != "reduce_sum" or self.graph.avals[op.inputs[0]].dtype != np.float32:
            return None
        made = self.graph.producer[op.inputs[0]]
        if op.index in self.means:
            square, start = None, op.inputs[0]
        elif made is not None and made[0].is_square and self._root(op) is not None:
            square, start = made[0], made[0].inputs[0]
        else:
            return None
        if square is not None and square.path != op.path:
            return None
        steps = self._steps(start, op.path)
        return self._best(op, square, start, steps) if self._is_exact(square, start, steps) else None

    def _root(self, op: Op) -> int | None:
        """The root that the sum ends in, as that of a norm does; of several the first."""
        todo, seen, roots = list(op.outputs), {*op.outputs}, []
        while todo:
            for use, _ in self.graph.uses[todo.pop()]:
                if use.name in _ROOTS:
                    roots.append(use.index)
                elif use.name in _TO_THE_ROOT:
                    todo += {*use.outputs} - seen
                    seen |= {*use.outputs}
        return min(roots, default=None)

    def _steps(self, value: int, path: CallPath) -> list[Step]:
        """The moves and casts that make a value in one jaxpr, the last one last."""
        steps: list[Step] = []
        while (made := self.graph.producer[value]) is not None:
            op, _ = made
            if op.path != path or op.name not in STEPS or len(op.inputs) != 1:
                break
            if not isinstance(op.eqn.invars[0], Var) or self._narrows(op):
                break
            steps.append(made)
            value = op.inputs[0]
        return steps[::-1]

    def _narrows(self, op: Op) -> bool:
        """Whether it is a cast that loses digits or range, or is of other than real numbers."""
        before, after = (self.graph.avals[v].dtype for v in (op.inputs[0], op.outputs[0]))
        if before == after:
            return False
        if not all(jnp.issubdtype(d, jnp.floating) for d in (before, after)):
            return True
        a, b = jnp.finfo(before), jnp.finfo(after)
        return a.nmant > b.nmant or a.maxexp > b.maxexp or a.minexp < b.minexp

    def _is_exact(self, square: Op | None, start: int, steps: Sequence[Step]) -> bool:
        """Whether parts of bfloat16 hold all digits, and no type says how it is spread.

        Sums of what is not squared are of both signs, so that one part has to hold each number.
        """
        stored = steps[0][0].inputs[0] if steps else start
        values = [*(op.inputs[0] for op, _ in steps), start]
        dtype = self.graph.avals[stored].dtype
        holds = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits <= 32
        return (
            holds
            and (square is not None or dtype == jnp.bfloat16)
            and not any(is_explicit(self.graph.avals[v]) for v in values)
        )

    def _best(
        self, op: Op, square: Op | None, start: int, steps: Sequence[Step]
    ) -> _Sum | None:
        """The sum over stretches of features of a product, or else of what is no product."""
        shape, axes = self.graph.shape(op.inputs[0]), op.params["axes"]
        for skipped in range(len(steps) + 1):
            rest = tuple(steps[skipped:])
            base = rest[0][0].inputs[0] if rest else start
            features = self._features_of_product(base)
            if features is None and any(s[0].name != _CONVERT for s in rest):
                continue
            before = self.graph.shape(base)
            leading = len(before) - (features or len(axes))
            groups = groups_of(before, leading, rest, axes)
            if groups is None or not agree(groups, self.facts, before, leading, rest, axes, shape):
                continue
            if features is not None and groups.size == prod_of(before[leading:]):
                return None  # the epilogue of that product
            if features is None and groups.size < WIDEST_PART:
                return None
            atom = rest[0][0].eqn.invars[0] if rest else (square or op).eqn.invars[0]
            return _Sum(op, base, atom, leading, rest, square, groups)
        return None

    def _features_of_product(self, value: int) -> int | None:
        """How many last axes of a value are those of the features of a product that it is made of.

        Made by operations on each element alone, which the compiler makes in that product; not with
        a number per token, a mean or a deviation, which has to be there first.
        """
        todo, seen = [value], {value}
        while todo:
            made = self.graph.producer[todo.pop()]
            if made is None:
                continue
            op = made[0]
            if op.name in PRODUCTS:
                return _features(op)
            if op.name in ELEMENTWISE and not any(map(self._is_statistic, op.inputs)):
                fresh = {v for v in op.inputs if self.graph.shape(v) == self.graph.shape(value)} - seen
                seen |= fresh
                todo += fresh
        return None

    def _is_statistic(self, value: int) -> bool:
        """Whether a value is a smaller one repeated, which parameters alone do not give."""
        made = self.graph.producer[value]
        repeated = made is not None and made[0].name in ("broadcast_in_dim", "reshape")
        return repeated and not self.graph.data_free[value] and self.graph.scalar(value) is None


def prod_of(sizes: Iterable[int]) -> int:
    return int(np.prod([*sizes], dtype=np.int64))


def _features(product: Op) -> int:
    """How many axes of the result are those of the second operand, a kernel; of a convolution one."""
    numbers = product.params["dimension_numbers"]
    if product.name != "dot_general":
        return 1
    (_, summed), (_, batch) = numbers
    return len(product.eqn.invars[1].aval.shape) - len(summed) - len(batch)


def _as_product(sums: Sequence[_Sum], avals: Sequence[Any]) -> JaxprEqn:
    """One call to a function of its own name that makes all these sums of one value."""
    leading, squares = sums[0].leading, sums[0].square is not None
    base = avals[sums[0].base]
    number = parts_of_squares(base.dtype) if squares else 1
    groups = [s.groups for s in sums]

    def before(x: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(_as_it_was(s, x) for s in sums)

    def sums_on_matrix_unit(x: jax.Array) -> tuple[jax.Array, ...]:
        return as_before(lambda y: group_sums(y, groups, leading, squares, number), before)(x)

    (eqn,) = trace_like(jax.jit(sums_on_matrix_unit), base).eqns
    outvars = [s.op.eqn.outvars[0] for s in sums]
    return eqn.replace(invars=[sums[0].atom], outvars=outvars)


def _as_it_was(s: _Sum, x: Any) -> Any:
    """The sum as the program computed it."""
    for op, result in s.steps:
        made = op.eqn.primitive.bind(x, **op.params)
        x = made[result] if op.eqn.primitive.multiple_results else made
    if s.square is not None:
        x = s.square.eqn.primitive.bind(*[x] * len(s.square.inputs), **s.square.params)
    return s.op.eqn.primitive.bind(x, **s.op.params)
