"""Batches of data: what a caller passes for one, and checks that all are alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from ._compat import is_tracer
from .errors import FoldError
from .program.tracing import signature
from .trees import MISSING, check_devices, check_leaves, leaf_paths


def inputs_of(batch: Any) -> tuple[Any, ...]:
    """The inputs of a batch; named tuples are an input like any other tree."""
    return batch if type(batch) is tuple else (batch,)


def check_batches(params: Any, inputs: Sequence[tuple[Any, ...]], name: str = "measure") -> None:
    """There is at least one batch, and all are like the first one."""
    given = f"pass {name}(fn, params, *batches), or of a model, {name}(model, *batches)"
    if params is MISSING:
        raise FoldError(f"params: missing; {given}")
    if not inputs:
        raise FoldError(f"batches: there is none, so nothing can be measured; {given}")
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
