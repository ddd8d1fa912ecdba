"""Which LayerNorms of a program a plan leaves the mean out of: by their names."""

from __future__ import annotations

from dataclasses import replace

from .placement.droppable import why_kept
from .placement.place import Placement
from .plan.plan import FoldPlan
from .report.names import names_of


def without_means(placement: Placement, plan: FoldPlan) -> Placement:
    """The placement with the LayerNorms that the plan leaves the mean out of.

    Those that fold here, or whose mean something else reads here, stay as they are: exact.
    """
    if not plan.dropped:
        return placement
    wanted = {edit.norm for edit in plan.dropped}
    names, kept = names_of(placement), why_kept(placement)
    dropped = frozenset(i for i, why in kept.items() if not why and names[i].text in wanted)
    return replace(placement, dropped=dropped)


def droppable(placement: Placement) -> tuple[dict[str, list[int]], dict[str, str]]:
    """By name, the positions of LayerNorms whose mean can be left out; and why others keep it.

    LayerNorms of one name share module and parameters: a plan cannot tell them apart.
    """
    names, can, cannot = names_of(placement), dict[str, list[int]](), dict[str, str]()
    for i, why in why_kept(placement).items():
        if why:
            cannot[names[i].text] = why
        else:
            can.setdefault(names[i].text, []).append(i)
    return can, cannot
