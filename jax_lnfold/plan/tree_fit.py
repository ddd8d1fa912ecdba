"""A plan on other trees than the one it was made for: boxes around leaves, axes of other sizes.

Sizes may differ along axes that no mean is taken over (an ensemble of fewer members, say). That a
program of these sizes does not notice the edits is for a trace to prove.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ..errors import TreeError
from ..trees import alike_paths


def names_in(found: Iterable[str], wanted: Iterable[str]) -> dict[str, str]:
    """The key paths of a tree that those of a plan stand for, as far as they are there."""
    return {path: names[0] for path, names in alike_paths(wanted, found).items() if names}


@dataclass(frozen=True, slots=True)
class Fit:
    """A tree in which leaves have `names`, and `new` shapes instead of `old` ones.

    All three are by the plan's own key path; `new` holds every leaf that is edited, `argument` is
    what the tree is called in errors.

    Raises:
        TreeError: a leaf has another size along an axis that matters, or another number of axes.
    """

    argument: str
    names: Mapping[str, str]
    old: Mapping[str, tuple[int, ...]]
    new: Mapping[str, tuple[int, ...]]

    def __post_init__(self) -> None:
        """Of an axis of one element no plan says whether means are taken over it."""
        for path, new in self.new.items():
            old = self.old[path]
            if len(new) != len(old) or any(n == 1 != m for n, m in zip(old, new, strict=True)):
                raise self.misfit(path)

    def misfit(self, path: str) -> TreeError:
        """What to raise if a leaf has a size that an edit cannot have."""
        return TreeError(
            f"{self.argument}: leaf {self.names[path]!r} has shape {self.new[path]}, the plan was "
            f"made for {self.old[path]}, and only axes along which it neither centers nor scales "
            "may differ (from other sizes than 1); fold the model again for other sizes"
        )

    def axes(self, source: str, target: str, axes: tuple[int, ...]) -> tuple[int, ...]:
        """The axes of the target that the source, an axis of one element aside, runs along."""
        old, new = self.old[source], self.new[source]
        sizes = [m for n, m in zip(old, new, strict=True) if n != 1]
        if any(n not in (1, self.new[target][d]) for d, n in zip(axes, sizes, strict=True)):
            raise self.misfit(target)
        return tuple(d for d, n in zip(axes, sizes, strict=True) if n != 1)
