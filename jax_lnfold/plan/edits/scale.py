"""Scales that the linear layers before them take up: ``(h W + b) g = h (W g) + b g``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from ...printable import counted
from ..leaf import Factor, Recipe
from ..tree_fit import Fit
from .edit import Edit, LeafEdit, Shapes, check_axes, integers


@dataclass(frozen=True, slots=True)
class ScaleEdit(Edit):
    """Multiply `targets` (key path, axes) by the scale at `key_path`, then set that to one.

    The axes of the scale with more than one element run along these axes of the target.

    Example:
        >>> from jax_lnfold import ScaleEdit
        >>> ScaleEdit("gamma", targets=(("mlp/kernel", (1,)), ("mlp/bias", (0,)))).targets[1]
        ('mlp/bias', (0,))
    """

    key_path: str
    targets: tuple[tuple[str, tuple[int, ...]], ...]

    NAMES: ClassVar[str] = "scales and their targets"

    @classmethod
    def told(cls, edits: Sequence[Any]) -> str:
        """``2 scales merged``."""
        return f"{counted(len(edits), 'scale')} merged"

    @property
    def parts(self) -> Iterator[str]:
        """The scale and its targets."""
        yield self.key_path
        yield from (path for path, _ in self.targets)

    def changes(self) -> Iterator[tuple[str, LeafEdit]]:
        """Each target is multiplied, the scale becomes one."""
        for path, axes in self.targets:
            yield path, LeafEdit((self.key_path,), Recipe(factors=(Factor(axes),)))
        yield self.key_path, LeafEdit((), Recipe(fill=1.0))

    def check(self, shapes: Shapes) -> None:
        """There are targets, and the scale fits their axes."""
        for path, axes in self.targets:
            check_axes(shapes, self.key_path, path, axes)
        if not self.targets:
            raise ValueError(f"nothing takes up the scale {self.key_path!r}")

    def refit(self, fit: Fit) -> Self:
        """The same scale, along the axes on which it still has several elements."""
        targets = (
            (fit.names[path], fit.axes(self.key_path, path, axes)) for path, axes in self.targets
        )
        return type(self)(fit.names[self.key_path], tuple(targets))

    @classmethod
    def from_json(cls, data: dict[str, Any], version: int) -> Self:
        """``targets`` is a list of pairs."""
        targets = ((path, integers(axes)) for path, axes in data["targets"])
        return cls(data["key_path"], tuple(targets))
