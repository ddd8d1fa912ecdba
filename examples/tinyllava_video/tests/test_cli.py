"""TinyLLaVA-Video from the command line, and its training on eight simulated devices."""

from __future__ import annotations

import io
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from examples.tinyllava_video import __main__
from examples.tinyllava_video.__main__ import main
from examples.tinyllava_video.config import named
from examples.tinyllava_video.errors import InputError
from examples.tinyllava_video.fitting import next_logits
from examples.tinyllava_video.job import checked
from examples.tinyllava_video.model import TinyLlavaVideo
from examples.tinyllava_video.pipeline import Pipeline
from examples.tinyllava_video.text import byte_tokenizer
from examples.tinyllava_video.train import batches, clip, train
from examples.tinyllava_video.weights import load

QUESTION = "What happens in <image>?"
PHI = "TinyLLaVA-Video-Phi2-Naive-16-512"


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three seconds of brightening frames."""
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for n in range(30):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 8 * n, np.uint8))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("config", ["tiny-qwen2", "tiny-phi"])
def test_answers_are_those_of_the_original(
    config: str, video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sheet = tmp_path / "sheet.png"
    given = ["--video", str(video), "--prompt", QUESTION, "--config", config]
    given += ["--max-new-tokens", "9", "--seed", "3"]
    main([*given, "--report", "--sheet", str(sheet), "--save", str(tmp_path / "folded")])
    folded = capsys.readouterr()
    kernel = load(tmp_path / "folded").connector.linear.kernel[...]
    assert np.abs(kernel.mean(-1)).max() < 1e-6 < np.abs(kernel).max()
    main([*given, "--original"])
    original = capsys.readouterr()
    assert folded.out == original.out
    assert folded.out.strip()
    assert "random weights, whose answers mean nothing" in folded.err
    assert "resampler.py:" in folded.err
    assert "LayerNorms folded" in folded.err
    assert "LayerNorms" not in original.err
    assert sheet.stat().st_size > 0


def test_without_a_report_one_line_says_what_folded(
    video: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--video", str(video), "--prompt", QUESTION, "--max-new-tokens", "1"])
    assert " LayerNorms ran as RMSNorms" in capsys.readouterr().err


def test_only_a_donated_model_is_used_up() -> None:
    model = TinyLlavaVideo(named("tiny-phi"), nnx.Rngs(3))
    kernel, size = model.connector.linear.kernel[...], model.config.vision.image_size
    pixels = np.random.default_rng(0).uniform(-1, 1, (8, size, size, 3)).astype(np.float32)
    kept, donated = (
        Pipeline(model, byte_tokenizer(), max_new_tokens=4, donate=donate)
        for donate in (False, True)
    )
    answer = kept.answer(pixels, QUESTION)
    assert not kernel.is_deleted()
    assert donated.answer(pixels, QUESTION) == answer
    assert kernel.is_deleted()
    assert not donated.model.connector.linear.kernel[...].is_deleted()


def test_errors_say_what_to_do(
    video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one line, before any weights are read."""
    full = tmp_path / "full"
    full.mkdir()
    (full / "model.safetensors").touch()
    bad = {
        ("--video", "absent.mp4"): "video: there is no file absent.mp4",
        ("--prompt", "<image> and <image>"): "question: contains <image> 2 times",
        ("--max-new-tokens", "900"): "shorten the question or the history, or ask for fewer tokens",
        ("--weights", str(video.parent)): "config.json",
        ("--config", PHI): "tokenizer: a model of this size needs one",
        ("--config", "phi"): "invalid choice: 'phi'",
        ("--frames", "0"): "num_frames: must be a positive whole number or -1",
        ("--max-frames", "0", "--frames", "-1"): "max_frames: must be a positive whole number",
        ("--dtype", "int8"): "--dtype: invalid choice: 'int8' (choose from",
        ("--top-k", "-1"): "top_k: -1 are given",
        ("--questions", str(video)): "not allowed with argument --prompt",
        ("--batch", "0"): "batch: must be at least 1",
        ("--sheet", str(tmp_path / "sheet.mp3")): "sheet: sheet.mp3 should end in .png",
        ("--sheet", str(tmp_path / "absent/sheet.png")): "give a file in a folder that is there",
        ("--save", str(video)): "cannot be made in",
        ("--save", str(full)): "holds weights already",
        ("--tokenizer", str(tmp_path)): "tokenizer: ",
    }

    def unreachable(*_: Any) -> None:
        raise AssertionError("weights were read or made")

    monkeypatch.setattr(__main__, "loaded", unreachable)
    for options, message in bad.items():
        with pytest.raises(SystemExit) as stopped:
            main(["--video", str(video), "--prompt", QUESTION, *options])
        assert stopped.value.code == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1


