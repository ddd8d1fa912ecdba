"""Training with centered columns: optax transformations that keep a plan's constraint.

The column-centered constraint (CCC, Guo et al., arXiv 2605.14521) holds the parameters in the
subspace in which the folded program computes the original function.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ._compat import is_tracer
from .axes.axis_set import AxisSet
from .axes.labels import ALL, FREE
from .centering import group_means, widened
from .errors import FoldError, TreeError
from .plan.leaf import Recipe, first_of_each
from .plan.plan import FoldPlan
from .plan.tree_fit import names_in
from .trees import FLOATS, is_editable, is_numeric, leaf_paths

if TYPE_CHECKING:
    import optax

LAST = "put center_updates last in the outermost chain, where it sees every parameter"


class CenterState(NamedTuple):
    """State of `center_updates`.

    `drift` (float32 scalar) is the largest group mean of the parameters that the last update was
    given, in units of what rounding explains. More than 1 means that something else moves them off
    the constraint: a transformation after this one, or a step that does not use its updates.

    Example:
        >>> import jax, jax_lnfold
        >>> def model(params, x):
        ...     return jax.nn.standardize(x @ params["w"])  # a LayerNorm behind a linear layer
        >>> params = {"w": jax.random.normal(jax.random.key(0), (4, 8))}
        >>> x = jax.random.normal(jax.random.key(1), (3, 4))
        >>> folded = jax_lnfold.fold(model, params, x)
        >>> state = jax_lnfold.center_updates(folded.plan).init(folded.params)
        >>> float(state.drift)
        0.0
    """

    drift: Any


def center_updates(plan: FoldPlan) -> optax.GradientTransformation:
    """Keep parameters centered as `plan` centers them, or at its means: put it last in the chain.

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

    Leaves that are not in the tree it is given (``wrt`` filters, adapters) are taken to be frozen:
    they stay centered by themselves.

    It sees the trained parameters only. Averages of these are centered as they are; parameters that
    an optimiser keeps to itself are so if this is inside: ``schedule_free(optax.chain(adam,
    center_updates(plan)), ...)``, and the same with `optax.lookahead`. Or serve
    ``plan.center(schedule_free_eval_params(...))``: the original model does not notice.

    Args:
        plan: that of the fold that is trained.

    Returns:
        A transformation of updates, with a `CenterState`.

    Raises:
        FoldError: `plan` is no plan, optax is not installed, or `update` is not given the
            parameters.
        TreeError: from `init` and `update`: the tree is not the plan's, a leaf that it centers is
            masked, or parameters are not centered (seen only where they are not traced).

    Example:
        >>> import optax
        >>> import jax, jax_lnfold
        >>> def model(params, x):
        ...     return jax.nn.standardize(x @ params["w"])  # a LayerNorm behind a linear layer
        >>> params = {"w": jax.random.normal(jax.random.key(0), (4, 8))}
        >>> x = jax.random.normal(jax.random.key(1), (3, 4))
        >>> folded = jax_lnfold.fold(model, params, x)
        >>> tx = optax.chain(optax.adam(0.1), jax_lnfold.center_updates(folded.plan))
        >>> def loss(params):
        ...     return folded.apply(params, x)[:, 0].sum()
        >>> params, state = folded.params, tx.init(folded.params)
        >>> updates, state = tx.update(jax.grad(loss)(params), state, params)
        >>> folded.plan.is_centered(optax.apply_updates(params, updates))
        True
    """
    _check_plan(plan, "center_updates")

    def init(params: Any) -> CenterState:
        fitted = _fitted(plan, params, "params")
        if not any(isinstance(x, jax.ShapeDtypeStruct) for x in fitted.leaves):
            _refuse_uncentered(_drifts(fitted))
        return CenterState(jnp.zeros((), jnp.float32))

    def update(updates: Any, state: CenterState, params: Any = None) -> tuple[Any, CenterState]:
        if params is None:
            raise FoldError(
                "params: center_updates needs the parameters; call tx.update(grads, state, params)"
            )
        fitted, moved = _fitted(plan, params, "params"), _fitted(plan, updates, "updates")
        if fitted.recipes != moved.recipes:
            raise TreeError("updates: have other shapes than params; pass those of this tree")
        given, drifts = fitted.edited(), _drifts(fitted)
        _refuse_uncentered(drifts)
        new = _map(updates, moved, lambda path, u, recipe: _centered_update(u, given[path], recipe))
        return new, CenterState(jnp.max(jnp.stack([jnp.zeros((), jnp.float32), *drifts.values()])))

    return _optax("center_updates").GradientTransformation(init, update)


def center_gradients(plan: FoldPlan) -> optax.GradientTransformation:
    """Project gradients onto the constraint of `plan`: put it first in the chain.

    The gradient of a folded program at centered parameters has a part that leads off the
    constraint; that of the original program has none. With this in front of an optimiser and
    `center_updates` behind it, both train in the same way, also by optimisers that are not linear
    (Adam). It needs no parameters and keeps no state.

    Args:
        plan: that of the fold that is trained.

    Returns:
        A transformation of gradients, without a state.

    Raises:
        FoldError: `plan` is no plan, or optax is not installed.
        TreeError: from `init` and `update`: the tree is not the plan's, or a leaf that it centers
            is masked.

    Example:
        >>> import jax, jax_lnfold
        >>> def model(params, x):
        ...     return jax.nn.standardize(x @ params["w"])  # a LayerNorm behind a linear layer
        >>> params = {"w": jax.random.normal(jax.random.key(0), (4, 8))}
        >>> x = jax.random.normal(jax.random.key(1), (3, 4))
        >>> folded = jax_lnfold.fold(model, params, x)
        >>> tx = jax_lnfold.center_gradients(folded.plan)
        >>> gradient = {"w": jax.numpy.ones((4, 8))}  # off the constraint altogether
        >>> projected, _ = tx.update(gradient, tx.init(folded.params))
        >>> float(abs(projected["w"]).max())
        0.0
    """
    _check_plan(plan, "center_gradients")
    optax = _optax("center_gradients")

    def init(params: Any) -> Any:
        _fitted(plan, params, "params")
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        fitted = _fitted(plan, updates, "updates")
        new = _map(updates, fitted, lambda _, u, recipe: _centered_update(u, None, recipe))
        return new, state

    return optax.GradientTransformation(init, update)


def drift_of(plan: FoldPlan, tree: Any) -> float:
    """How far a tree that `plan` fits is off what it centers, as `CenterState.drift` says it."""
    edits = plan.leaf_edits()
    edited = {path: x for path, x in leaf_paths(tree) if path in edits}

    def worst(leaves: dict[str, Any]) -> jax.Array:
        drifts = [_drift(x, edits[path].recipe) for path, x in leaves.items()]
        return jnp.max(jnp.stack([jnp.zeros((), jnp.float32), *drifts]))

    return float(jax.jit(worst)(edited))


def _check_plan(plan: FoldPlan, name: str) -> None:
    if not isinstance(plan, FoldPlan):
        raise FoldError(f"plan: a {type(plan).__name__} is no FoldPlan; call {name}(folded.plan)")


def _optax(name: str) -> Any:
    try:
        import optax
    except ImportError as error:
        raise FoldError(f"{name} needs optax; install it with `pip install optax`") from error
    return optax


class _Fitted(NamedTuple):
    """A tree with what the plan does to its leaves, by the key paths of the plan."""

    paths: list[str]
    leaves: list[Any]
    recipes: dict[str, Recipe]

    def edited(self) -> dict[str, Any]:
        """The leaves that are edited."""
        found = zip(self.paths, self.leaves, strict=True)
        return {path: x for path, x in found if path in self.recipes}


def _map(tree: Any, fitted: _Fitted, change: Callable[[str, Any, Recipe], Any]) -> Any:
    """The tree with its edited leaves changed."""
    recipes = fitted.recipes
    leaves = (
        change(path, x, recipes[path]) if path in recipes else x
        for path, x in zip(fitted.paths, fitted.leaves, strict=True)
    )
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def _fitted(plan: FoldPlan, tree: Any, name: str) -> _Fitted:
    """How the plan fits a tree: leaves that it does not edit may be missing.

    Flax NNX gives an optimiser arrays where the model has variables: without ``/value`` at the end.
    """
    plan = replace(plan, hidden=())  # exact whether or not it stays so: it lessens one error, once
    edited, found = plan.leaf_edits().keys(), dict(leaf_paths(tree, name))
    names = names_in(found, (leaf.key_path for leaf in plan.leaves))
    own = {path: key for key, path in names.items()}
    if unknown := [path for path in found if path not in own]:
        raise TreeError(
            f"{name}: leaf {unknown[0]!r} is not in the plan; make the plan from the tree that is "
            "trained"
        )
    if missing := [path for path in edited if path not in names]:
        if _is_masked(tree):  # another part of the optimiser may train them
            raise TreeError(
                f"{name}: lacks leaf {missing[0]!r}, which the plan centers (masked, or in another "
                f"part of multi_transform?); {LAST}"
            )
        plan = _for_what_is_trained(plan, names, name)
        edited = plan.leaf_edits().keys()
    for path in edited:
        _check_leaf(names[path], found[names[path]], name)
    shapes = {path: np.shape(x) for path, x in found.items()}
    edits = plan.refit(name, names, shapes).leaf_edits()
    return _Fitted(
        paths=[own[path] for path in found],
        leaves=[*found.values()],
        recipes={path: edits[names[path]].recipe for path in edited},
    )


def _is_masked(tree: Any) -> bool:
    masked = _optax("center_updates").MaskedNode

    def is_masked(x: Any) -> bool:
        return isinstance(x, masked)

    return any(map(is_masked, jax.tree.leaves(tree, is_leaf=is_masked)))


def _for_what_is_trained(plan: FoldPlan, present: Container[str], name: str) -> FoldPlan:
    """The part of the plan about leaves that are there: others are frozen, and stay centered."""
    sections: dict[str, Any] = {
        section: tuple(e for e in edits if all(path in present for path in e.parts))
        for section, edits in plan.sections.items()
    }
    part = FoldPlan(plan.leaves, **sections)
    known = part.leaf_edits()
    for path, edit in plan.leaf_edits().items():
        if edit.recipe.fill is not None and path in present and path not in known:
            raise TreeError(
                f"{name}: has leaf {path!r}, which other leaves took up, and not all of these; "
                "train it with them, or freeze it"
            )
    return part


def _check_leaf(path: str, x: Any, name: str) -> None:
    if not (is_numeric(x) or isinstance(x, jax.ShapeDtypeStruct)):
        raise TreeError(f"{name}: leaf {path!r} is a {type(x).__name__}; pass arrays")
    if not is_editable(x.dtype if hasattr(x, "dtype") else np.dtype(type(x))):
        raise TreeError(
            f"{name}: leaf {path!r} holds no floating-point numbers of {', '.join(FLOATS)} and "
            "cannot be centered"
        )


def _centered_update(u: Any, p: Any, recipe: Recipe) -> Any:
    """``C(p + u) - p``, by subtracting means from ``u``: no digits are lost in the sum.

    If the plan gives `p` means ``v``, it is ``v + C(p + u) - p``. A group is left alone if the mean
    of its update is zero already, or not finite.
    """
    if recipe.fill is not None:  # what was merged stays as it is
        return jnp.zeros_like(u)
    dtype = jnp.result_type(u)
    wide = widened(dtype) if p is None else widened(dtype, p.dtype)
    # Without the barrier compilers would rather compute the gradient's product twice.
    new = jnp.asarray(jax.lax.optimization_barrier(u), wide)
    means = recipe.means_for(wide)
    for along in recipe.constant:
        mean = group_means(new, along, jnp)
        new = jnp.where(jnp.isfinite(mean), mean, new)
    for along in recipe.sets:
        mean = _means_of_update(new, along)
        rest = 0 if p is None else group_means(_without(p, means, wide), along, jnp)
        new = new - jnp.where((mean != 0) & jnp.isfinite(mean + rest), mean + rest, 0)
    return new.astype(dtype)


def _means_of_update(x: jax.Array, along: AxisSet) -> jax.Array:
    """The group means; those of rows on a TPU's matrix unit.

    A sum along the last axis that is an operation of its own takes a TPU several times as long as
    reading the array.
    """
    if along.entries != (FREE, ALL):
        return group_means(x, along, jnp)
    rows = partial(group_means, along=along, xp=jnp)
    return jax.lax.platform_dependent(x, tpu=_means_by_product, default=rows)


def _means_by_product(x: jax.Array) -> jax.Array:
    """The means of rows; a product has as many columns as the matrix unit has anyway."""
    ones = jnp.ones((x.shape[1], 128), x.dtype)
    return jnp.matmul(x, ones, precision="highest")[:, :1] / x.shape[1]


def _without(p: Any, means: np.ndarray | None, wide: Any) -> Any:
    """A parameter without the means that its plan gives it, all of which should be zero."""
    x = jnp.asarray(p, wide)
    return x if means is None else x - means


def _drifts(fitted: _Fitted) -> dict[str, jax.Array]:
    return {path: _drift(x, fitted.recipes[path]) for path, x in fitted.edited().items()}


def _drift(p: Any, recipe: Recipe) -> jax.Array:
    """The largest finite group mean, as a multiple of what rounding explains."""
    dtype = jnp.result_type(p)
    wide = widened(dtype)
    x = jnp.asarray(p, wide)
    tolerance = float(jnp.finfo(dtype).eps) + 32 * float(jnp.finfo(wide).eps)
    if recipe.fill is not None:
        return (jnp.max(jnp.abs(x - recipe.fill)) / tolerance).astype(jnp.float32)
    largest, rest = [jnp.zeros((), wide)], _without(x, recipe.means_for(wide), wide)
    for along in recipe.sets:
        size = group_means(jnp.abs(x), along, jnp)
        means = jnp.abs(group_means(rest, along, jnp)) / jnp.where(size == 0, 1, size)
        largest.append(jnp.max(jnp.where(jnp.isfinite(means), means, 0)))
    for along in recipe.constant:
        first = first_of_each(x, along)
        varies = (x != first) & jnp.isfinite(x) & jnp.isfinite(first)
        largest.append(jnp.where(varies.any(), jnp.inf, 0).astype(wide))
    return (jnp.max(jnp.stack(largest)) / tolerance).astype(jnp.float32)


def _refuse_uncentered(drifts: dict[str, jax.Array]) -> None:
    """Raise a `TreeError` for a leaf off the constraint, where values are known."""
    for path, drift in drifts.items():
        if not is_tracer(drift) and float(drift) > 1:
            raise TreeError(
                f"params: leaf {path!r} is not centered as the plan centers it; start from "
                f"folded.params or plan.center(params), and {LAST}"
            )
