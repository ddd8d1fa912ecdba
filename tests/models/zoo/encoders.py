"""BERT, BART and both halves of Whisper."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from .base import VOCAB, Array, Case, Factory, floats, lengths_mask, recipe, tokens
from .language import TextEmbed
from .layers import Attention, Block, Mlp, Stack, dropout, exact_gelu

WIDTH = 24


def sinusoids(length: int, width: int) -> np.ndarray:
    """Return fixed 1-D positions, sines before cosines, (length, width)."""
    omega = 1e4 ** -(np.arange(width // 2) / (width // 2 - 1))
    angles = np.outer(np.arange(length), omega)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


class Bert(nn.Module):
    """BERT sequence classifier (Devlin et al. 2019)."""

    norm: Factory
    depth: int = 2

    @nn.compact
    def __call__(self, ids: Array, types: Array, padding: Array) -> Array:
        """Return class logits from the pooled first token."""
        norm = partial(self.norm, epsilon=1e-12)
        block = partial(Block, norm, mlp=partial(Mlp, act=exact_gelu), order="post")
        x = TextEmbed(WIDTH, positions=16, name="embed")(ids)
        x = x + nn.Embed(2, WIDTH, name="types")(types)
        x = dropout(norm(name="embed_norm")(x))
        bias = jnp.where(padding[:, None, None, :] > 0, 0.0, -1e9)
        x = Stack(block, self.depth, name="blocks")(x, bias=bias)
        pooled = jnp.tanh(nn.Dense(WIDTH, name="pooler")(x[:, 0]))
        return nn.Dense(5, name="classifier")(dropout(pooled))


class Bart(nn.Module):
    """BART (Lewis et al. 2020), one token table for both sides and a head of its own."""

    norm: Factory
    depth: int = 2

    @nn.compact
    def __call__(self, source: Array, target: Array) -> Array:
        """Return next-token logits for `target`."""
        norm = partial(self.norm, epsilon=1e-5)
        block = partial(Block, norm, mlp=partial(Mlp, act=exact_gelu), order="post")
        shared = nn.Embed(VOCAB, WIDTH, name="shared")

        def embed(ids: Array, side: str) -> Array:
            places = nn.Embed(16 + 2, WIDTH, name=f"{side}_positions")
            x = shared(ids) + places(jnp.arange(ids.shape[1]) + 2)
            return dropout(norm(name=f"{side}_embed_norm")(x))

        memory = Stack(block, self.depth, name="encoder")(embed(source, "encoder"))
        mask = nn.make_causal_mask(target, dtype=bool)
        x = embed(target, "decoder")
        x = Stack(block, self.depth, name="decoder")(x, memory, mask=mask)
        logits = nn.Dense(VOCAB, use_bias=False, name="head")(x)
        return logits + self.param("logits_bias", nn.initializers.zeros, (1, VOCAB))


def whisper_block(norm: Factory) -> Factory:
    """Pre-LN block whose keys have no bias."""
    attention = partial(Attention, key_bias=False)
    return partial(Block, norm, attention, partial(Mlp, act=exact_gelu))


class WhisperEncoder(nn.Module):
    """Whisper encoder (Radford et al. 2022)."""

    norm: Factory
    depth: int = 2

    @nn.compact
    def __call__(self, mels: Array) -> Array:
        """Encode a spectrogram, (batch, frame, mel)."""
        norm = partial(self.norm, epsilon=1e-5)
        x = exact_gelu(nn.Conv(WIDTH, (3,), padding=1, name="conv_1")(mels))
        x = exact_gelu(nn.Conv(WIDTH, (3,), strides=2, padding=1, name="conv_2")(x))
        x = dropout(x + sinusoids(32, WIDTH)[: x.shape[1]])
        return Stack(whisper_block(norm), self.depth, norm, name="blocks")(x)


class WhisperDecoder(nn.Module):
    """Whisper decoder on given encoder states (Radford et al. 2022)."""

    norm: Factory
    depth: int = 2

    @nn.compact
    def __call__(self, ids: Array, states: Array) -> Array:
        """Return next-token logits against the token table."""
        norm = partial(self.norm, epsilon=1e-5)
        embed = TextEmbed(WIDTH, positions=16, name="embed")
        mask = nn.make_causal_mask(ids, dtype=bool)
        stack = Stack(whisper_block(norm), self.depth, norm, name="blocks")
        return embed.attend(stack(dropout(embed(ids)), states, mask=mask))


def segments(batch: int, length: int, first: int) -> np.ndarray:
    """Return token types: 0 for the first segment's tokens and 1 for the rest."""
    return 1 - lengths_mask(length, *[first] * batch)


CLASSIFIED = (
    (tokens(2, 7), segments(2, 7, 3), lengths_mask(7, 7, 5)),
    (tokens(3, 11), segments(3, 11, 6), lengths_mask(11, 8, 11, 10)),
)
TRANSLATED = (tokens(2, 9), tokens(2, 7)), (tokens(3, 5), tokens(3, 11))
SPEECH = (floats(2, 14, 5),), (floats(3, 20, 5),)
TRANSCRIBED = (tokens(2, 5), floats(2, 8, WIDTH)), (tokens(3, 9), floats(3, 6, WIDTH))

CASES = (
    # 1, the embedding norm: after it every norm reads a scale and bias plus a Dense, and the
    # centering that would fold one costs twice as much.
    Case("bert", recipe(Bert, *CLASSIFIED), norms=5, folded=1),
    # 2, both embedding norms: the shared table is read by these alone; post-LN as BERT.
    Case("bart", recipe(Bart, *TRANSLATED), norms=12, folded=2),
    # 2L+1: the stream starts at a gelu, which is centered once.
    Case("whisper_encoder", recipe(WhisperEncoder, *SPEECH), norms=5, folded=5, inserted=1),
    # 3L+1: the tied table's rows are centered once; cross-attention writes linearly.
    Case("whisper_decoder", recipe(WhisperDecoder, *TRANSCRIBED), norms=7, folded=7, inserted=1),
)
