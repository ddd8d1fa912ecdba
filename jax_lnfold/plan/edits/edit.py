"""What every kind of edit has to say of itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self

from ..leaf import Recipe
from ..tree_fit import Fit

Shapes = Mapping[str, tuple[int, ...]]
"""The shape of every leaf of a tree, by key path."""


@dataclass(frozen=True, slots=True)
class LeafEdit:
    """All that is done to one leaf: the recipe, and key paths of the leaves that it takes."""

    sources: tuple[str, ...]
    recipe: Recipe

    def then(self, other: LeafEdit) -> LeafEdit:
        """Both at once; at most one of them adds a product, or fills, or gives means."""
        one, two = self.recipe, other.recipe
        added = 2 if two.summed else 0  # a product comes first, and so do its sources
        sources = (*other.sources[:added], *self.sources, *other.sources[added:])
        recipe = Recipe(
            fill=one.fill if two.fill is None else two.fill,
            axes=one.axes or two.axes,
            summed=one.summed or two.summed,
            factors=one.factors + two.factors,
            sets=one.sets + two.sets,
            means=one.means if two.means is None else two.means,
            constant=one.constant + two.constant,
            assumed=one.assumed or two.assumed,
            terms=one.terms + two.terms,
        )
        return LeafEdit(sources, recipe)


def fills_of(edits: Mapping[str, LeafEdit], edit: LeafEdit) -> list[float | None] | None:
    """With what the sources of an edit are filled when all edits are done.

    None for the kernel of a product, whose other factor, the shift, is then zero. If another source
    is not filled, what it does to the leaf cannot be told: no list.
    """
    fills = [edits[s].recipe.fill if s in edits else None for s in edit.sources]
    kernel = 1 if edit.recipe.summed else None
    return None if any(f is None and i != kernel for i, f in enumerate(fills)) else fills


class Edit(ABC):
    """One edit of a parameter tree, as plain data: a frozen dataclass of key paths and axes.

    A plan has a field for each kind, which is the section of its file, too. `VERSIONS` are those of
    plan files that came with something of the kind, the first one with the section. `NAMES` says
    what its leaves are, all of which must be different, within the section, too, unless it is
    empty. If they are `ALONE`, nothing else may be done to them.
    """

    __slots__ = ()
    VERSIONS: ClassVar[tuple[int, ...]] = (2,)
    NAMES: ClassVar[str] = ""
    ALONE: ClassVar[bool] = False

    @property
    def version(self) -> int:
        """The first version of plan files that can say what this edit says."""
        return self.VERSIONS[0]

    @classmethod
    @abstractmethod
    def told(cls, edits: Sequence[Any]) -> str:
        """What reports say of all edits of this kind, ``2 scales merged``."""

    @property
    @abstractmethod
    def parts(self) -> Iterator[str]:
        """The leaves that it changes, by key path, with one entry for each role."""

    @abstractmethod
    def changes(self) -> Iterator[tuple[str, LeafEdit]]:
        """What it does to which leaf; it takes other leaves as they were before all edits."""

    @abstractmethod
    def check(self, shapes: Shapes) -> None:
        """Raise a `ValueError` if it does not fit leaves of these shapes."""

    @abstractmethod
    def refit(self, fit: Fit) -> Self:
        """The same edit of a tree with other names and sizes; raises a `TreeError`."""

    @classmethod
    @abstractmethod
    def from_json(cls, data: dict[str, Any], version: int) -> Self:
        """The edit that `to_json` made; raises `KeyError`, `TypeError` or `ValueError`."""

    def to_json(self, version: int) -> dict[str, Any]:
        """The edit as JSON objects, for a plan file of this version."""
        return asdict(self)  # type: ignore[call-overload]


def scale_and_readers(scale: str, shift: str | None, readers: Iterable[Any]) -> Iterator[str]:
    """The leaf of each role: scale, shift, and the `kernel` and `bias` of each reader."""
    read = (leaf for r in readers for leaf in (r.kernel, r.bias))
    return (leaf for leaf in (scale, shift, *read) if leaf is not None)


def check_axes(shapes: Shapes, source: str, path: str, axes: tuple[int, ...]) -> None:
    """A source fits the axes of a leaf that its axes of other sizes than 1 run along."""
    sizes = [n for n in shapes[source] if n != 1]
    found = [shapes[path][d] for d in axes if 0 <= d < len(shapes[path])]
    if found != sizes or len({*axes}) < len(axes):
        raise ValueError(f"axes {axes} of leaf {path!r} do not fit {source!r}")


def check_one(one: int, path: str) -> None:
    """What a scale becomes: 1, or 0 if the program adds 1 to it."""
    if type(one) is not int or one not in (0, 1):
        raise ValueError(f"{one!r} does not stand for one in {path!r}")


def taken_up(scale: str, one: int, shift: str | None) -> Iterator[tuple[str, LeafEdit]]:
    """What is left of a scale and a shift that other leaves have taken up: one and zero."""
    yield scale, LeafEdit((), Recipe(fill=float(one)))
    if shift is not None:
        yield shift, LeafEdit((), Recipe(fill=0.0))


def integers(data: Any) -> tuple[int, ...]:
    """A list of integers of a JSON text."""
    if not isinstance(data, list) or not all(type(n) is int for n in data):
        raise TypeError(f"{str(data)[:60]} is not a list of integers")
    return tuple(data)
