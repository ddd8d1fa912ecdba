"""Which leaves to untie by a copy: those that stand in the way of cheaper centerings.

A table that lookups and a tied head read cannot be centered, as the head would notice. Of a copy
that only the lookups read, nobody does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ..options import Options
from ..plan.edits.untie import UntieEdit
from ..program.tracing import Traced
from ..program.untying import looked_up
from .place import Placement
from .planning import placement_of
from .zero_mean import UNIT

USELESS = "a copy for its lookups would save no mean"
MERGED = "a scale would be merged into the copy, and not into the leaf"
EXCLUDED = "it is excluded"


def place_untied(traced: Traced, options: Options) -> tuple[Traced, Placement]:
    """The cheapest placement once leaves are untied, and the program of the tree with copies.

    A leaf is copied only if that makes the placement cheaper; the program of a tree in which none
    is, is the very same.
    """
    search = _Search(traced, options)
    copied, tied = search.best()
    untied, placement = search.placed(copied)
    if copied:
        copies = tuple(map(UntieEdit, untied.leaves[len(traced.leaves) :]))
        placement = replace(placement, found={**placement.found, "untied": copies})
    return untied, replace(placement, tied=tied)


class _Search:
    def __init__(self, traced: Traced, options: Options) -> None:
        self.traced, self.options = traced, options
        found = looked_up(traced.closed)
        self.tables = {path for i, path in enumerate(traced.leaves) if i in found}
        self.known: dict[frozenset[str], tuple[Traced, Placement]] = {}

    def best(self) -> tuple[frozenset[str], dict[str, str]]:
        """The leaves to copy, and why others, which are in the way, stay tied."""
        copied, tied = frozenset[str](), dict[str, str]()
        excludes = self.options.excludes
        while fresh := {*self._in_the_way(copied)} - copied - tied.keys():
            tied |= {p: EXCLUDED for p in sorted(fresh) if excludes is not None and excludes(p)}
            copied |= fresh - tied.keys()  # some save nothing but together
        while why := next(((p, w) for p in sorted(copied) if (w := self._why_tied(p, copied))), ()):
            tied |= [why]
            copied -= {why[0]}
        return copied, tied

    def placed(self, copied: frozenset[str]) -> tuple[Traced, Placement]:
        """The program in which lookups read copies of these leaves, and its placement."""
        if copied not in self.known:
            untied, options, kept = self.traced, self.options, frozenset[str]()
            if copied:
                untied = untied.untied(copied)
                names = dict(zip(untied.leaves, self._names(copied), strict=True))
                options = _renamed(options, names)
                # The original function reads a leaf and its copy as one: an edit of the leaf, which
                # what reads it here may not notice, would reach the rows that are looked up there.
                kept = frozenset(
                    p for p in untied.leaves[: len(self.traced.leaves)] if names[p] in copied
                )
            self.known[copied] = untied, placement_of(untied, options, kept)
        return self.known[copied]

    def _names(self, copied: frozenset[str]) -> list[str]:
        """What the leaves of the tree with copies are called, or copies of, in the tree itself."""
        return [*self.traced.leaves, *sorted(copied)]

    def _in_the_way(self, copied: frozenset[str]) -> Iterator[str]:
        """Tables that cannot be centered where a mean stays, or an explicit centering is."""
        _, placement = self.placed(copied)
        names = dict(zip(placement.graph.leaves, self._names(copied), strict=True))
        for reason in (*placement.inserted.values(), *placement.left.values()):
            if reason.leaf is not None and names[reason.leaf] in self.tables:
                yield names[reason.leaf]

    def _why_tied(self, path: str, copied: frozenset[str]) -> str:
        """Why a leaf should not be copied, empty if it should."""
        untied, placement = self.placed(copied)
        if _cost(self.placed(copied - {path})[1]) <= _cost(placement):
            return USELESS
        # Nor may the copy be multiplied, and the factor set to one, which that function reads, too.
        names = zip(untied.leaves, self._names(copied), strict=True)
        both = {p for p, name in names if name == path}
        edits = (*placement.merges, *(e for found in placement.found.values() for e in found))
        return MERGED if any(part in both for edit in edits for part in edit.parts) else ""


def _renamed(options: Options, names: dict[str, str]) -> Options:
    """The options for a tree whose leaves had other names when they were chosen."""
    excludes = options.excludes
    if excludes is None:
        return options
    return replace(options, excludes=lambda path: excludes(names[path]))


def _cost(placement: Placement) -> int:
    """What the minimum cut weighs: means that stay, and explicit centerings."""
    pairs = zip(placement.norms, placement.folded, strict=True)
    kept = sum(norm.elements * UNIT for norm, folded in pairs if not folded)
    search = placement.search
    claims = ((value, along) for value, sets in placement.explicit.items() for along in sets)
    return kept + sum(search.nodes[search.resolve(claim)].insert or 0 for claim in claims)
