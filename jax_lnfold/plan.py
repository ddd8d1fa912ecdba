"""The plan of a fold as plain data: which leaves are scaled and centered, and how.

A plan holds no arrays; it can be written to a file and applied to any tree of the same structure.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .axes import ALL, FREE, AxisSet, Labels
from .center import edit_leaf, overflows
from .errors import FoldError, PlanFormatError, TreeError
from .trees import check_leaves, committed_to

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
class LeafEdit:
    """All that is done to one leaf: merge the scale at key path `scale` along `axes`, then center.

    `sets` None: the leaf is such a scale and becomes one.
    """

    scale: str | None = None
    axes: tuple[int, ...] = ()
    sets: tuple[AxisSet, ...] | None = ()


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
        caller's is ever changed. Everything is checked before the first edit: only if an edit
        itself fails or is interrupted (no memory, Ctrl-C), arrays donated before it are lost.

        Raises:
            TreeError: key paths or shapes differ from the plan's, a leaf is no array or a deleted
                one, or a leaf to edit is no floating-point array or would overflow its dtype.
            FoldError: `donate` is not a bool.
        """
        check_donate(donate)
        self.check(params)
        leaves, treedef = jax.tree.flatten(params)
        position = {leaf.key_path: i for i, leaf in enumerate(self.leaves)}
        jobs: dict[int, tuple[Any, tuple[int, ...], tuple[AxisSet, ...] | None]] = {}
        for path, edit in self.leaf_edits().items():
            factor = None if edit.scale is None else leaves[position[edit.scale]]
            jobs[i := position[path]] = (factor, edit.axes, edit.sets)
            if len({committed_to(leaves[i]), committed_to(factor)} - {None}) > 1:
                raise TreeError(
                    f"params: leaf {path!r} is on other devices than the scale to merge into it; "
                    "put them together with jax.device_put"
                )
        places = Counter(map(id, leaves))  # an array at two key paths keeps its memory
        arrays = [i for i in jobs if isinstance(leaves[i], jax.Array)]
        given = {i for i in arrays if donate and places[id(leaves[i])] == 1}
        if given:  # what is donated is gone: look at all leaves first
            self._refuse({i: overflows(leaves[i], *job) for i, job in jobs.items()})
        changed = dict(enumerate(leaves))
        too_large = {}
        for i, job in jobs.items():
            changed[i], too_large[i] = edit_leaf(leaves[i], *job, i in given)
        self._refuse(jax.device_get(too_large))
        return treedef.unflatten(changed.values())

    def leaf_edits(self) -> dict[str, LeafEdit]:
        """What is done to each leaf, by key path, in tree order; the scales come last.

        Every scale is merged as it was before the edits.
        """
        sets: dict[str, tuple[AxisSet, ...]] = {}
        for edit in self.edits:
            sets[edit.key_path] = (*sets.get(edit.key_path, ()), edit.along)
        merged = {path: (s.key_path, axes) for s in self.scales for path, axes in s.targets}
        scales = {s.key_path: LeafEdit(sets=None) for s in self.scales}
        changed = {*sets, *merged}
        paths = [leaf.key_path for leaf in self.leaves if leaf.key_path in changed]
        edits = {p: LeafEdit(*merged.get(p, (None, ())), sets.get(p, ())) for p in paths}
        return edits | scales

    def _refuse(self, too_large: dict[int, Any]) -> None:
        for i, overflow in too_large.items():
            if overflow:
                raise overflow_error("params", self.leaves[i].key_path)

    def check(self, params: Any) -> None:
        """Raise a `TreeError` unless `params` is a tree of arrays that the plan can edit."""
        found = check_leaves(params, "params")
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
        targets = (path for scale in self.scales for path, _ in scale.targets)
        edited = {*targets, *(edit.key_path for edit in (*self.edits, *self.scales))}
        for path, x in found:
            dtype = jax.typeof(x).dtype
            if path in edited and not jnp.issubdtype(dtype, jnp.floating):
                raise TreeError(
                    f"params: leaf {path!r} has dtype {dtype} and cannot be edited; pass "
                    "floating-point arrays"
                )

    def to_json(self) -> str:
        """The plan as JSON text, readable by `from_json` of the same `version`.

        An object with these keys (others are notes of yours, which `from_json` ignores; a change
        of what they mean raises `version`):

        - ``leaves``: ``key_path`` and ``shape`` of every leaf of the tree, in tree order.
        - ``scales``: before anything is centered, every target (key path, axes) is multiplied by
          the leaf at ``key_path``, whose axes of other sizes than 1 are those axes of the target;
          then that leaf is set to one.
        - ``edits``: subtract from the leaf at ``key_path`` its means over groups of positions.
          ``along`` has its ``shape`` and one entry per axis: ``"all"`` positions are one group,
          every position is a group of its own (``"free"``), or a list with the number of the group
          that each position is in, -1 for those that are left as they are. Two positions of the
          leaf are in one group if they are along every axis. All ``"free"`` sets the leaf to zero.
        - ``version``: 2.
        """
        return json.dumps(asdict(self), indent=1)

    @staticmethod
    def from_json(text: str) -> FoldPlan:
        """Read a plan written by `to_json`.

        Raises:
            PlanFormatError: `text` is not such JSON, of another version, or its parts do not
                fit together.
        """
        try:
            data = json.loads(text)
        except (TypeError, ValueError, RecursionError) as error:
            raise PlanFormatError(f"text: not JSON ({error}); pass what `to_json` wrote") from error
        version = data.get("version") if isinstance(data, dict) else None
        if version != PLAN_VERSION:
            raise PlanFormatError(
                f"text: plan version {version!r}, this library reads version {PLAN_VERSION}; "
                "make the plan again with `fold` or `analyze`"
            )
        try:
            plan = FoldPlan(
                tuple(LeafSpec(leaf["key_path"], _ints(leaf["shape"])) for leaf in data["leaves"]),
                tuple(CenterEdit(e["key_path"], _axis_set(e["along"])) for e in data["edits"]),
                tuple(
                    ScaleEdit(
                        s["key_path"], tuple((path, _ints(axes)) for path, axes in s["targets"])
                    )
                    for s in data["scales"]
                ),
            )
            _check_plan(plan)
        except (KeyError, TypeError, ValueError) as error:
            raise PlanFormatError(
                f"text: broken plan ({type(error).__name__}: {error}); write it with `to_json`"
            ) from error
        return plan


