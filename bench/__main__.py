"""How much of the norms' cost does a fold remove?

``python -m bench`` measures forward passes on this machine (its GPU, if jax sees one), all variants
taking turns; with ``--tpu v5e`` or ``--gpu h100`` it asks a compiler for its estimates instead
(nothing is run; bench/README.md says what to install). Results go to ``bench/results``; a run that
was interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import Progress

from . import gpu
from .cases import AHEAD_OF_TIME_GPU, CPU, GPU, KEYS, TPU, Case, pick
from .programs import FORWARD, ON_DEMAND, SharedArrays, random_arrays, variants
from .registry import MODELS
from .store import Store
from .tables import table
from .timing import interleaved, repeated
from .tpu import TOPOLOGIES, devices, lowered_for, no_libtpu, read, set_up_environment

RESULTS = Path(__file__).parent / "results"
QUANTITIES = ("cycles", "microseconds", "bytes", "flops", "fusions", "kernels")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m bench", description=__doc__.splitlines()[0])
    made.add_argument("--models", nargs="+", metavar="NAME", help="only these (default: a table)")
    made.add_argument("--batch", nargs="+", type=int, metavar="N", help="instead of the table's")
    made.add_argument("--length", nargs="+", type=int, metavar="N", help="positions, or image side")
    made.add_argument("--spellings", nargs="+", choices=["one_pass", "two_pass", "pallas"])
    made.add_argument("--dtypes", nargs="+", metavar="NAME")
    made.add_argument("--variants", nargs="+", choices=[*FORWARD, *ON_DEMAND], default=FORWARD)
    made.add_argument("--rounds", type=int, help="rounds of timing (default: 11, fewer if large)")
    made.add_argument("--tpu", choices=[*TOPOLOGIES], help="compile for this TPU, do not run")
    made.add_argument("--gpu", choices=[*gpu.DEVICES], help="compile for this GPU, do not run")
    made.add_argument("--quantity", choices=QUANTITIES, help="what to show of it")
    made.add_argument("--markdown", action="store_true", help="the table for a README")
    made.add_argument("--list", action="store_true", help="show the cases and stop")
    made.add_argument("--plot", action="store_true", help="only draw what is stored")
    made.add_argument("--output", type=Path, metavar="FILE", help="JSON (default: bench/results)")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, store, print a table, draw."""
    options = parser().parse_args(argv)
    if options.plot:
        return draw_all([options.output] if options.output else sorted(RESULTS.glob("*.json")))
    if options.tpu:
        set_up_environment()
    if options.gpu:
        gpu.set_up_environment()
    if unknown := {*(options.models or ())} - {*MODELS}:
        parser().error(f"unknown: {', '.join(sorted(unknown))}; models are {', '.join(MODELS)}")
    cases = chosen(options)
    if options.list:
        return print(*cases, sep="\n")
    problem = no_libtpu(options.tpu) if options.tpu else ""
    if problem := problem or (gpu.no_compiler(options.gpu) if options.gpu else ""):
        parser().exit(1, f"{problem}\n")
    return run(cases, options)


def chosen(options: argparse.Namespace) -> list[Case]:
    """The cases of a run."""
    here = CPU if jax.default_backend() == "cpu" else GPU
    return pick(
        TPU[options.tpu] if options.tpu else AHEAD_OF_TIME_GPU if options.gpu else here,
        model=options.models,
        batch=options.batch,
        length=options.length,
        spelling=options.spellings,
        dtype=options.dtypes,
        rounds=[options.rounds] if options.rounds else None,
    )


def backend() -> str:
    """A name for this machine's device: cpu, h200, ..."""
    if jax.default_backend() == "cpu":
        return "cpu"
    words = jax.devices()[0].device_kind.lower().replace("nvidia", "").split()
    return words[0] if jax.default_backend() == "gpu" else "_".join(words)


