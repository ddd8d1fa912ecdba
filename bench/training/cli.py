"""Command line: trains what is missing, then writes the report."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from tqdm import tqdm

from . import report
from .costs import programs
from .partial_tasks import PARTIAL
from .results import Key, Results, read
from .run import FOLDED, VARIANTS, Program, Trainer, program
from .tasks import TASKS, Settings, Task

OUT = Path(__file__).with_name("results.json")
OUT_PARTIAL = Path(__file__).with_name("partial") / "results.json"
KNOWN: dict[str, Task] = {**TASKS, **PARTIAL}
PHASES = "float32", "programs", "float64"  # what matters most first
INTERRUPTED = 130  # as shells say it of a command that Ctrl-C ended


def main(argv: Sequence[str] | None = None) -> int:
    """Trains and reports; returns the exit code."""
    args = _arguments(argv)
    if not args.report_only:
        results = Results(args.out)
        try:
            for phase in PHASES:
                for name in args.tasks:
                    _task(name, args, results, phase)
        except KeyboardInterrupt:
            kept = len(results.done)
            print(f"interrupted; {kept} finished runs are kept, the same command goes on")
            return INTERRUPTED
    for path in report.write(args.out, read(args.out), plots=args.plots):
        print(f"wrote {path}")
    return 0


def _task(name: str, args: argparse.Namespace, results: Results, phase: str) -> None:
    """What is missing of one phase of a task: its runs, its programs, or its runs in float64."""
    task = KNOWN[name]
    settings = task.settings.tiny() if args.tiny else task.settings
    data = task.load()
    results.describe(name, task, settings, data)

    def make(variant: str) -> Program:
        return program(task, settings, data, variant)

    if phase == "programs":
        known = results.content["programs"].get(name, {})
        if args.rounds and "layernorm" in args.variants and not set(args.variants) <= set(known):
            found = [make(v) for v in VARIANTS if v in args.variants]
            results.content["programs"][name] = programs(found, args.rounds)
            results.save()
    else:
        wanted: list[Key] = [(name, v, phase, s) for v in args.variants for s in range(args.seeds)]
        if phase == "float64":
            pair = "layernorm", FOLDED
            both = args.control and set(pair) <= set(args.variants)
            wanted = [(name, variant, phase, 0) for variant in pair if both]
        missing = [key for key in wanted if key not in results.done]
        trainer = None
        for key in missing:
            if trainer is None or trainer.program.variant != key[1]:
                trainer = Trainer(make(key[1]), key[2])
            results.add(key, _watched(trainer, key, settings))
            print(_line(key, results), flush=True)
    jax.clear_caches()


def _watched(trainer: Trainer, key: Key, settings: Settings) -> dict[str, object]:
    """A run with a bar, where a person sees it."""
    title = " ".join(map(str, key))
    with tqdm(total=settings.steps, desc=title, unit="step", leave=False, disable=None) as bar:

        def tick(done: int) -> None:
            bar.update(done - bar.n)

        return trainer(key[3], tick)


def _line(key: Key, results: Results) -> str:
    run = results.content["runs"][-1]
    final = "diverged" if run["final"] is None else f"{run['final']:.4g}"
    return f"{' '.join(map(str, key)):50} {final:>9} {run['seconds']:8.1f} s"


def _names(known: Sequence[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        found = text.split(",")
        if bad := [name for name in found if name not in known]:
            raise argparse.ArgumentTypeError(f"{bad[0]!r} is none of {', '.join(known)}")
        return found

    return parse


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.training",
        description="Trains small transformers with LayerNorms, with centered columns and "
        "RMSNorms, with RMSNorms alone and without norms. Finished runs are kept in a file; "
        "what is there is not run again.",
    )
    parser.add_argument(
        "--partial", action="store_true", help="models that cannot be folded exactly, in their file"
    )
    parser.add_argument(
        "--tasks",
        type=_names([*KNOWN]),
        help=f"of {','.join(TASKS)}; --partial: {','.join(PARTIAL)}",
    )
    known = [*VARIANTS]
    parser.add_argument(
        "--variants", type=_names(known), default=known, help=f"of {','.join(known)}; default all"
    )
    parser.add_argument("--seeds", type=_positive, default=5, help="how many (default 5)")
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    parser.add_argument(
        "--rounds", type=int, default=200, help="of timing a step in turns; 0: no costs, no times"
    )
    parser.add_argument(
        "--no-control", dest="control", action="store_false", help="no runs in float64"
    )
    parser.add_argument("--no-plots", dest="plots", action="store_false", help="tables only")
    parser.add_argument("--report-only", action="store_true", help="train nothing")
    parser.add_argument("--tiny", action="store_true", help="two steps of tiny models, as a trial")
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    args.tasks = args.tasks or [*(PARTIAL if args.partial else TASKS)]
    args.out = args.out or (OUT_PARTIAL if args.partial else OUT)
    args.control = args.control and not args.partial  # roundings are not what differs
    return args
