"""Plan files: the sections of a plan from JSON text, checked against each other."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from ..errors import PlanFormatError
from .edits.edit import Edit, integers


@dataclass(frozen=True, slots=True)
class LeafSpec:
    """A leaf of the parameter tree: its key path (``a/b/kernel``) and shape.

    Example:
        >>> from jax_lnfold import LeafSpec
        >>> LeafSpec("mlp/kernel", (3, 5)).shape
        (3, 5)
    """

    key_path: str
    shape: tuple[int, ...]


Sections = Mapping[str, Sequence[Edit]]
"""The edits of each kind, by the name of the section."""


def parse(text: str | bytes | PathLike[str], kinds: Mapping[str, type[Edit]]) -> dict[str, Any]:
    """Read what `FoldPlan.to_json` wrote, or the file: leaves, and the edits by section.

    Raises:
        PlanFormatError: `text` is not such JSON, of another version, or its parts do not fit
            together.
    """
    if isinstance(text, PathLike):
        text = Path(text).read_bytes()
    try:
        data = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        told = "pass what `to_json` wrote"
        if isinstance(text, str) and text.endswith(".json"):
            told = f"pass pathlib.Path({text!r}) to read a file"
        raise PlanFormatError(f"text: not JSON ({error}); {told}") from error
    version = data.get("version") if isinstance(data, dict) else None
    versions = sorted({version for kind in kinds.values() for version in kind.VERSIONS})
    if version not in versions or type(version) is not int:
        raise PlanFormatError(
            f"text: plan version {version!r}, this library reads versions "
            f"{' and '.join(map(str, versions))}; make the plan again with `fold` or `plan_fold`"
        )
    try:
        leaves = tuple(LeafSpec(x["key_path"], integers(x["shape"])) for x in data["leaves"])
        sections = {
            name: tuple(kind.from_json(edit, version) for edit in data[name])
            for name, kind in kinds.items()
            if version >= kind.VERSIONS[0]
        }
        check_plan(leaves, sections)
    except (KeyError, TypeError, ValueError) as error:
        raise PlanFormatError(
            f"text: broken plan ({type(error).__name__}: {error}); write it with `to_json`"
        ) from error
    return {"leaves": leaves, **sections}


def check_plan(leaves: Sequence[LeafSpec], sections: Sections) -> None:
    """Raise a `ValueError` unless the edits fit the leaves of the plan, and each other.

    What can be told without the program, of every plan alike, whoever made it.
    """
    shapes = {leaf.key_path: leaf.shape for leaf in leaves}
    if len(shapes) < len(leaves) or not all(isinstance(path, str) for path in shapes):
        raise ValueError("the key paths of its leaves are not different strings")
    roles = Counter[str]()
    for edits in sections.values():
        paths = [path for edit in edits for path in edit.parts]
        names = edits[0].NAMES if edits else ""
        if names and (len({*paths}) < len(paths) or not shapes.keys() >= {*paths}):
            raise ValueError(f"its {names} are not different leaves")
        for edit in edits:
            edit.check(shapes)
        roles.update(paths)
    _check_alone(sections, roles)
    _check_filled(sections, roles)
    _check_means(sections)
    _check_assumed(sections, roles)


def _check_alone(sections: Sections, roles: Mapping[str, int]) -> None:
    """What takes a leaf as it is stored does so: nothing else is done to it."""
    alone = (path for edits in sections.values() for e in edits if e.ALONE for path in e.parts)
    if twice := [path for path in alone if roles[path] > 1]:
        raise ValueError(f"leaf {min(twice)!r} has a part in what is hidden, and in another edit")


def _check_filled(sections: Sections, roles: Mapping[str, int]) -> None:
    """What becomes one or zero is taken up by something, and not edited otherwise."""
    changes = (change for edits in sections.values() for e in edits for change in e.changes())
    filled = (path for path, edit in changes if edit.recipe.fill is not None)
    if twice := [path for path in filled if roles[path] > 1]:
        raise ValueError(f"leaf {min(twice)!r} is taken up, and edited besides")


def _check_means(sections: Sections) -> None:
    """What gets means is not centered besides: that would take them away, or add to them."""
    changes = [change for edits in sections.values() for e in edits for change in e.changes()]
    sets = Counter(path for path, edit in changes if edit.recipe.sets)
    given = (path for path, edit in changes if edit.recipe.means is not None)
    if twice := [path for path in given if sets[path] > 1]:
        raise ValueError(f"leaf {min(twice)!r} gets means, and is centered besides")


def _check_assumed(sections: Sections, roles: Mapping[str, int]) -> None:
    """What is taken as it is stays so: nothing else is done to it."""
    changes = (change for edits in sections.values() for e in edits for change in e.changes())
    times = Counter(path for path, edit in changes if edit.recipe.assumed)
    if twice := [path for path, n in times.items() if roles[path] > n]:
        raise ValueError(f"leaf {min(twice)!r} has to stay as it is, and is edited besides")
