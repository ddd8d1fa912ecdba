"""Models whose LayerNorm modules are RMSNorm modules, where their mean vanishes."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..errors import Bug, FoldError
from ..options import Options, check_excluded, check_options
from ..placement.place import Placement
from ..placement.planning import make_plan, placement_of
from ..plan.file import LeafSpec
from ..plan.plan import FoldPlan
from ..program.calls import with_keywords
from ..program.tracing import Traced, trace
from ..report.build import make_report
from ..report.report import Report
from ..rewrite.rewritten import Rewritten
from ..trees import check_leaves, leaf_paths, unboxed
from .kind import ModelKind, kind_of
from .linen_modules import is_linen
from .norm_calls import NormCalls


@dataclass(frozen=True)
class RMSModel:
    """A model with RMSNorm modules: the `model`, its edited `params`, and what was done.

    NNX and Equinox models hold their parameters. `norms` are the key paths (of linen modules the
    paths) of what was replaced. The `plan` keeps `params` as they are in training; that of the
    `report` is what was done to those of the caller.

    Example:
        >>> import jax, jax_lnfold
        >>> from flax import nnx
        >>> rngs = nnx.Rngs(0)
        >>> model = nnx.Sequential(nnx.Linear(4, 8, rngs=rngs), nnx.LayerNorm(8, rngs=rngs))
        >>> made = jax_lnfold.with_rms_norms(model, jax.numpy.ones((3, 4)))
        >>> made.norms, made.plan.is_centered(made.params)
        (('layers/1',), True)
    """

    model: Any
    params: Any
    norms: tuple[str, ...]
    plan: FoldPlan
    report: Report


@dataclass(frozen=True)
class _Source:
    """A model as a function of its parameters; `calls` knows the marks of its modules."""

    model: Any
    params: Any
    inputs: tuple[Any, ...]
    function: Callable[..., Any]
    calls: NormCalls
    rebuilt: Callable[[Any, Collection[str], Collection[str]], _Source]


def with_rms_norms(
    model: Any,
    *inputs: Any,
    fold_affine: bool = False,
    add_biases: bool = False,
    exclude: Collection[str] | Callable[[str], bool] = (),
    **keywords: Any,
) -> RMSModel:
    """A model like this one, in which LayerNorm modules are RMSNorm modules.

    For quantisation, rotation of streams, export to other runtimes, or plain reading. Modules of
    exactly the classes `nnx.LayerNorm`, `nn.LayerNorm` and `eqx.nn.LayerNorm` become `nnx.RMSNorm`,
    `nn.RMSNorm` and `eqx.nn.RMSNorm` if all their calls fold by edits of parameters alone; all else
    stays. Flax's RMSNorms add no shift: a subclass of `nnx.RMSNorm` does it, and what stands
    for the module in linen, unless `fold_affine` moves the shift into the layers behind it.

    It is the same function: the new model is analysed again, and its program must have as many
    LayerNorms less. In dtypes of 16 bits a shift is added after one rounding more.

    Args:
        model: an NNX or Equinox model that can be called, or an unbound linen module.
        *inputs: arrays or `jax.ShapeDtypeStruct`; for linen, the variables come first.
        fold_affine: move scales and shifts into the linear layers behind them, see `fold`.
        add_biases: with `fold_affine`, give linear layers (`nnx.Linear`, `nnx.LinearGeneral`,
            `eqx.nn.Linear`) that have none a bias, where it takes up the shift of a LayerNorm.
        exclude: parameters that must stay as they are, see `fold`.
        **keywords: keyword arguments of the call.

    Returns:
        The new model, which owns its parameters; the caller's is as before.

    Raises:
        FoldError: this is no such model, or as for `fold`.

    Example:
        >>> import jax, jax_lnfold
        >>> from flax import nnx
        >>> rngs = nnx.Rngs(0)
        >>> model = nnx.Sequential(nnx.Linear(4, 8, rngs=rngs), nnx.LayerNorm(8, rngs=rngs))
        >>> plain = jax_lnfold.with_rms_norms(model, jax.numpy.ones((3, 4))).model
        >>> isinstance(plain.layers[1], nnx.RMSNorm)
        True
    """
    options = check_options(2.0, (), fold_affine, exclude=exclude)
    options = replace(options, only_leaves=True)  # modules have no place for explicit centerings
    given = with_keywords(inputs, keywords)
    if add_biases:
        model = _with_biases(model, given, options)
    source = _of_linen(model, given) if is_linen(model) else _of_object(model, given)
    check_leaves(source.params, "params")
    check_leaves(source.inputs, "inputs", abstract=True)
    traced, placement = _placed(source, options)
    check_excluded(exclude, traced.leaves)
    plan, norms = make_plan(placement), source.calls.folded(placement)
    made = source.rebuilt(plan.center(source.params), norms.keys(), _without_shift(plan))
    again, left = _placed(made, options)
    if len(left.norms) != len(placement.norms) - sum(norms.values()):
        raise Bug("a module that was replaced still takes a mean")
    report = make_report(
        placement, plan, Rewritten(again.closed), lambda: (traced.closed, again.closed)
    )
    leaves = tuple(LeafSpec(path, np.shape(x)) for path, x in leaf_paths(made.params))
    kept = FoldPlan(leaves, plan.edits, plan.scales)  # what was taken up is free again
    return RMSModel(made.model, made.params, tuple(sorted(norms)), kept, report)


def _placed(source: _Source, options: Options) -> tuple[Traced, Placement]:
    traced = trace(source.function, source.params, source.inputs)
    return traced, placement_of(traced, options)


def _without_shift(plan: FoldPlan) -> frozenset[str]:
    """Modules whose bias was set to zero, which the layers behind have taken up."""
    filled = (path for path, edit in plan.leaf_edits().items() if edit.recipe.fill == 0)
    return frozenset(unboxed(path).removesuffix("/bias") for path in filled)


def _with_biases(model: Any, inputs: tuple[Any, ...], options: Options) -> Any:
    """A copy with the biases that take up shifts."""
    if is_linen(model) or not options.fold_affine:
        raise FoldError(
            "add_biases: is for NNX and Equinox models with fold_affine=True; give the layers of a "
            "linen module use_bias=True, with biases of zeros"
        )
    source = _of_object(model, inputs)
    kind, params, state = _kind(model), source.params, source.inputs[0]

    def with_biases(wanted: Callable[[str], bool]) -> Any:
        made = kind.merge(type(model), params, state)
        kind.add_biases(made, wanted)
        return made

    _, placement = _placed(_of_object(with_biases(lambda path: True), inputs), options)
    shifts = (edit for edit in make_plan(placement).affine if edit.shift is not None)
    biases = (reader.bias for edit in shifts for reader in edit.readers)
    used = {unboxed(bias).removesuffix("/bias") for bias in biases if bias is not None}
    return with_biases(used.__contains__)


def _kind(model: Any) -> ModelKind:
    kind = kind_of(model)
    if kind is None or not callable(model):
        raise FoldError(
            f"model: a {type(model).__name__} is no model of Flax or Equinox that can be called; "
            "pass the module, and for linen its variables before the inputs"
        )
    return kind


def _of_object(model: Any, inputs: tuple[Any, ...]) -> _Source:
    kind = _kind(model)
    params, state = kind.split(model)
    return _source(kind, model, params, (state, *inputs))


def _source(kind: ModelKind, model: Any, params: Any, inputs: tuple[Any, ...]) -> _Source:
    owner, calls = type(model), NormCalls()

    def call(params: Any, state: Any, *inputs: Any, **keywords: Any) -> Any:
        own = kind.merge(owner, params, state)
        kind.mark_norms(own, calls)
        return owner.__call__(own, *inputs, **keywords)

    def rebuilt(params: Any, norms: Collection[str], unshifted: Collection[str]) -> _Source:
        made = kind.merge(owner, params, inputs[0])
        kind.replace_norms(made, norms, unshifted)
        params, state = kind.split(made)
        return _source(kind, made, params, (state, *inputs[1:]))

    return _Source(model, params, inputs, call, calls, rebuilt)


def _of_linen(module: Any, given: tuple[Any, ...]) -> _Source:
    from .linen_norms import WithRMSNorms, marked

    if not given:
        raise FoldError("inputs: of a linen module, pass its variables and then its inputs")
    variables, *inputs = given
    calls = NormCalls()

    def rebuilt(params: Any, norms: Collection[str], unshifted: Collection[str]) -> _Source:
        own = frozenset(path.removeprefix("params/") for path in unshifted)
        made = WithRMSNorms.of(module, frozenset(norms), own & {*norms})
        return _of_linen(made, (params, *inputs))

    return _Source(module, variables, (*inputs,), marked(module, calls), calls, rebuilt)
