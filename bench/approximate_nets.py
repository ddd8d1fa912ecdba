"""LayerNorms of nets trained here without their means: how far off, at which budget and data.

Run with ``python -m bench.approximate_nets`` (flax, optax and scikit-learn); it trains a text
encoder, a Swin and a DiT (``bench/nets.py``), writes ``bench/results/approximate_nets.json`` and
prints tables. Means are fitted to some training data, those left out are chosen on others, and
errors are those on data that were held out of the training.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

import jax_lnfold
from jax_lnfold import fitting

from . import nets
from .approximate import BUDGETS, Batch, Programs, Trial, difference, shares
from .store import Row, Store
from .training.tasks import Task

RESULTS = Path(__file__).parent / "results" / "approximate_nets.json"
WEIGHTS = Path(tempfile.gettempdir()) / "jax_lnfold_nets"
KEYS = ("net", "method", "fitted")
SIZE = 8  # examples of a batch
CHOOSE, TEST = 4, 8
CURVE = (128, 1, 8, 32)  # examples of a fit; the first table has the most
EXACT = 1e-10  # a share below is rounding
SEEDS = {"training": 0, "order": 0, "fit": 1, "choose": 2}


@dataclass(frozen=True)
class Parts:
    """Batches of a net, as the task draws them, apart from each other."""

    fit: Sequence[Any]
    choose: Sequence[Any]
    test: Sequence[Any]

    @classmethod
    def of(cls, task: Task) -> Parts:
        """Examples of the training data, and of those that were held out."""
        train, test, _ = task.load()
        arrays = {k: jnp.asarray(v) for k, v in train.items()}
        order = np.random.default_rng(SEEDS["order"]).permutation(task.examples(train))

        def drawn(first: int, count: int, seed: int) -> list[Any]:
            chosen = order[first * SIZE :][: count * SIZE].reshape(-1, SIZE)
            key = jax.random.key(seed)
            return [
                task.draw(arrays, jnp.asarray(index), jax.random.fold_in(key, i))
                for i, index in enumerate(chosen)
            ]

        most = max(CURVE) // SIZE
        held = [{k: x[i * SIZE :][:SIZE] for k, x in test.items()} for i in range(TEST)]
        return cls(drawn(0, most, SEEDS["fit"]), drawn(most, CHOOSE, SEEDS["choose"]), held)


def inputs(task: Task, part: Sequence[Any]) -> list[Batch]:
    """What the function reads of batches."""
    return [tuple(map(np.asarray, task.inputs(batch))) for batch in part]


def unguarded(parts: Sequence[Any], size: int) -> tuple[str, np.ndarray]:
    """The least squares alone, as they fit: no ridge, and nothing held out against them."""
    used = [own.fitted for own in parts if own.fitted.squares > 0]
    matrix = sum((n.matrix / n.squares for n in used), np.zeros((size, size)))
    vector = sum((n.vector / n.squares for n in used), np.zeros(size))
    return "", -np.linalg.pinv(matrix, rcond=1e-10, hermitian=True) @ vector


def told(fitted: jax_lnfold.Regression) -> dict[str, Any]:
    """What a fit says of itself."""
    return {
        "tokens": max((n.tokens + n.held_out for n in fitted.norms), default=0),
        "refused": sum(bool(n.why) for n in fitted.norms),
        "of": len(fitted.norms),
        "on_fitted": [n.fitted for n in fitted.norms],
        "on_held_out": [n.regressed for n in fitted.norms],
    }


@dataclass
class Bench:
    """A trained net: what its rows have in common."""

    store: Store
    name: str
    task: Task
    apply: Any
    params: Any

    def __post_init__(self) -> None:
        """Draw data, and trace the programs."""
        self.parts = Parts.of(self.task)
        self._fit, choose, self._test = (
            inputs(self.task, part) for part in (self.parts.fit, self.parts.choose, self.parts.test)
        )
        self._plan = jax_lnfold.plan_fold(self.apply, self.params, *choose[0], reduce_means=True)
        self._programs = Programs(self.apply, self.params, self._plan, choose[0])
        self._trial = Trial(self._programs, self.params, choose, self._test)
        original = self._programs.original
        self._want = [np.asarray(original(self.params, *batch)) for batch in self._test]
        self._common = {
            "exact": self._programs.exact,
            "total": self._programs.total + self._programs.exact,
            "parameters": sum(x.size for x in jax.tree.leaves(self.params)),
            "spread": spread(self.params),
            "cast": self._trial.cast(self._test),
            "score": self._score(self._want),
            "steps": self.task.settings.steps,
            "seeds": SEEDS,
        }

    @property
    def _unfitted(self) -> tuple[tuple[str, Any], ...]:
        return ("naive", self.params), ("centered", self._plan.center(self.params))

    def _first(self, count: int) -> list[Batch]:
        """Examples to fit to: whole batches, or a part of one."""
        some = self._fit[: max(1, count // SIZE)]
        return [tuple(x[:count] for x in batch) for batch in some]

    def _score(self, outputs: Sequence[Any]) -> float:
        """The task's own metric on the batches of the test."""
        scores = map(self.task.score, map(jnp.asarray, outputs), self.parts.test)
        return float(np.mean([np.mean(score) for score in scores]))

    def _add(self, method: str, count: int, edited: Any, **more: Any) -> dict[str, Any]:
        every = range(self._programs.total)
        without = [self._programs.without(edited, batch, every) for batch in self._test]
        figures = {"all": {"dropped": len(every)} | difference(self._want, without)}
        if count in (0, max(CURVE)) and method != "unguarded":
            figures = self._trial.figures(edited)
        if without[0].shape[-1] == 1:  # no logits
            kept = "budget", "dropped", "error"
            figures = {k: {q: x[q] for q in kept if q in x} for k, x in figures.items()}
        self.store.add(
            (self.name, method, count),
            **self._common,
            score_without=self._score(without),
            shares=shares(self.apply, self.params, self._test, edited),
            figures=figures,
            **more,
        )
        return figures["all"]

    def run(self, console: Console) -> None:
        """All rows of the net that are missing, each written when it is there."""
        for method, edited in self._unfitted:
            if not self.store.has(self.name, method, 0):
                console.print(self.name, method, self._add(method, 0, edited))
        if not self.store.has(self.name, "hidden", most := max(CURVE)):
            fitted = jax_lnfold.regress(self.apply, self.params, *self._first(most)).plan
            edited = replace(fitted, hidden=self._programs.hidden).center(self.params)
            console.print(self.name, "hidden", self._add("hidden", most, edited))
        for count, method in product(CURVE, ("regressed", "unguarded")):
            if self.store.has(self.name, method, count):
                continue
            solve = {"unguarded": unguarded}.get(method, fitting._solved)
            with mock.patch.object(fitting, "_solved", solve):
                fitted = jax_lnfold.regress(self.apply, self.params, *self._first(count))
            if not fitted.norms:
                console.print(f"{self.name}: {fitted}")
                break
            edited = fitted.plan.center(self.params)
            found = self._add(method, count, edited, fit=told(fitted))
            console.print(self.name, method, count, found)


