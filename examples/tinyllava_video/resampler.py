"""The connector: a fixed number of learned queries reads the tokens of all frames.

The group resampler (Zhang et al., arXiv 2501.15513, section 3) splits the tokens into groups, each
read by the same latents, and adds positions to what they have read; the naive resampler has one
group, and adds the positions of the tokens before they are read.
"""

from __future__ import annotations

import math
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from .config import ResamplerConfig
from .errors import InputError
from .layers import Linear, attention, heads, joined, layer_norm

EPSILON = 1e-5
"""Of PyTorch's LayerNorm."""


class PerceiverAttention(nnx.Module):
    """Latents attend to the media and to themselves."""

    def __init__(self, config: ResamplerConfig, hidden_size: int, rngs: nnx.Rngs) -> None:
        """Make it with random weights."""
        self.heads, inner = config.num_heads, config.num_heads * config.head_dim
        self.norm_media = layer_norm(hidden_size, EPSILON, rngs)
        self.norm_latents = layer_norm(hidden_size, EPSILON, rngs)
        self.to_q = Linear(hidden_size, inner, use_bias=False, rngs=rngs)
        self.to_kv = Linear(hidden_size, 2 * inner, use_bias=False, rngs=rngs)
        self.to_out = Linear(inner, hidden_size, use_bias=False, rngs=rngs)

    def __call__(self, media: jax.Array, latents: jax.Array) -> jax.Array:
        """Maps ``[batch, tokens, hidden]`` and ``[batch, queries, hidden]`` to the latter."""
        latents = self.norm_latents(latents)
        both = jnp.concatenate((self.norm_media(media), latents), axis=1)
        q, (k, v) = self.to_q(latents), jnp.split(self.to_kv(both), 2, axis=-1)
        q, k, v = (heads(x, self.heads) for x in (q, k, v))
        return self.to_out(joined(attention(q, k, v)))


class FeedForward(nnx.Module):
    """A LayerNorm and two linear layers without biases, with an exact GELU between them."""

    def __init__(self, hidden_size: int, rngs: nnx.Rngs) -> None:
        """Make it with random weights."""
        self.norm = layer_norm(hidden_size, EPSILON, rngs)
        self.fc1 = Linear(hidden_size, 4 * hidden_size, use_bias=False, rngs=rngs)
        self.fc2 = Linear(4 * hidden_size, hidden_size, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[..., hidden]`` to the same shape."""
        return self.fc2(nnx.gelu(self.fc1(self.norm(x)), approximate=False))


class Layer(nnx.Module):
    """Perceiver attention and a feed-forward, both residual."""

    def __init__(self, config: ResamplerConfig, hidden_size: int, rngs: nnx.Rngs) -> None:
        """Make it with random weights."""
        self.attention = PerceiverAttention(config, hidden_size, rngs)
        self.feed_forward = FeedForward(hidden_size, rngs)

    def __call__(self, media: jax.Array, latents: jax.Array) -> jax.Array:
        """Maps ``[batch, tokens, hidden]`` and ``[batch, queries, hidden]`` to the latter."""
        latents = self.attention(media, latents) + latents
        return self.feed_forward(latents) + latents


class Resampler(nnx.Module):
    """Features of the tower in, embeddings for the language model out."""

    def __init__(
        self, config: ResamplerConfig, vision_size: int, hidden_size: int, rngs: nnx.Rngs
    ) -> None:
        """Make it with random weights."""
        self.config = config
        self.linear = Linear(vision_size, hidden_size, rngs=rngs)
        shape = (config.num_queries // config.groups, hidden_size)
        self.latents = nnx.Param(jax.random.normal(rngs.params(), shape, jnp.float32))
        self.layers = nnx.List([Layer(config, hidden_size, rngs) for _ in range(config.num_layers)])
        self.norm = layer_norm(hidden_size, EPSILON, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[batch, tokens, vision size]`` to ``[batch, queries, hidden]``.

        Tokens are split along the sequence into groups, the first ones longer by one if need be.

        Raises:
            InputError: there are fewer tokens than groups.
        """
        x, groups = self.linear(x), self.config.groups
        if self.config.positions == "media":
            x = self._placed(x)
        short, longer = divmod(x.shape[1], groups)
        if not short:
            raise InputError(
                f"video: its {x.shape[1]} tokens are fewer than the {groups} groups; give it more "
                "frames"
            )
        cut = longer * (short + 1)
        parts = [self._groups(x[:, :cut], longer)] if longer else []
        y = jnp.concatenate([*parts, self._groups(x[:, cut:], groups - longer)], axis=1)
        return self._placed(y) if self.config.positions == "queries" else y

    def _placed(self, x: jax.Array) -> jax.Array:
        """With the table of positions added, which is rounded first."""
        table = position_encoding(*x.shape[1:], self.config.position_dtype)
        return x + jnp.asarray(table).astype(x.dtype)

    def _groups(self, x: jax.Array, groups: int) -> jax.Array:
        """As many groups of equal length, all at once."""
        batch, tokens, hidden = x.shape
        media = x.reshape(batch * groups, tokens // groups, hidden)
        latents = jnp.broadcast_to(self.latents[...], (len(media), *self.latents.shape))
        for layer in self.layers:
            latents = layer(media, latents)
        return self.norm(latents).reshape(batch, -1, hidden)


@lru_cache(maxsize=2)
def position_encoding(length: int, size: int, dtype: str = "float32") -> np.ndarray:
    """Sines at even, cosines at odd features: ``[length, size]`` (Vaswani et al. 2017).

    Angles are products of float32, as in the public model: those of ten thousand tokens would
    differ from exact ones by more than `dtype` rounds.
    """
    exponents = np.arange(0, size, 2, np.float32) * np.float32(-math.log(1e4) / size)
    rates = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angles = (np.arange(length, dtype=np.float32)[:, None] * rates).astype(np.float64)
    table = np.stack((np.sin(angles), np.cos(angles)), axis=-1).astype(np.float32)
    table = np.ascontiguousarray(table.reshape(length, -1)[:, :size].astype(dtype))
    table.flags.writeable = False
    return table
