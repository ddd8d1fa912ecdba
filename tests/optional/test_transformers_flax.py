"""Hugging Face's Flax models, which `transformers` has below version 5: folded as derived.

Tiny random models, made from their configurations and run in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import transformers as hf

import jax_lnfold
from tests.helpers.contracts import (
    assert_identical,
    check_contracts,
    counts,
    fold_checked,
    snapshot,
)
from tests.models.zoo.base import VOCAB, floats, initial, lengths_mask, perturb, tokens

D, HEADS, HIDDEN, POSITIONS = 12, 3, 20, 16
Batch = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A model of two layers, batches of two shapes, and what folding should make of it.

    `output` picks a field of the model's output. `leaks` counts the LayerNorms that are left
    because the stream is an output. `rtol` is wider where something is in float32 regardless.
    """

    model: type[hf.FlaxPreTrainedModel]
    config: hf.PretrainedConfig
    batches: tuple[Batch, Batch]
    norms: int
    folded: int
    inserted: int = 0
    note: str = ""
    output: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    leaks: int = 0
    rtol: float = 1e-12

    def __str__(self) -> str:
        """Name the case in test reports."""
        return self.model.__name__.removeprefix("Flax") + (f", {self.note}" if self.note else "")

    def build(self, dtype: Any = jnp.float64) -> tuple[hf.FlaxPreTrainedModel, Any]:
        """The model without parameters of its own, and parameters that hide nothing."""
        model = self.model(self.config, dtype=dtype, _do_init=False)
        shapes = model.params_shape_tree
        return model, perturb(jax.tree_util.tree_map_with_path(initial, shapes))

    def apply_fn(self, model: hf.FlaxPreTrainedModel) -> Callable[..., Any]:
        """The function to fold, compiled at once instead of operation by operation."""

        def apply(params: Any, batch: Batch) -> Any:
            output = model(**batch, params=params, **self.options)
            return getattr(output, self.output) if self.output else output

        return jax.jit(apply)


def text(batch: int, length: int, *kept: int) -> Batch:
    """Token ids with a padding mask."""
    mask = lengths_mask(length, *kept, *(batch - len(kept)) * (length,))
    return {"input_ids": tokens(batch, length), "attention_mask": mask}


def translation(batch: int, source: int, target: int) -> Batch:
    """Token ids of two languages."""
    return text(batch, source, 3) | {"decoder_input_ids": tokens(batch, target)}


def images(batch: int, size: int) -> Batch:
    """Square images, channels first."""
    return {"pixel_values": floats(batch, 3, size, size)}


def speech(batch: int, target: int) -> Batch:
    """A spectrogram and the tokens transcribed so far."""
    return {"input_features": floats(batch, 5, 18), "decoder_input_ids": tokens(batch, target)}


TEXTS = text(2, 7, 5), text(5, 11, 4, 11, 9)
TRANSLATIONS = translation(2, 7, 6), translation(5, 11, 8)
IMAGES = images(6, 20), images(8, 20)
SPEECH = speech(2, 7), speech(5, 11)
ENCODED_SPEECH = tuple({"input_features": b["input_features"]} for b in SPEECH)
CROSS = tuple(t | {"encoder_hidden_states": floats(len(t["input_ids"]), 9, D)} for t in TEXTS)
PAIRS = tuple(t | i for t, i in zip(TEXTS, (images(2, 20), images(5, 20)), strict=True))
MASKED = tuple(
    i | {"bool_masked_pos": lengths_mask(16, 4, *[6] * (n - 1))}
    for i, n in zip(IMAGES, (6, 8), strict=True)
)

