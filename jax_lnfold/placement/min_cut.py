"""Minimum s-t cut over a graph of yes/no choices."""

from __future__ import annotations

from collections.abc import Hashable

import networkx as nx


class MinCut:
    """Collects costs and implications between yes/no nodes and finds the cheapest assignment.

    A node that is not forced either way and costs nothing is *no*.
    """

    _SOURCE, _SINK = -1, -2

    def __init__(self) -> None:
        """Start with no nodes."""
        self._graph = nx.DiGraph()
        self._graph.add_nodes_from((self._SOURCE, self._SINK))
        self._numbers: dict[Hashable, int] = {}  # networkx hashes nodes over and over

    def cost_if_no(self, node: Hashable, cost: int) -> None:
        """Pay `cost` when `node` is *no*."""
        self._add(self._SOURCE, self._number(node), cost)

    def cost_if_yes(self, node: Hashable, cost: int | None) -> None:
        """Pay `cost` when `node` is *yes*; None forbids it."""
        self._add(self._number(node), self._SINK, cost)

    def implies(self, node: Hashable, other: Hashable, cost: int | None = None) -> None:
        """`node` = *yes* with `other` = *no* costs `cost`; None forbids it."""
        self._add(self._number(node), self._number(other), cost)

    def solve(self) -> tuple[int, set[Hashable]]:
        """The smallest total cost and the nodes that are *yes* in an assignment that has it."""
        if not self._graph.in_degree(self._SOURCE):
            return 0, set()
        cost, (_, yes) = nx.minimum_cut(self._graph, self._SINK, self._SOURCE)
        return cost, {node for node, number in self._numbers.items() if number in yes}

    def _number(self, node: Hashable) -> int:
        return self._numbers.setdefault(node, len(self._numbers))

    def _add(self, head: int, tail: int, cost: int | None) -> None:
        # Kept reversed, so that *yes* is the target's side: there networkx puts only what the last
        # flow still lets reach the target, the fewest nodes of all optima. It does not promise to:
        # `test_cheapest_assignment_with_the_fewest_yes` holds it to that.
        if cost is None:
            self._graph.add_edge(tail, head)  # networkx: no capacity attribute = infinite
            self._graph.edges[tail, head].pop("capacity", None)
            return
        known = self._graph.get_edge_data(tail, head)
        if known is None:
            self._graph.add_edge(tail, head, capacity=cost)
        elif "capacity" in known:
            known["capacity"] += cost
