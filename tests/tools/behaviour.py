"""Shows what a change of the library's code changes in what it does: a mere move changes nothing.

    python -m tests.tools.behaviour --write before.json      # in the old checkout
    python -m tests.tools.behaviour --against before.json    # in the new one
    python -m tests.tools.behaviour --against before.json --only gpt2    # a part of them

Plans, reports, pictures and folded programs, of the zoo in every spelling and of random networks,
are compared word by word, but for line numbers.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import jax
from rich.progress import track

import conftest  # noqa: F401  the same settings as under pytest
import jax_lnfold
from tests.models.networks import random_network
from tests.models.zoo import NORMS, ZOO

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "affine": {"fold_affine": True},
    "defer": {"defer_scale": True, "deferred_cost": 0.0},
    "both": {"fold_affine": True, "defer_scale": True, "deferred_cost": 0.0},
}
Model = tuple[Callable[..., Any], Any, tuple[Any, ...]]


def models(networks: int, only: str) -> Iterator[tuple[str, Model]]:
    """The models that are folded and whose names hold the text `only`, by name."""
    for case, spelling in product(ZOO, NORMS):
        if only in (name := f"{case} {spelling}"):
            built = case.build(spelling)
            yield name, (built.apply_fn, built.params, built.inputs)
    for number in range(networks):
        if only in (name := f"network {number}"):
            network = random_network(number)
            yield name, (network.apply, network.params, network.inputs)


def behaviour(model: Model, options: dict[str, Any]) -> dict[str, str]:
    """What folding makes of a model, as texts."""
    apply_fn, params, inputs = model
    folded = jax_lnfold.fold(apply_fn, params, *inputs, **options)
    report = replace(folded.report, programs=None)  # nothing is compiled
    program = jax.make_jaxpr(folded.apply)(folded.params, *inputs)
    texts = {
        "plan": folded.plan.to_json(),
        "report": str(report),
        "page": report._repr_html_(),
        "picture": report.to_svg() + report.to_dot(),
        "program": str(program),
    }
    return {name: without_lines(text) for name, text in texts.items()}


def without_lines(text: str) -> str:
    """The text without lines of files, and addresses of objects in memory."""
    return re.sub(r"\b0x[0-9a-f]+", "0x", re.sub(r"[\w<>-]+\.py:\d+", "*.py:*", text))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", type=Path)
    what.add_argument("--against", type=Path)
    parser.add_argument("--networks", type=int, default=200)
    parser.add_argument("--only", default="", help="models whose names hold this text")
    options = parser.parse_args()
    found = {
        f"{name}, {kind}": behaviour(model, chosen)
        for name, model in track(models(options.networks, options.only), "folding", total=None)
        for kind, chosen in OPTIONS.items()
    }
    if options.write:
        options.write.write_text(json.dumps(found))
        return
    known = json.loads(options.against.read_text())
    changed = [
        (name, part)
        for name, texts in found.items()
        for part in texts
        if texts[part] != known.get(name, {}).get(part)
    ]
    for name, part in sorted(changed)[:20]:
        texts = (known.get(name, {}).get(part, ""), found[name][part])
        print(f"{name}: {part}", *difflib.unified_diff(*(t.splitlines() for t in texts), n=0))
    print(f"{len(found)} folds, {len(changed)} texts of them changed")
    sys.exit(bool(changed))


if __name__ == "__main__":
    main()
