"""Centering of one array: the operator C_S, and the edit of one parameter leaf (CBWC)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._compat import is_tracer
from ..axes.axis_set import AxisSet
from ..axes.labels import ALL, FREE
from ..centering import Shape, group_means, rounding_of_means, widened


def center_array(x: Any, along: AxisSet, part: Shape | None = None) -> Any:
    """``x`` minus its mean over every group of `along` (theory: the operator C_S).

    Computed in float64 for NumPy arrays; for JAX arrays in the dtype of ``x`` or float32, whichever
    is wider, with a second pass that removes the rounding of the first. The result has the shape
    and dtype of ``x``, rounded once. `part` is the shape of what one device holds (all of it).
    """
    return _edited(x, _NOTHING, Recipe(sets=(along,)), part).astype(x.dtype, copy=False)


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

    def means_for(self, dtype: Any) -> np.ndarray | None:
        """The means, along the axes of the leaf, with one element where all of it has one mean."""
        if self.means is None:
            return None
        (along,) = self.sets
        sizes = (1 if e == ALL else n for e, n in zip(along.entries, along.shape, strict=True))
        with np.errstate(over="ignore"):  # what becomes infinite is found when it was added
            return np.asarray(self.means, dtype).reshape(*sizes)


class _Terms(NamedTuple):
    """The arrays that a leaf is edited with: what is added, what it is scaled by, and its means."""

    added: Any
    factor: Any
    means: Any


_NOTHING = _Terms(None, None, None)


def edit_leaf(x: Any, sources: Sequence[Any], recipe: Recipe, donate: bool) -> tuple[Any, Any]:
    """One leaf after its recipe.

    Shape, dtype and sharding stay. With `donate` a JAX array gives up its memory. The second
    result is whether finite numbers became too large for the dtype (a bool, maybe on a device);
    with `donate` it is false, and to be asked before (see `overflows`).
    """
    if is_tracer(x) or any(map(is_tracer, sources)):
        x = jnp.asarray(x)
        terms = _terms(x, recipe.means_for(_wide_type(x)), sources, recipe)
        return _edited(x, terms, recipe).astype(x.dtype), False
    if not isinstance(x, jax.Array):
        x, noted = np.asarray(x), list[str]()
        note = np.errstate(over="call", call=lambda kind, _: noted.append(kind))
        with note, np.errstate(divide="ignore", invalid="ignore"):  # that makes no finite number
            terms = _terms(x, recipe.means_for(_wide_type(x)), sources, recipe)
            new = _edited_in_blocks(x, terms, recipe)
        added = recipe.summed or recipe.terms
        if not noted and not added and x.dtype.isbuiltin == 1:
            return new, False  # NumPy notes overflows of its own dtypes, but in einsum
        return new, not _finite(new) and all(_finite(np.asarray(v)) for v in (x, *sources))
    edit = _compiled_edit(recipe.alike, donate, _sharding_of(x))
    return edit(x, recipe.means_for(_wide_type(x)), *sources)


def is_edited(x: Any, recipe: Recipe, slack: float = 1.0) -> Any:
    """Whether a leaf is as its recipe leaves it, up to rounding (a bool, maybe on a device).

    What was added to it, or multiplied by, leaves no trace of its own. `slack` is how many times
    larger than by rounding its means may be.
    """
    if isinstance(x, jax.Array):
        means = recipe.means_for(_wide_type(x))
        return _compiled_look(recipe.alike, slack, _sharding_of(x))(x, means)
    x = np.asarray(x)
    means, axis = recipe.means_for(_wide_type(x)), _free_axis(x.shape, recipe)
    parts = [(...,)] if axis is None else _blocks(x.shape, axis)
    return all(_looks_edited(x[part], _cut(means, part, axis), recipe, slack) for part in parts)


def look_at(
    x: Any, sources: Sequence[Any], recipe: Recipe, fills: Sequence[float | None]
) -> list[Any]:
    """Bools (maybe on devices) that are all true if an edit would change nothing but roundings.

    The sources are then filled already with `fills`: factors of one, and products of zero.
    """
    filled = zip(sources, fills, strict=True)
    taken = (is_edited(source, Recipe(fill=fill)) for source, fill in filled if fill is not None)
    return [is_edited(x, recipe), *taken]


def _looks_edited(
    x: Any, means: Any, recipe: Recipe, slack: float, part: Shape | None = None
) -> Any:
    if recipe.fill is not None:
        return (x == recipe.fill).all()
    xp, wide = np if isinstance(x, np.ndarray) else jnp, x.astype(_wide_type(x))
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


def overflows(x: Any, sources: Sequence[Any], recipe: Recipe) -> bool:
    """Whether finite numbers would become too large for the dtype in `edit_leaf`."""
    if not isinstance(x, jax.Array):
        return bool(edit_leaf(x, sources, recipe, donate=False)[1])
    means, alike = recipe.means_for(_wide_type(x)), recipe.alike
    if _compiled_bound(alike)(x, means, *sources):
        return False
    return bool(_compiled_check(alike, _sharding_of(x))(x, means, *sources))


def _sharding_of(x: jax.Array) -> Any:
    return x.sharding if x.committed else None


def _finite(x: Any) -> Any:
    return (np if isinstance(x, np.ndarray) else jnp).isfinite(x).all()


def _terms(x: Any, means: Any, sources: Sequence[Any], recipe: Recipe) -> _Terms:
    """What to add to `x` and by what to scale it, in the dtype of the arithmetic.

    That is the dtype of `x` for a mere product with one of the same: it is rounded once anyway.
    """
    xp, wide = np if isinstance(x, np.ndarray) else jnp, _wide_type(x)
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
        wide = x.dtype if rest[0].dtype == x.dtype else wide
    for multiplier in recipe.factors:
        taken, rest = rest[: multiplier.takes], rest[multiplier.takes :]
        value = multiplier.value(taken, x.shape, wide, xp)
        factor = value if factor is None else factor * value
    return _Terms(added, factor, means)


def _aligned(source: Any, axes: tuple[int, ...], shape: tuple[int, ...], xp: Any) -> Any:
    """The source with its axes where they are in an array of this shape."""
    kept = [n if d in axes else 1 for d, n in enumerate(shape)]
    return xp.squeeze(source).transpose(*np.argsort(axes)).reshape(kept)


def _summed(shift: np.ndarray, kernel: np.ndarray, recipe: Recipe) -> Any:
    """Their product in the dtype of `shift`, summed block by block."""
    added, axis = np.zeros((), shift.dtype), recipe.summed[0]
    kept = [d for d in range(kernel.ndim) if d not in recipe.summed]
    for part in _blocks(kernel.shape, axis):
        some = shift[tuple(part[axis] if d == axis else slice(None) for d in recipe.axes)]
        block = kernel[part].astype(shift.dtype)
        added = added + np.einsum(some, recipe.axes, block, range(kernel.ndim), kept)
    return added


def _edited(x: Any, terms: _Terms, recipe: Recipe, part: Shape | None = None) -> Any:
    """The leaf after its recipe, in the dtype of the arithmetic."""
    xp = np if isinstance(x, np.ndarray) else jnp
    if recipe.fill is not None:
        return xp.full_like(x, recipe.fill)
    wide = x.astype(_wide_type(x))  # a copy, so that NumPy may work in place
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


_BLOCK = 1 << 17
"""About as many numbers of a NumPy array are held in double precision at a time."""


def _blocks(shape: Shape, axis: int) -> Iterator[tuple[slice, ...]]:
    """Parts of an array, as indices: some positions along one axis each."""
    step = max(1, _BLOCK * shape[axis] // max(1, prod(shape)))
    for start in range(0, shape[axis], step):
        yield (*[slice(None)] * axis, slice(start, start + step))


def _free_axis(shape: Shape, recipe: Recipe) -> int | None:
    """The longest axis that no mean is taken over, if there is one."""
    every = (*recipe.sets, *recipe.constant)
    free = [d for d in range(len(shape)) if all(s.entries[d] == FREE for s in every)]
    return max(free, key=lambda d: shape[d], default=None)


def _cut(term: Any, part: tuple[Any, ...], axis: int | None) -> Any:
    """What of a term is for a part of the leaf, cut along the axis."""
    return term if term is None or axis is None or term.shape[axis] == 1 else term[part]


def _edited_in_blocks(x: np.ndarray, terms: _Terms, recipe: Recipe) -> np.ndarray:
    """`_edited` in blocks along the longest axis that no mean is taken over, if there is one."""
    new, factor = np.empty_like(x), terms.factor
    if factor is not None and factor.dtype == x.dtype and terms.added is None and not recipe.sets:
        return np.multiply(x, factor, out=new)
    axis = _free_axis(x.shape, recipe)
    for part in [(...,)] if axis is None else _blocks(x.shape, axis):
        own = _Terms(*(_cut(term, part, axis) for term in terms))
        new[part] = _edited(x[part], own, recipe)
    return new


@lru_cache(maxsize=256)
def _compiled_edit(recipe: Recipe, donate: bool, sharding: Any) -> Callable[..., tuple[Any, Any]]:
    """The edit under `jit`, so that a sharded leaf stays where it is."""

    def edit(x: Any, means: Any, *sources: Any) -> tuple[Any, Any]:
        part = None if sharding is None else sharding.shard_shape(x.shape)
        terms = _terms(x, means, sources, recipe)
        new = _edited(x, terms, recipe, part).astype(x.dtype)
        if donate:  # a look at `x` afterwards would take a copy of it
            return new, False

        def look() -> Any:
            return ~_finite(new) & jnp.stack([_finite(given) for given in (x, *sources)]).all()

        return new, jax.lax.cond(_is_small(x, terms, recipe), lambda: jnp.array(False), look)

    donated = (0,) if donate else ()
    shardings = (sharding, None)
    return jax.jit(edit, donate_argnums=donated, out_shardings=shardings, keep_unused=True)


def _is_small(x: Any, terms: _Terms, recipe: Recipe) -> Any:
    """Whether a bound on the largest number shows that no edit overflows.

    The bound is the root of the sum of squares: compilers sum faster than they compare.
    """
    wide = _wide_type(x)
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


@lru_cache(maxsize=256)
def _compiled_look(recipe: Recipe, slack: float, sharding: Any) -> Callable[..., Any]:
    """`_looks_edited` under `jit`."""

    def look(x: Any, means: Any) -> Any:
        part = None if sharding is None else sharding.shard_shape(x.shape)
        return _looks_edited(x, means, recipe, slack, part)

    return jax.jit(look)


@lru_cache(maxsize=256)
def _compiled_bound(recipe: Recipe) -> Callable[..., Any]:
    """`_is_small` under `jit`: it takes next to no memory."""
    return jax.jit(
        lambda x, means, *sources: _is_small(x, _terms(x, means, sources, recipe), recipe)
    )


@lru_cache(maxsize=256)
def _compiled_check(recipe: Recipe, sharding: Any) -> Callable[..., Any]:
    """Whether `_compiled_edit` overflows, without the memory for its result."""
    edit = _compiled_edit(recipe, False, sharding)
    return jax.jit(lambda x, means, *sources: edit(x, means, *sources)[1])


def _wide_type(x: Any) -> Any:
    """The dtype in which means of `x` are taken."""
    return np.dtype(np.float64) if isinstance(x, np.ndarray) else widened(x.dtype)
