"""The plan of a fold as plain data: which leaves are scaled and centered, and how.

A plan holds no arrays; it can be written to a file and applied to any tree of the same structure.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np

from .axes import ALL, FREE, AxisSet, Labels
from .center import edit_leaf
from .errors import PlanFormatError, TreeError

PLAN_VERSION = 2


@dataclass(frozen=True, slots=True)
class LeafSpec:
    """A leaf of the parameter tree: its key path (``a/b/kernel``) and shape."""

    key_path: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class CenterEdit:
    """Subtract group means from one leaf (CBWC); `along` says which positions form a group."""

    key_path: str
    along: AxisSet

    def __str__(self) -> str:
        """The edit in words, ``a/b/kernel centered along axis 1``."""
        return f"{self.key_path} centered along {self.along}"

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes averaged over, wholly or in part; empty when the leaf is set to zero."""
        return self.along.axes


@dataclass(frozen=True, slots=True)
class ScaleEdit:
    """Multiply `targets` (key path, axes) by the scale at `key_path`, then set that to one."""

    key_path: str
    targets: tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True, slots=True)
class FoldPlan:
    """How to edit a parameter tree so that the folded program computes the original function.

    `leaves` describes the tree that the plan fits, `scales` is applied before `edits`.
    """

    leaves: tuple[LeafSpec, ...]
    edits: tuple[CenterEdit, ...]
    scales: tuple[ScaleEdit, ...] = ()
    version: int = PLAN_VERSION

    def center(self, params: Any, donate: bool = False) -> Any:
        """The edited copy of `params`, a tree of the structure and shapes the plan was made for.

        Traceable and differentiable. Leaves that the plan does not edit are returned as they are;
        edited ones keep shape, dtype and sharding. With `donate`, edited JAX arrays give up their
        memory and are deleted, unless they stand at several key paths; nothing else of the
        caller's is ever changed.

        Raises:
            TreeError: key paths or shapes differ from the plan's, or a leaf to edit is no
                floating-point array.
        """
        self.check(params)
        leaves, treedef = jax.tree.flatten(params)
        position = {path: i for i, (path, _) in enumerate(leaf_paths(params))}
        edits: dict[int, tuple[AxisSet, ...]] = {}
        for edit in self.edits:
            i = position[edit.key_path]
            edits[i] = (*edits.get(i, ()), edit.along)
        scaled = {
            position[path]: (leaves[position[scale.key_path]], axes)
            for scale in self.scales
            for path, axes in scale.targets
        }
        changed = dict(enumerate(leaves))
        places = Counter(map(id, leaves))  # an array at two key paths keeps its memory
        given = [donate and places[id(x)] == 1 for x in leaves]
        for i in sorted({*edits, *scaled}):
            factor, axes = scaled.get(i, (None, ()))
            changed[i] = edit_leaf(leaves[i], factor, axes, edits.get(i, ()), given[i])
        for i in (position[scale.key_path] for scale in self.scales):
            changed[i] = edit_leaf(leaves[i], None, (), None, given[i])
        return treedef.unflatten(changed.values())

    def check(self, params: Any) -> None:
        """Raise a `TreeError` unless `params` has the key paths and shapes of the plan."""
        found = leaf_paths(params)
        if [path for path, _ in found] != [leaf.key_path for leaf in self.leaves]:
            known = {leaf.key_path for leaf in self.leaves}
            got = {path for path, _ in found}
            raise TreeError(
                f"params: not the tree that was folded (missing {_some(known - got)}; unknown "
                f"{_some(got - known)}); pass a tree of the same structure"
            )
        for (path, x), leaf in zip(found, self.leaves, strict=True):
            if np.shape(x) != leaf.shape:
                raise TreeError(
                    f"params: leaf {path!r} has shape {np.shape(x)}, the folded tree had "
                    f"{leaf.shape}; fold the model again for other sizes"
                )

    def to_json(self) -> str:
        """The plan as JSON text, readable by `from_json` of the same `version`."""
        return json.dumps(asdict(self), indent=1)

    @staticmethod
    def from_json(text: str) -> FoldPlan:
        """Read a plan written by `to_json`.

        Raises:
            PlanFormatError: `text` is not such JSON, or of another version.
        """
        try:
            data = json.loads(text)
        except (TypeError, ValueError) as error:
            raise PlanFormatError(f"text: not JSON ({error}); pass what `to_json` wrote") from error
        version = data.get("version") if isinstance(data, dict) else None
        if version != PLAN_VERSION:
            raise PlanFormatError(
                f"text: plan version {version!r}, this library reads version {PLAN_VERSION}; "
                "make the plan again with `fold` or `analyze`"
            )
        try:
            return FoldPlan(
                tuple(LeafSpec(leaf["key_path"], tuple(leaf["shape"])) for leaf in data["leaves"]),
                tuple(CenterEdit(e["key_path"], _axis_set(e["along"])) for e in data["edits"]),
                tuple(
                    ScaleEdit(
                        s["key_path"], tuple((path, tuple(axes)) for path, axes in s["targets"])
                    )
                    for s in data["scales"]
                ),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise PlanFormatError(f"text: incomplete plan ({error!r}); write it again") from error


def leaf_paths(tree: Any) -> list[tuple[str, Any]]:
    """Leaves in tree order with their key paths, written ``a/b/kernel``."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), x) for path, x in leaves]


def _some(paths: set[str]) -> str:
    shown = ", ".join(sorted(paths)[:3]) or "none"
    return f"{shown} and {len(paths) - 3} more" if len(paths) > 3 else shown


def _axis_set(data: dict[str, Any]) -> AxisSet:
    entries = (e if e in (ALL, FREE) else Labels(map(int, e)) for e in data["entries"])
    return AxisSet.of(data["shape"], entries)
