"""The zero-mean graph: which values would have to be zero-mean, and in which ways they can be.

A node is a claim "this value is zero-mean along this axis set at run time". The graph is reached
from the LayerNorms' inputs by walking back through transport (theory, section 3).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from math import prod

import jax.numpy as jnp
import numpy as np

from ..analysis.claims import Blocker, Claim
from ..analysis.facts import Facts
from ..analysis.layer_norms import Norms
from ..axes.axis_set import AxisSet
from ..axes.labels import Labels
from ..rules import Opaque, rule_of
from ..trees import is_editable

UNIT = 1000
"""One LayerNorm element's cost: costs are whole numbers, explicit ones keep three decimals."""


@dataclass
class Node:
    """How a value can be zero-mean along a set: it is, by edit, by insertion, or by its operands.

    `assumed` says that it is so because of the numbers of a leaf. `needs` is None where the
    operands cannot help; `obstacle` then says why. The costs are None where the way is barred.
    `approximate` if it is so by its operands on request only.
    """

    is_zero: bool = False
    edit: bool = False
    assumed: bool = False
    insert: int | None = None
    needs: list[Claim] | None = None
    obstacle: Blocker | None = None
    approximate: bool = False
    intolerant: Blocker | None = None


@dataclass
class ZeroMeanGraph:
    """Builds the nodes reached from the LayerNorms."""

    facts: Facts
    norms: Norms
    explicit_cost: Fraction
    fixed: Mapping[int, tuple[AxisSet, ...]] | None
    nodes: dict[Claim, Node] = field(default_factory=dict)
    same_as: dict[Claim, Claim] = field(default_factory=dict)
    by_value: dict[int, list[AxisSet]] = field(default_factory=dict)

    def explore(self, roots: Iterable[Claim]) -> None:
        """Add everything the roots rest on."""
        queue = deque(roots)
        while queue:
            claim = queue.popleft()
            if claim in self.nodes or claim in self.same_as:
                continue
            wider = self._wider(claim)
            if wider != claim:
                self.same_as[claim] = wider
                queue.append(wider)
                continue
            node = self.nodes[claim] = self._node(claim)
            self.by_value.setdefault(claim[0], []).append(claim[1])
            queue.extend(node.needs or ())
        self._bar_conflicts()

    def resolve(self, claim: Claim) -> Claim:
        """The node that answers a claim."""
        while claim in self.same_as:
            claim = self.same_as[claim]
        return claim

    def _wider(self, claim: Claim) -> Claim:
        """A stronger claim about the same value that costs no more: one serves many readers.

        A claim about a slice (some tokens, say) becomes one about the whole axis where a shift of
        the whole axis would not be noticed either.
        """
        value, along = claim
        for d in range(len(along.shape)):
            wide = along.widened([d])
            if wide != along and self._noticed(value, wide) is None:
                along = wide
        for other in self.by_value.get(value, ()):
            if other.refines(along) and self.nodes[value, other].intolerant is None:
                return value, other
        return value, along

    def _node(self, claim: Claim) -> Node:
        """How the value of a claim can be zero-mean."""
        value, along = claim
        graph = self.facts.graph
        if along.empty or self._is_zero(value, along):
            return Node(is_zero=True)
        intolerant = self._noticed(value, along)
        if (coarse := self._too_coarse(value)) is not None:
            return Node(obstacle=coarse, intolerant=intolerant)
        if value in graph.leaves:
            edit = self._editable(value, along, intolerant)
            why = "is excluded" if value in graph.excluded else "is not edited by the plan"
            otherwise = Blocker(None, f"it {why}")
            if not edit and self.facts.assumed.is_centered(value, along):
                return Node(is_zero=True, assumed=True, intolerant=intolerant)
        elif value in graph.constants:
            edit = intolerant is None and graph.is_editable_constant(value)
            edit = edit and not graph.only_leaves
            otherwise = Blocker(None, "a constant is added along the mean")
        else:
            return self._computed(value, along, intolerant)
        return Node(edit=edit, obstacle=intolerant or otherwise, intolerant=intolerant)

    def _too_coarse(self, value: int) -> Blocker | None:
        """Why numbers of this kind cannot be centered; complex ones only where computed."""
        dtype = self.facts.graph.avals[value].dtype
        is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
        if is_editable(dtype) or (is_complex and value not in self.facts.graph.leaves):
            return None
        if jnp.issubdtype(dtype, jnp.floating):
            return Blocker(None, f"its values are {dtype} numbers, which have no digits to spare")
        return Blocker(None, "its values are not floating-point numbers")

    def _computed(self, value: int, along: AxisSet, intolerant: Blocker | None) -> Node:
        """A value that is centered by its operands or, if nothing notices, where it appears."""
        insert = self._insertion(value, along) if intolerant is None else None
        node = Node(insert=insert, intolerant=intolerant)
        made = self.facts.graph.producer[value]
        if made is None:
            node.obstacle = Blocker(None, "it is an input of the function")
            return node
        op, position = made
        pulled = rule_of(op).pull(self.facts.context(op), position, along)
        if isinstance(pulled, Opaque):
            node.obstacle = Blocker(op, pulled.why)
        else:
            node.needs = [(op.inputs[i], s) for i, s in pulled.needs]
            node.approximate = pulled.approximate
        return node

    def _insertion(self, value: int, along: AxisSet) -> int | None:
        """What an explicit centering costs, None where the program has no place for one."""
        graph = self.facts.graph
        barred = graph.only_leaves or graph.is_sealed(value)
        if barred or graph.on_one_device(value, along) is None:
            return None
        # What depends on constants only is computed once, by the compiler, so a thousandth of
        # the price. A value computed from parameters is computed in every call: full price.
        cost = self._insertion_cost(along) * graph.trips[graph.home[value]]
        return cost // UNIT if graph.fixed[value] else cost

    def _noticed(self, value: int, along: AxisSet) -> Blocker | None:
        """What notices a centering: of the value itself, or of a copy that equations read."""
        graph = self.facts.graph
        edited = value in graph.leaves or value in graph.constants
        if edited or graph.centered_at(value) is None:
            return self.facts.intolerant(value, along)
        return self.facts.readers_notice(value, along)

    def _is_zero(self, value: int, along: AxisSet) -> bool:
        centered = self.norms.centered.get(value)
        if centered is not None and centered.refines(along):
            return True
        constant = self.facts.graph.constants.get(value)
        return constant is not None and not np.any(np.asarray(constant))

    def _editable(self, leaf: int, along: AxisSet, intolerant: Blocker | None) -> bool:
        if self.fixed is None:
            return intolerant is None and leaf not in self.facts.graph.excluded
        return any(s.refines(along) for s in self.fixed.get(leaf, ()))

    def _bar_conflicts(self) -> None:
        """Of two centerings of one value that would undo each other, only the first may happen.

        A centering that may happen spoils no other claim: the LayerNorm behind that claim does not
        notice it, so what it takes away is a mean of means that are zero.
        """
        for value, sets in self.by_value.items():
            first: list[AxisSet] = []
            for along in sets:
                node = self.nodes[value, along]
                if node.insert is None and not node.edit:
                    continue
                if all(along.compatible(s) for s in first):
                    first.append(along)
                else:
                    node.edit, node.insert = node.edit and self.fixed is not None, None

    def _insertion_cost(self, along: AxisSet) -> int:
        if along.trivial:
            return 0  # set to zero: nothing is computed
        inside = (
            int(np.count_nonzero(along.labels(d) >= 0)) if isinstance(e, Labels) else n
            for d, (e, n) in enumerate(zip(along.entries, along.shape, strict=True))
        )
        elements = prod(n for n in inside if isinstance(n, int))
        return int(self.explicit_cost * elements * UNIT)
