"""Leaves that are centered (CBWC): ``W - mean(W)`` over groups of positions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

from ...axes.axis_set import AxisSet
from ...axes.labels import ALL, FREE, Labels
from ...printable import counted, printable
from ..leaf import Recipe
from ..tree_fit import Fit
from .edit import Edit, LeafEdit, Shapes, integers


@dataclass(frozen=True, slots=True)
class CenterEdit(Edit):
    """Subtract group means from one leaf (CBWC); `along` says which positions form a group.

    Example:
        >>> from jax_lnfold import AxisSet, CenterEdit
        >>> print(CenterEdit("mlp/kernel", AxisSet.over((3, 5), axes=[1])))
        mlp/kernel centered along axis 1
    """

    key_path: str
    along: AxisSet

    def __str__(self) -> str:
        """The edit in words, ``a/b/kernel centered along axis 1``."""
        return f"{printable(self.key_path)} centered along {self.along}"

    @classmethod
    def told(cls, edits: Sequence[Any]) -> str:
        """``3 parameters centered``, each of them along one set or several."""
        return f"{counted(len({edit.key_path for edit in edits}), 'parameter')} centered"

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes averaged over, wholly or in part; empty when the leaf is set to zero."""
        return self.along.axes

    @property
    def parts(self) -> Iterator[str]:
        """The leaf."""
        yield self.key_path

    def changes(self) -> Iterator[tuple[str, LeafEdit]]:
        """The leaf is centered."""
        yield self.key_path, LeafEdit((), Recipe(sets=(self.along,)))

    def check(self, shapes: Shapes) -> None:
        """The groups are those of all positions of the leaf."""
        if self.along.shape != shapes.get(self.key_path):
            raise ValueError(f"no leaf {self.key_path!r} of shape {self.along.shape} to center")
        for entry, size in zip(self.along.entries, self.along.shape, strict=True):
            if isinstance(entry, Labels):
                groups = {*entry} - {-1}
                if len(entry) != size or groups != {*range(len(groups))}:
                    raise ValueError(f"no labels for {size} positions of leaf {self.key_path!r}")

    def refit(self, fit: Fit) -> Self:
        """The same groups along the axes that are averaged over."""
        shape = fit.new[self.key_path]
        pairs = zip(self.along.entries, self.along.shape, shape, strict=True)
        if any(entry != FREE and n != m for entry, n, m in pairs):
            raise fit.misfit(self.key_path)
        return type(self)(fit.names[self.key_path], AxisSet(shape, self.along.entries))

    @classmethod
    def from_json(cls, data: dict[str, Any], version: int) -> Self:
        """``along`` has a shape and one entry per axis."""
        along = data["along"]
        entries = [e if e in (ALL, FREE) else Labels(integers(e)) for e in along["entries"]]
        return cls(data["key_path"], AxisSet.of(integers(along["shape"]), entries))
