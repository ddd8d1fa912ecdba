"""What is checked of one random network: contracts, facts, gradients, and accuracy when rounded.

Programs run equation by equation, since most are run a few times only.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import jax_lnfold
from jax_lnfold.analysis.claims import Claim
from jax_lnfold.folded import placed_again
from jax_lnfold.placement.hiding import hidden_means
from jax_lnfold.placement.place import Placement, place
from jax_lnfold.program.tracing import Traced, trace
from jax_lnfold.rewrite import matrix_unit, variances
from jax_lnfold.rules.partitions import centered, is_uniform, is_zero_mean, uniform_shift
from tests.helpers.contracts import assert_drop_in, assert_identical, relative_difference, snapshot
from tests.helpers.interpreter import Interpreter
from tests.models.networks import Network

MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "fold_affine": {"fold_affine": True},
    "defer_scale": {"defer_scale": True},
    "defer_all": {"defer_scale": True, "deferred_cost": 0.0},
    "reduce_means": {"reduce_means": True},
    "reduce_and_affine": {"reduce_means": True, "fold_affine": True},
    "both": {"fold_affine": True, "defer_scale": True, "deferred_cost": 0.0},
    "untie": {"untie": True},
    "matrix_unit": {"matrix_unit": True},
    "matrix_unit_and_all": {
        "fold_affine": True,
        "defer_scale": True,
        "deferred_cost": 0.0,
        "matrix_unit": True,
    },
    "one_pass": {"respell": "one_pass"},
    "two_pass": {"respell": "two_pass"},
    "one_pass_and_all": {"fold_affine": True, "matrix_unit": True, "respell": "one_pass"},
    "two_pass_and_all": {
        "fold_affine": True,
        "defer_scale": True,
        "deferred_cost": 0.0,
        "respell": "two_pass",
    },
}
FOR_FEW_DIGITS = {"matrix_unit", "one_pass", "matrix_unit_and_all", "one_pass_and_all"}
"""Modes that leave float64 alone."""
ASSUMING = [{}, {"fold_affine": True}, {"reduce_means": True, "defer_scale": True}]
"""Options that values are assumed with."""
ALONE = 2
"""Tolerance claims that are tested by themselves, besides all of them together."""
JITTERS = 4
"""How often the sensitivity of a program to its parameters is measured."""
LESS_ACCURATE = 4.0
"""How much larger a rounded program's error may be once it is folded."""
GRADIENT_DIGITS = 1e-8


def run(traced: Traced, params: Any, inputs: Any) -> list[Any]:
    return Interpreter().run(traced.closed, params, inputs)


def folds(
    network: Network, modes: Sequence[str], found: Counter[str]
) -> Iterator[tuple[str, jax_lnfold.Folded]]:
    """The network folded in these modes, but every plan and program only once."""
    seen: list[jax_lnfold.Folded] = []
    is_double = any(x.dtype == np.float64 for x in jax.tree.leaves(network.params))
    for mode in modes:
        if is_double and mode in FOR_FEW_DIGITS:
            continue
        # Whatever the sizes, and whether or not the order of summation shows.
        with (
            mock.patch.multiple(matrix_unit, TOKENS=1, FEATURES=1, SHORT=32),
            mock.patch.object(variances, "SHORT", 32),
        ):
            folded = jax_lnfold.fold(network.apply, network.params, *network.inputs, **MODES[mode])
        report = folded.report
        assert report.n_folded <= len(report.norms)
        found.update(folds=1, affine=len(report.affine), deferred=len(report.deferred))
        found.update(untied=len(report.untied), products=len(report.on_matrix_unit))
        found.update(respelled=len(report.respelled))
        if not any(f.plan == folded.plan and same_program(f.report, report) for f in seen):
            if not seen:
                found.update(folded=report.n_folded, inserted=report.n_inserted)
                found.update(programs=1, norms=len(report.norms))
            seen.append(folded)
            yield mode, folded


def same_program(one: jax_lnfold.Report, other: jax_lnfold.Report) -> bool:
    def changes(report: jax_lnfold.Report) -> tuple[Any, ...]:
        return report.deferred, report.on_matrix_unit, report.respelled

    return changes(one) == changes(other)


