"""TinyLLaVA-Video at its published size: one clip through tower and resampler, or on to a token.

The public model's tower is read raw by the connector, which keeps its LayerNorms from folding;
`feature_norm` reads it through the tower's last LayerNorm.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from examples.tinyllava_video.config import Config, named
from examples.tinyllava_video.model import abstract

from .models import NORMS, Factory

PROMPT = (40, 20)
"""Tokens before and after the video."""


@dataclass(frozen=True)
class Video:
    """Which part of which model, and how it spells LayerNorm."""

    name: str = "TinyLLaVA-Video-Qwen2.5-3B-Group-16-512"
    part: Literal["encoder", "first token"] = "encoder"
    feature_norm: bool = False
    norm: Factory = NORMS["two_pass"]
    dtype: Any = jnp.float32

    @property
    def sizes(self) -> Config:
        """Of the whole model."""
        sizes = named(self.name)
        return replace(sizes, vision=replace(sizes.vision, feature_norm=self.feature_norm))


class VideoModel:
    """A part of the model as a function of its parameters and a clip."""

    def __init__(self, config: Video) -> None:
        """Nothing is allocated."""
        self.config, model = config, abstract(config.sizes)
        respell(model, config.norm)
        unused = nnx.PathContains("language_model") if config.part == "encoder" else nnx.Nothing()
        self.graph, self.unused, self.shapes = nnx.split(model, unused, ...)

    def init(self, key: jax.Array, x: Any) -> Any:
        """Parameters, for their shapes."""
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), self.shapes)

    def apply(self, params: Any, x: Any) -> jax.Array:
        """Embeddings of a clip, or the first token of an answer; `x` is what `clips` describes."""
        model = nnx.merge(self.graph, self.unused, params)
        if self.config.part == "encoder":
            return model.encode_video(x["pixels"])
        return model.generate(**x, max_new_tokens=1)


def respell(model: nnx.Module, norm: Factory) -> None:
    """Has all LayerNorms of a model computed in another way, or not at all."""
    for _, module in [*nnx.iter_graph(model)]:
        for name, child in vars(module).items() if isinstance(module, nnx.Module) else ():
            if not isinstance(child, nnx.LayerNorm):
                continue
            if norm is NORMS["none"]:
                setattr(module, name, NoNorm())
            else:
                child.use_fast_variance = norm is NORMS["one_pass"]


class NoNorm(nnx.Module):
    """The identity: the model without its norms."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return `x`."""
        return x


def clips(config: Video, batch: int, length: int, dtype: Any) -> Any:
    """One clip of `batch` square frames with sides of `length`, and a prompt if it takes one."""
    pixels = {"pixels": jax.ShapeDtypeStruct((1, batch, length, length, 3), dtype)}
    if config.part == "encoder":
        return pixels
    before, after = (jax.ShapeDtypeStruct((1, n), jnp.int32) for n in PROMPT)
    return pixels | {"before": before, "after": after}
