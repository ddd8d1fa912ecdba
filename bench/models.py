"""Models at their published sizes, each with the norm it is given, random weights and inputs.

The norm is a factory of modules: LayerNorm in two spellings or as a Pallas kernel, or nothing at
all for the bound.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from .pallas_norm import PallasNorm

Array = jax.Array
Factory = Callable[..., Any]
Cache = tuple[Array, Array, Array]
"""Keys and values, ``[batch, positions, heads, width / heads]``, and how many positions count."""


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
    "pallas": PallasNorm,
    "none": NoNorm,
}
"""By the name of the spelling; what is called pallas compiles for TPU only."""


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
    size: int = 0  # a side of the map, in Swin


class Block(nn.Module):
    """A pre-LN block: attention and MLP, each on a residual branch."""

    config: Config

    @nn.compact
    def __call__(self, x: Array, cache: Cache | None = None) -> Any:
        """Maps ``[batch, tokens, width]`` to the same; with a cache, also new keys and values."""
        c = self.config
        dense, norm = partial(nn.Dense, dtype=c.dtype), partial(c.norm, dtype=c.dtype)

        def branch(y: Array, name: str) -> Array:
            if not c.layer_scale:
                return y
            scale = self.param(name, nn.initializers.constant(0.1), (c.width,))
            return y * scale.astype(c.dtype)

        h = self.arranged(norm(name="attn_norm")(x))
        qkv = dense(3 * c.width, use_bias=c.qkv_bias, name="qkv")(h)
        q, k, v = jnp.split(qkv.reshape(*h.shape[:2], 3 * c.heads, -1), 3, axis=2)
        if c.qk_norm:
            q, k = norm(name="q_norm")(q), norm(name="k_norm")(k)
        y = self.attended(q, k, v) if cache is None else attend_cached(q, k, v, cache)
        y = self.put_back(dense(c.width, name="out")(y.reshape(h.shape)), x)
        x = x + branch(y, "attn_scale")
        h = dense(4 * c.width, name="fc1")(norm(name="mlp_norm")(x))
        x = x + branch(dense(c.width, name="fc2")(c.act(h)), "mlp_scale")
        return x if cache is None else (x, (k, v))

    def arranged(self, x: Array) -> Array:
        """Groups of tokens that attend to each other, ``[group, tokens, width]``."""
        return x

    def attended(self, q: Array, k: Array, v: Array) -> Array:
        """Attention within the groups."""
        return jax.nn.dot_product_attention(q, k, v, is_causal=self.config.causal)

    def put_back(self, y: Array, like: Array) -> Array:
        """The inverse of `arranged`."""
        return y


def attend_cached(q: Array, k: Array, v: Array, cache: Cache) -> Array:
    """Attention of one token to those before it, and to itself; the cache is not copied."""
    keys, values, position = cache
    before = jnp.einsum("bqhd,bkhd->bhqk", q, keys)
    before = jnp.where(jnp.arange(keys.shape[1]) < position, before, -jnp.inf)
    itself = jnp.einsum("bqhd,bqhd->bhq", q, k)[..., None]
    scores = jnp.concatenate([before, itself], axis=-1).astype(jnp.float32)
    weights = jax.nn.softmax(scores / q.shape[-1] ** 0.5).astype(q.dtype)
    seen = jnp.einsum("bhqk,bkhd->bqhd", weights[..., :-1], values)
    return seen + jnp.swapaxes(weights[..., -1:], 1, 2) * v


def final_norm(config: Config, x: Array) -> Array:
    """The norm behind the last block."""
    return config.norm(dtype=config.dtype, name="final_norm")(x)


def blocks(config: Config, x: Array) -> Array:
    """All blocks and the final norm."""
    for i in range(config.depth):
        x = Block(config, name=f"block_{i}")(x)
    return final_norm(config, x)


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


class Decoder(nn.Module):
    """GPT-2 that generates: one token per call, the keys and values of those before are given."""

    config: Config
    vocab: int = 50257
    context: int = 1024

    @nn.compact
    def __call__(self, inputs: dict[str, Any]) -> tuple[Array, list[tuple[Array, Array]]]:
        """Logits ``[batch, 1, vocab]``, and each layer's new key and value."""
        c, position, new = self.config, inputs["position"], []
        table = nn.Embed(self.vocab, c.width, dtype=c.dtype, name="tokens")
        positions = nn.Embed(self.context, c.width, dtype=c.dtype, name="positions")
        x = table(inputs["ids"]) + positions(position)
        for i, (keys, values) in enumerate(inputs["cache"]):
            x, found = Block(c, name=f"block_{i}")(x, (keys, values, position))
            new.append(found)
        return table.attend(final_norm(c, x)), new


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


