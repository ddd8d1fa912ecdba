"""Sizes of the model, the public ones by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .errors import InputError


@dataclass(frozen=True)
class SiglipConfig:
    """The vision tower; the defaults are so400m, patch 14, 384 px.

    `feature_layer` counts hidden states as PyTorch does: 0 is the embeddings, -1 the last block.
    """

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_hidden_layers: int = 27
    num_attention_heads: int = 16
    image_size: int = 384
    patch_size: int = 14
    layer_norm_eps: float = 1e-6
    feature_layer: int = -2
    drop_first_token: bool = True
    feature_norm: bool = False
    """Whether features pass through `post_layernorm`. The public model reads the raw stream."""

    @property
    def tokens(self) -> int:
        """Of one image, without those dropped (pixels beyond the last whole patch are not read)."""
        return (self.image_size // self.patch_size) ** 2 - self.drop_first_token

    @property
    def feature_depth(self) -> int:
        """How many blocks the features have passed."""
        return range(self.num_hidden_layers + 1)[self.feature_layer]


Positions = Literal["queries", "media", "none"]


@dataclass(frozen=True)
class ResamplerConfig:
    """The connector: `num_queries` latents in `groups`; the naive one has one.

    `positions` says what a table of sines is added to: the queries' results, as in the group
    resampler, the media before they are read, as in the naive one, or nothing.
    """

    num_queries: int = 512
    groups: int = 16
    num_layers: int = 3
    num_heads: int = 8
    head_dim: int = 64
    positions: Positions = "queries"
    position_dtype: str = "float16"
    """The public models round their table of positions to half precision."""

    def __post_init__(self) -> None:
        """Groups share their latents."""
        if self.groups < 1 or self.num_queries % self.groups:
            raise InputError(
                f"num_queries: {self.num_queries} are not divisible by {self.groups} groups"
            )


@dataclass(frozen=True)
class Qwen2Config:
    """A Qwen2 decoder (RMSNorms only); the defaults are Qwen2.5-3B."""

    vocab_size: int = 151936
    hidden_size: int = 2048
    intermediate_size: int = 11008
    num_hidden_layers: int = 36
    num_attention_heads: int = 16
    num_key_value_heads: int = 2
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    tie_word_embeddings: bool = True


@dataclass(frozen=True)
class PhiConfig:
    """A Phi decoder (parallel blocks, LayerNorms); the defaults are Phi-2."""

    vocab_size: int = 51200
    hidden_size: int = 2560
    intermediate_size: int = 10240
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    layer_norm_eps: float = 1e-5
    rope_theta: float = 1e4
    partial_rotary_factor: float = 0.4
    tie_word_embeddings: bool = False


@dataclass(frozen=True)
class Config:
    """The whole model. `context` is the number of positions, video and answer included."""

    vision: SiglipConfig = SiglipConfig()
    resampler: ResamplerConfig = ResamplerConfig()
    text: Qwen2Config | PhiConfig = Qwen2Config()
    context: int = 3072
    num_frames: int = 16
    """Sampled uniformly; -1 takes one frame a second."""
    max_frames: int = 64
    """At most as many of the latter; the authors used 64 and 128."""


_TINY_VISION = SiglipConfig(24, 40, 3, 3, image_size=30, patch_size=7)
_TINY_RESAMPLER = ResamplerConfig(num_queries=12, groups=4, num_layers=2, num_heads=2, head_dim=8)

_NAIVE = ResamplerConfig(groups=1, positions="media")

CONFIGS: dict[str, Config] = {
    "TinyLLaVA-Video-Qwen2.5-3B-Group-16-512": Config(),
    "TinyLLaVA-Video-Qwen2.5-3B-Group-1fps-512": Config(num_frames=-1),
    "TinyLLaVA-Video-Qwen2.5-3B-Naive-16-512": Config(resampler=_NAIVE),
    "TinyLLaVA-Video-Phi2-Naive-16-512": Config(resampler=_NAIVE, text=PhiConfig()),
    "TinyLLaVA-Video-R1": Config(),
    "tiny-qwen2": Config(
        _TINY_VISION,
        _TINY_RESAMPLER,
        Qwen2Config(257, 32, 48, 2, 4, 2),
        context=1024,
        num_frames=5,
    ),
    "tiny-phi": Config(
        _TINY_VISION,
        _TINY_RESAMPLER,
        PhiConfig(257, 40, 64, 2, 4, 4),
        context=1024,
        num_frames=5,
    ),
}
"""The published models by their names, and tiny ones for trying things out with random weights."""


def named(name: str) -> Config:
    """A configuration by its name.

    Raises:
        InputError: there is none of that name.
    """
    if name not in CONFIGS:
        raise InputError(f"config: there is no {name!r}; there are {', '.join(CONFIGS)}")
    return CONFIGS[name]


Variant = Literal["qwen2", "phi"]


def variant(config: Config) -> Variant:
    """Which language model it has."""
    return "qwen2" if isinstance(config.text, Qwen2Config) else "phi"
