"""Statistics of norms on the matrix unit: sums of squares, and of what is centered, as products.

Where a sum is not the epilogue of the product that writes what it sums, a TPU's compiler makes an
operation of its own of it. As a product with ones it is nearly free (theory, section 13). A norm
over heads reads slices of one product: the ones are then block-diagonal, over all of its features.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import prod
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
    MOVES,
    PRODUCTS,
    RESHAPE,
)
from .groups import STEPS, Groups, Step, agree, groups_of
from .inline import inlined
from .jaxprs import live, same
from .ones_products import as_before, group_sums, parts_of_squares
from .roots import STATISTICS, TO_THE_ROOT, Root, roots_of, roots_reached
from .rounded import is_rounded
from .walk import Walk

_CONVERT = "convert_element_type"
TOKENS, FEATURES = 256, 128
"""With fewer nothing is gained: measured, and the columns of a matrix unit."""
SHORT = 16
"""Bits of a number that does not show in which order a product sums in float32."""


@dataclass(frozen=True, slots=True)
class MatrixSum:
    """A sum that is a product with ones: of a norm's squares, or else of its input.

    `shape` is that of what is summed, `root` the root of the norm.

    Example:
        >>> from jax_lnfold import MatrixSum
        >>> MatrixSum("ViT/q_norm", shape=(2, 256, 3, 64), squares=True, root=(0, 4)).squares
        True
    """

    module: str
    shape: tuple[int, ...]
    squares: bool
    root: Root | None


@dataclass(frozen=True, slots=True)
class _Sum:
    """The sum `op` of what is read of `base` after `steps`, squared by `square` if there is one."""

    op: Op
    base: int
    atom: Any
    leading: int
    steps: tuple[Step, ...]
    square: Op | None
    groups: Groups


def sums_on_matrix_unit(
    closed: ClosedJaxpr, leaves: Sequence[str], left: Collection[Root]
) -> tuple[ClosedJaxpr, tuple[MatrixSum, ...]]:
    """The program with statistics of norms as products wherever they are no product's epilogue.

    Their derivatives stay what they were. The first inputs are the parameters named by `leaves`;
    `left` are roots of norms that stay as they are, as those that keep their mean: both of their
    sums are one operation, which two products cost more than.
    """
    program = inlined(closed, STATISTICS)
    rewriter = _Rewriter(program, leaves, left)
    result = rewriter.closed(program, ())
    return (closed if result is program else result), tuple(rewriter.made)


class _Rewriter(Walk):
    def __init__(self, program: ClosedJaxpr, leaves: Sequence[str], left: Collection[Root]) -> None:
        super().__init__(flatten(program, leaves))
        self.facts = Facts(self.graph)
        self.roots, self.left = roots_of(self.graph), left
        self.means = {
            op.index: norm.root
            for norm in find_norms(self.facts).found
            if norm.root is not None
            for op in norm.sums
        }
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
        shape = self.graph.shape(s.op.inputs[0])
        return MatrixSum(s.op.module, shape, s.square is not None, self._norm(s.op))

    def _norm(self, op: Op) -> Root | None:
        """The root of the norm that a sum is of."""
        mean_of = self.means.get(op.index)
        return self.roots.get(self._root(op) if mean_of is None else mean_of.index)

    def _sum(self, op: Op) -> _Sum | None:
        """What the operation sums, if that is better done, and can be, by a product."""
        if op.name != "reduce_sum" or self.graph.avals[op.inputs[0]].dtype != np.float32:
            return None
        made = self.graph.producer[op.inputs[0]]
        if op.index in self.means:
            square, start = None, op.inputs[0]
        elif made is not None and made[0].is_square and self._root(op) >= 0:
            square, start = made[0], made[0].inputs[0]
        else:
            return None
        steps = self._steps(start, op.path)
        usable = square is None or square.path == op.path
        usable = usable and self._norm(op) not in self.left
        if not (
            usable
            and self._is_exact(square, start, steps)
            and is_rounded(self.graph, op.outputs, SHORT)
        ):
            return None
        return self._best(op, square, start, steps)

    def _root(self, op: Op) -> int:
        """The root that the sum ends in, as that of a norm does; -1 if there is none."""
        return min(roots_reached(self.graph, op.outputs, TO_THE_ROOT), default=-1)

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

    def _best(self, op: Op, square: Op | None, start: int, steps: Sequence[Step]) -> _Sum | None:
        """The sum over stretches of features of a product, or else of what is no product."""
        summed, axes = self.graph.shape(op.inputs[0]), op.params["axes"]
        for skipped in range(len(steps) + 1):
            rest = tuple(steps[skipped:])
            base = rest[0][0].inputs[0] if rest else start
            shape, features = self.graph.shape(base), self._features_of_product(base)
            moved = any(s[0].name != _CONVERT for s in rest)
            leading = _leading(shape, features) if features else len(shape) - len(axes)
            if leading is None or (moved and not features):
                continue
            groups = groups_of(shape, leading, rest, axes)
            if groups is None or not agree(groups, self.facts, shape, leading, rest, axes, summed):
                continue
            atom = rest[0][0].eqn.invars[0] if rest else (square or op).eqn.invars[0]
            if isinstance(atom, Var) and self._pays(groups, shape[:leading], features):
                return _Sum(op, base, atom, leading, rest, square, groups)
            return None
        return None

    def _pays(self, groups: Groups, rows: Sequence[Any], features: int | None) -> bool:
        """Whether the sums are no epilogue, and fill a part of a matrix unit."""
        known = [n for n in rows if isinstance(n, int)]  # others may be large
        if len(known) == len(rows) and prod(known) < TOKENS:
            return False
        return groups.size != features if features else groups.size >= FEATURES

    def _features_of_product(self, value: int) -> int | None:
        """How many features the product has that a value is made of, if it is made of one.

        Made by operations on each element alone, which the compiler makes in that product; not with
        a number per token, a mean or a deviation, which has to be there first.
        """
        todo, seen = [value], {value}
        while todo:
            of = todo.pop()
            if (made := self.graph.producer[of]) is None:
                continue
            op, shape = made[0], self.graph.shape(of)
            if op.name in PRODUCTS:
                return _features(op)
            if op.name == RESHAPE:
                before = {op.inputs[0]}
            elif op.name in ELEMENTWISE and not any(map(self._is_statistic, op.inputs)):
                before = {v for v in op.inputs if self.graph.shape(v) == shape}
            else:
                continue
            todo += before - seen
            seen |= before
        return None

    def _is_statistic(self, value: int) -> bool:
        """Whether a value is a smaller one repeated, which parameters alone do not give."""
        made = self.graph.producer[value]
        if made is None or made[0].name not in MOVES or self.graph.data_free[value]:
            return False
        before = self.graph.shape(made[0].inputs[0])
        return bool(before) and prod(before) != prod(self.graph.shape(value))


def _features(product: Op) -> int | None:
    """How many numbers of a result are those of one token: of a kernel's axes, or channels."""
    axes, avals = 1, [product.eqn.invars[1].aval, product.eqn.outvars[0].aval]
    kernel, shape = ((*getattr(aval, "shape", ()),) for aval in avals)
    if product.name == "dot_general":
        (_, summed), (_, batch) = product.params["dimension_numbers"]
        axes = len(kernel) - len(summed) - len(batch)
    last = shape[len(shape) - axes :]
    return prod(last) if all(isinstance(n, int) for n in last) else None


def _leading(shape: Sequence[Any], features: int) -> int | None:
    """Before how many axes the others hold so many features, if any do."""
    for leading in range(len(shape) - 1, -1, -1):
        last = shape[leading:]
        if all(isinstance(n, int) for n in last) and prod(last) == features:
            return leading
    return None


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
