"""What is run by default: plain tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import product
from typing import Any

from .registry import MODELS

BOTH = ("one_pass", "two_pass")


@dataclass(frozen=True)
class Case:
    """A model with its inputs, its spelling of LayerNorm and its dtype; a row per variant."""

    model: str
    batch: int
    length: int  # of the input: positions, a side of images
    spelling: str
    dtype: str
    rounds: int = field(default=11, compare=False)

    @property
    def key(self) -> tuple[Any, ...]:
        """What rows of this case are known by, but for the variant."""
        return self.model, self.batch, self.length, self.spelling, self.dtype

    def __str__(self) -> str:
        """For progress."""
        return " ".join(map(str, self.key))


POST_LN = ("bert_base", "post_ln_768", "post_ln_384")
"""Models in which no mean folds: not among those that tables tell together."""
KEYS = (*(f.name for f in fields(Case) if f.compare), "variant")


def sweep(
    model: str,
    batches: Sequence[int],
    lengths: Sequence[int] = (),
    spellings: Sequence[str] = BOTH,
    dtypes: Sequence[str] = ("float32",),
    rounds: int = 11,
) -> tuple[Case, ...]:
    """All combinations; the model's own length unless others are given."""
    found = product(dtypes, lengths or (MODELS[model].length,), batches, spellings)
    return tuple(Case(model, b, n, s, d, rounds) for d, n, b, s in found)


ONE = ("one_pass",)
LOW = ("bfloat16",)
CPU = (  # about 25 minutes on two cores
    *sweep("vit_s", (1, 4)),
    *sweep("vit_b", (1,)),
    *sweep("vit_b", (4,), (), ONE),
    *sweep("vit_l", (1,), rounds=5),
    *sweep("vit_b_qk_norm", (1,)),
    *sweep("dinov2_b", (1,)),
    *sweep("swin_t", (1,)),
    *sweep("swin_t", (4,), (), ONE),
    *sweep("gpt2", (1,), (128, 512)),
    *sweep("gpt2", (1,), (1024,), ONE, rounds=5),
    *sweep("gpt2_xl", (1,), (128,), ONE, rounds=3),
    *sweep("gpt2_decode", (1, 16)),
    *sweep("gpt2_xl_decode", (1,), (), ONE, rounds=5),
    *sweep("whisper_base_encoder", (1,)),
    *sweep("clip_l_text", (1, 4)),
    *sweep("vit_s", (1,), (), ONE, LOW),
    *sweep("gpt2_decode", (1,), (), ONE, LOW),
    *sweep("policy", (1,)),
    *sweep("policy_narrow", (1,)),
    *sweep("policy_wide", (1,)),
    *sweep("mixer", (64,)),
    *sweep("graph_net", (1,)),
    *sweep("recommender", (1,)),
)
GPU = (
    *sweep("vit_s", (1, 16, 64, 256), dtypes=LOW),
    *sweep("vit_b", (1, 4, 16, 64), dtypes=("bfloat16", "float32")),
    *sweep("vit_l", (16,), dtypes=LOW),
    *sweep("vit_b_qk_norm", (16,), dtypes=LOW),
    *sweep("dinov2_b", (16,), dtypes=LOW),
    *sweep("swin_t", (16, 64), dtypes=LOW),
    *sweep("gpt2", (8,), (128, 512, 1024), dtypes=("bfloat16", "float32")),
    *sweep("gpt2_xl", (2,), (512,), dtypes=LOW),
    *sweep("gpt2_decode", (1, 16, 64), dtypes=LOW),
    *sweep("gpt2_xl_decode", (1, 16), dtypes=LOW),
    *sweep("whisper_base_encoder", (8,), dtypes=LOW),
    *sweep("clip_l_text", (16, 64), dtypes=LOW),
)
TPU = {  # a program takes the compiler half a minute of one core for v5e, and a minute for v6e
    "v5e": (
        *sweep("vit_b", (16,), dtypes=LOW),
        *sweep("gpt2", (4,), dtypes=LOW),
        *sweep("whisper_base_encoder", (4,), dtypes=LOW),
        *sweep("gpt2_decode", (16,), dtypes=LOW),
        *sweep("clip_l_text", (16,), dtypes=LOW),
        *sweep("gpt2", (4,), (128,), ONE, LOW),
        *sweep("gpt2_decode", (1,), (), ONE, LOW),
        *sweep("vit_b", (1,), (), ONE, LOW),
        *sweep("whisper_base_encoder", (4,), (), ONE),
        *sweep("dinov2_b", (16,), dtypes=LOW),
        *sweep("vit_b_qk_norm", (16,), dtypes=LOW),
        *sweep("swin_t", (16,), dtypes=LOW),
        *sweep("vit_l", (16,), (), ONE, LOW),
        *sweep("bert_base", (8,), dtypes=LOW),
        *sweep("post_ln_768", (16,), dtypes=LOW),
    ),
    "v6e": (
        *sweep("vit_b", (16,), (), ONE, LOW),
        *sweep("gpt2", (4,), dtypes=LOW),
        *sweep("whisper_base_encoder", (4,), dtypes=LOW),
        *sweep("post_ln_384", (16,), dtypes=LOW),
    ),
}

AHEAD_OF_TIME_GPU = (  # a program takes the compiler 2 to 15 seconds
    *sweep("vit_b", (1, 16), dtypes=LOW),
    *sweep("vit_l", (16,), dtypes=LOW),
    *sweep("vit_b_qk_norm", (16,), dtypes=LOW),
    *sweep("dinov2_b", (16,), dtypes=LOW),
    *sweep("swin_t", (16,), dtypes=LOW),
    *sweep("gpt2", (4,), dtypes=LOW),
    *sweep("gpt2_decode", (1, 16), dtypes=LOW),
    *sweep("whisper_base_encoder", (4,), dtypes=LOW),
    *sweep("clip_l_text", (16,), dtypes=LOW),
    *sweep("bert_base", (8,), dtypes=LOW),
    *sweep("post_ln_768", (16,), dtypes=LOW),
    *sweep("vit_b", (16,)),
)


def pick(table: Sequence[Case], **given: Sequence[Any] | None) -> list[Case]:
    """Cases of a table; what is given replaces what the table has, but for models: these choose.

    A model that the table lacks takes part once, with the model's own length.
    """
    models = given.pop("model", None) or list(dict.fromkeys(case.model for case in table))
    known = {case.model for case in table}
    cases: Iterable[Case] = [
        case
        for name in models
        for case in (table if name in known else sweep(name, (1,), dtypes=(table[0].dtype,)))
        if case.model == name
    ]
    for name, values in given.items():
        if values:
            cases = [replace(case, **{name: value}) for case in cases for value in values]
    return list(dict.fromkeys(cases))
