"""Attention, MLPs and residual wirings shared by the models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from .base import Array, Factory

Order = Literal["pre", "post", "res_post"]


def dropout(x: Array) -> Array:
    """Apply elementwise dropout, switched off."""
    return nn.Dropout(0.1, deterministic=True)(x)


def drop_path(x: Array) -> Array:
    """Apply stochastic depth (one mask value per sample), switched off."""
    samples = tuple(range(1, x.ndim))
    return nn.Dropout(0.1, broadcast_dims=samples, deterministic=True)(x)


def quick_gelu(x: Array) -> Array:
    """Approximate gelu the way CLIP does."""
    return x * nn.sigmoid(1.702 * x)


def exact_gelu(x: Array) -> Array:
    """Compute gelu through the error function."""
    return nn.gelu(x, approximate=False)


def rotary(x: Array, features: int, interleaved: bool) -> Array:
    """Rotate the first `features` of each head by the token's position (RoFormer)."""
    angles = np.outer(np.arange(x.shape[1]), 1e4 ** (-np.arange(0, features, 2) / features))
    sin, cos = np.sin(angles)[:, None, :], np.cos(angles)[:, None, :]
    turned, kept = x[..., :features], x[..., features:]
    if interleaved:
        a, b = turned[..., ::2], turned[..., 1::2]
        turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(turned.shape)
    else:
        a, b = jnp.split(turned, 2, axis=-1)
        turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return jnp.concatenate([turned, kept], axis=-1)


class Attention(nn.Module):
    """Multi-head attention on (batch, token, head, feature), self or cross.

    `layout` says how query, key and value are projected: by a kernel each, by one kernel split
    in three before the heads, or by one kernel whose columns are grouped by head.
    """

    heads: int = 3
    head_dim: int = 10
    layout: Literal["separate", "split", "per_head"] = "separate"
    use_bias: bool = True
    key_bias: bool = True
    qk_norm: Factory | None = None
    rotate: Callable[[Array], Array] | None = None

    @nn.compact
    def __call__(
        self,
        x: Array,
        context: Array | None = None,
        bias: Array | None = None,
        mask: Array | None = None,
    ) -> Array:
        """Attend from `x` to `context`, or to itself."""
        q, k, v = self.project(x, x if context is None else context)
        if self.qk_norm is not None:
            q, k = self.qk_norm(name="q_norm")(q), self.qk_norm(name="k_norm")(k)
        if self.rotate is not None:
            q, k = self.rotate(q), self.rotate(k)
        y = nn.dot_product_attention(q, k, v, bias=bias, mask=mask)
        y = y.reshape(*y.shape[:-2], self.heads * self.head_dim)
        return nn.Dense(x.shape[-1], use_bias=self.use_bias, name="out")(y)

    def project(self, x: Array, context: Array) -> list[Array]:
        """Return query, key and value by head."""
        inner = self.heads * self.head_dim
        if self.layout == "separate":
            parts = [
                nn.Dense(inner, use_bias=self.use_bias, name="query")(x),
                nn.Dense(inner, use_bias=self.use_bias and self.key_bias, name="key")(context),
                nn.Dense(inner, use_bias=self.use_bias, name="value")(context),
            ]
        else:
            qkv = nn.Dense(3 * inner, use_bias=self.use_bias, name="qkv")(x)
            if self.layout == "per_head":
                qkv = qkv.reshape(*qkv.shape[:-1], self.heads, 3 * self.head_dim)
            parts = jnp.split(qkv, 3, axis=-1)
        return [part.reshape(*part.shape[:2], self.heads, self.head_dim) for part in parts]


