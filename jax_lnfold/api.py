"""The public functions: fold a model, or look at what folding would do."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple, overload

from .approximation import approximated
from .arguments import (
    check_assume,
    check_follow,
    check_given,
    check_no_means,
    check_no_weights,
    check_untie,
    followed,
    inputs_of_each,
    inputs_of_one,
    with_values,
)
from .calibration import Calibration, check_calibration
from .errors import FoldError
from .folded import Folded, analysed, planned
from .folded_functions import (
    FoldedFunctions,
    are_functions,
    fold_together,
    trace_together,
)
from .kernels.check import check_declared
from .models.folded_model import FoldedModel, taken_apart
from .models.kind import EquinoxModel, LinenModule, NnxModel
from .models.linen_modules import apply_of
from .options import Options, check_excluded, check_options
from .placement.place import Placement
from .placement.planning import make_plan
from .plan.plan import FoldPlan, check_donate
from .program.calls import with_keywords
from .program.tracing import Traced, trace
from .report.approximation import Approximation
from .report.build import make_report
from .report.report import Report
from .rewrite.rewritten import rewritten
from .trees import MISSING, check_leaves


@overload
def fold(
    apply_fn: LinenModule, params: Any, *example_inputs: Any, **options_and_keywords: Any
) -> Folded: ...


@overload
def fold(
    apply_fn: NnxModel | EquinoxModel, *example_inputs: Any, **options_and_keywords: Any
) -> FoldedModel: ...


@overload
def fold(
    apply_fn: Callable[..., Any],
    params: Any,
    *example_inputs: Any,
    donate: bool = ...,
    explicit_cost: float = ...,
    approximate: Collection[str] = ...,
    fold_affine: bool = ...,
    reduce_means: bool = ...,
    defer_scale: bool = ...,
    deferred_cost: float | None = ...,
    matrix_unit: bool = ...,
    respell: bool | str = ...,
    optimize: str | None = ...,
    plan: FoldPlan | None = ...,
    center: bool = ...,
    exclude: Collection[str] | Callable[[str], bool] = ...,
    untie: bool = ...,
    assume_values: bool = ...,
    weights: Mapping[str, float] | None = ...,
    calibrate: Iterable[Any] | None = ...,
    budget: float | None = ...,
    logits: Callable[[Any], Any] | None = ...,
    **keywords: Any,
) -> Folded: ...


@overload
def fold(
    apply_fn: Mapping[str, Callable[..., Any]],
    params: Any,
    *example_inputs: Mapping[str, Any],
    donate: bool = ...,
    explicit_cost: float = ...,
    approximate: Collection[str] = ...,
    fold_affine: bool = ...,
    reduce_means: bool = ...,
    defer_scale: bool = ...,
    deferred_cost: float | None = ...,
    matrix_unit: bool = ...,
    respell: bool | str = ...,
    optimize: str | None = ...,
    plan: FoldPlan | None = ...,
    center: bool = ...,
    exclude: Collection[str] | Callable[[str], bool] = ...,
    untie: bool = ...,
    assume_values: bool = ...,
    weights: Mapping[str, float] | None = ...,
    **keywords: Any,
) -> FoldedFunctions: ...


def fold(
    apply_fn: Any,
    params: Any = MISSING,
    *example_inputs: Any,
    donate: bool = False,
    explicit_cost: float = 2.0,
    approximate: Collection[str] = (),
    fold_affine: bool = False,
    reduce_means: bool = False,
    defer_scale: bool = False,
    deferred_cost: float | None = None,
    matrix_unit: bool = False,
    respell: bool | str = False,
    optimize: str | None = None,
    plan: FoldPlan | None = None,
    center: bool = False,
    exclude: Collection[str] | Callable[[str], bool] = (),
    untie: bool = False,
    assume_values: bool = False,
    weights: Mapping[str, float] | None = None,
    calibrate: Iterable[Any] | None = None,
    budget: float | None = None,
    logits: Callable[[Any], Any] | None = None,
    **keywords: Any,
) -> Folded | FoldedFunctions | FoldedModel:
    """Turn the LayerNorms of a model into RMSNorms wherever that is exact.

    Args:
        apply_fn: any traceable function ``apply_fn(params, *inputs, **keywords)``. Or several
            functions of one tree, by name; the example inputs are then one mapping from the names
            to tuples of inputs.
        params: any pytree of arrays.
        *example_inputs: arrays or `jax.ShapeDtypeStruct`; the folded function takes other shapes,
            too. Without them the analysis waits for the first call ``folded(*inputs)``.
        donate: reuse the memory of edited leaves: JAX arrays in `params` are then deleted, NumPy
            arrays that own their memory edited in place (see `FoldPlan.center`). Everything is
            analysed and checked before the first of them goes. Only if an edit itself fails or is
            interrupted (no memory, Ctrl-C), those edited before it are lost.
        explicit_cost: cost of an explicit centering per element, where a LayerNorm's own
            centering costs 1 (theory, section 3).
        approximate: with ``{"dropout"}``, elementwise dropout is taken for the identity: in a
            trace with dropout the folded program is then an approximation (the mean that dropping
            leaves is not removed), which the report says and measures. Without dropout the same
            parameters are exact. With ``{"mean"}``, LayerNorms that keep a mean do without it, as
            many as the `budget` allows: see `calibrate`. The original function of the edited
            parameters stays exact. Everything else is exact always.
        fold_affine: also move scales and shifts, as of LayerNorms, into the linear layers that
            alone read what they scale (shifts only where these have biases), and those of keys
            into the queries that they are multiplied with (theory, section 11). The scales become
            one (or zero, where the program adds 1 to them), the shifts zero, and both leave the
            program: gradients with respect to them are zero (theory, section 6). The report says
            why others stay.
        reduce_means: also center what feeds a LayerNorm that keeps its mean, as far as no output
            notices that: the last layer of a branch in post-LN, say. It saves nothing, and changes
            no result; as a rule less of a mean remains, which `measure` tells. Of one function,
            the mean of a shift that is added for every token alike goes, too: a bias of the branch
            gets that, with the other sign (if `params` have values). A LayerNorm that keeps its
            mean computes it as before.
        defer_scale: let matrix products read what a norm only scales, and scale their results
            instead, ``(x * r) W = (x W) * r``, where that pays: in practice behind norms whose own
            scale and shift `fold_affine` has taken up. Results are scaled in the accumulator's
            dtype, float32 or wider; what could leave the range of float16 is not deferred.
        deferred_cost: cost of scaling one element of a result, where one element of the scaled
            copy costs 1 to write and read again: a scale is deferred if its results together cost
            less than its copy. 0 defers all scales; None is a value for the backend.
        matrix_unit: compute statistics of norms as products with ones, where they are no epilogue
            of the product that writes what they are of: norms over heads, the first norm of a
            model, explicit centerings. For TPUs, whose compiler makes operations of their own of
            such sums. Squares are split into parts of bfloat16 that add up to what they are
            (theory, section 13); sums are in float32, and derivatives what they were. float64 is
            left alone.
        respell: write LayerNorms that keep their mean as the backend likes best: on TPUs
            two passes become one (``"one_pass"``), where the input is stored in bfloat16 or float16
            and so are the results; on GPUs one becomes two (``"two_pass"``); on CPUs nothing.
            A string says which, True is what suits the platform of `optimize`, or the backend at
            hand. No less exact, in no smaller range (theory, section 14); derivatives stay.
        optimize: `fold_affine`, `defer_scale`, `matrix_unit` and `respell` as they measured best on
            ``"tpu"``, ``"gpu"`` or ``"cpu"``, whatever machine traces the function (for compilation
            ahead of time), or with ``"auto"`` on the backend at hand (`jax.default_backend`).
        plan: follow this one, of another function, process or shape, instead of looking for the
            best. `params` are then not edited, but must be what ``plan.center`` returns; their
            leaves may be `jax.ShapeDtypeStruct`, so that programs are compiled before there are
            weights. A function that notices an edit of the plan is refused.
        center: with a `plan`, edit `params` as it says.
        exclude: key paths of parameters that must stay as they are (a shared table, a frozen base),
            or a function that says so of a key path. The best among the rest is found; the report
            says what would be without.
        untie: let lookups read a centered copy of a table that something else reads, too (a tied
            head), where that saves an explicit centering or lets more LayerNorms fold. `params` of
            the result is then an `Untied` tree: the original's part of it, which the original
            function takes, and the copies. The report says which leaves and how many bytes. Not
            for models that hold their parameters.
        assume_values: also rely on what the values of parameters are: numbers that are all equal
            along an axis (exactly: the scale of a LayerNorm in post-LN, ones after initialisation),
            or all zero, or that have a mean (its shift), which a bias behind it takes out. The plan
            says which leaves must stay so, as few as the LayerNorms need that would not fold
            otherwise (`FoldPlan.assumed`): constant, or of this mean. Trees in which they are
            otherwise are refused, and `center_updates` keeps them so. Nothing is assumed of leaves
            without values, nor of those in `exclude`.
        weights: with several functions, how often each of them runs, by name; by default alike.
            The report counts them. The plan does not depend on them: an edit costs no function
            anything, and what is paid for, each function pays for itself.
        calibrate: with ``approximate={"mean"}``, two or more batches of data, each of them a tuple
            of inputs, or a single input, of one structure, shape and dtype. What feeds LayerNorms
            that keep a mean is centered and fitted to them (`regress`), so that little of a mean is
            left, and linear layers behind are made blind to it where that is exact. Then means are
            left out, cheapest damage first, as long as the error of the outputs is within the
            budget. Every fifth batch, and at least the last one, is held out of the fit, and all
            errors are measured on those. Not needed with a `plan`, nor with an infinite budget:
            parameters are then centered, all means left out that can be, and nothing is fitted or
            measured, as before training from scratch.
        budget: the largest error of the outputs, relative: ``|y - y'| / |y|`` over all numbers of
            an output, and of several outputs the largest. None is what a cast of the weights to
            bfloat16 does, measured on the same data; with 0, no mean is left out.
        logits: a function that picks logits (classes along the last axis) from what `apply_fn`
            returns, of which the report then says KL divergence and agreement of the argmax, too.
        **keywords: keyword arguments of `apply_fn`, as far as they are no options: arrays are
            inputs like all others, what else there is (``train=False``) is bound in this trace.

    Returns:
        The folded function and parameters, with a plan and a report. For a mapping of functions, a
        mapping with the same names: one plan, the optimum for all, one tree that all of them read.

    Raises:
        FoldError: `apply_fn` is not callable or traceable, `params` or the inputs hold other
            leaves than arrays, or an option has no such value. Nothing has been changed then.

    Example:
        >>> import jax, jax_lnfold
        >>> def model(params, x):
        ...     return jax.nn.standardize(x @ params["w"])  # a LayerNorm behind a linear layer
        >>> params = {"w": jax.random.normal(jax.random.key(0), (4, 8))}
        >>> x = jax.random.normal(jax.random.key(1), (3, 4))
        >>> folded = jax_lnfold.fold(model, params, x)
        >>> folded.report.n_folded
        1
        >>> y = jax.jit(folded.apply)(folded.params, x)
        >>> bool(abs(y - model(params, x)).max() < 1e-5)
        True
    """
    options = check_options(
        explicit_cost,
        approximate,
        fold_affine,
        defer_scale,
        deferred_cost,
        optimize,
        exclude,
        reduce_means,
        untie,
        matrix_unit,
        assume_values,
        respell,
    )
    check_donate(donate)
    check_follow(plan, center, options)
    if plan is not None and options.excludes is not None:
        raise FoldError("exclude: a plan is followed as it is; leave one of both out")
    calibration = check_calibration(options.drop_means, calibrate, budget, logits)
    wanted = _Wanted(options, bool(donate), plan, bool(center), exclude, weights, calibration)
    apply_fn, model = apply_of(apply_fn), taken_apart(apply_fn, params, example_inputs)
    check_untie(options, model, plan)
    check_assume(options, plan)
    if model is not None:
        inputs = model.inputs
        if calibration is not None and model.methods is None:
            of_calls = calibration.of_calls((model.state,), lambda outputs: outputs[0])
            wanted = wanted._replace(calibration=of_calls)
            inputs = inputs[1:] and inputs  # without inputs, those of a batch
        return model.folded(_fold(model.functions, model.params, inputs, keywords, wanted))
    return _fold(apply_fn, params, example_inputs, keywords, wanted)


class _Wanted(NamedTuple):
    """What a caller of `fold` asks for, besides functions and trees."""

    options: Options
    donate: bool
    plan: FoldPlan | None
    center: bool
    exclude: Any
    weights: Any
    calibration: Calibration | None


def _fold(
    apply_fn: Any,
    params: Any,
    example_inputs: tuple[Any, ...],
    keywords: Mapping[str, Any],
    wanted: _Wanted,
) -> Folded | FoldedFunctions:
    options, donate, plan, center, exclude, weights, calibration = wanted
    check_given(apply_fn, params, example_inputs)
    found = check_leaves(params, "params", abstract=plan is not None and not center)
    check_excluded(exclude, (path for path, _ in found))
    options = with_values(options, found)
    params = params if plan is None else followed(plan, params, center)
    if isinstance(apply_fn, Mapping):
        inputs = inputs_of_each(apply_fn, example_inputs, keywords, "example_inputs")
        check_no_means(options)
        return fold_together(apply_fn, params, inputs, donate, options, weights, plan, center)
    check_no_weights(weights)
    if calibration is not None and calibration.batches:
        example_inputs = example_inputs or calibration.batches[0]
    example_inputs = inputs_of_one(example_inputs, keywords)
    told: Approximation | None = None
    if calibration is not None and plan is None:
        batches = [with_keywords(batch, keywords) for batch in calibration.batches]
        calibration = calibration._replace(batches=tuple(batches))
        plan, told = approximated(apply_fn, params, example_inputs, options, calibration)
        center = True
    folded = Folded(apply_fn, params, donate, options, plan, plan is None or center, told)
    if example_inputs:
        folded._analyse(example_inputs)
    return folded


def analyze(
    apply_fn: Any,
    params: Any = MISSING,
    *inputs: Any,
    explicit_cost: float = 2.0,
    approximate: Collection[str] = (),
    fold_affine: bool = False,
    reduce_means: bool = False,
    defer_scale: bool = False,
    deferred_cost: float | None = None,
    matrix_unit: bool = False,
    respell: bool | str = False,
    optimize: str | None = None,
    exclude: Collection[str] | Callable[[str], bool] = (),
    untie: bool = False,
    assume_values: bool = False,
    weights: Mapping[str, float] | None = None,
    **keywords: Any,
) -> Report:
    """Report what `fold` would do, without editing anything.

    Args:
        apply_fn: as for `fold`, and so are all options.
        params: any pytree of arrays or `jax.ShapeDtypeStruct`: no weights are needed.
        *inputs: arrays or `jax.ShapeDtypeStruct`.
        explicit_cost: see `fold`.
        approximate: see `fold`.
        fold_affine: see `fold`.
        reduce_means: see `fold`.
        defer_scale: see `fold`.
        deferred_cost: see `fold`.
        matrix_unit: see `fold`.
        respell: see `fold`.
        optimize: see `fold`.
        exclude: see `fold`.
        untie: see `fold`.
        assume_values: see `fold`.
        weights: see `fold`.
        **keywords: keyword arguments of `apply_fn`.

    Returns:
        The report of that fold; `print` shows it as a table.

    Raises:
        FoldError: as for `fold`, or the inputs that `apply_fn` needs are missing.

    Example:
        >>> import jax, jax_lnfold
        >>> def model(params, x):
        ...     return jax.nn.standardize(jax.nn.relu(x @ params["w"]))
        >>> params = {"w": jax.ShapeDtypeStruct((4, 8), "float32")}
        >>> report = jax_lnfold.analyze(model, params, jax.ShapeDtypeStruct((3, 4), "float32"))
        >>> report.norms[0].folded, report.norms[0].advice
        (False, 'end with a linear layer after this nonlinearity')
    """
    options = check_options(
        explicit_cost,
        approximate,
        fold_affine,
        defer_scale,
        deferred_cost,
        optimize,
        exclude,
        reduce_means,
        untie,
        matrix_unit,
        assume_values,
        respell,
    )
    traced, placement, plan = _analysis(
        apply_fn, params, inputs, keywords, options, weights, exclude
    )
    made = rewritten(traced.closed, placement, options)
    programs = (lambda: (traced.closed, made.program)) if traced.reusable else None
    return make_report(placement, plan, made, programs)


def plan_fold(
    apply_fn: Any,
    params: Any = MISSING,
    *inputs: Any,
    explicit_cost: float = 2.0,
    approximate: Collection[str] = (),
    fold_affine: bool = False,
    reduce_means: bool = False,
    optimize: str | None = None,
    exclude: Collection[str] | Callable[[str], bool] = (),
    untie: bool = False,
    assume_values: bool = False,
    weights: Mapping[str, float] | None = None,
    **keywords: Any,
) -> FoldPlan:
    """The plan that `fold` would follow, from shapes alone as in `analyze`.

    Args:
        apply_fn: as for `fold`, and so are all options.
        params: any pytree of arrays or `jax.ShapeDtypeStruct`.
        *inputs: arrays or `jax.ShapeDtypeStruct`.
        explicit_cost: see `fold`.
        approximate: see `fold`.
        fold_affine: see `fold`.
        reduce_means: see `fold`.
        optimize: see `fold`.
        exclude: see `fold`.
        untie: see `fold`.
        assume_values: see `fold`.
        weights: see `fold`.
        **keywords: keyword arguments of `apply_fn`.

    Returns:
        The plan, to be written to a file, followed by ``fold(..., plan=plan)`` or used in training.

    Raises:
        FoldError: as for `fold`, or the inputs that `apply_fn` needs are missing.

    Example:
        >>> import jax, jax_lnfold
        >>> def model(params, x):
        ...     return jax.nn.standardize(x @ params["w"])  # a LayerNorm behind a linear layer
        >>> params = {"w": jax.ShapeDtypeStruct((4, 8), "float32")}
        >>> plan = jax_lnfold.plan_fold(model, params, jax.ShapeDtypeStruct((3, 4), "float32"))
        >>> [edit.key_path for edit in plan.edits]
        ['w']
    """
    options = check_options(
        explicit_cost,
        approximate,
        fold_affine,
        optimize=optimize,
        exclude=exclude,
        reduce_means=reduce_means,
        untie=untie,
        assume_values=assume_values,
    )
    return _analysis(apply_fn, params, inputs, keywords, options, weights, exclude)[2]


def _analysis(
    apply_fn: Any,
    params: Any,
    inputs: tuple[Any, ...],
    keywords: Mapping[str, Any],
    options: Options,
    weights: Any,
    exclude: Any,
) -> tuple[Traced, Placement, FoldPlan]:
    check_no_means(options)
    apply_fn, model = apply_of(apply_fn), taken_apart(apply_fn, params, inputs)
    check_untie(options, model, None)
    check_assume(options, None)
    if model is not None:
        apply_fn, params, inputs = model.functions, model.params, model.inputs
    check_given(apply_fn, params, inputs)
    options = with_values(options, check_leaves(params, "params", abstract=True))
    if are_functions(apply_fn):
        each = inputs_of_each(apply_fn, inputs, keywords, "inputs")
        traced = trace_together(apply_fn, params, each, weights)
    else:
        check_no_weights(weights)
        inputs = with_keywords(inputs, keywords)
        check_leaves(inputs, "inputs", abstract=True)
        traced = trace(apply_fn, params, inputs)
    check_excluded(exclude, traced.leaves)
    traced, placement = analysed(traced, options)
    check_declared(placement.graph)
    if are_functions(apply_fn):
        return traced, placement, make_plan(placement)
    return traced, placement, planned(placement, options, params)
