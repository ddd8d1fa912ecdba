"""Vision models on feature maps: Swin, Swin V2 and ConvNeXt."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from .base import Array, Case, Factory, floats, recipe
from .layers import Block, FusedAttention, LayerScale, Mlp, Order, drop_path
from .relative import offsets, relative_index


def to_windows(x: Any, window: int) -> Any:
    """Cut (batch, height, width, channel) into (batch * windows, tokens, channel)."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // window, window, width // window, window, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, window**2, channels)


def from_windows(x: Array, window: int, height: int, width: int) -> Array:
    """Put the windows back together."""
    x = x.reshape(-1, height // window, width // window, window, window, x.shape[-1])
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, height, width, x.shape[-1])


def shift_mask(height: int, width: int, window: int, shift: int) -> np.ndarray:
    """Forbid attention across the seam of a shifted map, (windows, tokens, tokens)."""
    regions = np.zeros((1, height, width, 1))
    cuts = [slice(0, -window), slice(-window, -shift), slice(-shift, None)]
    for number, (rows, columns) in enumerate((r, c) for r in cuts for c in cuts):
        regions[:, rows, columns] = number
    cells = to_windows(regions, window)[..., 0]
    return np.where(cells[:, :, None] != cells[:, None, :], -100.0, 0.0)


class WindowAttention(nn.Module):
    """Attention within (shifted) windows of a feature map, with a relative position bias.

    The bias is a table, or with `continuous` a small MLP of log-spaced offsets and cosine
    attention (Swin V2).
    """

    heads: int
    window: int
    shift: int
    continuous: bool = False

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Attend within the windows of `x`."""
        _, height, width, _ = x.shape
        x = jnp.roll(x, (-self.shift, -self.shift), axis=(1, 2)) if self.shift else x
        windows = to_windows(x, self.window)
        bias = self.continuous_bias() if self.continuous else self.table_bias()
        if self.shift:
            mask = shift_mask(height, width, self.window, self.shift)[:, None]
            bias = jnp.tile(bias + mask, (len(windows) // len(mask), 1, 1, 1))
        attention = FusedAttention(
            self.heads, 5, key_bias=not self.continuous, cosine=self.continuous, name="attn"
        )
        x = from_windows(attention(windows, bias), self.window, height, width)
        return jnp.roll(x, (self.shift, self.shift), axis=(1, 2)) if self.shift else x

    def table_bias(self) -> Array:
        """Look the bias up by offset, (heads, tokens, tokens)."""
        index = relative_index(self.window, self.window)
        shape = ((2 * self.window - 1) ** 2, self.heads)
        table = self.param("position_bias", nn.initializers.normal(0.02), shape)
        return table[index.reshape(-1)].reshape(*index.shape, -1).transpose(2, 0, 1)

    def continuous_bias(self) -> Array:
        """Compute the bias from offset, (heads, tokens, tokens)."""
        steps = 8 * offsets(self.window, self.window) / (self.window - 1)
        spaced = np.sign(steps) * np.log2(np.abs(steps) + 1) / np.log2(8)
        hidden = nn.relu(nn.Dense(16, name="cpb_1")(spaced))
        bias = nn.Dense(self.heads, use_bias=False, name="cpb_2")(hidden)
        return 16 * nn.sigmoid(jnp.moveaxis(bias, -1, 0))


class PatchMerging(nn.Module):
    """Join each 2x2 square of tokens, normalise over all their channels, and project."""

    norm: Factory

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Halve the height and width of `x`, and double its channels."""
        corners = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        x = self.norm(name="norm")(jnp.concatenate(corners, axis=-1))
        return nn.Dense(x.shape[-1] // 2, use_bias=False, name="reduction")(x)


class Swin(nn.Module):
    """Swin Transformer (Liu et al. 2021), or V2 with res-post-norm (Liu et al. 2022)."""

    norm: Factory
    heads: Sequence[int] = (2, 3, 3)
    width: int = 12
    window: int = 2
    v2: bool = False

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """Return class logits; every stage has two blocks, the second with shifted windows."""
        norm = partial(self.norm, epsilon=1e-5)
        x = nn.Conv(self.width, (2, 2), (2, 2), padding="VALID", name="patches")(images)
        x = norm(name="patch_norm")(x)
        for stage, heads in enumerate(self.heads):
            if stage:
                x = PatchMerging(norm, name=f"merge_{stage}")(x)
            for index, shift in enumerate((0, self.window // 2)):
                attention = partial(WindowAttention, heads, self.window, shift, self.v2)
                order: Order = "res_post" if self.v2 else "pre"
                block = Block(
                    norm, attention, Mlp, order, drop=drop_path, name=f"stage_{stage}_{index}"
                )
                x = block(x)
        x = norm(name="final_norm")(x)
        return nn.Dense(11, name="head")(x.mean(axis=(1, 2)))


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution, LayerNorm, pointwise MLP and LayerScale on a residual branch."""

    norm: Factory

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Update the feature map `x`."""
        channels = x.shape[-1]
        y = nn.Conv(channels, (7, 7), feature_group_count=channels, name="depthwise")(x)
        y = Mlp(3 * channels, name="mlp")(self.norm(name="norm")(y))
        return x + drop_path(LayerScale(name="scale")(y))


class ConvNeXt(nn.Module):
    """ConvNeXt (Liu et al. 2022)."""

    norm: Factory
    depths: Sequence[int] = (2, 1)
    widths: Sequence[int] = (12, 20)

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """Return class logits."""
        x = nn.Conv(self.widths[0], (4, 4), (4, 4), padding="VALID", name="stem")(images)
        x = self.norm(name="stem_norm")(x)
        for stage, (depth, width) in enumerate(zip(self.depths, self.widths, strict=True)):
            if stage:
                x = self.norm(name=f"down_norm_{stage}")(x)
                x = nn.Conv(width, (2, 2), (2, 2), padding="VALID", name=f"down_{stage}")(x)
            for index in range(depth):
                x = ConvNeXtBlock(self.norm, name=f"stage_{stage}_{index}")(x)
        x = self.norm(name="final_norm")(x.mean(axis=(1, 2)))
        return nn.Dense(11, name="head")(x)


SWIN = (floats(2, 32, 48, 3),), (floats(3, 32, 32, 3),)
SMALL = (floats(2, 8, 12, 3),), (floats(3, 12, 8, 3),)
CONVNEXT = (floats(2, 16, 24, 3),), (floats(3, 24, 16, 3),)

CASES = (
    # Patch norm, 4 of the last stage and the final norm; 4 blocks' norms and 1 merging norm stay
    # in each of the two stages before, whose streams the merging norm must see uncentered.
    Case("swin", recipe(Swin, *SWIN), norms=16, folded=6),
    # Patch norm and 2L read a conv or Dense; the stream is a sum of scaled norms: the last stays.
    Case("swin_v2", recipe(partial(Swin, heads=(3,), v2=True), *SMALL), norms=6, folded=5),
    # Stem norm reads a conv; depthwise convolutions read the stream, which therefore must stay.
    Case("convnext", recipe(ConvNeXt, *CONVNEXT), norms=6, folded=1),
)
