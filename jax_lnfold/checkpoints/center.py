"""Centering of checkpoints on disk with a plan, one leaf at a time."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import mkdtemp
from typing import NamedTuple

import numpy as np

from ..errors import FoldError
from ..plan.edits.edit import LeafEdit, fills_of
from ..plan.leaf import edit_leaf, look_at
from ..plan.plan import FoldPlan, overflow_error
from .formats import open_store
from .leaf_store import LeafStore, real_path
from .match import located
from .signals import undisturbed

Edits = Iterable[tuple[str, LeafEdit]]


class Centered(NamedTuple):
    """What `center_checkpoint` has done: the number of leaves edited, and their bytes."""

    leaves: int
    nbytes: int


def center_checkpoint(
    plan: FoldPlan,
    source: Path,
    dest: Path,
    prefix: str = "",
    track: Callable[[Edits], Edits] = iter,
) -> Centered:
    """Write the checkpoint `source` to `dest`, its leaves edited as by ``plan.center``.

    Bit by bit what `FoldPlan.center` gives for NumPy arrays; everything else in the checkpoint is
    copied as it is. One leaf at a time is in memory (with the copies that its edit needs, in
    float64). All checks come first; `dest` appears when it is complete, or not at all.

    Args:
        plan: what to edit; the leaves that it edits or reads must be there.
        source: a safetensors file, a directory of them with an index, or an Orbax checkpoint.
        dest: the path of the copy, which must not exist.
        prefix: where the tree of the plan stands in the checkpoint, see `located`.
        track: is given the edits and yields them, to show the progress.

    Raises:
        FoldError: `source` is no such checkpoint, does not hold the tree of the plan, or a leaf
            would overflow; `dest` cannot be made.
    """
    _check_dest(source, dest)
    store = open_store(source)
    names = located(plan, store.leaves, prefix)
    edits = plan.leaf_edits()
    with ExitStack() as stack:
        with undisturbed():
            folder = Path(mkdtemp(prefix=f".{dest.name}.", dir=dest.parent))
            stack.callback(_remove, folder)
        copy = folder / source.resolve().name
        store.copy(copy, [names[path] for path in edits])
        target = open_store(copy)
        for path, edit in track(edits.items()):
            new = _edited(store, names, path, edit, fills_of(edits, edit))
            with undisturbed():  # some stores go on writing in other threads
                target.write(names[path], new)
        _check_dest(source, dest)
        copy.rename(dest)
    return Centered(len(edits), sum(store.leaves[names[path]].nbytes for path in edits))


def _remove(folder: Path) -> None:
    with undisturbed():
        shutil.rmtree(folder)


def _edited(
    store: LeafStore,
    names: Mapping[str, str],
    path: str,
    edit: LeafEdit,
    fills: Sequence[float | None] | None,
) -> np.ndarray:
    """The leaf as `FoldPlan.center` leaves it: as it is, if it is so already."""
    old, sources = store.read(names[path]), [store.read(names[source]) for source in edit.sources]
    if fills is not None and all(look_at(old, sources, edit.recipe, fills)):
        return old
    new, too_large = edit_leaf(old, sources, edit.recipe, donate=False)
    if too_large:
        raise overflow_error("source", names[path])
    return new


def _check_dest(source: Path, dest: Path) -> None:
    if dest.exists() or dest.is_symlink():
        raise FoldError(f"dest: {dest} exists; pass a path where there is nothing yet")
    if not dest.parent.is_dir():
        raise FoldError(f"dest: {dest.parent} is not a directory; make it first")
    if real_path(dest).is_relative_to(real_path(source)):
        raise FoldError(f"dest: {dest} is inside of {source}; pass a path outside of it")


# --- where the leaves of a plan are in a checkpoint ----------------------------------------------
