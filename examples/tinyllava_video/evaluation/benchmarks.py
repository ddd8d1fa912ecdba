"""The questions of five benchmarks, in the files that they are published in."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from ..errors import InputError
from ..sampling import Chooser, each_once, evenly, middles, steps
from .subtitles import with_subtitles

DIRECT = "Answer with the option's letter from the given choices directly."
OPEN = "Answer the question directly without explanation."
THINKING = (
    "Output the thinking process in <think> </think> and final answer (option) in <answer> "
    "</answer> tags."
)
FRAMES_A_SECOND = 3
"""Of videos that are folders of pictures (MVBench)."""


@dataclass(frozen=True)
class Item:
    """A question. Without choices its answer is open."""

    video: Path
    question: str
    choices: dict[str, str]
    answer: str
    group: str
    choose: Chooser
    subtitles: Callable[[list[float]], str] | None = None
    """What goes in front of the question, from the times of the frames."""


@dataclass(frozen=True)
class Asking:
    """How questions are put: how many frames, and whether the model thinks first."""

    frames: int = 16
    max_frames: int = 64
    thinking: bool = False
    only: str | None = None
    """The group to ask about, if not all."""

    def text(self, question: str, options: list[str]) -> str:
        """The whole question."""
        return "\n".join([question, *options, THINKING if self.thinking else DIRECT])


def video_mme(questions: Path, videos: Path, asking: Asking) -> Iterator[Item]:
    """A table, a row each; groups are durations: short, medium and long."""
    for row in _rows(questions):
        options = [*row["options"]]
        heading = ["Options:"] if asking.thinking else []
        yield Item(
            videos / f"{row['videoID']}.mp4",
            asking.text(row["question"], heading + options),
            _lettered(options),
            row["answer"],
            row["duration"],
            each_once(asking.frames, asking.max_frames),
        )


# File, folder of the videos, and how frames are taken: those are folders of pictures, too.
MVBENCH = {
    "Fine-grained Pose": ("fine_grained_pose", "nturgbd", "middles"),
    "Episodic Reasoning": ("episodic_reasoning", "tvqa/frames_fps3_hq", "pictures"),
    "Action Sequence": ("action_sequence", "star/Charades_v1_480", "evenly"),
    "Action Prediction": ("action_prediction", "star/Charades_v1_480", "evenly"),
    "Action Antonym": ("action_antonym", "ssv2_video", "middles"),
    "Fine-grained Action": ("fine_grained_action", "Moments_in_Time_Raw/videos", "evenly"),
    "Unexpected Action": ("unexpected_action", "FunQA_test/test", "evenly"),
    "Object Existence": ("object_existence", "clevrer/video_validation", "evenly"),
    "Object Interaction": ("object_interaction", "star/Charades_v1_480", "evenly"),
    "Object Shuffle": ("object_shuffle", "perception/videos", "evenly"),
    "Moving Direction": ("moving_direction", "clevrer/video_validation", "evenly"),
    "Action Localization": ("action_localization", "sta/sta_video", "evenly"),
    "Scene Transition": ("scene_transition", "scene_qa/video", "evenly"),
    "Action Count": ("action_count", "perception/videos", "evenly"),
    "Moving Count": ("moving_count", "clevrer/video_validation", "evenly"),
    "Moving Attribute": ("moving_attribute", "clevrer/video_validation", "evenly"),
    "State Change": ("state_change", "perception/videos", "evenly"),
    "Character Order": ("character_order", "perception/videos", "evenly"),
    "Egocentric Navigation": ("egocentric_navigation", "vlnqa", "evenly"),
    "Counterfactual Inference": ("counterfactual_inference", "clevrer/video_validation", "evenly"),
}


def mvbench(questions: Path, videos: Path, asking: Asking) -> Iterator[Item]:
    """A folder of files, one for each task; start and end count where a video is pictures."""
    for task, (file, folder, way) in MVBENCH.items():
        for row in _rows(questions / f"{file}.json"):
            counts = asking.frames, asking.max_frames
            choose = evenly(*counts) if way == "evenly" else middles(*counts)
            if way == "pictures":
                choose = middles(*counts, bound=(row["start"], row["end"]), first=1)
            yield _bracketed(row, videos / folder / row["video"], task, choose, asking)


MLVU = ("4_count", "3_ego", "2_needle", "5_order", "1_plotQA", "6_anomaly_reco")
MLVU += ("7_topic_reasoning",)


def mlvu(questions: Path, videos: Path, asking: Asking) -> Iterator[Item]:
    """A folder of files, one for each task."""
    for name in MLVU:
        for row in _rows(questions / f"{name}.json"):
            choose = each_once(asking.frames, asking.max_frames)
            task = name.partition("_")[2]
            yield _bracketed(row, videos / name / row["video"], task, choose, asking)


def long_video_bench(questions: Path, videos: Path, asking: Asking) -> Iterator[Item]:
    """One file; `videos` has the folders `videos` and `subtitles`. Subtitles go with frames."""
    for row in _rows(questions):
        choices = dict(zip(ascii_uppercase, row["candidates"], strict=False))
        options = [f"{letter}. {said}" for letter, said in choices.items()]
        yield Item(
            videos / "videos" / row["video_path"],
            asking.text(row["question"], options),
            _lettered(options),
            ascii_uppercase[row["correct_choice"]],
            "all",
            steps(asking.frames, asking.max_frames, duration=row["duration"]),
            with_subtitles(
                json.loads((videos / "subtitles" / row["subtitle_path"]).read_text("utf-8")),
                row["starting_timestamp_for_subtitles"],
                row["duration"],
            ),
        )


def mmvu(questions: Path, videos: Path, asking: Asking) -> Iterator[Item]:
    """One file, with multiple-choice and open questions; those who think get the former only."""
    address = "https://huggingface.co/datasets/yale-nlp/MMVU/resolve/main/"
    for row in _rows(questions):
        choices, group = row.get("choices") or {}, row["question_type"]
        if group == "multiple-choice":
            text = asking.text(row["question"], [f"{k}. {said}" for k, said in choices.items()])
        elif asking.thinking:
            continue
        else:
            text, choices = f"{row['question']}\n{OPEN}", {}
        video = videos / row["video"].removeprefix(address)
        choose = evenly(asking.frames, asking.max_frames)
        yield Item(video, text, choices, row["answer"], group, choose)


BENCHMARKS: dict[str, Callable[[Path, Path, Asking], Iterator[Item]]] = {
    "video-mme": video_mme,
    "mvbench": mvbench,
    "longvideobench": long_video_bench,
    "mlvu": mlvu,
    "mmvu": mmvu,
}


def items(benchmark: str, questions: Path, videos: Path, asking: Asking) -> list[Item]:
    """All questions of a benchmark.

    Raises:
        InputError: a file is missing, or not of its format.
    """
    try:
        found = [*BENCHMARKS[benchmark](questions, videos, asking)]
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise InputError(
            f"questions: {questions} is not as {benchmark} is published ({error!r})"
        ) from error
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"questions: {questions} cannot be read ({error})") from error
    groups = sorted({item.group for item in found})
    found = [item for item in found if asking.only in (None, item.group)]
    if not found:
        raise InputError(f"group: there is none of {asking.only!r}; there are {', '.join(groups)}")
    return found


def _rows(file: Path) -> list[dict[str, Any]]:
    """Of a table, or of JSON, as one list or line by line."""
    if file.suffix == ".parquet":
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise InputError(f"questions: {file} needs pyarrow; `pip install pyarrow`") from error
        return pyarrow.parquet.read_table(file).to_pylist()
    text = file.read_text("utf-8")
    if file.suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    return json.loads(text)


def _lettered(options: list[str]) -> dict[str, str]:
    """Of options such as ``A. Two.``; the end of a sentence is no part of it."""
    return {x.partition(".")[0]: x.split(". ")[1][:-1] for x in options}


def _bracketed(
    row: dict[str, Any], video: Path, task: str, choose: Chooser, asking: Asking
) -> Item:
    """With choices as in ``(A) two``; the answer is the text of one."""
    choices = dict(zip(ascii_uppercase, row["candidates"], strict=False))
    options = [f"({letter}) {said}" for letter, said in choices.items()]
    right = next((x for x, said in choices.items() if said == row["answer"]), "")
    return Item(video, asking.text(row["question"], options), choices, right, task, choose)
