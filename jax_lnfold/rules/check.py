"""Tries a rule on numbers: what it says about axis sets must hold for random data.

A wrong rule is a wrong answer for somebody, so each claim is checked as it is used: operands made
zero-mean, uniform or shifted exactly as the rule asks, one equation evaluated, the result looked
at. Groups of positions are spelled out by `partitions`, not by the code that rules are made of.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import numpy as np

from ..axes.axis_set import AxisSet
from ..axes.labels import ALL, FREE, Labels, canonical
from ..errors import FoldError
from ..program.flatten import flatten
from ..program.graph import Graph, Op
from .partitions import (
    axis_labels,
    centered,
    group_ids,
    is_uniform,
    is_zero_mean,
    random_set,
    uniform_shift,
    uniformed,
)
from .registry import Context, Opaque, Rule, rule_of


@dataclass(frozen=True, slots=True)
class RuleCheck:
    """How many answers were tried that say something of a mean: of pulls, of pushes, of axes."""

    pulls: int
    pushes: int
    axes: int


def check_rule(
    fn: Callable[..., Any],
    *operands: Any,
    rule: Rule | None = None,
    seeds: int = 4,
    sets: int = 30,
) -> RuleCheck:
    """Try the rule of the last equation of a function on random numbers and axis sets.

    So are the rules of this library tried. Give it every combination of shapes and parameters that
    the rule distinguishes, with axes of different sizes, and with more axes than it was made for,
    as `vmap` adds them. What it answers `Opaque` to is not tried.

        >>> def product(x, w):
        ...     return jax.lax.dot_general(x, w, (((1,), (0,)), ((), ())))
        >>> check_rule(product, (2, 3), (3, 4), seeds=1).pulls > 0
        True

    Args:
        fn: a function whose last equation is the primitive or the kernel. It is run as it is.
        *operands: arrays, or shapes, for which numbers are drawn anew each time.
        rule: by default the one that is registered, or that of the library.
        seeds: how often numbers are drawn.
        sets: how many axis sets are asked about, for each operand and result.

    Returns:
        How many answers were tried. Zero pulls mean that no mean goes back through it, zero pushes
        that every shift is noticed.

    Raises:
        FoldError: an answer does not hold, or is about what is not there; it says which, with the
            largest number that contradicts it.
    """
    counts = [0, 0, 0]
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        drawn = [rng.normal(size=x) if isinstance(x, tuple) else x for x in operands]
        trial = last_trial(fn, drawn, rule)
        for out in range(len(trial.op.outputs)):
            shape = trial.context.out_shape(out)
            for along in (random_set(rng, shape) for _ in range(sets)):
                counts[0] += trial.pull(out, along)
                trial.uniform(out, along)
        for i, x in enumerate(trial.operands):
            for along in (random_set(rng, x.shape) for _ in range(sets)):
                counts[1] += trial.push(i, along)
            counts[2] += is_number(x) and trial.axes(i)
    return RuleCheck(*counts)


def last_trial(fn: Callable[..., Any], operands: Sequence[Any], rule: Rule | None) -> Trial:
    """The last equation of a function, and what its operands are for these numbers."""
    graph = flatten(jax.make_jaxpr(fn)(*map(jax.numpy.asarray, operands)))
    values = {i: np.asarray(x) for i, x in enumerate(operands)}
    if not graph.ops:
        raise FoldError("fn: has no equation; pass a function that binds the primitive")
    values = values_of(graph, values)
    op = graph.ops[-1]

    def is_known_uniform(value: int, along: AxisSet) -> bool:
        """By its numbers, which are random: what is so by chance is so in the whole trial."""
        return is_uniform(values[value], along, 0.0)

    given = [values[v] for v in op.inputs]
    return Trial(op, rule or rule_of(op), Context(graph, op, is_known_uniform), given)


def values_of(graph: Graph, inputs: Mapping[int, np.ndarray]) -> dict[int, np.ndarray]:
    """The numbers of all values of a program without loops."""
    values = {**inputs} | {v: np.asarray(x) for v, x in graph.constants.items()}
    for op in graph.ops:
        made = evaluate(op, [values[v] for v in op.inputs])
        values |= dict(zip(op.outputs, made, strict=True))
    return values


@dataclass(frozen=True)
class Trial:
    """One equation with the rule that is tried, and the values of its operands."""

    op: Op
    rule: Rule
    context: Context
    operands: list[np.ndarray]

    def evaluate(self, operands: Sequence[Any]) -> list[np.ndarray]:
        """The results for other operands."""
        return evaluate(self.op, operands)

    @property
    def tolerance(self) -> float:
        """What passes for rounding."""
        made = [self.context.graph.avals[v].dtype for v in self.op.outputs]
        low = {np.dtype(np.float32), np.dtype(np.complex64)}
        return 1e-5 if low & {*(x.dtype for x in self.operands), *made} else 1e-10

    def pull(self, out: int, along: AxisSet) -> bool:
        """Whether the rule has an answer for a result that says something of a mean; it holds."""
        pulled = self.rule.pull(self.context, out, along)
        if isinstance(pulled, Opaque):
            _require(bool(pulled.why), "pull is opaque, and does not say why")
            return False
        zeroed, constant = list(self.operands), list(self.operands)
        for i, needed in pulled.needs:
            _require(zeroed[i] is self.operands[i], f"pull names operand {i} twice")
            _require(is_number(self.operands[i]), f"pull names operand {i}, which has no means")
            check_form(needed, self.operands[i].shape)
            zeroed[i], constant[i] = centered(zeroed[i], needed), uniformed(constant[i], needed)
        result = self.evaluate(zeroed)[out]
        if not is_zero_mean(result, along, self.tolerance):
            off = np.abs(result - centered(result, along)).max()
            raise _wrong(f"pull: result {out} has a mean of {off:.2g} along {along}", pulled)
        result = self.evaluate(constant)[out]
        if pulled.exact and not is_uniform(result, along, self.tolerance):
            raise _wrong(f"pull: result {out} is not uniform {_off(result, along)}", pulled)
        return not along.empty and any(says_mean(s) for _, s in pulled.needs)

    def push(self, operand: int, along: AxisSet) -> bool:
        """Whether the rule has an answer for an operand that says something of a mean; it holds."""
        pushed = self.rule.push(self.context, operand, along)
        if isinstance(pushed, Opaque):
            _require(bool(pushed.why), "push is opaque, and does not say why")
            return False
        _require(is_number(self.operands[operand]), f"push shifts operand {operand}, no number")
        after = dict(pushed)
        _require(len(after) == len(pushed), "push names a result twice")
        rng = np.random.default_rng(0)
        shifted = list(self.operands)
        shifted[operand] = shifted[operand] + uniform_shift(rng, along, shifted[operand].dtype)
        pairs = zip(self.evaluate(self.operands), self.evaluate(shifted), strict=True)
        for out, (x, y) in enumerate(pairs):
            change, found = y - x, after.get(out)
            inside = group_ids(found) >= 0 if found else np.zeros(x.shape, bool)
            outside = np.abs(change[~inside]).max(initial=0)
            if not outside < self.tolerance:
                what = f"push: operand {operand} shifted along {along} changes result {out}"
                raise _wrong(f"{what} by {outside:.2g} where it should not", pushed)
            if found:
                check_form(found, x.shape)
                if not is_uniform(change, found, self.tolerance):
                    what = f"push: the shift of result {out} is not uniform {_off(change, found)}"
                    raise _wrong(what, pushed)
        return any(says_mean(s) for s in after.values())

    def uniform(self, out: int, along: AxisSet) -> None:
        """Try what the rule says of uniform results, if it says more than pulls do."""
        if self.rule.uniform is None:
            return
        answer = self.rule.uniform(self.context, out, along)
        if isinstance(answer, Opaque) or not answer.exact:
            return
        constant = list(self.operands)
        for i, needed in answer.needs:
            check_form(needed, self.operands[i].shape)
            constant[i] = uniformed(constant[i], needed)
        result = self.evaluate(constant)[out]
        if not is_uniform(result, along, self.tolerance):
            raise _wrong(f"uniform: result {out} is not {_off(result, along)}", answer)

    def axes(self, operand: int) -> bool:
        """Whether the result keeps axes of the operand; factors along them pass the equation."""
        x, before = self.operands[operand], self.evaluate(self.operands)[0]
        kept = self.rule.axes(self.context, operand)
        for axis, after in kept.items():
            if not isinstance(after, int):
                raise _wrong(f"axes: {after!r} is no axis of a result", kept)
            _require(x.shape[axis] == before.shape[after], f"axes: {axis} is not {after}: sizes")
            factor = np.random.default_rng(0).integers(1, 4, x.shape[axis])
            scaled = [*self.operands]
            scaled[operand] = (x * factor.reshape(-1, *[1] * (x.ndim - axis - 1))).astype(x.dtype)
            want = before * factor.reshape(-1, *[1] * (before.ndim - after - 1))
            result = self.evaluate(scaled)[0]
            if not np.allclose(result, want, atol=10 * self.tolerance):
                off = np.abs(result - want).max()
                raise _wrong(f"axes: factors along {axis} are off by {off:.2g} in the result", kept)
        return bool(kept)


@cache
def _runner(op: Op) -> Callable[..., Any]:
    run = partial(op.eqn.primitive.bind, **op.params)
    compiled = op.name in ("pvary", "layout_constraint")  # they cannot run by themselves
    return jax.jit(run) if compiled else run


def evaluate(op: Op, operands: Sequence[Any]) -> list[np.ndarray]:
    """The results of one equation."""
    made = _runner(op)(*operands)
    return [np.asarray(y) for y in (made if op.eqn.primitive.multiple_results else [made])]


def is_number(x: np.ndarray) -> bool:
    """A real or complex one."""
    return np.issubdtype(x.dtype, np.inexact)


def check_form(found: AxisSet, shape: tuple[int, ...]) -> None:
    """Equal partitions have one spelling, so that sets can be compared and remembered."""
    _require(found.shape == shape, f"a set has the shape {found.shape} where values have {shape}")
    for entry, size in zip(found.entries, shape, strict=True):
        known = entry in (FREE, ALL) or isinstance(entry, Labels)
        spelled = known and canonical(axis_labels(entry, size)) == entry
        _require(spelled, f"{entry!r} is not what AxisSet.of or AxisSet.over make of an axis")


def says_mean(along: AxisSet) -> bool:
    """Whether some group has several positions: a mean, not just a zero."""
    return not along.empty and not along.widened().trivial


def _off(x: np.ndarray, along: AxisSet) -> str:
    return f"along {along} (by {np.abs(x - uniformed(x, along)).max():.2g})"


def _wrong(what: str, answer: Any) -> FoldError:
    return FoldError(f"rule: {what}, though it answers {answer}; correct it, or answer Opaque")


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise FoldError(f"rule: {what}; correct it")