def check_donate(donate: Any) -> None:
    """Raise a `FoldError` unless `donate` is a bool: what is donated by mistake is lost."""
    if not isinstance(donate, (bool, np.bool_)):
        raise FoldError(f"donate: {donate!r} is not a bool; pass True or False")


def overflow_error(name: str, path: str) -> TreeError:
    """What to raise if a leaf of the argument `name` would overflow."""
    return TreeError(
        f"{name}: leaf {path!r} would overflow its dtype when it is edited; convert it to a wider "
        "one, or make its numbers smaller"
    )


def _some(paths: set[str]) -> str:
    shown = ", ".join(sorted(paths)[:3]) or "none"
    return f"{shown} and {len(paths) - 3} more" if len(paths) > 3 else shown


def _check_plan(plan: FoldPlan) -> None:
    """Raise a `ValueError` unless the edits fit the leaves of the plan."""
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
    if len({*merged}) < len(merged) or not shapes.keys() >= {*merged}:
        raise ValueError("its scales and their targets are not different leaves")
    for scale in plan.scales:
        sizes = [n for n in shapes[scale.key_path] if n != 1]
        for path, axes in scale.targets:
            found = [shapes[path][d] for d in axes if 0 <= d < len(shapes[path])]
            if found != sizes or len({*axes}) < len(axes):
                raise ValueError(f"axes {axes} of leaf {path!r} do not fit {scale.key_path!r}")


def _axis_set(data: dict[str, Any]) -> AxisSet:
    entries = [e if e in (ALL, FREE) else Labels(_ints(e)) for e in data["entries"]]
    return AxisSet.of(_ints(data["shape"]), entries)


def _ints(data: Any) -> tuple[int, ...]:
    if not isinstance(data, list) or not all(type(n) is int for n in data):
        raise TypeError(f"{str(data)[:60]} is not a list of integers")
    return tuple(data)
