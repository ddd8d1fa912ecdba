"""The registry of rules: how a centering moves back through a primitive, and a shift forward.

For an equation ``y = op(x_0, x_1, ...)`` a rule says two things about axis sets, and one about
axes:

- *pull* (transport): which operands have to be zero-mean, along which sets, so that ``y`` is
  zero-mean along a given set;
- *push* (tolerance): if one operand is shifted by something uniform along a given set, along
  which set is the shift of ``y`` uniform?
- *axes*: which axes of an operand does ``y`` keep, and where are they?

The first two may answer `Opaque`, and a primitive without a rule is opaque. Opaque is always sound,
and so is an axis that is not named.

The docstring of every rule gives its formula, in which ``C_S x = x - mean_S(x)`` centers along S, u
is uniform along S, and S' is the set that S becomes on the other side of the equation. It has an
example that is run as a test (`example` has its words) and names the parameters that are read.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .._compat import what_is_called
from ..axes.axis_set import AxisSet
from ..program.graph import CallPath, Graph, Op
from ..program.primitives import why_without_rule


@dataclass(frozen=True, slots=True)
class Opaque:
    """The rule cannot help; `why` completes the sentence "the operation ..."."""

    why: str


@dataclass(frozen=True, slots=True)
class Pull:
    """Operands that must be zero-mean, as (operand position, axis set).

    `exact` says that nothing was refined on the way: the output is then also uniform along the
    asked set if the operands are uniform along theirs. `approximate` says that this is not so at
    all, but taken to be so on request.
    """

    needs: tuple[tuple[int, AxisSet], ...]
    exact: bool = True
    approximate: bool = False


Push = tuple[tuple[int, AxisSet], ...]
"""Shifted outputs, as (output position, axis set)."""


@dataclass(frozen=True, slots=True)
class Context:
    """What a rule may ask about the equation it is applied to."""

    graph: Graph
    op: Op
    is_uniform: Callable[[int, AxisSet], bool]

    @property
    def params(self) -> dict[str, Any]:
        """The parameters of the equation."""
        return self.op.params

    def in_shape(self, position: int) -> tuple[Any, ...]:
        """The shape of an operand."""
        return self.graph.shape(self.op.inputs[position])

    def out_shape(self, position: int = 0) -> tuple[Any, ...]:
        """The shape of an output."""
        return self.graph.shape(self.op.outputs[position])

    def dtype(self, position: int) -> np.dtype[Any]:
        """The dtype of an operand."""
        return self.graph.avals[self.op.inputs[position]].dtype

    def uniform(self, position: int, along: AxisSet) -> bool:
        """Whether an operand does not vary along a set, whatever the data and parameters."""
        return self.is_uniform(self.op.inputs[position], along)

    def scalar(self, position: int) -> np.ndarray | None:
        """The number that all elements of an operand have, if the program fixes it."""
        return self.graph.scalar(self.op.inputs[position])

    def data_free(self, position: int) -> bool:
        """Whether an operand is computed from parameters and constants only."""
        return self.graph.data_free[self.op.inputs[position]]


PullRule = Callable[[Context, int, AxisSet], Pull | Opaque]
PushRule = Callable[[Context, int, AxisSet], Push | Opaque]
AxisMap = Mapping[int, int | CallPath]
"""Axis of an operand -> axis of the output, or the loop that takes it row by row."""
AxesRule = Callable[[Context, int], AxisMap]


def no_pull(ctx: Context, out: int, along: AxisSet) -> Opaque:
    """Of a primitive whose output cannot be centered through its operands.

    ``mean_S(f(x))`` says nothing of ``mean_S(x)``: ``C_S f(x) != f(C_S x)``.

    >>> pull(jnp.tanh, (2, 3), along=[1])
    opaque: ...
    """
    return _opaque(ctx, "does not carry a zero mean from its operands to its result")


def no_push(ctx: Context, operand: int, along: AxisSet) -> Opaque:
    """Of a primitive that notices every shift.

    ``f(x + u) - f(x) != u``, and depends on x, which varies along S.

    >>> push(jnp.tanh, (2, 3), along=[1])
    opaque: ...
    """
    return _opaque(ctx, "notices a shift of its operand")


def _opaque(ctx: Context, why: str) -> Opaque:
    """The answer `why` of a primitive that is known; of others nothing is claimed."""
    return Opaque(why if has_rule(ctx.op) else why_without_rule(ctx.op.name))


def no_axes(ctx: Context, operand: int) -> AxisMap:
    """Of a primitive that keeps no axis, or is not linear in the operand.

    ``f(x g) != f(x) g`` for factors g along any axis of x.

    >>> axes(jnp.tanh, (2, 3))
    {}
    """
    return {}


@dataclass(frozen=True, slots=True)
class Rule:
    """The answers for one primitive.

    The output keeps an axis of an operand if ``op(x g) = op(x) g`` for all factors g along it.

    `uniform` is there where more is known of uniformity than an exact pull says, as nonlinear
    operations keep it, too: which operands, uniform along which sets, make the output uniform?
    """

    pull: PullRule = no_pull
    push: PushRule = no_push
    uniform: PullRule | None = None
    axes: AxesRule = no_axes


NO_RULE = Rule()
RULES: dict[str, Rule] = {}


def register(names: str | Iterable[str], rule: Rule) -> None:
    """Give the primitives with these names a rule."""
    for name in names.split() if isinstance(names, str) else names:
        if name in RULES:
            raise ValueError(f"primitive {name!r} has a rule already")
        RULES[name] = rule


OWN_RULES: dict[Hashable, Rule] = {}
"""Rules that users gave, by the primitive object or what stands for a kernel, never by a name."""


def rule_of(op: Op) -> Rule:
    """The rule for an operation; the opaque rule where there is none."""
    own = OWN_RULES.get(what_is_called(op.eqn)) if OWN_RULES and not op.role else None
    return own or RULES.get(op.name, NO_RULE)


def has_rule(op: Op) -> bool:
    """Whether anything is known of an operation."""
    return rule_of(op) is not NO_RULE


def is_nonlinear(op: Op) -> bool:
    """Whether an operation is known, and its result is centered by no operand of it."""
    return has_rule(op) and rule_of(op).pull is no_pull


def axis_map(graph: Graph, op: Op, operand: int = 0) -> AxisMap:
    """Which axes of an operand the output of `op` keeps, and where they are."""
    return rule_of(op).axes(Context(graph, op, lambda value, along: False), operand)