def test_an_answer_is_printed_whatever_happens_later(
    video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(__main__, "save", full)
    given = ["--video", str(video), "--prompt", QUESTION, "--max-new-tokens", "2", "--original"]
    with pytest.raises(SystemExit):
        main([*given, "--save", str(tmp_path / "new")])
    shown = capsys.readouterr()
    assert shown.out.strip()
    assert "The answer was cut after 2 tokens (--max-new-tokens)." in shown.err
    assert shown.err.endswith("could not be written (No space left on device)\n")


def test_half_precision_runs_on_a_cpu(video: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--video", str(video), "--prompt", QUESTION, "--max-new-tokens", "2"]
    main([*given, "--config", "tiny-phi", "--dtype", "float16"])
    assert " LayerNorms ran as RMSNorms" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("frames", "said"),
    [
        (["-1"], "3 frames of 3.0 s read"),
        (["-1", "--max-frames", "2"], "2 frames of 3.0 s read: no more than that (--max-frames)"),
        (["33"], "33 frames of 3.0 s read: there are 30, and some were taken more than once"),
    ],
)
def test_what_is_read_of_a_video(video: Path, frames: list[str], said: str) -> None:
    given = ["--video", str(video), "--prompt", QUESTION, "--frames", *frames]
    job = checked(options := __main__.parser().parse_args(given))
    assert job.first is not None
    assert __main__.told(job.first, job, options) == said


def test_a_folder_of_videos_and_many_questions(
    video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A damaged video has its line, too."""
    for name in ("b.mp4", "a.mp4"):
        (tmp_path / name).write_bytes(video.read_bytes())
    (tmp_path / "c.mp4").write_bytes(b"no video")
    (tmp_path / "notes.txt").write_text("none")
    asked = ["Why?", "What is it that comes after what came before it, and why does it?", "Who?"]
    (tmp_path / "questions.txt").write_text("\n\n".join(asked))
    given = ["--video", str(tmp_path), "--questions", str(tmp_path / "questions.txt")]
    given += ["--max-new-tokens", "6", "--config", "tiny-phi"]
    with pytest.raises(SystemExit) as stopped:
        main([*given, "--batch", "2"])
    assert stopped.value.code == 1
    shown = capsys.readouterr()
    assert "videos that could not be answered about: 1" in shown.err
    one = [json.loads(line) for line in shown.out.splitlines()]
    assert [Path(line["video"]).name for line in one] == ["a.mp4"] * 3 + ["b.mp4"] * 3 + ["c.mp4"]
    assert [line.get("question") for line in one] == asked * 2 + [None]
    assert [line["answer"] for line in one[:3]] == [line["answer"] for line in one[3:6]]
    assert "cannot be read" in one[-1]["error"]
    main(["--video", str(tmp_path / "a.mp4"), "--prompt", asked[1], *given[4:]])
    assert capsys.readouterr().out.strip() == one[1]["answer"]


def test_a_conversation(
    video: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["--video", str(video), "--max-new-tokens", "20", "--config", "tiny-phi"]
    monkeypatch.setattr("sys.stdin", io.StringIO("Why?\n\n<image> <image>\nAnd then?\n"))
    main([*given, "--chat"])
    shown = capsys.readouterr()
    assert "contains <image>" in shown.err
    first, second = shown.out.split("\n")[:2]
    main([*given, "--prompt", "Why?"])
    assert capsys.readouterr().out.strip() == first
    assert second


def test_new_questions_compile_nothing() -> None:
    model = TinyLlavaVideo(named("tiny-phi"), nnx.Rngs(3))
    size = model.config.vision.image_size
    pixels = np.random.default_rng(0).uniform(-1, 1, (5, size, size, 3)).astype(np.float32)
    pipeline = Pipeline(model, byte_tokenizer(), max_new_tokens=4)
    video = pipeline.encode(pixels)
    pipeline.ask(video, ["What?"])
    with jax.log_compiles():
        compiled: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: compiled.append(record.getMessage())
        logging.getLogger("jax").addHandler(handler)
        try:
            pipeline.ask(video, ["Where is it?"])
            assert not [line for line in compiled if "Compiling" in line]
            pipeline.ask(video, ["Where is it?" * 20])
            assert [line for line in compiled if "Compiling" in line]
        finally:
            logging.getLogger("jax").removeHandler(handler)


def test_ids_that_the_model_does_not_know() -> None:
    config = named("tiny-phi")
    small = TinyLlavaVideo(replace(config, text=replace(config.text, vocab_size=99)), nnx.Rngs(3))
    pixels = np.zeros((5, 30, 30, 3), np.float32)
    with pytest.raises(InputError, match=r"tokenizer: it gives the id \d+, and the model knows 99"):
        Pipeline(small, byte_tokenizer()).answer(pixels, "Why?")


def test_training_keeps_the_constraint_on_eight_devices() -> None:
    config = named("tiny-phi")
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "model"))
    with jax.enable_x64(False):
        found = train(config, 12, mesh=mesh)
        assert found.losses[0] > 5.4  # near the entropy of 257 equally likely tokens
        assert found.losses[-1] < 0.75 * found.losses[0]
        assert found.drift <= 1
        graph, params = nnx.split(found.model)
        connector = found.model.connector
        assert connector.linear.kernel[...].sharding.spec == P(None, "model")
        assert connector.layers[0].attention.to_out.kernel[...].sharding.spec == P("model")
        kernel = np.asarray(params["connector"]["linear"]["kernel"][...], np.float64)
        latents = np.asarray(params["connector"]["latents"][...], np.float64)
        for edited in (kernel, latents):
            assert np.abs(edited.mean(-1)).max() < 1e-6 * np.abs(edited).max()
        given = next(batches(config, 4, seed=9))
        trained, folded = (
            jax.jit(f)(params, given) for f in (found.folded.apply, next_logits(graph))
        )
        np.testing.assert_allclose(trained, folded, atol=2e-3)


def test_clips_show_a_digit_that_moves() -> None:
    image = np.zeros((8, 8))
    image[3, 4] = 16
    shown = clip(image, (0, -1), 5, 30)
    assert shown.shape == (5, 30, 30, 3)
    columns = [np.flatnonzero((frame[..., 0] > 0).any(axis=0)).mean() for frame in shown]
    rows = [np.flatnonzero((frame[..., 0] > 0).any(axis=1)).mean() for frame in shown]
    assert (np.diff(columns) < 0).all()
    assert len({*rows}) == 1
