"""The benchmark of nets trained here, with tiny ones that are hardly trained."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

pytest.importorskip("flax")
pytest.importorskip("optax")
pytest.importorskip("sklearn")
pytest.importorskip("rich")

from rich.console import Console

from bench import approximate_nets, nets
from bench.store import Store
from jax_lnfold.measurement.normal_equations import Normal

TINY = {name: replace(task, settings=task.settings.tiny()) for name, task in nets.NETS.items()}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(nets, "EVERY", 1)
    monkeypatch.setattr(nets, "SPREAD", {"text": 1})
    for name, value in {"SIZE": 3, "CHOOSE": 1, "TEST": 2, "CURVE": (6, 1)}.items():
        monkeypatch.setattr(approximate_nets, name, value)
    with jax.enable_x64(False):
        yield


def test_training_goes_on_where_it_stopped(tmp_path: Path) -> None:
    told: list[str] = []

    def stop(line: str) -> None:
        told.append(line)
        raise KeyboardInterrupt

    _, want = nets.trained(TINY["text"], "text", tmp_path / "whole", told.append)
    with pytest.raises(KeyboardInterrupt):
        nets.trained(TINY["text"], "text", tmp_path, stop)
    _, got = nets.trained(TINY["text"], "text", tmp_path, told.append)
    lines = ["text: 1 of 2 steps", "text: 2 of 2 steps", "text_spread: 1 of 1 steps"]
    assert [line.partition(",")[0] for line in told] == 2 * lines
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_parts_are_apart() -> None:
    """Nothing that is fitted to or chosen by is measured on, and of the digits no image twice."""
    parts = approximate_nets.Parts.of(TINY["dit"])

    def images(part: Sequence[Any]) -> set[bytes]:
        return {np.asarray(x).tobytes() for batch in part for x in batch["images"]}

    found = [images(part) for part in (parts.fit, parts.choose, parts.test)]
    assert [len(part) for part in found] == [6, 3, 6]
    assert len(set.union(*found)) == 15


def test_rows(tmp_path: Path) -> None:
    store = Store(tmp_path / "rows.json", approximate_nets.KEYS)
    console = Console(file=(printed := io.StringIO()), width=200)
    task = TINY["text"]
    net = nets.trained(task, "text", tmp_path, console.print)
    bench = approximate_nets.Bench(store, "text", task, *net)
    bench.run(console)
    fits = [(m, n) for n in (6, 1) for m in ("regressed", "unguarded")]
    keys = [(row["method"], row["fitted"]) for row in store.rows]
    assert keys == [("naive", 0), ("centered", 0), ("hidden", 6), *fits]
    bench.run(console)
    assert len(store.rows) == len(keys), "nothing is measured again"
    for row in store.rows:
        assert (row["exact"], row["total"]) == (1, 3)
        assert row["figures"]["all"]["dropped"] == 2
        assert ("0.02" in row["figures"]) == (row["fitted"] != 1 and row["method"] != "unguarded")
    by_key = dict(zip(keys, store.rows, strict=True))
    more, less = by_key["regressed", 6], by_key["regressed", 1]
    assert (more["fit"]["tokens"], less["fit"]["tokens"]) == (6 * 64, 64)
    free = by_key["unguarded", 1]["fit"]
    assert np.median(free["on_fitted"]) < np.median(free["on_held_out"]), "it fits too well"
    for table in approximate_nets.methods, approximate_nets.curves:
        console.print(table(store.rows))
    assert "| regressed |" in printed.getvalue()
    assert "| 384    |" in printed.getvalue()


def test_least_squares() -> None:
    """Of tokens whose means a linear function tells, nothing is left."""
    rng = np.random.default_rng(0)
    rows, v = rng.standard_normal((4, 9)), rng.standard_normal(4)
    normal = Normal.empty(4)
    normal.add(rows, -v @ rows, np.ones(9))
    why, found = approximate_nets.unguarded([SimpleNamespace(fitted=normal)], 4)
    assert not why
    np.testing.assert_allclose(found, v, rtol=1e-10)


def test_what_is_no_logit_has_no_divergence(tmp_path: Path) -> None:
    """Nor has a DiT leaves that a mean could be fitted for."""
    store = Store(tmp_path / "rows.json", approximate_nets.KEYS)
    console = Console(file=(printed := io.StringIO()), width=200)
    net = nets.trained(TINY["dit"], "dit", tmp_path, console.print)
    approximate_nets.Bench(store, "dit", TINY["dit"], *net).run(console)
    assert [row["method"] for row in store.rows] == ["naive", "centered", "hidden"]
    assert all(
        x.keys() <= {"budget", "dropped", "error"} for x in store.rows[0]["figures"].values()
    )
    assert "dit: No LayerNorm keeps a mean" in printed.getvalue()
