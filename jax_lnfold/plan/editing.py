"""Leaves after their edits, be they NumPy or JAX arrays, or traced."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._compat import is_tracer
from .leaf import Recipe, edited, terms_of, wide_type
from .memory import unshared
from .numpy_leaf import edit_array, is_edited_array, overflows_array
from .together import Job, edits_of, looks_of, overflows_of, place_of


def edit_leaf(x: Any, sources: Sequence[Any], recipe: Recipe, donate: bool) -> tuple[Any, bool]:
    """One leaf after its recipe.

    Shape, dtype and sharding stay. With `donate` an array gives up its memory: a JAX array is
    deleted, a NumPy array edited in place. The second result is whether finite numbers became too
    large for the dtype; with `donate` it is false, and to be asked before.
    """
    if is_tracer(x) or any(map(is_tracer, sources)):
        return _traced(x, sources, recipe), False
    if not isinstance(x, jax.Array):
        return edit_array(np.asarray(x), sources, recipe, donate)
    job = Job(0, (*range(1, 1 + len(sources)),), recipe)
    leaves, too_large = [x, *sources], list[int]()
    changed = edit_leaves(leaves, [job], {0} if donate else set(), too_large.extend)
    return changed[0], bool(too_large)


def is_edited(x: Any, recipe: Recipe, slack: float = 1.0) -> bool:
    """Whether a leaf is as its recipe leaves it, up to rounding, see `looks_edited`."""
    return not unfinished([x], [Job(0, (), recipe.by_itself, ())], slack)


def unfinished(leaves: Sequence[Any], jobs: Iterable[Job], slack: float = 1.0) -> list[Job]:
    """The jobs that would change more than roundings."""
    return _looked_at(leaves, [*jobs], slack)[0]


def _looked_at(
    leaves: Sequence[Any], jobs: Sequence[Job], slack: float = 1.0
) -> tuple[list[Job], set[int]]:
    """The jobs that are not done, and the JAX arrays that no bound shows not to overflow."""
    arrays = [job for job in jobs if isinstance(leaves[job.leaf], jax.Array)]
    found = [*looks_of(leaves, arrays, slack)]
    done = {i for looks in found for i in looks.done}
    rest = (job for job in jobs if not isinstance(leaves[job.leaf], jax.Array))
    done |= {job.leaf for job in rest if _is_done(leaves, job, slack)}
    unbounded = {i for looks in found for i in looks.unbounded}
    return [job for job in jobs if job.leaf not in done], unbounded - done


def replaceable(leaves: Sequence[Any], jobs: Sequence[Job]) -> set[int]:
    """The leaves that may give up their memory: nothing else is in it, or is edited with it later.

    An array at two key paths keeps its memory, and so do two that share it.
    """
    count = Counter(map(id, leaves))
    place = {job.leaf: place_of(leaves, job) for job in jobs}
    elsewhere = {i for job in jobs for i in job.sources if place.get(i) != place[job.leaf]}
    return unshared(leaves, {i for i in place if count[id(leaves[i])] == 1} - elsewhere)


def edit_leaves(
    leaves: Sequence[Any],
    jobs: Sequence[Job],
    given: set[int],
    refuse: Callable[[Iterable[int]], None],
) -> dict[int, Any]:
    """What becomes of leaves, by position; those that are so already do not occur.

    If something is `given`, all leaves are looked at before the first of them is edited; NumPy
    arrays among them are edited in place. `refuse` raises for those that would overflow.
    """
    if given:
        jobs, unbounded = _looked_at(leaves, jobs)
        refuse(_overflows(leaves, jobs, unbounded))
        given = given & {job.leaf for job in jobs}  # others are returned, though they are taken
    changed, too_large, by_leaf = dict[int, Any](), list[int](), {job.leaf: job for job in jobs}
    arrays = [job for job in jobs if isinstance(leaves[job.leaf], jax.Array)]
    for found in edits_of(leaves, arrays, given):
        changed |= {i: y for i, y in found.leaves.items() if i not in found.done}
        unbounded = found.unbounded - found.done
        too_large += overflows_of(leaves, [by_leaf[i] for i in sorted(unbounded)])
    rest = [job for job in jobs if job.leaf not in {other.leaf for other in arrays}]
    changed |= _edit_arrays(leaves, rest, given, too_large)
    refuse(too_large)
    return changed


def _edit_arrays(
    leaves: Sequence[Any], jobs: Sequence[Job], given: set[int], too_large: list[int]
) -> dict[int, Any]:
    """The same for NumPy arrays; what is edited in place in vain has no numbers afterwards."""
    changed, spoilt = dict[int, Any](), list[np.ndarray]()
    try:
        for job in jobs:
            x, sources = np.asarray(leaves[job.leaf]), [leaves[i] for i in job.sources]
            if job.leaf in given:
                spoilt.append(x)
            elif _is_done(leaves, job):
                continue
            new, large = edit_array(x, sources, job.recipe, job.leaf in given)
            changed[job.leaf] = new
            too_large += [job.leaf] * large
    except BaseException:  # half of a tree must not look like one
        for x in spoilt:
            x.fill(np.nan)
        raise
    return changed


def _overflows(leaves: Sequence[Any], jobs: Sequence[Job], unbounded: set[int]) -> list[int]:
    """The leaves that would overflow, among those that are `unbounded` and all NumPy arrays."""
    too_large = overflows_of(leaves, [job for job in jobs if job.leaf in unbounded])
    for i, sources, recipe, _ in jobs:
        if not isinstance(leaves[i], jax.Array):
            taken = [leaves[j] for j in sources]
            if overflows_array(np.asarray(leaves[i]), taken, recipe):
                too_large.add(i)
    return sorted(too_large)


def _is_done(leaves: Sequence[Any], job: Job, slack: float = 1.0) -> bool:
    """Whether the edit of a NumPy array would change nothing but roundings."""
    if job.fills is None:
        return False
    own = is_edited_array(np.asarray(leaves[job.leaf]), job.recipe, slack)
    filled = zip(job.sources, job.fills, strict=True)
    return own and all(
        is_edited(leaves[i], Recipe(fill=fill)) for i, fill in filled if fill is not None
    )


def _traced(x: Any, sources: Sequence[Any], recipe: Recipe) -> Any:
    x = jnp.asarray(x)
    terms = terms_of(x, recipe.means_for(wide_type(x)), sources, recipe)
    return edited(x, terms, recipe).astype(x.dtype)
