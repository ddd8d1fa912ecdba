"""TinyLLaVA-Video against PyTorch: tiny random modules in the public format, number by number.

Tower and language models are those of `transformers`; the resampler is written here, as published.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers as hf
from flax import nnx
from jax.sharding import Mesh
from safetensors.torch import save_file
from torch import Tensor

import jax_lnfold
from examples.tinyllava_video.config import Config, PhiConfig, Qwen2Config, named
from examples.tinyllava_video.errors import InputError
from examples.tinyllava_video.finetune import main as finetune
from examples.tinyllava_video.fitting import Batch, fit
from examples.tinyllava_video.model import TinyLlavaVideo, functional
from examples.tinyllava_video.resampler import position_encoding
from examples.tinyllava_video.stage_folders import save_parts
from examples.tinyllava_video.tests.test_finetune import conversations_in
from examples.tinyllava_video.text import byte_tokenizer, load_tokenizer
from examples.tinyllava_video.weights import config_from, load, save

PLACEHOLDER = -200
"""Stands for the video among the ids of a prompt."""

# --- the model in PyTorch ------------------------------------------------------------------------


class Attention(torch.nn.Module):
    """What latents read of media and of themselves."""

    def __init__(self, size: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim, inner = heads, head_dim, heads * head_dim
        self.norm_media = torch.nn.LayerNorm(size)
        self.norm_latents = torch.nn.LayerNorm(size)
        self.to_q = torch.nn.Linear(size, inner, bias=False)
        self.to_kv = torch.nn.Linear(size, 2 * inner, bias=False)
        self.to_out = torch.nn.Linear(inner, size, bias=False)

    def forward(self, media: Tensor, latents: Tensor) -> Tensor:
        latents = self.norm_latents(latents)
        read = torch.cat((self.norm_media(media), latents), dim=1)
        keys, values = torch.tensor_split(self.to_kv(read), 2, dim=2)
        heads = []
        for i in range(self.heads):
            part = slice(i * self.head_dim, (i + 1) * self.head_dim)
            q = self.to_q(latents)[..., part] / self.head_dim**0.5
            weights = torch.softmax(q @ keys[..., part].mT, dim=-1)
            heads.append(weights @ values[..., part])
        return self.to_out(torch.cat(heads, dim=-1))


class Resampler(torch.nn.Module):
    """The group resampler; the naive one adds positions to the media instead."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        own, size = config.resampler, config.text.hidden_size
        self.groups, self.naive = own.groups, own.positions == "media"
        self.latents = torch.nn.Parameter(torch.zeros(own.num_queries // own.groups, size))
        self.linear = torch.nn.Linear(config.vision.hidden_size, size)
        self.layers = torch.nn.ModuleList(
            torch.nn.ModuleList(
                (
                    Attention(size, own.num_heads, own.head_dim),
                    torch.nn.Sequential(
                        torch.nn.LayerNorm(size),
                        torch.nn.Linear(size, 4 * size, bias=False),
                        torch.nn.GELU(),
                        torch.nn.Linear(4 * size, size, bias=False),
                    ),
                )
            )
            for _ in range(own.num_layers)
        )
        self.norm = torch.nn.LayerNorm(size)

    def states(self, media: Tensor) -> list[Tensor]:
        """The latents that have read ready media, after each layer."""
        states = [self.latents.expand(len(media), -1, -1)]
        for attention, feed_forward in self.layers:
            y = states[-1] + attention(media, states[-1])
            states.append(y + feed_forward(y))
        return states

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        if self.naive:
            x = x + positions(*x.shape[1:]).to(x.dtype)
        short, remainder = divmod(x.shape[1], self.groups)
        lengths = [short + (i < remainder) for i in range(self.groups)]
        groups = torch.split(x, lengths, dim=1)
        y = torch.cat([self.norm(self.states(group)[-1]) for group in groups], dim=1)
        return y if self.naive else y + positions(*y.shape[1:]).to(y.dtype)


def positions(length: int, size: int) -> Tensor:
    """In half precision, of angles in single precision."""
    rates = torch.exp(torch.arange(0, size, 2).float() * (-math.log(1e4) / size))
    angles = torch.arange(length).float()[:, None] * rates
    table = torch.zeros(length, size, dtype=torch.float16)
    table[:, 0::2], table[:, 1::2] = angles.sin(), angles.cos()
    return table


class Whole(torch.nn.Module):
    """All parts, under the names of the public checkpoints."""

    def __init__(self, config: Config, vision: Any, text: Any) -> None:
        super().__init__()
        self.config = config
        models = {"qwen2": hf.Qwen2ForCausalLM, "phi": hf.PhiForCausalLM}
        self.language_model = models[text.model_type](text)
        self.vision_tower, self.connector = torch.nn.Module(), torch.nn.Module()
        self.vision_tower._vision_tower = hf.SiglipVisionModel(vision)
        self.connector._connector = Resampler(config)

    @property
    def tower(self) -> hf.SiglipVisionModel:
        return self.vision_tower._vision_tower

    @property
    def resampler(self) -> Resampler:
        return self.connector._connector

    def encode_video(self, pixels: Tensor) -> Tensor:
        videos = []
        for frames in pixels:
            states = self.tower(frames, output_hidden_states=True).hidden_states
            videos.append(self.resampler(states[-2][:, 1:].flatten(0, 1)[None]))
        return torch.cat(videos)

    def embed_prompt(self, pixels: Tensor, ids: Tensor) -> Tensor:
        embed, rows = self.language_model.get_input_embeddings(), []
        for row, video in zip(ids, self.encode_video(pixels), strict=True):
            at = row.tolist().index(PLACEHOLDER)
            rows.append(torch.cat((embed(row[:at]), video, embed(row[at + 1 :]))))
        return torch.stack(rows)


# --- checkpoints ---------------------------------------------------------------------------------

VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 30,
    "patch_size": 7,
}
QWEN2 = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-5,
}
PHI = {
    "vocab_size": 103,
    "hidden_size": 40,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "partial_rotary_factor": 0.4,
    "layer_norm_eps": 1e-4,
}


