"""Ten minutes on a real GPU: the cases that tell most, until the time is up.

``python -m bench.card`` times every variant with CUDA graphs and without, side by side, with XLA's
autotuning as users have it, and writes ``bench/results/card_NAME.json`` row by row. The cases that
tell most come first; one that does not fit into what time is left is not begun.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from .__main__ import RESULTS, backend, base, others
from .cases import KEYS, LOW, ONE, Case, sweep
from .programs import FORWARD, SharedArrays, random_arrays, variants
from .store import Store
from .tables import table
from .timing import interleaved, repeated

CASES = (
    *sweep("vit_b", (16,), dtypes=LOW),
    *sweep("gpt2_decode", (1,), dtypes=LOW),
    *sweep("gpt2", (4,), dtypes=LOW),
    *sweep("vit_b_qk_norm", (16,), dtypes=LOW),
    *sweep("whisper_base_encoder", (4,), dtypes=LOW),
    *sweep("gpt2_decode", (16,), dtypes=LOW),
    *sweep("vit_b", (1,), dtypes=LOW),
    *sweep("vit_b", (16,), (), ONE),
)
GRAPHS: dict[str, dict[str, Any]] = {
    "graphs": {},
    "no graphs": {"xla_gpu_enable_command_buffer": ""},
}
"""Compiler options: kernels started together as a CUDA graph (the default), or one by one."""
CARD_KEYS = ("graphs", *KEYS)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what fits, store it, and print a table for each way of starting kernels."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.card", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="not to be exceeded (9)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON (default: bench/results)")
    options = parser.parse_args(argv)
    store = Store(options.output or RESULTS / f"card_{backend()}.json", CARD_KEYS)
    console = Console(width=None if Console().is_terminal else 200)
    for case in fitting(CASES, 60 * options.minutes):
        if not store.has(next(iter(GRAPHS)), *case.key, FORWARD[-1]):
            measure(store, case)
    for graphs in GRAPHS:
        console.print(f"\n{graphs}")
        console.print(table(row for row in store.rows if row["graphs"] == graphs))


def fitting(
    cases: Sequence[Case], seconds: float, now: Callable[[], float] = time.monotonic
) -> Any:
    """Cases one by one, as long as the dearest so far would still fit into what time is left."""
    start, dearest = now(), 0.0
    for case in cases:
        begin = now()
        if begin + dearest - start > seconds:
            return
        yield case
        dearest = max(dearest, now() - begin)


def measure(store: Store, case: Case) -> None:
    """Time all variants of a case side by side, in both ways."""
    calls, repeats, params = {}, {}, SharedArrays()
    x = None
    for program in variants(*base(case), **others(case), chosen=FORWARD):
        x = random_arrays(program.x, seed=1) if x is None else x
        arguments = params.fill(program.params), x
        lowered = jax.jit(program.apply).lower(*arguments)
        for graphs, options in GRAPHS.items():
            on_gpu = jax.default_backend() == "gpu"
            run = lowered.compile(compiler_options=options if on_gpu else None)
            call, number = repeated(lambda run=run, given=arguments: run(*given))
            calls[graphs, program.variant], repeats[graphs, program.variant] = call, number
    for (graphs, variant), seconds in interleaved(calls, case.rounds).items():
        found = (seconds / repeats[graphs, variant]).tolist()
        store.add((graphs, *case.key, variant), seconds=found)


if __name__ == "__main__":
    main()
