"""Key maps: where a checkpoint with other names and layouts holds the leaves of a plan."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import FoldError, TreeError
from ..plan.plan import FoldPlan
from ..trees import FLOATS
from .leaf_store import StoredLeaf
from .safetensors_header import strict_json
from .view import Part, Step, View, step_of

_REST = "*"
_NUMBER = "{}"
_SHOWN = 4
_KINDS = (
    'a name, null, {"name": ..., "steps": [...]} or {"concat": [...], "axis": ..., "steps": [...]}'
)


@dataclass(frozen=True, slots=True)
class KeyMap:
    """Views by key path of the plan, None for what the checkpoint does not hold.

    ``{}`` in a key path stands for a number, which is put for ``{}`` in the names: ``h_{}/kernel``
    is at ``h.{}.weight``. With several of them, the order is the same in both.
    """

    entries: Mapping[str, View | None]
    rest: bool = False
    """Whether other leaves may be anywhere, but not in the arrays of these."""

    @staticmethod
    def from_json(data: bytes) -> KeyMap:
        """Read a key map.

        A JSON object from key paths of a plan to where the leaf is stored, by the names of the
        checkpoint:

        - ``"name"``: the array of this name, as it is.
        - ``{"name": "name", "steps": [...]}``: what the steps, done one after the other, make of
          it. A step is ``{"slice": [axis, start, stop]}``, ``{"reshape": [sizes]}`` or
          ``{"transpose": [axes]}``, with the meanings of NumPy.
        - ``{"concat": [...], "axis": 0, "steps": [...]}``: several of these, one behind the other;
          steps after that may not slice.
        - ``null``: the checkpoint does not hold it. ``"*": null`` says of all leaves without an
          entry that they are in none of the arrays of the others.

        Raises:
            FoldError: `data` is something else.
        """
        try:
            found = strict_json(data)
        except (ValueError, RecursionError) as error:
            raise FoldError(f"keys: not JSON ({error}); pass an object in UTF-8") from error
        if not isinstance(found, dict):
            raise FoldError("keys: not an object; pass one from key paths to names")
        entries = {}
        for key, entry in found.items():
            try:
                entries[key] = _view(key, entry)
            except ValueError as error:
                raise FoldError(f"keys: entry {key!r}: {error}; give {_KINDS}") from error
        rest = _REST in entries
        if rest and entries.pop(_REST) is not None:
            raise FoldError(f"keys: entry {_REST!r} is not null; write key paths for what is there")
        return KeyMap(entries, rest)

    def located(self, plan: FoldPlan, stored: Mapping[str, StoredLeaf]) -> dict[str, View]:
        """Where each leaf of a plan is, by key path: at least all that it edits or reads.

        Raises:
            TreeError: a leaf has no entry, or two; an entry fits no leaf, or not what is stored; a
                leaf that is edited has a dtype that cannot be, or shares elements with another one.
        """
        views = self._matched(plan)
        edited = plan.leaf_edits().keys()
        _raise("do not fit the checkpoint", "correct their entries", _misfits(plan, views, stored))
        taken = _overlaps(views, edited, stored)
        _raise(
            "share stored numbers with others",
            "as an edit of one would change the other, correct their entries, or make the plan of "
            "a model in which they are one leaf",
            taken,
        )
        return views

    def _matched(self, plan: FoldPlan) -> dict[str, View]:
        """The view of each leaf that is stored: each leaf has one entry, each entry has leaves."""
        paths = [leaf.key_path for leaf in plan.leaves]
        found = self._entries_of(paths)
        _raise(
            "have two entries",
            "leave one of them",
            (f"{p!r} has {' and '.join(map(repr, x))}" for p, x in found.items() if len(x) > 1),
        )
        if unused := self.entries.keys() - {key for keys in found.values() for key in keys}:
            has = ", ".join(map(repr, paths[:_SHOWN])) + ", ..." * (len(paths) > _SHOWN)
            some = _some(repr(key) for key in self.entries if key in unused)
            raise TreeError(
                f"keys: no leaf of the plan is called {some}; write its key paths: it has {has}"
            )
        views = {path: view for path, x in found.items() for view in x.values() if view}
        _raise(
            "have no place in the map",
            "add where they are stored; for others than those that are edited or read, null if "
            'the checkpoint does not hold it, or "*": null if none is in an array of the others',
            map(repr, self._missing(plan, found, views)),
        )
        return views

    def _entries_of(self, paths: Iterable[str]) -> dict[str, dict[str, View | None]]:
        """By key path the entries that match it, by their own keys."""
        patterns = {key: re.compile(_pattern(key)) for key in self.entries if _NUMBER in key}
        found: dict[str, dict[str, View | None]] = {}
        for path in paths:
            plain = path in self.entries and path not in patterns
            found[path] = {path: self.entries[path]} if plain else {}
            for key, pattern in patterns.items():
                if match := pattern.fullmatch(path):
                    found[path][key] = _numbered(self.entries[key], match.groups())
        return found

    def _missing(
        self, plan: FoldPlan, found: Mapping[str, Mapping[str, Any]], views: Mapping[str, View]
    ) -> list[str]:
        edits = plan.leaf_edits()
        needed = {*edits, *(source for edit in edits.values() for source in edit.sources)}
        missing = [path for path in found if path in needed and path not in views]
        # Others are asked for, too: one of them may share an array with an edited leaf.
        return missing or [path for path in found if not (found[path] or self.rest)]


# --- reading -------------------------------------------------------------------------------------


def _view(key: str, data: Any) -> View | None:
    if data is None:
        return None
    if isinstance(data, dict) and "concat" in data:
        _check_fields(data, {"concat", "axis"})
        parts, axis, steps = data["concat"], data["axis"], _steps(data.get("steps", []))
        if not isinstance(parts, list) or not parts:
            raise ValueError("'concat' is not a list of parts")
        if type(axis) is not int or axis < 0:
            raise ValueError("'axis' is not 0, 1, ...")
        if not all(step.MOVES for step in steps):
            raise ValueError("a slice after 'concat' leaves numbers out: slice its parts")
        view = View(tuple(map(_part, parts)), axis, steps)
    else:
        view = View((_part(data),))
    for part in view.parts:
        if part.name.count(_NUMBER) != key.count(_NUMBER):
            raise ValueError(f"{part.name!r} has not as many {_NUMBER} as the key path")
    return view


def _part(data: Any) -> Part:
    if isinstance(data, str):
        return Part(data)
    if not isinstance(data, dict):
        raise ValueError(f"{str(data)[:40]} is no place")
    _check_fields(data, {"name"})
    if not isinstance(data["name"], str):
        raise ValueError("'name' is no text")
    return Part(data["name"], _steps(data.get("steps", [])))


def _check_fields(data: Mapping[str, Any], needed: Iterable[str]) -> None:
    for name in (*sorted({*needed} - data.keys()), *sorted(data.keys() - {*needed, "steps"})):
        raise ValueError(f"{name!r} {'does not belong there' if name in data else 'is missing'}")


def _steps(data: Any) -> tuple[Step, ...]:
    if not isinstance(data, list) or not all(isinstance(x, dict) and len(x) == 1 for x in data):
        raise ValueError("'steps' is not a list of objects with one step each")
    return tuple(step_of(*item) for step in data for item in step.items())


def _pattern(key: str) -> str:
    """For all of a number, so that there is one way to read a key path."""
    return "(?<![0-9])([0-9]+)(?![0-9])".join(map(re.escape, key.split(_NUMBER)))


def _numbered(view: View | None, numbers: Sequence[str]) -> View | None:
    """The view with these numbers in its names."""

    def rename(name: str) -> str:
        first, *others = name.split(_NUMBER)
        return first + "".join(n + text for n, text in zip(numbers, others, strict=True))

    return view and view.renamed(rename)


# --- checking ------------------------------------------------------------------------------------


def _raise(what: str, cure: str, problems: Iterable[str]) -> None:
    if problems := [*problems]:
        n = len(problems)
        raise TreeError(f"keys: {n} of the plan's leaves {what}: {_some(problems, '; ')}; {cure}")


def _some(problems: Iterable[str], between: str = ", ") -> str:
    problems = [*problems]
    more = len(problems) - _SHOWN
    return between.join(problems[:_SHOWN]) + f"{between}and {more} more" * (more > 0)


def _misfits(
    plan: FoldPlan, views: Mapping[str, View], stored: Mapping[str, StoredLeaf]
) -> Iterator[str]:
    edited = plan.leaf_edits().keys()
    for path, shape in ((leaf.key_path, leaf.shape) for leaf in plan.leaves):
        if path not in views:
            continue
        try:
            leaf = views[path].leaf(stored)
        except ValueError as error:
            yield f"{path!r}: {error}"
            continue
        if leaf.shape != shape:
            yield f"{path!r}: {str(views[path])!r} gives shape {leaf.shape} instead of {shape}"
        elif path in edited and leaf.dtype not in FLOATS:
            yield f"{path!r}: dtype {leaf.dtype} cannot be edited, only {', '.join(FLOATS)}"


def _overlaps(
    views: Mapping[str, View], edited: Iterable[str], stored: Mapping[str, StoredLeaf]
) -> Iterator[str]:
    """Edited leaves that share elements with any others, which their edits would change."""
    edited = {*edited}
    claims: dict[str, list[tuple[str, Part]]] = {}
    for path in sorted(views, key=lambda path: path not in edited):
        for part in views[path].parts:
            claims.setdefault(part.name, []).append((path, part))
    for name, found in claims.items():
        if len(found) == 1 or found[0][0] not in edited:
            continue
        taken = np.zeros(stored[name].shape, bool)
        for i, (path, part) in enumerate(found):
            if part.get(taken).any():
                other = next(p for p, x in found[:i] if p in edited and _meet(x, part, taken))
                yield f"{path!r} and {other!r} in {name!r}"
            elif path in edited:
                taken = part.put(taken, np.ones_like(part.get(taken)))


def _meet(one: Part, other: Part, like: np.ndarray) -> bool:
    marked = np.zeros_like(like)
    return bool(other.get(one.put(marked, np.ones_like(one.get(marked)))).any())