# Contracts.


def check_contracts(network: Network, modes: Sequence[str] = tuple(MODES)) -> Counter[str]:
    """Both programs compute the original function in every mode, and plans can be read back."""
    params, inputs, before = network.params, network.inputs, snapshot(network.params)
    traced = trace(network.apply, params, inputs)
    want, found = run(traced, params, inputs), Counter[str]()
    for mode, folded in folds(network, modes, found):
        check_same(network, traced, folded, folded.params, want, mode)
        text = folded.plan.to_json()
        assert jax_lnfold.FoldPlan.from_json(text) == folded.plan, f"{mode}: the plan's file"
        twice = folded.plan.center(folded.params)
        if relative_difference(twice, folded.params) > 1e-14:  # sets of axes that cross
            check_same(network, traced, folded, twice, want, f"{mode}, centered twice")
    assert_identical(params, before)
    return found


def check_same(
    network: Network,
    traced: Traced,
    folded: jax_lnfold.Folded,
    edited: Any,
    want: list[Any],
    mode: str,
) -> None:
    """Both programs compute with the edited parameters what the original one did."""
    own = without_copies(edited)
    assert_drop_in(own, network.params)
    program = trace(folded.apply, edited, network.inputs)
    for name, made, tree in (
        ("folded program", program, edited),
        ("original program", traced, own),
    ):
        difference = relative_difference(run(made, tree, network.inputs), want)
        if not difference < network.digits:
            moved = sensitivity(traced, network, want, relative_difference)
            assert difference < 100 * moved, f"{mode}: the {name} is off by {difference:.1e}"


def without_copies(tree: Any) -> Any:
    """What the original function takes."""
    return tree.params if isinstance(tree, jax_lnfold.Untied) else tree


def sensitivity(
    traced: Traced, network: Network, want: list[Any], measure: Callable[[Any, Any], float]
) -> float:
    """What rounding the parameters and x does to the results: much only at kinks and jumps."""
    rng, inputs = np.random.default_rng(0), network.inputs

    def jitter(x: Any) -> Any:
        return x * (1 + 4 * np.finfo(x.dtype).eps * rng.uniform(-1, 1, x.shape)).astype(x.dtype)

    moved = (
        run(traced, jax.tree.map(jitter, network.params), inputs._replace(x=jitter(inputs.x)))
        for _ in range(JITTERS)
    )
    return max(measure(got, want) for got in moved)


# Facts.


def by_value(claims: Any) -> dict[int, list[Any]]:
    found: dict[int, list[Any]] = {}
    for value, along in claims:
        found.setdefault(value, []).append(along)
    return found


def check_facts(network: Network) -> Counter[str]:
    """Every fact that a fold rests on is true of numbers."""
    params, inputs = network.params, network.inputs
    folded = jax_lnfold.fold(network.apply, params, *inputs)
    traced = trace(network.apply, params, inputs)
    placement = place(traced.graph())
    assert sum(placement.folded) == folded.report.n_folded
    return Counter(
        facts=check_zero_means(traced, placement, network, folded.params),
        tolerances=check_tolerance(traced, placement, network, folded.params),
    )


def check_zero_means(traced: Traced, placement: Placement, network: Network, params: Any) -> int:
    """With all centerings made, what is called zero-mean is, and what is called uniform is."""
    zero, uniform = by_value(placement.zero), by_value(placement.facts.proved_uniform)
    checked, tolerance = 0, min(network.digits, 1e-5)

    def look(value: int, x: Any) -> Any:
        nonlocal checked
        x = np.asarray(x) if value in zero or value in uniform else x
        for along in (*placement.explicit.get(value, ()), *placement.constants.get(value, ())):
            x = centered(np.asarray(x), along)
        for along in zero.get(value, ()):
            spoilt = not np.isfinite(x).all()
            assert spoilt or is_zero_mean(x, along, tolerance), f"value {value} along {along}"
        for along in uniform.get(value, ()):
            assert is_uniform(x, along, tolerance), f"value {value} along {along}"
        checked += len(zero.get(value, ()))
        return x

    Interpreter(placement.graph, look).run(traced.closed, params, network.inputs)
    return checked


