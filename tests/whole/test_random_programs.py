"""Random networks: a fold computes the same function, and everything it rests on is true.

`python -m tests.whole.test_random_programs --programs 10000` checks many, with a summary. The
network of a number is always the same: ``--first 123 --programs 1`` checks one again, and shows
what fails in as few steps as fail.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations_with_replacement
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tqdm import tqdm

from jax_lnfold import dropping
from jax_lnfold.placement.droppable import why_kept
from jax_lnfold.plan.plan import FoldPlan
from tests.helpers.network_checks import (
    MODES,
    check_assumed,
    check_contracts,
    check_facts,
    check_gradients,
    check_left_out,
    check_no_budget,
    check_precision,
)
from tests.models.kernel_networks import random_kernel_network
from tests.models.networks import Network, random_network

ALONE = {
    "facts": check_facts,
    "left_out": check_left_out,
    "no_budget": check_no_budget,
    "assumed": check_assumed,
}
"""Checks that choose their options themselves."""
CHECKS = ("contracts", "kernels", "gradients", "float32", "bfloat16", *ALONE)
SHOWN = (0.01, 0.5, 0.9, 0.99, 1.0)


@dataclass
class Found:
    """What checking many networks found."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: dict[int, str] = field(default_factory=dict)
    ratios: list[float] = field(default_factory=list)
    """Errors of folded programs, relative to those of the originals."""

    def __str__(self) -> str:
        lines = [", ".join(f"{self.counts[name]:,} {name}" for name in sorted(self.counts))]
        if self.ratios:
            quantiles = zip(SHOWN, np.quantile(self.ratios, SHOWN), strict=True)
            shown = ", ".join(f"{q:.0%}: {value:.2f}" for q, value in quantiles)
            lines.append(f"error of folded programs / of the originals: {shown}")
        return "\n".join([*lines, f"{len(self.failures)} failures: {[*self.failures]}"])


def check(name: str, network: Network, modes: Sequence[str], found: Found) -> None:
    """One of `CHECKS`; a failure raises."""
    if name in ("contracts", "kernels", "gradients"):
        checked = check_gradients if name == "gradients" else check_contracts
        found.counts += checked(network, modes)
    elif name in ALONE:
        found.counts += ALONE[name](network)
    else:
        counts, ratios = check_precision(network, jnp.dtype(name), modes)
        found.counts += counts
        found.ratios += ratios


def network_for(name: str, number: int) -> Network:
    if name == "kernels":
        return random_kernel_network(number)
    statistics = name in ("left_out", "no_budget")
    return random_network(number, smooth=name not in ("contracts", *ALONE), statistics=statistics)


def check_many(
    names: Sequence[str],
    numbers: Iterable[int],
    modes: Sequence[str] = tuple(MODES),
    failed: Callable[[str, int, Exception], None] = lambda *_: None,
) -> Found:
    found = Found()
    for number in numbers:
        for name in names:
            try:
                check(name, network_for(name, number), modes, found)
            except Exception as error:
                found.failures[number] = f"{name}: {type(error).__name__}: {error}"
                failed(name, number, error)
    return found


def shown(name: str, number: int, modes: Sequence[str], error: Exception) -> str:
    """How to see a failure again, and the smallest network that fails in the same way."""

    def fails(network: Network) -> bool:
        try:
            check(name, network, modes, Found())
        except Exception as other:
            return type(other) is type(error)
        return False

    again = f"--check {name} --modes {' '.join(modes)} --first {number} --programs 1"
    smallest = network_for(name, number).shrunk(fails)
    return f"{again}: {type(error).__name__}: {error}\n  {smallest}"


# Every third number has the same sizes, which saves compilations.


@pytest.mark.parametrize("count", [24, pytest.param(1000, marks=pytest.mark.slow)])
def test_contracts(count: int) -> None:
    found = check_many(["contracts"], range(0, 3 * count, 3))
    assert not found.failures
    counts = found.counts
    assert counts["programs"] == count
    share = counts["folded"] / counts["norms"]
    assert 0.1 < share < 0.9, "the programs should have something to find and to refuse"
    assert min(counts["affine"], counts["deferred"], counts["respelled"]) > 5


@pytest.mark.parametrize("count", [9, pytest.param(300, marks=pytest.mark.slow)])
def test_kernels(count: int) -> None:
    found = check_many(["kernels"], range(0, 3 * count, 3), ["plain", "both"])
    assert not found.failures
    assert found.counts["folded"] > found.counts["norms"] / 10
    assert min(found.counts["affine"], found.counts["deferred"]) > 0


@pytest.mark.parametrize("count", [40, pytest.param(300, marks=pytest.mark.slow)])
def test_facts(count: int) -> None:
    found = check_many(["facts"], range(0, 3 * count, 3))
    assert not found.failures
    assert min(found.counts["facts"], found.counts["tolerances"]) > 100


