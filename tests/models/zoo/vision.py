"""Vision transformers on a flat sequence of patches, MLP-Mixer and DiT."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from .base import Array, Case, Factory, floats, recipe
from .layers import Attention, Block, FusedAttention, Mlp, Stack, drop_path, quick_gelu
from .relative import relative_index

IMAGES = (floats(2, 8, 12, 3),), (floats(3, 8, 12, 3),)


def first_token(x: Array) -> Array:
    """Pool by taking the class token."""
    return x[:, 0]


def mean_patches(x: Array) -> Array:
    """Pool by averaging all tokens but the class token."""
    return x[:, 1:].mean(axis=1)


def first_and_mean(x: Array) -> Array:
    """Pool by the class token beside the average of the patches."""
    return jnp.concatenate([first_token(x), mean_patches(x)], axis=-1)


def sincos(grid: tuple[int, int], width: int) -> np.ndarray:
    """Return the fixed 2-D sine-cosine position table of a patch grid, (patches, width)."""
    omega = 1e4 ** -(np.arange(width // 4) / (width // 4))
    angles = np.indices(grid).reshape(2, -1).T[..., None] * omega
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1).reshape(-1, width)


class PatchStream(nn.Module):
    """Convolutional patch embedding, class token in front and positions, as (batch, token, width).

    Learned positions include the class token; the fixed table is added to the patches alone.
    """

    width: int = 24
    patch: int = 4
    use_bias: bool = True
    positions: Literal["learned", "sincos", "none"] = "learned"

    @nn.compact
    def __call__(self, images: Array, keep: Array | None = None) -> Array:
        """Embed images, keeping only the patches listed in `keep` if it is given."""
        window = (self.patch, self.patch)
        conv = nn.Conv(
            self.width, window, window, padding="VALID", use_bias=self.use_bias, name="patches"
        )
        x = conv(images)
        batch, *grid, width = x.shape
        x = x.reshape(batch, -1, width)
        if self.positions == "sincos":
            x = x + sincos(tuple(grid), width)
        if keep is not None:
            x = jnp.take_along_axis(x, keep[..., None], axis=1)
        start = nn.initializers.normal(0.02)
        cls = self.param("cls", start, (1, 1, width))
        x = jnp.concatenate([jnp.tile(cls, (batch, 1, 1)), x], axis=1)
        if self.positions == "learned":
            x = x + self.param("positions", start, (1, *x.shape[1:]))
        return drop_path(x)


class RelativeAttention(nn.Module):
    """Attention with BEiT's relative position bias over a patch grid and a class token."""

    grid: tuple[int, int]
    heads: int = 3

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Attend within `x`."""
        between = relative_index(*self.grid)
        rows = between.max() + 1
        index = np.full(np.add(between.shape, 1), rows)
        index[1:, 1:] = between
        index[1:, 0], index[0, 0] = rows + 1, rows + 2
        table = self.param("position_bias", nn.initializers.zeros, (rows + 3, self.heads))
        bias = jnp.moveaxis(table[index], -1, 0)
        return FusedAttention(self.heads, key_bias=False, name="attn")(x, bias)


class VisionTransformer(nn.Module):
    """Patch stream, pre-LN blocks, final LayerNorm before or after pooling, and a head."""

    norm: Factory
    block: Factory
    stream: Factory = PatchStream
    depth: int = 2
    pre_norm: bool = False
    pool: Callable[[Array], Array] | None = first_token
    pool_first: bool = False
    classes: int = 11
    head_bias: bool = True

    @nn.compact
    def __call__(self, images: Array, *keep: Array) -> Array:
        """Return class logits or an embedding, or the normalised tokens if there is no pooling."""
        x = self.stream(name="stream")(images, *keep)
        if self.pre_norm:
            x = self.norm(name="pre_norm")(x)
        x = Stack(self.block, self.depth, name="blocks")(x)
        norm = self.norm(name="final_norm")
        if self.pool is None:
            return norm(x)
        x = norm(self.pool(x)) if self.pool_first else self.pool(norm(x))
        return nn.Dense(self.classes, use_bias=self.head_bias, name="head")(x)


def vit(norm: Factory, depth: int = 3, normalize_qk: bool = False) -> nn.Module:
    """ViT (Dosovitskiy et al. 2021); `normalize_qk` as in ViT-22B (Dehghani et al. 2023)."""
    attention = partial(
        nn.MultiHeadDotProductAttention,
        num_heads=3,
        qkv_features=30,
        dropout_rate=0.1,
        deterministic=True,
        normalize_qk=normalize_qk,
    )
    return VisionTransformer(norm, partial(Block, norm, attention), depth=depth)


def mae(norm: Factory) -> nn.Module:
    """MAE encoder on the unmasked patches (He et al. 2022)."""
    stream = partial(PatchStream, positions="sincos")
    return VisionTransformer(norm, partial(Block, norm, FusedAttention), stream, pool=None)


def clip_vision(norm: Factory) -> nn.Module:
    """CLIP image encoder (Radford et al. 2021)."""
    norm = partial(norm, epsilon=1e-5)
    block = partial(Block, norm, mlp=partial(Mlp, act=quick_gelu))
    return VisionTransformer(
        norm,
        block,
        partial(PatchStream, use_bias=False),
        pre_norm=True,
        pool_first=True,
        head_bias=False,
    )


def dinov2(norm: Factory) -> nn.Module:
    """DINOv2 with its linear classifier (Oquab et al. 2023)."""
    block = partial(Block, norm, FusedAttention, layer_scale=True, drop=drop_path)
    return VisionTransformer(norm, block, pool=first_and_mean)


def beit(norm: Factory) -> nn.Module:
    """BEiT, fine-tuned (Bao et al. 2022)."""
    norm = partial(norm, epsilon=1e-12)
    attention = partial(RelativeAttention, (2, 3))
    block = partial(Block, norm, attention, layer_scale=True, drop=drop_path)
    stream = partial(PatchStream, positions="none")
    return VisionTransformer(norm, block, stream, pool=mean_patches, pool_first=True)


def qk_norm_stacked(norm: Factory) -> nn.Module:
    """ViT with QK-norm after one qkv kernel reshaped to (3, head, feature), as in timm."""
    return VisionTransformer(norm, partial(Block, norm, partial(FusedAttention, qk_norm=norm)))


def qk_norm_split(norm: Factory) -> nn.Module:
    """ViT with QK-norm after one qkv kernel split in three and then by head."""
    attention = partial(Attention, layout="split", qk_norm=norm)
    return VisionTransformer(norm, partial(Block, norm, attention))


class TokenMlp(nn.Module):
    """An MLP across tokens, applied to each channel alike."""

    hidden: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Mix the tokens of `x`."""
        return Mlp(self.hidden, name="mix")(x.swapaxes(1, 2)).swapaxes(1, 2)