def check_tolerance(traced: Traced, placement: Placement, network: Network, params: Any) -> int:
    """Values that may be shifted are: all of them at once, and some alone."""
    graph = placement.graph
    floats = [
        (value, along)
        for value, along in placement.facts.proved_tolerant
        if np.issubdtype(graph.avals[value].dtype, np.floating) and not along.empty
    ]
    rng = np.random.default_rng(len(floats))
    alone = [[floats[i]] for i in rng.permutation(len(floats))[:ALONE]]
    want = run(traced, params, network.inputs)
    for chosen in [floats, *alone]:
        sets = by_value(chosen)

        def shift(value: int, x: Any, sets: dict[int, list[Any]] = sets) -> Any:
            for along in sets.get(value, ()):
                x = (np.asarray(x) + uniform_shift(rng, along)).astype(x.dtype)
            return x

        got = Interpreter(graph, shift).run(traced.closed, params, network.inputs)
        difference = relative_difference(got, want)
        assert difference < network.digits, f"{describe(chosen)} noticed: {difference:.1e}"
    return len(floats)


# Values that are assumed.


def check_assumed(network: Network) -> Counter[str]:
    """Of constant leaves, a fold rests on no more than its plan says: all else may be anything."""
    rng = np.random.default_rng(len(repr(network)))
    some = {name: with_equal_numbers(rng, x) for name, x in network.params.items()}
    network = replace(network, params=some)
    traced, found = trace(network.apply, some, network.inputs), Counter(programs=1)
    want = run(traced, some, network.inputs)
    for options in ASSUMING:
        plain = jax_lnfold.fold(network.apply, some, *network.inputs, **options)
        folded = jax_lnfold.fold(
            network.apply, some, *network.inputs, assume_values=True, **options
        )
        check_same(network, traced, folded, folded.params, want, f"values, {options}")
        plan, gained = folded.plan, folded.report.n_folded - plain.report.n_folded
        assert jax_lnfold.FoldPlan.from_json(plan.to_json()) == plan
        assert plan.assumed or plan == plain.plan
        found.update(folds=1, gained=gained, assumed=len(plan.assumed))
        if plan.assumed:
            other = replace(network, params={p: other_of(rng, plan, p, x) for p, x in some.items()})
            again = jax_lnfold.fold(
                other.apply, other.params, *other.inputs, plan=plan, center=True, **options
            )
            assert again.report.n_folded == folded.report.n_folded
            own = trace(other.apply, other.params, other.inputs)
            check_same(other, own, again, again.params, run(own, other.params, other.inputs), "own")
    return found


def with_equal_numbers(rng: np.random.Generator, x: np.ndarray) -> np.ndarray:
    """The leaf, or one that is zero, or constant along some axes."""
    kind = rng.integers(4)
    axes = tuple(d for d in range(x.ndim) if rng.integers(2) or x.ndim == 1)
    first = x[tuple(slice(1) if d in axes else slice(None) for d in range(x.ndim))]
    return x if kind == 0 else 0 * x if kind == 1 else np.broadcast_to(first, x.shape).copy()


def other_of(
    rng: np.random.Generator, plan: jax_lnfold.FoldPlan, path: str, x: np.ndarray
) -> np.ndarray:
    """Other numbers for a leaf, which are what the plan takes them to be."""
    new = rng.standard_normal(x.shape) / 2 + 0.1
    for edit in plan.assumed:
        if edit.key_path == path and edit.state == "constant":
            new = np.broadcast_to(
                new[tuple(slice(1) if e == "all" else slice(None) for e in edit.along.entries)],
                x.shape,
            ).copy()
    for edit in plan.assumed:
        if edit.key_path == path and edit.state == "centered":
            new = centered(new, edit.along) + edit.mean
    return new.astype(x.dtype)


# Means left out.