def spread(params: Any) -> list[float]:
    """Of each scale of a LayerNorm, its deviation as a share of its mean."""
    found = jax.tree_util.tree_leaves_with_path(params)
    scales = (np.asarray(x) for path, x in found if path[-1] == jax.tree_util.DictKey("scale"))
    return [float(x.std() / abs(x.mean())) for x in scales]


# --- the command ---------------------------------------------------------------------------------


def cell(row: Row, budget: str) -> str:
    """LayerNorms that fold, the error, and of logits the Kullback-Leibler divergence."""
    found = row["figures"][budget]
    more = f", {found['divergence']:.0e}" if "divergence" in found else ""
    return f"{found['dropped'] + row['exact']}: {found['error']:.1e}{more}"


def methods(rows: Sequence[Row]) -> Table:
    """What folds at each budget, of each way to treat the means."""
    budgets = [*(f"{b:g}" for b in BUDGETS), "bfloat16", "all"]
    shown = Table("net", "means", "share: median, worst", *budgets, "metric", box=box.MARKDOWN)
    centered = {row["net"]: row["shares"] for row in rows if row["method"] == "centered"}
    for row in rows:
        if row["method"] != "unguarded" and row["fitted"] in (0, max(CURVE)):
            kept = np.array(centered.get(row["net"], row["shares"])) > EXACT
            left = np.array(row["shares"])[kept]  # of those that do not fold exactly
            share = f"{np.median(left):.0e}, {max(left):.0e}"
            metric = f"{row['score']:.4g} → {row['score_without']:.4g}"
            cells = (cell(row, budget) for budget in budgets)
            shown.add_row(row["net"], row["method"], share, *cells, metric)
    return shown


def curves(rows: Sequence[Row]) -> Table:
    """How errors fall with the tokens of the fit, with tokens held out against it and without."""
    titles = "net", "tokens", "fitted", "held out", "test", "left centered", "all", "all, unguarded"
    shown = Table(*titles, box=box.MARKDOWN)
    by_key = {tuple(row[k] for k in KEYS): row for row in rows}
    for (net, method, count), row in sorted(by_key.items(), key=lambda item: item[0][::2]):
        free = by_key.get((net, "unguarded", count))
        if method == "regressed" and free:
            fit = free["fit"]
            parts = (fit["on_fitted"], fit["on_held_out"], [s for s in free["shares"] if s > EXACT])
            shown.add_row(
                net,
                str(fit["tokens"]),
                *(f"{np.median(part):.0e}" for part in parts),
                f"{row['fit']['refused']} of {fit['of']}",
                *(f"{x['figures']['all']['error']:.1e}" for x in (row, free)),
            )
    return shown


def main(argv: Sequence[str] | None = None) -> None:
    """Train and measure what is missing, and print tables."""
    parser = argparse.ArgumentParser(prog="python -m bench.approximate_nets", description=__doc__)
    parser.add_argument("--nets", nargs="+", default=[*nets.NETS], choices=[*nets.NETS])
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of trained weights")
    parser.add_argument("--list", action="store_true", help="only print what is stored")
    options = parser.parse_args(argv)
    console, store = Console(width=200), Store(options.output, KEYS)
    for name in () if options.list else options.nets:
        task = nets.NETS[name]
        net = nets.trained(task, name, options.weights, console.print)
        Bench(store, name, task, *net).run(console)
    for table in methods, curves:
        console.print(table(store.rows))


if __name__ == "__main__":
    main()
