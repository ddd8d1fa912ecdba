"""What a zoo entry is, how one is built, and the spellings of LayerNorm it can be built with."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
Factory = Callable[..., nn.Module]
Samples = tuple[np.ndarray, ...]

VOCAB = 61


class MeanVarNorm(nn.Module):
    """LayerNorm written out by hand with `jnp.mean` and `jnp.var`."""

    epsilon: float = 1e-6
    use_scale: bool = True
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Normalise the last axis."""
        mean = jnp.mean(x, axis=-1, keepdims=True)
        variance = jnp.var(x, axis=-1, keepdims=True)
        y = (x - mean) / jnp.sqrt(variance + self.epsilon)
        if self.use_scale:
            y = self.param("scale", nn.initializers.ones, x.shape[-1:]) * y
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, x.shape[-1:])
        return y


NORMS: dict[str, Factory] = {
    "one_pass": nn.LayerNorm,
    "two_pass": partial(nn.LayerNorm, use_fast_variance=False),
    "mean_var": MeanVarNorm,
}


@dataclass(frozen=True)
class Built:
    """A traceable function with its parameters and inputs of two different shapes.

    `about` says in a line which architecture it is.
    """

    apply_fn: Callable[..., Any]
    params: Any
    inputs: tuple[Array, ...]
    other_inputs: tuple[Array, ...]
    about: str = ""


@dataclass(frozen=True)
class Case:
    """A model with what folding should make of it.

    `norms` counts the LayerNorms of the program, `folded` those whose centering goes away and
    `inserted` the explicit centerings paid for it, when one costs twice a LayerNorm's own.
    """

    name: str
    build: Callable[..., Built]
    norms: int
    folded: int
    inserted: int = 0

    def __str__(self) -> str:
        """Name the case in test reports."""
        return self.name


def recipe(
    make: Callable[[Factory], nn.Module], inputs: Samples, other_inputs: Samples
) -> Callable[..., Built]:
    """Return `build(spelling)` for the model that `make` wires around a kind of LayerNorm."""

    def build(spelling: str = "one_pass") -> Built:
        if jnp.result_type(float) != jnp.float64:
            raise RuntimeError("the zoo is built in float64: set jax_enable_x64")
        model = make(NORMS[spelling])
        first, other = (tuple(map(jnp.asarray, group)) for group in (inputs, other_inputs))
        shapes = jax.eval_shape(model.init, jax.random.key(0), *first)
        params = perturb(jax.tree_util.tree_map_with_path(initial, shapes))
        about = inspect.getdoc(make.func if isinstance(make, partial) else make) or ""
        return Built(model.apply, params, first, other, about.splitlines()[0])

    return build


def initial(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    """Return where a leaf starts from: factors from their usual value, all else from zero."""
    starts = {"scale": 1.0, "logit_scale": np.log(10.0)}
    return np.full(leaf.shape, starts.get(path[-1].key, 0.0))


def perturb(variables: Any, seed: int = 0) -> Any:
    """Copy a tree to float64 and move every leaf away from its value."""
    rng = np.random.default_rng(seed)

    def shake(leaf: Any) -> Array:
        noise = rng.uniform(0.1, 0.3) * rng.standard_normal(np.shape(leaf))
        return jnp.asarray(np.asarray(leaf, np.float64) + noise)

    return jax.tree.map(shake, variables)


def floats(*shape: int) -> np.ndarray:
    """Draw float64 inputs: images, spectrograms, encoder states, conditioning vectors."""
    return np.random.default_rng(sum(shape)).standard_normal(shape)


def tokens(batch: int, length: int, vocab: int = VOCAB) -> np.ndarray:
    """Draw int32 token ids."""
    return np.random.default_rng(batch * length).integers(vocab, size=(batch, length), dtype="i4")


def lengths_mask(length: int, *kept: int) -> np.ndarray:
    """Return an int32 padding mask with one right-padded row for each number of kept tokens."""
    return (np.arange(length) < np.array(kept)[:, None]).astype("i4")