def check_left_out(network: Network) -> Counter[str]:
    """All means left out: by LayerNorms for themselves, and where no exact fold rests on one."""
    params, inputs = network.params, network.inputs
    folded = jax_lnfold.fold(
        network.apply, params, *inputs, approximate={"mean"}, budget=math.inf, fold_affine=False
    )
    check_own(network, trace(network.apply, params, inputs), without_copies(folded.params))
    traced, placement = placed_again(folded, folded.params, inputs)
    hidden = (*hidden_means(placement, folded.plan).values(),)
    edited = replace(folded.plan, hidden=hidden).center(params)
    check_own(network, trace(network.apply, params, inputs), without_copies(edited))
    dropped = [placement.norms[i] for i in placement.dropped]
    exact = [n for n, done in zip(placement.norms, placement.folded, strict=True) if done]
    sums = {v for norm in dropped for op in norm.sums for v in op.outputs}
    quotients = {v for norm in dropped for v in norm.quotients}
    before: dict[int, list[Any]] = {}

    def made(value: int, x: Any) -> Any:
        for along in (*placement.explicit.get(value, ()), *placement.constants.get(value, ())):
            x = centered(np.asarray(x), along)
        return x

    def note(value: int, x: Any) -> Any:
        if value in quotients:
            before.setdefault(value, []).append(x)
        return made(value, x)

    def leave_out(value: int, x: Any) -> Any:
        for norm in exact:
            if norm.x == value and np.isfinite(np.asarray(x)).all():
                x = made(value, x)
                assert is_zero_mean(np.asarray(x), norm.along, min(network.digits, 1e-5))
        return jnp.zeros_like(x) if value in sums else made(value, x)

    def but_for_itself(value: int, x: Any) -> Any:
        return before[value].pop(0) if value in quotients else leave_out(value, x)

    run_with = partial(Interpreter, placement.graph)
    given = traced.closed, folded.params, inputs
    want = run_with(note).run(*given)
    with_all = run_with(but_for_itself).run(*given)
    assert relative_difference(with_all, want) < network.digits, "something else reads a mean"
    got = run(trace(folded.apply, folded.params, inputs), folded.params, inputs)
    without = run_with(leave_out).run(*given)
    assert relative_difference(got, without) < network.digits, "not the program without means"
    changed = relative_difference(got, want) > network.digits
    return Counter(
        programs=1,
        left_out=len(dropped),
        exact=len(exact),
        changed=changed,
        hidden=len(hidden),
    )


def check_own(network: Network, traced: Traced, edited: Any) -> None:
    """The original program computes the same of edited parameters."""
    want, got = (run(traced, p, network.inputs) for p in (network.params, edited))
    difference = relative_difference(got, want)
    if not difference < network.digits:
        assert difference < 100 * sensitivity(traced, network, want, relative_difference)


def check_no_budget(network: Network) -> Counter[str]:
    """Without a budget it is the program that there is without an approximation."""
    params, inputs = network.params, network.inputs
    others = inputs._replace(x=inputs.x[::-1])
    try:
        folded = jax_lnfold.fold(
            network.apply,
            params,
            *inputs,
            approximate={"mean"},
            budget=0,
            calibrate=[(*others,), (*inputs,)],
        )
    except jax_lnfold.FoldError as error:
        if "NaN" not in str(error):
            raise
        return Counter(nan=1)
    plain = jax_lnfold.fold(network.apply, params, *inputs)
    programs = [jax.make_jaxpr(f.apply)(params, *inputs) for f in (folded, plain)]
    assert str(programs[0]) == str(programs[1])
    damages = folded.report.approximation.damages
    return Counter(programs=1, measured=len(damages), edited=folded.plan != plain.plan)


def describe(claims: list[Claim]) -> str:
    shown = ", ".join(f"value {value} along {along}" for value, along in claims[:3])
    return f"a shift of {shown}" if len(claims) < 4 else f"a shift of {len(claims)} values"


# Gradients.


