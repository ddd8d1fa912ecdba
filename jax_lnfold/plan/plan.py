"""The plan of a fold as plain data: which leaves are scaled and centered, and how.

A plan holds no arrays; it can be written to a file and applied to any tree of the same structure.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from os import PathLike
from typing import Any, get_args, get_type_hints

import jax
import numpy as np

from .._compat import is_tracer
from ..errors import FoldError, PlanFormatError, PlanMismatchError, TreeError
from ..printable import printable, written
from ..trees import FLOATS, check_leaves, committed_to, is_editable
from ..untied import copied_in, extended
from .editing import edit_leaf, edit_leaves, replaceable, unfinished
from .edits.affine import AffineEdit
from .edits.assumed import AssumedEdit
from .edits.center import CenterEdit
from .edits.drop import DropEdit
from .edits.edit import Edit, LeafEdit, fills_of
from .edits.hide import HideEdit
from .edits.means import MeanEdit
from .edits.queries import QueryEdit
from .edits.scale import ScaleEdit
from .edits.untie import UntieEdit
from .file import LeafSpec, check_plan, parse
from .leaf import Recipe
from .together import Job
from .tree_fit import Fit, names_in


@dataclass(frozen=True, slots=True)
class FoldPlan:
    """How to edit a parameter tree so that the folded program computes the original function.

    `leaves` describes the tree that the plan fits; `affine` is applied before `scales`, and these
    before `edits` and `means`, of which a leaf has one kind; what is `hidden` concerns leaves that
    nothing else is done to. `dropped` edits no leaf, but makes the
    folded program an approximation: see `exact`. What is `assumed` of leaves is not edited either:
    trees that are otherwise are refused. If leaves are `untied`, the tree is an
    `Untied` one, see `extend`. Where `from_json` would not read it back, it cannot be made:
    `PlanFormatError`.

    Example:
        >>> import jax, jax_lnfold
        >>> def model(params, x):
        ...     return jax.nn.standardize(x @ params["w"])  # a LayerNorm behind a linear layer
        >>> params = {"w": jax.random.normal(jax.random.key(0), (4, 8))}
        >>> x = jax.random.normal(jax.random.key(1), (3, 4))
        >>> plan = jax_lnfold.plan_fold(model, params, x)
        >>> centered = plan.center(params)
        >>> plan.is_centered(params), plan.is_centered(centered)
        (False, True)
        >>> jax_lnfold.FoldPlan.from_json(plan.to_json()) == plan
        True
    """

    leaves: tuple[LeafSpec, ...]
    edits: tuple[CenterEdit, ...]
    scales: tuple[ScaleEdit, ...] = ()
    affine: tuple[AffineEdit, ...] = ()
    untied: tuple[UntieEdit, ...] = ()
    queries: tuple[QueryEdit, ...] = ()
    means: tuple[MeanEdit, ...] = ()
    dropped: tuple[DropEdit, ...] = ()
    assumed: tuple[AssumedEdit, ...] = ()
    hidden: tuple[HideEdit, ...] = ()

    def __post_init__(self) -> None:
        """Check the parts against each other."""
        try:
            check_plan(self.leaves, self.sections)
        except (AttributeError, TypeError, ValueError) as error:
            raise PlanFormatError(
                f"plan: its parts do not fit together ({error}); make it with `fold` or `plan_fold`"
            ) from error

    def __reduce__(self) -> tuple[Any, ...]:
        """Plans that are unpickled are checked like all others."""
        return FoldPlan, (self.leaves, *self.sections.values())

    @property
    def sections(self) -> dict[str, tuple[Edit, ...]]:
        """The edits of each kind, by the field that holds them."""
        return {name: getattr(self, name) for name in KINDS}

    @property
    def version(self) -> int:
        """Of the plan file, as `to_json` says it."""
        return max((edit.version for edits in self.sections.values() for edit in edits), default=2)

    def told(self) -> list[str]:
        """How many leaves are edited, and how: a clause for every kind in use that edits leaves."""
        clauses = (KINDS[name].told(edits) for name, edits in self.sections.items() if edits)
        return [clause for clause in clauses if clause]

    @property
    def exact(self) -> FoldPlan:
        """The same edits, with no mean left out that is not zero."""
        return replace(self, dropped=())

    @property
    def copies(self) -> tuple[str, ...]:
        """Key paths, in the tree that was folded, of leaves that this plan unties by a copy."""
        return copied_in([leaf.key_path for leaf in self.leaves]) if self.untied else ()

    def extend(self, params: Any) -> Any:
        """The tree that this plan is for, from one like that which was folded.

        That is an `Untied` of `params` and copies of leaves if the plan unties some, else `params`
        itself. Traceable and differentiable; the copies are the very arrays until `center` edits
        them.

        Args:
            params: a tree like that which was folded.

        Returns:
            The `Untied` tree, or `params`.

        Raises:
            TreeError: a leaf to copy is missing.

        Example:
            ``folded.apply(plan.center(plan.extend(checkpoint)), x)``
        """
        return extended(params, self.copies)

    def center(self, params: Any, donate: bool = False) -> Any:
        """The edited copy of `params`, a tree like that the plan was made for.

        It need not have the leaves that are not edited, may have boxes around leaves (key paths
        that end in ``/value``) or none, and other sizes along axes that no mean is taken over: two
        of the ten members of an ensemble. `Folded.apply` proves that its edits are not noticed.

        Traceable and differentiable. Leaves that the plan does not edit are returned as they are;
        edited ones keep shape, dtype and sharding. What is centered already is returned as it is:
        means that are zero up to the rounding of the leaf's dtype are not subtracted again (but of
        tracers, so that derivatives are those of a projection). With `donate`, edited arrays give
        up their memory: JAX arrays are deleted, NumPy arrays edited in place if they own their
        memory, may be written to and share it with no other leaf (with anything else they must
        not). Arrays at several key paths, or in memory that another leaf is in, stay, and so do
        those that a leaf on other devices takes up; nothing else of the caller's is ever changed.
        Everything is checked before the first edit: only if an edit itself fails or is interrupted
        (no memory, Ctrl-C), arrays donated before it are lost: deleted, or filled with NaN.

        Args:
            params: a tree of NumPy or JAX arrays, which are not changed.
            donate: give up the memory of edited arrays.

        Returns:
            The edited tree, of the same structure, shapes, dtypes and shardings.

        Raises:
            TreeError: key paths or shapes do not fit the plan's, a leaf is no array or a deleted
                one, or a leaf to edit is no floating-point array or would overflow its dtype.
            PlanMismatchError: a leaf is not as the plan takes it to be, or traced, so that nobody
                can tell.
            FoldError: `donate` is not a bool.
        """
        check_donate(donate)
        plan = self.fitted(params)
        plan.check_assumed(params)
        leaves, treedef = jax.tree.flatten(params)
        jobs = plan._jobs(leaves)
        if any(is_tracer(leaves[i]) for job in jobs for i in (job.leaf, *job.sources)):
            # Derivatives are those of a projection: no look at what is there.
            edits = ((i, [leaves[s] for s in sources], recipe) for i, sources, recipe, _ in jobs)
            changed = {i: edit_leaf(leaves[i], taken, r, False)[0] for i, taken, r in edits}
        else:
            given = replaceable(leaves, jobs) if donate else set[int]()
            changed = edit_leaves(leaves, jobs, given, plan._refuse)
        return treedef.unflatten(changed.get(i, x) for i, x in enumerate(leaves))

    def _jobs(self, leaves: list[Any]) -> list[Job]:
        """What is edited, in an order in which no leaf is taken after it was edited itself."""
        position = {leaf.key_path: i for i, leaf in enumerate(self.leaves)}
        edits, jobs = self.leaf_edits(), list[Job]()
        for path, edit in edits.items():
            if edit.recipe.assumed:
                continue
            fills = fills_of(edits, edit)
            sources = tuple(position[source] for source in edit.sources)
            jobs.append(
                Job(position[path], sources, edit.recipe, None if fills is None else (*fills,))
            )
            if len({committed_to(leaves[i]) for i in (position[path], *sources)} - {None}) > 1:
                raise TreeError(
                    f"params: leaf {path!r} is on other devices than what is to be merged into "
                    "it; put them together with jax.device_put"
                )
        return jobs

    def is_centered(self, params: Any) -> bool:
        """Whether `params` are as `center` leaves them, up to the rounding of each leaf's dtype.

        What a kernel or a bias has taken up cannot be told from it: of merged scales and shifts
        it is looked whether they are ones and zeros.

        Args:
            params: a tree of arrays with values.

        Returns:
            True if nothing is left to be centered.

        Raises:
            TreeError: as for `center`.
        """
        return self.not_centered(params) is None

    def not_centered(self, params: Any) -> str | None:
        """The key path of the first leaf that `is_centered` does not find as it should be."""
        plan = self.fitted(params)
        return plan._not_as_edited(params, plan.leaf_edits())

    def check_assumed(self, params: Any, argument: str = "params") -> None:
        """See to it that leaves are what this plan, which fits them, takes them to be.

        Raises:
            PlanMismatchError: one is not, or is traced, so that nobody can tell.
        """
        edits = {path: e for path, e in self.leaf_edits().items() if e.recipe.assumed}
        leaves = zip(self.leaves, jax.tree.leaves(params), strict=True)
        unknown = (leaf.key_path for leaf, x in leaves if leaf.key_path in edits and is_tracer(x))
        traced = next(unknown, None)
        path = self._not_as_edited(params, edits) if traced is None else traced
        if path is not None:
            raise assumed_error(argument, path, edits[path].recipe, traced is not None)

    def _not_as_edited(self, params: Any, edits: Mapping[str, LeafEdit]) -> str | None:
        """The key path of the first leaf that is not as one of these edits leaves it."""
        paths = [leaf.key_path for leaf in self.leaves]
        jobs = [
            Job(i, (), edits[p].recipe.by_itself, ()) for i, p in enumerate(paths) if p in edits
        ]
        left = unfinished(jax.tree.leaves(params), jobs, slack=2.0)
        return paths[left[0].leaf] if left else None

    def leaf_edits(self) -> dict[str, LeafEdit]:
        """What is done to each leaf, by key path.

        Every edit takes other leaves as they were before all edits. In this order an edit may
        replace its leaf at once: nothing after it takes that.
        """
        found: dict[str, LeafEdit] = {}
        for name in IN_ORDER:
            for edit in self.sections[name]:
                for path, change in edit.changes():
                    found[path] = found[path].then(change) if path in found else change
        in_order = [leaf.key_path for leaf in self.leaves if leaf.key_path in found]
        return {path: found[path] for path in sorted(in_order, key=lambda p: _stage(found[p]))}

    def _needed(self) -> set[str]:
        """The leaves that are edited, and those that they take."""
        edits = self.leaf_edits()
        return {*edits, *(source for edit in edits.values() for source in edit.sources)}

    def _refuse(self, too_large: Iterable[int]) -> None:
        for i in too_large:
            raise overflow_error("params", self.leaves[i].key_path)

    def fitted(
        self,
        params: Any,
        whole: bool = False,
        argument: str = "params",
        abstract: bool = False,
    ) -> FoldPlan:
        """The same edits with the key paths and shapes of `params`, a tree of arrays.

        Key paths may end in ``/value``, as those of boxed leaves do, where the plan's do not, and
        the other way round. Sizes may differ along axes that no mean is taken over; leaves that
        are not edited may have any shape and, unless the tree has to be `whole`, be missing.

        Raises:
            TreeError: this is no such tree, or a leaf of it cannot be edited.
        """
        found = check_leaves(params, argument, abstract)
        shapes = {path: np.shape(x) for path, x in found}
        plan = self
        if [*shapes.items()] != [(leaf.key_path, leaf.shape) for leaf in self.leaves]:
            plan = self._refitted(argument, shapes, whole)
        edited = plan.leaf_edits().keys()
        for path, x in found:
            dtype = x.dtype if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x).dtype
            if path in edited and not is_editable(dtype):
                raise TreeError(
                    f"{argument}: leaf {path!r} has dtype {dtype} and cannot be edited; pass "
                    f"floating-point arrays of {', '.join(FLOATS)}"
                )
        return plan

    def _refitted(
        self, argument: str, shapes: Mapping[str, tuple[int, ...]], whole: bool
    ) -> FoldPlan:
        own = [leaf.key_path for leaf in self.leaves]
        names = names_in(shapes, own)
        missing = {*(own if whole else self._needed())} - names.keys()
        unknown = shapes.keys() - {*names.values()}
        if missing or unknown:
            tree = "plan.extend(params)" if self.untied else "a tree of the same structure"
            raise TreeError(
                f"{argument}: not the tree that was folded (missing {_some(missing)}; unknown "
                f"{_some(unknown)}); pass {tree}"
            )
        return self.refit(argument, names, shapes)

    def refit(
        self, argument: str, names: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
    ) -> FoldPlan:
        """The plan for a tree of these key paths and shapes, with its `names` by key path here.

        Raises:
            TreeError: an edited leaf of the `argument` has a size that does not fit its edit.
        """
        old = {leaf.key_path: leaf.shape for leaf in self.leaves}
        fit = Fit(argument, names, old, {path: shapes[names[path]] for path in self._needed()})
        sections: dict[str, Any] = {
            name: tuple(edit.refit(fit) for edit in edits) for name, edits in self.sections.items()
        }
        return FoldPlan(tuple(LeafSpec(path, shape) for path, shape in shapes.items()), **sections)

    def to_json(self, file: str | PathLike[str] | None = None) -> str:
        """The plan as JSON text, readable by `from_json` of the same `version`.

        It is also written to the `file`, if a path is given.

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
        - ``affine`` (since version 3): before all that, the kernel of every reader is multiplied by
          the leaf at ``key_path`` along ``axes``, as above, and that leaf is set to one. Unless
          ``shift`` is null, the leaf at ``bias`` takes up the product of the leaf at ``shift`` with
          the kernel as it was, summed over the axes ``summed``; then ``shift`` is set to zero.
          With ``one`` 0 instead of 1 (version 4 only) the program adds 1 to the leaf at
          ``key_path``: the kernels are multiplied by the leaf plus one, and it is set to zero.
        - ``untied`` (since version 5): the tree has copies. The leaf at ``key_path``,
          ``copies/a/b``, is one of the leaf ``params/a/b``, which is ``a/b`` in the tree that was
          folded; lookups read the copy.
        - ``queries`` (since version 6): the leaf at ``query`` is multiplied by the leaf at
          ``key_path`` along ``axes``, and that at ``query_shift``, unless null, along
          ``shift_axes``; then ``key_path`` is set to one, and ``shift``, unless null, to zero.
          ``one`` is as in ``affine``.
        - ``means`` (since version 7): like ``edits``, of other leaves, and ``along`` whole axes
          only; then a number of ``means`` is added to all of each group. These are finite, and one
          for each position of the ``"free"`` axes, in row-major order.
        - ``dropped`` (since version 8): the LayerNorm of the name ``norm`` does without its mean.
        - ``assumed`` (since version 9): like ``edits``, but the leaf is not edited: it is so
          already, and must be. With the ``state`` ``"centered"`` its means are zero, with
          ``"constant"`` it does not vary along the axes ``"all"``, to the last bit. With a ``mean``
          (since version 10) other than zero, ``"centered"`` means that the only mean is that.
        - ``hidden`` (since version 10): of the kernel of every reader those rows along ``axis``,
          from ``start`` on, that the leaf ``g`` at ``key_path`` has numbers for, become
          ``W - (1 / g) (g W) / D``, with ``D`` the size of ``g``. Unless ``shift`` is null, the
          leaf at ``bias`` gains ``mean(b / g) (g W)``, with ``b`` the leaf at ``shift`` and the
          kernel as it was. Nothing else is done to any of these leaves.
        - ``version``: 2; 3 if there is an ``affine``; 4 if in one of these ``one`` is 0; 5 if
          leaves are ``untied``; 6 if there are ``queries``; 7 if there are ``means``; 8 if means
          are ``dropped``; 9 if something is ``assumed``; 10 if one of these has a ``mean``, or
          something is ``hidden``.
        """
        version = self.version
        sections = {
            name: [edit.to_json(version) for edit in edits]
            for name, edits in self.sections.items()
            if version >= KINDS[name].VERSIONS[0]
        }
        leaves = [asdict(leaf) for leaf in self.leaves]
        text = json.dumps({"leaves": leaves, **sections, "version": version}, indent=1)
        return written(text, file)

    @staticmethod
    def from_json(text: str | bytes | PathLike[str]) -> FoldPlan:
        """Read a plan written by `to_json`: the text, or the path of a file with it.

        Example:
            ``FoldPlan.from_json(pathlib.Path("plan.json"))``

        Raises:
            PlanFormatError: `text` is not such JSON, of another version, or its parts do not
                fit together.
            OSError: the file cannot be read.
        """
        return FoldPlan(**parse(text, KINDS))


KINDS: dict[str, type[Edit]] = {
    name: get_args(hint)[0]
    for name, hint in get_type_hints(FoldPlan).items()
    if issubclass(get_args(hint)[0], Edit)
}
"""The kind of edits in each field of a plan, and in the section of the same name of its file."""
IN_ORDER = (*reversed(KINDS),)
"""The order in which several kinds change one leaf."""


def _stage(edit: LeafEdit) -> int:
    """When a leaf is edited: before those that it takes, which are filled last."""
    return 0 if edit.recipe.is_first else 1 if edit.recipe.fill is None else 2


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


def assumed_error(name: str, path: str, recipe: Recipe, traced: bool = False) -> PlanMismatchError:
    """What to raise if a leaf of the argument `name` is not as the plan takes it to be."""
    facts = [f"constant along {along}" for along in recipe.constant]
    facts += ["zero" if s.trivial else f"centered along {s}" for s in recipe.sets]
    facts = [f"of mean {recipe.means[0]:.6g}"] if recipe.means else facts
    told = f"{name}: leaf {path!r} must be {' and '.join(facts)}, on which the plan rests"
    if traced:
        return PlanMismatchError(f"{told}, and nobody can tell while it is traced; do this outside")
    return PlanMismatchError(f"{told}, and is not; make a plan for these parameters")


def _some(paths: set[str]) -> str:
    shown = ", ".join(map(printable, sorted(paths)[:3])) or "none"
    return f"{shown} and {len(paths) - 3} more" if len(paths) > 3 else shown
