"""Claims about values and axis sets, what is in their way, and how they are settled."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..axes.axis_set import AxisSet
from ..printable import printable
from ..program.graph import Op, OutputPath
from .shift_tracker import RETURNED

Claim = tuple[int, AxisSet]
"""Something about a value and an axis set."""


@dataclass(frozen=True, slots=True)
class Blocker:
    """Why a claim does not hold: an operation (None for the program's own inputs and outputs).

    `outputs` says where in the output tree a value is that is an output.
    """

    op: Op | None
    why: str
    outputs: tuple[OutputPath, ...] = ()

    @property
    def is_output(self) -> bool:
        """Whether all there is in the way is that a function returns a value."""
        return self.why == RETURNED

    def __str__(self) -> str:
        """The reason as a clause."""
        paths = [printable("".join(path)) for path in self.outputs if path]
        named = ", ".join(f"`{path}`" for path in paths[:3])
        more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
        why = self.why + (f": {named}{more}" if named else "")
        if self.op is not None:
            return f"{self.op.location()} {why}"
        return f"what it is given {why}" if self.is_output else why


Expand = Callable[[Claim], "Blocker | Iterable[Claim]"]


def solve(claim: Claim, expand: Expand, known: dict[Claim, Blocker | None]) -> Blocker | None:
    """Whether `claim` holds (None) or what is in its way; `known` remembers all answers.

    A claim that rests on itself, as in a loop, holds unless something else fails. The nearest
    failure is the answer, and ends the search: all that is explored is what `claim` rests on.
    """
    if claim in known:
        return known[claim]
    rests: dict[Claim, list[Claim]] = {claim: []}  # claim -> claims that rest on it
    todo = deque([claim])
    while todo:
        current = todo.popleft()
        found = known[current] if current in known else expand(current)
        if isinstance(found, Blocker):
            failed, known[current] = [current], found
            for failure in failed:  # grows while it spreads
                for dependent in rests[failure]:
                    if dependent not in known:
                        known[dependent] = found
                        failed.append(dependent)
            return found
        for needed in found or ():
            if needed not in rests:
                rests[needed] = []
                todo.append(needed)
            rests[needed].append(current)
    known.update(dict.fromkeys(rests))
    return None
