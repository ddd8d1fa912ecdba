"""The minimum cut against every assignment of small graphs."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations

import numpy as np
import pytest

from jax_lnfold.placement.min_cut import MinCut

Term = tuple[str, tuple[int, ...], int | None]
"""What is added: the name of the method, its nodes, its cost."""


def random_terms(rng: np.random.Generator, nodes: int, repeated: bool) -> list[Term]:
    terms: dict[tuple[str, tuple[int, ...]], list[int | None]] = {}

    def add(kind: str, of: tuple[int, ...], never: float) -> None:
        cost = None if rng.random() < never else int(rng.integers(0, 6))
        terms.setdefault((kind, of), []).append(cost)

    for _ in range(rng.integers(1, 2 * nodes)):
        a, b = rng.permutation(nodes)[:2].tolist()
        add("cost_if_no", (a,), 0)
        add("cost_if_yes", (b,), 0.2)
        add("implies", tuple(rng.permutation(nodes)[:2].tolist()), 0.5)
    return [
        (kind, of, cost)
        for (kind, of), costs in terms.items()
        for cost in (costs if repeated else costs[:1])
    ]


def cost_of(terms: Iterable[Term], yes: set[int]) -> float:
    """The cost of an assignment, infinite where it is forbidden."""
    total = 0.0
    for kind, of, cost in terms:
        paid = {
            "cost_if_no": of[0] not in yes,
            "cost_if_yes": of[0] in yes,
            "implies": of[0] in yes and of[-1] not in yes,
        }[kind]
        total += (float("inf") if cost is None else cost) if paid else 0
    return total


def built(terms: Iterable[Term]) -> MinCut:
    cut = MinCut()
    for kind, of, cost in terms:
        getattr(cut, kind)(*of, cost)
    return cut


def assignments(nodes: int) -> list[set[int]]:
    return [set(c) for size in range(nodes + 1) for c in combinations(range(nodes), size)]


@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize("seed", range(60))
def test_cheapest_assignment_with_the_fewest_yes(seed: int, repeated: bool) -> None:
    rng = np.random.default_rng(seed)
    nodes = int(rng.integers(2, 7))
    terms = random_terms(rng, nodes, repeated)
    cost, yes = built(terms).solve()
    assert isinstance(cost, int)
    assert yes <= set(range(nodes))
    costs = [(cost_of(terms, a), a) for a in assignments(nodes)]
    best = min(c for c, _ in costs)
    assert cost == best == cost_of(terms, yes)
    assert len(yes) == min(len(a) for c, a in costs if c == best)


def test_without_costs_every_node_is_no() -> None:
    cut = MinCut()
    cut.implies("a", "b")
    cut.cost_if_yes("a", 1)
    assert cut.solve() == (0, set())
    assert MinCut().solve() == (0, set())


def test_one_payment_serves_all_that_imply_it() -> None:
    cut = MinCut()
    for reader in ("x", "y"):
        cut.cost_if_no(reader, 2)
        cut.implies(reader, ("shared", 1))
    cut.cost_if_yes(("shared", 1), 3)
    assert cut.solve() == (3, {"x", "y", ("shared", 1)})
    cut.cost_if_yes(("shared", 1), 2)
    assert cut.solve() == (4, set())


@pytest.mark.parametrize("order", [(3, None), (None, 3), (None, None)])
def test_forbidden_stays_forbidden(order: tuple[int | None, ...]) -> None:
    cut = MinCut()
    cut.cost_if_no("a", 10)
    for cost in order:
        cut.cost_if_yes("a", cost)
    assert cut.solve() == (10, set())


def test_large_costs_stay_exact() -> None:
    cut = MinCut()
    cut.cost_if_no("a", 2**70 + 1)
    cut.cost_if_yes("a", 2**70)
    assert cut.solve() == (2**70, {"a"})
