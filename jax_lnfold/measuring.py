"""How much of what LayerNorms read is mean: measured on data, before and after a fold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ._compat import consts_of, is_tracer
from .errors import FoldError
from .folded import Folded, placed_again
from .folded_functions import FoldedFunctions
from .measurement.shares import Sums, merged
from .measurement.watched import Watched
from .models.folded_model import MISSING, FoldedModel, taken_apart
from .models.linen_modules import apply_of
from .options import check_options
from .placement.place import Placement
from .placement.planning import placement_of
from .program.calls import with_keywords
from .program.tracing import Traced, signature, trace
from .report.names import names_of
from .report.statistics import Statistics, norm_statistics
from .trees import check_devices, check_leaves, leaf_paths

Totals = dict[int, Sums]


def measure(fn: Any, params: Any = MISSING, *batches: Any, **keywords: Any) -> Statistics:
    """Measure the share of the mean in the second moment of what each LayerNorm reads.

    That is ``E[mean**2] / E[x**2]`` over all tokens (positions of the axes that are not averaged
    over), and of ``mean**2 / mean(x**2)`` the mean, 99th percentile and maximum over tokens.
    A LayerNorm in a `scan` has one number for each iteration; in a `while_loop`, one for all of
    them. Each batch runs once, in one compiled program for all LayerNorms; arrays that are spread
    over devices stay so (inside of a `shard_map` the tokens of every device count). Sums are kept
    in float32, or float64 where activations are, and in float64 between batches. Memory does not
    grow with the number of batches.

    Args:
        fn: a function of ``(params, *inputs)``, or what `fold` returned for one. A linen module
            stands for its `apply`; an NNX or Equinox model has its parameters in itself:
            ``measure(model, *batches)``.
        params: its parameters. For a fold they are what was folded, or edited already: the
            function is measured on them, and its folded program on ``folded.plan.center(params)``.
        *batches: each of them a tuple of inputs, or a single input (everything but plain tuples),
            of the same structure, shapes and dtypes.
        **keywords: keyword arguments of the function, for all batches.

    Returns:
        One entry for each LayerNorm, in program order; `print` shows a table.
        ``folded.report.with_statistics(...)`` puts the numbers next to what was folded.

    Raises:
        FoldError: there is no batch, a batch differs from the first one in other things than its
            numbers, `fn` is no function of these arguments, or the arguments are being traced.
        TreeError: `params` or a batch holds other leaves than arrays.
        PlanMismatchError: the function notices the edits of a fold for inputs of these shapes.

    Example:
        >>> import jax, jax_lnfold
        >>> def model(params, x):
        ...     return jax.nn.standardize(x @ params["w"])  # a LayerNorm behind a linear layer
        >>> params = {"w": jax.random.normal(jax.random.key(0), (4, 8))}
        >>> x = jax.random.normal(jax.random.key(1), (3, 4))
        >>> folded = jax_lnfold.fold(model, params, x)
        >>> (norm,) = jax_lnfold.measure(folded, params, x, x + 1).norms  # two batches
        >>> bool(norm.before.share > 0.001), bool(norm.after.share < 1e-6)
        (True, True)
    """
    function, params, given = _function(fn, params, batches)
    inputs = [with_keywords(batch, keywords) for batch in given]
    check_batches(params, inputs)
    folded = fn if isinstance(fn, Folded) else None
    if folded is None:
        traced = trace(function, params, inputs[0])
        placement = placement_of(traced, check_options(2.0, (), False))
    else:
        params = folded.plan.extend(params)
        traced, placement = placed_again(folded, params, inputs[0])
    sides = [(Watched(traced.closed, placement, False), params)]
    if folded is not None:
        sides.append((Watched(traced.closed, placement, True), folded.plan.center(params)))
    totals = _run(traced, sides, inputs) if placement.norms else [{}]
    return _statistics(placement, totals, len(inputs))


def _statistics(placement: Placement, totals: Sequence[Totals], n_batches: int) -> Statistics:
    before, after = totals[0], totals[-1] if len(totals) > 1 else {}
    return Statistics(
        tuple(
            norm_statistics(name.text, name.title, before.get(i), after.get(i))
            for i, name in enumerate(names_of(placement))
        ),
        n_batches,
    )


def _function(fn: Any, params: Any, batches: Sequence[Any]) -> tuple[Any, Any, list[Any]]:
    """The function that is measured, its parameters, and the inputs of each batch."""
    if isinstance(fn, (FoldedFunctions, FoldedModel, Mapping)):
        raise FoldError(
            f"fn: a {type(fn).__name__} is no single function; pass one of the functions, or the "
            "model that was folded, and for the numbers after a fold, fold(function, params, x)"
        )
    if isinstance(fn, Folded):
        return fn, params, [inputs_of(batch) for batch in batches]
    function = apply_of(fn)
    model = taken_apart(function, params, tuple(batches))
    if model is not None:
        state, *batches = model.inputs
        given = [(state, *inputs_of(batch)) for batch in batches]
        return model.functions, model.params, given
    if not callable(function):
        raise FoldError(
            f"fn: a {type(fn).__name__} is not callable; pass a function of (params, *inputs), "
            "such as model.apply, or what fold returned"
        )
    return function, params, [inputs_of(batch) for batch in batches]


def inputs_of(batch: Any) -> tuple[Any, ...]:
    """The inputs of a batch; named tuples are an input like any other tree."""
    return batch if type(batch) is tuple else (batch,)


def check_batches(params: Any, inputs: Sequence[tuple[Any, ...]], name: str = "measure") -> None:
    """There is at least one batch, and all are like the first one."""
    if params is MISSING:
        raise FoldError(f"params: missing; pass {name}(fn, params, *batches)")
    if not inputs:
        raise FoldError(
            f"batches: there is none, so nothing can be measured; pass {name}(fn, params, *batches)"
        )
    check_leaves(params, "params")
    first = signature((), inputs[0])
    for number, batch in enumerate(inputs):
        batch_name = f"batches[{number}]"
        check_leaves(batch, batch_name)
        if any(map(is_tracer, jax.tree.leaves((params, batch)))):
            raise FoldError(
                f"{batch_name}: being traced; call {name} outside of jit, grad and vmap"
            )
        if signature((), batch) != first:
            raise FoldError(
                f"{batch_name}: {_difference(batch, inputs[0])}; pass batches of one structure and "
                "shape, and leave out a last one that is smaller"
            )
        check_devices(params, batch)


def _difference(batch: tuple[Any, ...], first: tuple[Any, ...]) -> str:
    """In what a batch differs from the first one."""
    pairs = zip(leaf_paths(batch), leaf_paths(first), strict=False)
    for (path, x), (wanted, y) in pairs:
        if path != wanted:
            break
        own, other = (f"{np.shape(a)} {jax.typeof(a).dtype}" for a in (x, y))
        if own != other:
            return f"input {path!r} is {own}, and {other} in the first batch"
    return "its inputs have another structure or type than those of the first batch"


def _run(
    traced: Traced, sides: Sequence[tuple[Watched, Any]], inputs: Sequence[tuple[Any, ...]]
) -> list[Totals]:
    """The sums of all batches, for each program with its parameters."""
    watched = [program for program, _ in sides]

    def run(consts: Any, each: list[Any], given: list[Any]) -> list[Totals]:
        return [w(consts, [*own, *given]) for w, own in zip(watched, each, strict=True)]

    # No outputs of the function are asked for: what only they need is not computed.
    parameters = [jax.tree.leaves(params) for _, params in sides]
    program = jax.jit(run, out_shardings=_everywhere((parameters, inputs[0])))
    totals: list[Totals] | None = None
    for batch in inputs:
        sums = program(consts_of(traced.closed), parameters, jax.tree.leaves(batch))
        new = jax.tree.map(_wide, jax.device_get(sums))
        totals = new if totals is None else jax.tree.map(_added, totals, new, is_leaf=_is_sums)
    assert totals is not None
    return totals


def _everywhere(tree: Any) -> Any:
    """Whole on all devices of the mesh that arrays are spread over: each process reads its own."""
    for x in jax.tree.leaves(tree):
        sharding = getattr(x, "sharding", None)
        if isinstance(sharding, NamedSharding) and sharding.num_devices > 1:
            return NamedSharding(sharding.mesh, PartitionSpec())
    return None


def _wide(x: np.ndarray) -> np.ndarray:
    return x.astype(np.int64 if np.issubdtype(x.dtype, np.integer) else np.float64)


def _added(one: Sums, other: Sums) -> Sums:
    with np.errstate(invalid="ignore"):  # of NaN, which stay
        return merged(Sums(*map(np.stack, zip(one, other, strict=True))), np)


def _is_sums(x: Any) -> bool:
    return isinstance(x, Sums)