class PublicConfig(hf.PretrainedConfig):
    """Written as the public code does: parts without what is the default of their classes."""

    model_type = "tinyllava"

    def __init__(self, text_config: Any = None, vision_config: Any = None, **rest: Any) -> None:
        self.text_config = text_config or hf.LlamaConfig()
        self.vision_config = vision_config or hf.CLIPVisionConfig()
        super().__init__(**rest)


@dataclass(frozen=True)
class Checkpoint:
    """A folder and the modules that were saved there."""

    directory: Path
    torch: Whole

    @cached_property
    def model(self) -> TinyLlavaVideo:
        return load(self.directory)


CASES = {
    "qwen2, tied": (QWEN2 | {"tie_word_embeddings": True}, "groupresampler", False),
    "qwen2, naive": (QWEN2 | {"tie_word_embeddings": False}, "resamplerwithpe", True),
    "phi, naive": (PHI, "naiveresampler", True),
    "phi": (PHI, "groupresampler", True),
}


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Checkpoint]:
    text, connector, safe = request.param
    with torch.no_grad():
        yield saved(tmp_path_factory.mktemp("checkpoint"), text, connector, safe)


def saved(directory: Path, text: dict[str, Any], connector: str, safe: bool = True) -> Checkpoint:
    text_class = hf.Qwen2Config if "rms_norm_eps" in text else hf.PhiConfig
    description = PublicConfig(
        text_class(**text, attn_implementation="eager"),
        hf.SiglipVisionConfig(**VISION, attn_implementation="eager"),
        connector_type=connector,
        num_queries=12,
        group=4,
        num_resampler_layers=2,
        hidden_size=text["hidden_size"],
        vision_feature_layer=-2,
        vision_feature_select_strategy="patch",
        tokenizer_model_max_length=640,
    )
    # The public resampler has no other number of heads.
    written = json.loads(description.to_json_string())
    written["jax_lnfold"] = {"num_heads": 2, "head_dim": 8}
    (directory / "config.json").write_text(json.dumps(written))
    parts = description.vision_config, description.text_config
    model = perturbed(Whole(config_from(directory), *parts))
    arrays = {key: x.clone().contiguous() for key, x in model.state_dict().items()}
    if safe:
        save_file(arrays, directory / "model.safetensors", {"format": "pt"})
    else:
        torch.save(arrays, directory / "pytorch_model.bin")
    return Checkpoint(directory, model)


