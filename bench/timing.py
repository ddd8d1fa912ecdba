"""Timing side by side: all programs take turns in every round, so that drift hits them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np


def interleaved(
    programs: Mapping[str, Callable[[], Any]],
    rounds: int,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, np.ndarray]:
    """Seconds of each program in each round, after one call of each to warm up.

    The order rotates from round to round; `tick` is called after each.
    """
    names = list(programs)
    for name in names:
        jax.block_until_ready(programs[name]())
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        start = number % len(names)
        for name in (*names[start:], *names[:start]):
            begin = time.perf_counter()
            jax.block_until_ready(programs[name]())
            seconds[name].append(time.perf_counter() - begin)
        tick()
    return {name: np.array(found) for name, found in seconds.items()}


def repeated(call: Callable[[], Any], at_least: float = 0.02) -> tuple[Callable[[], Any], int]:
    """Calls of what is compiled that take `at_least` so many seconds together, and how many.

    On devices that work while Python goes on, short programs would measure Python otherwise.
    """

    def seconds() -> float:
        begin = time.perf_counter()
        jax.block_until_ready(call())
        return time.perf_counter() - begin

    found = seconds()
    if found < 1:  # the first call says too little of short ones
        found = seconds()
    number = max(1, round(at_least / found))

    def run() -> Any:
        for _ in range(number - 1):
            call()
        return call()

    return run, number


def spread(values: np.ndarray) -> tuple[float, float, float]:
    """Median and quartiles."""
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    return float(middle), float(low), float(high)
