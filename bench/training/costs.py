"""What a training step costs: XLA's own count, and times taken in turns."""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .run import Program, Trainer, rounded

PARTS = "step", "gradient"  # all of it; loss and gradients alone, without the optimiser


def programs(found: list[Program], rounds: int) -> dict[str, dict[str, Any]]:
    """Costs of each program, by variant; times are relative to the first.

    Each round runs every program once, in an order that changes, so that what else the machine
    does falls on all of them. A ratio is the median of the rounds' ratios.
    """
    result: dict[str, dict[str, Any]] = {p.variant: p.norms._asdict() for p in found}
    with jax.enable_x64(False):
        for part in PARTS:
            compiled, args = [], []
            for p in found:
                trainer = Trainer(p)
                carry, key = trainer.start(0)
                index, numbers = next(trainer.drawn(0))
                drawn = jnp.asarray(index[0]), jnp.asarray(numbers[0])
                first = carry if part == "step" else carry[0]
                args.append((trainer.train, key, first, drawn))
                compiled.append(jax.jit(getattr(p, part)).lower(*args[-1]).compile())
            times = _in_turns(compiled, args, rounds)
            for p, c, own in zip(found, compiled, times.T, strict=True):
                cost = c.cost_analysis()
                result[p.variant][part] = {
                    "flops": cost["flops"],
                    "bytes": cost["bytes accessed"],
                    "reductions": c.as_text().count(" reduce("),
                    "seconds": rounded(np.median(own)),
                    "time_ratio": [rounded(q) for q in median(own / times[:, 0])],
                }
    return result


def median(x: np.ndarray) -> tuple[float, float, float]:
    """The median between the ends of its 95 % confidence interval, which are order statistics."""
    x, n = np.sort(x), len(x)
    rank = max(0, int(n / 2 - 0.98 * n**0.5))
    return float(x[rank]), float(np.median(x)), float(x[n - 1 - rank])


def _in_turns(compiled: list[Any], args: list[Any], rounds: int) -> np.ndarray:
    """Seconds of shape ``[round, program]``."""
    times = np.zeros((rounds, len(compiled)))
    for i in range(-2, rounds):  # two to warm up
        for j in np.roll(range(len(compiled)), i):
            at = time.perf_counter()
            jax.block_until_ready(compiled[j](*args[j]))
            if i >= 0:
                times[i, j] = time.perf_counter() - at
    return times
