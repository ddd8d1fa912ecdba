"""Flax NNX: `nnx.Param` are the parameters; statistics, caches and random keys are the state."""

from __future__ import annotations

from collections.abc import Callable, Container
from inspect import signature
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..errors import FoldError
from ..trees import leaf_paths
from .kind import ModelKind, State
from .norm_calls import NormCalls


class _NnxModels:
    """Models of Flax NNX."""

    base = nnx.Module

    def split(self, model: nnx.Module) -> tuple[Any, State]:
        """`nnx.Param` and all other variables."""
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)
        leaves = leaf_paths(rest, "model")
        return params, State(dict(leaves), (graphdef, jax.tree.structure(rest)))

    def merge(self, owner: type, params: Any, state: State) -> nnx.Module:
        """New variables, in a graph like that of the model."""
        graphdef, rest = state.structure  # type: ignore[misc]
        own = jax.tree.map(lambda x: x, params)  # a merged model shares the variables it is given
        model = nnx.merge(graphdef, own, rest.unflatten(state.arrays.values()))
        object.__setattr__(model, "__class__", owner)
        return model

    def changes(self, model: nnx.Module, state: State) -> dict[str, Any]:
        """Variables that hold another array than before."""
        _, after = self.split(model)
        if after.arrays.keys() != state.arrays.keys():
            raise FoldError(
                "model: its call makes or removes variables; call it once before folding, so that "
                "they are there, or return what it sows"
            )
        return {key: x for key, x in after.arrays.items() if x is not state.arrays[key]}

    def update(self, model: nnx.Module, changes: dict[str, Any]) -> None:
        """In place, as the method itself does."""
        if changes:
            _, state = self.split(model)
            arrays = {**state.arrays, **changes}
            _, rest = state.structure  # type: ignore[misc]
            nnx.update(model, rest.unflatten(arrays.values()))

    def mark_norms(self, model: nnx.Module, calls: NormCalls) -> None:
        """By subclasses that mark their calls."""
        for path, norm in _layer_norms(model):
            object.__setattr__(norm, "__class__", calls.marked(nnx.LayerNorm, path))

    def replace_norms(
        self, model: nnx.Module, norms: Container[str], unshifted: Container[str]
    ) -> None:
        """In place: a `nnx.LayerNorm` has the attributes of a `nnx.RMSNorm`, and a bias."""
        for path, norm in _layer_norms(model):
            if path in norms:
                shifted = norm.bias is not None and path not in unshifted
                object.__setattr__(norm, "__class__", ShiftedRMSNorm if shifted else nnx.RMSNorm)
                if not shifted:
                    del norm.bias
                del norm.use_bias

    def add_biases(self, model: nnx.Module, wanted: Callable[[str], bool]) -> None:
        """Layers stacked for a loop are left: which axis is theirs, a module does not say."""
        for path, layer in list(nnx.iter_graph(model)):
            if wanted(_path(path)) and (shape := _missing_bias(layer)) is not None:
                layer.bias = nnx.Param(jnp.zeros(shape, layer.kernel[...].dtype))
                layer.use_bias = True


class ShiftedRMSNorm(nnx.RMSNorm):
    """An RMSNorm that adds a `bias`, as the LayerNorm did whose place it takes."""

    bias: nnx.Param[jax.Array]

    def __call__(self, x: Any, mask: jax.Array | None = None) -> jax.Array:
        """Normalise, scale and shift: the same shape as `x`."""
        y = super().__call__(x, mask)
        return y + self.bias[...].astype(y.dtype)


_PROMOTE = signature(nnx.LayerNorm.__init__).parameters["promote_dtype"].default


def _layer_norms(model: nnx.Module) -> list[tuple[str, Any]]:
    """All by key path, but those that may compute something else: of subclasses, own promotion."""
    return [
        (_path(path), x)
        for path, x in list(nnx.iter_graph(model))
        if type(x) is nnx.LayerNorm and x.promote_dtype is _PROMOTE
    ]


def _path(keys: tuple[Any, ...]) -> str:
    """The key path of a part of a model."""
    return "/".join(map(str, keys))


def _missing_bias(layer: Any) -> tuple[int, ...] | None:
    """The shape of the bias that a linear layer does not have."""
    if type(layer) not in (nnx.Linear, nnx.LinearGeneral) or layer.bias is not None:
        return None
    one = isinstance(layer, nnx.Linear)
    n_in, n_out = (1, 1) if one else (len(layer.in_features), len(layer.out_features))
    kernel = layer.kernel[...]
    return kernel.shape[n_in:] if kernel.ndim == n_in + n_out else None


NNX: ModelKind = _NnxModels()
