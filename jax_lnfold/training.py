"""Training with centered columns: optax transformations that keep a plan's constraint.

The column-centered constraint (CCC, Guo et al., arXiv 2605.14521) holds the parameters in the
subspace in which the folded program computes the original function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ._compat import is_tracer
from .center import group_means, widened
from .edits import LeafEdit
from .errors import FoldError, TreeError
from .plan import FoldPlan
from .trees import FLOATS, is_editable, is_numeric, leaf_paths

if TYPE_CHECKING:
    import optax

LAST = "put center_updates last in the outermost chain, where it sees every parameter"


class CenterState(NamedTuple):
    """State of `center_updates`.

    `drift` (float32 scalar) is the largest group mean of the parameters that the last update was
    given, in units of what rounding explains. More than 1 means that something else moves them off
    the constraint: a transformation after this one, or a step that does not use its updates.
    """

    drift: Any


def center_updates(plan: FoldPlan) -> optax.GradientTransformation:
    """Keep parameters centered as `plan` centers them: put it last in the chain.

    ``optax.chain(optax.adamw(1e-3), center_updates(folded.plan))`` trains ``folded.apply`` from
    ``folded.params``. Each update ``u`` of an edited leaf ``p`` becomes ``C(p + u) - p``, so that
    rounding does not add up. Groups whose update has no mean stay as they are, as do leaves that
    the plan does not edit; scales and shifts that the plan merged stay one and zero. Groups with
    elements that are not finite are left alone: these do not spread. Means are taken in at least
    float32; the updates keep structure, dtype and sharding. Traceable, also in `scan`; outside of
    `jit`, parameters must be centered to the precision of their dtype.

    It must see parameters and the final updates, so it belongs behind everything that is not the
    same for all elements of a group (Adam, clipping by value, masks and `multi_transform`).
    Behind it there may be nothing but a common factor. `CenterState.drift` tells, one step later,
    if that is violated.

    Raises (from `init` and `update`):
        TreeError: the tree is not the plan's, lacks a leaf that it centers (a mask, say), or its
            parameters are not centered (seen only where they are not traced).
        FoldError: `update` is not given the parameters, or optax is not installed.
    """
    edits = _edits(plan, "center_updates")

    def init(params: Any) -> CenterState:
        leaves = dict(_fitting(plan, edits, params, "params"))
        if not any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves.values()):
            _refuse_uncentered({path: _drift(leaves[path], edit) for path, edit in edits.items()})
        return CenterState(jnp.zeros((), jnp.float32))

    def update(updates: Any, state: CenterState, params: Any = None) -> tuple[Any, CenterState]:
        if params is None:
            raise FoldError(
                "params: center_updates needs the parameters; call tx.update(grads, state, params)"
            )
        given = dict(_fitting(plan, edits, params, "params"))
        drifts = {path: _drift(given[path], edit) for path, edit in edits.items()}
        _refuse_uncentered(drifts)
        new = _map(
            plan, edits, updates, lambda path, u, edit: _centered_update(u, given[path], edit)
        )
        return new, CenterState(jnp.max(jnp.stack([jnp.zeros((), jnp.float32), *drifts.values()])))

    return _optax("center_updates").GradientTransformation(init, update)


def center_gradients(plan: FoldPlan) -> optax.GradientTransformation:
    """Project gradients onto the constraint of `plan`: put it first in the chain.

    The gradient of a folded program at centered parameters has a part that leads off the
    constraint; that of the original program has none. With this in front of an optimiser and
    `center_updates` behind it, both train in the same way, also by optimisers that are not linear
    (Adam). It needs no parameters and keeps no state.

    Raises (from `init` and `update`):
        TreeError: the tree is not the plan's, or lacks a leaf that it centers.
        FoldError: optax is not installed.
    """
    edits = _edits(plan, "center_gradients")
    optax = _optax("center_gradients")

    def init(params: Any) -> Any:
        list(_fitting(plan, edits, params, "params"))
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        new = _map(plan, edits, updates, lambda _, u, edit: _centered_update(u, None, edit))
        return new, state

    return optax.GradientTransformation(init, update)


def _edits(plan: FoldPlan, name: str) -> dict[str, LeafEdit]:
    if not isinstance(plan, FoldPlan):
        raise FoldError(f"plan: a {type(plan).__name__} is no FoldPlan; call {name}(folded.plan)")
    return plan.leaf_edits()


def _optax(name: str) -> Any:
    try:
        import optax
    except ImportError as error:
        raise FoldError(f"{name} needs optax; install it with `pip install optax`") from error
    return optax


def _map(
    plan: FoldPlan,
    edits: dict[str, LeafEdit],
    tree: Any,
    change: Callable[[str, Any, LeafEdit], Any],
) -> Any:
    """The tree with its edited leaves changed."""
    leaves = (
        change(path, x, edits[path]) if path in edits else x
        for path, x in _fitting(plan, edits, tree, "updates")
    )
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def _fitting(
    plan: FoldPlan, edits: dict[str, LeafEdit], tree: Any, name: str
) -> Iterator[tuple[str, Any]]:
    """Leaves with the plan's key paths; leaves that the plan does not edit may be missing.

    Flax NNX gives an optimiser arrays where the model has variables: without ``/value`` at the end.
    """
    shapes = {leaf.key_path: leaf.shape for leaf in plan.leaves}
    known = {path.removesuffix("/value"): path for path in shapes} | {p: p for p in shapes}
    found = leaf_paths(tree, name)
    paths = [known.get(path) for path, _ in found]
    if None in paths:
        raise TreeError(
            f"{name}: leaf {found[paths.index(None)][0]!r} is not in the plan; make the plan from "
            "the tree that is trained"
        )
    if missing := [path for path in edits if path not in paths]:
        raise TreeError(
            f"{name}: lacks leaf {missing[0]!r}, which the plan centers (masked, or in another "
            f"part of multi_transform?); {LAST}"
        )
    for path, (_, x) in zip(paths, found, strict=True):
        assert path is not None
        if path in edits:
            _check_leaf(path, x, shapes[path], name)
        yield path, x


def _check_leaf(path: str, x: Any, shape: tuple[int, ...], name: str) -> None:
    if not (is_numeric(x) or isinstance(x, jax.ShapeDtypeStruct)):
        raise TreeError(f"{name}: leaf {path!r} is a {type(x).__name__}; pass arrays")
    if np.shape(x) != shape:
        raise TreeError(
            f"{name}: leaf {path!r} has shape {np.shape(x)}, the plan was made for {shape}; make "
            "a plan from the tree that is trained"
        )
    if not is_editable(x.dtype if hasattr(x, "dtype") else np.dtype(type(x))):
        raise TreeError(
            f"{name}: leaf {path!r} holds no floating-point numbers of {', '.join(FLOATS)} and "
            "cannot be centered"
        )


def _centered_update(u: Any, p: Any, edit: LeafEdit) -> Any:
    """``C(p + u) - p``, by subtracting means from ``u``: no digits are lost in the sum.

    A group is left alone if the mean of its update is zero already, or not finite.
    """
    if edit.recipe.fill is not None:  # what was merged stays as it is
        return jnp.zeros_like(u)
    dtype = jnp.result_type(u)
    wide = widened(dtype) if p is None else widened(dtype, p.dtype)
    # Without the barrier compilers would rather compute the gradient's product twice.
    new = jnp.asarray(jax.lax.optimization_barrier(u), wide)
    for along in edit.recipe.sets:
        mean = group_means(new, along, jnp)
        rest = 0 if p is None else group_means(jnp.asarray(p, wide), along, jnp)
        new = new - jnp.where((mean != 0) & jnp.isfinite(mean + rest), mean + rest, 0)
    return new.astype(dtype)


def _drift(p: Any, edit: LeafEdit) -> jax.Array:
    """The largest finite group mean, as a multiple of what rounding explains."""
    dtype = jnp.result_type(p)
    wide = widened(dtype)
    x = jnp.asarray(p, wide)
    tolerance = float(jnp.finfo(dtype).eps) + 32 * float(jnp.finfo(wide).eps)
    if edit.recipe.fill is not None:
        return (jnp.max(jnp.abs(x - edit.recipe.fill)) / tolerance).astype(jnp.float32)
    largest = [jnp.zeros((), wide)]
    for along in edit.recipe.sets:
        size = group_means(jnp.abs(x), along, jnp)
        means = jnp.abs(group_means(x, along, jnp)) / jnp.where(size == 0, 1, size)
        largest.append(jnp.max(jnp.where(jnp.isfinite(means), means, 0)))
    return (jnp.max(jnp.stack(largest)) / tolerance).astype(jnp.float32)


def _refuse_uncentered(drifts: dict[str, jax.Array]) -> None:
    """Raise a `TreeError` for a leaf off the constraint, where values are known."""
    for path, drift in drifts.items():
        if not is_tracer(drift) and float(drift) > 1:
            raise TreeError(
                f"params: leaf {path!r} is not centered as the plan centers it; start from "
                f"folded.params or plan.center(params), and {LAST}"
            )
