"""What folding itself costs: tracing, analysis, rewriting and editing, by depth of the model.

Run with ``python -m bench.tool_cost``; it writes ``bench/results/tool_cost.json`` and a table.
Everything but the editing works on shapes, up to a model of the size of GPT-3. These stages run
Python in one thread: their figures are seconds of processor time, garbage collections included as
they come. Editing is measured by the clock. In every round all cases take turns.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
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
from jax_lnfold.placement.place import Placement, place
from jax_lnfold.placement.planning import make_plan
from jax_lnfold.program.graph import Graph
from jax_lnfold.program.tracing import trace
from jax_lnfold.rewrite.rewriter import rewrite

from .models import GPT, Block, Config
from .programs import random_arrays
from .store import Store
from .tables import said
from .timing import interleaved

RESULTS = Path(__file__).parent / "results" / "tool_cost.json"
COLD, WARM, ANALYSIS = "make_jaxpr", "again", "analysis, plan"
"""Tracing with jax's caches cleared, tracing again with them, and what a fold adds to it."""
STAGES = (COLD, WARM, "trace", ANALYSIS, "rewriting")
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


# (LayerNorms' scales and shifts folded, too; kind of arrays)
EDITS = {
    f"editing GPT-2, {kind}{', fold_affine' * affine}": (affine, kind)
    for kind in ("JAX", "NumPy")
    for affine in (False, True)
}


def stages(config: Config, scanned: bool) -> Callable[[], dict[str, float]]:
    """A function that takes the seconds of each stage once."""
    model = (ScannedGPT if scanned else GPT)(config)
    ids = jax.ShapeDtypeStruct((1, 128), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), ids)

    def measure() -> dict[str, float]:
        seconds: dict[str, float] = {}

        def timed(stage: str, call: Callable[[], Any]) -> Any:
            begin = time.process_time()
            result = call()
            seconds[stage] = time.process_time() - begin
            return result

        def plan(graph: Graph) -> Placement:
            placement = place(graph)
            make_plan(placement)
            return placement

        jax.clear_caches()
        timed(COLD, lambda: jax.make_jaxpr(model.apply)(params, ids))
        timed(WARM, lambda: jax.make_jaxpr(model.apply)(params, ids))
        jax.clear_caches()
        traced = timed("trace", lambda: trace(model.apply, params, (ids,)))
        placement = timed(ANALYSIS, lambda: plan(traced.graph()))
        timed("rewriting", lambda: rewrite(traced.closed, placement))
        assert all(placement.folded)
        return seconds | {"equations": len(placement.graph.ops)}

    return measure


def editing(affine: bool, kind: str, config: Config = SMALL) -> Callable[[], dict[str, float]]:
    """A function that times editing the parameters, and copying the leaves that are edited."""
    model, ids = GPT(config), jax.ShapeDtypeStruct((1, 128), jnp.int32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), ids)
    plan = jax_lnfold.plan_fold(model.apply, shapes, ids, fold_affine=affine)
    params = random_arrays(shapes)
    copy: Callable[..., Any] = jax.jit(lambda xs: [x + 0 for x in xs])
    if kind == "NumPy":
        params = jax.tree.map(np.array, params)
        copy = partial(map, np.copy)
    paths = plan.leaf_edits().keys()
    leaves = zip(plan.leaves, jax.tree.leaves(params), strict=True)
    edited = [x for leaf, x in leaves if leaf.key_path in paths]

    def measure() -> dict[str, float]:
        calls = {"center": lambda: plan.center(params), "copy": lambda: [*copy(edited)]}
        return {name: float(found[0]) for name, found in interleaved(calls, 1).items()}

    jax.block_until_ready(params)
    return measure


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Medians, and each stage as a multiple of plain tracing in the same round."""
    shown = Table("model", "equations", *STAGES, title=f"processor time; multiples of {COLD}")
    for case in CASES:
        if base := column(rows, case, COLD).tolist():
            found = (said(column(rows, case, s) / base) for s in STAGES[1:])
            equations = f"{column(rows, case, 'equations')[0]:,.0f}"
            shown.add_row(case, equations, f"{np.median(base):.3f} s", *found)
    return shown


def column(rows: Sequence[dict[str, Any]], case: str, name: str) -> np.ndarray:
    """A figure of a case in each round."""
    found = {row["round"]: row[name] for row in rows if row["case"] == case}
    return np.array([found[number] for number in sorted(found)])


def growth(rows: Sequence[dict[str, Any]], case: str, base: str, stage: str) -> str:
    """How much longer a stage takes for one case than for another one, round by round."""
    pairs = zip(column(rows, case, stage), column(rows, base, stage), strict=False)
    return said(np.array([a / b for a, b in pairs]))


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, write the JSON and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.tool_cost", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FILE")
    options = parser.parse_args(argv)
    console, store = Console(), Store(options.output, ("case", "round"))
    made = {name: partial(stages, *case) for name, case in CASES.items()}
    made |= {name: partial(editing, *case) for name, case in EDITS.items()}
    with Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=options.rounds * len(made))
        measures: dict[str, Callable[[], dict[str, float]]] = {}
        for number in range(options.rounds):
            for name, make in made.items():
                if not store.has(name, number):
                    if name not in measures:
                        measures[name] = make()
                        measures[name]()  # compiles, and fills the caches that are never cleared
                    store.add((name, number), **measures[name]())
                progress.update(task, advance=1, description=name)
    console.print(table(store.rows))
    for ending in ("", " scanned"):
        deep, shallow = (f"GPT-2, {depth} layers{ending}" for depth in (96, 12))
        for stage in (ANALYSIS, COLD):
            times = growth(store.rows, deep, shallow, stage)
            console.print(f"{deep}: {stage} takes {times} times as long as for 12 layers")
    for name in EDITS:
        ratio = column(store.rows, name, "center") / column(store.rows, name, "copy")
        console.print(f"{name}: {said(ratio)} times as long as copying the edited leaves")


if __name__ == "__main__":
    main()
