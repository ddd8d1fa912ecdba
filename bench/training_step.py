"""A training step of the folded model against that of the LayerNorm model, by XLA's estimates.

Run with ``python -m bench.training_step``; it writes ``bench/results/training_step.json`` and a
table. Forward, and forward with backward and AdamW, for CPU and, if libtpu is there, for TPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .tpu import TOPOLOGIES, estimate, has_compiler, read, set_up_environment

set_up_environment()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import Progress  # noqa: E402
from rich.table import Table  # noqa: E402

import jax_lnfold  # noqa: E402

from .programs import BOUND, FOLDED, ORIGINAL, VARIANTS, variants  # noqa: E402
from .store import Store  # noqa: E402
from .tables import cases  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "training_step.json"
PARTS = ("forward", "training step")
KEYS = ("model", "batch", "spelling", "dtype", "part", "kind", "variant")
CASES = (("vit_s", 16, "one_pass"), ("vit_s", 16, "two_pass"), ("gpt2", 2, "one_pass"))
DTYPE = "bfloat16"


def programs(name: str, batch: int, spelling: str) -> Iterator[tuple[str, str, Any]]:
    """(variant, part, (function, arguments)) of each program to compile."""
    for program in variants(name, batch, spelling, DTYPE):
        tx = optax.adamw(1e-3)
        if program.plan is not None:
            first = jax_lnfold.center_gradients(program.plan)
            tx = optax.chain(first, tx, jax_lnfold.center_updates(program.plan))
        state = jax.eval_shape(tx.init, program.params)

        def step(params: Any, state: Any, x: Any, apply: Any = program.apply, tx: Any = tx) -> Any:
            def loss(params: Any) -> jax.Array:
                logits = apply(params, x)
                labels = jnp.zeros(logits.shape[:-1], jnp.int32)
                wide = logits.astype(jnp.float32)
                return optax.softmax_cross_entropy_with_integer_labels(wide, labels).mean()

            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        yield program.variant, "forward", (program.apply, (program.params, program.x))
        yield program.variant, "training step", (step, (program.params, state, program.x))


def fill(store: Store, kinds: Sequence[str], progress: Progress) -> None:
    """Compile what is not stored yet."""
    task = progress.add_task("Compiling", total=len(CASES) * len(PARTS) * len(VARIANTS))
    for name, batch, spelling in CASES:
        for variant, part, (function, arguments) in programs(name, batch, spelling):
            for kind in kinds:
                what = (name, batch, spelling, DTYPE, part, kind, variant)
                if store.has(*what):
                    continue
                if kind == "cpu":
                    found = read(jax.jit(function).lower(*arguments).compile())
                else:
                    found = estimate(function, *arguments, kind=kind)
                store.add(what, **asdict(found))
            progress.advance(task)


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Ratios of folded to LayerNorm, next to the bound."""
    quantities = ("cycles", "bytes", "flops")
    titles = [f"{v} {q}" for v in ("folded", "bound") for q in quantities]
    shown = Table("model", "part", "norm", "kind", *titles)
    for (model, batch, spelling, dtype, part, kind), found in cases(rows, KEYS).items():
        if len(found) == len(VARIANTS):
            base = found[ORIGINAL]
            ratios = [
                f"{found[v][q] / base[q]:.3f}" if base[q] else "-"
                for v in (FOLDED, BOUND)
                for q in quantities
            ]
            shown.add_row(f"{model}, batch {batch}", part, f"{spelling} {dtype}", kind, *ratios)
    return shown


def main(argv: Sequence[str] | None = None) -> None:
    """Compile, write the JSON and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.training_step", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FILE")
    parser.add_argument("--kinds", nargs="+", default=["cpu", "v5e"], choices=["cpu", *TOPOLOGIES])
    options = parser.parse_args(argv)
    console, store = Console(), Store(options.output, KEYS)
    kinds = [kind for kind in options.kinds if has_compiler(kind)]
    with Progress(console=console, disable=not console.is_terminal) as progress:
        fill(store, kinds, progress)
    console.print(table(store.rows))
    for kind in sorted({*options.kinds} - {*kinds}):
        console.print(f"Rows of {kind} are missing: libtpu is not installed.")


if __name__ == "__main__":
    main()
