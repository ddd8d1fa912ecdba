"""Answers questions about videos.

``python -m examples.tinyllava_video --video clip.mp4 --prompt "What happens?" --weights DIR``;
without weights a tiny model with random ones shows that everything runs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import track

from .config import CONFIGS
from .errors import InputError
from .job import Job, checked, decoding_options
from .model import TinyLlavaVideo
from .pipeline import Answer, Pipeline
from .video import ONE_A_SECOND, Frames, show
from .weights import load, save

DTYPES = ("float32", "bfloat16", "float16", "stored")


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong."""

    def error(self, message: str) -> NoReturn:
        """End the program."""
        self.exit(2, f"{message}; --help shows what there is\n")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = Parser(prog="python -m examples.tinyllava_video", description=__doc__.splitlines()[0])
    made.add_argument("--video", required=True, metavar="PATH", help="a file, or a folder of them")
    asked = made.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompt", metavar="TEXT", help="the question")
    asked.add_argument("--questions", metavar="FILE", help="one on each line; prints JSON lines")
    asked.add_argument("--chat", action="store_true", help="ask on, one line after the other")
    made.add_argument("--weights", metavar="DIR", help="a checkpoint of the public model")
    made.add_argument("--tokenizer", metavar="DIR", help="if it is not with the weights")
    made.add_argument(
        "--config", choices=CONFIGS, default="tiny-qwen2", help="of random weights (%(default)s)"
    )
    made.add_argument("--frames", type=int, metavar="N", help="-1: one a second (the model's own)")
    made.add_argument("--max-frames", type=int, metavar="N", help="of one a second (64)")
    made.add_argument("--max-new-tokens", type=int, default=512, metavar="N")
    made.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token")
    made.add_argument("--top-k", type=int, default=50, help="draw from so many (%(default)s)")
    made.add_argument("--top-p", type=float, default=1.0)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--batch", type=int, default=1, metavar="N", help="questions at once")
    made.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="that weights are read into and everything is computed in (%(default)s, as the public "
        "code computes; stored: as it is in the files)",
    )
    made.add_argument("--original", action="store_true", help="do not fold")
    made.add_argument(
        "--report",
        action="store_true",
        help="what was folded, and why not (compiles more)",
    )
    made.add_argument("--save", metavar="DIR", help="write the folded weights as a checkpoint")
    made.add_argument("--sheet", metavar="FILE", help="a picture of the frames that are read")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Print answers; everything else goes to stderr."""
    options = parser().parse_args(argv)
    try:
        failed = run(options)
    except InputError as error:
        parser().exit(2, f"{error}\n")
    if failed:
        parser().exit(1, f"videos that could not be answered about: {failed}\n")


def run(options: argparse.Namespace) -> int:
    """Answer, and only then write what is to be written; returns how many videos failed.

    Raises:
        InputError: something given cannot be used.
    """
    job = checked(options)
    if job.first:
        say(told(job.first, job, options))
        if options.sheet:
            show(job.first).save(options.sheet)
    model = loaded(options, job)
    pipeline = Pipeline(
        model,
        job.tokenizer,
        fold=not options.original,
        donate=True,
        **decoding_options(options),
    )
    if options.chat:
        failed = chat(pipeline, job, options.seed)
    elif options.questions is None and job.first:
        failed = answer_one(pipeline, job, options.seed)
    else:
        failed = answer_all(pipeline, job, options)
    if options.save:
        if failed == len(job.videos):
            raise InputError("save: no video was read, so nothing was folded; nothing is written")
        try:
            save(pipeline.model, options.save, source=options.weights)
        except OSError as error:
            raise InputError(f"save: {options.save} could not be written ({error})") from error
    if (report := pipeline.report) and options.report:
        say(str(report))
    elif report:
        say(f"{report.n_folded} of {len(report.norms)} LayerNorms ran as RMSNorms (--report: why)")
    return failed


def answer_one(pipeline: Pipeline, job: Job, seed: int) -> int:
    """Print the answer to one question about one video."""
    start = time.perf_counter()
    video = pipeline.encode(job.pixels(job.first or job.read(job.videos[0])))
    (answer,) = pipeline.ask(video, job.questions, seed=seed)
    print(answer.text, flush=True)
    say_if_cut(answer, job)
    say(f"answered in {time.perf_counter() - start:.1f} s, with the time to compile")
    return 0


def answer_all(pipeline: Pipeline, job: Job, options: argparse.Namespace) -> int:
    """Print a line of JSON for each question about each video; one that fails has a line, too."""
    failed = 0
    shown = track(
        job.videos,
        "Answering",
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    for path in shown:
        try:
            video = pipeline.encode(job.pixels(job.first or job.read(path)))
            for question, answer in answered(pipeline, video, job.questions, options):
                found = {"question": question, "answer": answer.text, "cut": answer.cut}
                print(json.dumps({"video": str(path)} | found, ensure_ascii=False), flush=True)
        except InputError as error:
            print(json.dumps({"video": str(path), "error": str(error)}), flush=True)
            failed += 1
    return failed


def answered(
    pipeline: Pipeline, video: jax.Array, questions: list[str], options: argparse.Namespace
) -> Iterator[tuple[str, Answer]]:
    """Batch by batch; the last is filled up, so that it needs no new program."""
    size = min(options.batch, len(questions))
    for start in range(0, len(questions), size):
        some = questions[start : start + size]
        filled = some + some[-1:] * (size - len(some))
        answers = pipeline.ask(video, filled, seed=options.seed)
        yield from zip(some, answers[: len(some)], strict=True)


def chat(pipeline: Pipeline, job: Job, seed: int) -> int:
    """A conversation: a question on each line of the input, answers as they come."""
    video, history = pipeline.encode(job.pixels(job.first or job.read(job.videos[0]))), []
    for question in map(str.strip, sys.stdin):
        if not question:
            continue
        shown, answer = "", Answer("", cut=False)
        try:
            for answer in pipeline.stream(video, question, history, seed):
                # The last character may be a part of one that is still to come.
                new = answer.text.rstrip("\ufffd")
                if new.startswith(shown):
                    print(new[len(shown) :], end="", flush=True)
                    shown = new
        except InputError as error:
            say(str(error))
            continue
        print(answer.text[len(shown) :] if answer.text.startswith(shown) else "", flush=True)
        say_if_cut(answer, job)
        history.append((question, answer.text))
    return 0


def loaded(options: argparse.Namespace, job: Job) -> TinyLlavaVideo:
    """The model."""
    if options.weights:
        devices = np.array(jax.devices())
        mesh = Mesh(devices, ("model",)) if len(devices) > 1 else None
        dtype = None if options.dtype == "stored" else options.dtype
        return load(options.weights, dtype=dtype, mesh=mesh)
    say(f"No --weights: {options.config} with random weights, whose answers mean nothing.")
    model = TinyLlavaVideo(job.config, nnx.Rngs(options.seed))
    if options.dtype == "stored":
        return model
    graph, params = nnx.split(model)
    return nnx.merge(graph, jax.tree.map(lambda x: x.astype(options.dtype), params))


def told(frames: Frames, job: Job, options: argparse.Namespace) -> str:
    """What was read of a video."""
    count, seconds = len(frames.indices), frames.duration
    said = f"{count} frames of {seconds:.1f} s read"
    asked: Any = job.config.num_frames if options.frames is None else options.frames
    if asked == ONE_A_SECOND and int(seconds) > count:
        return f"{said}: no more than that (--max-frames)"
    if (there := len(set(frames.indices.tolist()))) < count:
        return f"{said}: there are {there}, and some were taken more than once"
    return said


def say_if_cut(answer: Answer, job: Job) -> None:
    """An answer that is as long as it may be has probably more to say."""
    if answer.cut:
        say(f"The answer was cut after {job.decoding.max_new_tokens} tokens (--max-new-tokens).")


def say(line: str) -> None:
    """To whom watches."""
    print(line, file=sys.stderr)


if __name__ == "__main__":
    main()
