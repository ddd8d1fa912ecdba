"""The command line: reports, plans and pictures of a model, and centered checkpoints."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from html import escape
from pathlib import Path

from rich.console import Console
from rich.filesize import decimal
from rich.progress import track

from ..api import analyze, plan_fold
from ..checkpoints.center import Edits, center_checkpoint
from ..checkpoints.signals import Stopped, stoppable
from ..errors import FoldError
from ..plan.plan import FoldPlan
from ..printable import printable
from ..report.report import rows, summary
from ..report.table import counted, to_html, to_rich
from .target import load, place_of_error

DONE, FAILED, USAGE, LEFT, INTERRUPTED = 0, 1, 2, 3, 130

_CODES = """\
exit codes: 0 done; 1 it failed, for the reason on stderr; 2 wrong usage; 3 with `report --check`, a
LayerNorm is left; 130 interrupted; `center`: 129, 143 ended by SIGHUP, SIGTERM."""

_TARGET = """\
TARGET is `package.module:function`, found from the current directory. The function takes nothing
and returns (apply_fn, params, inputs), as you would pass them to jax_lnfold.fold: inputs is a tuple
of all inputs, or one input that is no tuple. Weights are not needed: params and inputs may be
jax.ShapeDtypeStruct, as jax.eval_shape returns them. For a Flax model, in my_model.py:

  def target():
      model, x = ViT(), jax.ShapeDtypeStruct((8, 224, 224, 3), jax.numpy.float32)
      return model.apply, jax.eval_shape(model.init, jax.random.key(0), x), (x,)
"""

_SOURCE = """\
SOURCE is a .safetensors file, a directory of them with an index, or a local directory saved by
Orbax: a tree, or a step of a CheckpointManager with one tree. It is copied to DEST, then the leaves
that the plan edits are replaced one by one, so the whole checkpoint is never in memory. DEST
appears when it is complete; SOURCE is only read. Names, shapes and dtypes of the leaves that the
plan edits are checked first; other leaves (optimizer state, random keys) are copied as they are.

The original model computes the same with DEST, and so does the folded one: load it in place of
folded.params.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line with these arguments and return its exit code."""
    args = _parser().parse_args(argv)
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


def _fail(message: str, code: int = FAILED, place: str = "") -> int:
    print(f"jax_lnfold: {printable(message)}{place}", file=sys.stderr)
    return code


# --- commands ------------------------------------------------------------------------------------


def _report(args: argparse.Namespace) -> int:
    model = load(args.target)
    options = {"fold_affine": args.fold_affine}
    report = analyze(model.apply_fn, model.params, *model.inputs, **options)
    if args.no_cost:
        shown = to_rich(rows(report), summary(report))
        table = to_html(rows(report), summary(report))
    else:
        with suppress(Exception):  # the report says that it is not to be had
            _ = report.cost
        shown, table = report, report._repr_html_()
    Console(width=shutil.get_terminal_size((110, 24)).columns).print(shown)
    if args.html:
        args.html.write_text(_page(printable(args.target), table, report.to_svg()), "utf-8")
    return LEFT if args.check and report.n_folded < len(report.norms) else DONE


def _page(title: str, *parts: str) -> str:
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    body = "\n".join((f"<h1>{escape(title)}</h1>", *parts))
    return (
        f'<!doctype html>\n<html lang="en">\n<head>{head}</head>\n<body>\n{body}\n</body></html>\n'
    )


_STYLE = """
:root {color-scheme: light dark} body {font: 1em/1.4 system-ui, sans-serif; margin: 2em}
h1 {font-size: 1.2em} svg {max-width: 100%; height: auto}
"""


def _plan(args: argparse.Namespace) -> int:
    model = load(args.target)
    options = {"fold_affine": args.fold_affine}
    plan = plan_fold(model.apply_fn, model.params, *model.inputs, **options)
    return _write(args.output, plan.to_json() + "\n")


def _draw(args: argparse.Namespace) -> int:
    model = load(args.target)
    report = analyze(model.apply_fn, model.params, *model.inputs)
    dot = args.output is not None and args.output.suffix == ".dot"
    return _write(args.output, report.to_dot() if dot else report.to_svg())


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
    with stoppable():
        done = center_checkpoint(plan, args.source, args.dest, args.prefix, _tracked)
    what = [counted(len(plan.edits), "parameter") + " centered"]
    what += [counted(len(plan.scales), "scale") + " merged"] * bool(plan.scales)
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jax_lnfold",
        description="Makes the LayerNorms of a JAX model as cheap as RMSNorms, exactly.",
        epilog=f"example: python -m jax_lnfold report my_model:target\n\n{_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(
        run: Callable[[argparse.Namespace], int], words: str, text: str, example: str
    ) -> argparse.ArgumentParser:
        name = run.__name__.strip("_")
        added = commands.add_parser(
            name,
            help=words,
            description=f"{words[0].upper()}{words[1:]}.\n\n{text}",
            epilog=f"example: python -m jax_lnfold {name} {example}\n\n{_CODES}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(run=run)
        return added

    report = command(
        _report,
        "report which LayerNorms fold, and why not",
        _TARGET,
        "my_model:target --html r.html",
    )
    _add_target(report)
    report.add_argument(
        "--html", metavar="FILE", type=Path, help="write a page with a picture, too"
    )
    report.add_argument("--no-cost", action="store_true", help="do not compile to compare costs")
    report.add_argument("--check", action="store_true", help="exit with 3 if a LayerNorm is left")

    plan = command(
        _plan, "write the plan of a fold as JSON", _TARGET, "my_model:target -o plan.json"
    )
    _add_target(plan)
    plan.add_argument("-o", "--output", metavar="FILE", type=Path, help="instead of stdout")

    for parser_of_plans in (report, plan):
        parser_of_plans.add_argument(
            "--fold-affine",
            action="store_true",
            help="move scales and shifts into the linear layers behind them, too",
        )

    draw = command(
        _draw, "draw what a fold does to a model", _TARGET, "my_model:target -o fold.svg"
    )
    _add_target(draw)
    draw.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        type=_picture,
        help="FILE.svg or FILE.dot instead of stdout",
    )

    center = command(
        _center,
        "center the weights of a checkpoint with a plan",
        _SOURCE,
        "plan.json model.safetensors centered.safetensors",
    )
    center.add_argument("plan", metavar="PLAN", type=Path, help="JSON file that `plan` wrote")
    center.add_argument("source", metavar="SOURCE", type=Path, help="checkpoint to read")
    center.add_argument("dest", metavar="DEST", type=Path, help="checkpoint to make")
    center.add_argument(
        "--prefix",
        metavar="[OWN=]KEY/PATH",
        default="",
        help="where the tree of the plan is in the checkpoint: with `state`, params/w of the plan "
        "is state/params/w there; with `params=state/weights`, state/weights/w; with `params=`, w",
    )
    return parser


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="TARGET", type=_target, help="package.module:function")


def _target(text: str) -> str:
    module, _, name = text.partition(":")
    if not (module and name):
        raise argparse.ArgumentTypeError(f"{text!r} has no colon; pass package.module:function")
    return text


def _picture(text: str) -> Path:
    if Path(text).suffix not in (".svg", ".dot"):
        raise argparse.ArgumentTypeError(f"{text!r} ends in neither .svg nor .dot")
    return Path(text)
