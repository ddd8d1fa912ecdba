"""Plan files: the parts of a plan from JSON text, checked against each other."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ..axes.axis_set import AxisSet
from ..axes.labels import ALL, FREE, Labels
from ..errors import PlanFormatError
from .edits import AffineEdit, AffineReader, CenterEdit, LeafSpec, ScaleEdit

VERSIONS = (2, 3, 4)
"""Versions that can be read: 3 adds ``affine`` to 2, and 4 adds ``one`` to that.

Each is written only where that is used.
"""


class Parts(NamedTuple):
    """The fields of a plan."""

    leaves: tuple[LeafSpec, ...]
    edits: tuple[CenterEdit, ...]
    scales: tuple[ScaleEdit, ...]
    affine: tuple[AffineEdit, ...]


def parse(text: str) -> Parts:
    """Read what `FoldPlan.to_json` wrote.

    Raises:
        PlanFormatError: `text` is not such JSON, of another version, or its parts do not fit
            together.
    """
    try:
        data = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise PlanFormatError(f"text: not JSON ({error}); pass what `to_json` wrote") from error
    version = data.get("version") if isinstance(data, dict) else None
    if version not in VERSIONS or type(version) is not int:
        raise PlanFormatError(
            f"text: plan version {version!r}, this library reads versions "
            f"{' and '.join(map(str, VERSIONS))}; make the plan again with `fold` or `plan_fold`"
        )
    try:
        parts = Parts(
            tuple(LeafSpec(leaf["key_path"], _ints(leaf["shape"])) for leaf in data["leaves"]),
            tuple(CenterEdit(e["key_path"], _axis_set(e["along"])) for e in data["edits"]),
            tuple(
                ScaleEdit(s["key_path"], tuple((path, _ints(axes)) for path, axes in s["targets"]))
                for s in data["scales"]
            ),
            tuple(_affine(m, m["one"] if version > 3 else 1) for m in data["affine"])
            if version > 2
            else (),
        )
        check_parts(parts)
    except (KeyError, TypeError, ValueError) as error:
        raise PlanFormatError(
            f"text: broken plan ({type(error).__name__}: {error}); write it with `to_json`"
        ) from error
    return parts


def _affine(data: dict[str, Any], one: Any) -> AffineEdit:
    readers = (
        AffineReader(r["kernel"], _ints(r["axes"]), r["bias"], _ints(r["summed"]))
        for r in data["readers"]
    )
    return AffineEdit(data["key_path"], data["shift"], tuple(readers), one)


def check_parts(plan: Parts) -> None:
    """Raise a `ValueError` unless the edits fit the leaves of the plan, and each other.

    What can be told without the program, of every plan alike, whoever made it.
    """
    shapes = {leaf.key_path: leaf.shape for leaf in plan.leaves}
    if len(shapes) < len(plan.leaves) or not all(isinstance(path, str) for path in shapes):
        raise ValueError("the key paths of its leaves are not different strings")
    for edit in plan.edits:
        if edit.along.shape != shapes.get(edit.key_path):
            raise ValueError(f"no leaf {edit.key_path!r} of shape {edit.along.shape} to center")
        for entry, size in zip(edit.along.entries, edit.along.shape, strict=True):
            if isinstance(entry, Labels):
                groups = {*entry} - {-1}
                if len(entry) != size or groups != {*range(len(groups))}:
                    raise ValueError(f"no labels for {size} positions of leaf {edit.key_path!r}")
    merged = [path for s in plan.scales for path in (s.key_path, *(p for p, _ in s.targets))]
    affine = [path for merge in plan.affine for path in _parts_of(merge)]
    for paths, names in ((merged, "scales and their targets"), (affine, "scales and readers")):
        if len({*paths}) < len(paths) or not shapes.keys() >= {*paths}:
            raise ValueError(f"its {names} are not different leaves")
    for scale in plan.scales:
        for path, axes in scale.targets:
            _check_axes(shapes, scale.key_path, path, axes)
    for merge in plan.affine:
        _check_merge(shapes, merge)
    _check_filled(plan, Counter((*merged, *affine, *(edit.key_path for edit in plan.edits))))


def _check_merge(shapes: Mapping[str, tuple[int, ...]], merge: AffineEdit) -> None:
    if type(merge.one) is not int or merge.one not in (0, 1):
        raise ValueError(f"{merge.one!r} does not stand for one in {merge.key_path!r}")
    for reader in merge.readers:
        for source in filter(None, (merge.key_path, merge.shift)):
            _check_axes(shapes, source, reader.kernel, reader.axes)
        if merge.shift is not None:
            _check_bias(shapes, reader)


def _check_filled(plan: Parts, edits: Mapping[str, int]) -> None:
    """What becomes one or zero is taken up by something, and not edited otherwise."""
    takers = {s.key_path: s.targets for s in plan.scales}
    takers |= {m.key_path: m.readers for m in plan.affine}
    if lost := [path for path, found in takers.items() if not found]:
        raise ValueError(f"nothing takes up the scale {lost[0]!r}")
    filled = (*takers, *(m.shift for m in plan.affine if m.shift is not None))
    if twice := [path for path in filled if edits[path] > 1]:
        raise ValueError(f"leaf {min(twice)!r} is taken up, and edited besides")


def _parts_of(merge: AffineEdit) -> Iterator[str]:
    yield merge.key_path
    if merge.shift is not None:
        yield merge.shift
    for reader in merge.readers:
        yield reader.kernel
        if reader.bias is not None:
            yield reader.bias


def _check_axes(
    shapes: Mapping[str, tuple[int, ...]], source: str, path: str, axes: tuple[int, ...]
) -> None:
    """A source fits the axes of a leaf that its axes of other sizes than 1 run along."""
    sizes = [n for n in shapes[source] if n != 1]
    found = [shapes[path][d] for d in axes if 0 <= d < len(shapes[path])]
    if found != sizes or len({*axes}) < len(axes):
        raise ValueError(f"axes {axes} of leaf {path!r} do not fit {source!r}")


def _check_bias(shapes: Mapping[str, tuple[int, ...]], reader: AffineReader) -> None:
    kernel = shapes[reader.kernel]
    rest = [n for d, n in enumerate(kernel) if d not in reader.summed and n != 1]
    inside = {*reader.summed} <= {*range(len(kernel))} and reader.summed
    inside = inside and len({*reader.summed}) == len(reader.summed)
    if reader.bias is None or not inside or rest != [n for n in shapes[reader.bias] if n != 1]:
        raise ValueError(f"leaf {reader.bias!r} is no bias of {reader.kernel!r}")


def _axis_set(data: dict[str, Any]) -> AxisSet:
    entries = [e if e in (ALL, FREE) else Labels(_ints(e)) for e in data["entries"]]
    return AxisSet.of(_ints(data["shape"]), entries)


def _ints(data: Any) -> tuple[int, ...]:
    if not isinstance(data, list) or not all(type(n) is int for n in data):
        raise TypeError(f"{str(data)[:60]} is not a list of integers")
    return tuple(data)
