"""The command line: reports, plans and pictures of a model, and centered checkpoints."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.filesize import decimal
from rich.progress import track

from ..api import analyze, plan_fold
from ..checkpoints.center import Edits, center_checkpoint
from ..checkpoints.key_map import KeyMap
from ..checkpoints.signals import Stopped, stoppable
from ..errors import FoldError
from ..plan.plan import FoldPlan
from ..printable import counted, printable
from ..report.summary import rows
from ..report.table import to_rich
from .arguments import options_of, parser_for
from .target import load, place_of_error

DONE, FAILED, USAGE, LEFT, INTERRUPTED = 0, 1, 2, 3, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line with these arguments and return its exit code."""
    args = make_parser().parse_args(argv)
    try:
        code = args.run(args)
        sys.stdout.flush()
    except FoldError as error:
        place = place_of_error(error.__cause__) if hasattr(args, "target") else ""
        return _fail(str(error), place=place)
    except BrokenPipeError:  # the reader of stdout, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:
        return _fail(f"{error}; check the path, and that there is space and permission")
    except Stopped as error:
        return _fail(str(error), 128 + error.number)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)
    return code


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    return parser_for(_report, _plan, _draw, _center)


def _fail(message: str, code: int = FAILED, place: str = "") -> int:
    print(f"jax_lnfold: {printable(message)}{place}", file=sys.stderr)
    return code


# --- commands ------------------------------------------------------------------------------------


def _report(args: argparse.Namespace) -> int:
    model = load(args.target)
    report = analyze(model.apply_fn, model.params, *model.inputs, **options_of(args))
    width = shutil.get_terminal_size((110, 24)).columns
    Console(width=width).print(to_rich(rows(report), report.lines(args.cost)))
    if args.html:
        report.to_html(args.html, args.target, args.cost)
    return LEFT if args.check and report.n_folded < len(report.norms) else DONE


def _plan(args: argparse.Namespace) -> int:
    model = load(args.target)
    plan = plan_fold(model.apply_fn, model.params, *model.inputs, **options_of(args))
    return _write(args.output, plan.to_json() + "\n")


def _draw(args: argparse.Namespace) -> int:
    model = load(args.target)
    report = analyze(model.apply_fn, model.params, *model.inputs, **options_of(args))
    if args.output is None:
        return _write(None, report.to_svg())
    getattr(report, f"to_{args.output.suffix[1:]}")(args.output)
    return DONE


def _write(file: Path | None, text: str) -> int:
    if file is None:
        sys.stdout.write(text)
    else:
        file.write_text(text, "utf-8")
    return DONE


def _center(args: argparse.Namespace) -> int:
    try:
        plan = FoldPlan.from_json(args.plan.read_text("utf-8"))
    except UnicodeDecodeError as error:
        raise FoldError(f"plan: {args.plan} is not text; pass what `plan` wrote") from error
    keys = KeyMap.from_json(args.keys.read_bytes()) if args.keys else None
    with stoppable():
        done = center_checkpoint(plan, args.source, args.dest, args.prefix, _tracked, keys)
    what = plan.told() or ["nothing to edit"]
    size = f"{decimal(done.nbytes)} in {counted(done.leaves, 'leaf', 'leaves')}"
    print(f"{', '.join(what)}: {size} of {printable(str(args.dest))}")
    return DONE


def _tracked(edits: Edits) -> Edits:
    """The edits with a progress bar, where somebody looks at it."""
    return track(
        edits,
        "Centering",
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )


# --- arguments -----------------------------------------------------------------------------------
