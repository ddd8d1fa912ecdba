"""Models most of whose LayerNorms keep a mean that no edit of parameters removes.

As in `models`, all submodules but the norms have the same names whatever the norm.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn

from .models import Block, Net, mlp, norm, patches, post_ln, small


class PostLN(Net):
    """An encoder as BERT's: a norm behind each sum."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images of shape ``[batch, height, width, channels]`` to logits."""
        x = patches(images, self.width)
        x = x + self.param("positions", small, (1, *x.shape[1:]))
        x = post_ln(norm(self.kind, "norm")(x), self.depth, self.heads, self.kind)
        return nn.Dense(self.classes, name="head")(x.mean(axis=1))


class Dropout(Net):
    """A pre-LN ViT whose branches are dropped number by number: each drop shifts the mean."""

    @nn.compact
    def __call__(self, images: jax.Array, key: jax.Array, kept: jax.Array) -> jax.Array:
        """Logits of images; `kept` is the share that stays, 1 where nothing is drawn."""

        def drop(x: jax.Array, n: int) -> jax.Array:
            mask = jax.random.bernoulli(jax.random.fold_in(key, n), kept, x.shape)
            return x * mask / kept

        x = patches(images, self.width)
        x = x + self.param("positions", small, (1, *x.shape[1:]))
        for i in range(self.depth):
            y = norm(self.kind, f"norm_attention_{i}")(x)
            y = nn.MultiHeadDotProductAttention(self.heads, name=f"attention_{i}")(y)
            x = x + drop(y, 2 * i)
            x = x + drop(mlp(norm(self.kind, f"norm_mlp_{i}")(x), f"_{i}"), 2 * i + 1)
        return nn.Dense(self.classes, name="head")(norm(self.kind, "norm")(x).mean(axis=1))


class MLP(Net):
    """Layers with a norm behind the activation."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images of shape ``[batch, height, width, channels]`` to logits."""
        x = images.reshape(len(images), -1)
        for i in range(self.depth):
            x = nn.gelu(nn.Dense(4 * self.width, name=f"layer_{i}")(x))
            x = norm(self.kind, f"norm_{i}")(x)
        return nn.Dense(self.classes, name="head")(x)


class ConvNet(Net):
    """Blocks as ConvNeXt's: the norm reads a depthwise convolution."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images of shape ``[batch, height, width, channels]`` to logits."""
        x = nn.Conv(self.width, kernel_size=(2, 2), strides=(2, 2), name="stem")(images)
        for i in range(self.depth):
            depthwise = nn.Conv(
                self.width, kernel_size=(3, 3), feature_group_count=self.width, name=f"depth_{i}"
            )
            x = x + mlp(norm(self.kind, f"norm_{i}")(depthwise(x)), f"_{i}")
        x = norm(self.kind, "norm")(x.mean(axis=(1, 2)))
        return nn.Dense(self.classes, name="head")(x)


class Swin(Net):
    """Attention in windows that move, and a merge of four neighbours before the last blocks."""

    window: int = 4

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images of shape ``[batch, height, width, channels]`` to logits."""
        x = nn.Dense(self.width, name="pixels")(images)
        x = x + self.param("positions", small, (1, *x.shape[1:]))
        for i in range(self.depth):
            x = self._in_windows(x, self.window // 2 * (i % 2), f"block_{i}")
        x = jnp.concatenate([x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)], axis=-1)
        x = nn.Dense(2 * self.width, use_bias=False, name="merge")(norm(self.kind, "norm_merge")(x))
        x = self._in_windows(x, 0, "last")
        x = norm(self.kind, "norm")(x).mean(axis=(1, 2))
        return nn.Dense(self.classes, name="head")(x)

    def _in_windows(self, x: jax.Array, shift: int, name: str) -> jax.Array:
        n, size, w = len(x), x.shape[1], self.window
        x = jnp.roll(x, (-shift, -shift), axis=(1, 2))
        x = x.reshape(n, size // w, w, size // w, w, -1).swapaxes(2, 3)
        shape = x.shape
        x = Block(self.heads, self.kind, name=name)(x.reshape(-1, w * w, shape[-1]))
        x = x.reshape(shape).swapaxes(2, 3).reshape(n, size, size, -1)
        return jnp.roll(x, (shift, shift), axis=(1, 2))


class DiT(Net):
    """Tells the noise of an image; what it is told scales, shifts and gates each branch."""

    @nn.compact
    def __call__(self, images: jax.Array, level: jax.Array, labels: jax.Array) -> jax.Array:
        """Maps noisy images, levels of noise in [0, 1] and labels to the noise."""
        x = patches(images, self.width)
        x = x + self.param("positions", small, (1, *x.shape[1:]))
        waves = 2.0 ** jnp.arange(4) * level[:, None]
        told = nn.Dense(self.width, name="level")(
            jnp.concatenate([jnp.sin(waves), jnp.cos(waves)], 1)
        )
        told = nn.silu(told + nn.Embed(self.classes, self.width, name="labels")(labels))
        bare = partial(norm, self.kind, learned=False)
        for i in range(self.depth):
            each = nn.Dense(6 * self.width, kernel_init=small, name=f"told_{i}")(told)
            a, b, c, d, e, f = jnp.split(each[:, None], 6, axis=-1)
            y = bare(f"norm_attention_{i}")(x) * (1 + a) + b
            x = x + c * nn.MultiHeadDotProductAttention(self.heads, name=f"attention_{i}")(y)
            y = bare(f"norm_mlp_{i}")(x) * (1 + d) + e
            x = x + f * mlp(y, f"_{i}")
        x = nn.Dense(4, name="head")(bare("norm")(x))
        side = images.shape[1] // 2
        x = x.reshape(len(images), side, side, 2, 2).swapaxes(2, 3)
        return x.reshape(images.shape)
