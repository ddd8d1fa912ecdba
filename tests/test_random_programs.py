"""Random networks: a fold computes the same function, and everything it rests on is true.

`python tests/test_random_programs.py --programs 10000` checks many, with a summary.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from typing import Any

import jax
import numpy as np
import pytest
from contracts import assert_drop_in, assert_identical, relative_difference, snapshot
from hypothesis import given
from interpreter import Interpreter
from networks import Network, examples, networks
from partitions import centered, is_uniform, is_zero_mean, uniform_shift
from tqdm import tqdm

import jax_lnfold
from jax_lnfold.facts import Claim
from jax_lnfold.placement import Placement, place
from jax_lnfold.program import Traced, trace

PROGRAMS_AT_ONCE = 50
ALONE = 2
"""Tolerance claims that are tested by themselves, besides all of them together."""


def by_value(claims: Any) -> dict[int, list[Any]]:
    found: dict[int, list[Any]] = {}
    for value, along in claims:
        found.setdefault(value, []).append(along)
    return found


def check_facts(traced: Traced, placement: Placement, network: Network, params: Any) -> int:
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
    want = Interpreter().run(traced.closed, params, network.inputs)
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


def describe(claims: list[Claim]) -> str:
    shown = ", ".join(f"value {value} along {along}" for value, along in claims[:3])
    return f"a shift of {shown}" if len(claims) < 4 else f"a shift of {len(claims)} values"


def check_same(traced: Traced, network: Network, folded: jax_lnfold.Folded, want: Any) -> None:
    """Both programs compute with the edited parameters what the original one did."""
    program = trace(folded.apply, folded.params, network.inputs).closed
    for name, closed in {"folded program": program, "original program": traced.closed}.items():
        got = Interpreter().run(closed, folded.params, network.inputs)
        difference = relative_difference(got, want)
        assert difference < network.digits, f"the {name} is off by {difference:.1e}"
    assert_drop_in(folded.params, network.params)


def check(network: Network) -> Counter[str]:
    """Fold one network and check everything; what was found."""
    params, inputs, before = network.params, network.inputs, snapshot(network.params)
    folded = jax_lnfold.fold(network.apply, params, *inputs)
    report = folded.report
    assert report.n_inserted <= report.n_folded <= len(report.norms)
    traced = trace(network.apply, params, inputs)
    want = Interpreter().run(traced.closed, params, inputs)
    check_same(traced, network, folded, want)
    options = {"fold_affine": True, "defer_scale": True, "deferred_cost": 0.0}
    everything = jax_lnfold.fold(network.apply, params, *inputs, **options)
    if everything.report.affine or everything.report.deferred:
        check_same(traced, network, everything, want)
    assert_identical(params, before)
    placement = place(traced.graph())
    assert sum(placement.folded) == report.n_folded
    facts = check_facts(traced, placement, network, folded.params)
    claims = check_tolerance(traced, placement, network, folded.params)
    return Counter(
        programs=1,
        norms=len(report.norms),
        folded=report.n_folded,
        inserted=report.n_inserted,
        affine=len(everything.report.affine),
        deferred=len(everything.report.deferred),
        facts=facts,
        tolerances=claims,
    )


def check_many(number: int, count: int) -> Counter[str]:
    """Check `count` networks, the ones with this number; the first that fails is shown."""
    found: Counter[str] = Counter()

    @examples(number, count)
    @given(networks())
    def test(network: Network) -> None:
        found.update(check(network))

    test()
    return found


SLOW = pytest.mark.slow


@pytest.mark.parametrize("number", [*range(3), *(pytest.param(n, marks=SLOW) for n in range(3, 6))])
def test_random_programs(number: int) -> None:
    found = check_many(number, PROGRAMS_AT_ONCE)
    assert found["programs"] >= PROGRAMS_AT_ONCE
    share = found["folded"] / found["norms"]
    assert 0.1 < share < 0.9, "the programs should have something to find and to refuse"
    assert found["facts"] > found["folded"]
    assert found["tolerances"] > found["folded"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=1000, help="the first seed, of 50 programs")
    options = parser.parse_args()
    found: Counter[str] = Counter()
    failures, start = [], time.monotonic()
    for number in tqdm(range(options.first, options.first + options.programs // PROGRAMS_AT_ONCE)):
        try:
            found += check_many(number, PROGRAMS_AT_ONCE)
        except Exception as error:
            failures.append(number)
            tqdm.write(f"seed {number}: {error}")
        if number % 20 == 19:  # 1,000 programs; compiled operations pile up
            jax.clear_caches()
            tqdm.write(f"{dict(found)} failing seeds: {failures}")
    print(dict(found), f"failing seeds: {failures}", f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    import conftest  # noqa: F401  the same settings as under pytest

    main()
