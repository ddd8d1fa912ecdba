"""How much of the norms' cost does a fold remove?

``python -m bench`` measures forward passes on this machine, all variants taking turns, and with
``--tpu v5e`` asks the TPU compiler for its estimates instead (``pip install "jax[tpu]"``; nothing
is run). Results go to ``bench/results``; a run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .tpu import TOPOLOGIES, devices, estimate, set_up_environment

RESULTS = Path(__file__).parent / "results"
KEYS = ("model", "batch", "spelling", "dtype", "variant")
DEFAULT = ("vit_s", "vit_b", "gpt2", "whisper_base_encoder", "clip_l_text", "dinov2_b")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, store, and print a table."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=DEFAULT, metavar="NAME")
    parser.add_argument("--spellings", nargs="+", default=["one_pass", "two_pass"], metavar="NAME")
    parser.add_argument("--dtypes", nargs="+", default=["float32"], metavar="NAME")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=21, help="rounds of timing (default: 21)")
    parser.add_argument("--tpu", choices=[*TOPOLOGIES], help="compile for this TPU, do not run")
    parser.add_argument("--output", type=Path, metavar="FILE")
    options = parser.parse_args(argv)
    if options.tpu:
        set_up_environment()
    from .models import MODELS, NORMS

    if unknown := ({*options.models} - {*MODELS}) | ({*options.spellings} - {*NORMS}):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; models are {', '.join(MODELS)}")
    if options.tpu:
        try:
            devices(options.tpu)
        except Exception as error:
            parser.exit(1, f'no libtpu ({error}); run `pip install "jax[tpu]"`\n')
    run(options)


def run(options: argparse.Namespace) -> None:
    """Every case that is not stored yet, then the table of all."""
    from rich.console import Console
    from rich.progress import Progress

    from .store import Store
    from .tables import table

    console = Console()
    path = options.output or RESULTS / f"{options.tpu or 'here'}.json"
    store = Store(path, KEYS)
    cases = [
        (model, options.batch, spelling, dtype)
        for dtype in options.dtypes
        for spelling in options.spellings
        for model in options.models
    ]
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            progress.update(task, description=" ".join(map(str, case)))
            measure(store, case, options)
            progress.advance(task)
    console.print(table(store.rows))


def measure(store: Any, case: tuple[Any, ...], options: argparse.Namespace) -> None:
    """Fill in the rows of one case."""
    import jax

    from .programs import VARIANTS, random_arrays, variants
    from .timing import interleaved

    missing = [v for v in VARIANTS if not store.has(*case, v)]
    if not missing:
        return
    programs = variants(*case)
    if options.tpu:
        for program in programs:
            if program.variant in missing:
                found = estimate(program.apply, program.params, program.x, kind=options.tpu)
                store.add((*case, program.variant), **asdict(found))
        return
    calls = {}
    for program in programs:
        params = random_arrays(program.params)
        if program.plan is not None:
            params = program.plan.center(params)
        arguments = params, random_arrays(program.x, seed=1)
        compiled = jax.jit(program.apply).lower(*arguments).compile()
        calls[program.variant] = lambda run=compiled, given=arguments: run(*given)
    seconds = interleaved(calls, options.rounds)
    for variant, found in seconds.items():
        if variant in missing:
            store.add((*case, variant), seconds=found.tolist())


if __name__ == "__main__":
    main()
