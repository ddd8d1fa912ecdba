"""Where each parameter of the model is in a public checkpoint, and how it lies there.

Two tables of names, one of orders of axes; both directions follow from them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from flax import nnx

from .config import Variant, variant
from .model import TinyLlavaVideo

Path = tuple[str | int, ...]
"""Of a parameter in `nnx.state(model)`."""

PARTS = (
    ("vision_tower.layers.", "vision_tower._vision_tower.vision_model.encoder.layers."),
    ("vision_tower.", "vision_tower._vision_tower.vision_model."),
    ("connector.", "connector._connector."),
    ("language_model.lm_head.", "language_model.lm_head."),
    ("language_model.", "language_model.model."),
)
"""How paths begin, here and in a checkpoint. In every table the first row that fits counts."""

MODULES = (
    (".head.in_proj.weight", ".head.attention.in_proj_weight"),
    (".head.in_proj.bias", ".head.attention.in_proj_bias"),
    (".head.out_proj.", ".head.attention.out_proj."),
    (".attention.norm_", ".0.norm_"),
    (".attention.to_", ".0.to_"),
    (".feed_forward.norm.", ".1.0."),
    (".feed_forward.fc1.", ".1.1."),
    (".feed_forward.fc2.", ".1.3."),
)
"""Modules and leaves that have other names there."""

PHI_MODULES = ((".self_attn.o_proj.", ".self_attn.dense."),)

LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
"""What paths end with."""

AXES = {("kernel", 2): (1, 0), ("kernel", 4): (2, 3, 1, 0)}
"""Transpositions of what is stored, by leaf and rank: PyTorch has the outputs first."""

IGNORED = (
    "rotary_emb.inv_freq",
    "rotary_emb.cos_cached",
    "rotary_emb.sin_cached",
    "embeddings.position_ids",
)
"""Endings of buffers that a checkpoint may hold: they follow from the configuration."""

TIED = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
"""A checkpoint of tied embeddings may hold the copy, too."""

ROWS = ("o_proj", "out_proj", "down_proj", "fc2", "to_out")
"""Linear layers that are split by their inputs on several devices (Shoeybi et al., 1909.08053)."""


class Entry(NamedTuple):
    """One parameter: its key there, its shape here, and how to come from there to here.

    ``here = there.transpose(axes)``; on several devices it is split along `split`, if at all.
    """

    key: str
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    split: int | None

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Its shape there."""
        return tuple(self.shape[i] for i in self.back)

    @property
    def back(self) -> tuple[int, ...]:
        """The inverse: ``there = here.transpose(back)``."""
        return tuple(int(i) for i in np.argsort(self.axes))

    def stored_index(self, index: tuple[slice, ...]) -> tuple[slice, ...]:
        """The part of the stored array that this part of the parameter is made of."""
        return tuple(index[i] for i in self.back)


def entries(model: TinyLlavaVideo) -> dict[Path, Entry]:
    """What a checkpoint of this model (`abstract` or not) holds: every parameter, by its path."""
    leaves = nnx.to_flat_state(nnx.state(model))
    return {path: _entry(path, leaf.shape, variant(model.config)) for path, leaf in leaves}


def _entry(path: Path, shape: tuple[int, ...], language_model: Variant) -> Entry:
    *modules, leaf = map(str, path)
    key = ".".join((*modules, LEAVES.get(leaf, leaf)))
    for table in (PARTS, MODULES, PHI_MODULES if language_model == "phi" else ()):
        key = _replaced(key, table)
    axes = AXES.get((leaf, len(shape)), tuple(range(len(shape))))
    return Entry(key, shape, axes, _split(modules[-1], leaf))


def _replaced(name: str, table: tuple[tuple[str, str], ...]) -> str:
    return next((name.replace(old, new, 1) for old, new in table if old in name), name)


def _split(module: str, leaf: str) -> int | None:
    """Pairs of products need one exchange: the first is split by outputs, the second by inputs."""
    if leaf == "embedding":
        return 0
    if leaf != "kernel":
        return None
    return -2 if module in ROWS else -1