class Mixer(nn.Module):
    """MLP-Mixer (Tolstikhin et al. 2021)."""

    norm: Factory
    token_hidden: int
    depth: int = 2

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """Return class logits."""
        x = nn.Conv(24, (4, 4), (4, 4), padding="VALID", name="stem")(images)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        block = partial(Block, self.norm, partial(TokenMlp, self.token_hidden), drop=drop_path)
        x = Stack(block, self.depth, self.norm, name="blocks")(x)
        return nn.Dense(11, name="head")(x.mean(axis=1))


class DiTBlock(nn.Module):
    """Attention and MLP between modulations and gates computed from the conditioning."""

    norm: Factory

    @nn.compact
    def __call__(self, x: Array, condition: Array) -> Array:
        """Update the stream `x`."""
        gates = nn.Dense(6 * x.shape[-1], kernel_init=nn.initializers.zeros, name="modulation")
        chunks = jnp.split(gates(nn.silu(condition))[:, None], 6, axis=-1)
        layers = {"attn": FusedAttention(name="attn"), "mlp": Mlp(name="mlp")}
        for (name, layer), (shift, scale, gate) in zip(
            layers.items(), (chunks[:3], chunks[3:]), strict=True
        ):
            x = x + gate * layer(self.norm(name=f"{name}_norm")(x) * (1 + scale) + shift)
        return x


