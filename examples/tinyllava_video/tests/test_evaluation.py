"""Benchmarks: their files, their prompts, which frames are taken, and how answers are read."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from examples.tinyllava_video.config import named
from examples.tinyllava_video.errors import InputError
from examples.tinyllava_video.evaluation.__main__ import main
from examples.tinyllava_video.evaluation.benchmarks import DIRECT, MLVU, THINKING, Asking, items
from examples.tinyllava_video.evaluation.choices import (
    chosen,
    chosen_after_thinking,
    or_drawn,
    says,
)
from examples.tinyllava_video.evaluation.subtitles import with_subtitles
from examples.tinyllava_video.model import TinyLlavaVideo
from examples.tinyllava_video.sampling import each_once, evenly, middles, steps
from examples.tinyllava_video.text import byte_tokenizer
from examples.tinyllava_video.weights import save

CHOICES = {"A": "A red hat", "B": "Two dogs", "C": "It rains"}


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        (" C. It rains", "C"),
        (".?B", "B"),
        ("?.B", None),  # marks go one after the other
        ("(A) or rather (B)", "B"),
        ("it is C of course", "C"),
        ("The one: (A), not B ", "A"),
        ("i think that it rains in all of it, not two dogs", "B"),
        ("two dogs", None),  # of five words or fewer
        ("", None),
        ("none of these is what I saw there", None),
    ],
)
def test_which_choice_an_answer_names(answer: str, letter: str | None) -> None:
    assert chosen(answer, CHOICES) == letter


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("<think>A?</think><answer> b </answer>", "B"),
        ("<answer>the second (b)</answer>", "B"),
        ("<answer>neither</answer>", None),
        ("<answer></answer>", None),
        ("A", None),
    ],
)
def test_which_choice_is_named_after_thinking(answer: str, letter: str | None) -> None:
    assert chosen_after_thinking(answer, CHOICES) == letter


def test_where_no_choice_is_named_one_is_drawn() -> None:
    rng = random.Random(0)
    assert {or_drawn(None, CHOICES, rng) for _ in range(40)} == {*CHOICES}
    assert or_drawn("B", CHOICES, rng) == "B"


def test_open_answers() -> None:
    assert says("It is a Red hat.", "red hat")
    assert says("hat", "Red Hat")
    assert not says("a blue one", "red hat")


def test_frames_are_taken_as_each_benchmark_does() -> None:
    assert evenly(4, 9)(10, 2.0) == [0, 3, 6, 9]
    assert evenly(4, 9)(2, 2.0) == [0, 0, 0, 1]
    assert each_once(4, 9)(2, 2.0) == [0, 1]
    assert evenly(-1, 3)(100, 9.7) == [0, 49, 99]
    assert each_once(-1, 30)(100, 0.2) == [0]
    # Parts of 99/4: middles at 12 and 24.75 (rounded to 25, 50, 74) further.
    assert middles(4, 9)(100, 10.0) == [12, 37, 62, 86]
    # 3 a second, counted from 1: from 6 to 12 in three parts.
    assert middles(3, 9, bound=(2.0, 4.0), first=1)(30, 10.0) == [7, 9, 11]
    assert middles(2, 9, bound=(-5.0, 99.0), first=1)(9, 3.0) == [3, 7]
    assert steps(4, 9, duration=10)(100, 10.0) == [0, 25, 50, 75]
    assert steps(16, 9, duration=3)(30, 3.0) == [0, 10, 20]  # no more than seconds


def test_subtitles_go_with_the_frames_around_them() -> None:
    spoken = [
        {"start": "00:00:10.0", "end": "00:00:12.0", "line": "one"},
        {"start": "00:00:15.9", "end": "00:00:16.0", "line": "two"},  # as if a second long
        {"start": "00:00:17.0", "end": "00:00:18.0", "line": "no frame is near"},
    ]
    told = with_subtitles(spoken, 10.0, 20)
    assert told([0.5, 6.0, 9.0]) == "subtitles:[image]onetwo[image][image]\nquestion: \n"
    stamped = [{"timestamp": [11.0, None], "text": "to the end"}]
    assert with_subtitles(stamped, 10.0, 20)([2.0, 9.0]).count("to the end") == 1


def video(path: Path, frames: int = 12) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for n in range(frames):
            shown = np.full((48, 64, 3), 20 * n, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(shown)))
        container.mux(stream.encode())


def written(path: Path, rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows))
    return path


QUESTION = {"question": "Which?", "candidates": ["red", "blue"], "answer": "blue", "video": "v.mp4"}
BRACKETED = f"Which?\n(A) red\n(B) blue\n{DIRECT}"
ADDRESS = "https://huggingface.co/datasets/yale-nlp/MMVU/resolve/main/videos/v.mp4"


def test_prompts(tmp_path: Path) -> None:
    """Of all five formats, in small files."""
    mme = {"videoID": "v", "question": "Who?", "options": ["A. Ann.", "B. Bo."], "answer": "B"}
    rows = [mme | {"duration": "short"}, mme | {"duration": "long"}]
    file = written(tmp_path / "mme.json", rows)
    (one,) = items("video-mme", file, tmp_path, Asking(only="short"))
    assert one.question == f"Who?\nA. Ann.\nB. Bo.\n{DIRECT}"
    assert (one.video, one.choices) == (tmp_path / "v.mp4", {"A": "Ann", "B": "Bo"})
    thinks, _ = items("video-mme", file, tmp_path, Asking(thinking=True))
    assert thinks.question == f"Who?\nOptions:\nA. Ann.\nB. Bo.\n{THINKING}"
    lvb = {"question": "Who?", "candidates": ["Ann.", "Bo."], "correct_choice": 1, "duration": 3}
    lvb |= {"video_path": "v.mp4", "subtitle_path": "s.json", "starting_timestamp_for_subtitles": 0}
    written(tmp_path / "subtitles/s.json", [])
    (one,) = items("longvideobench", written(tmp_path / "l.json", [lvb]), tmp_path, Asking())
    assert one.question == f"Who?\nA. Ann.\nB. Bo.\n{DIRECT}"
    assert (one.video, one.answer) == (tmp_path / "videos/v.mp4", "B")
    assert one.subtitles is not None
    assert one.subtitles([0.0]) == "subtitles:[image]\nquestion: \n"
    mmvu = [
        {"question": "Who?", "video": ADDRESS, "answer": "A", "choices": {"A": "x", "B": "y"}}
        | {"question_type": "multiple-choice"},
        {"question": "Who?", "video": ADDRESS, "answer": "Ann", "question_type": "open-ended"},
    ]
    closed, opened = items("mmvu", written(tmp_path / "m.json", mmvu), tmp_path, Asking())
    assert closed.question == f"Who?\nA. x\nB. y\n{DIRECT}"
    assert opened.question == "Who?\nAnswer the question directly without explanation."
    assert closed.video == tmp_path / "videos/v.mp4"
    assert not opened.choices


def test_mlvu_is_a_file_for_each_task(tmp_path: Path) -> None:
    """Each task has its own folder of videos; frames of short videos are taken once."""
    for k, name in enumerate(MLVU):
        row = QUESTION | {"question": f"{k}?", "duration": 480.0, "question_type": name[2:]}
        written(tmp_path / f"json/{name}.json", [row] if k else [row, row | {"answer": "red"}])
    found = items("mlvu", tmp_path / "json", tmp_path / "video", Asking(frames=4))
    assert [item.question for item in found[1:]] == [
        BRACKETED.replace("Which?", f"{k}?") for k in range(7)
    ]
    tasks = "count ego needle order plotQA anomaly_reco topic_reasoning".split()
    assert [item.group for item in found] == ["count", *tasks]
    assert [item.answer for item in found] == ["B", "A", *"BBBBBB"]
    assert found[-1].video == tmp_path / "video/7_topic_reasoning/v.mp4"
    assert found[0].choose(2, 2.0) == [0, 1]
    (needle,) = items("mlvu", tmp_path / "json", tmp_path, Asking(only="needle", thinking=True))
    assert needle.question == f"2?\n(A) red\n(B) blue\n{THINKING}"
    (tmp_path / "json/3_ego.json").unlink()
    with pytest.raises(InputError, match=r"3_ego\.json"):
        items("mlvu", tmp_path / "json", tmp_path, Asking())


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not as video-mme is published"):
        items("video-mme", written(tmp_path / "a.json", [{"question": "?"}]), tmp_path, Asking())
    with pytest.raises(InputError, match="cannot be read"):
        items("mmvu", tmp_path / "absent.json", tmp_path, Asking())
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read"):
        items("mmvu", tmp_path / "b.json", tmp_path, Asking())
    with pytest.raises(InputError, match=r"group: there is none of None; there are"):
        items("mmvu", written(tmp_path / "c.json", []), tmp_path, Asking())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("model") / "tiny"
    save(TinyLlavaVideo(named("tiny-qwen2"), nnx.Rngs(0)), where)
    byte_tokenizer().save_pretrained(where)
    return where


def test_a_benchmark_from_end_to_end(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """MVBench, one of its videos a folder of pictures with start and end."""
    from examples.tinyllava_video.evaluation.benchmarks import MVBENCH

    for task, (name, _, _) in MVBENCH.items():
        rows = [QUESTION] if task == "Action Antonym" else []
        if task == "Episodic Reasoning":
            rows = [QUESTION | {"video": "v", "start": 1.0, "end": 3.0}]
        written(tmp_path / f"json/{name}.json", rows)
    video(tmp_path / "video/ssv2_video/v.mp4")
    pictures = tmp_path / "video/tvqa/frames_fps3_hq/v"
    pictures.mkdir(parents=True)
    for n in range(1, 13):
        Image.new("RGB", (20, 10), (n, n, n)).save(pictures / f"{n:05}.jpg")
    answers = tmp_path / "answers.jsonl"
    given = ["mvbench", "--weights", str(checkpoint), "--questions", str(tmp_path / "json")]
    given += ["--videos", str(tmp_path / "video"), "--frames", "4", "--max-new-tokens", "2"]
    main([*given, "--answers", str(answers)])
    found = json.loads(capsys.readouterr().out)
    assert {*found} == {"Episodic Reasoning", "Action Antonym", "average"}
    told = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [x["group"] for x in told] == ["Episodic Reasoning", "Action Antonym"]
    assert found["average"] == 50 * sum(x["right"] for x in told)
    assert all(
        item.question == BRACKETED for item in items(given[0], *map(Path, given[4:7:2]), Asking())
    )
    (tmp_path / "video/ssv2_video/v.mp4").unlink()
    with pytest.raises(SystemExit):
        main([*given, "--answers", str(tmp_path / "other.jsonl")])
    assert "videos: 1 are missing, such as" in capsys.readouterr().err
