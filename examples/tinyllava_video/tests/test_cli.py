"""TinyLLaVA-Video from the command line, and its training on eight simulated devices."""

from __future__ import annotations

from pathlib import Path

import av
import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from examples.tinyllava_video.__main__ import main
from examples.tinyllava_video.config import named
from examples.tinyllava_video.model import TinyLlavaVideo
from examples.tinyllava_video.pipeline import Pipeline
from examples.tinyllava_video.text import byte_tokenizer
from examples.tinyllava_video.train import answer_logits, batches, clip, train
from examples.tinyllava_video.weights import load

QUESTION = "What happens in <image>?"


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


def test_errors_say_what_to_do(video: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = {
        ("--video", "absent.mp4"): "video: there is no file absent.mp4",
        ("--frames", "31"): "num_frames: 31 are asked for",
        ("--prompt", "<image> and <image>"): "question: contains <image> 2 times",
        ("--max-new-tokens", "900"): "shorten the question or the history, or ask for fewer tokens",
        ("--weights", str(video.parent)): "config.json",
        ("--config", "phi-2-group-16-512"): "tokenizer: a model of this size needs one",
        ("--frames", "0"): "num_frames: must be a positive whole number or -1",
    }
    for options, message in bad.items():
        with pytest.raises(SystemExit) as stopped:
            main(["--video", str(video), "--prompt", QUESTION, *options])
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err


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
            jax.jit(f)(params, given) for f in (found.folded.apply, answer_logits(graph))
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