class PostBlock(nn.Module):
    """A post-LN block: each norm is behind the sum of a branch and the stream."""

    config: Config

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps ``[batch, tokens, width]`` to the same."""
        c = self.config
        dense, norm = partial(nn.Dense, dtype=c.dtype), partial(c.norm, dtype=c.dtype)
        heads = dense(3 * c.width, name="qkv")(x).reshape(*x.shape[:2], 3 * c.heads, -1)
        y = jax.nn.dot_product_attention(*jnp.split(heads, 3, axis=2), is_causal=c.causal)
        x = norm(name="attn_norm")(x + dense(c.width, name="out")(y.reshape(x.shape)))
        h = c.act(dense(4 * c.width, name="fc1")(x))
        return norm(name="mlp_norm")(x + dense(c.width, name="fc2")(h))


class PostEncoder(nn.Module):
    """Post-LN blocks (Vaswani et al. 2017)."""

    config: Config

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps ``[batch, tokens, width]`` to the same."""
        for i in range(self.config.depth):
            x = PostBlock(self.config, name=f"block_{i}")(x)
        return x


class Bert(nn.Module):
    """BERT (Devlin et al. 2019) with its pooler; all segments are the first one."""

    config: Config
    vocab: int = 30522
    context: int = 512

    @nn.compact
    def __call__(self, ids: Array) -> tuple[Array, Array]:
        """Maps ``[batch, tokens]`` to ``[batch, tokens, width]`` and ``[batch, width]``."""
        c, table = self.config, partial(nn.Embed, features=self.config.width)
        x = table(self.vocab, dtype=c.dtype, name="tokens")(ids)
        x = x + table(self.context, dtype=c.dtype, name="positions")(jnp.arange(ids.shape[1]))
        x = x + table(2, dtype=c.dtype, name="segments")(jnp.zeros_like(ids))
        x = PostEncoder(c, name="encoder")(c.norm(dtype=c.dtype, name="embeddings_norm")(x))
        return x, jnp.tanh(nn.Dense(c.width, dtype=c.dtype, name="pooler")(x[:, 0]))


class WindowBlock(Block):
    """A block of Swin: attention within windows of a map, with a bias by relative position."""

    window: int = 7
    shift: int = 0

    def arranged(self, x: Array) -> Array:
        """Cut ``[batch, height, width, channels]`` into ``[windows, tokens, channels]``."""
        return to_windows(jnp.roll(x, (-self.shift, -self.shift), axis=(1, 2)), self.window)

    def attended(self, q: Array, k: Array, v: Array) -> Array:
        """Attention with the bias, and none across the seam of a shifted map."""
        side, c = 2 * self.window - 1, self.config
        table = self.param("bias", nn.initializers.normal(0.02), (side**2, c.heads))
        rows, columns = np.divmod(np.arange(self.window**2), self.window)
        index = (rows[:, None] - rows + self.window - 1) * side
        index = index + columns[:, None] - columns + self.window - 1
        bias = jnp.moveaxis(table[index], -1, 0).astype(c.dtype)[None]
        if self.shift:
            seam = jnp.asarray(self.seam(), c.dtype)
            bias = jnp.tile(bias + seam, (len(q) // len(seam), 1, 1, 1))
        return jax.nn.dot_product_attention(q, k, v, bias=bias)

    def put_back(self, y: Array, like: Array) -> Array:
        """The map again."""
        batch, height, width, channels = like.shape
        y = y.reshape(batch, height // self.window, width // self.window, self.window, -1, channels)
        y = y.transpose(0, 1, 3, 2, 4, 5).reshape(like.shape)
        return jnp.roll(y, (self.shift, self.shift), axis=(1, 2))

    def seam(self) -> np.ndarray:
        """Minus 100 where tokens of a window were apart before the shift."""
        size = self.config.size
        cuts = (-self.window, -self.shift)
        part = np.sum([np.arange(size) >= size + cut for cut in cuts], axis=0)
        cells = to_windows((3 * part[:, None] + part)[None, :, :, None], self.window)[..., 0]
        return np.where(cells[:, :, None] != cells[:, None, :], -100.0, 0.0)[:, None]


def to_windows(x: Any, window: int) -> Any:
    """Cut maps into ``[batch * windows, tokens, channels]``."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // window, window, width // window, window, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, window**2, channels)


class Swin(nn.Module):
    """A Swin Transformer (Liu et al. 2021); `config` is that of its first stage."""

    config: Config
    depths: Sequence[int] = (2, 2, 6, 2)

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """Maps ``[batch, height, width, 3]`` to logits ``[batch, 1000]``."""
        c = self.config
        norm, dense = partial(c.norm, dtype=c.dtype), partial(nn.Dense, dtype=c.dtype)
        x = nn.Conv(c.width, (4, 4), (4, 4), padding="VALID", dtype=c.dtype, name="patches")(images)
        x = norm(name="patch_norm")(x)
        for stage, depth in enumerate(self.depths):
            width = c.width << stage
            if stage:
                corners = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
                x = norm(name=f"merge_norm_{stage}")(jnp.concatenate(corners, axis=-1))
                x = dense(width, use_bias=False, name=f"merge_{stage}")(x)
            here = replace(c, width=width, heads=c.heads << stage, size=x.shape[1])
            for i in range(depth):
                shift = 3 if i % 2 and here.size > 7 else 0
                x = WindowBlock(here, shift=shift, name=f"stage_{stage}_{i}")(x)
        return dense(1000, name="head")(final_norm(c, x).mean(axis=(1, 2)))