class FusedAttention(nn.Module):
    """Self-attention as in timm: one qkv kernel, reshaped to (3, batch, head, token, feature).

    Without `key_bias` the bias is put together from those of query and value; `cosine` compares
    unit vectors at a learned temperature (Swin V2).
    """

    heads: int = 3
    head_dim: int = 10
    key_bias: bool = True
    qk_norm: Factory | None = None
    cosine: bool = False

    @nn.compact
    def __call__(self, x: Array, bias: Array | None = None) -> Array:
        """Attend within `x`, with `bias` added to the logits."""
        batch, length, width = x.shape
        inner = self.heads * self.head_dim
        qkv = nn.Dense(3 * inner, use_bias=self.key_bias, name="qkv")(x)
        if not self.key_bias:
            q_bias, v_bias = (
                self.param(name, nn.initializers.zeros, (inner,)) for name in ("q_bias", "v_bias")
            )
            qkv = qkv + jnp.concatenate([q_bias, jnp.zeros_like(q_bias), v_bias])
        qkv = qkv.reshape(batch, length, 3, self.heads, self.head_dim)
        q, k, v = qkv.transpose(2, 0, 3, 1, 4)
        if self.qk_norm is not None:
            q, k = self.qk_norm(name="q_norm")(q), self.qk_norm(name="k_norm")(k)
        if self.cosine:
            start = nn.initializers.constant(np.log(10.0))
            temperature = self.param("logit_scale", start, (self.heads, 1, 1))
            q, k = (y / jnp.linalg.norm(y, axis=-1, keepdims=True) for y in (q, k))
            q = q * jnp.exp(jnp.minimum(temperature, np.log(100.0)))
        else:
            q = q * self.head_dim**-0.5
        logits = q @ k.swapaxes(-2, -1)
        if bias is not None:
            logits = logits + bias
        y = nn.softmax(logits) @ v
        y = y.transpose(0, 2, 1, 3).reshape(batch, length, inner)
        return nn.Dense(width, name="proj")(y)


class Mlp(nn.Module):
    """Two Dense layers around a nonlinearity."""

    hidden: int = 40
    act: Callable[[Array], Array] = nn.gelu

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Transform the last axis."""
        h = dropout(self.act(nn.Dense(self.hidden, name="fc1")(x)))
        return nn.Dense(x.shape[-1], name="fc2")(h)


class LayerScale(nn.Module):
    """A learned factor per channel on a residual branch (CaiT)."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Scale the last axis."""
        return self.param("gamma", nn.initializers.constant(1e-5), x.shape[-1:]) * x


class Block(nn.Module):
    """Attention, optional cross-attention and MLP, each with a residual and a LayerNorm.

    The LayerNorm comes before the layer (`pre`), after the sum (`post`), or after the layer and
    before the sum (`res_post`).
    """

    norm: Factory
    attention: Factory = Attention
    mlp: Factory = Mlp
    order: Order = "pre"
    layer_scale: bool = False
    drop: Callable[[Array], Array] = dropout

    @nn.compact
    def __call__(self, x: Array, context: Array | None = None, **masks: Array) -> Array:
        """Update the stream `x`, attending to `context` if there is one."""
        x = self.residual("attn", x, lambda h: self.attention(name="attn")(h, **masks))
        if context is not None:
            x = self.residual("cross", x, lambda h: self.attention(name="cross")(h, context))
        return self.residual("mlp", x, self.mlp(name="mlp"))

    def residual(self, name: str, x: Array, layer: Callable[[Array], Array]) -> Array:
        """Add a layer's output to the stream, with its norm in the right place."""
        norm = self.norm(name=f"{name}_norm")
        y = layer(norm(x)) if self.order == "pre" else layer(x)
        if self.order == "res_post":
            y = norm(y)
        if self.layer_scale:
            y = LayerScale(name=f"{name}_scale")(y)
        x = x + self.drop(y)
        return norm(x) if self.order == "post" else x


class ParallelBlock(nn.Module):
    """Attention and MLP side by side, reading one LayerNorm or one each of the same stream."""

    norm: Factory
    attention: Factory = Attention
    mlp: Factory = Mlp
    shared_norm: bool = True

    @nn.compact
    def __call__(self, x: Array, **masks: Array) -> Array:
        """Add both layers' outputs to the stream `x`."""
        h = self.norm(name="attn_norm")(x)
        attended = self.attention(name="attn")(h, **masks)
        h = h if self.shared_norm else self.norm(name="mlp_norm")(x)
        return dropout(attended) + dropout(self.mlp(name="mlp")(h)) + x


class Stack(nn.Module):
    """Blocks of one kind, followed by a final LayerNorm if `norm` is given."""

    block: Factory
    depth: int = 2
    norm: Factory | None = None

    @nn.compact
    def __call__(self, x: Array, *args: Array, **masks: Array) -> Array:
        """Run the blocks on the stream `x`."""
        for index in range(self.depth):
            x = self.block(name=f"block_{index}")(x, *args, **masks)
        return x if self.norm is None else self.norm(name="final_norm")(x)
