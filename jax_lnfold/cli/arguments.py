"""What the command line can be told."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from ..version import VERSION

SCRIPT = "jax-lnfold"
Run = Callable[[argparse.Namespace], int]
AddParser = Callable[..., argparse.ArgumentParser]
"""Adds the parser of a command, see `argparse`."""


_CODES = """\
exit codes: 0 done; 1 it failed, for the reason on stderr; 2 wrong usage; 3 with `report --check`, a
LayerNorm is left; 130 interrupted; `center`: 129, 143 ended by SIGHUP, SIGTERM."""


_TARGET = """\
TARGET is `package.module:function`, found from the current directory. The function takes nothing
and returns (apply_fn, params, inputs), as you would pass them to jax_lnfold.fold: inputs is a tuple
of all inputs, or one input that is no tuple. Of several functions, both are mappings by name.
Weights are not needed: params and inputs may be jax.ShapeDtypeStruct, as jax.eval_shape returns
them. For a Flax model, in my_model.py:

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

A checkpoint with other names or layouts, such as PyTorch's, takes --keys FILE, a JSON object from
key paths of the plan to names in the checkpoint; {} stands for a number, the steps are NumPy's:

  {"params/h_{}/ln/scale": "h.{}.ln.weight",
   "params/h_{}/query/kernel": {"name": "h.{}.qkv.weight", "steps": [
     {"slice": [0, 0, 768]}, {"transpose": [1, 0]}, {"reshape": [768, 12, 64]}]},
   "params/gate_up/kernel": {"concat": [
     {"name": "gate.weight", "steps": [{"transpose": [1, 0]}]},
     {"name": "up.weight", "steps": [{"transpose": [1, 0]}]}], "axis": 1},
   "*": null}

"slice" is [axis, start, stop]; "concat" may be followed by "steps" of its own. Every leaf of the
plan has one entry, those that are not edited, too: what is tied in the checkpoint alone is refused.
null: it is not in the checkpoint; "*": null: all others are in none of these arrays. An array saved
under two names is edited under the one given. Whether a square kernel is to be transposed, no check
can tell: compare what the model computes with SOURCE and DEST.
"""


def parser_for(report: Run, plan: Run, draw: Run, center: Run) -> argparse.ArgumentParser:
    """The parser of the command line, with what each command runs."""
    parser = argparse.ArgumentParser(
        prog=_program(),
        description="Makes the LayerNorms of a JAX model as cheap as RMSNorms, exactly.",
        epilog=_epilog("report my_model:target"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    version = f"jax_lnfold {VERSION} (jax {jax.__version__}, Python {platform.python_version()})"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_report(commands.add_parser, report)
    _add_plan(commands.add_parser, plan)
    _add_draw(commands.add_parser, draw)
    _add_center(commands.add_parser, center)
    return parser


def _add_report(add: AddParser, run: Run) -> None:
    words = "report which LayerNorms fold, and why not"
    parser = _command(add, run, words, _TARGET, "my_model:target --html r.html")
    _add_target(parser)
    parser.add_argument(
        "--html", metavar="FILE", type=Path, help="write a page with a picture, too"
    )
    cost = parser.add_mutually_exclusive_group()
    words = "compile both programs and tell what XLA says they cost; else only tiny ones are"
    cost.add_argument("--cost", action="store_true", default=None, help=words)
    never = "compile nothing to compare costs"
    cost.add_argument("--no-cost", dest="cost", action="store_false", default=None, help=never)
    parser.add_argument("--check", action="store_true", help="exit with 3 if a LayerNorm is left")
    _add_options(parser)


def _add_plan(add: AddParser, run: Run) -> None:
    words = "write the plan of a fold as JSON"
    parser = _command(add, run, words, _TARGET, "my_model:target -o plan.json")
    _add_target(parser)
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, help="instead of stdout")
    _add_options(parser)


def _add_draw(add: AddParser, run: Run) -> None:
    words = "draw what a fold does to a model"
    parser = _command(add, run, words, _TARGET, "my_model:target -o fold.svg")
    _add_target(parser)
    instead = "FILE.svg, FILE.dot or (with jax_lnfold[png]) FILE.png instead of SVG on stdout"
    parser.add_argument("-o", "--output", metavar="FILE", type=_picture, help=instead)
    _add_options(parser)


def _add_center(add: AddParser, run: Run) -> None:
    words = "center the weights of a checkpoint with a plan"
    example = "plan.json model.safetensors centered.safetensors"
    parser = _command(add, run, words, _SOURCE, example)
    parser.add_argument("plan", metavar="PLAN", type=Path, help="JSON file that `plan` wrote")
    parser.add_argument("source", metavar="SOURCE", type=Path, help="checkpoint to read")
    parser.add_argument("dest", metavar="DEST", type=Path, help="checkpoint to make")
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--prefix",
        metavar="[OWN=]KEY/PATH",
        default="",
        help="where the tree of the plan is in the checkpoint: with `state`, params/w of the plan "
        "is state/params/w there; with `params=state/weights`, state/weights/w; with `params=`, w",
    )
    words = "JSON that says where the leaves are, if names or layouts are others (see above)"
    where.add_argument("--keys", metavar="FILE", type=Path, help=words)


# --- parts of commands ---------------------------------------------------------------------------


def _command(
    add: AddParser, run: Run, words: str, text: str, example: str
) -> argparse.ArgumentParser:
    """A command named like the function that it runs."""
    name = run.__name__.strip("_")
    parser = add(
        name,
        help=words,
        description=f"{words[0].upper()}{words[1:]}.\n\n{text}",
        epilog=_epilog(f"{name} {example}"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _epilog(example: str) -> str:
    return f"example: {_program()} {example}\n\n{_CODES}"


def _program() -> str:
    """What the command line was called by: the script that pip installs, or the module."""
    return SCRIPT if Path(sys.argv[0]).stem == SCRIPT else "python -m jax_lnfold"


def _add_options(parser: argparse.ArgumentParser) -> None:
    """Options of `fold`, which `options_of` reads."""
    words = "move scales and shifts into the linear layers behind them, too"
    parser.add_argument("--fold-affine", action="store_true", help=words)
    either = parser.add_mutually_exclusive_group()
    words = (
        "let lookups read a copy of a table that something else reads, too, where that saves; the "
        "plan is then for plan.extend(params)"
    )
    either.add_argument("--untie", action="store_true", help=words)
    words = (
        "rely on scales that are constant now, and on means of shifts; TARGET must return weights"
    )
    either.add_argument("--assume-values", action="store_true", help=words)


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `fold` among the arguments of a command."""
    return {name: getattr(args, name) for name in ("fold_affine", "untie", "assume_values")}


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="TARGET", type=_target, help="package.module:function")


def _target(text: str) -> str:
    module, _, name = text.partition(":")
    if not (module and name):
        raise argparse.ArgumentTypeError(f"{text!r} has no colon; pass package.module:function")
    return text


def _picture(text: str) -> Path:
    if Path(text).suffix not in (".svg", ".dot", ".png"):
        raise argparse.ArgumentTypeError(f"{text!r} ends in none of .svg, .dot and .png")
    return Path(text)
