"""Answers a question about a video.

``python -m examples.tinyllava_video --video clip.mp4 --prompt "What happens?" --weights DIR``;
without weights a tiny model with random ones shows that everything runs.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from .config import CONFIGS, named
from .errors import InputError
from .model import TinyLlavaVideo
from .pipeline import Pipeline
from .text import byte_tokenizer, load_tokenizer
from .video import preprocess, read_video, show
from .weights import load, save


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m examples.tinyllava_video", description=__doc__.splitlines()[0]
    )
    made.add_argument("--video", required=True, metavar="FILE")
    made.add_argument("--prompt", required=True, metavar="TEXT", help="the question")
    made.add_argument("--weights", metavar="DIR", help="a checkpoint of the public model")
    made.add_argument("--tokenizer", metavar="DIR", help="if it is not with the weights")
    made.add_argument(
        "--config", choices=CONFIGS, default="tiny-qwen2", help="of random weights (%(default)s)"
    )
    made.add_argument("--frames", type=int, metavar="N", help="-1: one a second (the model's own)")
    made.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    made.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token")
    made.add_argument("--top-p", type=float, default=1.0)
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--dtype", help="of the weights (as they are stored)")
    made.add_argument("--original", action="store_true", help="do not fold")
    made.add_argument("--report", action="store_true", help="show what was folded, and why not")
    made.add_argument("--save", metavar="DIR", help="write the folded weights as a checkpoint")
    made.add_argument("--sheet", metavar="FILE", help="a picture of the frames that are read")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Print the answer; everything else goes to stderr."""
    options = parser().parse_args(argv)
    try:
        print(answered(options))
    except InputError as error:
        parser().exit(2, f"{error}\n")


def answered(options: argparse.Namespace) -> str:
    """The answer.

    Raises:
        InputError: something given cannot be used.
    """
    model, where = loaded(options)
    tokenizer = load_tokenizer(where) if where else byte_tokenizer()
    config, start = model.config, time.perf_counter()
    frames = read_video(
        options.video,
        num_frames=config.num_frames if options.frames is None else options.frames,
        max_frames=config.max_frames,
    )
    if options.sheet:
        show(frames).save(options.sheet)
    pixels = preprocess(frames.pixels, config.vision.image_size)
    seconds = time.perf_counter() - start
    say(f"{len(pixels)} frames of {frames.duration:.1f} s read in {seconds:.1f} s")
    names = "max_new_tokens", "temperature", "top_p"
    pipeline = Pipeline(
        model,
        tokenizer,
        fold=not options.original,
        donate=True,
        **{name: getattr(options, name) for name in names},
    )
    start = time.perf_counter()
    answer = pipeline.answer(pixels, options.prompt, seed=options.seed)
    say(f"answered in {time.perf_counter() - start:.1f} s, with the time to compile")
    if options.save:
        save(pipeline.model, options.save, source=options.weights)
    if (report := pipeline.report) and options.report:
        say(str(report))
    elif report:
        say(f"{report.n_folded} of {len(report.norms)} LayerNorms ran as RMSNorms (--report: why)")
    return answer


def loaded(options: argparse.Namespace) -> tuple[TinyLlavaVideo, str | None]:
    """The model, and the folder of its tokenizer if it has one."""
    if options.weights:
        devices = np.array(jax.devices())
        mesh = Mesh(devices, ("model",)) if len(devices) > 1 else None
        model = load(options.weights, dtype=options.dtype, mesh=mesh)
        return model, options.tokenizer or options.weights
    config = named(options.config)
    if not options.config.startswith("tiny") and not options.tokenizer:
        raise InputError("tokenizer: a model of this size needs one; name its folder")
    say(f"No --weights: {options.config} with random weights, whose answers mean nothing.")
    return TinyLlavaVideo(config, nnx.Rngs(options.seed)), options.tokenizer


def say(line: str) -> None:
    """To whom watches."""
    print(line, file=sys.stderr)


if __name__ == "__main__":
    main()
