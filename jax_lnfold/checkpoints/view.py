"""Views: a leaf of a plan as it is stored, in parts of the arrays of a checkpoint.

A step moves elements or leaves some out; it never takes one twice, so it can be undone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, ClassVar

import numpy as np

from .leaf_store import StoredLeaf

Shape = tuple[int, ...]
_MOST_AXES = 32
"""That every NumPy has."""


class Step(ABC):
    """What is done to an array on the way to the layout of the plan."""

    __slots__ = ()
    MOVES: ClassVar[bool] = True
    """Whether all elements are kept."""

    @abstractmethod
    def shape(self, shape: Shape) -> Shape:
        """That of the result; raises a `ValueError` if the step does not fit this shape."""

    @abstractmethod
    def get(self, x: np.ndarray) -> np.ndarray:
        """The result, maybe a view of `x`."""

    @abstractmethod
    def put(self, x: np.ndarray, part: np.ndarray) -> np.ndarray:
        """The array like `x` of which `get` takes `part`, maybe in the memory of `x`."""


@dataclass(frozen=True, slots=True)
class Slice(Step):
    """Positions from `start` up to, without, `stop` along an axis."""

    axis: int
    start: int
    stop: int
    MOVES: ClassVar[bool] = False

    def __str__(self) -> str:
        """As it stands in JSON."""
        return f"slice {[self.axis, self.start, self.stop]}"

    def shape(self, shape: Shape) -> Shape:
        """It must be inside: NumPy would cut it off."""
        if not (self.axis < len(shape) and self.start < self.stop <= shape[self.axis]):
            raise ValueError(f"{self} is not inside of shape {shape}")
        return *shape[: self.axis], self.stop - self.start, *shape[self.axis + 1 :]

    def _index(self) -> tuple[slice, ...]:
        return (*[slice(None)] * self.axis, slice(self.start, self.stop))

    def get(self, x: np.ndarray) -> np.ndarray:
        """A view."""
        return x[self._index()]

    def put(self, x: np.ndarray, part: np.ndarray) -> np.ndarray:
        """`x`, changed."""
        x[self._index()] = part
        return x


@dataclass(frozen=True, slots=True)
class Reshape(Step):
    """Other sizes, in row-major order; one may be -1, as in NumPy."""

    sizes: Shape

    def __str__(self) -> str:
        """As it stands in JSON."""
        return f"reshape {[*self.sizes]}"

    def shape(self, shape: Shape) -> Shape:
        """The sizes."""
        known = prod(n for n in self.sizes if n >= 0)
        sizes = self.sizes
        if -1 in sizes and known:
            sizes = tuple(prod(shape) // known if n < 0 else n for n in sizes)
        if -1 in sizes or prod(sizes) != prod(shape):
            raise ValueError(f"{self} does not fit shape {shape}")
        return sizes

    def get(self, x: np.ndarray) -> np.ndarray:
        """A view or a copy."""
        return x.reshape(self.sizes)

    def put(self, x: np.ndarray, part: np.ndarray) -> np.ndarray:
        """`part` with the sizes of `x`."""
        return part.reshape(x.shape)


@dataclass(frozen=True, slots=True)
class Transpose(Step):
    """Axes in another order: axis i of the result is axis ``axes[i]``, as in NumPy."""

    axes: tuple[int, ...]

    def __str__(self) -> str:
        """As it stands in JSON."""
        return f"transpose {[*self.axes]}"

    def shape(self, shape: Shape) -> Shape:
        """All axes must be named."""
        if len(self.axes) != len(shape):
            raise ValueError(f"{self} does not fit shape {shape}")
        return tuple(shape[axis] for axis in self.axes)

    def get(self, x: np.ndarray) -> np.ndarray:
        """A view."""
        return x.transpose(self.axes)

    def put(self, x: np.ndarray, part: np.ndarray) -> np.ndarray:
        """`part` with its axes as in `x`."""
        return part.transpose(np.argsort(self.axes))


def step_of(name: Any, numbers: Any) -> Step:
    """The step that a map calls so; raises a `ValueError` for anything else."""
    if not isinstance(numbers, list) or not all(type(n) is int for n in numbers):
        raise ValueError(f"{name!r} takes a list of integers")
    if len(numbers) > _MOST_AXES:
        raise ValueError(f"{name!r} has more than {_MOST_AXES} numbers")
    match name:
        case "slice":
            if len(numbers) != 3 or min(numbers) < 0 or numbers[1] >= numbers[2]:
                raise ValueError(f"slice {numbers} is not [axis, start, stop] with start < stop")
            return Slice(*numbers)
        case "reshape":
            if min(numbers, default=0) < -1 or numbers.count(-1) > 1:
                raise ValueError(f"reshape {numbers} is no list of sizes with at most one -1")
            return Reshape(tuple(numbers))
        case "transpose":
            if sorted(numbers) != [*range(len(numbers))]:
                raise ValueError(f"transpose {numbers} is no permutation of axes 0, 1, ...")
            return Transpose(tuple(numbers))
    raise ValueError(f"{str(name)[:40]!r} is no step; there are slice, reshape and transpose")


# --- steps in a row ------------------------------------------------------------------------------


def _shape_after(steps: Sequence[Step], shape: Shape) -> Shape:
    for step in steps:
        shape = step.shape(shape)
    return shape


def _get(steps: Sequence[Step], x: np.ndarray) -> np.ndarray:
    for step in steps:
        x = step.get(x)
    return x


def _put(steps: Sequence[Step], x: np.ndarray, part: np.ndarray) -> np.ndarray:
    if not steps:
        return part
    first, *rest = steps
    return first.put(x, _put(rest, first.get(x), part) if rest else part)


@dataclass(frozen=True, slots=True)
class Part:
    """What the steps leave of the array `name` of a checkpoint."""

    name: str
    steps: tuple[Step, ...] = ()

    def shape(self, stored: Mapping[str, StoredLeaf]) -> Shape:
        """Raises a `ValueError` if there is no such array, or a step does not fit it."""
        if self.name not in stored:
            raise ValueError(f"{self.name!r} is not in the checkpoint")
        return _shape_after(self.steps, stored[self.name].shape)

    def get(self, x: np.ndarray) -> np.ndarray:
        """The part of the array, maybe a view."""
        return _get(self.steps, x)

    def put(self, x: np.ndarray, part: np.ndarray) -> np.ndarray:
        """The array with another part, maybe in the memory of `x`."""
        return _put(self.steps, x, part)


@dataclass(frozen=True, slots=True)
class View:
    """Parts, put one behind the other along an axis if it is given, and steps after that.

    These must be steps that keep all elements.
    """

    parts: tuple[Part, ...]
    axis: int | None = None
    steps: tuple[Step, ...] = ()

    def __str__(self) -> str:
        """The names of what holds it."""
        return ", ".join(dict.fromkeys(part.name for part in self.parts))

    def renamed(self, rename: Callable[[str], str]) -> View:
        """The same of other arrays."""
        return replace(self, parts=tuple(replace(p, name=rename(p.name)) for p in self.parts))

    def leaf(self, stored: Mapping[str, StoredLeaf]) -> StoredLeaf:
        """Its shape and dtype; raises a `ValueError` if it does not fit what is stored."""
        shape = _shape_after(self.steps, self._joint(stored))
        dtypes = {stored[part.name].dtype for part in self.parts}
        if len(dtypes) > 1:
            raise ValueError(f"its parts have several dtypes: {', '.join(sorted(dtypes))}")
        return StoredLeaf(shape, dtypes.pop())

    def _joint(self, stored: Mapping[str, StoredLeaf]) -> Shape:
        first, *others = (part.shape(stored) for part in self.parts)
        if (axis := self.axis) is None:
            return first
        for shape in (first, *others):
            if axis >= len(shape) or len(shape) != len(first):
                raise ValueError(f"axis {axis} of its parts does not fit shape {shape}")
            if shape[:axis] != first[:axis] or shape[axis + 1 :] != first[axis + 1 :]:
                raise ValueError(f"shapes {first} and {shape} do not fit along axis {axis}")
        length = sum(shape[axis] for shape in (first, *others))
        return *first[:axis], length, *first[axis + 1 :]

    def read(self, read: Callable[[str], np.ndarray]) -> np.ndarray:
        """The leaf in the layout of the plan: an array in row-major order."""
        parts = [part.get(read(part.name)) for part in self.parts]
        joint = parts[0] if self.axis is None else np.concatenate(parts, self.axis)
        return np.asarray(_get(self.steps, joint), order="C")  # as in memory, bit by bit

    def pieces(
        self, stored: Mapping[str, StoredLeaf], new: np.ndarray
    ) -> Iterator[tuple[Part, np.ndarray]]:
        """What of a new leaf belongs to each part."""
        joint = _put(self.steps, np.empty(self._joint(stored), new.dtype), new)
        if (axis := self.axis) is None:
            yield self.parts[0], joint
            return
        start = 0
        for part in self.parts:
            stop = start + part.shape(stored)[axis]
            yield part, joint[(*[slice(None)] * axis, slice(start, stop))]
            start = stop
