"""What leaves are taken to be: constant along axes, or zero-mean, because their values are so.

Whoever makes these sees to it that a plan says so, too, and that values are checked against it.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass, field

from ..axes.axis_set import AxisSet


@dataclass(frozen=True, slots=True)
class Assumptions:
    """By leaf value, the axes along which it is `constant`, and the set along which it has no mean.

    Of some leaves that is so but for their `means`, a number each, of all positions: what is
    derived holds up to such numbers, and whoever uses it sees to it that they cancel.

    Example:
        >>> from jax_lnfold.axes.axis_set import AxisSet
        >>> along = AxisSet.over((3, 5), axes=[1])
        >>> Assumptions(constant={7: frozenset({1})}).is_constant(7, along)
        True
    """

    constant: Mapping[int, frozenset[int]] = field(default_factory=dict)
    centered: Mapping[int, AxisSet] = field(default_factory=dict)
    means: Mapping[int, float] = field(default_factory=dict)

    def is_constant(self, value: int, along: AxisSet) -> bool:
        """Whether a value is taken to be constant along all axes of a set."""
        if value in self.centered and self.centered[value].trivial:
            return True  # zero
        return value in self.constant and {*along.axes} <= self.constant[value]

    def is_centered(self, value: int, along: AxisSet) -> bool:
        """Whether a value is taken to be zero-mean along a set."""
        return value in self.centered and self.centered[value].refines(along)

    def of(self, values: Container[int]) -> Assumptions:
        """The part that is about some values."""
        return Assumptions(
            {v: axes for v, axes in self.constant.items() if v in values},
            {v: along for v, along in self.centered.items() if v in values},
            {v: mean for v, mean in self.means.items() if v in values},
        )

    def without_means(self, values: Container[int]) -> Assumptions:
        """The same, but of some values not that they have no mean but a number."""
        gone = {v for v in self.means if v in values}
        centered = {v: along for v, along in self.centered.items() if v not in gone}
        means = {v: mean for v, mean in self.means.items() if v not in gone}
        return Assumptions(self.constant, centered, means)


NOTHING = Assumptions()
"""What holds whatever the values are."""
