"""Edits of many JAX arrays by few compiled programs.

Compiling costs far more than editing. So leaves are edited in units, each of leaves that take each
other; as many units as differ are one program, which is called again for those that are alike, as
the layers of a model are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from .._compat import is_explicit
from .leaf import Recipe, bounded, edited, looks_edited, terms_of, wide_type

ALIKE = 4
"""So many units of one kind may be in a program, if that makes it the same for other kinds."""

HOST = "pinned_host"
"""The kind of memory whose arrays meet no others in a program."""


class Job(NamedTuple):
    """The edit of one leaf of a list: its position, those of the leaves that it takes, the recipe.

    With the `fills` its sources have when all is done, it can be told whether that is so; without
    them it cannot.
    """

    leaf: int
    sources: tuple[int, ...]
    recipe: Recipe
    fills: tuple[float | None, ...] | None = None


class _Part(NamedTuple):
    """A job in a program, by positions among its arrays, with the sharding that the leaf keeps."""

    job: Job
    sharding: Any


class _Unit(NamedTuple):
    """Jobs that take each other's leaves, and the positions of all these in the list."""

    jobs: tuple[Job, ...]
    arrays: tuple[int, ...]

    def parts(self, leaves: Sequence[Any], start: int = 0) -> tuple[_Part, ...]:
        """The jobs in a program, in which the first of the arrays has the number `start`."""
        number = {i: start + n for n, i in enumerate(self.arrays)}
        return tuple(
            _Part(
                Job(number[i], tuple(map(number.__getitem__, sources)), recipe.alike, fills),
                sharding_of(leaves[i]),
            )
            for i, sources, recipe, fills in self.jobs
        )


class Results(NamedTuple):
    """Of one program, by position: edited leaves, which were so already, which have no bound."""

    leaves: dict[int, Any]
    done: frozenset[int]
    unbounded: frozenset[int]


def edits_of(
    leaves: Sequence[Any], jobs: Iterable[Job], given: Collection[int] = ()
) -> Iterator[Results]:
    """All jobs done, program by program; arrays that are `given` to them are deleted.

    What is given is edited without a look (see `looks_of`).
    """
    jobs = [*jobs]
    yield from _run(leaves, [job for job in jobs if job.leaf not in given], _edit_and_look, ())
    yield from _run(leaves, [job for job in jobs if job.leaf in given], _edit, given)


def looks_of(leaves: Sequence[Any], jobs: Iterable[Job], slack: float = 1.0) -> Iterator[Results]:
    """For all jobs, whether they are done, and whether a bound shows that none overflows."""
    return _run(leaves, [*jobs], _look, (), slack)


def overflows_of(leaves: Sequence[Any], jobs: Iterable[Job]) -> set[int]:
    """The leaves in which finite numbers would become too large for their dtype."""
    return {i for found in _run(leaves, [*jobs], _check, ()) for i in found.unbounded}


def place_of(leaves: Sequence[Any], job: Job) -> Hashable:
    """Where a job is done: on devices, or nowhere yet, and in what kind of memory; None for NumPy.

    Programs are for one place.
    """
    arrays = [leaves[i] for i in (job.leaf, *job.sources) if isinstance(leaves[i], jax.Array)]
    if not isinstance(leaves[job.leaf], jax.Array):
        return None
    devices = frozenset(_devices_of(x) for x in arrays if x.committed)
    return devices, frozenset(x.sharding.memory_kind for x in arrays)


def _devices_of(x: Any) -> Hashable:
    """What arrays in one program have to share: devices in one order, and explicit axes of them."""
    if not isinstance(x.sharding, NamedSharding):
        return frozenset(x.sharding.device_set)
    mesh: Any = x.sharding.mesh
    return (*mesh.devices.flat,), mesh if is_explicit(jax.typeof(x)) else None


def sharding_of(x: Any) -> Any:
    """The sharding of a committed array."""
    return x.sharding if isinstance(x, jax.Array) and x.committed else None


def _run(
    leaves: Sequence[Any],
    jobs: Sequence[Job],
    step: Callable[..., Any],
    given: Collection[int],
    slack: float = 1.0,
) -> Iterator[Results]:
    places: dict[Hashable, list[Job]] = {}
    for job in jobs:
        places.setdefault(place_of(leaves, job), []).append(job)
    for units in places.values():
        for some in _rounds(leaves, _units(units)):
            yield _call(leaves, some, step, given, slack)


def _call(
    leaves: Sequence[Any],
    units: Sequence[_Unit],
    step: Callable[..., Any],
    given: Collection[int],
    slack: float,
) -> Results:
    parts: list[_Part] = []
    positions: list[int] = []
    for unit in units:
        parts += unit.parts(leaves, len(positions))
        positions += unit.arrays
    jobs = [job for unit in units for job in unit.jobs]
    means = [job.recipe.means_for(wide_type(leaves[job.leaf])) for job in jobs]
    donated = tuple(n for n, i in enumerate(positions) if i in given)
    program = _compiled(step, tuple(parts), donated, slack)
    new, looks = program(means, *(leaves[i] for i in positions))
    done, bound = np.reshape(jax.device_get(looks), (2, -1)) if looks is not None else ([], [])
    which = [job.leaf for job in jobs]
    return Results(
        dict(zip(which, new, strict=True)) if new else {},
        frozenset(i for i, yes in zip(which, done, strict=False) if yes),
        frozenset(i for i, yes in zip(which, bound, strict=False) if not yes),
    )


