"""The SigLIP vision tower (Zhai et al., arXiv 2303.15343): a pre-LN ViT without a class token."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from .config import SiglipConfig
from .errors import InputError
from .layers import MLP, Embed, Linear, attention, heads, joined, layer_norm, normal


class Embeddings(nnx.Module):
    """Patches and their positions."""

    def __init__(self, config: SiglipConfig, rngs: nnx.Rngs) -> None:
        """Make it with random weights."""
        patch = (config.patch_size, config.patch_size)
        self.patch_embedding = nnx.Conv(
            3,
            config.hidden_size,
            patch,
            strides=patch,
            padding="VALID",
            kernel_init=normal,
            rngs=rngs,
        )
        positions = (config.image_size // config.patch_size) ** 2
        self.position_embedding = Embed(positions, config.hidden_size, rngs=rngs)

    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Maps ``[batch, height, width, 3]`` to ``[batch, patches, hidden]``."""
        x = self.patch_embedding(pixels)
        return x.reshape(x.shape[0], -1, x.shape[-1]) + self.position_embedding.embedding[...]


class Attention(nnx.Module):
    """Multi-head self-attention with biases."""

    def __init__(self, config: SiglipConfig, rngs: nnx.Rngs) -> None:
        """Make it with random weights."""
        d = config.hidden_size
        self.heads = config.num_attention_heads
        self.q_proj = Linear(d, d, rngs=rngs)
        self.k_proj = Linear(d, d, rngs=rngs)
        self.v_proj = Linear(d, d, rngs=rngs)
        self.out_proj = Linear(d, d, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[batch, tokens, hidden]`` to the same shape."""
        q, k, v = (heads(f(x), self.heads) for f in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(joined(attention(q, k, v)))


class Block(nnx.Module):
    """A pre-LN block."""

    def __init__(self, config: SiglipConfig, rngs: nnx.Rngs) -> None:
        """Make it with random weights."""
        self.layer_norm1 = layer_norm(config.hidden_size, config.layer_norm_eps, rngs)
        self.self_attn = Attention(config, rngs)
        self.layer_norm2 = layer_norm(config.hidden_size, config.layer_norm_eps, rngs)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[batch, tokens, hidden]`` to the same shape."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Head(nnx.Module):
    """Pooling by one learned query. The checkpoint has it; the video model does not read it."""

    def __init__(self, config: SiglipConfig, rngs: nnx.Rngs) -> None:
        """Make it with random weights."""
        d, self.heads = config.hidden_size, config.num_attention_heads
        self.probe = nnx.Param(normal(rngs.params(), (1, 1, d), jnp.float32))
        self.in_proj = Linear(d, 3 * d, rngs=rngs)
        self.out_proj = Linear(d, d, rngs=rngs)
        self.layernorm = layer_norm(config.hidden_size, config.layer_norm_eps, rngs)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[batch, tokens, hidden]`` to ``[batch, hidden]``."""
        batch, _, d = x.shape
        probe = jnp.broadcast_to(self.probe[...], (batch, 1, d))
        parts = zip((probe, x, x), range(3), strict=True)
        q, k, v = (jnp.split(self.in_proj(y), 3, axis=-1)[i] for y, i in parts)
        q, k, v = (heads(y, self.heads) for y in (q, k, v))
        x = self.out_proj(joined(attention(q, k, v)))
        return (x + self.mlp(self.layernorm(x)))[:, 0]


class SiglipTower(nnx.Module):
    """The tower, its last norm and its pooling head."""

    def __init__(self, config: SiglipConfig, rngs: nnx.Rngs) -> None:
        """Make it with random weights."""
        self.config = config
        self.embeddings = Embeddings(config, rngs)
        self.layers = nnx.List([Block(config, rngs) for _ in range(config.num_hidden_layers)])
        self.post_layernorm = layer_norm(config.hidden_size, config.layer_norm_eps, rngs)
        self.head = Head(config, rngs)

    def hidden_states(self, pixels: jax.Array, depth: int | None = None) -> list[jax.Array]:
        """The stream before the first and after each of `depth` (all) blocks.

        Each is ``[batch, patches, hidden]``; pixels are ``[batch, size, size, 3]``, in -1 to 1.

        Raises:
            InputError: the pixels have another shape.
        """
        side = self.config.image_size
        if pixels.shape[1:] != (side, side, 3):
            raise InputError(f"pixels: {pixels.shape[1:]} are given, of shape {(side, side, 3)}")
        states = [self.embeddings(pixels)]
        for layer in self.layers[:depth]:
            states.append(layer(states[-1]))
        return states

    def features(self, pixels: jax.Array) -> jax.Array:
        """What the connector reads: ``[batch, tokens, hidden]``; pixels are as above."""
        x = self.hidden_states(pixels, self.config.feature_depth)[-1]
        if self.config.feature_norm:
            x = self.post_layernorm(x)
        return x[:, 1:] if self.config.drop_first_token else x

    def pooled(self, pixels: jax.Array) -> jax.Array:
        """The embedding of the whole image, ``[batch, hidden]``."""
        return self.head(self.post_layernorm(self.hidden_states(pixels)[-1]))
