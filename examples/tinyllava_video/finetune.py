"""Trains a checkpoint on conversations about videos, in the two stages of the public recipe.

``python -m examples.tinyllava_video.finetune --stage 1 --weights DIR --data FILE --videos DIR
--output DIR``: stage 1 trains the resampler on captions and writes one folder for each part, as the
public code does; stage 2 trains the language model, too, and writes a whole checkpoint. Either
reads both layouts; stage 1 may begin with ``--tower DIR --language-model DIR`` instead, and a fresh
resampler. LayerNorms that fold are RMSNorms from the first step on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from .config import Config
from .conversations import batches, examples
from .errors import InputError
from .fitting import Trained, fit
from .model import TinyLlavaVideo
from .pipeline import check_ids
from .separate import CONNECTORS, QUERIES, joined
from .stage_folders import check_parts, save_parts
from .text import load_tokenizer
from .weights import check, check_destination, copy_others, load, placed, save

PARTS = {1: ("connector",), 2: ("connector", "language_model")}
"""What each stage trains."""

RATES, BATCHES = {1: 1e-4, 2: 2e-5}, {1: 128, 2: 64}
WARM_UP = 0.03
"""The share of steps in which the rate rises; then it falls as a cosine does."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m examples.tinyllava_video.finetune", description=__doc__.splitlines()[0]
    )
    made.add_argument("--stage", type=int, choices=PARTS, required=True)
    made.add_argument("--weights", metavar="DIR")
    made.add_argument("--tower", metavar="DIR", help="SigLIP, instead of --weights in stage 1")
    made.add_argument("--language-model", metavar="DIR", help="Qwen2.5 or Phi-2, with --tower")
    made.add_argument("--connector", choices=CONNECTORS, default="group", help="with --tower")
    made.add_argument("--queries", type=int, default=QUERIES, metavar="N", help="with --tower")
    made.add_argument("--data", required=True, type=Path, metavar="FILE", help="conversations")
    made.add_argument("--videos", required=True, type=Path, metavar="DIR")
    made.add_argument("--output", required=True, metavar="DIR")
    made.add_argument("--frames", type=int, default=16, metavar="N")
    made.add_argument("--batch", type=int, metavar="N", help="128 in stage 1, 64 in stage 2")
    made.add_argument("--steps", type=int, metavar="N", help="as many as one epoch has")
    made.add_argument("--rate", type=float, help="of learning: 1e-4 in stage 1, 2e-5 in stage 2")
    made.add_argument("--lora", type=int, default=0, metavar="RANK", help="stage 2 with adapters")
    made.add_argument("--seed", type=int, default=0)
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Train, write, and say what came of it."""
    options = parser().parse_args(argv)
    try:
        found = trained(options)
    except InputError as error:
        parser().exit(2, f"{error}\n")
    report, losses = found.folded.report, found.losses
    print(f"{report.n_folded} of {len(report.norms)} LayerNorms were RMSNorms", file=sys.stderr)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; drift {found.drift:.2f} (1: rounding)")


class Start(NamedTuple):
    """What training begins with."""

    config: Config
    load: Callable[..., TinyLlavaVideo]
    texts: str
    """The folder with the tokenizer."""
    is_whole: bool
    """Whether that is a checkpoint of the whole model."""


def start_of(options: argparse.Namespace) -> Start:
    """The checkpoint, or the parts; no weights are read.

    Raises:
        InputError: it is none, or both or neither were given.
    """
    apart = options.tower, options.language_model
    if options.weights and not any(apart):
        return Start(check(options.weights), partial(load, options.weights), options.weights, True)
    if options.weights or not all(apart):
        raise InputError("weights: give either --weights, or both --tower and --language-model")
    if options.stage == 2:
        raise InputError("tower: stage 2 goes on with what stage 1 wrote; give that as --weights")
    where = " and ".join(apart)
    config, stored = joined(*apart, options.connector, options.seed, options.queries)
    return Start(config, partial(placed, where, config, stored), options.language_model, False)


def trained(options: argparse.Namespace) -> Trained:
    """The trained model, which has been written.

    Raises:
        InputError: something given cannot be used; no weights have been read then.
    """
    start = start_of(options)
    config = start.config
    check_destination(options.output, config)
    if options.stage == 1:
        check_parts()
        if options.lora:
            raise InputError("lora: stage 1 does not train the language model; give it in stage 2")
    found = examples(options.data, options.videos, load_tokenizer(start.texts), options.stage)
    check_ids((part for each in found for part in (each.before, each.after)), config)
    if options.frames < 1:
        raise InputError(f"frames: must be at least 1 in training, not {options.frames}")
    size = options.batch or BATCHES[options.stage]
    devices = np.array(jax.devices())
    if size % len(devices):
        raise InputError(f"batch: {size} is not divisible by {len(devices)} devices")
    steps, rate = options.steps or -(-len(found) // size), options.rate or RATES[options.stage]
    # Parameters are split over all devices, too.
    mesh = Mesh(devices.reshape(-1, 1), ("data", "model"))
    result = fit(
        start.load(dtype="float32", mesh=mesh, axis="data"),
        batches(found, config, size, options.frames, options.seed),
        steps,
        parts=PARTS[1 if options.lora else options.stage],
        rate=optax.warmup_cosine_decay_schedule(0, rate, max(1, int(WARM_UP * steps)), steps + 1),
        mesh=mesh,
        rank=options.lora,
        seed=options.seed,
    )
    write = save_parts if options.stage == 1 else save
    write(result.model, options.output, source=start.texts if start.is_whole else None)
    if not start.is_whole:
        copy_others(Path(start.texts), Path(options.output), without="config.json")
    return result


if __name__ == "__main__":
    main()
