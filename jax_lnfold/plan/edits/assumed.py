"""Leaves that a fold takes as they are, and that have to stay so: constant, or without a mean."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any, ClassVar, Self

from ...axes.axis_set import AxisSet
from ...axes.labels import ALL, FREE
from ...printable import printable
from ..leaf import Recipe
from ..tree_fit import Fit
from .center import CenterEdit
from .edit import LeafEdit, Shapes

STATES = CONSTANT, CENTERED = "constant", "centered"
"""What a leaf may be taken to be."""


@dataclass(frozen=True, slots=True)
class AssumedEdit(CenterEdit):
    """One leaf is taken to be `constant` along whole axes, or `centered`: ``state`` says which.

    With a `mean`, the mean of all its numbers is that instead of zero; other leaves get means with
    which it cancels. It is not edited: that would change what the original function computes. A
    tree in which it is otherwise is refused, and training keeps it so. Constant are equal numbers,
    to the last bit.

    Example:
        >>> from jax_lnfold import AssumedEdit, AxisSet
        >>> print(AssumedEdit("norm/scale", AxisSet.over((5,), axes=[0]), "constant"))
        norm/scale constant along axis 0
    """

    state: str
    mean: float = 0.0

    VERSIONS: ClassVar[tuple[int, ...]] = (9, 10)
    NAMES: ClassVar[str] = "leaves that have to stay as they are"

    @property
    def version(self) -> int:
        """`mean` came later."""
        return self.VERSIONS[self.mean != 0]

    def __str__(self) -> str:
        """What is taken for granted, ``a/b/scale constant along axis 1``."""
        if self.state == CENTERED and self.along.trivial:
            return f"{printable(self.key_path)} zero"
        if self.mean:
            return f"{printable(self.key_path)} of the same mean"
        return f"{printable(self.key_path)} {self.state} along {self.along}"

    @classmethod
    def told(cls, edits: Sequence[Any]) -> str:
        """Nothing: it edits no leaf."""
        return ""

    def changes(self) -> Iterator[tuple[str, LeafEdit]]:
        """What training projects on; elsewhere the leaf is looked at only."""
        field = {CONSTANT: "constant", CENTERED: "sets"}[self.state]
        means = (self.mean,) if self.mean else None
        recipe = Recipe(assumed=True, means=means, **{field: (self.along,)})  # type: ignore[arg-type]
        yield self.key_path, LeafEdit((), recipe)

    def check(self, shapes: Shapes) -> None:
        """The set is one of the leaf; numbers are constant along whole axes."""
        CenterEdit.check(self, shapes)
        if self.state not in STATES:
            raise ValueError(f"{self.state!r} is not what leaf {self.key_path!r} may be")
        whole = all(entry in (ALL, FREE) for entry in self.along.entries)
        if self.state == CONSTANT and (not whole or self.along.trivial):
            raise ValueError(f"leaf {self.key_path!r} is not constant along whole axes")
        if type(self.mean) is not float or not isfinite(self.mean):
            raise ValueError(f"the mean of leaf {self.key_path!r} is no finite float")
        if self.mean and (self.state != CENTERED or not has_one_mean(self.along)):
            raise ValueError(f"leaf {self.key_path!r} has more means than one")

    def refit(self, fit: Fit) -> Self:
        """The same axes of the leaf."""
        found = CenterEdit(self.key_path, self.along).refit(fit)
        return type(self)(found.key_path, found.along, self.state, self.mean)

    @classmethod
    def from_json(cls, data: dict[str, Any], version: int) -> Self:
        """As a `CenterEdit`, with a ``state`` and, since version 10, a ``mean``."""
        found = CenterEdit.from_json(data, version)
        mean = data["mean"] if version >= 10 else 0.0
        return cls(found.key_path, found.along, data["state"], mean)

    def to_json(self, version: int) -> dict[str, Any]:
        """Without ``mean`` where the version has none."""
        return {k: v for k, v in asdict(self).items() if k != "mean" or version >= 10}


def has_one_mean(along: AxisSet) -> bool:
    """Whether all positions are one group, of several."""
    pairs = zip(along.entries, along.shape, strict=True)
    return not along.trivial and all(entry == ALL or n == 1 for entry, n in pairs)
