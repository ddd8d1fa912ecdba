"""The edits that a plan is made of, as plain data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..axes.axis_set import AxisSet
from ..printable import printable
from .leaf import Recipe


@dataclass(frozen=True, slots=True)
class LeafSpec:
    """A leaf of the parameter tree: its key path (``a/b/kernel``) and shape."""

    key_path: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CenterEdit:
    """Subtract group means from one leaf (CBWC); `along` says which positions form a group."""

    key_path: str
    along: AxisSet

    def __str__(self) -> str:
        """The edit in words, ``a/b/kernel centered along axis 1``."""
        return f"{printable(self.key_path)} centered along {self.along}"

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes averaged over, wholly or in part; empty when the leaf is set to zero."""
        return self.along.axes


@dataclass(frozen=True, slots=True)
class ScaleEdit:
    """Multiply `targets` (key path, axes) by the scale at `key_path`, then set that to one."""

    key_path: str
    targets: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def parts(self) -> Iterator[str]:
        """The leaf of each role; sound only if all are different."""
        yield self.key_path
        yield from (path for path, _ in self.targets)


@dataclass(frozen=True, slots=True)
class AffineReader:
    """A linear layer that takes up a scale and a shift.

    The scale runs along `axes` of the leaf at `kernel`. If there is a shift, the leaf at `bias`
    takes up its product with the kernel, summed over the axes `summed`.
    """

    kernel: str
    axes: tuple[int, ...]
    bias: str | None = None
    summed: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class AffineEdit:
    """Multiply the kernels of `readers` by the scale at `key_path`, then set that to one.

    The shift at key path `shift`, if any, goes into their biases and becomes zero. Where the
    program adds 1 to the leaf, `one` is 0: they are multiplied by the leaf plus ``1 - one``, and
    it is set to `one`.
    """

    key_path: str
    shift: str | None
    readers: tuple[AffineReader, ...]
    one: int = 1

    @property
    def parts(self) -> Iterator[str]:
        """The leaf of each role; sound only if all are different (theory, section 9)."""
        read = (leaf for r in self.readers for leaf in (r.kernel, r.bias))
        return (leaf for leaf in (self.key_path, self.shift, *read) if leaf is not None)


@dataclass(frozen=True, slots=True)
class LeafEdit:
    """All that is done to one leaf: the recipe, and key paths of the leaves that it takes."""

    sources: tuple[str, ...]
    recipe: Recipe
