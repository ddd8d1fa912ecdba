"""Models at their published sizes, each with the norm it is given, random weights and inputs.

The norm is a factory of modules: LayerNorm in two spellings, or nothing at all for the bound.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array
Factory = Callable[..., Any]


class NoNorm(nn.Module):
    """The identity: the model without its norms."""

    dtype: Any = None
    epsilon: float = 1e-6

    def __call__(self, x: Array) -> Array:
        """Return `x`."""
        return x


NORMS: dict[str, Factory] = {
    "one_pass": nn.LayerNorm,
    "two_pass": partial(nn.LayerNorm, use_fast_variance=False),
    "none": NoNorm,
}


@dataclass(frozen=True)
class Config:
    """Sizes of a transformer, and how its blocks are wired."""

    depth: int
    width: int
    heads: int
    causal: bool = False
    qk_norm: bool = False
    layer_scale: bool = False
    qkv_bias: bool = True
    act: Callable[[Array], Array] = nn.gelu
    norm: Factory = nn.LayerNorm
    dtype: Any = jnp.float32


class Block(nn.Module):
    """A pre-LN block: attention and MLP, each on a residual branch."""

    config: Config

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps ``[batch, tokens, width]`` to the same shape."""
        c = self.config
        dense, norm = partial(nn.Dense, dtype=c.dtype), partial(c.norm, dtype=c.dtype)

        def branch(y: Array, name: str) -> Array:
            if not c.layer_scale:
                return y
            scale = self.param(name, nn.initializers.constant(0.1), (c.width,))
            return y * scale.astype(c.dtype)

        h = norm(name="attn_norm")(x)
        qkv = dense(3 * c.width, use_bias=c.qkv_bias, name="qkv")(h)
        q, k, v = jnp.split(qkv.reshape(*h.shape[:2], 3 * c.heads, -1), 3, axis=2)
        if c.qk_norm:
            q, k = norm(name="q_norm")(q), norm(name="k_norm")(k)
        y = jax.nn.dot_product_attention(q, k, v, is_causal=c.causal)
        x = x + branch(dense(c.width, name="out")(y.reshape(h.shape)), "attn_scale")
        h = dense(4 * c.width, name="fc1")(norm(name="mlp_norm")(x))
        return x + branch(dense(c.width, name="fc2")(c.act(h)), "mlp_scale")


def blocks(config: Config, x: Array) -> Array:
    """All blocks and the final norm."""
    for i in range(config.depth):
        x = Block(config, name=f"block_{i}")(x)
    return config.norm(dtype=config.dtype, name="final_norm")(x)


class ViT(nn.Module):
    """A Vision Transformer that classifies by its class token (Dosovitskiy et al. 2021)."""

    config: Config
    patch: int = 16

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """Maps ``[batch, height, width, 3]`` to logits ``[batch, 1000]``."""
        c, init = self.config, nn.initializers.normal(0.02)
        size = (self.patch, self.patch)
        x = nn.Conv(c.width, size, size, padding="VALID", dtype=c.dtype, name="patches")(images)
        x = x.reshape(x.shape[0], -1, c.width)
        cls = self.param("cls", init, (1, 1, c.width)).astype(c.dtype)
        x = jnp.concatenate([jnp.broadcast_to(cls, (x.shape[0], 1, c.width)), x], axis=1)
        x = x + self.param("positions", init, (1, x.shape[1], c.width)).astype(c.dtype)
        return nn.Dense(1000, dtype=c.dtype, name="head")(blocks(c, x)[:, 0])


class GPT(nn.Module):
    """GPT-2 with its tied head (Radford et al. 2019)."""

    config: Config
    vocab: int = 50257
    context: int = 1024

    @nn.compact
    def __call__(self, ids: Array) -> Array:
        """Maps ``[batch, tokens]`` to logits ``[batch, tokens, vocab]``."""
        c = self.config
        table = nn.Embed(self.vocab, c.width, dtype=c.dtype, name="tokens")
        positions = nn.Embed(self.context, c.width, dtype=c.dtype, name="positions")
        return table.attend(blocks(c, table(ids) + positions(jnp.arange(ids.shape[1]))))


class WhisperEncoder(nn.Module):
    """The encoder of Whisper (Radford et al. 2022)."""

    config: Config

    @nn.compact
    def __call__(self, mels: Array) -> Array:
        """Maps ``[batch, frames, 80]`` to ``[batch, frames / 2, width]``."""
        c = self.config
        conv = partial(nn.Conv, c.width, (3,), padding=1, dtype=c.dtype)
        x = nn.gelu(conv(name="conv_1")(mels))
        x = nn.gelu(conv(strides=2, name="conv_2")(x))
        init = nn.initializers.normal(0.02)
        return blocks(c, x + self.param("positions", init, x.shape[1:]).astype(c.dtype))


def quick_gelu(x: Array) -> Array:
    """The activation of CLIP."""
    return x * jax.nn.sigmoid(1.702 * x)


class ClipText(nn.Module):
    """The text encoder of CLIP (Radford et al. 2021)."""

    config: Config

    @nn.compact
    def __call__(self, ids: Array) -> Array:
        """Maps ``[batch, 77]`` to embeddings ``[batch, width]``."""
        c = self.config
        positions = nn.Embed(77, c.width, dtype=c.dtype, name="positions")
        x = nn.Embed(49408, c.width, dtype=c.dtype, name="tokens")(ids)
        x = blocks(c, x + positions(jnp.arange(ids.shape[1])))[:, -1]
        return nn.Dense(c.width, use_bias=False, dtype=c.dtype, name="project")(x)


@dataclass(frozen=True)
class Entry:
    """A model by its class and sizes, with the shape of one input sample."""

    make: Callable[[Config], nn.Module]
    config: Config
    sample: tuple[int, ...]
    integers: bool = False


IMAGE = (224, 224, 3)
MODELS: dict[str, Entry] = {
    "vit_s": Entry(ViT, Config(12, 384, 6), IMAGE),
    "vit_b": Entry(ViT, Config(12, 768, 12), IMAGE),
    "vit_l": Entry(ViT, Config(24, 1024, 16), IMAGE),
    "vit_b_qk_norm": Entry(ViT, Config(12, 768, 12, qk_norm=True), IMAGE),
    "dinov2_b": Entry(partial(ViT, patch=14), Config(12, 768, 12, layer_scale=True), IMAGE),
    "gpt2": Entry(GPT, Config(12, 768, 12, causal=True), (512,), integers=True),
    "gpt2_xl": Entry(GPT, Config(48, 1600, 25, causal=True), (512,), integers=True),
    "whisper_base_encoder": Entry(WhisperEncoder, Config(6, 512, 8), (3000, 80)),
    "clip_l_text": Entry(
        ClipText, Config(12, 768, 12, causal=True, act=quick_gelu), (77,), integers=True
    ),
}
