"""Centering of checkpoints on disk with a plan, one leaf at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np

from .center import edit_leaf
from .edits import LeafEdit
from .errors import FoldError, TreeError
from .plan import FoldPlan, overflow_error
from .stores import FLOATS, LeafStore, StoredLeaf, open_store

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
        plan: what to edit; every leaf of its tree must be there.
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
    with TemporaryDirectory(prefix=f".{dest.name}.", dir=dest.parent) as folder:
        copy = Path(folder) / source.resolve().name
        store.copy(copy, [names[path] for path in edits])
        target = open_store(copy)
        for path, edit in track(edits.items()):
            target.write(names[path], _edited(store, names, path, edit))
        _check_dest(source, dest)
        copy.rename(dest)
    return Centered(len(edits), sum(store.leaves[names[path]].nbytes for path in edits))


def _edited(store: LeafStore, names: Mapping[str, str], path: str, edit: LeafEdit) -> np.ndarray:
    sources = [store.read(names[source]) for source in edit.sources]
    new, too_large = edit_leaf(store.read(names[path]), sources, edit.recipe, donate=False)
    if too_large:
        raise overflow_error("source", names[path])
    return new


def _check_dest(source: Path, dest: Path) -> None:
    if dest.exists() or dest.is_symlink():
        raise FoldError(f"dest: {dest} exists; pass a path where there is nothing yet")
    if not dest.parent.is_dir():
        raise FoldError(f"dest: {dest.parent} is not a directory; make it first")
    if dest.resolve().is_relative_to(source.resolve()):
        raise FoldError(f"dest: {dest} is inside of {source}; pass a path outside of it")


# --- where the leaves of a plan are in a checkpoint ----------------------------------------------


def located(plan: FoldPlan, stored: Mapping[str, StoredLeaf], prefix: str = "") -> dict[str, str]:
    """The name of each leaf of the plan in a checkpoint, by key path.

    Names in a checkpoint may be separated by ``.`` as well as ``/``. With the prefix ``a/b`` the
    leaf ``params/kernel`` of the plan is ``a/b/params/kernel`` in the checkpoint, with
    ``params=a/b`` it is ``a/b/kernel``, and with ``params=`` just ``kernel``.

    Raises:
        TreeError: leaves are missing, of another shape or of a dtype that cannot be edited.
    """
    index = _by_slashes(stored)
    names, problems = _match(plan, stored, index, prefix)
    if problems:
        some = "; ".join(problems[:_SHOWN])
        more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise TreeError(
            f"source: {len(problems)} of {len(plan.leaves)} leaves of the plan do not fit the "
            f"checkpoint: {some}{more}; {_advice(plan, stored, index)}"
        )
    return names


_SHOWN = 4


def _by_slashes(stored: Iterable[str]) -> dict[str, list[str]]:
    """Names by how they read with slashes: names that read alike are no longer told apart."""
    index: dict[str, list[str]] = {}
    for name in stored:
        index.setdefault(_slashes(name), []).append(name)
    return index


def _slashes(name: str) -> str:
    return name.replace(".", "/")


def _match(
    plan: FoldPlan,
    stored: Mapping[str, StoredLeaf],
    index: Mapping[str, list[str]],
    prefix: str,
) -> tuple[dict[str, str], list[str]]:
    """The name of each leaf, and what is wrong with leaves."""
    edited = plan.leaf_edits()
    names: dict[str, str] = {}
    problems: list[str] = []
    taken: set[str] = set()
    for leaf in plan.leaves:
        path = leaf.key_path
        if (wanted := _moved(path, prefix)) is None:
            problems.append(f"{path!r} does not begin as the prefix {prefix!r} says")
            continue
        alike = [wanted] if wanted in stored else index.get(_slashes(wanted), [])
        if len(alike) != 1 or alike[0] in taken:
            problems.append(f"{wanted!r} is {'ambiguous' if alike else 'missing'}")
        elif (found := stored[alike[0]]).shape != leaf.shape:
            problems.append(f"{alike[0]!r} has shape {found.shape} instead of {leaf.shape}")
        elif path in edited and found.dtype not in FLOATS:
            problems.append(f"{alike[0]!r} has dtype {found.dtype}, which cannot be edited")
        else:
            names[path] = alike[0]
            taken.add(alike[0])
    return names, problems


def _moved(path: str, prefix: str) -> str | None:
    """The key path in the checkpoint; None if it does not begin with the plan's own prefix."""
    own, _, inside = prefix.rpartition("=")
    own, inside = own.strip("/."), inside.strip("/.")
    if own and not path.startswith(f"{own}/"):
        return None
    rest = path.removeprefix(f"{own}/") if own else path
    return f"{inside}/{rest}" if inside else rest


def _advice(
    plan: FoldPlan, stored: Mapping[str, StoredLeaf], index: Mapping[str, list[str]]
) -> str:
    fitting = list(islice(_prefixes(plan, stored, index), _SHOWN))
    if not fitting:
        return "pass a checkpoint of the model the plan was made for"
    words = " or ".join(f"--prefix {p}" if p else "no --prefix" for p in fitting)
    return f"with {words} they would all fit"


def _prefixes(
    plan: FoldPlan, stored: Mapping[str, StoredLeaf], index: Mapping[str, list[str]]
) -> Iterator[str]:
    """The prefixes with which all leaves would fit."""
    keys = plan.leaves[0].key_path.split("/")
    seen: list[dict[str, str]] = []
    for depth in range(len(keys)):
        own, rest = "/".join(keys[:depth]), _slashes("/".join(keys[depth:]))
        for name in index:
            if not f"/{name}".endswith(f"/{rest}"):
                continue
            inside = name.removesuffix(rest).strip("/")
            prefix = f"{own}={inside}" if own else inside
            names, problems = _match(plan, stored, index, prefix)
            if not problems and names not in seen:
                seen.append(names)
                yield prefix
