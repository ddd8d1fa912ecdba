"""The same models in PyTorch, with LayerNorms and folded, next to JAX on this CPU.

Run with ``python -m bench.peers``; it writes ``bench/results/peers.json`` and a table. All
programs take turns in one process, with the same number of threads. Weights go over from JAX, and
every program must compute what the JAX original does before it is timed. Without PyTorch its rows
are missing.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import jax_lnfold

from .models import GPT, Config, ViT
from .programs import random_arrays
from .registry import MODELS
from .store import Store
from .tables import said
from .timing import interleaved, spread

RESULTS = Path(__file__).parent / "results" / "peers.json"
KEYS = ("model", "batch", "framework", "variant")
ORIGINAL, FOLDED = "LayerNorm", "folded"
VARIANTS = (ORIGINAL, FOLDED)
JAX, EAGER, COMPILED = "JAX, jit", "torch, eager", "torch, compile"
FRAMEWORKS = (JAX, EAGER, COMPILED)
TOLERANCE = 1e-4
"""Of the largest difference to the JAX original, relative to its largest output."""
Programs = dict[tuple[str, str], Callable[[], Any]]


@dataclass(frozen=True)
class Case:
    """A model in both frameworks, and the shape of one input sample."""

    make: Callable[[Config], Any]
    name: str  # in `torch_models`
    config: Config
    sample: tuple[int, ...]
    integers: bool = False


CASES = {
    "vit_b": Case(ViT, "ViT", MODELS["vit_b"].config, (224, 224, 3)),
    "gpt2": Case(GPT, "GPT", MODELS["gpt2"].config, (512,), integers=True),
}


def programs(case: Case, batch: int) -> Programs:
    """The programs of one case that there are on this machine, checked."""
    shape = batch, *case.sample
    x = random_arrays(jax.ShapeDtypeStruct(shape, jnp.int32 if case.integers else jnp.float32), 1)
    model = case.make(case.config)
    params = weights(jax.eval_shape(model.init, jax.random.key(0), x))
    folded = jax_lnfold.fold(model.apply, params, x, fold_affine=True)
    found: Programs = {
        (JAX, ORIGINAL): in_jax(model.apply, params, x),
        (JAX, FOLDED): in_jax(folded.apply, folded.params, x),
    }
    found |= in_torch(case, params, folded, np.asarray(x))
    check(found)
    return found


def weights(shapes: Any) -> Any:
    """Random weights; scales are near one."""
    moved = lambda path, leaf: leaf + ("scale" in jax.tree_util.keystr(path))  # noqa: E731
    return jax.tree_util.tree_map_with_path(moved, random_arrays(shapes))


def in_jax(apply: Callable[..., Any], params: Any, x: Any) -> Callable[[], Any]:
    """A compiled call."""
    compiled = jax.jit(apply).lower(params, x).compile()
    return partial(compiled, params, x)


def in_torch(case: Case, params: Any, folded: jax_lnfold.Folded, x: np.ndarray) -> Programs:
    """The same in PyTorch, nothing without it."""
    try:
        import torch

        from . import torch_models
    except ImportError:
        return {}
    given = torch.tensor(x, dtype=torch.int64 if case.integers else None)
    make, found = getattr(torch_models, case.name), {}
    # params/block_0/attn_norm/scale -> block_0/attn_norm
    moved = {"/".join(merge.key_path.split("/")[1:-1]) for merge in folded.plan.affine}
    for variant, tree in zip(VARIANTS, (params, folded.params), strict=True):
        model = make(case.config, tree["params"], variant == FOLDED, moved).eval()
        for framework, run in ((EAGER, model), (COMPILED, torch.compile(model))):
            found[framework, variant] = torch.inference_mode()(partial(run, given))
    return found


def check(found: Mapping[tuple[str, str], Callable[[], Any]]) -> None:
    """Raise an `AssertionError` unless all programs compute the same."""
    want = np.asarray(found[JAX, ORIGINAL]())
    for name, call in found.items():
        error = np.max(np.abs(np.asarray(call()) - want)) / np.max(np.abs(want))
        assert error < TOLERANCE, f"{name} differs from the JAX original by {error:.1e}"


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Medians, and folded to LayerNorm in each framework, round by round."""
    shown = Table("model", "framework", *(f"{v}, ms" for v in VARIANTS), "folded / LayerNorm")
    found = {tuple(row[k] for k in KEYS): np.array(row["seconds"]) for row in rows}
    for model, batch, framework in dict.fromkeys(key[:3] for key in found):
        one, other = (found.get((model, batch, framework, v)) for v in VARIANTS)
        if one is not None and other is not None:
            times = ("{:.1f} ({:.1f}-{:.1f})".format(*spread(1e3 * s)) for s in (one, other))
            shown.add_row(f"{model}, batch {batch}", framework, *times, said(other / one))
    return shown


def limit_threads(number: int) -> None:
    """Run on so many cores, with as many threads in both frameworks; before jax is used."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:number])
    try:
        import torch
    except ImportError:
        return
    torch.set_num_threads(number)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write the JSON and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.peers", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--models", nargs="+", default=[*CASES], choices=[*CASES], metavar="NAME")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FILE")
    options = parser.parse_args(argv)
    limit_threads(options.threads)
    console, store = Console(), Store(options.output, KEYS)
    names: set[str] = set()
    with Progress(console=console, disable=not console.is_terminal) as progress:
        for model in progress.track(options.models):
            found = programs(CASES[model], options.batch)
            names |= {framework for framework, _ in found}
            if all(store.has(model, options.batch, *name) for name in found):
                continue
            calls = {"/".join(name): call for name, call in found.items()}
            seconds = interleaved(calls, options.rounds)
            for name in found:
                if not store.has(model, options.batch, *name):
                    taken = seconds["/".join(name)].tolist()
                    store.add((model, options.batch, *name), seconds=taken)
    console.print(table(store.rows))
    if JAX in names and EAGER not in names:
        console.print("Rows of torch are missing: run `pip install torch`.")


if __name__ == "__main__":
    main()
