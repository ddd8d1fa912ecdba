"""Training on conversations: what is learnt, and a stage with adapters on eight devices."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from examples.tinyllava_video.config import Config, named
from examples.tinyllava_video.conversations import batches, captions, dialogues, examples
from examples.tinyllava_video.errors import InputError
from examples.tinyllava_video.finetune import main
from examples.tinyllava_video.model import TinyLlavaVideo
from examples.tinyllava_video.separate import fresh_connector, joined
from examples.tinyllava_video.text import byte_tokenizer
from examples.tinyllava_video.weights import load, placed, save

ROUNDS = [("<image>\nWhat is it?", "A cat."), ("And where?", "There, of course.")]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("model") / "tiny"
    save(TinyLlavaVideo(named("tiny-phi"), nnx.Rngs(0)), where)
    byte_tokenizer().save_pretrained(where)
    return where


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return conversations_in(tmp_path_factory.mktemp("data"))


def conversations_in(where: Path) -> Path:
    """Writes a video and three conversations about it."""
    with av.open(str(where / "v.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for n in range(8):
            shown = np.full((48, 64, 3), 30 * n, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(shown)))
        container.mux(stream.encode())
    names = "human", "gpt"
    rows = [
        {"video": "v.mp4", "conversations": said(rounds, names)}
        for rounds in (ROUNDS, ROUNDS[:1], [(f"{ROUNDS[0][0]} Say.", "Yes")])
    ]
    (where / "data.json").write_text(json.dumps(rows))
    return where


def said(rounds: list[tuple[str, str]], names: tuple[str, str]) -> list[dict[str, str]]:
    return [
        {"from": name, "value": text}
        for pair in rounds
        for name, text in zip(names, pair, strict=True)
    ]


def text_of(tokenizer: Any, ids: np.ndarray, learnt: np.ndarray) -> str:
    """Only what is learnt, runs of it split by bars."""
    marked = np.where(learnt, ids, -1)
    runs = re.split(r"(?:-1 ?)+", " ".join(map(str, marked)))
    return "|".join(tokenizer.decode([int(n) for n in run.split()]) for run in runs if run)


def test_answers_and_their_ends_are_learnt(tokenizer: Any) -> None:
    before, after, learnt = dialogues(tokenizer, ROUNDS)
    assert tokenizer.decode(before).endswith("USER: ")
    assert tokenizer.decode(after).startswith("\nWhat is it? ASSISTANT: A cat.<|endoftext|>USER: A")
    # The space in front belongs to the answer in vocabularies of words.
    expected = " A cat.<|endoftext|>| There, of course.<|endoftext|>"
    assert text_of(tokenizer, after, learnt) == expected


def test_captions_are_learnt_without_their_questions(tokenizer: Any) -> None:
    before, after, learnt = captions(tokenizer, ROUNDS[:1])
    assert len(before) == 0
    assert text_of(tokenizer, after, learnt) == "A cat.\n"


def test_batches_are_filled_up_where_nothing_is_learnt(tokenizer: Any, data: Path) -> None:
    found = examples(data / "data.json", data, tokenizer, 2)
    given = next(batches(found, named("tiny-phi"), 3, frames=5))
    assert given.pixels.shape == (3, 5, 30, 30, 3)
    assert given.after.shape[1] % 32 == 0
    texts = {text_of(tokenizer, *row) for row in zip(given.after, given.learnt, strict=True)}
    assert " A cat.<|endoftext|>" in texts
    assert " Yes<|endoftext|>" in texts


def test_nothing_is_learnt_from_a_damaged_video(
    tokenizer: Any, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "v.mp4").write_bytes(b"none")
    found = examples(data / "data.json", tmp_path, tokenizer, 2)
    given = next(batches(found, named("tiny-phi"), 3, frames=5))
    assert not given.learnt.any()
    assert "nothing is learnt from it" in capsys.readouterr().err


def test_bad_files(tokenizer: Any, data: Path, tmp_path: Path) -> None:
    file = tmp_path / "data.json"
    for rows, said in (
        ("{", "is no file of conversations"),
        ('[{"video": "v.mp4"}]', "is no file of conversations"),
        ('[{"video": "x.mp4", "conversations": [{"from": "human", "value": "a"}, '
         '{"from": "gpt", "value": "b"}]}]', "videos: 1 are missing, such as"),
        ("[]", "has nothing to learn"),
    ):  # fmt: skip
        file.write_text(rows)
        with pytest.raises(InputError, match=said):
            examples(file, data, tokenizer, 2)


def test_adapters_keep_the_constraint_on_eight_devices(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is written is a whole checkpoint, centered, of which frozen parts are as they were."""
    given = ["--weights", str(checkpoint), "--data", str(data / "data.json"), "--videos", str(data)]
    given += ["--stage", "2", "--frames", "4", "--batch", "8", "--output", str(tmp_path / "new")]
    with jax.enable_x64(False):
        main([*given, "--lora", "2", "--steps", "6", "--rate", "1e-2"])
        shown = capsys.readouterr()
        losses = re.search(r"loss (\S+) -> (\S+); drift (\S+)", shown.out)
        assert losses is not None
        first, last, drift = map(float, losses.groups())
        assert last < first - 0.2
        assert drift <= 1
        assert "10 of 14 LayerNorms were RMSNorms" in shown.err
        old, new = (load(path) for path in (checkpoint, tmp_path / "new"))
    kernels = [
        [
            np.asarray(m.language_model.layers[1].mlp.fc2.kernel[...], np.float64)
            for m in (old, new)
        ],
        [np.asarray(m.connector.linear.kernel[...], np.float64) for m in (old, new)],
    ]
    for before, after in kernels:
        assert np.abs(after.mean(-1)).max() < 1e-6 * np.abs(after).max()
        centered = before - before.mean(-1, keepdims=True)
        assert np.abs(after - centered).max() > 1e-3
    change = kernels[0][1] - (kernels[0][0] - kernels[0][0].mean(-1, keepdims=True))
    assert np.linalg.matrix_rank(change, tol=1e-5) == 2
    tower = [nnx.state(m.vision_tower) for m in (old, new)]
    assert all(map(np.array_equal, *map(jax.tree.leaves, tower)))
    with pytest.raises(SystemExit):
        main(given)
    assert "holds weights already" in capsys.readouterr().err


