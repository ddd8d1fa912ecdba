"""What folding itself costs: tracing, analysis, rewriting and editing, by depth of the model.

Run with ``python -m bench.tool_cost``; it writes ``bench/results/tool_cost.json`` and a table.
Everything but the editing works on shapes, up to a model of the size of GPT-3.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import jax_lnfold
from jax_lnfold.placement import place
from jax_lnfold.program import trace
from jax_lnfold.rewrite import rewrite

from .models import GPT, Block, Config
from .programs import random_arrays
from .store import Store
from .timing import spread

RESULTS = Path(__file__).parent / "results" / "tool_cost.json"
STAGES = ("make_jaxpr", "trace", "analysis", "rewriting")
GPT3 = Config(96, 12288, 96, causal=True, dtype=jnp.bfloat16)
SMALL = Config(12, 768, 12, causal=True)
CASES: dict[str, tuple[Config, bool]] = {
    **{
        f"GPT-2, {depth} layers": (replace(SMALL, depth=depth), False) for depth in (12, 24, 48, 96)
    },
    **{f"GPT-2, {depth} layers scanned": (replace(SMALL, depth=depth), True) for depth in (12, 96)},
    "GPT-3, 96 layers": (GPT3, False),
}


class ScannedGPT(nn.Module):
    """GPT-2 whose blocks are one `scan`."""

    config: Config

    @nn.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        """Maps ``[batch, tokens]`` to logits ``[batch, tokens, 50257]``."""
        c = self.config
        table = nn.Embed(50257, c.width, dtype=c.dtype, name="tokens")

        def body(block: Block, x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return block(x), None

        parts = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        scanned = nn.scan(body, length=c.depth, **parts)
        x, _ = scanned(Block(c, name="blocks"), table(ids), None)
        return table.attend(c.norm(dtype=c.dtype, name="final_norm")(x))


def stages(config: Config, scanned: bool, rounds: int) -> dict[str, list[float]]:
    """Seconds of each stage in each round, all stages taking turns."""
    model = (ScannedGPT if scanned else GPT)(config)
    ids = jax.ShapeDtypeStruct((1, 128), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), ids)
    seconds: dict[str, list[float]] = {stage: [] for stage in STAGES}

    def timed(stage: str, call: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        result = call()
        seconds[stage].append(time.perf_counter() - begin)
        return result

    for _ in range(rounds):
        jax.clear_caches()
        timed("make_jaxpr", lambda: jax.make_jaxpr(model.apply)(params, ids))
        jax.clear_caches()
        traced = timed("trace", lambda: trace(model.apply, params, (ids,)))
        placement = timed("analysis", lambda traced=traced: place(traced.graph()))
        timed("rewriting", lambda t=traced, p=placement: rewrite(t.closed, p))
        assert all(placement.folded)
    return seconds


def editing(rounds: int) -> dict[str, list[float]]:
    """Seconds to center the parameters of GPT-2, and to copy the leaves that are edited."""
    model, ids = GPT(SMALL), jax.ShapeDtypeStruct((1, 128), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), ids)
    plan = jax_lnfold.plan_fold(model.apply, shapes, ids)
    params = jax.block_until_ready(random_arrays(shapes))
    paths = {edit.key_path for edit in plan.edits}
    leaves = zip(plan.leaves, jax.tree.leaves(params), strict=True)
    edited = [x for leaf, x in leaves if leaf.key_path in paths]
    copy = jax.jit(lambda xs: [x + 0 for x in xs])
    found: dict[str, list[float]] = {"center": [], "copy": []}
    for number in range(rounds + 1):  # the first round compiles
        for name, call in (
            ("center", lambda: plan.center(params)),
            ("copy", lambda: copy(edited)),
        ):
            begin = time.perf_counter()
            jax.block_until_ready(call())
            if number:
                found[name].append(time.perf_counter() - begin)
    return found


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Medians, and each stage as a multiple of plain tracing in the same round."""
    shown = Table("model", "make_jaxpr", *(f"{s} / make_jaxpr" for s in STAGES[1:]))
    for row in rows:
        if "make_jaxpr" in row:
            base = np.array(row["make_jaxpr"])
            ratios = [
                "{:.2f} ({:.2f}-{:.2f})".format(*spread(np.array(row[s]) / base))
                for s in STAGES[1:]
            ]
            shown.add_row(row["case"], f"{np.median(base):.3f} s", *ratios)
    return shown


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write the JSON and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.tool_cost", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FILE")
    options = parser.parse_args(argv)
    console, store = Console(), Store(options.output, ("case",))
    with Progress(console=console, disable=not console.is_terminal) as progress:
        for name, (config, scanned) in progress.track(CASES.items()):
            if not store.has(name):
                store.add((name,), **stages(config, scanned, options.rounds))
        if not store.has("editing GPT-2"):
            store.add(("editing GPT-2",), **editing(options.rounds))
    console.print(table(store.rows))
    medians = {r["case"]: np.median(r["analysis"]) for r in store.rows if "analysis" in r}
    growth = medians["GPT-2, 96 layers"] / medians["GPT-2, 12 layers"]
    console.print(f"Analysis of 96 layers takes {growth:.1f} times that of 12.")
    (edit,) = (row for row in store.rows if row["case"] == "editing GPT-2")
    ratio = spread(np.array(edit["center"]) / np.array(edit["copy"]))
    console.print("Centering takes {:.2f} ({:.2f}-{:.2f}) times a copy.".format(*ratio))


if __name__ == "__main__":
    main()