def run(cases: list[Case], options: argparse.Namespace) -> None:
    """Every case that is not stored yet, then the table and the figure of all."""
    console = Console()
    if not console.is_terminal:
        console.width = 200  # a file has room
    path = options.output or RESULTS / f"{target(options)}.json"
    store = Store(path, KEYS)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            progress.update(task, description=str(case))
            stored = [v for v in (*FORWARD, *ON_DEMAND) if store.has(*case.key, v)]
            absent = [v for v in options.variants if v not in stored]
            if options.tpu or options.gpu:
                compile_all(store, case, absent, options)
            elif absent:
                measure(store, case, [v for v in FORWARD if v in {*stored, *absent}])
            progress.advance(task)
    console.print(table(store.rows, options.quantity, options.markdown))
    if not options.output:
        for line in missing():
            console.print(line, markup=False)
    draw_all([path])


def target(options: argparse.Namespace) -> str:
    """What is compiled for: the name of a file of results."""
    if options.tpu:
        return f"tpu_{options.tpu}"
    return f"compiler_{options.gpu}" if options.gpu else backend()


def compile_all(
    store: Store, case: Case, chosen: Sequence[str], options: argparse.Namespace
) -> None:
    """Estimates for some variants of a case; the same program is compiled once."""
    kind = "gpu" if options.gpu else "tpu"
    device = (gpu.devices(options.gpu) if options.gpu else devices(options.tpu))[0]
    for program in variants(*base(case), **others(case), chosen=chosen, target=kind):
        low = lowered_for(device, program.apply, program.params, program.x)
        digest = sha256(low.as_text().encode()).hexdigest()[:16]
        same = [row for row in store.rows if row["program"] == digest]
        known = {*store.keys, "program"}
        figures = (
            {name: figure for name, figure in same[0].items() if name not in known}
            if same
            else asdict(gpu.compiled(low) if options.gpu else read(low.compile()))
        )
        store.add((*case.key, program.variant), **figures, program=digest)


def base(case: Case) -> tuple[str, int, str, str]:
    """What `variants` is told of a case."""
    return case.model, case.batch, case.spelling, case.dtype


def others(case: Case) -> dict[str, Any]:
    """The rest of it: weights are stored in the dtype of the arithmetic."""
    return {"length": case.length, "stored": case.dtype}


def measure(store: Store, case: Case, chosen: Sequence[str]) -> None:
    """Time variants of a case side by side, which replaces all rows of the case."""
    calls, repeats, params = {}, {}, SharedArrays()
    x = None
    for program in variants(*base(case), **others(case), chosen=chosen):
        x = random_arrays(program.x, seed=1) if x is None else x
        arguments = params.fill(program.params), x
        compiled = jax.jit(program.apply).lower(*arguments).compile()
        call, number = repeated(lambda run=compiled, given=arguments: run(*given))
        calls[program.variant], repeats[program.variant] = call, number
    seconds = interleaved(calls, case.rounds)
    store.drop(*case.key)  # rounds of one run only are compared
    for variant, found in seconds.items():
        store.add((*case.key, variant), seconds=(found / repeats[variant]).tolist())


def missing() -> list[str]:
    """Which rows of other backends are not stored, and how to make them."""
    lines = []
    tables = {f"tpu_{kind}": cases for kind, cases in TPU.items()} | {"cpu": CPU}
    for name, cases in tables.items():
        path = RESULTS / f"{name}.json"
        rows = json.loads(path.read_text())["rows"] if path.exists() else []
        stored = {tuple(row.get(k) for k in KEYS) for row in rows}
        absent = sum((*case.key, v) not in stored for case in cases for v in FORWARD)
        if absent:
            total, tpu = len(cases) * len(FORWARD), name.partition("_")[2]
            reason = f", {no_libtpu(tpu)}" if tpu and no_libtpu(tpu) else ""
            lines.append(f"{path.name}: {absent} of {total} rows are missing{reason}")
    if not any(is_gpu(path) for path in RESULTS.glob("*.json")):
        lines.append("No rows of a GPU; run `python -m bench` where jax sees one")
    return lines


def is_gpu(path: Path) -> bool:
    """Whether a file has figures of a GPU."""
    return json.loads(path.read_text()).get("machine", {}).get("platform") == "gpu"


def draw_all(paths: Sequence[Path]) -> None:
    """A figure next to each file that has complete cases of forward passes."""
    from .plots import draw

    for path in paths:
        rows = json.loads(path.read_text()).get("rows", []) if path.exists() else []
        draw([row for row in rows if {*KEYS} <= row.keys()], path.with_suffix(".svg"))


if __name__ == "__main__":
    main()
