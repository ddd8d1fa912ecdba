"""LayerNorms whose mean is left out although it is not zero: an approximation, asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from ...printable import printable
from ..tree_fit import Fit
from .edit import Edit, LeafEdit, Shapes


@dataclass(frozen=True, slots=True)
class DropEdit(Edit):
    """The program does without the mean of the LayerNorm of this name, as a report shows it.

    This changes no leaf, so that the original function remains exact. What it amounts to was
    measured on data when the plan was made (theory, section 12).

    Example:
        >>> from jax_lnfold import DropEdit
        >>> print(DropEdit("block_0/norm"))
        the mean of block_0/norm left out
    """

    norm: str

    VERSIONS: ClassVar[tuple[int, ...]] = (8,)

    def __str__(self) -> str:
        """The edit in words, ``the mean of block_0/norm left out``."""
        return f"the mean of {printable(self.norm)} left out"

    @classmethod
    def told(cls, edits: Sequence[Any]) -> str:
        """Nothing: it edits no leaf."""
        return ""

    @property
    def parts(self) -> Iterator[str]:
        """No leaf."""
        return iter(())

    def changes(self) -> Iterator[tuple[str, LeafEdit]]:
        """No leaf."""
        return iter(())

    def check(self, shapes: Shapes) -> None:
        """It is a name."""
        if not isinstance(self.norm, str) or not self.norm:
            raise ValueError(f"{self.norm!r} is not the name of a LayerNorm")

    def refit(self, fit: Fit) -> Self:
        """The same LayerNorm: names are those of modules, or of leaves without boxes."""
        return self

    @classmethod
    def from_json(cls, data: dict[str, Any], version: int) -> Self:
        """``norm`` is the name."""
        return cls(data["norm"])
