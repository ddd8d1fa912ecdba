"""A plan on other trees than the one it was made for: boxes around leaves, axes of other sizes.

Sizes may differ along axes that no mean is taken over (an ensemble of fewer members, say). That a
program of these sizes does not notice the edits is for a trace to prove.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from ..axes.axis_set import AxisSet
from ..axes.labels import FREE
from ..errors import TreeError
from ..trees import alike_paths
from .edits import AffineEdit, AffineReader, CenterEdit, ScaleEdit

Shapes = Mapping[str, tuple[int, ...]]


def names_in(found: Iterable[str], wanted: Iterable[str]) -> dict[str, str]:
    """The key paths of a tree that those of a plan stand for, as far as they are there."""
    return {path: names[0] for path, names in alike_paths(wanted, found).items() if names}


@dataclass(frozen=True, slots=True)
class Fit:
    """Edits for a tree in which leaves have `names`, and `new` shapes instead of `old` ones.

    All three are by the plan's own key path; `new` holds every leaf that is edited, `argument` is
    what the tree is called in errors.

    Raises:
        TreeError: a leaf has another size along an axis that matters, or another number of axes.
    """

    argument: str
    names: Mapping[str, str]
    old: Shapes
    new: Shapes

    def __post_init__(self) -> None:
        """Of an axis of one element no plan says whether means are taken over it."""
        for path, new in self.new.items():
            old = self.old[path]
            if len(new) != len(old) or any(n == 1 != m for n, m in zip(old, new, strict=True)):
                raise self._misfit(path)

    def _misfit(self, path: str) -> TreeError:
        return TreeError(
            f"{self.argument}: leaf {self.names[path]!r} has shape {self.new[path]}, the plan was "
            f"made for {self.old[path]}, and only axes along which it neither centers nor scales "
            "may differ (from other sizes than 1); fold the model again for other sizes"
        )

    def center(self, edit: CenterEdit) -> CenterEdit:
        """The same groups along the axes that are averaged over."""
        shape, along = self.new[edit.key_path], edit.along
        pairs = zip(along.entries, along.shape, shape, strict=True)
        if any(entry != FREE and n != m for entry, n, m in pairs):
            raise self._misfit(edit.key_path)
        return CenterEdit(self.names[edit.key_path], AxisSet(shape, along.entries))

    def scale(self, edit: ScaleEdit) -> ScaleEdit:
        """The same scale, along the axes on which it still has several elements."""
        targets = (
            (self.names[path], self._axes(edit.key_path, path, axes)) for path, axes in edit.targets
        )
        return ScaleEdit(self.names[edit.key_path], tuple(targets))

    def affine(self, edit: AffineEdit) -> AffineEdit:
        """The same scale and shift, taken up by the same layers."""
        readers = tuple(self._reader(edit, reader) for reader in edit.readers)
        shift = None if edit.shift is None else self.names[edit.shift]
        return replace(edit, key_path=self.names[edit.key_path], shift=shift, readers=readers)

    def _axes(self, source: str, target: str, axes: tuple[int, ...]) -> tuple[int, ...]:
        """The axes of the target that the source, an axis of one element aside, runs along."""
        old, new = self.old[source], self.new[source]
        sizes = [m for n, m in zip(old, new, strict=True) if n != 1]
        if any(n not in (1, self.new[target][d]) for d, n in zip(axes, sizes, strict=True)):
            raise self._misfit(target)
        return tuple(d for d, n in zip(axes, sizes, strict=True) if n != 1)

    def _reader(self, edit: AffineEdit, reader: AffineReader) -> AffineReader:
        kernel = self.new[reader.kernel]
        axes = self._axes(edit.key_path, reader.kernel, reader.axes)
        if edit.shift is None or reader.bias is None:
            bias = None if reader.bias is None else self.names[reader.bias]
            return AffineReader(self.names[reader.kernel], axes, bias, reader.summed)
        if self._axes(edit.shift, reader.kernel, reader.axes) != axes:
            raise self._misfit(edit.shift)
        summed = tuple(d for d in reader.summed if kernel[d] != 1)
        rest = [n for d, n in enumerate(kernel) if d not in summed and n != 1]
        if not summed or rest != [n for n in self.new[reader.bias] if n != 1]:
            raise self._misfit(reader.bias)
        return AffineReader(self.names[reader.kernel], axes, self.names[reader.bias], summed)
