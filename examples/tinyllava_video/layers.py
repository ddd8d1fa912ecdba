"""The layers that all parts are made of, with their random weights."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

# Under `jit` a shape is traced once, not once a layer.
normal = jax.jit(nnx.initializers.normal(0.02), static_argnums=(1, 2))
Linear = partial(nnx.Linear, kernel_init=normal)
Embed = partial(nnx.Embed, embedding_init=normal)


class MLP(nnx.Module):
    """Two layers with a tanh-GELU between them."""

    def __init__(self, size: int, inner: int, rngs: nnx.Rngs) -> None:
        """Make it with random weights."""
        self.fc1 = Linear(size, inner, rngs=rngs)
        self.fc2 = Linear(inner, size, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``[..., size]`` to the same shape."""
        return self.fc2(nnx.gelu(self.fc1(x), approximate=True))


def layer_norm(size: int, epsilon: float, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """With the variance in two passes, as PyTorch computes it."""
    return nnx.LayerNorm(size, epsilon=epsilon, use_fast_variance=False, rngs=rngs)


def attention(
    q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array | None = None, causal: bool = False
) -> jax.Array:
    """Softmax attention of ``[batch, positions, heads, head size]``; `seen` masks keys.

    That of float16 is computed in float32: JAX has no other on CPUs.
    """
    wide = jnp.float32 if q.dtype == jnp.float16 else q.dtype
    wider = (x.astype(wide) for x in (q, k, v))
    return jax.nn.dot_product_attention(*wider, mask=seen, is_causal=causal).astype(q.dtype)


def heads(x: jax.Array, number: int) -> jax.Array:
    """Splits the last axis into that many heads."""
    return x.reshape(*x.shape[:-1], number, -1)


def joined(x: jax.Array) -> jax.Array:
    """Heads side by side again."""
    return x.reshape(*x.shape[:-2], -1)
