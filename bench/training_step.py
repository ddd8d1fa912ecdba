"""A training step of the folded model against that of the LayerNorm model, by XLA's estimates.

Run with ``python -m bench.training_step``; it writes ``bench/results/training_step.json`` and a
table. Forward, and forward with backward and AdamW, for CPU and, if libtpu is there, for TPU.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from .tpu import TOPOLOGIES, devices, estimate, read, set_up_environment

set_up_environment()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402
from jax.extend.core import jaxpr_as_fun  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import track  # noqa: E402
from rich.table import Table  # noqa: E402

import jax_lnfold  # noqa: E402

from .models import MODELS, NORMS  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "training_step.json"
KEYS = ("model", "batch", "spelling", "dtype", "part", "variant", "kind")
CASES = (("vit_s", 16), ("vit_b", 8), ("gpt2", 2))


def programs(name: str, batch: int, spelling: str, dtype: Any) -> Iterator[tuple[str, str, Any]]:
    """(variant, part, (function, arguments)) of each program to compile."""
    entry = MODELS[name]
    kind = jnp.int32 if entry.integers else dtype
    x = jax.ShapeDtypeStruct((batch, *entry.sample), kind)
    for variant in ("LayerNorm", "folded", "no norms"):
        norm = NORMS["none" if variant == "no norms" else spelling]
        model = entry.make(replace(entry.config, norm=norm, dtype=dtype))
        shapes = jax.eval_shape(model.init, jax.random.key(0), x)
        apply, tx = model.apply, optax.adamw(1e-3)
        if variant == "folded":
            apply = folded_function(model.apply, shapes, x)
            plan = jax_lnfold.plan_fold(model.apply, shapes, x)
            tx = optax.chain(jax_lnfold.center_gradients(plan), tx, jax_lnfold.center_updates(plan))
        state = jax.eval_shape(tx.init, shapes)

        def step(params: Any, state: Any, x: Any, apply: Any = apply, tx: Any = tx) -> Any:
            def loss(params: Any) -> jax.Array:
                logits = apply(params, x)
                labels = jnp.zeros(logits.shape[:-1], jnp.int32)
                wide = logits.astype(jnp.float32)
                return optax.softmax_cross_entropy_with_integer_labels(wide, labels).mean()

            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        yield variant, "forward", (apply, (shapes, x))
        yield variant, "training step", (step, (shapes, state, x))


def folded_function(apply_fn: Callable[..., Any], *shapes: Any) -> Callable[..., Any]:
    """The folded program of a model with one output, from shapes alone."""
    report = jax_lnfold.analyze(apply_fn, *shapes)
    assert report.programs is not None
    run = jaxpr_as_fun(report.programs()[1])
    return lambda *arguments: run(*jax.tree.leaves(arguments))[0]


def compile_all(spelling: str, dtype: str, done: Container[Any]) -> Iterator[dict[str, Any]]:
    """The estimates of every program on every platform there is, but not of those `done`."""
    kinds = [kind for kind in TOPOLOGIES if _has(kind)]
    for name, batch in CASES:
        for variant, part, (function, arguments) in programs(
            name, batch, spelling, jnp.dtype(dtype)
        ):
            for kind in ("cpu", *kinds):
                what = (name, batch, spelling, dtype, part, variant, kind)
                if what in done:
                    continue
                if kind == "cpu":
                    found = read(jax.jit(function).lower(*arguments).compile())
                else:
                    found = estimate(function, *arguments, kind=kind)
                yield dict(zip(KEYS, what, strict=True)) | asdict(found)


def _has(kind: str) -> bool:
    try:
        return bool(devices(kind))
    except Exception:  # no libtpu: the rows are missing, and the table says so
        return False


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Ratios of folded to LayerNorm, next to the bound."""
    shown = Table("model", "part", "norm", "kind", "cycles", "bytes", "flops", "bound (cycles)")
    groups: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        key = (row["model"], row["part"], f"{row['spelling']} {row['dtype']}", row["kind"])
        groups.setdefault(key, {})[row["variant"]] = row
    for key, found in groups.items():
        base, folded, bound = (found[v] for v in ("LayerNorm", "folded", "no norms"))
        ratios = [
            f"{folded[q] / base[q]:.4f}" if base[q] else "-" for q in ("cycles", "bytes", "flops")
        ]
        last = f"{bound['cycles'] / base['cycles']:.4f}" if base["cycles"] else "-"
        shown.add_row(*key, *ratios, last)
    return shown


def main(argv: Sequence[str] | None = None) -> None:
    """Compile, write the JSON and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    console = Console()
    versions = {"jax": jax.__version__, "jax_lnfold": jax_lnfold.__version__}
    known = json.loads(options.output.read_text()) if options.output.exists() else {}
    rows = known.get("rows", []) if known.get("versions") == versions else []
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for spelling, dtype in (("one_pass", "bfloat16"), ("two_pass", "bfloat16")):
        found = compile_all(spelling, dtype, {tuple(row[k] for k in KEYS) for row in rows})
        for row in track(found, f"{spelling} {dtype}", disable=not console.is_terminal):
            rows.append(row)  # written at once: an interrupted run goes on from here
            text = json.dumps({"versions": versions, "rows": rows}, indent=1)
            options.output.write_text(text + "\n")
    console.print(table(rows))
    if len({row["kind"] for row in rows}) == 1:
        console.print("TPU rows are missing: libtpu is not installed.")


if __name__ == "__main__":
    main()
