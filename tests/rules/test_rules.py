"""Every rule by itself, against numbers: what it says about axis sets must hold for random data.

The trials are those of `check_rule`, with what the whole program says of uniform values.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from jax_lnfold.analysis.facts import Facts
from jax_lnfold.axes.axis_set import AxisSet
from jax_lnfold.program.flatten import flatten
from jax_lnfold.rules import RULES
from jax_lnfold.rules.check import Trial, is_number, values_of
from jax_lnfold.rules.partitions import is_uniform, random_set
from jax_lnfold.rules.registry import no_axes
from tests.rules.rule_examples import EXAMPLES, PRIMITIVES, Example, Program

SEEDS = 4
SETS = 30


def find(name: str, program: Program, n_leaves: int) -> list[tuple[Facts, Trial]]:
    """The equations of `name`; the first `n_leaves` operands count as parameters."""
    graph = flatten(jax.make_jaxpr(program.fn)(*program.operands), [*map(str, range(n_leaves))])
    facts = Facts(graph)
    values = values_of(graph, {i: np.asarray(x) for i, x in enumerate(program.operands)})
    return [
        (facts, Trial(op, RULES[name], facts.context(op), [values[v] for v in op.inputs]))
        for op in graph.ops
        if op.name == name
    ]


def check_uniform(facts: Facts, one: Trial, out: int, along: AxisSet) -> None:
    """What is deduced about uniform values, from operands and from the whole program."""
    if facts.uniform(one.op.outputs[out], along):
        assert is_uniform(one.evaluate(one.operands)[out], along, one.tolerance), f"{along}"
    one.uniform(out, along)


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
        for facts, one in ones:
            shapes = [one.context.out_shape(i) for i in range(len(one.op.outputs))]
            for out, shape in enumerate(shapes):
                for along in (random_set(rng, shape) for _ in range(SETS)):
                    answers["pull"] += one.pull(out, along)
                    check_uniform(facts, one, out, along)
            for operand, x in enumerate(one.operands):
                for along in (random_set(rng, x.shape) for _ in range(SETS)):
                    answers["push"] += one.push(operand, along)
    few = 3
    assert (answers["pull"] >= few) if given.pull else (answers["pull"] == 0)
    assert (answers["push"] >= few) if given.push else (answers["push"] == 0)


@pytest.mark.parametrize("name", EXAMPLES)
def test_factors_pass_along_axes_that_are_kept(name: str) -> None:
    rng, keeps = np.random.default_rng(0), 0
    for given in EXAMPLES[name]:
        program = given.make(rng)
        for _, one in find(name, program, len(program.operands)):
            keeps += sum(one.axes(i) for i, x in enumerate(one.operands) if is_number(x))
    assert bool(keeps) == (RULES[name].axes is not no_axes)
