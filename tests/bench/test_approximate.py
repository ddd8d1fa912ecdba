"""The benchmark of trained ProteinMPNNs, with a small model in their place."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("rich")

from rich.console import Console

import jax_lnfold
from bench import approximate
from bench.store import Store

D = 6


def draw(*shape: int, seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape) / 2 + 0.1)


def norm(scale: jax.Array, x: jax.Array) -> jax.Array:
    return scale * jax.nn.standardize(x)


def model(params: Any, x: Any, residues: Any, order: Any) -> jax.Array:
    """Post-LN, of the atoms of each residue; the first LayerNorm folds."""
    y = norm(params["g0"], x.reshape(len(x), -1) @ params["in"] + params["table"][residues])
    for i in (1, 2):
        y = norm(params[f"g{i}"], y + jnp.tanh(y @ params[f"w{i}"])[order] @ params[f"v{i}"])
    return y @ params["head"]


PARAMS = {
    "in": draw(12, D, seed=0),
    "table": draw(20, D, seed=1),
    "head": draw(D, 5, seed=2),
    **{f"g{i}": 1 + draw(D, seed=10 + i) / 2 for i in range(3)},
    **{f"w{i}": draw(D, 7, seed=20 + i) for i in (1, 2)},
    **{f"v{i}": draw(7, D, seed=30 + i) for i in (1, 2)},
}


def test_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(approximate, "load", lambda root, name: (model, PARAMS))
    monkeypatch.setattr(approximate, "RESIDUES", 16)
    monkeypatch.setattr(approximate, "CURVE", (4, 1))
    monkeypatch.setattr(approximate, "FIT", 4)
    store = Store(tmp_path / "rows.json", approximate.KEYS)
    console = Console(file=(printed := io.StringIO()), width=200)
    names = ["v_48_020", "other"]
    approximate.run(store, tmp_path, names, console)
    keys = [(row["weights"], row["method"], row["fitted"]) for row in store.rows]
    methods = [("naive", 0), ("centered", 0), ("regressed", 4), ("hidden", 4)]
    more = ("v_48_020", "regressed", 1)
    assert keys == [*(("v_48_020", *m) for m in methods), more, *(("other", *m) for m in methods)]
    approximate.run(store, tmp_path, names, console)
    assert len(store.rows) == len(keys), "nothing is measured again"

    naive, centered, regressed, hidden = store.rows[:4]
    test = [approximate.backbone(2000 + i) for i in range(approximate.TEST)]
    fit = [approximate.backbone(i) for i in range(4)]
    plan = jax_lnfold.regress(model, PARAMS, *fit).plan
    given: dict[str, Any] = {"approximate": {"mean"}, "budget": np.inf, "calibrate": fit}
    program = jax_lnfold.fold(model, PARAMS, *fit[0], **given)
    want = np.concatenate([model(PARAMS, *batch) for batch in test])
    assert [row["exact"] for row in store.rows] == [1] * len(keys)
    got = np.concatenate([program.apply(plan.center(PARAMS), *batch) for batch in test])
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    np.testing.assert_allclose(regressed["figures"]["all"]["error"], error, rtol=1e-6)
    errors = [row["figures"]["all"]["error"] for row in (hidden, regressed, centered, naive)]
    assert errors == sorted(errors)
    for row in store.rows:
        counts = [row["figures"][f"{b:g}"]["dropped"] for b in approximate.BUDGETS]
        assert counts == sorted(counts)
        assert row["figures"]["all"]["dropped"] == 2
        assert len(row["shares"]) == 3
    approximate.tables(store, console)
    assert "regressed" in printed.getvalue()


def test_differences() -> None:
    a = [np.log([[0.5, 0.25, 0.25]]), np.log([[0.2, 0.4, 0.4]])]
    b = [np.log([[0.25, 0.5, 0.25]]), np.log([[0.2, 0.4, 0.4]])]
    found = approximate.difference(a, b)
    np.testing.assert_allclose(found["divergence"], 0.25 * np.log(2) / 2, rtol=1e-12)
    assert found["agreement"] == 0.5
    size = np.linalg.norm(np.concatenate(a))
    np.testing.assert_allclose(found["error"], np.sqrt(2) * np.log(2) / size, rtol=1e-12)


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(approximate.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install colabdesign"):
        approximate.main(["--output", "nowhere.json"])
