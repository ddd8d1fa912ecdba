"""Leaves that a fold takes as they are, and that have to stay so: constant, or without a mean."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

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

    It is not edited: that would change what the original function computes. A tree in which it is
    otherwise is refused, and training keeps it so. Constant are equal numbers, to the last bit.

    Example:
        >>> from jax_lnfold import AssumedEdit, AxisSet
        >>> print(AssumedEdit("norm/scale", AxisSet.over((5,), axes=[0]), "constant"))
        norm/scale constant along axis 0
    """

    state: str

    VERSIONS: ClassVar[tuple[int, ...]] = (9,)
    NAMES: ClassVar[str] = "leaves that have to stay as they are"

    def __str__(self) -> str:
        """What is taken for granted, ``a/b/scale constant along axis 1``."""
        if self.state == CENTERED and self.along.trivial:
            return f"{printable(self.key_path)} zero"
        return f"{printable(self.key_path)} {self.state} along {self.along}"

    @classmethod
    def told(cls, edits: Sequence[Any]) -> str:
        """Nothing: it edits no leaf."""
        return ""

    def changes(self) -> Iterator[tuple[str, LeafEdit]]:
        """What training projects on; elsewhere the leaf is looked at only."""
        field = {CONSTANT: "constant", CENTERED: "sets"}[self.state]
        recipe = Recipe(assumed=True, **{field: (self.along,)})  # type: ignore[arg-type]
        yield self.key_path, LeafEdit((), recipe)

    def check(self, shapes: Shapes) -> None:
        """The set is one of the leaf; numbers are constant along whole axes."""
        CenterEdit.check(self, shapes)
        if self.state not in STATES:
            raise ValueError(f"{self.state!r} is not what leaf {self.key_path!r} may be")
        whole = all(entry in (ALL, FREE) for entry in self.along.entries)
        if self.state == CONSTANT and (not whole or self.along.trivial):
            raise ValueError(f"leaf {self.key_path!r} is not constant along whole axes")

    def refit(self, fit: Fit) -> Self:
        """The same axes of the leaf."""
        found = CenterEdit(self.key_path, self.along).refit(fit)
        return type(self)(found.key_path, found.along, self.state)

    @classmethod
    def from_json(cls, data: dict[str, Any], version: int) -> Self:
        """As a `CenterEdit`, with a ``state``."""
        found = CenterEdit.from_json(data, version)
        return cls(found.key_path, found.along, data["state"])
