"""What the command line asks for, checked as far as it can be before weights are read."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .config import Config, named
from .errors import InputError
from .generation import Decoding
from .pipeline import batch_of
from .text import byte_tokenizer, encode_prompt, load_tokenizer
from .video import Frames, check_picture, checked_numbers, preprocess, read_video
from .weights import check, check_destination

if TYPE_CHECKING:  # a slow import
    from transformers import PreTrainedTokenizerBase

SUFFIXES = {".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv"}
"""What counts as a video in a folder of them."""


@dataclass(frozen=True)
class Job:
    """Questions about videos, and how they are answered."""

    config: Config
    tokenizer: PreTrainedTokenizerBase
    decoding: Decoding
    videos: list[Path]
    questions: list[str]
    read: Callable[[Path], Frames]
    first: Frames | None
    """Of the video, if there is but one."""

    def pixels(self, frames: Frames) -> np.ndarray:
        """What the model reads."""
        return preprocess(frames.pixels, self.config.vision.image_size)


def checked(options: argparse.Namespace) -> Job:
    """What is to be done; no weights have been read, and nothing is written.

    Raises:
        InputError: something given cannot be used.
    """
    config = check(options.weights) if options.weights else named(options.config)
    decoding, tokenizer = Decoding(**decoding_options(options)), tokenizer_of(options)
    questions = questions_of(options)
    for question in questions or ["?"]:
        batch_of([encode_prompt(tokenizer, question)], config, decoding.max_new_tokens)
    if options.batch < 1:
        raise InputError(f"batch: must be at least 1, not {options.batch}")
    if options.save:
        check_destination(options.save, config, options.weights)
    videos = videos_of(Path(options.video))
    if options.chat and len(videos) > 1:
        raise InputError("video: a conversation is about one; give a file")
    count, limit = checked_numbers(
        config.num_frames if options.frames is None else options.frames,
        config.max_frames if options.max_frames is None else options.max_frames,
    )
    read = partial(read_video, num_frames=count, max_frames=limit)
    if options.sheet:
        check_picture(options.sheet)
        if len(videos) > 1:
            raise InputError("sheet: there are several videos; give it with one of them")
    first = read(videos[0]) if len(videos) == 1 else None
    return Job(config, tokenizer, decoding, videos, questions, read, first)


def decoding_options(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of `Decoding` that the command line has."""
    names = "max_new_tokens", "temperature", "top_k", "top_p"
    return {name: getattr(options, name) for name in names}


def tokenizer_of(options: argparse.Namespace) -> PreTrainedTokenizerBase:
    """The checkpoint's, or another one."""
    if where := options.tokenizer or options.weights:
        return load_tokenizer(where)
    if not options.config.startswith("tiny"):
        raise InputError("tokenizer: a model of this size needs one; name its folder")
    return byte_tokenizer()


def questions_of(options: argparse.Namespace) -> list[str]:
    """One, or those of a file, or none yet in a conversation."""
    if options.questions is None:
        return [] if options.chat else [options.prompt]
    try:
        lines = Path(options.questions).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"questions: {options.questions} cannot be read ({error})") from error
    if not (found := [line.strip() for line in lines if line.strip()]):
        raise InputError(f"questions: {options.questions} has none; write one on each line")
    return found


def videos_of(path: Path) -> list[Path]:
    """The video, or those in a folder, by name."""
    if not path.is_dir():
        return [path]
    found = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
    if not found:
        raise InputError(f"video: {path} has none that ends in {', '.join(sorted(SUFFIXES))}")
    return found
