"""A LayerNorm that is a Pallas kernel for TPU, declared with its RMS twin, so that it folds."""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

import jax_lnfold

ROWS = 256
"""Tokens that are normalised at once; their features lie in the chip's fast memory."""


def norm_kernel(x_ref: Any, scale_ref: Any, shift_ref: Any, y_ref: Any, *, center: bool) -> None:
    """Some tokens with all their features, in float32."""
    x = x_ref[...].astype(jnp.float32)
    if center:
        x = x - jnp.mean(x, -1, keepdims=True)
    y = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
    y_ref[...] = (y * scale_ref[...] + shift_ref[...]).astype(y_ref.dtype)


def normalised(x: jax.Array, scale: jax.Array, shift: jax.Array, center: bool) -> jax.Array:
    """``[..., width]`` to the same."""
    tokens = x.reshape(-1, x.shape[-1])
    count, width = tokens.shape
    rows = min(ROWS, count)
    block = pl.BlockSpec((rows, width), lambda i: (i, 0))
    whole = pl.BlockSpec((1, width), lambda i: (0, 0))
    call = pl.pallas_call(
        partial(norm_kernel, center=center),
        grid=(pl.cdiv(count, rows),),
        in_specs=[block, whole, whole],
        out_specs=block,
        out_shape=jax.ShapeDtypeStruct(tokens.shape, x.dtype),
    )
    return call(tokens, scale[None], shift[None]).reshape(x.shape)


layer_norm = jax_lnfold.layer_norm(
    partial(normalised, center=True),
    rms=partial(normalised, center=False),
    scale="scale",
    shift="shift",
    name="pallas_norm",
    check=False,  # there is no TPU where this is compiled
)


class PallasNorm(nn.Module):
    """`flax.linen.LayerNorm` over the last axis, by the kernel."""

    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``[..., width]`` to the same."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        shift = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        return layer_norm(x if self.dtype is None else x.astype(self.dtype), scale, shift)