BERT_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": D,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "intermediate_size": HIDDEN,
    "max_position_embeddings": POSITIONS,
    "type_vocab_size": 9,
}
VIT_SIZES = {
    "hidden_size": 14,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 22,
    "image_size": 20,
    "patch_size": 5,
}
BART_SIZES = {
    "vocab_size": VOCAB,
    "d_model": D,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": HIDDEN,
    "decoder_ffn_dim": HIDDEN + 2,
    "max_position_embeddings": POSITIONS,
}
GPT2 = partial(hf.GPT2Config, VOCAB, POSITIONS, D, n_layer=2, n_head=HEADS)
GPTJ = partial(hf.GPTJConfig, VOCAB, POSITIONS, D, n_layer=2, n_head=HEADS, rotary_dim=2)
GPT_NEO = hf.GPTNeoConfig(
    VOCAB,
    POSITIONS,
    D,
    num_layers=2,
    attention_types=[[["global", "local"], 1]],
    num_heads=HEADS,
    intermediate_size=HIDDEN,
    window_size=5,
)
OPT = partial(
    hf.OPTConfig,
    VOCAB,
    D,
    num_hidden_layers=2,
    ffn_dim=HIDDEN,
    max_position_embeddings=POSITIONS,
    num_attention_heads=HEADS,
)
BLOOM = partial(hf.BloomConfig, VOCAB, 20, n_layer=2, n_head=4)  # heads: a power of two
XGLM = hf.XGLMConfig(VOCAB, POSITIONS, D, ffn_dim=HIDDEN, num_layers=2, attention_heads=HEADS)
WHISPER = partial(
    hf.WhisperConfig,
    **BART_SIZES | {"max_position_embeddings": None},
    num_mel_bins=5,
    max_source_positions=9,
    max_target_positions=POSITIONS,
)
CLIP_TEXT = hf.CLIPTextConfig(VOCAB, D, HIDDEN, 7, 2, HEADS, POSITIONS, eos_token_id=VOCAB - 1)
CLIP_VISION = hf.CLIPVisionConfig(**VIT_SIZES, projection_dim=7)
CLIP = hf.CLIPConfig(CLIP_TEXT.to_dict(), CLIP_VISION.to_dict(), projection_dim=7)
BEIT = partial(hf.BeitConfig, **VIT_SIZES, use_relative_position_bias=True)
DINOV2 = partial(
    hf.Dinov2Config, **{k: v for k, v in VIT_SIZES.items() if k != "intermediate_size"}, mlp_ratio=3
)
WAV2VEC2 = hf.Wav2Vec2Config(
    **{
        k: v
        for k, v in BERT_SIZES.items()
        if k not in ("max_position_embeddings", "type_vocab_size")
    },
    conv_dim=(10, 16),
    conv_stride=(3, 2),
    conv_kernel=(5, 3),
    conv_bias=True,
    num_conv_pos_embeddings=4,
    num_conv_pos_embedding_groups=3,
    feat_extract_norm="layer",
    do_stable_layer_norm=True,
)
LLAMA = hf.LlamaConfig(VOCAB, D, HIDDEN, 2, HEADS)

# A float32 softmax or interpolation is inside; everything else is float64.
SINGLE = 1e-5
OUTPUT = "makes a value that is an output"