@pytest.fixture(scope="module")
def parts(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tower and a language model as they are on the hub, with the arrays of the checkpoint."""
    where = tmp_path_factory.mktemp("parts")
    tower, language_model = where / "siglip", where / "phi"
    described = json.loads((checkpoint / "config.json").read_text())
    arrays = load_file(checkpoint / "model.safetensors")
    begins = "vision_tower._vision_tower.", "language_model."
    for part, begin in zip((tower, language_model), begins, strict=True):
        part.mkdir()
        held = {k.removeprefix(begin): x for k, x in arrays.items() if k.startswith(begin)}
        if part is tower:  # of which the half for texts is not read
            held |= {"text_model.head.bias": np.ones(3, np.float32), "logit_scale": np.ones(1)}
        save_file(held, part / "model.safetensors")
    both = {"model_type": "siglip", "vision_config": described["vision_config"]}
    (tower / "config.json").write_text(json.dumps(both | {"text_config": {}}))
    (language_model / "config.json").write_text(json.dumps(described["text_config"]))
    byte_tokenizer().save_pretrained(language_model)
    return tower, language_model


def test_parts_and_a_fresh_connector_are_a_model(
    checkpoint: Path, parts: tuple[Path, Path]
) -> None:
    config, stored = joined(*parts, "naive", seed=3, queries=8)
    found, known = placed("parts", config, stored), load(checkpoint)
    assert (config.resampler.positions, config.resampler.num_queries) == ("media", 8)
    assert (config.vision, config.text) == (known.config.vision, known.config.text)
    for part in ("vision_tower", "language_model"):
        leaves = [jax.tree.leaves(nnx.state(getattr(m, part))) for m in (found, known)]
        assert all(map(np.array_equal, *leaves))
    again, other = (fresh_connector(config, seed) for seed in (3, 4))
    assert {key for key in stored if key.startswith("connector.")} == {*again}
    key = "connector._connector.linear.weight"
    one, same, another = (x[key].read((slice(None),) * 2) for x in (stored, again, other))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, another)
    assert np.array_equal(found.connector.linear.kernel[...], one.T)
    pixels = np.zeros((1, 4, 30, 30, 3), np.float32)
    assert found.encode_video(pixels).shape == (1, 8, config.text.hidden_size)


def few_words() -> Config:
    config = named("tiny-phi")
    return replace(config, text=replace(config.text, vocab_size=99))


def test_parts_that_do_not_fit(
    checkpoint: Path,
    parts: tuple[Path, Path],
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tower, language_model = map(str, parts)
    given = ["--data", str(data / "data.json"), "--videos", str(data), "--output", "never"]
    both = ["--tower", tower, "--language-model", language_model]
    for more, said in (
        ([], "give either --weights, or both --tower and --language-model"),
        (["--tower", tower], "give either --weights"),
        ([*both, "--weights", str(checkpoint)], "give either --weights"),
        (["--tower", tower, "--language-model", tower], "config: model_type is 'siglip'"),
        (["--tower", language_model, "--language-model", language_model], "config: "),
        (["--tower", str(data), "--language-model", language_model], "config.json cannot be read"),
    ):
        with pytest.raises(SystemExit):
            main([*given, "--stage", "1", *more])
        shown = capsys.readouterr().err
        assert said in shown
        assert len(shown.splitlines()) == 1
    small = tmp_path / "small"
    save(TinyLlavaVideo(few_words(), nnx.Rngs(0)), small)
    byte_tokenizer().save_pretrained(small)
    with pytest.raises(SystemExit):
        main([*given, "--stage", "2", "--weights", str(small)])
    assert "and the model knows 99 tokens" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*given, "--stage", "2", *both])
    assert "stage 2 goes on with what stage 1 wrote" in capsys.readouterr().err
