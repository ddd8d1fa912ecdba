"""Does a folded program compile as fast as the original, to code of the same size?

Run with ``python -m bench.compile_cost``; it writes ``bench/results/compile_cost.json`` and a
table. Programs are compiled for the CPU in turns, with jax's caches cleared; with
``--kinds cpu v5e`` also once for TPU (``pip install "jax[tpu]"``).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .tpu import TOPOLOGIES, has_compiler, lowered, set_up_environment

set_up_environment()

import jax  # noqa: E402
import numpy as np  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import Progress  # noqa: E402
from rich.table import Table  # noqa: E402

from .programs import BOUND, FOLDED, ORIGINAL, VARIANTS, variants  # noqa: E402
from .store import Store  # noqa: E402
from .tables import said  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "compile_cost.json"
KEYS = ("model", "spelling", "kind", "variant", "round")
SIZES = ("code bytes", "instructions", "StableHLO bytes")
MODELS = ("vit_b", "gpt2", "whisper_base_encoder", "clip_l_text")


def compiled(kind: str, function: Callable[..., Any], *arguments: Any) -> dict[str, float]:
    """Seconds to compile a function of shapes, and the sizes of what comes out."""
    jax.clear_caches()
    if kind == "cpu":
        low = jax.jit(function).lower(*arguments)
    else:
        low = lowered(function, *arguments, kind=kind)
    begin = time.perf_counter()
    program = low.compile()
    seconds = time.perf_counter() - begin
    memory = program.memory_analysis()
    sizes = (
        getattr(memory, "generated_code_size_in_bytes", 0),
        instructions(program.as_text()),
        len(low.as_text()),
    )
    return {"seconds": seconds} | dict(zip(SIZES, sizes, strict=True))


def instructions(text: str) -> int:
    """Instructions of an HLO program, those inside of fusions included."""
    return sum(" = " in line for line in text.splitlines())


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Ratios to the original: seconds round by round, sizes once."""
    title = "multiples of the original: folded; norms removed"
    shown = Table("model", "norm", "for", "seconds", *SIZES, title=title)
    found: dict[tuple[Any, ...], dict[str, dict[int, Any]]] = {}
    for row in rows:
        by_variant = found.setdefault(tuple(row[k] for k in KEYS[:3]), {})
        by_variant.setdefault(row["variant"], {})[row["round"]] = row
    for case, by_variant in found.items():
        if len(by_variant) == len(VARIANTS):
            shown.add_row(*case, *(cell(by_variant, what) for what in ("seconds", *SIZES)))
    return shown


def cell(by_variant: dict[str, dict[int, Any]], what: str) -> str:
    """One quantity of the folded program, and of the bound."""
    base, words = by_variant[ORIGINAL], []
    for variant in (FOLDED, BOUND):
        pairs = [(row[what], base[n][what]) for n, row in by_variant[variant].items() if n in base]
        ratios = np.array([a / b for a, b in pairs if b])
        ratios = ratios if what == "seconds" else ratios[:1]  # the same in every round
        words.append(said(ratios) if len(ratios) else "-")
    return "; ".join(words)


def main(argv: Sequence[str] | None = None) -> None:
    """Compile, write the JSON and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.compile_cost", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--models", nargs="+", default=MODELS, metavar="NAME")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kinds", nargs="+", default=["cpu"], choices=["cpu", *TOPOLOGIES])
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FILE")
    options = parser.parse_args(argv)
    console, store = Console(), Store(options.output, KEYS)
    kinds = [kind for kind in options.kinds if has_compiler(kind)]
    work = [
        (model, spelling, kind, number)
        for model in options.models
        for spelling in ("one_pass", "two_pass")
        for kind in kinds
        for number in range(options.rounds if kind == "cpu" else 1)
    ]
    made: dict[tuple[str, str], list[Any]] = {}
    with Progress(console=console, disable=not console.is_terminal) as progress:
        for model, spelling, kind, number in progress.track(work):
            if (model, spelling) not in made:
                made[model, spelling] = list(variants(model, 1, spelling, "float32"))
            programs = made[model, spelling]
            start = number % len(programs)
            for program in (*programs[start:], *programs[:start]):
                if not store.has(model, spelling, kind, program.variant, number):
                    found = compiled(kind, program.apply, program.params, program.x)
                    store.add((model, spelling, kind, program.variant, number), **found)
    console.print(table(store.rows))
    for kind in sorted({*options.kinds} - {*kinds}):
        console.print(f"Rows of {kind} are missing: libtpu is not installed.")


if __name__ == "__main__":
    main()