CASES = (
    # Pre-LN encoders: 2L+1, every writer of the stream is linear.
    Case(hf.FlaxViTModel, hf.ViTConfig(**VIT_SIZES), IMAGES, 5, 5),
    Case(hf.FlaxCLIPTextModel, CLIP_TEXT, TEXTS, 5, 5),
    # A stream that is returned belongs to somebody else.
    Case(
        hf.FlaxViTModel,
        hf.ViTConfig(**VIT_SIZES),
        IMAGES,
        5,
        0,
        note="hidden states",
        options={"output_hidden_states": True},
        leaks=5,
    ),
    # LayerScale: 2L+1. BEiT averages tokens before the last norm and returns the raw stream, too.
    Case(hf.FlaxBeitForImageClassification, BEIT(), IMAGES, 5, 5),
    Case(hf.FlaxBeitForMaskedImageModeling, BEIT(use_mask_token=True), MASKED, 5, 5),
    Case(hf.FlaxBeitModel, BEIT(), IMAGES, 5, 0, note="whole output", leaks=5),
    Case(hf.FlaxBeitModel, BEIT(), IMAGES, 5, 5, note="pooled", output="pooler_output"),
    # Without mean pooling, a LayerNorm of a LayerNorm follows: it reads a scale and a bias.
    Case(
        hf.FlaxBeitForMaskedImageModeling,
        BEIT(use_mask_token=True, use_mean_pooling=False),
        MASKED,
        6,
        5,
        note="two final norms",
    ),
    Case(hf.FlaxDinov2Model, DINOV2(), IMAGES, 5, 5),
    Case(hf.FlaxDinov2Model, DINOV2(layerscale_value=0.5), IMAGES, 5, 5, note="scaled scale"),
    Case(
        hf.FlaxDinov2ForImageClassification,
        DINOV2(use_swiglu_ffn=True),
        (IMAGES[0], images(8, 15)),
        5,
        5,
        note="SwiGLU, another resolution",
        rtol=SINGLE,
    ),
    # CLIP vision: 2L+2 with one centering after the first norm, unless the stream is returned.
    Case(hf.FlaxCLIPVisionModel, CLIP_VISION, IMAGES, 6, 6, 1, "pooled", "pooler_output"),
    Case(hf.FlaxCLIPVisionModel, CLIP_VISION, IMAGES, 6, 1, note="whole output", leaks=5),
    Case(hf.FlaxCLIPModel, CLIP, PAIRS, 11, 11, 1, "logits", "logits_per_text"),
    Case(hf.FlaxCLIPModel, CLIP, PAIRS, 11, 6, note="whole output", leaks=5),
    # Decoders: 2L+1 (GPT-J: L+1), and one centering of looked-up rows if the table is tied.
    Case(hf.FlaxGPT2Model, GPT2(), TEXTS, 5, 5),
    Case(hf.FlaxGPT2LMHeadModel, GPT2(), TEXTS, 5, 5, 1, "tied"),
    Case(hf.FlaxGPT2LMHeadModel, GPT2(tie_word_embeddings=False), TEXTS, 5, 5, note="untied"),
    Case(hf.FlaxGPT2LMHeadModel, GPT2(add_cross_attention=True), CROSS, 7, 7, 1, "cross-attention"),
    Case(hf.FlaxGPTNeoForCausalLM, GPT_NEO, TEXTS, 5, 5, 1),
    Case(hf.FlaxGPTJForCausalLM, GPTJ(), TEXTS, 3, 3),
    Case(hf.FlaxXGLMForCausalLM, XGLM, TEXTS, 5, 5, 1),
    Case(hf.FlaxOPTForCausalLM, OPT(), TEXTS, 5, 5, 1),
    # A projection lies between the tied table and the stream.
    Case(hf.FlaxOPTForCausalLM, OPT(word_embed_proj_dim=8), TEXTS, 5, 5, note="projected"),
    # Post-LN with no embedding norm: the first norm's input is read by attention, too.
    Case(hf.FlaxOPTForCausalLM, OPT(do_layer_norm_before=False), TEXTS, 4, 0, note="post-LN"),
    # Without the last norm the logits read the stream.
    Case(hf.FlaxOPTForCausalLM, OPT(_remove_final_layer_norm=True), TEXTS, 4, 0, note="no last"),
    # BLOOM: 2L+2 with one centering after the embedding norm, which a tied table leaves out.
    Case(hf.FlaxBloomModel, BLOOM(), TEXTS, 6, 6, 1, rtol=SINGLE),
    Case(hf.FlaxBloomForCausalLM, BLOOM(), TEXTS, 6, 5, 1, "tied", rtol=SINGLE),
    # Its option to take the residual after the norms makes it post-LN.
    Case(
        hf.FlaxBloomModel,
        BLOOM(apply_residual_connection_post_layernorm=True),
        TEXTS,
        6,
        1,
        note="residual after norm",
        rtol=SINGLE,
    ),
    # Post-LN encoders: the embedding norm, unless its table is tied.
    Case(hf.FlaxBertModel, hf.BertConfig(**BERT_SIZES), TEXTS, 5, 1),
    Case(hf.FlaxBertForMaskedLM, hf.BertConfig(**BERT_SIZES), TEXTS, 6, 0, note="tied"),
    Case(
        hf.FlaxBertForMaskedLM,
        hf.BertConfig(**BERT_SIZES, tie_word_embeddings=False),
        TEXTS,
        6,
        1,
        note="untied",
    ),
    Case(hf.FlaxRobertaForSequenceClassification, hf.RobertaConfig(**BERT_SIZES), TEXTS, 5, 1),
    Case(hf.FlaxElectraModel, hf.ElectraConfig(**BERT_SIZES, embedding_size=10), TEXTS, 5, 1),
    Case(hf.FlaxAlbertModel, hf.AlbertConfig(**BERT_SIZES, embedding_size=10), TEXTS, 5, 1),
    Case(hf.FlaxRoFormerModel, hf.RoFormerConfig(**BERT_SIZES, embedding_size=D), TEXTS, 5, 1),
    Case(
        hf.FlaxBigBirdModel,
        hf.BigBirdConfig(**BERT_SIZES, attention_type="original_full"),
        TEXTS,
        5,
        1,
    ),
    # A fixed sine table is centered ahead of time.
    Case(
        hf.FlaxDistilBertModel,
        hf.DistilBertConfig(VOCAB, POSITIONS, True, 2, HEADS, D, HIDDEN),
        TEXTS,
        5,
        1,
    ),
    # Pre-LN after an embedding norm: 2L+2, one centering.
    Case(
        hf.FlaxRobertaPreLayerNormModel, hf.RobertaPreLayerNormConfig(**BERT_SIZES), TEXTS, 6, 6, 1
    ),
    # BART: both embedding norms of (1+2L) + (1+3L), none if the shared table is tied.
    Case(hf.FlaxBartModel, hf.BartConfig(**BART_SIZES), TRANSLATIONS, 12, 2),
    Case(hf.FlaxBartForConditionalGeneration, hf.BartConfig(**BART_SIZES), TRANSLATIONS, 12, 0),
    Case(hf.FlaxBlenderbotSmallModel, hf.BlenderbotSmallConfig(**BART_SIZES), TRANSLATIONS, 12, 2),
    Case(hf.FlaxMarianModel, hf.MarianConfig(**BART_SIZES), TRANSLATIONS, 10, 0),
    # Pre-LN encoder and decoder: (2L+1) + (3L+1), a centering for each if the table is tied.
    Case(hf.FlaxPegasusModel, hf.PegasusConfig(**BART_SIZES), TRANSLATIONS, 12, 12),
    Case(
        hf.FlaxPegasusForConditionalGeneration,
        hf.PegasusConfig(**BART_SIZES, scale_embedding=True),
        TRANSLATIONS,
        12,
        12,
        2,
    ),
    Case(hf.FlaxBlenderbotModel, hf.BlenderbotConfig(**BART_SIZES), TRANSLATIONS, 12, 12),
    # mBART has embedding norms besides: a centering after each, and they fold if untied.
    Case(hf.FlaxMBartModel, hf.MBartConfig(**BART_SIZES), TRANSLATIONS, 14, 14, 2),
    Case(
        hf.FlaxMBartForConditionalGeneration, hf.MBartConfig(**BART_SIZES), TRANSLATIONS, 14, 12, 2
    ),
    # Whisper: the encoder's stream starts at a GELU, the decoder's at a table.
    Case(hf.FlaxWhisperModel, WHISPER(), SPEECH, 12, 12, 1),
    Case(hf.FlaxWhisperForConditionalGeneration, WHISPER(), SPEECH, 12, 12, 2),
    Case(hf.FlaxWhisperForAudioClassification, WHISPER(), ENCODED_SPEECH, 5, 5, 1),
    # wav2vec 2.0: one norm per convolution folds, the one after a GELU does not; then 2L+1 behind
    # a stream that starts at another GELU.
    Case(
        hf.FlaxWav2Vec2Model,
        WAV2VEC2,
        ({"input_values": floats(2, 60)}, {"input_values": floats(5, 77)}),
        8,
        7,
        1,
    ),
    # RMSNorms only.
    Case(hf.FlaxLlamaForCausalLM, LLAMA, TEXTS, 0, 0, rtol=SINGLE),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_folds_as_derived(case: Case) -> None:
    model, params = case.build()
    apply_fn, before = case.apply_fn(model), snapshot(params)
    folded = jax_lnfold.fold(apply_fn, params, case.batches[0])
    report = folded.report
    assert counts(report) == (case.norms, case.folded, case.inserted), str(report)
    assert sum(OUTPUT in norm.reason for norm in report.norms) == case.leaks, str(report)
    assert all(bool(norm.reason) != norm.folded for norm in report.norms), str(report)
    for batch in case.batches:
        check_contracts(apply_fn, params, folded, batch, rtol=case.rtol, before=before)


def named(name: str) -> Case:
    return next(case for case in CASES if str(case) == name)


def test_the_bare_module_folds_to_the_same_parameters() -> None:
    case = named("ViTModel")
    model, params = case.build()
    pixels = case.batches[0]["pixel_values"].transpose(0, 2, 3, 1)
    bare = fold_checked(jax.jit(lambda p, x: model.module.apply({"params": p}, x)), params, pixels)
    whole = jax_lnfold.fold(case.apply_fn(model), params, case.batches[0])
    assert_identical(bare.params, snapshot(whole.params))
    assert bare.report.n_folded == whole.report.n_folded == 5


def test_gradient_checkpointing_changes_nothing() -> None:
    case = named("RobertaPreLayerNormModel")
    model, params = case.build()
    plain = jax_lnfold.fold(case.apply_fn(model), params, case.batches[0])
    model.enable_gradient_checkpointing()
    remat = fold_checked(case.apply_fn(model), params, case.batches[0])
    assert_identical(remat.params, snapshot(plain.params))
    assert (remat.report.n_folded, remat.report.n_inserted) == (6, 1)


def test_folds_a_whole_generation() -> None:
    """2L+1 in the prompt and 2L+1 in the decoding loop, where looked-up rows are centered, too."""
    case = named("GPT2LMHeadModel, tied")
    model, params = case.build(jnp.float32)

    def generate(params: Any, batch: Batch) -> jax.Array:
        options = {"max_new_tokens": 4, "pad_token_id": 0, "eos_token_id": VOCAB - 1}
        return model.generate(**batch, **options, params=params).sequences

    with jax.enable_x64(False):  # the cache does not work with 64-bit indices
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
        folded = fold_checked(jax.jit(generate), params, case.batches[0])
    report = folded.report
    assert counts(report) == (10, 10, 2)
