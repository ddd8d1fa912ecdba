"""Leaves of which lookups read a copy, in a tree with copies (`Untied`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from ..tree_fit import Fit
from .edit import Edit, LeafEdit, Shapes


@dataclass(frozen=True, slots=True)
class UntieEdit(Edit):
    """The leaf at `key_path`, ``copies/a/b``, is a copy of ``params/a/b`` that lookups read.

    This by itself changes no leaf: others edit the copy.

    Example:
        >>> from jax_lnfold import UntieEdit
        >>> UntieEdit("copies/embedding").key_path
        'copies/embedding'
    """

    key_path: str

    VERSIONS: ClassVar[tuple[int, ...]] = (5,)

    @classmethod
    def told(cls, edits: Sequence[Any]) -> str:
        """Nothing: it edits no leaf."""
        return ""

    @property
    def parts(self) -> Iterator[str]:
        """The copy."""
        return iter((self.key_path,))

    def changes(self) -> Iterator[tuple[str, LeafEdit]]:
        """No leaf."""
        return iter(())

    def check(self, shapes: Shapes) -> None:
        """The copy is there."""
        if self.key_path not in shapes:
            raise ValueError(f"there is no copy {self.key_path!r}")

    def refit(self, fit: Fit) -> Self:
        """The same copy by its name there."""
        return replace(self, key_path=fit.names.get(self.key_path, self.key_path))

    @classmethod
    def from_json(cls, data: dict[str, Any], version: int) -> Self:
        """A key path."""
        return cls(data["key_path"])
