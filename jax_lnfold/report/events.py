"""The zero-mean graph as streams: what writes into each of them and which LayerNorms read it.

A stream is a set of values computed from data whose means vanish together: a residual stream, or
the output of one projection. What happens to the streams is a list of events in program order.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from networkx.utils import UnionFind

from ..analysis.claims import Blocker, Claim
from ..placement.place import Placement
from ..program.graph import CallPath, Graph, Location
from .names import Name

WRITTEN, EDITED, INSERTED = "written", "edited", "inserted"
FOLDED, APPROXIMATED, LEFT = "folded", "approximated", "left"
BLOCKED, NOTICED = "blocked", "noticed"
KINDS = (BLOCKED, WRITTEN, EDITED, INSERTED, FOLDED, APPROXIMATED, LEFT, NOTICED)


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happens to a stream.

    Parameters write into it (`edited` if they were centered, else `written`), a centering is
    `inserted`, a LayerNorm reads it (`folded`, `approximated` or `left`), an operation keeps it
    from being zero-mean (`blocked`) or would notice if it were (`noticed`). `stream` is a number,
    `name` a module path, an operation, or the key path above the parameters; `detail` is shown
    behind it, `why` on demand. It happens `runs` times in one call, in the loop at `loop`.
    """

    kind: str
    stream: int
    name: str
    detail: str = ""
    why: str = ""
    runs: int = 1
    loop: CallPath = ()


@dataclass(frozen=True, slots=True)
class _Found:
    """An event with its place in the program, before streams are numbered."""

    index: float
    claim: Claim
    kind: str
    name: str
    detail: str
    why: str
    path: CallPath


def find_events(placement: Placement, names: Sequence[Name]) -> tuple[Event, ...]:
    """What happens to the streams, in program order; the names are those of the LayerNorms."""
    streams = UnionFind()
    top = _root([*placement.graph.leaves.values()])
    norms = list(_norms(placement, names, top))
    roots = {found.claim for found in norms}
    writers = list(_writers(placement, roots, streams, top))
    found = (*_blockers(placement), *writers, *_insertions(placement), *norms)
    ordered = sorted(dict.fromkeys(found), key=lambda f: (f.index, KINDS.index(f.kind)))
    numbers: dict[Claim, int] = {}
    graph = placement.graph
    root = _root([name.module for name in names])
    return tuple(
        Event(
            kind=f.kind,
            stream=numbers.setdefault(streams[f.claim], len(numbers)),
            name=f.name.removeprefix(root),
            detail=f.detail.removeprefix(root),
            why=f.why,
            runs=graph.trips[f.path],
            loop=_loop(graph, f.path),
        )
        for f in _together(ordered, streams)
    )


def _root(paths: Iterable[str]) -> str:
    """The first part of all paths, if they share it and go on: ``params/``."""
    firsts = {first + slash for first, slash, _ in (path.partition("/") for path in paths)}
    root = firsts.pop() if len(firsts) == 1 else ""
    return root if root.endswith("/") else ""


def _norms(placement: Placement, names: Sequence[Name], top: str) -> Iterator[_Found]:
    graph, search = placement.graph, placement.search
    for i, (norm, name) in enumerate(zip(placement.norms, names, strict=True)):
        made = graph.producer[norm.x]
        index = norm.sums[0].index if norm.sums else made[0].index if made else -1
        path = norm.sums[0].path if norm.sums else graph.home[norm.x]
        shape = "x".join(map(str, graph.shape(norm.x)))
        left, approximate = placement.left.get(i), placement.approximate | placement.dropped
        kind = APPROXIMATED if i in approximate else LEFT if left else FOLDED
        why = str(left or "")
        claim = search.resolve((norm.x, norm.along))
        detail = " ".join(word for word in (shape, name.beside) if word)
        yield _Found(index, claim, kind, name.text.removeprefix(top), detail, why, path)


