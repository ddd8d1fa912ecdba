"""Transformers whose norms are LayerNorms, RMSNorms or absent.

All submodules but the norms have the same names whatever the norm, so that a seed gives them the
same initial values. None of them has dropout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from flax import linen as nn

from .data import PAD

Kind: TypeAlias = Literal["layernorm", "rmsnorm", "none"]
small = nn.initializers.normal(0.02)


class Net(nn.Module):
    """What all models are made with."""

    depth: int
    width: int
    heads: int
    classes: int
    kind: Kind


def norm(kind: Kind, name: str, learned: bool = True) -> Callable[[jax.Array], jax.Array]:
    """A norm of the last axis."""
    if kind == "none":
        return lambda x: x
    if kind == "layernorm":
        return nn.LayerNorm(use_scale=learned, use_bias=learned, name=name)
    return nn.RMSNorm(use_scale=learned, name=name)


# What follows is called by a module, whose submodules it makes.


def patches(images: jax.Array, width: int) -> jax.Array:
    """Tokens of 2x2 pixels."""
    x = nn.Conv(width, kernel_size=(2, 2), strides=(2, 2), name="patches")(images)
    return x.reshape(len(images), -1, width)


def mlp(x: jax.Array, name: str = "") -> jax.Array:
    """Two layers, the first one four times as wide; both names end with this one."""
    y = nn.gelu(nn.Dense(4 * x.shape[-1], name=f"up{name}")(x))
    return nn.Dense(x.shape[-1], name=f"down{name}")(y)


def post_ln(
    x: jax.Array, depth: int, heads: int, kind: Kind, mask: jax.Array | None = None
) -> jax.Array:
    """Blocks with a norm behind each sum."""
    for i in range(depth):
        y = nn.MultiHeadDotProductAttention(heads, name=f"attention_{i}")(x, mask=mask)
        x = norm(kind, f"norm_attention_{i}")(x + y)
        x = norm(kind, f"norm_mlp_{i}")(x + mlp(x, f"_{i}"))
    return x


class Block(nn.Module):
    """Attention to the tokens, attention to a memory if there is one, and an MLP."""

    heads: int
    kind: Kind

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None = None,
        memory: jax.Array | None = None,
        memory_mask: jax.Array | None = None,
    ) -> jax.Array:
        """Maps tokens of shape ``[batch, tokens, width]`` to the same shape."""
        y = norm(self.kind, "norm_attention")(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads, name="attention")(y, mask=mask)
        if memory is not None:
            y = norm(self.kind, "norm_cross")(x)
            cross = nn.MultiHeadDotProductAttention(self.heads, name="cross")
            x = x + cross(y, memory, mask=memory_mask)
        return x + mlp(norm(self.kind, "norm_mlp")(x))


class Tokens(nn.Module):
    """Embeddings and learned positions."""

    vocabulary: int
    width: int

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        """Maps ids of shape ``[batch, tokens]`` to vectors."""
        x = nn.Embed(self.vocabulary, self.width, embedding_init=small, name="table")(ids)
        return x + self.param("positions", small, (1, ids.shape[1], self.width))


class ViT(Net):
    """A Vision Transformer that classifies by its class token."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images of shape ``[batch, height, width, channels]`` to logits."""
        x = patches(images, self.width)
        cls = self.param("cls", small, (1, 1, self.width))
        x = jnp.concatenate([jnp.broadcast_to(cls, (len(images), 1, self.width)), x], axis=1)
        x = x + self.param("positions", small, (1, *x.shape[1:]))
        for i in range(self.depth):
            x = Block(self.heads, self.kind, name=f"block_{i}")(x)
        return nn.Dense(self.classes, name="head")(norm(self.kind, "norm")(x)[:, 0])


class GPT(Net):
    """A language model with a head of its own."""

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        """Maps ids of shape ``[batch, tokens]`` to logits of the next ones."""
        x = Tokens(self.classes, self.width, name="tokens")(ids)
        mask = nn.make_causal_mask(ids)
        for i in range(self.depth):
            x = Block(self.heads, self.kind, name=f"block_{i}")(x, mask)
        return nn.Dense(self.classes, name="head")(norm(self.kind, "norm")(x))


class PostGPT(Net):
    """A language model as the first GPT, with a norm behind each sum."""

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        """Maps ids of shape ``[batch, tokens]`` to logits of the next ones."""
        x = norm(self.kind, "norm")(Tokens(self.classes, self.width, name="tokens")(ids))
        x = post_ln(x, self.depth, self.heads, self.kind, nn.make_causal_mask(ids))
        return nn.Dense(self.classes, name="head")(x)


class Translator(Net):
    """An encoder and a decoder, of `depth` blocks each."""

    @nn.compact
    def __call__(self, source: jax.Array, target: jax.Array) -> jax.Array:
        """Logits of what follows each id of `target`."""
        keys = source != PAD
        x = Tokens(self.classes, self.width, name="source")(source)
        for i in range(self.depth):
            x = Block(self.heads, self.kind, name=f"encoder_{i}")(x, keys[:, None, None])
        memory = norm(self.kind, "norm_memory")(x)
        x = Tokens(self.classes, self.width, name="target")(target)
        mask = nn.make_causal_mask(target)
        for i in range(self.depth):
            block = Block(self.heads, self.kind, name=f"decoder_{i}")
            x = block(x, mask, memory, keys[:, None, None])
        return nn.Dense(self.classes, name="head")(norm(self.kind, "norm")(x))


class Classifier(Net):
    """An encoder of text that classifies by the mean of its tokens."""

    vocabulary: int

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        """Maps ids of shape ``[batch, tokens]`` to logits."""
        keys = ids != PAD
        x = Tokens(self.vocabulary, self.width, name="tokens")(ids)
        for i in range(self.depth):
            x = Block(self.heads, self.kind, name=f"block_{i}")(x, keys[:, None, None])
        x = norm(self.kind, "norm")(x) * keys[..., None]
        x = x.sum(axis=1) / keys.sum(axis=1)[:, None]
        return nn.Dense(self.classes, name="head")(x)
