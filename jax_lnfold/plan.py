"""The plan of a fold as plain data: which leaves are scaled and centered, and how.

A plan holds no arrays and no jax objects; it can be written to a file and applied to any tree of
the same structure.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from .axes import ALL, FREE, AxisSet, Labels
from .errors import PlanFormatError

PLAN_VERSION = 1


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
    """Multiply `targets` (key path, axis) by the scale at `key_path`, then set that to one."""

    key_path: str
    targets: tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class FoldPlan:
    """How to edit a parameter tree so that the folded program computes the original function.

    `leaves` describes the tree that the plan fits, `scales` is applied before `edits`.
    """

    leaves: tuple[LeafSpec, ...]
    edits: tuple[CenterEdit, ...]
    scales: tuple[ScaleEdit, ...] = ()
    version: int = PLAN_VERSION

    def center(self, params: Any) -> Any:
        """The edited copy of `params`; see `jax_lnfold.center.center_tree`."""
        from .center import center_tree

        return center_tree(self, params)

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
                    ScaleEdit(s["key_path"], tuple((path, axis) for path, axis in s["targets"]))
                    for s in data["scales"]
                ),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise PlanFormatError(f"text: incomplete plan ({error!r}); write it again") from error


def _axis_set(data: dict[str, Any]) -> AxisSet:
    entries = (e if e in (ALL, FREE) else Labels(map(int, e)) for e in data["entries"])
    return AxisSet.of(data["shape"], entries)
