"""Every rule by itself, against numbers: what it says about axis sets must hold for random data.

A wrong rule is a wrong answer for somebody, so each claim is checked as it is used: operands made
zero-mean, uniform or shifted exactly as the rule asks, one equation evaluated, the result
inspected. Groups of positions are spelled out by `partitions`, not by the library.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from jax_lnfold.analysis.facts import Facts
from jax_lnfold.axes.axis_set import AxisSet
from jax_lnfold.axes.labels import ALL, FREE, Labels, canonical
from jax_lnfold.program.flatten import flatten
from jax_lnfold.program.graph import Op
from jax_lnfold.rules import RULES, Context, Opaque, Rule
from jax_lnfold.rules.registry import no_axes
from tests.helpers.partitions import (
    axis_labels,
    centered,
    group_ids,
    is_uniform,
    is_zero_mean,
    random_set,
    uniform_shift,
    uniformed,
)
from tests.rules.rule_examples import EXAMPLES, PRIMITIVES, Example, Program

SEEDS = 4
SETS = 30


class OneOp(NamedTuple):
    """One equation of a program, with the values that its operands have for the given inputs."""

    facts: Facts
    op: Op
    rule: Rule
    context: Context
    operands: list[np.ndarray]

    def evaluate(self, operands: Sequence[Any]) -> list[np.ndarray]:
        return evaluate(self.op, operands)

    def tolerance(self) -> float:
        made = [v.aval.dtype for v in self.op.eqn.outvars]
        low = {np.dtype(np.float32), np.dtype(np.complex64)}
        return 1e-5 if low & {*(x.dtype for x in self.operands), *made} else 1e-10


@cache
def runner(op: Op) -> Callable[..., Any]:
    run = partial(op.eqn.primitive.bind, **op.params)
    compiled = op.name in ("pvary", "layout_constraint")  # they cannot run by themselves
    return jax.jit(run) if compiled else run


def evaluate(op: Op, operands: Sequence[Any]) -> list[np.ndarray]:
    made = runner(op)(*operands)
    return [np.asarray(y) for y in (made if op.eqn.primitive.multiple_results else [made])]


def find(name: str, program: Program, n_leaves: int) -> list[OneOp]:
    """The equations of `name`; the first `n_leaves` operands count as parameters."""
    graph = flatten(jax.make_jaxpr(program.fn)(*program.operands), [*map(str, range(n_leaves))])
    facts = Facts(graph)
    values = {i: np.asarray(x) for i, x in enumerate(program.operands)}
    values |= {v: np.asarray(x) for v, x in graph.constants.items()}
    for op in graph.ops:
        made = evaluate(op, [values[v] for v in op.inputs])
        values |= dict(zip(op.outputs, made, strict=True))
    return [
        OneOp(facts, op, RULES[name], facts.context(op), [values[v] for v in op.inputs])
        for op in graph.ops
        if op.name == name
    ]


def is_number(x: np.ndarray) -> bool:
    """A real or complex one."""
    return np.issubdtype(x.dtype, np.inexact)


def check_form(found: AxisSet, shape: tuple[int, ...]) -> None:
    """Equal partitions have one spelling, so that sets can be compared and remembered."""
    assert found.shape == shape
    for entry, size in zip(found.entries, shape, strict=True):
        assert entry in (FREE, ALL) or isinstance(entry, Labels)
        assert canonical(axis_labels(entry, size)) == entry


def says_mean(along: AxisSet) -> bool:
    """Whether some group has several positions: a mean, not just a zero."""
    return not along.empty and not along.widened().trivial


def check_pull(one: OneOp, out: int, along: AxisSet) -> bool:
    """Whether the rule has an answer for `out`; the answer must hold."""
    pulled = one.rule.pull(one.context, out, along)
    if isinstance(pulled, Opaque):
        assert pulled.why
        return False
    zeroed, constant = list(one.operands), list(one.operands)
    for i, needed in pulled.needs:
        assert zeroed[i] is one.operands[i], "an operand is named twice"
        assert is_number(one.operands[i])
        check_form(needed, one.operands[i].shape)
        zeroed[i], constant[i] = centered(zeroed[i], needed), uniformed(constant[i], needed)
    result = one.evaluate(zeroed)[out]
    assert is_zero_mean(result, along, one.tolerance()), f"zero mean: {along} from {pulled}"
    if pulled.exact:
        result = one.evaluate(constant)[out]
        assert is_uniform(result, along, one.tolerance()), f"uniform: {along} from {pulled}"
    return not along.empty and any(says_mean(s) for _, s in pulled.needs)


def check_push(one: OneOp, operand: int, along: AxisSet) -> bool:
    """Whether the rule has an answer for `operand`; the answer must hold."""
    pushed = one.rule.push(one.context, operand, along)
    if isinstance(pushed, Opaque):
        assert pushed.why
        return False
    assert is_number(one.operands[operand])
    after = dict(pushed)
    assert len(after) == len(pushed), "an output is named twice"
    rng = np.random.default_rng(0)
    shifted = list(one.operands)
    shifted[operand] = shifted[operand] + uniform_shift(rng, along, shifted[operand].dtype)
    for out, (x, y) in enumerate(
        zip(one.evaluate(one.operands), one.evaluate(shifted), strict=True)
    ):
        change = y - x
        found = after.get(out)
        inside = group_ids(found) >= 0 if found else np.zeros(x.shape, bool)
        assert np.abs(change[~inside]).max(initial=0) < one.tolerance(), f"elsewhere: {along}"
        if found:
            check_form(found, x.shape)
            assert is_uniform(change, found, one.tolerance()), f"{along} does not become {found}"
    return any(says_mean(s) for s in after.values())


def check_uniform(one: OneOp, out: int, along: AxisSet) -> None:
    """What is deduced about uniform values, from operands and from the whole program."""
    result = one.evaluate(one.operands)[out]
    if one.facts.uniform(one.op.outputs[out], along):
        assert is_uniform(result, along, one.tolerance()), f"{along}"
    if one.rule.uniform is not None:
        answer = one.rule.uniform(one.context, out, along)
        if isinstance(answer, Opaque) or not answer.exact:
            return
        constant = list(one.operands)
        for i, needed in answer.needs:
            check_form(needed, one.operands[i].shape)
            constant[i] = uniformed(constant[i], needed)
        assert is_uniform(one.evaluate(constant)[out], along, one.tolerance()), f"{along}"


def check_axes(one: OneOp, operand: int) -> bool:
    """Whether the output keeps axes of the operand; factors along them must pass the operation."""
    x, before = one.operands[operand], one.evaluate(one.operands)[0]
    kept = one.rule.axes(one.context, operand)
    for axis, after in kept.items():
        assert isinstance(after, int)
        assert x.shape[axis] == before.shape[after]
        factor = np.random.default_rng(0).integers(1, 4, x.shape[axis])
        scaled = [*one.operands]
        scaled[operand] = (x * factor.reshape(-1, *[1] * (x.ndim - axis - 1))).astype(x.dtype)
        want = before * factor.reshape(-1, *[1] * (before.ndim - after - 1))
        assert np.allclose(one.evaluate(scaled)[0], want, atol=10 * one.tolerance()), axis
    return bool(kept)


def cases() -> list[Any]:
    return [
        pytest.param(name, given, id=f"{name}-{i}")
        for name, examples in EXAMPLES.items()
        for i, given in enumerate(examples)
    ]


def test_every_rule_has_examples() -> None:
    missing = {name for name in RULES if name in PRIMITIVES and name not in EXAMPLES}
    assert not missing
    assert EXAMPLES.keys() <= RULES.keys()
    assert len(PRIMITIVES.keys() & RULES.keys()) > 80


@pytest.mark.parametrize(("name", "given"), cases())
def test_rule_against_numbers(name: str, given: Example) -> None:
    answers = {"pull": 0, "push": 0}
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        program = given.make(rng)
        ones = find(name, program, int(rng.integers(0, len(program.operands) + 1)))
        assert ones, "the program does not contain the primitive"
        for one in ones:
            shapes = [tuple(v.aval.shape) for v in one.op.eqn.outvars]
            for out, shape in enumerate(shapes):
                for along in (random_set(rng, shape) for _ in range(SETS)):
                    answers["pull"] += check_pull(one, out, along)
                    check_uniform(one, out, along)
            for operand, x in enumerate(one.operands):
                for along in (random_set(rng, x.shape) for _ in range(SETS)):
                    answers["push"] += check_push(one, operand, along)
    few = 3
    assert (answers["pull"] >= few) if given.pull else (answers["pull"] == 0)
    assert (answers["push"] >= few) if given.push else (answers["push"] == 0)


@pytest.mark.parametrize("name", EXAMPLES)
def test_factors_pass_along_axes_that_are_kept(name: str) -> None:
    rng, keeps = np.random.default_rng(0), 0
    for given in EXAMPLES[name]:
        program = given.make(rng)
        for one in find(name, program, len(program.operands)):
            keeps += sum(check_axes(one, i) for i, x in enumerate(one.operands) if is_number(x))
    assert bool(keeps) == (RULES[name].axes is not no_axes)
