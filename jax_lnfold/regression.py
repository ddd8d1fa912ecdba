"""The public function that fits means of leaves to data."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from .batches import check_batches
from .errors import FoldError
from .fitting import Fit, Regression
from .models.folded_model import on_batches
from .models.linen_modules import apply_of
from .options import check_excluded, check_options
from .placement.free_means import free_means
from .placement.planning import make_plan, placement_of
from .program.tracing import trace
from .trees import MISSING


def regress(
    apply_fn: Any,
    params: Any = MISSING,
    *batches: Any,
    explicit_cost: float = 2.0,
    fold_affine: bool = False,
    exclude: Collection[str] | Callable[[str], bool] = (),
    **keywords: Any,
) -> Regression:
    """A plan that makes the means of LayerNorms small which no edit of parameters removes.

    It is that of ``plan_fold(..., reduce_means=True)``, but leaves that feed only LayerNorms which
    keep their mean get means, in place of zero, that cancel what remains: a linear layer predicts
    it from its own input. No output notices: both functions compute what they did before. The fit
    is a ridge regression. Its ridge is the one with which fits to three quarters of the batches are
    best for the rest: tokens of one batch are alike, so pass several. (Of one batch, or more than
    1024 means, generalised cross validation chooses it.) Every fifth token is held out, and
    LayerNorms for which it does not help there stay centered. So do those in a `while_loop` or a
    `shard_map`, and those that share leaves with more than 4096 means. Of a batch with many tokens,
    every second, third ... is used. One pass over the batches, each of which is differentiated in
    as many directions as there are means; as many at a time as there are features, where each of
    these depends on its own one. Sums are kept in float64.

    Args:
        apply_fn: a function of ``(params, *inputs)``; a linen module stands for its `apply`, and an
            NNX or Equinox model has its parameters in itself: ``regress(model, *batches)``.
        params: its parameters, arrays with values.
        *batches: each of them a tuple of inputs, or a single input, of the same structure, shapes
            and dtypes. Together they should have several times as many tokens as there are means.
        explicit_cost: as for `fold`, with which the plan will be used.
        fold_affine: as for `fold`.
        exclude: as for `fold`.
        **keywords: keyword arguments of `apply_fn`, for all batches.

    Returns:
        The plan, for ``fold(apply_fn, params, *inputs, plan=found.plan, center=True)`` with the
        same keywords, and the shares of the mean before and after the fit.

    Raises:
        FoldError: there is no batch, a batch differs from the first one in other things than its
            numbers, `apply_fn` is no function of these arguments, or the arguments are being
            traced.
        TreeError: `params` or a batch holds other leaves than arrays.

    Example:
        >>> import jax, jax_lnfold
        >>> def model(params, x):  # a branch, and a stream whose mean no parameter removes
        ...     h = jax.nn.relu(x @ params["v"])
        ...     return jax.nn.standardize(jax.nn.relu(x) + h @ params["w"])
        >>> v, w = jax.random.normal(jax.random.key(0), (2, 8, 8))
        >>> x = jax.random.normal(jax.random.key(1), (200, 8))
        >>> found = jax_lnfold.regress(model, {"v": v, "w": w}, x)
        >>> found.norms[0].regressed < found.norms[0].centered
        True
        >>> folded = jax_lnfold.fold(model, {"v": v, "w": w}, x, plan=found.plan, center=True)
    """
    function = apply_of(apply_fn)
    if isinstance(function, Mapping) or not callable(function):
        raise FoldError(
            f"apply_fn: a {type(function).__name__} is no single function; pass a function of "
            "(params, *inputs), such as model.apply"
        )
    function, params, inputs = on_batches(function, params, batches, keywords)
    check_batches(params, inputs, "regress")
    traced = trace(function, params, inputs[0])
    check_excluded(exclude, traced.leaves)
    placements = [
        placement_of(
            traced,
            check_options(
                explicit_cost, (), fold_affine, exclude=exclude, reduce_means=reduce_means
            ),
        )
        for reduce_means in (True, False)
    ]
    plan, free = make_plan(placements[0]), free_means(*placements)
    return Fit(traced, placements[0], free, plan.center(params), inputs[0]).run(plan, inputs)
