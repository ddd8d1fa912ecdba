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
from ..plan.editing import edit_leaf, is_edited, unfinished
from ..plan.edits.edit import LeafEdit, fills_of
from ..plan.plan import FoldPlan, assumed_error, overflow_error
from ..plan.together import Job
from .formats import open_store
from .key_map import KeyMap
from .leaf_store import real_path
from .match import located
from .rewriter import Rewriter
from .signals import undisturbed
from .view import Part, View

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
    keys: KeyMap | None = None,
) -> Centered:
    """Write the checkpoint `source` to `dest`, its leaves edited as by ``plan.center``.

    Bit by bit what `FoldPlan.center` gives for NumPy arrays; everything else in the checkpoint is
    copied as it is. One leaf at a time is in memory (with the copies that its edit needs, in
    float64, and the arrays that it is stored in). All checks come first; `dest` appears when it is
    complete, or not at all.

    Args:
        plan: what to edit; the leaves that it edits or reads must be there.
        source: a safetensors file, a directory of them with an index, or an Orbax checkpoint.
        dest: the path of the copy, which must not exist.
        prefix: where the tree of the plan stands in the checkpoint, see `located`.
        track: is given the edits and yields them, to show the progress.
        keys: where the leaves are, in place of a prefix, if names or layouts are others.

    Raises:
        FoldError: `source` is no such checkpoint, does not hold the tree of the plan (where `keys`
            say), or a leaf would overflow, or is not what the plan takes it to be; `dest` cannot be
            made.
    """
    _check_dest(source, dest)
    store = open_store(source)
    if keys is None:
        names = located(plan, store.leaves, prefix)
        views = {path: View((Part(name),)) for path, name in names.items()}
    else:
        views = keys.located(plan, store.leaves)
    edits = _in_order(plan.leaf_edits(), views)
    assumed = {path: edits.pop(path) for path in [*edits] if edits[path].recipe.assumed}
    written = [views[path] for path in edits]
    with ExitStack() as stack:
        with undisturbed():
            folder = Path(mkdtemp(prefix=f".{dest.name}.", dir=dest.parent))
            stack.callback(_remove, folder)
        copy = folder / source.resolve().name
        store.copy(copy, {part.name for view in written for part in view.parts})
        rewriter = Rewriter(store, open_store(copy), written)
        for path, edit in assumed.items():
            if not is_edited(rewriter.read(views[path]), edit.recipe, slack=2.0):
                raise assumed_error("source", str(views[path]), edit.recipe)
        for path, edit in track(edits.items()):
            new = _edited(rewriter, views, path, edit, fills_of(edits, edit))
            with undisturbed():  # some stores go on writing in other threads
                rewriter.write(views[path], new)
        _check_dest(source, dest)
        copy.rename(dest)
    return Centered(len(edits), sum(view.leaf(store.leaves).nbytes for view in written))


def _in_order(edits: Mapping[str, LeafEdit], views: Mapping[str, View]) -> dict[str, LeafEdit]:
    """Leaves that are parts of one array come together; none takes what another one has become."""
    first = {path: views[path].parts[0].name for path in edits}
    place = {name: i for i, name in enumerate(dict.fromkeys(first.values()))}
    return {path: edits[path] for path in sorted(edits, key=lambda path: place[first[path]])}


def _remove(folder: Path) -> None:
    with undisturbed():
        shutil.rmtree(folder)


def _edited(
    rewriter: Rewriter,
    views: Mapping[str, View],
    path: str,
    edit: LeafEdit,
    fills: Sequence[float | None] | None,
) -> np.ndarray:
    """The leaf as `FoldPlan.center` leaves it: as it is, if it is so already."""
    old = rewriter.read(views[path])
    sources = [rewriter.read(views[source]) for source in edit.sources]
    job = Job(0, (*range(1, 1 + len(sources)),), edit.recipe, None if fills is None else (*fills,))
    if not unfinished([old, *sources], [job]):
        return old
    new, too_large = edit_leaf(old, sources, edit.recipe, donate=False)
    if too_large:
        raise overflow_error("source", str(views[path]))
    return new


def _check_dest(source: Path, dest: Path) -> None:
    if dest.exists() or dest.is_symlink():
        raise FoldError(f"dest: {dest} exists; pass a path where there is nothing yet")
    if not dest.parent.is_dir():
        raise FoldError(f"dest: {dest.parent} is not a directory; make it first")
    if real_path(dest).is_relative_to(real_path(source)):
        raise FoldError(f"dest: {dest} is inside of {source}; pass a path outside of it")
