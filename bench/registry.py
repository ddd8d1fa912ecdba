"""Models by name, with their published sizes and the inputs that they take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from .models import (
    GPT,
    Bert,
    ClipText,
    Config,
    Decoder,
    PostEncoder,
    Swin,
    ViT,
    WhisperEncoder,
    quick_gelu,
)
from .small import GraphNet, Mixer, Policy, Recommender, Small
from .video import Video, VideoModel, clips

Inputs = Callable[[Any, int, int, Any], Any]
"""Shapes of the inputs, by (config, batch, length, dtype)."""


def images(config: Config, batch: int, length: int, dtype: Any) -> Any:
    """Square images; the length is that of a side."""
    return jax.ShapeDtypeStruct((batch, length, length, 3), dtype)


def tokens(config: Config, batch: int, length: int, dtype: Any) -> Any:
    """Token ids."""
    return jax.ShapeDtypeStruct((batch, length), jnp.int32)


def mels(config: Config, batch: int, length: int, dtype: Any) -> Any:
    """Spectrograms."""
    return jax.ShapeDtypeStruct((batch, length, 80), dtype)


def streams(config: Config, batch: int, length: int, dtype: Any) -> Any:
    """What blocks take."""
    return jax.ShapeDtypeStruct((batch, length, config.width), dtype)


def cached(config: Config, batch: int, length: int, dtype: Any) -> Any:
    """One token each, with keys and values of `length` positions."""
    shape = batch, length, config.heads, config.width // config.heads
    layer = (jax.ShapeDtypeStruct(shape, dtype),) * 2
    return {
        "ids": jax.ShapeDtypeStruct((batch, 1), jnp.int32),
        "position": jax.ShapeDtypeStruct((), jnp.int32),
        "cache": [layer] * config.depth,
    }


def rows(config: Small, batch: int, length: int, dtype: Any) -> Any:
    """Rows of features."""
    return jax.ShapeDtypeStruct((batch * length, config.inputs), dtype)


def sequences(config: Small, batch: int, length: int, dtype: Any) -> Any:
    """Patches, by position."""
    return jax.ShapeDtypeStruct((batch, length, config.inputs), dtype)


def choices(config: Small, batch: int, length: int, dtype: Any) -> Any:
    """Ids of eight features."""
    return jax.ShapeDtypeStruct((batch * length, 8), jnp.int32)


@dataclass(frozen=True)
class Entry:
    """A model by its class and sizes, and the inputs that it takes."""

    make: Callable[[Any], Any]
    config: Any
    inputs: Inputs
    length: int


BASE = Config(12, 768, 12)
GPT2 = replace(BASE, causal=True)
XL = Config(48, 1600, 25, causal=True)
MODELS: dict[str, Entry] = {
    "vit_s": Entry(ViT, Config(12, 384, 6), images, 224),
    "vit_b": Entry(ViT, BASE, images, 224),
    "vit_l": Entry(ViT, Config(24, 1024, 16), images, 224),
    "vit_b_qk_norm": Entry(ViT, replace(BASE, qk_norm=True), images, 224),
    "dinov2_b": Entry(partial(ViT, patch=14), replace(BASE, layer_scale=True), images, 224),
    "swin_t": Entry(Swin, Config(12, 96, 3), images, 224),
    "gpt2": Entry(GPT, GPT2, tokens, 512),
    "gpt2_xl": Entry(GPT, XL, tokens, 512),
    "gpt2_decode": Entry(Decoder, GPT2, cached, 1024),
    "gpt2_xl_decode": Entry(Decoder, XL, cached, 1024),
    "whisper_base_encoder": Entry(WhisperEncoder, Config(6, 512, 8), mels, 3000),
    "clip_l_text": Entry(ClipText, replace(GPT2, act=quick_gelu), tokens, 77),
    "bert_base": Entry(Bert, BASE, tokens, 512),
    "post_ln_768": Entry(PostEncoder, Config(3, 768, 12), streams, 256),
    "post_ln_384": Entry(PostEncoder, Config(3, 384, 6), streams, 256),
    "policy": Entry(Policy, Small(4, 256, 256), rows, 8192),
    "policy_narrow": Entry(Policy, Small(4, 256, 32), rows, 8192),
    "policy_wide": Entry(Policy, Small(4, 1024, 32), rows, 2048),
    "mixer": Entry(Mixer, Small(4, 128, 64), sequences, 64),
    "graph_net": Entry(GraphNet, Small(4, 128, 32), rows, 8192),
    "recommender": Entry(Recommender, Small(3, 256, 64, 32, 1), choices, 4096),
    "video_encoder": Entry(VideoModel, Video(), clips, 384),
    "video_encoder_normed": Entry(VideoModel, Video(feature_norm=True), clips, 384),
    "video_first_token": Entry(VideoModel, Video(part="first token"), clips, 384),
    "video_first_token_phi": Entry(
        VideoModel, Video("TinyLLaVA-Video-Phi2-Naive-16-512", part="first token"), clips, 384
    ),
}
"""The batch of the models of video is one clip's number of frames."""