def perturbed(model: Whole) -> Whole:
    """No parameter hides anything: scales are not one, biases not zero."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, x in model.named_parameters():
            noise = torch.randn(x.shape, generator=generator)
            # Where embeddings are tied, large ones would repeat the last token for ever.
            wide = 0.3 if "embed_tokens" in name else x[0].numel() ** -0.5
            x.copy_(x + 0.3 * noise if x.ndim == 1 else wide * noise)
    return model.eval()


def close(ours: jax.Array, theirs: Tensor, tolerance: float = 1e-5) -> None:
    """Relative to the largest number, as both sides round in float32."""
    expected = theirs.detach().numpy()
    assert ours.shape == expected.shape
    assert ours.dtype == expected.dtype == np.float32
    scale = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(np.asarray(ours), expected, rtol=0, atol=tolerance * scale)


def pixels(frames: int, batch: int = 2) -> tuple[jax.Array, Tensor]:
    """For both sides."""
    drawn = np.random.default_rng(0).uniform(-1, 1, (batch, frames, 30, 30, 3)).astype("float32")
    return jnp.asarray(drawn), torch.from_numpy(np.moveaxis(drawn, -1, 2).copy())


def prompt(vocabulary: int, batch: int = 2) -> tuple[jax.Array, jax.Array, Tensor]:
    """Ids before and after the video, and all with a placeholder for it."""
    rng = np.random.default_rng(1)
    before, after = (rng.integers(0, vocabulary, (batch, n), dtype=np.int32) for n in (5, 3))
    ids = np.concatenate((before, np.full((batch, 1), PLACEHOLDER), after), axis=1)
    return jnp.asarray(before), jnp.asarray(after), torch.from_numpy(ids)


# --- parity --------------------------------------------------------------------------------------


def test_tower(checkpoint: Checkpoint) -> None:
    tower, (x, y) = checkpoint.model.vision_tower, pixels(3)
    theirs = checkpoint.torch.tower(y[0], output_hidden_states=True)
    ours = jax.jit(tower.hidden_states)(x[0])
    for a, b in zip(ours, theirs.hidden_states, strict=True):
        close(a, b)
    close(jax.jit(tower.pooled)(x[0]), theirs.pooler_output)
    close(jax.jit(tower.features)(x[0]), theirs.hidden_states[-2][:, 1:])


@pytest.mark.parametrize(("frames", "remainder"), [(4, 0), (5, 3)])
def test_resampler(checkpoint: Checkpoint, frames: int, remainder: int) -> None:
    ours, theirs = checkpoint.model.connector, checkpoint.torch.resampler
    x = np.random.default_rng(2).normal(size=(2, frames * 15, 24)).astype(np.float32)
    assert x.shape[1] % 4 == remainder
    close(jax.jit(ours)(x), theirs(torch.from_numpy(x)))
    media = theirs.linear(torch.from_numpy(x))

    @jax.jit
    def states(media: jax.Array) -> list[jax.Array]:
        states = [jnp.broadcast_to(ours.latents[...], (2, *ours.latents.shape))]
        for layer in ours.layers:
            states.append(layer(media, states[-1]))
        return states

    for a, b in zip(states(media.numpy()), theirs.states(media), strict=True):
        close(a, b)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_resampler_by_dtype(checkpoint: Checkpoint, dtype: str) -> None:
    """Computed in half precision, it is as far from what float32 gives as PyTorch is."""
    wide = np.random.default_rng(2).normal(size=(2, 45, 24)).astype(np.float32)
    theirs = copy.deepcopy(checkpoint.torch.resampler)
    exact = theirs(torch.from_numpy(wide)).numpy()
    graph, params = nnx.split(checkpoint.model.connector)
    ours = nnx.merge(graph, jax.tree.map(lambda x: x.astype(dtype), params))
    found = jax.jit(ours)(jnp.asarray(wide, dtype))
    half = theirs.to(getattr(torch, dtype))(torch.from_numpy(wide).to(getattr(torch, dtype)))
    assert found.dtype == dtype
    off, expected = (np.abs(np.asarray(x, np.float32) - exact).max() for x in (found, half.float()))
    assert off <= 2 * expected + 1e-5


@pytest.mark.parametrize(("length", "size"), [(512, 2048), (16 * 728, 2560)])
def test_positions_are_rounded_alike(length: int, size: int) -> None:
    ours, theirs = position_encoding(length, size, "float16"), positions(length, size).numpy()
    assert ours.dtype == theirs.dtype == np.float16
    assert np.mean(ours != theirs) < 0.01
    # One rounding to half precision, and the last bit of the largest angle in single precision.
    atol = 2**-11 + float(np.spacing(np.float32(length)))
    np.testing.assert_allclose(ours.astype(np.float32), theirs, rtol=0, atol=atol)


@pytest.mark.parametrize("length", [9, 600])
def test_language_model(checkpoint: Checkpoint, length: int) -> None:
    ours, theirs = checkpoint.model.language_model, checkpoint.torch.language_model
    size = ours.config.hidden_size
    x = np.random.default_rng(3).normal(size=(2, length, size)).astype(np.float32)
    before_norm: list[Tensor] = []
    final = getattr(theirs.model, "norm", None) or theirs.model.final_layernorm
    hook = final.register_forward_pre_hook(lambda _, given: before_norm.append(given[0]))
    expected = theirs(inputs_embeds=torch.from_numpy(x), output_hidden_states=True)
    hook.remove()
    *stream, last = expected.hidden_states
    states = jax.jit(lambda x: ours.hidden_states(x)[0])(x)
    # Angles of far positions differ in the last bit of float32.
    tolerance = 1e-5 if length < 10 else 1e-4
    for a, b in zip(states, [*stream, *before_norm, last], strict=True):
        close(a, b, tolerance)
    close(ours.logits(states[-1]), expected.logits, tolerance)


def test_logits_of_the_whole_model(checkpoint: Checkpoint) -> None:
    ours, theirs = checkpoint.model, checkpoint.torch
    (x, y), (before, after, ids) = pixels(3), prompt(ours.config.text.vocab_size)
    embeddings = theirs.embed_prompt(y, ids)
    close(jax.jit(ours.embed_prompt)(x, before, after), embeddings)
    close(jax.jit(ours)(x, before, after), theirs.language_model(inputs_embeds=embeddings).logits)


def test_greedy_generation(checkpoint: Checkpoint) -> None:
    ours, theirs = checkpoint.model, checkpoint.torch
    (x, y), (before, after, ids) = pixels(3, batch=3), prompt(ours.config.text.vocab_size, 3)
    embeddings, steps = theirs.embed_prompt(y, ids), 12

    def both(*eos: int) -> tuple[np.ndarray, np.ndarray]:
        answer = theirs.language_model.generate(
            inputs_embeds=embeddings,
            attention_mask=torch.ones(embeddings.shape[:2], dtype=torch.int64),
            max_new_tokens=steps,
            do_sample=False,
            eos_token_id=list(eos) or None,
            pad_token_id=eos[0] if eos else 0,
        ).numpy()
        if eos:  # it stops when all rows have ended
            answer = np.pad(answer, ((0, 0), (0, steps - answer.shape[1])), constant_values=eos[0])
        generate = jax.jit(partial(ours.generate, max_new_tokens=steps, eos=eos))
        return np.asarray(generate(x, before, after)), answer

    free, expected = both()
    np.testing.assert_array_equal(free, expected)
    # Of the tokens that come before other ones in some answer, the rarest.
    tokens, counts = np.unique(free, return_counts=True)
    eos = next(int(t) for t in tokens[counts.argsort()] if (ended_by(t, free) != free).any())
    ended, expected = both(eos)
    np.testing.assert_array_equal(ended, expected)
    np.testing.assert_array_equal(ended, ended_by(eos, free))


def ended_by(eos: int, tokens: np.ndarray) -> np.ndarray:
    """Rows filled up from the first such token on."""
    return np.where(np.maximum.accumulate(tokens == eos, axis=1), eos, tokens)


# --- near misses ---------------------------------------------------------------------------------


def swapped(a: str, b: str) -> Callable[[dict[str, Tensor]], None]:
    def change(arrays: dict[str, Tensor]) -> None:
        arrays[a], arrays[b] = arrays[b], arrays[a]

    return change


def transposed(key: str) -> Callable[[dict[str, Tensor]], None]:
    def change(arrays: dict[str, Tensor]) -> None:
        arrays[key] = arrays[key].T.contiguous()

    return change


def rolled(key: str, part: int) -> Callable[[dict[str, Tensor]], None]:
    """Another order of equal parts, as of queries, keys and values."""

    def change(arrays: dict[str, Tensor]) -> None:
        arrays[key] = torch.roll(arrays[key], len(arrays[key]) // part, 0)

    return change


TOWER = "vision_tower._vision_tower.vision_model."
LAYER = TOWER + "encoder.layers.1."
LATENTS = "connector._connector.layers.1."
TEXT = "language_model.model.layers.1."
MISSES = {
    "tower: q and k": swapped(LAYER + "self_attn.q_proj.weight", LAYER + "self_attn.k_proj.weight"),
    "tower: q transposed": transposed(LAYER + "self_attn.q_proj.weight"),
    "tower: norms": swapped(LAYER + "layer_norm1.bias", LAYER + "layer_norm2.bias"),
    "head: order of q, k and v": rolled(TOWER + "head.attention.in_proj_weight", 3),
    "resampler: k and v": rolled(LATENTS + "0.to_kv.weight", 2),
    "resampler: norms": swapped(LATENTS + "0.norm_media.weight", LATENTS + "1.0.weight"),
    "text: q and k": swapped(TEXT + "self_attn.q_proj.weight", TEXT + "self_attn.k_proj.weight"),
    "text: out transposed": transposed(TEXT + "self_attn.dense.weight"),
    "text: k and v": swapped(TEXT + "self_attn.v_proj.weight", TEXT + "self_attn.k_proj.weight"),
}


@pytest.fixture(scope="module")
def phi(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    """Its projections are square: no shape tells them apart."""
    with torch.no_grad():
        yield saved(tmp_path_factory.mktemp("phi"), PHI, "groupresampler")


@pytest.fixture(scope="module")
def outputs(phi: Checkpoint) -> Callable[[TinyLlavaVideo], tuple[jax.Array, jax.Array]]:
    """The pooled video and the logits of such a model, compiled once."""
    x, (before, after, _) = pixels(3)[0], prompt(103)
    logits, _ = functional(phi.model)
    pooled, _ = functional(phi.model.vision_tower, "pooled")

    @jax.jit
    def both(params: nnx.State) -> tuple[jax.Array, jax.Array]:
        return pooled(params["vision_tower"], x[0]), logits(params, x, before, after)

    return lambda model: both(nnx.state(model))


@pytest.fixture(scope="module")
def expected(phi: Checkpoint) -> tuple[Tensor, Tensor]:
    y, (_, _, ids) = pixels(3)[1], prompt(103)
    embeddings = phi.torch.embed_prompt(y, ids)
    logits = phi.torch.language_model(inputs_embeds=embeddings).logits
    return phi.torch.tower(y[0]).pooler_output, logits


def test_nothing_missed(phi: Checkpoint, outputs: Any, expected: tuple[Tensor, Tensor]) -> None:
    for a, b in zip(outputs(phi.model), expected, strict=True):
        close(a, b)


@pytest.mark.parametrize("miss", MISSES)
def test_near_misses_are_seen(
    miss: str, phi: Checkpoint, outputs: Any, expected: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    arrays = {key: value.clone() for key, value in phi.torch.state_dict().items()}
    MISSES[miss](arrays)
    save_file(arrays, tmp_path / "model.safetensors")
    pair = zip(outputs(load(tmp_path, phi.model.config)), expected, strict=True)
    pooled, logits = (float(abs(np.asarray(a) - b.numpy()).max()) for a, b in pair)
    assert (pooled if miss.startswith("head") else logits) > 1e-2


# --- configurations ------------------------------------------------------------------------------


def test_configurations_of_transformers(checkpoint: Checkpoint) -> None:
    """Read back as they were, although defaults are not written."""
    theirs, ours = checkpoint.torch, config_from(checkpoint.directory)
    assert ours.context == 640
    assert ours.vision == named("tiny-phi").vision
    text = theirs.language_model.config
    assert isinstance(ours.text, Qwen2Config if text.model_type == "qwen2" else PhiConfig)
    for name, value in vars(ours.text).items():
        assert getattr(text, name) == value
    assert ours.resampler.groups == (1 if theirs.resampler.naive else 4)


@pytest.mark.parametrize("name", ["qwen2", "phi"])
def test_defaults_of_transformers(name: str, tmp_path: Path) -> None:
    """What is not written is what their classes have."""
    text = {"qwen2": hf.Qwen2Config, "phi": hf.PhiConfig}[name]()
    given = {"model_type": "tinyllava", "connector_type": "groupresampler", "num_queries": 64}
    given |= {"group": 8, "num_resampler_layers": 3, "text_config": {"model_type": name}}
    given["vision_config"] = {"model_type": "siglip_vision_model"}
    (tmp_path / "config.json").write_text(json.dumps(given))
    ours = config_from(tmp_path)
    for part, theirs in ((ours.text, text), (ours.vision, hf.SiglipVisionConfig())):
        names = [n for n in vars(part) if hasattr(theirs, n)]
        assert len(names) >= 7
        assert {n: getattr(part, n) for n in names} == {n: getattr(theirs, n) for n in names}


# --- folded weights ------------------------------------------------------------------------------


def test_folded_weights_serve_pytorch(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """The original program computes the same on them, so the public code does."""
    model, theirs = load(checkpoint.directory), checkpoint.torch
    (x, y), (before, after, ids) = pixels(3), prompt(model.config.text.vocab_size)
    function, params = functional(model)
    folded = jax_lnfold.fold(function, params, x, before, after)
    assert folded.report.n_folded > 0
    nnx.update(model, folded.params)
    save(model, tmp_path / "folded", source=checkpoint.directory)
    other = Whole(theirs.config, theirs.tower.config, theirs.language_model.config).eval()
    arrays = dict(read(tmp_path / "folded"))
    edited = [k for k, v in theirs.state_dict().items() if k in arrays and (v != arrays[k]).any()]
    assert len(edited) > 5
    missing, unexpected = other.load_state_dict(arrays, strict=False)
    other.language_model.tie_weights()
    tied = ["language_model.lm_head.weight"] if model.config.text.tie_word_embeddings else []
    assert missing == tied
    assert unexpected == []
    expected = theirs.embed_prompt(y, ids)
    close(jnp.asarray(other.encode_video(y).numpy()), theirs.encode_video(y))
    for whole, embeddings in ((theirs, expected), (other, other.embed_prompt(y, ids))):
        output = whole.language_model(inputs_embeds=embeddings, output_hidden_states=True)
        whole.last = output.hidden_states[-1], output.logits
    for a, b in zip(other.last, theirs.last, strict=True):
        close(jnp.asarray(a.numpy()), b, 2e-5)


def read(directory: Path) -> Iterator[tuple[str, Tensor]]:
    from safetensors.torch import load_file

    yield from load_file(directory / "model.safetensors").items()


# --- training ------------------------------------------------------------------------------------


def test_the_first_stage_leaves_folders_that_both_read(phi: Checkpoint, tmp_path: Path) -> None:
    """Keys as PyTorch's modules of each part have them; only the connector has learnt."""
    config = phi.model.config
    (clip,), (before, after, _) = pixels(3, 1)[0], prompt(103, 1)
    given = Batch(np.array(clip)[None], *map(np.array, (before, after, np.ones((1, 3), bool))))
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    model = load(phi.directory)
    found = fit(model, itertools.repeat(given), 3, parts=("connector",), rate=1e-2, mesh=mesh)
    assert found.losses[-1] < found.losses[0]
    save_parts(found.model, tmp_path / "stage1")
    parts = {
        "vision_tower": phi.torch.tower,
        "language_model": phi.torch.language_model,
        "connector": phi.torch.connector,
    }
    for name, module in parts.items():
        held = torch.load(tmp_path / "stage1" / name / "pytorch_model.bin", weights_only=True)
        shapes = {key: x.shape for key, x in module.named_parameters()}
        assert {key: x.shape for key, x in held.items()} == shapes
    again = load(tmp_path / "stage1")
    assert again.config == config
    for a, b in zip(*(jax.tree.leaves(nnx.state(x)) for x in (found.model, again)), strict=True):
        np.testing.assert_array_equal(a, b)
    old, new = (nnx.state(x.language_model.lm_head) for x in (phi.model, again))
    assert all(map(np.array_equal, *map(jax.tree.leaves, (old, new))))
    change = phi.model.connector.layers[0].attention.to_q.kernel[...]
    assert np.abs(change - again.connector.layers[0].attention.to_q.kernel[...]).max() > 1e-3
    with pytest.raises(InputError, match="holds weights already"):
        save_parts(found.model, tmp_path / "stage1")


