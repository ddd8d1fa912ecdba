"""Models in which norms weigh something beside the products: narrow ones, with many rows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from .models import Factory

Array = jax.Array


@dataclass(frozen=True)
class Small:
    """Sizes of a model of residual branches, each a norm and two linear layers."""

    depth: int
    width: int
    inner: int
    inputs: int = 64
    outputs: int = 16
    norm: Factory = nn.LayerNorm
    dtype: Any = jnp.float32


class Branch(nn.Module):
    """A norm, a linear layer to `inner` features, and one back."""

    config: Small
    inner: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps ``[..., width]`` to the same."""
        c = self.config
        h = nn.Dense(self.inner, dtype=c.dtype, name="up")(c.norm(dtype=c.dtype, name="norm")(x))
        return x + nn.Dense(c.width, dtype=c.dtype, name="down")(nn.relu(h))


class Policy(nn.Module):
    """What reinforcement learning trains: a residual MLP on many observations at once."""

    config: Small

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps ``[rows, inputs]`` to ``[rows, outputs]``."""
        c = self.config
        x = nn.Dense(c.width, dtype=c.dtype, name="stem")(x)
        for i in range(c.depth):
            x = Branch(c, c.inner, name=f"branch_{i}")(x)
        return nn.Dense(c.outputs, dtype=c.dtype)(c.norm(dtype=c.dtype, name="final_norm")(x))


class Mixer(nn.Module):
    """Patches that are mixed by an MLP over their positions, and features by another one."""

    config: Small

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps ``[batch, positions, inputs]`` to ``[batch, outputs]``."""
        c = self.config
        x = nn.Dense(c.width, dtype=c.dtype, name="stem")(x)
        for i in range(c.depth):
            h = c.norm(dtype=c.dtype, name=f"mixing_norm_{i}")(x)
            h = nn.Dense(c.inner, dtype=c.dtype, name=f"mix_{i}")(h.swapaxes(1, 2))
            h = nn.Dense(x.shape[1], dtype=c.dtype, name=f"back_{i}")(nn.relu(h))
            x = Branch(c, 2 * c.width, name=f"branch_{i}")(x + h.swapaxes(1, 2))
        x = c.norm(dtype=c.dtype, name="final_norm")(x)
        return nn.Dense(c.outputs, dtype=c.dtype)(x).mean(1)


class GraphNet(nn.Module):
    """Nodes that get messages of four others each, sent by a narrow linear layer."""

    config: Small

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps ``[nodes, inputs]`` to ``[nodes, outputs]``."""
        c, nodes = self.config, jnp.arange(x.shape[0])
        dense = partial(nn.Dense, dtype=c.dtype)
        x = dense(c.width, name="stem")(x)
        for i in range(c.depth):
            h = dense(c.inner, name=f"send_{i}")(c.norm(dtype=c.dtype, name=f"norm_{i}")(x))
            near = [jnp.roll(nodes, step) for step in (1, 7, 31, 127)]
            x = x + dense(c.width, name=f"receive_{i}")(nn.relu(sum(h[n] for n in near)))
        return dense(c.outputs)(c.norm(dtype=c.dtype, name="final_norm")(x))


class Recommender(nn.Module):
    """Tables of eight features, a layer that joins them, and a narrow residual MLP."""

    config: Small

    @nn.compact
    def __call__(self, ids: Array) -> Array:
        """Maps ``[rows, 8]`` to ``[rows, outputs]``."""
        c = self.config
        tables = [
            nn.Embed(1000, c.inputs, dtype=c.dtype, name=f"table_{i}")(ids[:, i])
            for i in range(ids.shape[1])
        ]
        x = nn.Dense(c.width, dtype=c.dtype, name="join")(jnp.concatenate(tables, axis=-1))
        for i in range(c.depth):
            x = Branch(c, c.inner, name=f"branch_{i}")(x)
        return nn.Dense(c.outputs, dtype=c.dtype)(c.norm(dtype=c.dtype, name="final_norm")(x))