@pytest.mark.wide
@pytest.mark.parametrize("count", [24, pytest.param(300, marks=pytest.mark.slow)])
def test_means_left_out(count: int) -> None:
    found = check_many(["left_out"], range(0, 3 * count, 3))
    assert not found.failures
    assert min(found.counts[name] for name in ("left_out", "exact", "changed")) > 5
    assert found.counts["hidden"] > 1


@pytest.mark.parametrize("count", [16, pytest.param(300, marks=pytest.mark.slow)])
def test_values_that_are_assumed(count: int) -> None:
    found = check_many(["assumed"], range(0, 3 * count, 3))
    assert not found.failures
    assert min(found.counts["gained"], found.counts["assumed"]) > 1


@pytest.mark.wide
@pytest.mark.parametrize("count", [4, pytest.param(60, marks=pytest.mark.slow)])
def test_without_a_budget_means_stay(count: int) -> None:
    found = check_many(["no_budget"], range(10_000, 10_000 + count))
    assert not found.failures
    assert min(found.counts["measured"], found.counts["edited"]) > 0


@pytest.mark.wide
def test_gradients() -> None:
    found = check_many(["gradients"], range(0, 21, 3), ["both"])
    assert not found.failures
    assert min(found.counts["folded"], found.counts["affine"]) > 0


@pytest.mark.wide
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rounded_programs_are_as_accurate(dtype: str) -> None:
    modes = ["both", "matrix_unit_and_all", "one_pass_and_all", "two_pass_and_all"]
    found = check_many([dtype], range(0, 24, 3), modes)
    assert not found.failures
    made = ("folded", "affine", "respelled", *["products"] * (dtype == "float32"))
    assert min(found.counts[name] for name in made) > 0
    assert np.quantile(found.ratios, 0.9) < 1.4


def test_any_two_roles_meet_in_one_leaf() -> None:
    met: set[tuple[str, str]] = set()
    for number in range(500):
        readers: dict[str, list[str]] = {}
        for role, name in random_network(number).roles:
            readers.setdefault(name, []).append(role)
        for roles in readers.values():
            ordered = sorted(roles)
            met |= {(a, b) for i, a in enumerate(ordered) for b in ordered[i + 1 :]}
    roles = ["bias", "constant", "gate", "kernel", "scale", "shift", "table"]
    assert met == {*combinations_with_replacement(roles, 2)}


def test_a_network_follows_from_its_number() -> None:
    one, other = random_network(7), random_network(7)
    assert repr(one) == repr(other) != repr(random_network(8))
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)


def with_edits(change: Callable[[Any], Any]) -> Callable[..., Any]:
    """`FoldPlan.center`, but for a change of all leaves that it edits."""
    center = FoldPlan.center

    def changed(plan: FoldPlan, params: Any, donate: bool = False) -> Any:
        made, edited = center(plan, params, donate), plan.leaf_edits()
        return {name: change(x) if name in edited else x for name, x in made.items()}

    return changed


@pytest.mark.wide
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("contracts", lambda x: x * (1 + 1e-4 * np.arange(x.size).reshape(x.shape))),
        ("gradients", jax.lax.stop_gradient),
        ("float32", lambda x: x.astype(jnp.bfloat16).astype(x.dtype)),
        ("bfloat16", lambda x: x.astype(jnp.float8_e5m2).astype(x.dtype)),
    ],
)
def test_wrong_edits_are_noticed(
    name: str, change: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FoldPlan, "center", with_edits(change))
    assert any(check_many([name], [n], ["plain"]).failures for n in range(0, 90, 3))


@pytest.mark.wide
@pytest.mark.parametrize("reason", ["something else reads", "other LayerNorms fold because"])
def test_means_that_must_stay_are_noticed(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If one of the reasons for which a mean stays were forgotten."""

    def forgetful(placement: Any) -> dict[int, str]:
        kept = why_kept(placement).items()
        return {i: "" if why.startswith(reason) else why for i, why in kept}

    monkeypatch.setattr(dropping, "why_kept", forgetful)
    assert check_many(["left_out"], range(48, 63, 3)).failures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--programs", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=10_000, help="the number of the first one")
    parser.add_argument("--check", nargs="+", choices=CHECKS, default=["contracts", "facts"])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    options = parser.parse_args()
    start = time.monotonic()

    def failed(name: str, number: int, error: Exception) -> None:
        tqdm.write(shown(name, number, options.modes, error))

    def numbers() -> Iterable[int]:
        for k in tqdm(range(options.programs), mininterval=10):
            yield options.first + k
            if k % 1000 == 999:
                jax.clear_caches()  # compiled operations pile up

    found = check_many(options.check, numbers(), options.modes, failed)
    last = options.first + options.programs - 1
    print(f"networks {options.first} to {last}, {time.monotonic() - start:.0f} s: {found}")


if __name__ == "__main__":
    import conftest  # noqa: F401  the same settings as under pytest

    main()
