"""Scales and shifts that the linear layers behind them take up (theory, section 6)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Self

from ...printable import counted
from ..leaf import Factor, Recipe
from ..tree_fit import Fit
from .edit import (
    Edit,
    LeafEdit,
    Shapes,
    check_axes,
    check_one,
    integers,
    scale_and_readers,
    taken_up,
)


@dataclass(frozen=True, slots=True)
class AffineReader:
    """A linear layer that takes up a scale and a shift.

    The axes of the scale with more than one element run along `axes` of the leaf at `kernel`. If
    there is a shift, the leaf at `bias` takes up its product with the kernel, summed over the axes
    `summed`; the rest are the axes of the bias, in their order.

    Example:
        >>> from jax_lnfold import AffineReader
        >>> AffineReader("mlp/kernel", axes=(0,), bias="mlp/bias", summed=(0,)).kernel
        'mlp/kernel'
    """

    kernel: str
    axes: tuple[int, ...]
    bias: str | None = None
    summed: tuple[int, ...] = ()

    def check_bias(self, shapes: Shapes) -> None:
        """Raise a `ValueError` unless the bias has the axes that are not summed over."""
        kernel = shapes[self.kernel]
        rest = [n for d, n in enumerate(kernel) if d not in self.summed and n != 1]
        inside = {*self.summed} <= {*range(len(kernel))} and self.summed
        inside = inside and len({*self.summed}) == len(self.summed)
        if self.bias is None or not inside or rest != [n for n in shapes[self.bias] if n != 1]:
            raise ValueError(f"leaf {self.bias!r} is no bias of {self.kernel!r}")


@dataclass(frozen=True, slots=True)
class AffineEdit(Edit):
    """Multiply the kernels of `readers` by the scale at `key_path`, then set that to one.

    The shift at key path `shift`, if any, goes into their biases and becomes zero. Where the
    program adds 1 to the leaf, `one` is 0: they are multiplied by the leaf plus ``1 - one``, and
    it is set to `one`.

    Example:
        >>> from jax_lnfold import AffineEdit, AffineReader
        >>> reader = AffineReader("mlp/kernel", axes=(0,), bias="mlp/bias", summed=(0,))
        >>> AffineEdit("norm/scale", "norm/bias", (reader,)).version
        3
    """

    key_path: str
    shift: str | None
    readers: tuple[AffineReader, ...]
    one: int = 1

    VERSIONS: ClassVar[tuple[int, ...]] = (3, 4)
    NAMES: ClassVar[str] = "scales and readers"

    @property
    def version(self) -> int:
        """`one` came later."""
        return self.VERSIONS[self.one != 1]

    @classmethod
    def told(cls, edits: Sequence[Any]) -> str:
        """``3 scales and shifts taken up``."""
        leaves = sum(1 + (edit.shift is not None) for edit in edits)
        return f"{counted(leaves, 'scale or shift', 'scales and shifts')} taken up"

    @property
    def parts(self) -> Iterator[str]:
        """The leaf of each role; sound only if all are different (theory, section 9)."""
        return scale_and_readers(self.key_path, self.shift, self.readers)

    def changes(self) -> Iterator[tuple[str, LeafEdit]]:
        """``W' = g W`` and ``b' = b + c W``; the scale becomes one, the shift zero."""
        for reader in self.readers:
            factor = Factor(reader.axes, 1 - self.one)
            yield reader.kernel, LeafEdit((self.key_path,), Recipe(factors=(factor,)))
            if self.shift is not None and reader.bias is not None:
                recipe = Recipe(axes=reader.axes, summed=reader.summed)
                yield reader.bias, LeafEdit((self.shift, reader.kernel), recipe)
        yield from taken_up(self.key_path, self.one, self.shift)

    def check(self, shapes: Shapes) -> None:
        """There are readers, with a bias each if there is a shift, and all axes fit."""
        check_one(self.one, self.key_path)
        for reader in self.readers:
            for source in filter(None, (self.key_path, self.shift)):
                check_axes(shapes, source, reader.kernel, reader.axes)
            if self.shift is not None:
                reader.check_bias(shapes)
        if not self.readers:
            raise ValueError(f"nothing takes up the scale {self.key_path!r}")

    def refit(self, fit: Fit) -> Self:
        """The same scale and shift, taken up by the same layers."""
        readers = tuple(self._refitted(fit, reader) for reader in self.readers)
        shift = None if self.shift is None else fit.names[self.shift]
        return replace(self, key_path=fit.names[self.key_path], shift=shift, readers=readers)

    def _refitted(self, fit: Fit, reader: AffineReader) -> AffineReader:
        kernel = fit.new[reader.kernel]
        axes = fit.axes(self.key_path, reader.kernel, reader.axes)
        bias = None if reader.bias is None else fit.names[reader.bias]
        if self.shift is None or reader.bias is None:
            return AffineReader(fit.names[reader.kernel], axes, bias, reader.summed)
        if fit.axes(self.shift, reader.kernel, reader.axes) != axes:
            raise fit.misfit(self.shift)
        summed = tuple(d for d in reader.summed if kernel[d] != 1)
        rest = [n for d, n in enumerate(kernel) if d not in summed and n != 1]
        if not summed or rest != [n for n in fit.new[reader.bias] if n != 1]:
            raise fit.misfit(reader.bias)
        return AffineReader(fit.names[reader.kernel], axes, bias, summed)

    @classmethod
    def from_json(cls, data: dict[str, Any], version: int) -> Self:
        """``one`` is there since version 4."""
        readers = (
            AffineReader(r["kernel"], integers(r["axes"]), r["bias"], integers(r["summed"]))
            for r in data["readers"]
        )
        one = data["one"] if version >= 4 else 1
        return cls(data["key_path"], data["shift"], tuple(readers), one)

    def to_json(self, version: int) -> dict[str, Any]:
        """Without ``one`` where the version has none."""
        return {k: v for k, v in asdict(self).items() if k != "one" or version >= 4}