def check_gradients(network: Network, modes: Sequence[str] = tuple(MODES)) -> Counter[str]:
    """Through `plan.center`, gradients for all parameters and x are those of the original."""
    params, inputs, found = network.params, network.inputs, Counter[str]()

    def gradient(apply: Callable[..., Any]) -> Traced:
        def projected(*arguments: Any) -> jax.Array:
            rng = np.random.default_rng(0)
            results = jax.tree.leaves(apply(*arguments))
            return sum((jnp.vdot(x, rng.standard_normal(x.shape)) for x in results), jnp.zeros(()))

        return trace(jax.grad(projected, (0, 1)), params, inputs)

    original = gradient(network.apply)
    want = run(original, params, inputs)
    for mode, folded in folds(network, modes, found):

        def centered_apply(p: Any, *a: Any, folded: jax_lnfold.Folded = folded) -> Any:
            return folded.apply(folded.plan.center(folded.plan.extend(p)), *a)

        got = run(gradient(centered_apply), params, inputs)
        difference = gradient_difference(got, want)
        if not difference < GRADIENT_DIGITS:
            moved = sensitivity(original, network, want, gradient_difference)
            assert difference < 100 * moved, f"{mode}: gradients are off by {difference:.1e}"
            found.update(kinks=1)
    return found


def gradient_difference(got: list[Any], want: list[Any]) -> float:
    """Relative to the gradient of each leaf, unless that is next to nothing."""
    largest = max(float(np.abs(w).max(initial=0)) for w in want)
    worst = 0.0
    for g, w in zip(map(np.asarray, got), map(np.asarray, want), strict=True):
        odd = ~(np.isfinite(g) & np.isfinite(w))
        if not np.array_equal(g[odd], w[odd], equal_nan=True):
            return float("inf")
        gap, scale = np.abs((g - w)[~odd]).max(initial=0), np.abs(w[~odd]).max(initial=0)
        worst = max(worst, float(gap) / (max(float(scale), 1e-4 * largest) or 1.0))
    return worst


# Low precision.


def check_precision(
    network: Network, dtype: Any, modes: Sequence[str] = tuple(MODES)
) -> tuple[Counter[str], list[float]]:
    """Folded and rounded to `dtype`, a network is about as accurate as it was; by what factors.

    Errors are root mean squares against the same numbers in float64. The yardstick is the original
    program, also with parameters rounded once more, as every edit rounds them.
    """
    rounded = network.astype(dtype)
    exact = rounded.astype(np.float64)
    params, inputs, found = rounded.params, rounded.inputs, Counter[str]()
    want = run(trace(exact.apply, exact.params, exact.inputs), exact.params, exact.inputs)
    original = trace(rounded.apply, params, inputs)
    rng, unit = np.random.default_rng(0), float(jnp.finfo(dtype).eps)

    def jitter(x: Any) -> Any:
        return (x.astype(np.float64) * (1 + unit / 2 * rng.uniform(-1, 1, x.shape))).astype(dtype)

    def error(traced: Traced, p: Any) -> float:
        return error_of(run(traced, p, inputs), want)

    yardsticks = [error(original, jax.tree.map(jitter, params)) for _ in range(JITTERS)]
    yardstick = float(np.sqrt(np.mean(np.square([error(original, params), *yardsticks]))))
    ratios = []
    for mode, folded in folds(rounded, modes, found):
        program = trace(folded.apply, folded.params, inputs)
        for name, made, tree in (
            ("folded program", program, folded.params),
            ("original program", original, without_copies(folded.params)),
        ):
            got = error(made, tree)
            ratios.append(got / yardstick if yardstick > unit / 100 else 1.0)
            shown = f"{mode}: the {name} has an error of {got:.1e}, not {yardstick:.1e}"
            assert got <= LESS_ACCURATE * yardstick + unit, shown
    return found, ratios


def error_of(got: list[Any], want: list[Any]) -> float:
    """Root mean square error of all results, each relative to its own size."""
    squares = []
    for g, w in zip(got, want, strict=True):
        g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
        assert np.array_equal(np.isfinite(g), np.isfinite(w)), "overflows in one of them"
        kept = np.isfinite(w)
        size = np.square(w[kept]).mean() if kept.any() else 0.0
        squares.append(np.square(g[kept] - w[kept]).mean() / size if size else 0.0)
    return float(np.sqrt(np.mean(squares)))
