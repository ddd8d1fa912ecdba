"""Why a LayerNorm keeps its mean, or what feeds it had to be centered."""

from __future__ import annotations

from collections import deque
from collections.abc import Container, Sequence
from dataclasses import dataclass

from ..analysis.claims import Blocker, Claim
from ..printable import printable
from ..program.graph import Op
from ..program.primitives import PRODUCTS
from .zero_mean import ZeroMeanGraph


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a LayerNorm keeps its mean.

    The `obstacle` keeps its input from being zero-mean, `noticed` is what would notice an explicit
    centering of the input (None: it would only cost too much). `carry` is the loop on the way from
    one to the other, `product` a matrix product of data there, which leaves the axes of the mean
    alone. `leaf` is the parameter that the obstacle keeps from being edited, if any, with its
    `leaf_path` unless it is all about the stream or an output; `claim` says of which value, along
    which axes, the obstacle keeps the mean.
    """

    obstacle: Blocker | None
    noticed: Blocker | None
    carry: Op | None = None
    leaf: int | None = None
    leaf_path: str = ""
    product: Op | None = None
    claim: Claim | None = None

    @property
    def named(self) -> str:
        """Which parameter it is, to be put behind a clause."""
        return f"; this parameter is `{printable(self.leaf_path)}`" if self.leaf_path else ""

    def __str__(self) -> str:
        """The reason as a sentence without its stop."""
        carry = f"carry {self.carry.carry} of {self.carry.location()}" if self.carry else ""
        if self.noticed is None:
            remedy = "an explicit centering would cost more than it saves"
        else:
            remedy = f"an explicit centering would change the result: {self.noticed}"
        if self.obstacle is None:
            return remedy
        if self.leaf is not None:
            why = f": {self.obstacle}{self.named}"
            return f"a parameter that feeds {carry or 'it'} cannot be centered{why}"
        spoilt = f"{carry} cannot be kept so: " if carry else ""
        return f"its input is not zero-mean: {spoilt}{self.obstacle}; {remedy}"


def explain(search: ZeroMeanGraph, root: Claim, zero: Container[Claim]) -> Reason:
    """Why a value is not zero-mean for free: the nearest thing that cannot be made so."""
    start = search.resolve(root)
    queue, reached_from = deque([start]), {start: start}
    while queue:
        claim = queue.popleft()
        node = search.nodes[claim]
        if claim != start and (node.is_zero or claim in zero or node.edit):
            continue
        if node.needs is None and node.obstacle is not None:
            chain = [claim]
            while chain[-1] != start:
                chain.append(reached_from[chain[-1]])
            return _reason(search, chain, node.obstacle)
        for needed in map(search.resolve, node.needs or ()):
            if needed not in reached_from:
                reached_from[needed] = claim
                queue.append(needed)
    return Reason(None, search.nodes[start].intolerant)


def _reason(search: ZeroMeanGraph, chain: Sequence[Claim], obstacle: Blocker) -> Reason:
    """The reason for the last claim of `chain`, each of which rests on the one before it."""
    graph = search.facts.graph
    makers = [made[0] for value, _ in chain if (made := graph.producer[value]) is not None]
    carry = next((op for op in makers if op.carry is not None), None)
    leaf, noticed = chain[0][0], search.nodes[chain[-1]].intolerant
    if leaf not in graph.leaves:
        # Without this obstacle, what the function returns would be in the way of every edit.
        returned = (search.facts.intolerant(*c) for c in reversed(chain) if c[0] in graph.outputs)
        if noticed is None and (nearest := next(filter(None, returned), None)) is not None:
            return Reason(nearest, noticed, carry, claim=chain[0])
        behind = makers if not graph.data_free[leaf] else ()
        product = next((op for op in behind if op.name in PRODUCTS and op != obstacle.op), None)
        return Reason(obstacle, noticed, carry, product=product, claim=chain[0])
    # A parameter's shift may pass what a token's own does not: the stream's reason is the nearer.
    known = noticed if search.nodes[chain[0]].intolerant else None
    why = known or obstacle
    path = "" if known or why.is_output else graph.leaves[leaf]
    return Reason(why, noticed, carry, leaf, path, claim=chain[0])