def _units(jobs: Sequence[Job]) -> list[_Unit]:
    """The jobs in groups that share no leaf."""
    groups: list[tuple[set[int], list[Job]]] = []
    for job in jobs:
        arrays, own = {job.leaf, *job.sources}, [job]
        apart = []
        for group in groups:
            if arrays.isdisjoint(group[0]):
                apart.append(group)
            else:
                arrays, own = arrays | group[0], group[1] + own
        groups = [*apart, (arrays, own)]
    return [_Unit(tuple(sorted(own)), tuple(sorted(arrays))) for arrays, own in groups]


def _rounds(leaves: Sequence[Any], units: Iterable[_Unit]) -> Iterator[list[_Unit]]:
    """Units for one call each of a program; few programs, each of them called many times."""
    kinds: dict[Hashable, list[_Unit]] = {}
    for unit in units:
        avals = (jax.typeof(leaves[i]) for i in unit.arrays)
        shardings = (sharding_of(leaves[i]) for i in unit.arrays)
        kinds.setdefault((unit.parts(leaves), *avals, *shardings), []).append(unit)
    programs: dict[int, list[list[_Unit]]] = {}  # by how often they are called
    for alike in sorted(kinds.values(), key=len):
        calls = next((n for n in programs if len(alike) in range(n, ALIKE * n + 1, n)), len(alike))
        programs.setdefault(calls, []).append(alike)
    for calls, groups in programs.items():
        for call in range(calls):
            yield [unit for alike in groups for unit in alike[call::calls]]


@lru_cache(maxsize=256)
def _compiled(
    step: Callable[..., Any], parts: tuple[_Part, ...], donated: tuple[int, ...], slack: float
) -> Callable[..., Any]:
    """A step under `jit`, so that sharded leaves stay where they are."""

    def run(means: Sequence[Any], *arrays: Any) -> Any:
        return step(parts, means, arrays, slack)

    shardings = [part.sharding for part in parts] if step in (_edit, _edit_and_look) else None
    return jax.jit(
        run,
        donate_argnums=tuple(n + 1 for n in donated),
        out_shardings=(shardings, None),
        keep_unused=True,  # else they would not be deleted
    )


def _operands(part: _Part, means: Any, arrays: Sequence[Any]) -> tuple[Any, ...]:
    """The leaf, what it is edited with, and the shape of what one device holds of it."""
    x = arrays[part.job.leaf]
    terms = terms_of(x, means, [arrays[i] for i in part.job.sources], part.job.recipe)
    return x, terms, None if part.sharding is None else part.sharding.shard_shape(x.shape)


def _edit(
    parts: Sequence[_Part], means: Sequence[Any], arrays: Sequence[Any], slack: float
) -> tuple[list[Any], None]:
    del slack
    found = [_operands(part, m, arrays) for part, m in zip(parts, means, strict=True)]
    # Everything is taken from the leaves before any of them is edited in place.
    held = jax.lax.optimization_barrier([(x, terms) for x, terms, _ in found])
    edits = zip(parts, held, found, strict=True)
    new = (edited(x, terms, part.job.recipe, n) for part, (x, terms), (*_, n) in edits)
    return [y.astype(x.dtype) for y, (x, *_) in zip(new, found, strict=True)], None


def _edit_and_look(
    parts: Sequence[_Part], means: Sequence[Any], arrays: Sequence[Any], slack: float
) -> tuple[list[Any], Any]:
    new, looks = [], []
    for part, m in zip(parts, means, strict=True):
        x, terms, shape = _operands(part, m, arrays)
        new.append(y := edited(x, terms, part.job.recipe, shape).astype(x.dtype))
        # Squares become infinite sooner; compilers sum faster than they compare.
        bound = jnp.isfinite(jnp.square(y.astype(wide_type(y))).sum())
        looks.append((_is_done(part, m, arrays, slack, shape), bound))
    return new, _told(parts, looks)


def _told(parts: Sequence[_Part], looks: Sequence[tuple[Any, Any]]) -> Any:
    """All in one array: what is found of arrays in the memory of a host is there, too."""
    if any(part.sharding is not None and part.sharding.memory_kind == HOST for part in parts):
        looks = jax.device_put(looks, jax.memory.Space.Device)  # and then results are committed
    return jnp.array([*zip(*looks, strict=True)])


def _look(
    parts: Sequence[_Part], means: Sequence[Any], arrays: Sequence[Any], slack: float
) -> tuple[None, Any]:
    looks = []
    for part, m in zip(parts, means, strict=True):
        x, terms, shape = _operands(part, m, arrays)
        bound = bounded(x, terms, part.job.recipe)
        looks.append((_is_done(part, m, arrays, slack, shape), bound))
    return None, _told(parts, looks)


def _check(
    parts: Sequence[_Part], means: Sequence[Any], arrays: Sequence[Any], slack: float
) -> tuple[None, Any]:
    new, _ = _edit(parts, means, arrays, slack)
    sources = ([arrays[i] for i in (part.job.leaf, *part.job.sources)] for part in parts)
    given = [jnp.stack([jnp.isfinite(x).all() for x in some]).all() for some in sources]
    kept = [~a | jnp.isfinite(y).all() for y, a in zip(new, given, strict=True)]
    return None, _told(parts, [(jnp.array(False), x) for x in kept])


def _is_done(part: _Part, means: Any, arrays: Sequence[Any], slack: float, shape: Any) -> Any:
    """Whether the edit would change nothing but roundings: its sources are filled already, too."""
    job = part.job
    if job.fills is None:
        return jnp.array(False)
    found = looks_edited(arrays[job.leaf], means, job.recipe, slack, shape)
    for i, fill in zip(job.sources, job.fills, strict=True):
        if fill is not None:
            found &= looks_edited(arrays[i], None, Recipe(fill=fill), slack)
    return found
