"""Scales and shifts of keys that those of the queries take up (theory, section 11)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from ...printable import counted
from ..leaf import Factor, Recipe
from ..tree_fit import Fit
from .edit import Edit, LeafEdit, Shapes, check_axes, check_one, integers, taken_up


@dataclass(frozen=True, slots=True)
class QueryEdit(Edit):
    """Multiply the scale and shift of queries by the scale of the keys, then set that to one.

    The keys are scaled by the leaf at `key_path` and shifted by that at `shift`, which becomes
    zero. The queries are scaled by the leaf at `query`, along whose `axes` the keys' scale runs,
    and shifted by that at `query_shift`, along whose `shift_axes` it runs. Either shift may be
    None. Where the program adds 1 to the leaf at `key_path`, `one` is 0: the others are multiplied
    by the leaf plus ``1 - one``, and it is set to `one`.

    Example:
        >>> from jax_lnfold import QueryEdit
        >>> QueryEdit("key_norm/scale", None, "query_norm/scale", None, axes=(0,)).query
        'query_norm/scale'
    """

    key_path: str
    shift: str | None
    query: str
    query_shift: str | None
    axes: tuple[int, ...]
    shift_axes: tuple[int, ...] = ()
    one: int = 1

    VERSIONS: ClassVar[tuple[int, ...]] = (6,)
    NAMES: ClassVar[str] = "scales and shifts of keys and queries"

    @classmethod
    def told(cls, edits: Sequence[Any]) -> str:
        """``2 scales and shifts of keys merged into those of queries``."""
        leaves = sum(1 + (edit.shift is not None) for edit in edits)
        number = counted(leaves, "scale or shift", "scales and shifts")
        return f"{number} of keys merged into those of queries"

    @property
    def parts(self) -> Iterator[str]:
        """The leaf of each role; sound only if all are different (theory, section 9)."""
        leaves = (self.key_path, self.shift, self.query, self.query_shift)
        return (leaf for leaf in leaves if leaf is not None)

    @property
    def _targets(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """What is multiplied by the scale of the keys, and along which axes."""
        yield self.query, self.axes
        if self.query_shift is not None:
            yield self.query_shift, self.shift_axes

    @property
    def _shifts(self) -> Iterator[tuple[str, str]]:
        """Each shift, and the scale whose axes it has."""
        pairs = (self.shift, self.key_path), (self.query_shift, self.query)
        return ((shift, scale) for shift, scale in pairs if shift is not None)

    def changes(self) -> Iterator[tuple[str, LeafEdit]]:
        """``gq' = gq gk`` and ``bq' = bq gk``; ``gk`` becomes one, ``bk`` zero."""
        for path, axes in self._targets:
            factor = Factor(axes, 1 - self.one)
            yield path, LeafEdit((self.key_path,), Recipe(factors=(factor,)))
        yield from taken_up(self.key_path, self.one, self.shift)

    def check(self, shapes: Shapes) -> None:
        """The axes fit, and shifts are as large as their scales."""
        check_one(self.one, self.key_path)
        for path, axes in self._targets:
            check_axes(shapes, self.key_path, path, axes)
        for shift, scale in self._shifts:
            if _sizes(shapes[shift]) != _sizes(shapes[scale]):
                raise ValueError(f"leaf {shift!r} is no shift of what {scale!r} scales")
        if self.query_shift is None and self.shift_axes:
            raise ValueError(f"axes {self.shift_axes} are of no leaf")

    def refit(self, fit: Fit) -> Self:
        """The same keys and queries."""
        for shift, scale in self._shifts:
            if _sizes(fit.new[shift]) != _sizes(fit.new[scale]):
                raise fit.misfit(shift)
        found = [fit.axes(self.key_path, path, axes) for path, axes in self._targets]
        return replace(
            self,
            key_path=fit.names[self.key_path],
            shift=None if self.shift is None else fit.names[self.shift],
            query=fit.names[self.query],
            query_shift=None if self.query_shift is None else fit.names[self.query_shift],
            axes=found[0],
            shift_axes=found[-1] if self.query_shift is not None else (),
        )

    @classmethod
    def from_json(cls, data: dict[str, Any], version: int) -> Self:
        """All fields, by their names."""
        along = integers(data["axes"]), integers(data["shift_axes"])
        shifts = data["shift"], data["query_shift"]
        return cls(data["key_path"], shifts[0], data["query"], shifts[1], *along, data["one"])


def _sizes(shape: Sequence[int]) -> list[int]:
    """Of the axes with more than one element."""
    return [n for n in shape if n != 1]
