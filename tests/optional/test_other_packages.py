"""Models of packages that others maintain: KerasHub (on JAX), Equimo and esm2quinox (Equinox).

Tiny random models, made from the packages' own constructors and run in float64. Needs `.[test]`,
``equimo==1.1.0 esm2quinox==0.2.0 kagglehub kagglesdk==0.1.28 tokenizers sentencepiece regex``, and
``keras-hub==0.32.0`` installed with ``--no-deps``, which would bring TensorFlow.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ["KERAS_BACKEND"] = "jax"  # read when keras is imported

import equinox as eqx
import jax
import keras_hub.models as kh
import pytest
from equimo.models import convnext, vit
from esm2quinox import ESM2

import jax_lnfold
from tests.helpers.contracts import check_contracts, counts, snapshot
from tests.models.zoo.base import VOCAB, floats, lengths_mask, perturb, tokens

D, HEADS, HIDDEN, POSITIONS = 12, 3, 20, 16
OUTPUT = "makes a value that is an output"
Built = tuple[Callable[..., Any], Any]


@dataclass(frozen=True)
class Case:
    """A model of two layers, inputs of two shapes, and what folding should make of it.

    `leaks` counts the LayerNorms that are left because the stream is an output. Keras computes
    LayerNorms in float32 whatever their dtype, Equimo softmaxes: hence `rtol`.
    """

    name: str
    build: Callable[[], Built]
    inputs: tuple[Any, Any]
    counts: tuple[int, int, int]  # LayerNorms, folded, inserted centerings
    leaks: int = 0
    rtol: float = 1e-5

    def __str__(self) -> str:
        """Name the case in test reports."""
        return self.name


def keras_hub(
    backbone: type[kh.Backbone], task: type[kh.Task] | None = None, **sizes: Any
) -> Callable[[], Built]:
    """A KerasHub model, as a function of its trainable and its other variables."""

    def build() -> Built:
        model = backbone(**sizes, dtype="float64")
        if task is not None:
            model = task(backbone=model, preprocessor=None, dtype="float64")

        def apply(params: Any, x: Any) -> Any:
            return model.stateless_call(*params, x, training=False)[0]

        trained = [v.value for v in model.trainable_variables]
        return apply, (perturb(trained), [v.value for v in model.non_trainable_variables])

    return build


def image(
    model: Callable[..., eqx.Module], method: str = "__call__", **sizes: Any
) -> Callable[[], Built]:
    """An Equimo model in inference."""

    def build() -> Built:
        params, static = eqx.partition(model(**sizes, key=jax.random.key(0)), eqx.is_inexact_array)

        def apply(params: Any, batch: Any) -> Any:
            run = getattr(eqx.combine(params, static), method)
            return jax.vmap(lambda x: run(**x, key=jax.random.key(1), inference=True))(batch)

        return apply, perturb(params)

    return build


def protein(**sizes: Any) -> Callable[[], Built]:
    """ESM-2 on a batch of proteins."""

    def build() -> Built:
        model = ESM2(2, D, HEADS, key=jax.random.key(0), **sizes)
        params, static = eqx.partition(model, eqx.is_inexact_array)
        return lambda params, x: jax.vmap(eqx.combine(params, static))(x), perturb(params)

    return build


def text(batch: int, length: int, *kept: int) -> dict[str, Any]:
    """Token ids with a padding mask."""
    mask = lengths_mask(length, *kept, *(batch - len(kept)) * (length,))
    return {"token_ids": tokens(batch, length), "padding_mask": mask}


def segmented(batch: int, length: int) -> dict[str, Any]:
    """Token ids in two segments."""
    return text(batch, length, 5) | {"segment_ids": tokens(batch, length, 2)}


def speech(batch: int, target: int) -> dict[str, Any]:
    """A spectrogram and the tokens transcribed so far."""
    return {
        "encoder_features": floats(batch, 18, 5),
        "decoder_token_ids": tokens(batch, target),
        "decoder_padding_mask": lengths_mask(target, *[target] * batch),
    }


TEXTS = text(2, 7, 5), text(5, 11, 4, 11, 9)
SEGMENTS = segmented(2, 7), segmented(5, 11)
SPEECH = speech(2, 7), speech(5, 11)
IMAGES = floats(6, 20, 30, 3), floats(8, 20, 30, 3)
SQUARES = {"images": floats(6, 20, 20, 3)}, {"images": floats(8, 20, 20, 3)}
WINDOWS = floats(2, 16, 32, 3), floats(5, 16, 32, 3)
CHW = {"x": floats(6, 3, 20, 20)}, {"x": floats(8, 3, 20, 20)}
OTHER_SIZE = {"x": floats(6, 3, 20, 20)}, {"x": floats(6, 3, 15, 25)}
MASKED = tuple(
    x | {"mask": lengths_mask(4, *[3] * 4 * len(x["x"])).reshape(-1, 4, 4) > 0} for x in CHW
)
LARGE = {"x": floats(2, 3, 32, 64)}, {"x": floats(3, 3, 64, 32)}
PROTEINS = tokens(2, 7, 33), tokens(5, 11, 33)

TEXT_SIZES = {
    "vocabulary_size": VOCAB,
    "num_layers": 2,
    "num_heads": HEADS,
    "hidden_dim": D,
    "intermediate_dim": HIDDEN,
    "dropout": 0.0,
}
POSITIONED = TEXT_SIZES | {"max_sequence_length": POSITIONS}
FNET_SIZES = {k: v for k, v in POSITIONED.items() if k != "num_heads"}
VIT_SIZES = {"patch_size": 5, "num_layers": 2, "num_heads": 2, "hidden_dim": 14}
EQUIMO_SIZES = {
    "img_size": 20,
    "in_channels": 3,
    "dim": 14,
    "patch_size": 5,
    "num_heads": 2,
    "depths": [2],
    "reg_tokens": 0,
    "num_classes": 11,
}
DINO_SIZES = EQUIMO_SIZES | {"reg_tokens": 4, "init_values": 0.5, "num_classes": 0}

CASES = (
    # 2L+1: every writer of the stream is linear; LayerScale is merged.
    Case(
        "keras ViT",
        keras_hub(kh.ViTBackbone, image_shape=(20, 30, 3), mlp_dim=22, **VIT_SIZES),
        IMAGES,
        (5, 5, 0),
    ),
    Case(
        "keras DINOv2",
        keras_hub(
            kh.DINOV2Backbone,
            intermediate_dim=22,
            image_shape=(20, 20, 3),
            position_embedding_shape=(20, 20, 3),
            num_register_tokens=4,
            **VIT_SIZES,
        ),
        SQUARES,
        (5, 5, 0),
    ),
    # The patch norm, and the 2L+1 behind the last patch merging.
    Case(
        "keras Swin",
        keras_hub(
            kh.SwinTransformerBackbone,
            image_shape=(16, 32, 3),
            patch_size=4,
            embed_dim=6,
            depths=(2, 2),
            num_heads=(2, 3),
            window_size=2,
        ),
        WINDOWS,
        (11, 6, 0),
    ),
    # 2L+1; a tied table may not be edited, its looked-up rows are centered.
    Case("keras GPT-2", keras_hub(kh.GPT2Backbone, **POSITIONED), TEXTS, (5, 5, 0)),
    Case(
        "keras GPT-2, tied",
        keras_hub(kh.GPT2Backbone, kh.GPT2CausalLM, **POSITIONED),
        TEXTS,
        (5, 5, 1),
    ),
    Case(
        "keras GPT-NeoX",
        keras_hub(kh.GPTNeoXBackbone, rotary_percentage=0.5, **POSITIONED),
        TEXTS,
        (5, 5, 0),
    ),
    Case("keras OPT", keras_hub(kh.OPTBackbone, **POSITIONED), TEXTS, (5, 5, 0)),
    # 2L+2 with one centering after the embedding norm, which a tied table leaves out.
    Case("keras BLOOM", keras_hub(kh.BloomBackbone, **TEXT_SIZES), TEXTS, (6, 6, 1)),
    Case(
        "keras BLOOM, tied",
        keras_hub(kh.BloomBackbone, kh.BloomCausalLM, **TEXT_SIZES),
        TEXTS,
        (6, 5, 1),
    ),
    # Post-LN: the embedding norm.
    Case("keras BERT", keras_hub(kh.BertBackbone, **POSITIONED), SEGMENTS, (5, 1, 0)),
    Case(
        "keras FNet",
        keras_hub(kh.FNetBackbone, **FNET_SIZES),
        tuple({k: v for k, v in x.items() if k != "padding_mask"} for x in SEGMENTS),
        (5, 1, 0),
    ),
    # (2L+1) + (3L+1): the encoder's stream starts at a GELU.
    Case(
        "keras Whisper",
        keras_hub(
            kh.WhisperBackbone,
            num_mels=5,
            max_encoder_sequence_length=18,
            max_decoder_sequence_length=POSITIONS,
            **TEXT_SIZES,
        ),
        SPEECH,
        (12, 12, 1),
    ),
    # Equimo: 2L+1 again.
    Case("equimo ViT", image(vit.VisionTransformer, **EQUIMO_SIZES), CHW, (5, 5, 0)),
    Case(
        "equimo ViT, another size",
        image(vit.VisionTransformer, **EQUIMO_SIZES | {"dynamic_img_size": True}),
        OTHER_SIZE,
        (5, 5, 0),
    ),
    # 2L more on queries and keys, per head.
    Case(
        "equimo ViT, QK-norm",
        image(vit.VisionTransformer, **EQUIMO_SIZES | {"qk_norm": True}),
        CHW,
        (9, 9, 0),
    ),
    Case("equimo DINOv2", image(vit.VisionTransformer, **DINO_SIZES), CHW, (5, 5, 0)),
    Case(
        "equimo DINOv2, masked",
        image(vit.VisionTransformer, **DINO_SIZES | {"use_mask_token": True}),
        MASKED,
        (5, 5, 0),
    ),
    # The stream before the last norm is returned, too.
    Case(
        "equimo DINOv2, features",
        image(vit.VisionTransformer, "forward_features", **DINO_SIZES),
        CHW,
        (5, 0, 0),
        leaks=5,
    ),
    # The stem's norm of 1 + 4 blocks + 3 downsamplings + 1: depthwise convolutions.
    Case(
        "equimo ConvNeXt",
        image(convnext.ConvNeXt, depths=[1, 1, 1, 1], dims=[6, 10, 14, 22], num_classes=11),
        LARGE,
        (9, 1, 0),
    ),
    # A scan over layers: 2 norms in it, one after it, and one after a GELU in the head. The table
    # is tied: its looked-up rows are centered.
    Case("esm2quinox ESM-2", protein(token_dropout=False), PROTEINS, (4, 3, 1), rtol=1e-12),
    Case(
        "esm2quinox ESM-2, token dropout",
        protein(token_dropout=True),
        PROTEINS,
        (4, 3, 1),
        rtol=1e-12,
    ),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_folds_as_derived(case: Case) -> None:
    apply_fn, params = case.build()
    apply_fn, before = jax.jit(apply_fn), snapshot(params)
    folded = jax_lnfold.fold(apply_fn, params, case.inputs[0])
    report = folded.report
    assert counts(report) == case.counts, str(report)
    assert sum(OUTPUT in norm.reason for norm in report.norms) == case.leaks, str(report)
    assert all(bool(norm.reason) != norm.folded for norm in report.norms), str(report)
    for inputs in case.inputs:
        check_contracts(apply_fn, params, folded, inputs, rtol=case.rtol, before=before)