class DiT(nn.Module):
    """Diffusion transformer with adaLN-Zero (Peebles & Xie 2023)."""

    norm: Factory
    depth: int = 2
    patch: int = 4

    @nn.compact
    def __call__(self, latents: Array, condition: Array) -> Array:
        """Return the predicted noise, of the shape of `latents`."""
        window, zeros = (self.patch, self.patch), nn.initializers.zeros
        norm = partial(self.norm, use_scale=False, use_bias=False)
        x = nn.Conv(24, window, window, padding="VALID", name="patches")(latents)
        batch, height, breadth, width = x.shape
        x = x.reshape(batch, -1, width) + sincos((height, breadth), width)
        condition = nn.Dense(width, name="condition_1")(condition)
        condition = nn.Dense(width, name="condition_2")(nn.silu(condition))
        x = Stack(partial(DiTBlock, norm), self.depth, norm, name="blocks")(x, condition)
        ends = nn.Dense(2 * width, kernel_init=zeros, name="modulation")(nn.silu(condition))
        shift, scale = jnp.split(ends[:, None], 2, axis=-1)
        patches = nn.Dense(self.patch**2 * latents.shape[-1], kernel_init=zeros, name="out")
        x = patches(x * (1 + scale) + shift).reshape(batch, height, breadth, *window, -1)
        return jnp.einsum("nhwpqc->nhpwqc", x).reshape(latents.shape)


KEEP = tuple(np.array(rows, "i4") for rows in ([[4, 0, 3], [1, 5, 2]], [[0, 2, 5, 1]] * 3))
SQUARES = (floats(2, 12, 16, 3),), (floats(3, 12, 16, 3),)
NOISE = tuple((floats(b, h, w, 5), floats(b, 7)) for b, h, w in ((2, 8, 12), (3, 12, 16)))

CASES = (
    # 2L+1: every writer of the stream is linear in a parameter that has no other reader.
    Case("vit", recipe(vit, *IMAGES), norms=7, folded=7),
    # 2L+1: the position table is a constant and is centered ahead of time.
    Case("mae", recipe(mae, *((*i, k) for i, k in zip(IMAGES, KEEP, strict=True))), 5, 5),
    # 2L+2: pre-norm reads linear writers; the stream starts at its scale and bias: 1 centering.
    Case("clip_vision", recipe(clip_vision, *IMAGES), norms=6, folded=6, inserted=1),
    # 2L+1: each LayerScale merges into the Dense before it.
    Case("dinov2", recipe(dinov2, *IMAGES), norms=5, folded=5),
    # 2L+1: as DINOv2; the last LayerNorm reads a mean over tokens.
    Case("beit", recipe(beit, *IMAGES), norms=5, folded=5),
    # 2L+1 on the stream and 2L on queries and keys, which are Dense outputs per head.
    Case("vit_normalize_qk", recipe(partial(vit, depth=2, normalize_qk=True), *IMAGES), 9, 9),
    # The same, when only the q and k columns of one kernel may be centered.
    Case("qk_norm_stacked", recipe(qk_norm_stacked, *IMAGES), norms=9, folded=9),
    Case("qk_norm_split", recipe(qk_norm_split, *IMAGES), norms=9, folded=9),
    # 1: a token-mixing output needs a centering (2 units) that serves two norms (1 + 1): a tie.
    Case("mixer_wide", recipe(partial(Mixer, token_hidden=17), *SQUARES), norms=5, folded=1),
    # 2L+1: centering the 5 hidden tokens costs 2 * 5/12 of a norm and serves two, L times.
    Case("mixer_narrow", recipe(partial(Mixer, token_hidden=5), *SQUARES), 5, 5, inserted=2),
    # 1: data-dependent gates per channel; a centering after each (2) serves one norm (1) each.
    Case("dit", recipe(DiT, *NOISE), norms=5, folded=1),
)