def _blockers(placement: Placement) -> Iterator[_Found]:
    """What the reasons of the LayerNorms that are left name."""
    for i, reason in placement.left.items():
        norm = placement.norms[i]
        claim = placement.search.resolve((norm.x, norm.along))
        of_input = BLOCKED if reason.leaf is None else NOTICED
        for kind, blocker in ((of_input, reason.obstacle), (NOTICED, reason.noticed)):
            if blocker is not None:
                yield _blocker(placement.graph, claim, kind, blocker)


def _blocker(graph: Graph, claim: Claim, kind: str, blocker: Blocker) -> _Found:
    if blocker.op is None and not blocker.is_output:
        index = -1.0 if kind == BLOCKED else float("inf")
        return _Found(index, claim, kind, blocker.why, "", "", ())
    op, why = blocker.op, str(blocker)
    if blocker.is_output:
        name, detail = "returned as an output", _brief(op.location()) if op else ""
        return _Found(float("inf"), claim, NOTICED, name, detail, why, op.path if op else ())
    assert op is not None
    return _Found(op.index, claim, kind, _brief(op.location()), op.location().module, why, op.path)


def _brief(place: Location) -> str:
    """``primitive file.py:line``."""
    return f"{place.primitive} {place.where}".strip()


def _insertions(placement: Placement) -> Iterator[_Found]:
    graph = placement.graph
    for value, sets in placement.explicit.items():
        made = graph.producer[value]
        why = str(placement.inserted[value].obstacle or "")
        for along in sets:
            if not along.trivial and not graph.fixed[value]:
                claim = placement.search.resolve((value, along))
                index = made[0].index if made else -1
                where = f"after {_brief(made[0].location())}" if made else "of an input"
                yield _Found(index, claim, INSERTED, "centering", where, why, graph.home[value])


def _writers(
    placement: Placement, roots: set[Claim], streams: UnionFind, top: str
) -> Iterator[_Found]:
    """Where parameters enter the streams; on the way, unites what belongs to one stream."""
    graph, search = placement.graph, placement.search

    def leaves_of(claim: Claim) -> Iterator[int]:
        todo, seen = [claim], {claim}
        while todo:
            value, _ = current = todo.pop()
            if value in graph.leaves:
                yield value
            fresh = [search.resolve(c) for c in search.nodes[current].needs or ()]
            todo += (c for c in fresh if c not in seen)
            seen.update(fresh)

    for claim, node in search.nodes.items():
        value = claim[0]
        if graph.data_free[value] and claim not in roots:
            continue
        for needed in map(search.resolve, node.needs or ()):
            if needed in roots or not graph.data_free[needed[0]]:
                streams.union(claim, needed)
                continue
            made = graph.producer[value]
            for leaf in leaves_of(needed):
                above, _, name = graph.leaves[leaf].removeprefix(top).rpartition("/")
                kind = EDITED if leaf in placement.leaf_sets else WRITTEN
                index = made[0].index if made else -1
                yield _Found(index, claim, kind, above, name, "", graph.home[value])


def _together(found: Iterable[_Found], streams: UnionFind) -> list[_Found]:
    """Kernel and bias of one layer, if nothing else happens to the stream between, as one event."""
    events: list[_Found] = []
    last: dict[Claim, int] = {}  # stream -> its latest event
    seen: set[Hashable] = set()  # several LayerNorms may have one blocker
    for f in found:
        stream = streams[f.claim]
        what = stream, f.kind, f.index
        if what in seen and f.kind in (BLOCKED, NOTICED):
            continue
        seen.add(what)
        if stream in last and f.kind in (WRITTEN, EDITED):
            before = events[last[stream]]
            if (before.kind, before.name, before.path) == (f.kind, f.name, f.path):
                names = dict.fromkeys((*before.detail.split(", "), f.detail))
                events[last[stream]] = replace(before, detail=", ".join(names))
                continue
        last[stream] = len(events)
        events.append(f)
    return events


def _loop(graph: Graph, path: CallPath) -> CallPath:
    """The loop around a jaxpr, if any: the shortest path that runs as often."""
    lengths = (n for n in range(len(path) + 1) if graph.trips.get(path[:n]) == graph.trips[path])
    n = next(lengths)
    return path[:n] if n and graph.trips[path] > 1 else ()
