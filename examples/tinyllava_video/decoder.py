"""The language models: Qwen2 (sequential blocks, RMSNorms) and Phi (parallel blocks, LayerNorms).

Attention keeps keys and values in a cache of fixed length, so that one compiled program makes every
token of an answer.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from .config import PhiConfig, Qwen2Config
from .layers import MLP, Embed, Linear, attention, heads, joined, layer_norm


class KV(NamedTuple):
    """Keys and values of one layer, each ``[batch, positions, heads, head size]``."""

    keys: jax.Array
    values: jax.Array


class Rotary(NamedTuple):
    """Cosines and sines by position, each ``[(batch,) positions, half of the rotated part]``."""

    cos: jax.Array
    sin: jax.Array

    @staticmethod
    def at(positions: jax.Array, size: int, theta: float) -> Rotary:
        """For these positions; `size` features of a head are rotated (Su et al. 2021)."""
        rates = theta ** (-np.arange(0, size, 2) / size)  # powers are less exact on some devices
        angles = positions.astype(jnp.float32)[..., None] * rates.astype(np.float32)
        return Rotary(jnp.cos(angles), jnp.sin(angles))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Rotates ``[batch, positions, heads, head size]``: features pair with those half on."""
        half = self.cos.shape[-1]
        first, second, rest = jnp.split(x, (half, 2 * half), axis=-1)
        cos, sin = (y[..., None, :].astype(x.dtype) for y in self)
        return jnp.concatenate(
            (first * cos - second * sin, second * cos + first * sin, rest), axis=-1
        )


class Gap(NamedTuple):
    """Positions of each row that hold nothing: `sizes` (``[batch]``) from `start` on."""

    start: jax.Array | int
    sizes: jax.Array

    def positions(self, index: jax.Array) -> jax.Array:
        """Where the places of `index` (``[positions]``) are without the gap, row by row."""
        sizes = self.sizes[:, None]
        return index - jnp.where(index >= self.start + sizes, sizes, 0)

    def holds(self, index: jax.Array) -> jax.Array:
        """Which places are in the gap, ``[batch, positions]``."""
        return (index >= self.start) & (index < self.start + self.sizes[:, None])


class Context(NamedTuple):
    """Where new positions are: the first of them, their rotation and the keys that they see."""

    start: jax.Array | int
    rotary: Rotary
    seen: jax.Array | None  # [batch or 1, 1, queries, keys]


class Attention(nnx.Module):
    """Causal attention with rotary positions and, maybe, fewer heads of keys than of queries."""

    def __init__(self, config: Qwen2Config | PhiConfig, out_bias: bool, rngs: nnx.Rngs) -> None:
        """Make it with random weights."""
        d, self.heads = config.hidden_size, config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        narrow = d // self.heads * self.kv_heads
        self.q_proj = Linear(d, d, rngs=rngs)
        self.k_proj = Linear(d, narrow, rngs=rngs)
        self.v_proj = Linear(d, narrow, rngs=rngs)
        self.o_proj = Linear(d, d, use_bias=out_bias, rngs=rngs)

    def __call__(
        self, x: jax.Array, context: Context, cache: KV | None
    ) -> tuple[jax.Array, KV | None]:
        """Maps ``[batch, positions, hidden]`` to the same shape; new keys go into the cache."""
        q = context.rotary(heads(self.q_proj(x), self.heads))
        k = context.rotary(heads(self.k_proj(x), self.kv_heads))
        v = heads(self.v_proj(x), self.kv_heads)
        if cache is None:
            out = attention(q, k, v, causal=True)
        else:
            cache = KV(
                *(
                    jax.lax.dynamic_update_slice_in_dim(old, new, context.start, axis=1)
                    for old, new in zip(cache, (k, v), strict=True)
                )
            )
            out = attention(q, *cache, seen=context.seen)
        return self.o_proj(joined(out)), cache


