"""Trains a checkpoint on conversations about videos, in the two stages of the public recipe.

``python -m examples.tinyllava_video.finetune --stage 1 --weights DIR --data FILE --videos DIR
--output DIR``: stage 1 trains the resampler on captions and writes one folder for each part, as the
public code does; stage 2 trains the language model, too, and writes a whole checkpoint. Either
reads both layouts. LayerNorms that fold are RMSNorms from the first step on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from .conversations import batches, examples
from .errors import InputError
from .fitting import Trained, fit
from .stage_folders import check_parts, save_parts
from .text import load_tokenizer
from .weights import check, check_destination, load, save

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
    made.add_argument("--weights", required=True, metavar="DIR")
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


def trained(options: argparse.Namespace) -> Trained:
    """The trained model, which has been written.

    Raises:
        InputError: something given cannot be used; no weights have been read then.
    """
    config = check(options.weights)
    check_destination(options.output, config)
    if options.stage == 1:
        check_parts()
        if options.lora:
            raise InputError("lora: stage 1 does not train the language model; give it in stage 2")
    found = examples(options.data, options.videos, load_tokenizer(options.weights), options.stage)
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
        load(options.weights, dtype="float32", mesh=mesh, axis="data"),
        batches(found, config, size, options.frames, options.seed),
        steps,
        parts=PARTS[1 if options.lora else options.stage],
        rate=optax.warmup_cosine_decay_schedule(0, rate, max(1, int(WARM_UP * steps)), steps + 1),
        mesh=mesh,
        rank=options.lora,
        seed=options.seed,
    )
    (save_parts if options.stage == 1 else save)(
        result.model, options.output, source=options.weights
    )
    return result


if __name__ == "__main__":
    main()
