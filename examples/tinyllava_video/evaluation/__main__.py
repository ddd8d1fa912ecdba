"""Asks a model the questions of a benchmark and counts its right answers.

``python -m examples.tinyllava_video.evaluation mvbench --weights DIR --questions json --videos
video``; files and folders are laid out as they are published.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import track

from ..errors import InputError
from ..pipeline import Pipeline
from ..text import load_tokenizer
from ..video import checked_numbers, preprocess, read_pictures, read_video
from ..weights import check, load
from .benchmarks import BENCHMARKS, FRAMES_A_SECOND, Asking, Item, items
from .choices import chosen, chosen_after_thinking, or_drawn, says


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m examples.tinyllava_video.evaluation", description=__doc__.splitlines()[0]
    )
    made.add_argument("benchmark", choices=BENCHMARKS)
    made.add_argument("--weights", required=True, metavar="DIR")
    made.add_argument("--questions", required=True, type=Path, metavar="PATH")
    made.add_argument("--videos", required=True, type=Path, metavar="DIR")
    made.add_argument("--group", metavar="NAME", help="only these, such as short (Video-MME)")
    made.add_argument("--answers", type=Path, metavar="FILE", help="JSON lines, one a question")
    made.add_argument("--frames", type=int, default=16, metavar="N", help="-1: one a second")
    made.add_argument("--max-frames", type=int, default=64, metavar="N")
    made.add_argument("--max-new-tokens", type=int, default=1024, metavar="N")
    made.add_argument("--temperature", type=float, default=0.0)
    made.add_argument("--thinking", action="store_true", help="as TinyLLaVA-Video-R1 is asked")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Print the shares of right answers in percent, as JSON."""
    options = parser().parse_args(argv)
    try:
        print(json.dumps(evaluated(options), indent=2))
    except InputError as error:
        parser().exit(2, f"{error}\n")


def evaluated(options: argparse.Namespace) -> dict[str, float]:
    """Percent by group and on average.

    Raises:
        InputError: something given cannot be used.
    """
    check(options.weights)
    checked_numbers(options.frames, options.max_frames)
    asking = Asking(options.frames, options.max_frames, options.thinking, options.group)
    asked, tokenizer = (
        items(options.benchmark, options.questions, options.videos, asking),
        load_tokenizer(options.weights),
    )
    if options.answers and (options.answers.exists() or not options.answers.parent.is_dir()):
        raise InputError(f"answers: {options.answers} is there, or its folder is not; give another")
    if missing := [str(item.video) for item in asked if not item.video.exists()]:
        raise InputError(f"videos: {len(missing)} are missing, such as {missing[0]}")
    devices = np.array(jax.devices())
    mesh = Mesh(devices, ("model",)) if len(devices) > 1 else None
    pipeline = Pipeline(
        load(options.weights, dtype=options.dtype, mesh=mesh),
        tokenizer,
        donate=True,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
    )
    told = []
    for record in records(pipeline, asked, options):
        told.append(record)
        if options.answers:
            with options.answers.open("a") as file:
                file.write(json.dumps(record) + "\n")
    return shares(told, overall=options.benchmark != "mlvu")


def records(
    pipeline: Pipeline, asked: list[Item], options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """What came of each question; where an answer names no choice, one is drawn."""
    read, rng = chosen_after_thinking if options.thinking else chosen, random.Random(options.seed)
    bar = {"console": Console(stderr=True), "disable": not sys.stderr.isatty()}
    for item in track(asked, options.benchmark, transient=True, **bar):
        try:
            text, problem = answered(pipeline, item, options.seed), {}
        except InputError as error:  # one of thousands: it has no answer, and the others go on
            text, problem = "", {"error": str(error)}
        letter = read(text, item.choices) if item.choices else None
        yield {
            "video": str(item.video),
            "group": item.group,
            "said": text,
            **problem,
            "named": letter,
            "answer": item.answer,
            "right": or_drawn(letter, item.choices, rng) == item.answer
            if item.choices
            else bool(text) and says(text, item.answer),
        }


def shares(told: list[dict[str, Any]], *, overall: bool) -> dict[str, float]:
    """The average is one of all questions (`overall`) or of the groups."""
    right: dict[str, list[bool]] = {}
    for record in told:
        right.setdefault(record["group"], []).append(record["right"])
    found = {group: 100 * float(np.mean(each)) for group, each in right.items()}
    average = 100 * np.mean([x["right"] for x in told]) if overall else np.mean([*found.values()])
    return found | {"average": float(average)}


def answered(pipeline: Pipeline, item: Item, seed: int) -> str:
    """What the model says."""
    if item.video.is_dir():
        frames = read_pictures(item.video, item.choose, FRAMES_A_SECOND)
    else:
        frames = read_video(item.video, choose=item.choose)
    pixels = preprocess(frames.pixels, pipeline.config.vision.image_size)
    said = item.subtitles(frames.seconds.tolist()) if item.subtitles else ""
    (answer,) = pipeline.ask(pipeline.encode(pixels), [said + item.question], seed=seed)
    return answer.text


if __name__ == "__main__":
    main()