class Qwen2MLP(nnx.Module):
    """A gated feed-forward without biases."""

    def __init__(self, config: Qwen2Config, rngs: nnx.Rngs) -> None:
        """Make it with random weights."""
        d, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(d, inner, use_bias=False, rngs=rngs)
        self.up_proj = Linear(d, inner, use_bias=False, rngs=rngs)
        self.down_proj = Linear(inner, d, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[..., hidden]`` to the same shape."""
        return self.down_proj(nnx.silu(self.gate_proj(x)) * self.up_proj(x))


class Qwen2Block(nnx.Module):
    """Attention, then a feed-forward."""

    def __init__(self, config: Qwen2Config, rngs: nnx.Rngs) -> None:
        """Make it with random weights."""
        d, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = nnx.RMSNorm(d, epsilon=eps, rngs=rngs)
        self.self_attn = Attention(config, out_bias=False, rngs=rngs)
        self.post_attention_layernorm = nnx.RMSNorm(d, epsilon=eps, rngs=rngs)
        self.mlp = Qwen2MLP(config, rngs)

    def __call__(
        self, x: jax.Array, context: Context, cache: KV | None
    ) -> tuple[jax.Array, KV | None]:
        """Maps ``[batch, positions, hidden]`` to the same shape."""
        out, cache = self.self_attn(self.input_layernorm(x), context, cache)
        x = x + out
        return x + self.mlp(self.post_attention_layernorm(x)), cache


class PhiBlock(nnx.Module):
    """Attention and a feed-forward read one LayerNorm, in parallel."""

    def __init__(self, config: PhiConfig, rngs: nnx.Rngs) -> None:
        """Make it with random weights."""
        self.input_layernorm = layer_norm(config.hidden_size, config.layer_norm_eps, rngs)
        self.self_attn = Attention(config, out_bias=True, rngs=rngs)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, rngs)

    def __call__(
        self, x: jax.Array, context: Context, cache: KV | None
    ) -> tuple[jax.Array, KV | None]:
        """Maps ``[batch, positions, hidden]`` to the same shape."""
        y = self.input_layernorm(x)
        out, cache = self.self_attn(y, context, cache)
        return out + self.mlp(y) + x, cache


class Decoder(nnx.Module):
    """A language model: token embeddings, blocks, a final norm and logits."""

    def __init__(self, config: Qwen2Config | PhiConfig, rngs: nnx.Rngs) -> None:
        """Make it with random weights."""
        self.config, d = config, config.hidden_size
        self.embed_tokens = Embed(config.vocab_size, d, rngs=rngs)
        self.rotated = d // config.num_attention_heads
        if isinstance(config, Qwen2Config):
            blocks = [Qwen2Block(config, rngs) for _ in range(config.num_hidden_layers)]
            self.norm = nnx.RMSNorm(d, epsilon=config.rms_norm_eps, rngs=rngs)
        else:
            blocks = [PhiBlock(config, rngs) for _ in range(config.num_hidden_layers)]
            self.final_layernorm = layer_norm(config.hidden_size, config.layer_norm_eps, rngs)
            self.rotated = int(config.partial_rotary_factor * self.rotated)
        self.layers = nnx.List(blocks)
        if not config.tie_word_embeddings:
            bias = isinstance(config, PhiConfig)
            self.lm_head = Linear(d, config.vocab_size, use_bias=bias, rngs=rngs)

    def embed(self, ids: jax.Array) -> jax.Array:
        """Maps ``[...]`` of ids to ``[..., hidden]``."""
        return self.embed_tokens.embedding[...][ids]  # in its dtype, whatever it was made with

    def hidden_states(
        self,
        x: jax.Array,
        cache: list[KV] | None = None,
        start: jax.Array | int = 0,
        gap: Gap | None = None,
    ) -> tuple[list[jax.Array], list[KV] | None]:
        """The stream before the first and after each block, and after the final norm.

        ``x`` is ``[batch, positions, hidden]``, at positions `start` on. With a cache its earlier
        positions are seen, too, and it is returned with the new ones written. What is in a gap is
        not seen, and does not count.
        """
        index = start + jnp.arange(x.shape[1])
        positions = gap.positions(index) if gap else index
        rotary, seen = Rotary.at(positions, self.rotated, self.config.rope_theta), None
        if cache:
            keys = jnp.arange(cache[0].keys.shape[1])
            seen = (keys <= index[:, None])[None, None]
            if gap:
                seen = seen & ~gap.holds(keys)[:, None, None]
        context, states, caches = Context(start, rotary, seen), [x], []
        for i, layer in enumerate(self.layers):
            x, new = layer(x, context, cache[i] if cache else None)
            states.append(x)
            caches.append(new)
        norm = self.norm if isinstance(self.config, Qwen2Config) else self.final_layernorm
        return [*states, norm(x)], caches if cache else None

    def logits(self, x: jax.Array) -> jax.Array:
        """Maps final hidden states ``[..., hidden]`` to ``[..., vocabulary]``, float32 or wider."""
        tied = self.config.tie_word_embeddings
        y = x @ self.embed_tokens.embedding[...].T if tied else self.lm_head(x)
        return y.astype(jnp.promote_types(y.dtype, jnp.float32))

    def empty_cache(self, batch: int, positions: int) -> list[KV]:
        """Zeros for every layer."""
        config, dtype = self.config, self.embed_tokens.embedding.dtype
        size = config.hidden_size // config.num_attention_heads
        zeros = jnp.zeros((batch, positions, config.num_key_value_heads, size), dtype)
        return [KV(zeros, zeros) for _ in self.layers]
