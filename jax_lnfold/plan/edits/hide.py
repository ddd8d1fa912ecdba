"""Linear layers that no longer see what is left of a mean: ``W - (1 / g) (g W) / D``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from ...centering import Shape
from ...printable import counted, printable
from ..leaf import Recipe, Term
from ..tree_fit import Fit
from .edit import Edit, LeafEdit, Shapes, scale_and_readers


@dataclass(frozen=True, slots=True)
class HidingReader:
    """A linear layer that reads ``g * n + b`` along `axis` of its `kernel`, from `start` on.

    The leaf at `bias` runs along all other axes of the kernel; None if no shift is read.

    Example:
        >>> from jax_lnfold import HidingReader
        >>> HidingReader("mlp/kernel", axis=0, start=0, bias="mlp/bias").kernel
        'mlp/kernel'
    """

    kernel: str
    axis: int
    start: int
    bias: str | None


@dataclass(frozen=True, slots=True)
class HideEdit(Edit):
    """Hide what is left of a mean in `n` from the `readers` of ``g * n + b``.

    `g` is the scale at `key_path`, `b` the shift at `shift`, if any; neither changes. As `n` has no
    mean in the original function, no output notices (theory, section 12).

    Example:
        >>> from jax_lnfold import HideEdit, HidingReader
        >>> reader = HidingReader("mlp/kernel", axis=0, start=0, bias="mlp/bias")
        >>> print(HideEdit("norm/scale", "norm/bias", (reader,)))
        what is left of the mean behind norm/scale hidden from mlp/kernel
    """

    key_path: str
    shift: str | None
    readers: tuple[HidingReader, ...]

    VERSIONS: ClassVar[tuple[int, ...]] = (10,)
    NAMES: ClassVar[str] = "scales, shifts and readers that means are hidden from"
    ALONE: ClassVar[bool] = True

    def __str__(self) -> str:
        """The edit in words."""
        kernels = ", ".join(printable(reader.kernel) for reader in self.readers)
        return f"what is left of the mean behind {printable(self.key_path)} hidden from {kernels}"

    @classmethod
    def told(cls, edits: Sequence[Any]) -> str:
        """``2 linear layers made blind to means that are left out``."""
        count = sum(len(edit.readers) for edit in edits)
        return f"{counted(count, 'linear layer')} made blind to means that are left out"

    @property
    def parts(self) -> Iterator[str]:
        """The leaf of each role; sound only if all are different."""
        return scale_and_readers(self.key_path, self.shift, self.readers)

    def changes(self) -> Iterator[tuple[str, LeafEdit]]:
        """``W' = W - (1/g) (g W) / D`` and ``c' = c + (b W - b W')``."""
        for reader in self.readers:
            hidden = Recipe(terms=(Unseen(reader.axis, reader.start),))
            yield reader.kernel, LeafEdit((self.key_path,), hidden)
            if self.shift is not None and reader.bias is not None:
                sources = self.key_path, self.shift, reader.kernel
                kept = Recipe(terms=(Kept(reader.axis, reader.start),))
                yield reader.bias, LeafEdit(sources, kept)

    def check(self, shapes: Shapes) -> None:
        """Scale and shift have one axis each, which fits the kernels; and there are readers."""
        sizes = [[n for n in shapes[p] if n != 1] for p in (self.key_path, self.shift) if p]
        if not self.readers or len(sizes[0]) != 1 or sizes[0] != sizes[-1]:
            raise ValueError(f"nothing can be hidden behind the scale {self.key_path!r}")
        for reader in self.readers:
            if (reader.bias is None) != (self.shift is None):
                raise ValueError(
                    f"the shift {self.shift!r} and the bias {reader.bias!r} do not fit"
                )
            self._check_reader(reader, shapes, sizes[0][0])

    def _check_reader(self, reader: HidingReader, shapes: Shapes, size: int) -> None:
        kernel = shapes[reader.kernel]
        numbers = (reader.axis, reader.start)
        inside = all(type(n) is int and n >= 0 for n in numbers) and reader.axis < len(kernel)
        if not inside or reader.start + size > kernel[reader.axis]:
            raise ValueError(
                f"axis {reader.axis} of leaf {reader.kernel!r} is no place for a scale"
            )
        rest = [n for d, n in enumerate(kernel) if d != reader.axis and n != 1]
        if reader.bias is not None and rest != [n for n in shapes[reader.bias] if n != 1]:
            raise ValueError(f"leaf {reader.bias!r} is no bias of {reader.kernel!r}")

    def refit(self, fit: Fit) -> Self:
        """The same scale, shift and readers, of the same sizes."""
        for path in self.parts:
            if fit.new[path] != fit.old[path]:
                raise fit.misfit(path)
        named = [
            HidingReader(fit.names[r.kernel], r.axis, r.start, r.bias and fit.names[r.bias])
            for r in self.readers
        ]
        return type(self)(fit.names[self.key_path], self.shift and fit.names[self.shift], (*named,))

    @classmethod
    def from_json(cls, data: dict[str, Any], version: int) -> Self:
        """Key paths, and for each of the ``readers`` two numbers."""
        readers = (
            HidingReader(r["kernel"], r["axis"], r["start"], r["bias"]) for r in data["readers"]
        )
        return cls(data["key_path"], data["shift"], tuple(readers))


@dataclass(frozen=True, slots=True)
class Unseen(Term):
    """``-(1/g) (g W) / D`` for the rows of a kernel that a scale g of D numbers is read by."""

    axis: int
    start: int
    takes: ClassVar[int] = 1

    def value(self, x: Any, sources: Sequence[Any], dtype: Any, xp: Any) -> Any:
        """Zero in all other rows."""
        g = _aligned(sources[0], self.axis, x.ndim, dtype, xp)
        seen = _rows(x, self, g, dtype)
        new = -(g * seen).sum(self.axis, keepdims=True) / (g * g.size)
        after = x.shape[self.axis] - self.start - g.size
        pads = [(self.start, after) if d == self.axis else (0, 0) for d in range(x.ndim)]
        return xp.pad(new, pads)


@dataclass(frozen=True, slots=True)
class Kept(Term):
    """``(b / g) (g W) / D``, what a bias c gains so that ``b W + c`` stays what it was."""

    axis: int
    start: int
    takes: ClassVar[int] = 3
    first: ClassVar[bool] = True

    def value(self, x: Any, sources: Sequence[Any], dtype: Any, xp: Any) -> Any:
        """From the scale, the shift, and the kernel as it was."""
        scale, shift, kernel = sources
        g, b = (_aligned(y, self.axis, kernel.ndim, dtype, xp) for y in (scale, shift))
        seen = (g * _rows(kernel, self, g, dtype)).sum(self.axis)
        return ((b / g).sum() / g.size * seen).reshape(x.shape)


def _aligned(source: Any, axis: int, rank: int, dtype: Any, xp: Any) -> Any:
    """A vector along one axis."""
    shape: Shape = tuple(-1 if d == axis else 1 for d in range(rank))
    return xp.asarray(source, dtype).reshape(shape)


def _rows(kernel: Any, at: Unseen | Kept, g: Any, dtype: Any) -> Any:
    """Those of a kernel that the scale is read by."""
    rows = slice(at.start, at.start + g.size)
    part = tuple(rows if d == at.axis else slice(None) for d in range(kernel.ndim))
    return kernel[part].astype(dtype)