def test_the_first_stage_begins_with_parts_as_on_the_hub(
    tmp_path: Path,
) -> None:
    """SigLIP with its half for texts, Phi, and a fresh connector; the rest is as it was."""
    clips = conversations_in(tmp_path)
    (tmp_path / "whole").mkdir()
    phi = saved(tmp_path / "whole", PHI | {"vocab_size": 300}, "groupresampler")
    phi.torch.language_model.save_pretrained(tmp_path / "phi")
    byte_tokenizer().save_pretrained(tmp_path / "phi")
    words = {"hidden_size": VISION["hidden_size"], "num_hidden_layers": 1, "vocab_size": 9}
    siglip = hf.SiglipModel(hf.SiglipConfig(text_config=words, vision_config=VISION))
    siglip.vision_model.load_state_dict(phi.torch.tower.vision_model.state_dict())
    siglip.save_pretrained(tmp_path / "siglip")
    given = ["--tower", str(tmp_path / "siglip"), "--language-model", str(tmp_path / "phi")]
    given += ["--data", str(clips / "data.json"), "--videos", str(clips), "--frames", "4"]
    given += ["--stage", "1", "--connector", "naive", "--queries", "8", "--batch", "8"]
    with jax.enable_x64(False):
        finetune([*given, "--steps", "2", "--output", str(tmp_path / "stage1")])
    found = load(tmp_path / "stage1")
    assert (found.config.vision, found.config.text) == (
        phi.model.config.vision,
        phi.model.config.text,
    )
    assert (found.config.resampler.positions, found.connector.latents.shape[0]) == ("media", 8)
    towers, heads = (
        [jax.tree.leaves(nnx.state(part(m))) for m in (found, phi.model)]
        for part in (lambda m: m.vision_tower, lambda m: m.language_model.lm_head)
    )
    assert all(map(np.array_equal, *towers))
    assert all(map(np.array_equal, *heads))
    assert load_tokenizer(tmp_path / "stage1").eos_token


