"""Tracing: from a function, a tree and inputs to one jaxpr, with checks on what comes in."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from ._compat import ClosedJaxpr, consts_of, is_tracer, trace_settings, varying_axes
from .errors import TraceError, TreeError
from .flatten import flatten
from .graph import Graph
from .plan import leaf_paths


@dataclass(frozen=True)
class Traced:
    """The jaxpr of a function of (parameter leaves, input leaves), and the tree it returns."""

    closed: ClosedJaxpr
    out_tree: Any
    n_leaves: int

    def graph(self) -> Graph:
        """The flat graph of the program."""
        return flatten(self.closed, self.n_leaves)

    @property
    def reusable(self) -> bool:
        """Whether the jaxpr may outlive the trace around it: it closes over no tracer."""
        return not any(is_tracer(c) for c in consts_of(self.closed))


def trace(apply_fn: Callable[..., Any], params: Any, inputs: tuple[Any, ...]) -> Traced:
    """Trace ``apply_fn(params, *inputs)``.

    Raises:
        TraceError: the function fails, or needs the value of something it is given.
    """
    leaves, params_tree = jax.tree.flatten(params)
    flat_inputs, inputs_tree = jax.tree.flatten(inputs)

    def flat(leaves: list[Any], flat_inputs: list[Any]) -> Any:
        return apply_fn(params_tree.unflatten(leaves), *inputs_tree.unflatten(flat_inputs))

    try:
        closed, shapes = jax.make_jaxpr(flat, return_shape=True)(leaves, flat_inputs)
    except Exception as error:
        raise TraceError(
            f"apply_fn: cannot be traced ({type(error).__name__}: {_first_line(error)}); it must "
            "run under jax.jit as apply_fn(params, *inputs) with these inputs. Bind Python flags "
            "and other static arguments first, as in functools.partial(model.apply, train=False)"
        ) from error
    return Traced(closed, jax.tree.structure(shapes), len(leaves))


def signature(params: Any, inputs: tuple[Any, ...]) -> Hashable:
    """Two calls with the same signature have the same jaxpr."""
    leaves, tree = jax.tree.flatten((params, inputs))
    return tree, tuple(map(_type_of, leaves)), trace_settings()


def check_params(params: Any, abstract: bool) -> None:
    """Raise a `TreeError` unless every leaf is a number or an array (or abstract, if allowed)."""
    for path, x in leaf_paths(params):
        if isinstance(x, jax.ShapeDtypeStruct):
            if not abstract:
                raise TreeError(
                    f"params: leaf {path!r} is a ShapeDtypeStruct, which has no values to edit; "
                    "pass arrays, or use jax_lnfold.analyze"
                )
        elif not _is_numeric(x):
            raise TreeError(
                f"params: leaf {path!r} is a {type(x).__name__}; pass a tree of arrays and bind "
                "everything else to the function"
            )


def check_inputs(inputs: tuple[Any, ...]) -> None:
    """Raise a `TraceError` unless every leaf of the inputs is a number or an array."""
    for path, x in leaf_paths(inputs):
        if not isinstance(x, jax.ShapeDtypeStruct) and not _is_numeric(x):
            raise TraceError(
                f"example_inputs: leaf {path!r} is a {type(x).__name__}; pass arrays or "
                "jax.ShapeDtypeStruct, and bind static arguments with functools.partial"
            )


def _is_numeric(x: Any) -> bool:
    if isinstance(x, (jax.Array, bool, int, float, complex)) or is_tracer(x):
        return True
    return isinstance(x, (np.ndarray, np.generic)) and x.dtype.kind not in "OSUMm"


def _type_of(x: Any) -> Hashable:
    if isinstance(x, jax.ShapeDtypeStruct):
        return tuple(x.shape), np.dtype(x.dtype), bool(getattr(x, "weak_type", False)), None
    if not _is_numeric(x):
        return type(x)  # no program is known for it: the checks will say what is wrong
    aval = jax.typeof(x)
    sharding = getattr(aval, "sharding", None)
    explicit = sharding if sharding is not None and not sharding.mesh.empty else None
    return aval.shape, aval.dtype, aval.weak_type, explicit, varying_axes(aval)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0][:300]
