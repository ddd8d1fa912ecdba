"""TinyLLaVA-Video: what folds in it, that folding changes nothing, and how it generates."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jax_lnfold
from examples.tinyllava_video.config import CONFIGS, Config, ResamplerConfig, named
from examples.tinyllava_video.errors import InputError
from examples.tinyllava_video.generation import Decoding
from examples.tinyllava_video.model import TinyLlavaVideo, abstract, functional
from examples.tinyllava_video.resampler import Resampler, position_encoding

TINY = ("tiny-qwen2", "tiny-phi")
# Attention takes its softmax in float32, whatever the dtype of the model.
close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)


def configured(name: str, *, feature_norm: bool = False, **resampler: Any) -> Config:
    config = named(name)
    vision = replace(config.vision, feature_norm=feature_norm)
    return replace(config, vision=vision, resampler=replace(config.resampler, **resampler))


def made(config: Config) -> TinyLlavaVideo:
    """With random weights in float64, scales and biases included."""
    graph, shapes = nnx.split(abstract(config))
    rng = np.random.default_rng(3)
    return nnx.merge(
        graph, jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape)), shapes)
    )


def inputs(config: Config, batch: int = 2, frames: int = 5) -> tuple[jax.Array, ...]:
    rng, side = np.random.default_rng(1), config.vision.image_size
    pixels = rng.uniform(-1, 1, (batch, frames, side, side, 3))
    before, after = rng.integers(0, 256, (batch, 7)), rng.integers(0, 256, (batch, 4))
    return jnp.asarray(pixels), jnp.asarray(before, jnp.int32), jnp.asarray(after, jnp.int32)


def counts(report: jax_lnfold.Report, part: str) -> tuple[int, int]:
    """How many LayerNorms of a part of the model are folded, and how many there are."""
    found = [n.folded for n in report.norms if n.path.startswith(part)]
    return sum(found), len(found)


def checked(function: Callable[..., Any], params: Any, *given: Any) -> jax_lnfold.Folded:
    """The fold, after both contracts were checked."""
    folded = jax_lnfold.fold(function, params, *given)
    original = jax.jit(function)
    expected = original(params, *given)
    close(jax.jit(folded.apply)(folded.params, *given), expected)
    close(original(folded.params, *given), expected)
    return folded


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("frames", [5, 8], ids=["groups differ", "groups of equal length"])
def test_resampler_folds_at_no_cost(name: str, frames: int) -> None:
    model = made(configured(name))
    tokens = frames * model.config.vision.tokens
    assert bool(tokens % 4) == (frames == 5)
    function, params = functional(model, "encode_video")
    folded = checked(function, params, inputs(model.config, frames=frames)[0])
    resampler = 2 * 3 + 1  # media, latents and feed-forward of two layers; the final one
    twice = 2 if tokens % 4 else 1  # longer groups run by themselves
    assert counts(folded.report, "connector") == (twice * resampler,) * 2
    assert folded.report.n_inserted == 0
    edited = {edit.key_path for edit in folded.plan.edits}
    assert {path.partition("/")[0] for path in edited} == {"connector"}


@pytest.mark.parametrize("positions", ["media", "none"])
def test_naive_resampler_folds_too(positions: str) -> None:
    model = made(configured("tiny-qwen2", groups=1, positions=positions))
    function, params = functional(model, "encode_video")
    folded = checked(function, params, inputs(model.config)[0])
    assert counts(folded.report, "connector") == (7, 7)


def test_tower_is_read_raw_unless_through_its_norm() -> None:
    reports = {}
    for feature_norm in (False, True):
        model = made(configured("tiny-qwen2", feature_norm=feature_norm))
        function, params = functional(model, "encode_video")
        reports[feature_norm] = checked(function, params, inputs(model.config)[0]).report
    assert counts(reports[False], "vision_tower") == (0, 4)
    left = [norm for norm in reports[False].norms if not norm.folded]
    assert {norm.advice for norm in left} == {
        "let this operation read the stream through a LayerNorm"
    }
    (why,) = {norm.reason for norm in left}
    assert "`dot_general` (resampler.py:" in why
    assert why.endswith("reads the shifted value across the mean")
    assert counts(reports[True], "vision_tower") == (5, 5)
    assert reports[True].n_inserted == 0


def test_phi_folds_in_prefill_and_in_decoding() -> None:
    model = made(configured("tiny-phi"))
    function, params = functional(model)
    given = inputs(model.config)
    report = checked(function, params, *given).report
    assert counts(report, "language_model") == (3, 3)
    assert report.n_inserted == 1  # the video ends in a scale and a bias
    generate, _ = functional(model, "generate", max_new_tokens=5)
    folded = jax_lnfold.fold(generate, params, *given)
    assert counts(folded.report, "language_model") == (6, 6)
    original, tokens = jax.jit(generate), jax.jit(folded.apply)(folded.params, *given)
    np.testing.assert_array_equal(tokens, original(params, *given))
    np.testing.assert_array_equal(tokens, original(folded.params, *given))


def test_qwen2_is_left_bit_for_bit() -> None:
    model = made(configured("tiny-qwen2"))
    graph, params = nnx.split(model.language_model)

    def function(params: Any, x: jax.Array) -> jax.Array:
        lm = nnx.merge(graph, params)
        return lm.logits(lm.hidden_states(x)[0][-1])

    x = jax.random.normal(jax.random.key(0), (2, 6, 32), jnp.float64)
    folded = jax_lnfold.fold(function, params, x)
    assert not folded.report.norms
    assert not folded.plan.edits
    assert all(map(np.array_equal, *map(jax.tree.leaves, (folded.params, params))))
    before, after = jax.jit(function)(params, x), jax.jit(folded.apply)(params, x)
    np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("name", TINY)
def test_cache_gives_the_tokens_that_whole_sequences_give(name: str) -> None:
    model = made(configured(name))
    given = inputs(model.config)
    generate, params = functional(model, "generate", max_new_tokens=6)
    tokens = np.asarray(jax.jit(generate)(params, *given))
    whole, _ = functional(model)
    longer = jnp.concatenate((given[2], tokens[:, :-1]), axis=1)
    logits = jax.jit(whole)(params, *given[:2], longer)
    np.testing.assert_array_equal(logits[:, -6:].argmax(-1), tokens)
    eos = int(tokens[0, 2])
    stopping, _ = functional(model, "generate", max_new_tokens=6, eos=(eos, 256))
    stopped = np.asarray(jax.jit(stopping)(params, *given))
    for row, full in zip(stopped, tokens, strict=True):
        ends = np.flatnonzero(full == eos)
        last = ends[0] if len(ends) else 5
        np.testing.assert_array_equal(row[: last + 1], full[: last + 1])
        assert (row[last + 1 :] == eos).all()


def test_batches_of_unequal_prompts_are_as_one_by_one() -> None:
    """However much they are filled up, and in pieces of the answer, too."""
    model = made(configured("tiny-phi"))
    pixels, before, _ = inputs(model.config, batch=1)
    video = jax.jit(model.encode_video)(pixels)
    rng, lengths, decoding = np.random.default_rng(7), (4, 9, 1), Decoding(6)
    rows = [rng.integers(0, 256, n) for n in lengths]
    generate, params = functional(model, "generate", max_new_tokens=6)
    alone = [jax.jit(generate)(params, pixels, before, row[None])[0] for row in rows]
    begin, advance = (
        jax.jit(functional(model, name, decoding=decoding)[0]) for name in ("begin", "advance")
    )
    for longest in (9, 16):
        empty = jnp.array([longest - n for n in lengths], jnp.int32)
        after = np.stack([np.pad(row, (longest - len(row), 0), constant_values=9) for row in rows])
        given = np.repeat(video, 3, axis=0), np.repeat(before, 3, axis=0), after, empty
        state = begin(params, *given)
        for limit in (3, 6):
            state = advance(params, state, limit)
            assert state.step == limit
        np.testing.assert_array_equal(state.completed(), alone)
    assert len({tuple(np.asarray(row).tolist()) for row in alone}) == 3


def test_sampling_keeps_to_the_likeliest() -> None:
    probabilities = np.array([0.02, 0.5, 0.08, 0.1, 0.3])
    logits = jnp.broadcast_to(jnp.log(probabilities), (4000, 5))

    def draw(**options: float) -> jax.Array:
        return Decoding(**options).next_token(logits, jax.random.key(0))

    share = np.bincount(draw(temperature=1.0, top_p=1.0), minlength=5) / 4000
    np.testing.assert_allclose(share, probabilities, atol=0.03)
    assert set(np.unique(draw(temperature=1.0, top_p=0.75))) == {1, 4}
    assert set(np.unique(draw(temperature=1.0, top_p=0.85))) == {1, 3, 4}
    assert set(np.unique(draw(temperature=1.0, top_p=1e-6))) == {1}
    sharper = np.bincount(draw(temperature=0.5, top_p=1.0), minlength=5) / 4000
    np.testing.assert_allclose(sharper, probabilities**2 / (probabilities**2).sum(), atol=0.03)
    assert (Decoding().next_token(logits, None) == 1).all()
    assert set(np.unique(draw(temperature=1.0, top_k=3))) == {1, 3, 4}
    assert set(np.unique(draw(temperature=9.0, top_k=0))) == {*range(5)}
    # Of the three likeliest (0.9 together) the first has 0.56: the second is needed for 0.85.
    assert set(np.unique(draw(temperature=1.0, top_k=3, top_p=0.85))) == {1, 4}


def test_sampled_answers_fold() -> None:
    model = made(configured("tiny-qwen2"))
    given = *inputs(model.config), jax.random.key(5)
    options = {"max_new_tokens": 8, "temperature": 1.5, "top_p": 0.9}
    generate, params = functional(model, "generate", **options)
    folded = jax_lnfold.fold(generate, params, *given)
    original, tokens = jax.jit(generate), jax.jit(folded.apply)(folded.params, *given)
    np.testing.assert_array_equal(tokens, original(params, *given))
    assert (tokens != original(params, *given[:-1], jax.random.key(6))).any()


def test_groups_are_read_by_themselves() -> None:
    """What is in one group is not seen by the queries of another."""
    config = ResamplerConfig(12, 4, 2, 2, 8)
    resampler = Resampler(config, 6, 32, nnx.Rngs(0))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 11, 6)).astype(np.float32)  # groups of 3, 3, 3 and 2 tokens
    changed = x.copy()
    changed[:, 6:9] += 1
    first, second = (jax.jit(resampler)(jnp.asarray(y)) for y in (x, changed))
    differs = np.abs(first - second).max(axis=(0, 2))
    np.testing.assert_array_equal(differs > 1e-6, np.arange(12) // 3 == 2)


def test_position_encoding() -> None:
    table = position_encoding(5, 8)
    assert table.shape == (5, 8)
    np.testing.assert_allclose(table[3, 4], np.sin(3 * 10000 ** (-4 / 8)), rtol=1e-6)
    np.testing.assert_allclose(table[3, 5], np.cos(3 * 10000 ** (-4 / 8)), rtol=1e-6)


def test_bad_input() -> None:
    model = made(configured("tiny-qwen2"))
    pixels, before, after = inputs(model.config)
    generate = partial(model.generate, pixels, before, after)
    with pytest.raises(InputError, match="tokens are fewer than the 4 groups"):
        model.connector(jnp.zeros((1, 3, 24)))
    with pytest.raises(InputError, match=r"pixels: \(28, 30, 3\) are given"):
        model.encode_video(pixels[:, :, :28])
    with pytest.raises(InputError, match="it takes 23 positions with the video, the answer 1002"):
        generate(max_new_tokens=1002)
    assert jax.eval_shape(partial(generate, max_new_tokens=1001)).shape == (2, 1001)
    for bad in ({"max_new_tokens": 0}, {"max_new_tokens": 3, "temperature": -1.0}):
        with pytest.raises(InputError):
            generate(**bad)
    with pytest.raises(InputError, match="top_p"):
        generate(max_new_tokens=3, temperature=1.0, top_p=0.0)
    with pytest.raises(InputError, match="key: sampling needs one"):
        generate(max_new_tokens=3, temperature=1.0)
    with pytest.raises(InputError, match=r"there is no 'gpt-5'; there are TinyLLaVA-Video-Qw"):
        named("gpt-5")
    with pytest.raises(InputError, match="10 are not divisible by 4 groups"):
        ResamplerConfig(10, 4)


@pytest.mark.parametrize("name", TINY)
def test_everything_is_computed_in_the_dtype_of_the_weights(name: str) -> None:
    """Logits are float32, for the choice among many."""
    model = made(configured(name))
    graph, params = nnx.split(model)
    model = nnx.merge(graph, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
    given = inputs(model.config)
    assert jax.eval_shape(model.embed_prompt, *given).dtype == jnp.bfloat16
    x = jax.ShapeDtypeStruct((2, 4, model.config.text.hidden_size), jnp.bfloat16)
    states, cache = jax.eval_shape(
        model.language_model.hidden_states, x, model.language_model.empty_cache(2, 9)
    )
    assert {s.dtype for s in jax.tree.leaves((states, cache))} == {jnp.dtype(jnp.bfloat16)}
    assert jax.eval_shape(model, *given).dtype == jnp.float32
    tokens = jax.eval_shape(partial(model.generate, max_new_tokens=3), *given)
    assert tokens.shape == (2, 3)


def test_public_models_have_their_published_sizes() -> None:
    def size(tree: Any) -> int:
        return sum(x.size for x in jax.tree.leaves(nnx.state(tree)))

    qwen, phi = (
        abstract(named(f"TinyLLaVA-Video-{name}-16-512"))
        for name in ("Qwen2.5-3B-Group", "Phi2-Naive")
    )
    assert size(qwen.vision_tower) == size(phi.vision_tower) == 428_225_600
    assert size(qwen.language_model) == 3_085_938_688
    assert size(phi.language_model) == 2_779_683_840
    assert size(qwen) == 3_629_878_336
    assert qwen.config.vision.tokens * 16 == 11_648 == 16 * 728


PUBLISHED = [name for name in CONFIGS if not name.startswith("tiny")]


def folds_of(name: str, functions: Iterable[str] = ("encode", "begin")) -> jax_lnfold.Report:
    """What folds of a model at its size, from shapes alone."""
    model = abstract(named(name))
    frames = max(16, model.config.num_frames * -64)  # of one a second, 64
    encode, params = functional(model, "encode_video")
    begin, _ = functional(model, "begin", decoding=Decoding(64))
    pixels = jax.ShapeDtypeStruct((1, frames, 384, 384, 3), jnp.float32)
    ids = (jax.ShapeDtypeStruct((1, n), jnp.int32) for n in (40, 32))
    empty = jax.ShapeDtypeStruct((1,), jnp.int32)
    given = {"encode": (pixels,), "begin": (jax.eval_shape(encode, params, pixels), *ids, empty)}
    parts = {"encode": encode, "begin": begin}
    return jax_lnfold.analyze(
        {part: parts[part] for part in functions}, params, {part: given[part] for part in functions}
    )


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name.endswith("up-16-512")])
def test_public_resampler_folds_at_its_size(name: str) -> None:
    """The tower is read raw at its second-to-last stream."""
    report = folds_of(name, ["encode"])
    assert counts(report, "encode/connector") == (10, 10)
    assert counts(report, "encode/vision_tower") == (0, 52)
    assert report.n_inserted == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_as_the_readme_says(name: str) -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    row = next(line for line in readme.splitlines() if f"`{name.rpartition('Video-')[2]}`" in line)
    *_, parameters, norms, folded = (x.strip().replace(",", "") for x in row.strip("|").split("|"))
    report = folds_of(name)
    assert (len(report.norms), report.n_folded) == (int(norms), int(folded))
    sizes = jax.tree.leaves(nnx.state(abstract(named(name))))
    assert sum(x.size for x in sizes) == int(parameters)
