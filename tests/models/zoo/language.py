"""Decoder-only language models and CLIP's text encoder."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from .base import VOCAB, Array, Case, Factory, lengths_mask, recipe, tokens
from .layers import Attention, Block, Mlp, ParallelBlock, Stack, dropout, quick_gelu, rotary


def alibi(heads: int, length: int) -> np.ndarray:
    """Return ALiBi's bias, a slope per head times the key's position, (1, heads, 1, length)."""
    slopes = 2.0 ** (-8 * np.arange(1, heads + 1) / heads)
    return (slopes[:, None, None] * np.arange(length))[None]


class TextEmbed(nn.Module):
    """Token embeddings plus learned positions, if any, from a table that starts at `offset`."""

    width: int = 24
    positions: int = 0
    offset: int = 0

    def setup(self) -> None:
        """Create the tables."""
        self.token_table = nn.Embed(VOCAB, self.width)
        if self.positions:
            self.position_table = nn.Embed(self.positions + self.offset, self.width)

    def __call__(self, ids: Array, mask: Array | None = None) -> Array:
        """Embed tokens, counting positions over the tokens that `mask` keeps."""
        x = self.token_table(ids)
        if self.positions:
            places = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
            if mask is not None:
                places = jnp.cumsum(mask, axis=1) * mask - 1
            x = x + self.position_table(places + self.offset)
        return x

    def attend(self, x: Array) -> Array:
        """Return logits against the token table."""
        return self.token_table.attend(x)


class CausalLM(nn.Module):
    """Embeddings, causal blocks, final LayerNorm, and a head that may be tied to the embeddings."""

    norm: Factory
    block: Factory
    embed: Factory = TextEmbed
    embed_norm: bool = False
    alibi_heads: int = 0
    tied: bool = False
    head_bias: bool = False
    depth: int = 2

    @nn.compact
    def __call__(self, ids: Array, padding: Array | None = None) -> Array:
        """Return next-token logits."""
        embed = self.embed(name="embed")
        x = dropout(embed(ids, padding))
        if self.embed_norm:
            x = self.norm(name="embed_norm")(x)
        masks = {"mask": nn.make_causal_mask(ids, dtype=bool)}
        if padding is not None:
            keys = padding[:, None, None, :].astype(bool)
            masks["mask"] = nn.combine_masks(masks["mask"], keys, dtype=bool)
        if self.alibi_heads:
            masks["bias"] = alibi(self.alibi_heads, ids.shape[1])
        x = Stack(self.block, self.depth, self.norm, name="blocks")(x, **masks)
        if self.tied:
            return embed.attend(x)
        return nn.Dense(VOCAB, use_bias=self.head_bias, name="head")(x)


class ClipText(nn.Module):
    """CLIP text encoder (Radford et al. 2021)."""

    norm: Factory
    depth: int = 3

    @nn.compact
    def __call__(self, ids: Array) -> Array:
        """Return the projected state of each text's end token, the one of the largest id."""
        norm = partial(self.norm, epsilon=1e-5)
        block = partial(Block, norm, mlp=partial(Mlp, act=quick_gelu))
        x = TextEmbed(positions=16, name="embed")(ids)
        mask = nn.make_causal_mask(ids, dtype=bool)
        x = Stack(block, self.depth, norm, name="blocks")(x, mask=mask)
        pooled = x[jnp.arange(len(x)), ids.argmax(axis=-1)]
        return nn.Dense(13, use_bias=False, name="projection")(pooled)


def gpt2(norm: Factory, tied: bool = True) -> nn.Module:
    """GPT-2 (Radford et al. 2019), by default with its tied head."""
    norm = partial(norm, epsilon=1e-5)
    block = partial(Block, norm, partial(Attention, layout="split"))
    return CausalLM(norm, block, partial(TextEmbed, positions=16), tied=tied)


def gptj(norm: Factory) -> nn.Module:
    """GPT-J (Wang & Komatsuzaki 2021): one norm per block, attention and MLP in parallel."""
    rotate = partial(rotary, features=6, interleaved=True)
    attention = partial(Attention, use_bias=False, rotate=rotate)
    return CausalLM(norm, partial(ParallelBlock, norm, attention), head_bias=True, depth=3)


def gpt_neox(norm: Factory) -> nn.Module:
    """GPT-NeoX (Black et al. 2022): two norms of the same stream per block."""
    rotate = partial(rotary, features=4, interleaved=False)
    attention = partial(Attention, layout="per_head", rotate=rotate)
    return CausalLM(norm, partial(ParallelBlock, norm, attention, shared_norm=False))


def opt(norm: Factory) -> nn.Module:
    """OPT (Zhang et al. 2022): positions are counted from the padding mask, at an offset of 2."""
    norm = partial(norm, epsilon=1e-5)
    block = partial(Block, norm, mlp=partial(Mlp, act=nn.relu))
    return CausalLM(norm, block, partial(TextEmbed, positions=16, offset=2), tied=True)


def bloom(norm: Factory) -> nn.Module:
    """BLOOM (Le Scao et al. 2022): a LayerNorm after the embeddings, ALiBi, tied head."""
    norm = partial(norm, epsilon=1e-5)
    block = partial(Block, norm, partial(Attention, layout="per_head"))
    return CausalLM(norm, block, embed_norm=True, alibi_heads=3, tied=True)


TEXT = (tokens(2, 7),), (tokens(3, 11),)
PADDED = (tokens(2, 7), lengths_mask(7, 7, 5)), (tokens(3, 11), lengths_mask(11, 4, 11, 9))

CASES = (
    # 2L+1: the logits forbid editing the table, so its looked-up rows are centered once.
    Case("gpt2", recipe(gpt2, *TEXT), norms=5, folded=5, inserted=1),
    # 2L+1: both tables are read by the stream alone.
    Case("gpt_untied", recipe(partial(gpt2, tied=False), *TEXT), norms=5, folded=5),
    # L+1: one norm per block.
    Case("gptj", recipe(gptj, *TEXT), norms=4, folded=4),
    # 2L+1: two norms per block.
    Case("gpt_neox", recipe(gpt_neox, *TEXT), norms=5, folded=5),
    # 2L+1: as GPT-2.
    Case("opt", recipe(opt, *PADDED), norms=5, folded=5, inserted=1),
    # 2L+1 of 2L+2: the stream starts at the embedding norm's scale and bias: 1 centering; that
    # norm itself reads rows of the tied table and would need another for its own sake.
    Case("bloom", recipe(bloom, *TEXT), norms=6, folded=5, inserted=1),
    # 2L+1: as the untied GPT.
    Case("clip_text", recipe(ClipText, *TEXT), norms=7, folded=7),
)
