"""Equinox: a model is a pytree; its arrays of floating-point numbers are its parameters."""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable
from enum import Enum
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from ..errors import FoldError
from ..trees import leaf_paths
from .kind import ModelKind, State
from .norm_calls import NormCalls


class _Mark(Enum):
    """What stands for an array in the structure of a model."""

    PARAMETER = "parameter"
    ARRAY = "array"


class _EquinoxModels:
    """Models of Equinox."""

    base = eqx.Module

    def split(self, model: eqx.Module) -> tuple[Any, State]:
        """What `eqx.filter_grad` differentiates, and all else."""
        leaves = leaf_paths(model, "model")
        marks = tuple(_mark(path, x) for path, x in leaves)
        arrays = {path: x for (path, x), m in zip(leaves, marks, strict=True) if m is _Mark.ARRAY}
        params = jax.tree.map(lambda x: x if _is_parameter(x) else None, model)
        return params, State(arrays, (jax.tree.structure(model), marks))

    def merge(self, owner: type, params: Any, state: State) -> eqx.Module:
        """The same tree with these arrays."""
        tree, marks = state.structure  # type: ignore[misc]
        given = {
            _Mark.PARAMETER: iter(jax.tree.leaves(params)),
            _Mark.ARRAY: iter(state.arrays.values()),
        }
        model = tree.unflatten(next(given[m]) if isinstance(m, _Mark) else m for m in marks)
        object.__setattr__(model, "__class__", owner)
        return model

    def changes(self, model: eqx.Module, state: State) -> dict[str, Any]:
        """Nothing: these models cannot be changed."""
        return {}

    def update(self, model: eqx.Module, changes: dict[str, Any]) -> None:
        """Nothing to do."""

    def mark_norms(self, model: eqx.Module, calls: NormCalls) -> None:
        """By subclasses that mark their calls."""
        for path, norm in _parts(model, eqx.nn.LayerNorm):
            object.__setattr__(norm, "__class__", calls.marked(eqx.nn.LayerNorm, path))

    def replace_norms(
        self, model: eqx.Module, norms: Container[str], unshifted: Container[str]
    ) -> None:
        """In place: `eqx.nn.LayerNorm` and `eqx.nn.RMSNorm` have the same fields."""
        for path, norm in _parts(model, eqx.nn.LayerNorm):
            if path in norms:
                object.__setattr__(norm, "__class__", eqx.nn.RMSNorm)
                if path in unshifted:
                    object.__setattr__(norm, "bias", None)
                    object.__setattr__(norm, "use_bias", False)

    def add_biases(self, model: eqx.Module, wanted: Callable[[str], bool]) -> None:
        """Of `eqx.nn.Linear`, also of stacked ones."""
        for path, layer in _parts(model, eqx.nn.Linear):
            if wanted(path) and layer.bias is None:
                bias = jnp.zeros(layer.weight.shape[:-1], layer.weight.dtype)
                object.__setattr__(layer, "bias", bias)
                object.__setattr__(layer, "use_bias", True)


def _parts(model: eqx.Module, kind: type) -> list[tuple[str, Any]]:
    """Those of exactly this class, by key path: subclasses may compute something else."""
    found, _ = jax.tree_util.tree_flatten_with_path(model, is_leaf=lambda x: type(x) is kind)
    return [
        (jax.tree_util.keystr(path, simple=True, separator="/"), x)
        for path, x in found
        if type(x) is kind
    ]


def _is_array(x: Any) -> bool:
    return isinstance(x, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct))


def _is_parameter(x: Any) -> bool:
    return _is_array(x) and jnp.issubdtype(x.dtype, jnp.inexact)


def _mark(path: str, x: Any) -> Hashable:
    """What stands for a leaf in the structure."""
    if _is_array(x):
        return _Mark.PARAMETER if _is_parameter(x) else _Mark.ARRAY
    try:
        hash(x)
    except TypeError as error:
        raise FoldError(
            f"model: {path!r} is a {type(x).__name__}, neither an array nor something that can be "
            "compared; store it in another way, or mark it with eqx.field(static=True)"
        ) from error
    return x


EQUINOX: ModelKind = _EquinoxModels()
