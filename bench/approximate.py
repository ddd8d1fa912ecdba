"""LayerNorms of trained ProteinMPNNs without their means: how far off, at which budget.

Run with ``python -m bench.approximate`` (``pip install colabdesign dm-haiku`` for the published
weights, which that package holds); it writes ``bench/results/approximate.json`` and prints tables.
Means are fitted to some random backbones, chosen by others, and errors are those on a third part.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import jax_lnfold
from jax_lnfold.dropping import droppable
from jax_lnfold.measurement.switched import Switched
from jax_lnfold.placement.hiding import hidden_means
from jax_lnfold.placement.planning import follow
from jax_lnfold.program.tracing import trace

from .store import Store

RESULTS = Path(__file__).parent / "results" / "approximate.json"
KEYS = ("weights", "method", "fitted")
WEIGHTS = ("v_48_020", "v_48_002", "v_48_010", "v_48_030", "v_48_010_nomem", "v_48_020_nomem")
NEEDS = "needs colabdesign and dm-haiku, which are not there: pip install colabdesign dm-haiku"
BUDGETS = (1e-3, 5e-3, 2e-2)
RESIDUES, FIT, CHOOSE, TEST = 80, 36, 4, 6
CURVE = (36, 1, 2, 4, 9, 18)
CURVE_OF = "v_48_020"
Batch = tuple[np.ndarray, ...]


# --- the model -----------------------------------------------------------------------------------


def package() -> Path:
    """The folder of colabdesign, of which only the model is imported: the rest needs more."""
    found = importlib.util.find_spec("colabdesign")
    if (
        found is None
        or not found.submodule_search_locations
        or not importlib.util.find_spec("haiku")
    ):
        sys.exit(f"python -m bench.approximate: {NEEDS}")
    root = Path(next(iter(found.submodule_search_locations)))
    for name in ("colabdesign", "colabdesign.mpnn", "colabdesign.shared"):
        module = ModuleType(name)
        module.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = module
    return root


def load(root: Path, name: str) -> tuple[Callable[..., jax.Array], Any]:
    """The published model as a function of parameters, coordinates, residues and their order."""
    import joblib

    if not hasattr(jax, "tree_map"):
        setattr(jax, "tree_map", jax.tree.map)  # noqa: B010  (that the package still calls)
    modules: Any = importlib.import_module("colabdesign.mpnn.modules")
    kept = joblib.load(root / "mpnn" / "weights" / f"{name}.pkl")
    model = modules.RunModel(
        {
            "num_letters": 21,
            "node_features": 128,
            "edge_features": 128,
            "hidden_dim": 128,
            "num_encoder_layers": 3,
            "num_decoder_layers": 3,
            "augment_eps": 0.0,
            "k_neighbors": kept["num_edges"],
            "dropout": 0.0,
        }
    )

    def apply(params: Any, x: jax.Array, residues: jax.Array, order: jax.Array) -> jax.Array:
        inputs = {
            "X": x,
            "S": jax.nn.one_hot(residues, 21),
            "mask": jnp.ones(RESIDUES),
            "residue_idx": jnp.arange(RESIDUES),
            "chain_idx": jnp.zeros(RESIDUES, jnp.int32),
            "decoding_order": order,
        }
        return model.score(params, jax.random.key(0), inputs)["logits"]

    return apply, jax.tree.map(np.asarray, dict(kept["model_state_dict"]))


def backbone(seed: int) -> Batch:
    """A random walk of atoms N, CA, C and O in ångström, residues, and an order to decode them."""
    rng = np.random.default_rng(seed)
    step = rng.normal(size=(RESIDUES, 3))
    for i in range(1, RESIDUES):
        step[i] = 0.6 * step[i - 1] + 0.8 * step[i]
    step /= np.linalg.norm(step, axis=1, keepdims=True)
    side = rng.normal(size=(RESIDUES, 3))
    side -= (side * step).sum(1, keepdims=True) * step
    side /= np.linalg.norm(side, axis=1, keepdims=True)
    ca = 0.7 * np.cumsum(3.8 * step, axis=0)
    c = ca + 1.2 * step + 0.9 * side
    atoms = np.stack([ca - 1.2 * step + 0.8 * side, ca, c, c + 1.2 * side], axis=1)
    residues, order = rng.integers(0, 20, RESIDUES), rng.permutation(RESIDUES)
    return atoms.astype(np.float32), residues.astype(np.int32), order.astype(np.int32)


# --- measuring -----------------------------------------------------------------------------------


@dataclass
class Programs:
    """The original, and one with a switch for each mean, compiled once for all weights."""

    apply: Callable[..., jax.Array]
    params: Any
    plan: jax_lnfold.FoldPlan
    example: Batch

    def __post_init__(self) -> None:
        """Trace both."""
        traced = trace(self.apply, self.params, self.example)
        placement = follow(self.plan, traced.graph(), 2.0)
        groups = [*droppable(placement)[0].values()]
        edits = hidden_means(placement, self.plan)
        self.hidden = tuple(edits[i] for own in groups for i in own if i in edits)
        self.total, self.exact = len(groups), len(placement.norms) - len(groups)
        self.original = jax.jit(self.apply)

        @jax.jit
        def switched(leaves: list[Any], given: list[Any], on: jax.Array) -> jax.Array:
            program = Switched(traced.closed, placement, groups, on)
            return program.outputs(traced.closed.consts, [*leaves, *given])[0]

        self._switched = switched

    def without(self, params: Any, batch: Batch, dropped: Iterable[int]) -> np.ndarray:
        """Logits if some means are left out."""
        on = ~np.isin(np.arange(self.total), [*dropped])
        return np.asarray(self._switched(jax.tree.leaves(params), [*batch], on))


def difference(want: Sequence[np.ndarray], got: Sequence[np.ndarray]) -> dict[str, float]:
    """Relative error, Kullback-Leibler divergence in nats, and agreement of the argmax."""
    a, b = (np.concatenate(x).astype(np.float64) for x in (want, got))
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (a, b))
    return {
        "error": float(np.linalg.norm(a - b) / np.linalg.norm(a)),
        "divergence": float((np.exp(p) * (p - q)).sum(-1).mean()),
        "agreement": float((a.argmax(-1) == b.argmax(-1)).mean()),
    }


@dataclass
class Trial:
    """One set of weights: what is measured on which backbones."""

    programs: Programs
    params: Any
    choose: Sequence[Batch]
    test: Sequence[Batch]

    def __post_init__(self) -> None:
        """Run the original."""
        self._want = {id(part): self._original(self.params, part) for part in self._parts}

    @property
    def _parts(self) -> tuple[Sequence[Batch], Sequence[Batch]]:
        return self.choose, self.test

    def _original(self, params: Any, part: Sequence[Batch]) -> list[np.ndarray]:
        return [np.asarray(self.programs.original(params, *batch)) for batch in part]

    def cast(self, part: Sequence[Batch]) -> dict[str, float]:
        """What a cast of the weights to bfloat16 does."""
        rounded = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16).astype(x.dtype), self.params)
        return difference(self._want[id(part)], self._original(rounded, part))

    def dropped(self, params: Any, means: Iterable[int], part: Sequence[Batch]) -> dict[str, float]:
        """What leaving out means does to the function at these parameters."""
        got = [self.programs.without(params, batch, means) for batch in part]
        return difference(self._want[id(part)], got)

    def figures(self, params: Any) -> dict[str, Any]:
        """At each budget, chosen on one part and measured on the other, and without any mean."""
        n = range(self.programs.total)
        alone = [self.dropped(params, [i], self.choose)["error"] for i in n]
        order = sorted(n, key=lambda i: alone[i])
        joint = cache(lambda k: self.dropped(params, order[:k], self.choose)["error"])
        found = dict[str, Any]()
        cast = self.cast(self.choose)["error"]
        for name, budget in [*((f"{b:g}", b) for b in BUDGETS), ("bfloat16", cast)]:
            count = bisect_right(range(1, len(n) + 1), budget, key=joint)
            told = self.dropped(params, order[:count], self.test)
            found[name] = {"budget": budget, "dropped": count} | told
        return found | {"all": {"dropped": len(n)} | self.dropped(params, n, self.test)}


def shares(apply: Any, params: Any, test: Sequence[Batch], edited: Any) -> list[float]:
    """The share of the mean that each LayerNorm reads at edited parameters."""
    return [
        float(np.mean(norm.before.share)) for norm in jax_lnfold.measure(apply, edited, *test).norms
    ]


# --- the command ---------------------------------------------------------------------------------


def run(store: Store, root: Path, weights: Sequence[str], console: Console) -> None:
    """All rows that are missing, each written when it is there."""
    fit, choose, test = (
        [backbone(start + i) for i in range(count)]
        for start, count in ((0, FIT), (1000, CHOOSE), (2000, TEST))
    )
    programs: Programs | None = None
    for name in weights:
        apply, params = load(root, name)
        counts = CURVE if name == CURVE_OF else (FIT,)
        rows = [*(("regressed", n) for n in counts), ("hidden", FIT)]
        if all(store.has(name, *row) for row in rows):
            continue
        plan = jax_lnfold.plan_fold(apply, params, *fit[0], reduce_means=True)
        programs = programs or Programs(apply, params, plan, fit[0])
        trial = Trial(programs, params, choose, test)
        common = {"exact": programs.exact, "cast": trial.cast(test)}
        for method, edited in (("naive", params), ("centered", plan.center(params))):
            if not store.has(name, method, 0):
                found = trial.figures(edited)
                told = shares(apply, params, test, edited)
                store.add((name, method, 0), **common, shares=told, figures=found)
                console.print(name, method, found["all"])
        for count in counts:
            missing = [row for row in rows if row[1] == count and not store.has(name, *row)]
            if not missing:
                continue
            began = time.perf_counter()
            fitted = jax_lnfold.regress(apply, params, *fit[:count]).plan
            seconds = time.perf_counter() - began
            for method, _ in missing:
                hidden = programs.hidden if method == "hidden" else ()
                edited = replace(fitted, hidden=hidden).center(params)
                figures = {"seconds": seconds, "shares": shares(apply, params, test, edited)}
                found = trial.figures(edited)
                store.add((name, method, count), **common, **figures, figures=found)
                console.print(name, method, count, f"{seconds:.0f} s", found["all"])


def tables(store: Store, console: Console) -> None:
    """What is stored: the methods, and how errors fall with the number of backbones."""
    budgets = [*(f"{b:g}" for b in BUDGETS), "bfloat16", "all"]
    table = Table("weights", "method", "fitted", "share, median and worst", *budgets)
    for row in store.rows:
        told = [s for s in row["shares"] if s > 1e-10]
        cells = [
            f"{x['dropped'] + row['exact']}: {x['error']:.2g}, {x['divergence']:.1e}"
            for x in (row["figures"][b] for b in budgets)
        ]
        share = f"{np.median(told):.1e}, {max(told):.1e}"
        table.add_row(row["weights"], row["method"], str(row["fitted"]), share, *cells)
    console.print(table)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what is missing, and print tables."""
    parser = argparse.ArgumentParser(prog="python -m bench.approximate", description=__doc__)
    parser.add_argument("--weights", nargs="+", default=WEIGHTS, help="of colabdesign")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--list", action="store_true", help="only print what is stored")
    options = parser.parse_args(argv)
    console, store = Console(), Store(options.output, KEYS)
    if not options.list:
        run(store, package(), options.weights, console)
    tables(store, console)


if __name__ == "__main__":
    main()
