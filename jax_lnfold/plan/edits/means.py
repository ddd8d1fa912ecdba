"""Leaves that get chosen means in place of zero: ``W - mean(W) + v`` over groups of positions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isfinite, prod
from typing import Any, ClassVar, Self

from ...axes.axis_set import AxisSet
from ...axes.labels import ALL, FREE
from ...errors import TreeError
from ...printable import counted, printable
from ..leaf import Recipe
from ..tree_fit import Fit
from .edit import Edit, LeafEdit, Shapes, integers


@dataclass(frozen=True, slots=True)
class MeanEdit(Edit):
    """Give groups of one leaf the `means`; `along` says which positions form a group.

    There is one group for each position of the axes that are not averaged over, in row-major order.
    What tolerates that the leaf is centered tolerates any means (theory, section 12).

    Example:
        >>> from jax_lnfold import AxisSet, MeanEdit
        >>> print(MeanEdit("mlp/kernel", AxisSet.over((3, 5), axes=[1]), means=(0.5, 0.0, -1.0)))
        mlp/kernel with chosen means along axis 1
    """

    key_path: str
    along: AxisSet
    means: tuple[float, ...]

    VERSIONS: ClassVar[tuple[int, ...]] = (7,)
    NAMES: ClassVar[str] = "leaves that get means"

    def __str__(self) -> str:
        """The edit in words, ``a/b/kernel with chosen means along axis 1``."""
        return f"{printable(self.key_path)} with chosen means along {self.along}"

    @classmethod
    def told(cls, edits: Sequence[Any]) -> str:
        """``3 parameters with chosen means``."""
        return f"{counted(len(edits), 'parameter')} with chosen means"

    @property
    def parts(self) -> Iterator[str]:
        """The leaf."""
        yield self.key_path

    def changes(self) -> Iterator[tuple[str, LeafEdit]]:
        """The leaf is centered, and the means are added."""
        yield self.key_path, LeafEdit((), Recipe(sets=(self.along,), means=self.means))

    def check(self, shapes: Shapes) -> None:
        """The groups are along whole axes of the leaf, with one finite number for each."""
        entries, shape = self.along.entries, self.along.shape
        if shape != shapes.get(self.key_path):
            raise ValueError(f"no leaf {self.key_path!r} of shape {shape} to give means")
        if len(entries) != len(shape) or any(entry not in (ALL, FREE) for entry in entries):
            raise ValueError(
                f"leaf {self.key_path!r} gets means in groups along an axis; "
                f"only whole axes ({ALL!r} or {FREE!r}) may have them"
            )
        pairs = zip(entries, shape, strict=True)
        count = prod(n for entry, n in pairs if entry == FREE)
        if type(self.means) is not tuple or len(self.means) != count:
            raise ValueError(f"leaf {self.key_path!r} has {count} groups, and not as many means")
        if not all(type(v) is float and isfinite(v) for v in self.means):
            raise ValueError(f"the means of leaf {self.key_path!r} are not all finite floats")

    def refit(self, fit: Fit) -> Self:
        """The same means, of a leaf of the same shape."""
        old, new = self.along.shape, fit.new[self.key_path]
        if old != new:
            raise TreeError(
                f"{fit.argument}: leaf {fit.names[self.key_path]!r} has shape {new}, and the plan "
                f"has a mean for every group of a leaf of shape {old}; make the plan for this tree"
            )
        return type(self)(fit.names[self.key_path], self.along, self.means)

    @classmethod
    def from_json(cls, data: dict[str, Any], version: int) -> Self:
        """``along`` is as in a `CenterEdit`, ``means`` a list of numbers."""
        along, means = data["along"], data["means"]
        if any(entry not in (ALL, FREE) for entry in along["entries"]):
            raise ValueError(f"means of {data['key_path']!r} are not along whole axes")
        if not isinstance(means, list) or not all(type(v) in (int, float) for v in means):
            raise TypeError(f"the means of {data['key_path']!r} are no list of numbers")
        shape = AxisSet.of(integers(along["shape"]), along["entries"])
        return cls(data["key_path"], shape, tuple(map(float, means)))
