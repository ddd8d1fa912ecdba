"""Which leaves of a checkpoint are those that a plan speaks of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from itertools import islice
from typing import NamedTuple

from ..errors import TreeError
from ..plan.plan import FoldPlan
from ..trees import FLOATS, alike_paths, unboxed
from .leaf_store import StoredLeaf


def located(plan: FoldPlan, stored: Mapping[str, StoredLeaf], prefix: str = "") -> dict[str, str]:
    """The name in a checkpoint of each leaf that the plan edits or reads, by key path.

    Names in a checkpoint may be separated by ``.`` as well as ``/``, and may end in ``/value`` (as
    those of boxed leaves do) where the plan's do not, and the other way round. With the prefix
    ``a/b`` the leaf ``params/kernel`` of the plan is ``a/b/params/kernel`` in the checkpoint, with
    ``params=a/b`` it is ``a/b/kernel``, and with ``params=`` just ``kernel``.

    Raises:
        TreeError: such leaves are missing, of another shape or of a dtype that cannot be edited.
    """
    names, misfits = _match(plan, stored, prefix)
    if misfits:
        some = "; ".join(misfit.problem for misfit in misfits[:_SHOWN])
        more = f"; and {len(misfits) - _SHOWN} more" if len(misfits) > _SHOWN else ""
        prefixes = list(islice(_prefixes(plan, stored), _SHOWN))
        cures = dict.fromkeys(misfit.cure for misfit in misfits)
        if prefixes:
            words = " or ".join(f"--prefix {p}" if p else "no --prefix" for p in prefixes)
            cures = [f"with {words} they would all fit"]
        raise TreeError(
            f"source: {len(misfits)} of {len(_needed(plan))} leaves that the plan edits or reads "
            f"do not fit the checkpoint: {some}{more}; {', and '.join(cures)}"
        )
    return names


_SHOWN = 4


class _Misfit(NamedTuple):
    """What is wrong with one leaf, and what to do about it."""

    problem: str
    cure: str


def _needed(plan: FoldPlan) -> dict[str, tuple[int, ...]]:
    """Shapes of the leaves that are edited or read; nothing is asked of others."""
    edits = plan.leaf_edits()
    needed = {*edits, *(source for edit in edits.values() for source in edit.sources)}
    return {leaf.key_path: leaf.shape for leaf in plan.leaves if leaf.key_path in needed}


def _plain(name: str) -> str:
    return unboxed(name.replace(".", "/"))


def _match(
    plan: FoldPlan, stored: Mapping[str, StoredLeaf], prefix: str
) -> tuple[dict[str, str], list[_Misfit]]:
    """The name of each leaf that is needed, and what is wrong with such leaves."""
    moved = {leaf.key_path: _moved(leaf.key_path, prefix) for leaf in plan.leaves}
    alike = alike_paths(filter(None, moved.values()), stored, _plain)
    claims = Counter(found[0] for found in alike.values() if len(found) == 1)
    others = Counter(_plain(name) for name in stored if name not in alike)
    edited = plan.leaf_edits()
    names: dict[str, str] = {}
    misfits: list[_Misfit] = []
    for path, shape in _needed(plan).items():
        if (wanted := moved[path]) is None:
            problem = f"{path!r} does not begin as the prefix {prefix!r} says"
            misfits.append(_Misfit(problem, "pass another --prefix"))
        elif not (found := alike[wanted]):
            misfits.append(_Misfit(f"{wanted!r} is missing", _instead(stored, claims)))
        elif (wanted in stored) + others[_plain(wanted)] > 1 or claims[found[0]] > 1:
            choice = sorted(repr(name) for name in stored if _plain(name) == _plain(wanted))
            problem = f"{wanted!r} is ambiguous, as to {' or '.join(choice)}"
            misfits.append(_Misfit(problem, "give what reads alike names that do not"))
        elif misfit := _misfit(found[0], stored[found[0]], shape, path in edited):
            misfits.append(misfit)
        else:
            names[path] = found[0]
    return names, misfits


def _misfit(name: str, found: StoredLeaf, shape: tuple[int, ...], edited: bool) -> _Misfit | None:
    if found.shape != shape:
        problem = f"{name!r} has shape {found.shape} instead of {shape}"
        return _Misfit(problem, "make a plan of the model of these shapes")
    if edited and found.dtype not in FLOATS:
        problem = f"{name!r} has dtype {found.dtype}, which cannot be edited"
        return _Misfit(problem, f"convert such leaves to one of {', '.join(FLOATS)}")
    return None


def _instead(stored: Iterable[str], claimed: Container[str]) -> str:
    """What to do about missing leaves: look at what is there."""
    others = [name for name in stored if name not in claimed]
    some = ", ".join(map(repr, others[:_SHOWN])) + ", ..." * (len(others) > _SHOWN)
    if not others:
        return "pass a checkpoint that holds them: this one has nothing else"
    return f"name its leaves as the plan does, or pass --keys: it has {some} instead"


def _moved(path: str, prefix: str) -> str | None:
    """The key path in the checkpoint; None if it does not begin with the plan's own prefix."""
    own, _, inside = prefix.rpartition("=")
    own, inside = own.strip("/."), inside.strip("/.")
    if own and not path.startswith(f"{own}/"):
        return None
    rest = path.removeprefix(f"{own}/") if own else path
    return f"{inside}/{rest}" if inside else rest


def _prefixes(plan: FoldPlan, stored: Mapping[str, StoredLeaf]) -> Iterator[str]:
    """The prefixes with which all leaves would fit."""
    keys = next(iter(_needed(plan))).split("/")
    seen: list[dict[str, str]] = []
    for depth in range(len(keys)):
        own, rest = "/".join(keys[:depth]), _plain("/".join(keys[depth:]))
        for name in dict.fromkeys(map(_plain, stored)):
            if not f"/{name}".endswith(f"/{rest}"):
                continue
            inside = name.removesuffix(rest).strip("/")
            prefix = f"{own}={inside}" if own else inside
            names, misfits = _match(plan, stored, prefix)
            if not misfits and names not in seen:
                seen.append(names)
                yield prefix