# --- files of PyTorch ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_in_files_of_pytorch(
    dtype: torch.dtype, phi: Checkpoint, tmp_path: Path
) -> None:
    arrays = {key: x.to(dtype) for key, x in phi.torch.state_dict().items()}
    some = dict(list(arrays.items())[::2])
    torch.save(some, tmp_path / "pytorch_model-00001-of-00002.bin")
    rest = {key: arrays[key] for key in arrays.keys() - some}
    torch.save(rest, tmp_path / "pytorch_model-00002-of-00002.bin")
    names = {key: f"pytorch_model-0000{1 if key in some else 2}-of-00002.bin" for key in arrays}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    (tmp_path / "safe").mkdir()
    save_file(arrays, tmp_path / "safe/model.safetensors")
    one, other = (load(x, phi.model.config) for x in (tmp_path, tmp_path / "safe"))
    for a, b in zip(*(jax.tree.leaves(nnx.state(x)) for x in (one, other)), strict=True):
        assert a.dtype == b.dtype == str(dtype).removeprefix("torch.")
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


class Trap:
    """Writes a file if it is ever unpickled."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.sprung,)


def test_files_of_pytorch_that_are_no_weights(phi: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((phi.directory / "config.json").read_text())
    file, sprung, state = tmp_path / "pytorch_model.bin", tmp_path / "x", phi.torch.state_dict()
    torch.save({"epoch": 3, "state_dict": state}, file)
    load(tmp_path)
    cases: dict[str, Any] = {
        r"is in the format from before PyTorch 1\.6.* convert it to safetensors": state,
        r"is damaged or cut short; download it again": state,
        r"holds more than arrays: loading all of it would run code, so none was": Trap(sprung),
        r"holds a list; there should be arrays by name": [state],
        r"holds 'epoch', which is no plain array by name": state | {"epoch": 3},
        r"holds 7, which is no plain array": {7: torch.zeros(2)},
        r"holds 'x', which is no plain array": {"x": torch.eye(2).to_sparse()},
    }
    for said, held in cases.items():
        torch.save(held, file, _use_new_zipfile_serialization="before" not in said)
        if "cut short" in said:
            file.write_bytes(file.read_bytes()[:5000])
        with pytest.raises(InputError, match=rf"pytorch_model\.bin {said}") as caught:
            load(tmp_path)
        assert "weights_only" not in str(caught.value)
    assert not sprung.exists()
