"""Centering of one array: the operator C_S, and the edit of one parameter leaf (CBWC)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np

from ..axes.axis_set import AxisSet
from ..axes.labels import ALL
from ..centering import Shape, group_means, rounding_of_means, widened


def center_array(x: Any, along: AxisSet, part: Shape | None = None) -> Any:
    """``x`` minus its mean over every group of `along` (theory: the operator C_S).

    Computed in float64 for NumPy arrays; for JAX arrays in the dtype of ``x`` or float32, whichever
    is wider, with a second pass that removes the rounding of the first. The result has the shape
    and dtype of ``x``, rounded once. `part` is the shape of what one device holds (all of it).
    """
    return edited(x, _NOTHING, Recipe(sets=(along,)), part).astype(x.dtype, copy=False)


class Multiplier(ABC):
    """What a leaf is multiplied by, made from `takes` leaves: a frozen dataclass."""

    __slots__ = ()
    takes: ClassVar[int] = 1

    @property
    def plain(self) -> bool:
        """Whether it is a leaf as it is stored."""
        return False

    @abstractmethod
    def value(self, sources: Sequence[Any], shape: Shape, dtype: Any, xp: Any) -> Any:
        """The multiplier for an array of `shape`: as many axes, of the same sizes or of 1.

        An array of `xp`, NumPy or `jax.numpy`, and of the `dtype` of the arithmetic.
        """


@dataclass(frozen=True, slots=True)
class Factor(Multiplier):
    """A factor runs along `axes` of what it scales; it is a leaf plus the number `plus`."""

    axes: tuple[int, ...]
    plus: int = 0

    @property
    def plain(self) -> bool:
        """Nothing is added."""
        return not self.plus

    def value(self, sources: Sequence[Any], shape: Shape, dtype: Any, xp: Any) -> Any:
        """The leaf with its axes where they are in `shape`, plus the number."""
        aligned = _aligned(xp.asarray(sources[0], dtype), self.axes, shape, xp)
        return aligned + self.plus if self.plus else aligned


class Term(ABC):
    """What is added to a leaf, made from itself and `takes` leaves: a frozen dataclass.

    `first` if it takes a leaf that may be edited, too, but as it was.
    """

    __slots__ = ()
    takes: ClassVar[int] = 1
    first: ClassVar[bool] = False

    @abstractmethod
    def value(self, x: Any, sources: Sequence[Any], dtype: Any, xp: Any) -> Any:
        """What is added to `x`: an array of its shape, of `xp` and the arithmetic's `dtype`."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is done to one leaf, with the other leaves (`sources`) that it takes, in this order.

    With `fill`, all elements become that number. Otherwise first the `terms` are added, which
    nothing else goes with; or, if there are `summed` axes, the product of a shift and a kernel: the
    shift runs along `axes` of the kernel, `summed` axes are summed over and the leaf's own axes run
    along the rest. Then the leaf is scaled along each of `factors`, centered along `sets`, and at
    last gets the `means` of the groups of the only set, one for each, in row-major order. What is
    `assumed` is edited in training only: it has no means along `sets`, and is constant along each
    of `constant`, whatever is done.
    """

    fill: float | None = None
    axes: tuple[int, ...] = ()
    summed: tuple[int, ...] = ()
    factors: tuple[Multiplier, ...] = ()
    sets: tuple[AxisSet, ...] = ()
    means: tuple[float, ...] | None = None
    constant: tuple[AxisSet, ...] = ()
    assumed: bool = False
    terms: tuple[Term, ...] = ()

    @property
    def is_first(self) -> bool:
        """Whether it takes leaves that are edited, too, as they were before."""
        return bool(self.summed) or any(term.first for term in self.terms)

    @property
    def alike(self) -> Recipe:
        """The recipe that is followed by the same program: numbers of means are its operands."""
        return self if self.means is None else replace(self, means=())

    @property
    def by_itself(self) -> Recipe:
        """Without what takes other leaves, which leaves no trace of its own."""
        return replace(self, axes=(), summed=(), factors=(), terms=())

    def means_for(self, dtype: Any) -> np.ndarray | None:
        """The means, along the axes of the leaf, with one element where all of it has one mean."""
        if self.means is None:
            return None
        (along,) = self.sets
        sizes = [1 if e == ALL else n for e, n in zip(along.entries, along.shape, strict=True)]
        with np.errstate(over="ignore"):  # what becomes infinite is found when it was added
            return np.asarray(self.means, dtype).reshape(sizes)


class Terms(NamedTuple):
    """The arrays that a leaf is edited with: what is added, what it is scaled by, and its means."""

    added: Any
    factor: Any
    means: Any


_NOTHING = Terms(None, None, None)


def looks_edited(
    x: Any, means: Any, recipe: Recipe, slack: float, part: Shape | None = None
) -> Any:
    """Whether a leaf is as its recipe leaves it, up to `slack` times what rounding does to means.

    What was added to it, or multiplied by, leaves no trace of its own.
    """
    if recipe.fill is not None:
        return (x == recipe.fill).all()
    xp, wide = np if isinstance(x, np.ndarray) else jnp, x.astype(wide_type(x))
    # Taken away first: sums of numbers near a mean that is large would be rounded by far more.
    rest = wide if means is None else wide - means
    if means is not None and wide.dtype == x.dtype:
        slack *= 4  # as many times are the numbers rounded by themselves, when added and here
    found = xp.ones((), bool)
    for along in recipe.sets:
        bound = slack * rounding_of_means(wide, x.dtype, along, xp, part)
        found &= (abs(group_means(rest, along, xp, part)) <= bound).all()
    for along in recipe.constant:
        found &= (x == first_of_each(x, along)).all()
    return found


def first_of_each(x: Any, along: AxisSet) -> Any:
    """The first number of every group along whole axes; NaN equals none, so it is not constant."""
    return x[tuple(slice(1) if entry == ALL else slice(None) for entry in along.entries)]


def terms_of(x: Any, means: Any, sources: Sequence[Any], recipe: Recipe) -> Terms:
    """What to add to `x` and by what to scale it, in the dtype of the arithmetic.

    That is the dtype of `x` for a mere product with one of the same: it is rounded once anyway.
    """
    xp, wide = np if isinstance(x, np.ndarray) else jnp, wide_type(x)
    added, factor, rest = None, None, list(sources)
    if recipe.summed:
        shift, kernel, *rest = rest
        if xp is np:  # which would store all products
            added = _summed(np.asarray(shift, wide).squeeze(), np.asarray(kernel), recipe)
        else:
            kernel = jnp.asarray(kernel, wide)
            aligned = _aligned(jnp.asarray(shift, wide), recipe.axes, kernel.shape, jnp)
            added = (aligned * kernel).sum(axis=recipe.summed)
        added = added.reshape(x.shape)
    elif recipe.terms:
        for term in recipe.terms:
            taken, rest = rest[: term.takes], rest[term.takes :]
            value = term.value(x, taken, wide, xp)
            added = value if added is None else added + value
    elif not recipe.sets and [f.plain for f in recipe.factors] == [True]:
        wide = x.dtype if getattr(rest[0], "dtype", None) == x.dtype else wide  # or a number
    for multiplier in recipe.factors:
        taken, rest = rest[: multiplier.takes], rest[multiplier.takes :]
        value = multiplier.value(taken, x.shape, wide, xp)
        factor = value if factor is None else factor * value
    return Terms(added, factor, means)


def _aligned(source: Any, axes: tuple[int, ...], shape: tuple[int, ...], xp: Any) -> Any:
    """The source with its axes where they are in an array of this shape."""
    kept = [n if d in axes else 1 for d, n in enumerate(shape)]
    return xp.squeeze(source).transpose(*np.argsort(axes)).reshape(kept)


_BLOCK = 1 << 17
"""About as many numbers of a NumPy array are held in double precision at a time."""


def blocks(shape: Shape, axis: int) -> Iterator[tuple[slice, ...]]:
    """Parts of an array, as indices: some positions along one axis each."""
    step = max(1, _BLOCK * shape[axis] // max(1, prod(shape)))
    for start in range(0, shape[axis], step):
        yield (*[slice(None)] * axis, slice(start, start + step))


def _summed(shift: np.ndarray, kernel: np.ndarray, recipe: Recipe) -> Any:
    """Their product in the dtype of `shift`, summed block by block."""
    added, axis = np.zeros((), shift.dtype), recipe.summed[0]
    kept = [d for d in range(kernel.ndim) if d not in recipe.summed]
    for part in blocks(kernel.shape, axis):
        some = shift[tuple(part[axis] if d == axis else slice(None) for d in recipe.axes)]
        block = kernel[part].astype(shift.dtype)
        added = added + np.einsum(some, recipe.axes, block, range(kernel.ndim), kept)
    return added


def edited(x: Any, terms: Terms, recipe: Recipe, part: Shape | None = None) -> Any:
    """The leaf after its recipe, in the dtype of the arithmetic."""
    xp = np if isinstance(x, np.ndarray) else jnp
    if recipe.fill is not None:
        return xp.full_like(x, recipe.fill)
    wide = x.astype(wide_type(x))  # a copy, so that NumPy may work in place
    if terms.added is not None:
        wide += terms.added
    if terms.factor is not None:
        wide *= terms.factor.astype(wide.dtype, copy=False)
    for along in recipe.sets:
        wide -= group_means(wide, along, xp, part)
        if xp is jnp or wide.dtype == x.dtype:  # what the first pass rounded off
            wide -= group_means(wide, along, xp, part)
    if terms.means is not None:
        wide += terms.means
    return wide


def bounded(x: Any, terms: Terms, recipe: Recipe) -> Any:
    """Whether a bound on the largest number shows that no edit overflows.

    The bound is the root of the sum of squares: compilers sum faster than they compare.
    """
    wide = wide_type(x)
    largest = jnp.sqrt(jnp.square(x.astype(wide)).sum())
    if terms.added is not None:
        largest += jnp.max(jnp.abs(terms.added), initial=0)
    if terms.factor is not None:
        largest *= jnp.max(jnp.abs(terms.factor), initial=0).astype(wide)
    largest *= 2.0 ** (1 + len(recipe.sets))  # a mean is no larger; once more for rounding
    if terms.means is not None:
        largest += 2 * jnp.max(jnp.abs(terms.means), initial=0)
    sums = largest * float(x.size)
    return (largest < float(jnp.finfo(x.dtype).max)) & (sums < float(jnp.finfo(wide).max))


def wide_type(x: Any) -> Any:
    """The dtype in which means of `x` are taken."""
    return np.dtype(np.float64) if isinstance(x, np.ndarray) else widened(x.dtype)
