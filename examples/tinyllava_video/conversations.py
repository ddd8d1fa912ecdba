"""Conversations of training: their files, and which of their tokens are learnt.

A file is a list of objects with ``video`` (a path) and ``conversations``, in which ``human`` and
``gpt`` take turns, as in LLaVA-Video-178K.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import InputError
from .fitting import Batch
from .pipeline import SHORTEST
from .text import END_OF_ANSWER, conversation, halves
from .video import preprocess, read_video

if TYPE_CHECKING:  # a slow import
    from transformers import PreTrainedTokenizerBase

    from .config import Config

ANSWERS = " ASSISTANT: "
"""In front of each answer; not learnt."""


@dataclass(frozen=True, eq=False)
class Example:
    """Ids around the video, and which of those behind it are learnt."""

    video: Path
    before: np.ndarray
    after: np.ndarray
    learnt: np.ndarray


def captions(tokenizer: PreTrainedTokenizerBase, rounds: Sequence[tuple[str, str]]) -> Any:
    """Stage 1: the video, then the answer and a line break; all of that is learnt, no question."""
    before, after = halves(tokenizer, f"<image>{rounds[0][1]}\n")
    return before, after, np.ones(len(after), bool)


def dialogues(tokenizer: PreTrainedTokenizerBase, rounds: Sequence[tuple[str, str]]) -> Any:
    """Stage 2: the conversation, of which answers and their ends are learnt.

    As in the public code, what is in front of an answer is tokenised again to see how long it is,
    less its last token, which is the space that belongs to the answer.
    """
    text = conversation(tokenizer, rounds)
    before, after = halves(tokenizer, text)
    learnt, at = np.zeros(len(before) + 1 + len(after), bool), 0
    end = len(tokenizer(END_OF_ANSWER).input_ids)
    for part in filter(None, text.split(END_OF_ANSWER)):
        asked, found, _ = part.partition(ANSWERS)
        if not found:
            break
        length = _length(tokenizer, part) + end
        learnt[at + _length(tokenizer, asked + ANSWERS) - 1 : at + length] = True
        at += length
    if at != len(learnt):  # it is not tokenised part by part: nothing of it is learnt
        learnt[:] = False
    return before, after, learnt[len(before) + 1 :]


def _length(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """Of a text with or without the video, which counts as one."""
    if "<image>" not in text:
        return len(tokenizer(text).input_ids)
    before, after = halves(tokenizer, text)
    return len(before) + 1 + len(after)


STAGES = {1: captions, 2: dialogues}


def examples(
    file: Path, videos: Path, tokenizer: PreTrainedTokenizerBase, stage: int
) -> list[Example]:
    """All conversations of a file.

    Raises:
        InputError: the file cannot be read or is none of that kind, or a video is missing.
    """
    try:
        rows = json.loads(file.read_text("utf-8"))
        found = [
            Example(videos / row["video"], *STAGES[stage](tokenizer, _rounds(row))) for row in rows
        ]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise InputError(f"data: {file} is no file of conversations ({error!r})") from error
    if missing := [str(each.video) for each in found if not each.video.is_file()]:
        raise InputError(f"videos: {len(missing)} are missing, such as {missing[0]}")
    if not any(each.learnt.any() for each in found):
        raise InputError(f"data: {file} has nothing to learn")
    return found


def _rounds(row: dict[str, Any]) -> list[tuple[str, str]]:
    """Questions and answers; an answer that comes first is passed over."""
    turns = [turn["value"] for turn in row["conversations"]]
    turns = turns[row["conversations"][0]["from"] != "human" :]
    return [(turns[i], turns[i + 1]) for i in range(0, len(turns) - 1, 2)]


def batches(
    found: list[Example], config: Config, size: int, frames: int, seed: int = 0
) -> Iterator[Batch]:
    """Without end, in an order that is drawn anew each time; filled up behind, where not learnt.

    Conversations that are longer than the context are cut, as in the public code.
    """
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(np.resize(np.arange(len(found)), max(size, len(found))))
        for start in range(0, len(order) - size + 1, size):
            yield _batch([found[i] for i in order[start : start + size]], config, frames)


def _batch(some: list[Example], config: Config, frames: int) -> Batch:
    room = config.context - config.resampler.num_queries - len(some[0].before)
    length = min(room, -(-max(len(x.after) for x in some) // SHORTEST) * SHORTEST)

    def filled(rows: list[np.ndarray]) -> np.ndarray:
        return np.stack([np.pad(row, (0, length))[:length] for row in rows])

    pixels = [_pixels(x.video, config, frames) for x in some]
    side = config.vision.image_size
    none = np.zeros((frames, side, side, 3), np.float32)
    return Batch(
        np.stack([none if found is None else found for found in pixels]),
        np.stack([x.before for x in some]),
        filled([x.after for x in some]),
        filled([x.learnt & (y is not None) for x, y in zip(some, pixels, strict=True)]),
    )


def _pixels(video: Path, config: Config, frames: int) -> np.ndarray | None:
    """None of a damaged video: nothing is learnt from it, and training goes on."""
    try:
        read = read_video(video, num_frames=frames)
    except InputError as error:
        print(f"{error}; nothing is learnt from it", file=sys.stderr)
        return None
    return preprocess(read.pixels, config.vision.image_size)
