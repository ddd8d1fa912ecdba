"""Collectives of a model whose residual stream is spread over devices along its features.

Run with ``python -m bench.sharded`` (needs libtpu); it writes ``bench/results/collectives.json``
and a table. In 2-D weight-stationary inference (Pope et al. 2022) no device has all features of a
token, so that the mean and the variance of every LayerNorm are sums over all devices. Nothing is
run: what the TPU compiler makes of one layer is the difference of stacks of two depths.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from .tpu import collectives, devices, read, set_up_environment

set_up_environment()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import Mesh, NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import Progress  # noqa: E402
from rich.table import Table  # noqa: E402

from .models import NORMS  # noqa: E402
from .programs import BOUND, FORWARD, program  # noqa: E402
from .store import Store  # noqa: E402
from .tables import cases as grouped  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "collectives.json"
KEYS = ("topology", "style", "task", "spelling", "variant")
SHAPES = {"2x4": (2, 4), "4x4": (4, 4)}
TASKS = {"prefill": (4, 256), "generate": (64, 1)}  # samples and tokens
BOTH = ("one_pass", "two_pass")
CASES = (
    *product(("v5e:2x4", "v5e:4x4", "v6e:4x4"), ("jit",), ("generate",), BOTH),
    *product(("v5e:2x4",), ("jit",), ("prefill",), BOTH),
    *product(("v6e:2x4",), ("jit",), ("generate",), BOTH),
    *product(("v5e:2x4",), ("shard_map",), ("generate",), BOTH),
)
DEPTHS = (1, 3)
WIDTH, HEADS, VOCABULARY = 4096, 32, 1024
STREAM = P(None, None, ("x", "y"))
KERNELS = {"q": P("x", "y"), "k": P("x", "y"), "v": P("x", "y"), "fc1": P("x", "y")} | {
    "out": P("y", "x"),
    "fc2": P("y", "x"),
}


@dataclass(frozen=True)
class Layout:
    """What a block does besides computing: where the compiler places what, or in so many words."""

    gather: Callable[[jax.Array], jax.Array]  # the stream to what the first kernels read
    reduce: Callable[[jax.Array], jax.Array]  # the first kernels' partial sums
    scatter: Callable[[jax.Array], jax.Array]  # the last kernels' partial sums to the stream
    place: Callable[[jax.Array], jax.Array]  # a stream
    mean_over: tuple[str, ...] | None  # mesh axes of a norm


def layout(style: str, mesh: Mesh) -> Layout:
    """``jit``: the compiler places collectives; ``shard_map``: they are written out."""

    def same(x: jax.Array) -> jax.Array:
        return x

    if style == "jit":
        to = partial(jax.lax.with_sharding_constraint, shardings=NamedSharding(mesh, STREAM))
        return Layout(same, same, to, to, None)
    return Layout(
        partial(jax.lax.all_gather, axis_name="y", axis=2, tiled=True),
        partial(jax.lax.psum, axis_name="x"),
        partial(jax.lax.psum_scatter, axis_name="y", scatter_dimension=2, tiled=True),
        same,
        ("x", "y"),
    )


def forward(norm: Callable[..., Any], where: Layout, params: Any, ids: jax.Array) -> jax.Array:
    """An embedding, a stack of transformer blocks and a final norm: ids to the stream."""

    def normed(name: str, layer: Any, x: jax.Array) -> jax.Array:
        module = norm(dtype=x.dtype, **({"axis_name": where.mean_over} if layer[name] else {}))
        return module.apply({"params": layer[name]}, x)

    def wide(layer: Any, names: Sequence[str], h: jax.Array) -> list[jax.Array]:
        h = where.gather(h)
        return [where.reduce(h @ layer[n]["kernel"]) + layer[n]["bias"] for n in names]

    def narrow(layer: Any, name: str, h: jax.Array) -> jax.Array:
        return where.scatter(h @ layer[name]["kernel"]) + layer[name]["bias"]

    x = where.place(params["table"][ids])
    for layer in params["blocks"]:
        q, k, v = wide(layer, "qkv", normed("attn_norm", layer, x))
        split = (*q.shape[:2], -1, WIDTH // HEADS)
        q, k, v = (y.reshape(split) for y in (q, k, v))
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + narrow(layer, "out", y.reshape(*x.shape[:2], -1))
        (h,) = wide(layer, ["fc1"], normed("mlp_norm", layer, x))
        x = x + narrow(layer, "fc2", jax.nn.gelu(h))
    return normed("final_norm", params, x)


def parameters(depth: int, mesh: Mesh, with_norms: bool) -> Any:
    """Shapes of the parameters, spread over both axes of the mesh."""

    def leaf(shape: tuple[int, ...], spec: P) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))

    def dense(name: str) -> Any:
        rows, columns = {"fc1": (1, 4), "fc2": (4, 1)}.get(name, (1, 1))
        bias = P(("x", "y")) if KERNELS[name] == P("y", "x") else P("y")
        kernel = leaf((rows * WIDTH, columns * WIDTH), KERNELS[name])
        return {"kernel": kernel, "bias": leaf((columns * WIDTH,), bias)}

    def norm() -> Any:
        vector = leaf((WIDTH,), P(("x", "y")))
        return {"scale": vector, "bias": vector} if with_norms else {}

    block = {name: dense(name) for name in KERNELS} | {"attn_norm": norm(), "mlp_norm": norm()}
    table = leaf((VOCABULARY, WIDTH), P(None, ("x", "y")))
    return {"table": table, "blocks": [block] * depth, "final_norm": norm()}


def compiled(case: tuple[str, str, str, str], variant: str, depth: int) -> Any:
    """A variant of a stack, compiled for a topology."""
    topology, style, task, spelling = case
    shape = SHAPES[topology.partition(":")[2]]
    mesh = Mesh(np.array(devices(topology)).reshape(shape), ("x", "y"))
    norm = NORMS["none" if variant == BOUND else spelling]
    params = parameters(depth, mesh, variant != BOUND)
    stream = NamedSharding(mesh, STREAM)
    ids = jax.ShapeDtypeStruct(TASKS[task], jnp.int32, sharding=NamedSharding(mesh, P()))
    function = partial(forward, norm, layout(style, mesh))
    if style == "shard_map":
        specs = jax.tree.map(lambda leaf: leaf.sharding.spec, params)
        function = jax.shard_map(function, mesh=mesh, in_specs=(specs, P()), out_specs=STREAM)
    found = program(variant, function, params, ids, target="tpu")
    return jax.jit(found.apply, out_shardings=stream).lower(found.params, found.x).compile()


def per_layer(case: tuple[str, str, str, str], variant: str) -> dict[str, Any]:
    """Collectives of a layer by name, their number and bytes, and the cycles of a layer."""
    counts: list[Counter[str]] = []
    for depth in DEPTHS:
        program, found = compiled(case, variant, depth), Counter[str]()
        for name, size in collectives(program.as_text()):
            found += Counter({name: 1, "collectives": 1, "bytes": size})
        found["cycles"] = read(program).cycles
        counts.append(found)
    few, many = counts
    layers = DEPTHS[1] - DEPTHS[0]
    return {name: (many[name] - few[name]) / layers for name in sorted(many | few)}


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Number of collectives in a layer, kB that they bring to a chip, thousands of cycles."""
    shown = Table("chips", "style", "task", "norm", *FORWARD)
    for case, by_variant in grouped(rows, KEYS).items():
        cells = [
            f"{by_variant[v]['collectives']:g}, {by_variant[v]['bytes'] / 1e3:,.1f} kB, "
            f"{by_variant[v]['cycles'] / 1e3:.1f}"
            if v in by_variant
            else ""
            for v in FORWARD
        ]
        shown.add_row(*case, *cells)
    return shown


def main(argv: Sequence[str] | None = None) -> None:
    """Compile what is not stored yet, write the JSON and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.sharded", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--topologies", nargs="+", metavar="NAME")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FILE")
    options = parser.parse_args(argv)
    console, store = Console(), Store(options.output, KEYS)
    cases = [c for c in CASES if c[0] in (options.topologies or c[0])]
    with Progress(console=console, disable=not console.is_terminal) as progress:
        for case, variant in progress.track([*product(cases, FORWARD)]):
            if not store.has(*case, variant):
                store.add((*case, variant), **per_layer(case, variant))
    console.print(table(store.rows))


if __name__ == "__main__":
    main()
