"""Every model of the zoo folds exactly as derived, and computes what it did before."""

from __future__ import annotations

from typing import Any

import jax
import pytest

import jax_lnfold
from jax_lnfold.report.report import Report
from tests.helpers.contracts import check_contracts, count_equations, counts, snapshot
from tests.models.zoo import NORMS, ZOO, Case

# Flax's own query and key norms know one spelling only.
FIXED_SPELLING = ("query_ln", "key_ln")


def reductions_removed(report: Report, spelling: str) -> int:
    """Sums over normalised axes that the fold takes out, net of explicit centerings."""
    twice = spelling == "mean_var"  # one sum for the mean, another one inside `jnp.var`
    folded = [norm for norm in report.norms if norm.folded]
    removed = sum(2 if twice and not norm.path.endswith(FIXED_SPELLING) else 1 for norm in folded)
    return removed - report.n_inserted


QUICK = {"vit", "clip_vision", "dinov2", "mixer_narrow", "gpt2", "bert"}


def wide(value: Any, is_wide: bool) -> Any:
    """A parameter, marked if it is wide."""
    return pytest.param(value, marks=[pytest.mark.wide] * is_wide)


@pytest.mark.parametrize("case", [wide(case, str(case) not in QUICK) for case in ZOO], ids=str)
def test_contracts_hold_at_two_shapes(case: Case) -> None:
    model = case.build()
    before = snapshot(model.params)
    apply_fn = jax.jit(model.apply_fn)  # one compilation instead of one per operation
    folded = jax_lnfold.fold(apply_fn, model.params, *model.inputs)
    for inputs in (model.inputs, model.other_inputs):
        check_contracts(apply_fn, model.params, folded, *inputs, before=before)


@pytest.mark.parametrize("spelling", [wide(name, name != "one_pass") for name in NORMS])
@pytest.mark.parametrize("case", ZOO, ids=str)
def test_counts_and_reductions(case: Case, spelling: str) -> None:
    model = case.build(spelling)
    folded = jax_lnfold.fold(model.apply_fn, model.params, *model.inputs)
    report = folded.report
    assert counts(report) == (case.norms, case.folded, case.inserted)
    assert all(bool(norm.reason) != norm.folded for norm in report.norms)
    other = [model.other_inputs] * (spelling == "one_pass")  # what it counts, the others say, too
    for inputs in (model.inputs, *other):
        before = count_equations("reduce_sum", model.apply_fn, model.params, *inputs)
        after = count_equations("reduce_sum", folded.apply, folded.params, *inputs)
        assert before - after == reductions_removed(report, spelling)
