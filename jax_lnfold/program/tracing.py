"""Tracing: from a function, a tree and inputs to one jaxpr, with checks on what comes in."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from .._compat import ClosedJaxpr, consts_of, is_tracer, trace_settings, varying_axes
from ..errors import TraceError, TreeError
from ..trees import first_line, is_numeric, leaf_paths, rebuilt
from ..untied import Untied, extended_paths
from .calls import call
from .device_sums import taken_apart
from .flatten import flatten
from .graph import Graph, OutputPath
from .untying import with_copies


@dataclass(frozen=True)
class Traced:
    """The jaxpr of a function of (parameter leaves, input leaves), and the tree it returns.

    `leaves` are the key paths of the parameters, `output_paths` the keys of the outputs. If it is
    made of calls of several functions, `runs` says how often each of these runs.
    """

    closed: ClosedJaxpr
    out_tree: Any
    leaves: tuple[str, ...]
    output_paths: tuple[OutputPath, ...]
    runs: tuple[int, ...] = ()

    def graph(self, see_through_dropout: bool = False) -> Graph:
        """The flat graph of the program."""
        return flatten(self.closed, self.leaves, see_through_dropout, self.output_paths, self.runs)

    def untied(self, copied: Collection[str]) -> Traced:
        """The program of a tree with copies of these leaves, in which lookups read the copies."""
        positions = [self.leaves.index(path) for path in sorted(copied)]
        closed = with_copies(self.closed, positions, len(self.leaves))
        return replace(self, closed=closed, leaves=extended_paths(self.leaves, copied))

    @property
    def reusable(self) -> bool:
        """Whether the jaxpr may outlive the trace around it: it closes over no tracer."""
        return not any(is_tracer(c) for c in consts_of(self.closed))


def trace(apply_fn: Callable[..., Any], params: Any, inputs: tuple[Any, ...]) -> Traced:
    """Trace ``apply_fn(params, *inputs)``.

    Raises:
        TraceError: the function fails, needs the value of something it is given, or returns
            other things than arrays.
        TreeError: a tree cannot be put together again from its leaves.
    """
    leaves, params_tree = jax.tree.flatten(params)
    flat_inputs, inputs_tree = jax.tree.flatten(inputs)

    def flat(leaves: list[Any], flat_inputs: list[Any]) -> Any:
        given = rebuilt(inputs_tree, flat_inputs, "inputs")
        result = call(apply_fn, rebuilt(params_tree, leaves, "params"), given)
        if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(result)):
            raise TypeError("it returns a ShapeDtypeStruct")
        return result

    try:
        closed, shapes = jax.make_jaxpr(flat, return_shape=True)(leaves, flat_inputs)
    except TreeError:
        raise
    except Exception as error:
        raise TraceError(
            f"apply_fn: cannot be traced ({type(error).__name__}: {first_line(error)}); it must "
            "run under jax.jit as apply_fn(params, *inputs) with these inputs, and return arrays"
            f"{_hint(error, flat_inputs)}"
        ) from error
    outputs, out_tree = jax.tree_util.tree_flatten_with_path(shapes)
    return Traced(
        taken_apart(closed),
        out_tree,
        tuple(path for path, _ in leaf_paths(params)),
        tuple(tuple(jax.tree_util.keystr((key,)) for key in path) for path, _ in outputs),
    )


_NEED_NUMBERS = jax.errors.ConcretizationTypeError, jax.errors.TracerIntegerConversionError


def _hint(error: Exception, inputs: list[Any]) -> str:
    """What else to say of a function that needs the numbers of what it is given."""
    if not isinstance(error, _NEED_NUMBERS):
        return ""
    if any(isinstance(x, bool | int) for x in inputs):
        return (
            ". Bind Python flags and other static arguments first, as in "
            "functools.partial(model.apply, train=False)"
        )
    return ". Where numbers decide what is computed, use jnp.where, jax.lax.cond or a jax loop"


def trace_untied(apply_fn: Callable[..., Any], params: Any, inputs: tuple[Any, ...]) -> Traced:
    """Trace ``apply_fn(params.params, *inputs)`` with lookups that read the copies.

    Raises:
        TraceError: as for `trace`.
        TreeError: as for `trace`, or `params` is no `Untied`, or its copies do not fit.
    """
    if not isinstance(params, Untied):
        raise TreeError(
            f"params: a {type(params).__name__} is no tree with copies; pass plan.extend(params), "
            "or put it together with jax_lnfold.Untied(params, copies)"
        )
    params.check()
    return trace(apply_fn, params.params, inputs).untied(params.copies)


def signature(params: Any, inputs: tuple[Any, ...]) -> Hashable:
    """Two calls with the same signature have the same jaxpr."""
    leaves, tree = jax.tree.flatten((params, inputs))
    return tree, tuple(map(_type_of, leaves)), trace_settings()


def _type_of(x: Any) -> Hashable:
    if isinstance(x, jax.ShapeDtypeStruct):
        return tuple(x.shape), np.dtype(x.dtype), bool(getattr(x, "weak_type", False)), None
    if not is_numeric(x):
        return type(x)  # no program is known for it: the checks will say what is wrong
    aval = jax.typeof(x)
    sharding = getattr(aval, "sharding", None)
    explicit = sharding if sharding is not None and not sharding.mesh.empty else None
    return aval.shape, aval.dtype, aval.weak_type, explicit, varying_axes(aval)
