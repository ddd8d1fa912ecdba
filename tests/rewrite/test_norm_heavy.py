"""What a CPU is asked to do: only for norms that weigh something beside their products."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jax_lnfold
from jax_lnfold.options import MOST_PRODUCTS

Tree = dict[str, Any]
D, ROWS = 6, 5
MOST = MOST_PRODUCTS["cpu"]


def shape(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def branches(p: Tree, x: jax.Array) -> jax.Array:
    """One norm per entry, with the products that read it."""
    s = x @ p["stem"]
    for layer in p["layers"]:
        h = jax.nn.standardize(s) * layer["g"]
        s = s + sum(jnp.tanh(h @ w).sum(-1, keepdims=True) * layer["v"] for w in layer["w"])
    return jax.nn.standardize(s)[..., :1]


def params(*readers: tuple[int, ...]) -> Tree:
    """For each norm the sizes of its readers."""
    layers = [{"g": shape(D), "v": shape(D), "w": [shape(D, n) for n in r]} for r in readers]
    return {"stem": shape(3, D), "layers": layers}


def analysed(p: Tree, **options: Any) -> jax_lnfold.Report:
    return jax_lnfold.analyze(branches, p, shape(ROWS, 3), deferred_cost=0.001, **options)


@pytest.mark.parametrize(
    ("readers", "pays"),
    [((MOST,), True), ((MOST + 1,), False), ((MOST - 7, 7), True), ((MOST - 7, 8), False)],
)
def test_all_readers_count(readers: tuple[int, ...], pays: bool) -> None:
    report = analysed(params(readers), optimize="cpu")
    assert len(report.affine) == len(report.deferred) == pays
    words = "beside the products behind it nothing would be saved"
    assert [s.key_path for s in report.affine_left if s.reason == words] == ["layers/0/g"] * (
        not pays
    )


def test_each_norm_by_itself() -> None:
    report = analysed(params((7,), (2 * MOST,), (9, 5)), optimize="cpu")
    assert [edit.key_path for edit in report.plan.affine] == ["layers/0/g", "layers/2/g"]
    assert len(report.deferred) == 2


def test_what_is_asked_for_has_no_limit() -> None:
    p = params((2 * MOST,))
    for options, affine, deferred in (
        ({"fold_affine": True}, 1, 0),
        ({"fold_affine": True, "defer_scale": True}, 1, 1),
        ({"optimize": "cpu", "fold_affine": True}, 1, 0),
        ({"optimize": "cpu", "fold_affine": True, "defer_scale": True}, 1, 1),
        ({"optimize": "cpu"}, 0, 0),
        ({"optimize": "gpu"}, 1, 0),
    ):
        report = analysed(p, **options)
        assert (len(report.affine), len(report.deferred)) == (affine, deferred), options


def test_loops_and_batches_do_not_matter() -> None:
    """Neither how often a layer runs, nor on how many rows."""

    def scanned(p: Tree, x: jax.Array) -> jax.Array:
        s, _ = jax.lax.scan(lambda s, p: (s + step(p, s), None), x @ p["stem"], p["layers"])
        return jax.nn.standardize(s)[..., :1]

    def step(p: Tree, s: jax.Array) -> jax.Array:
        return jnp.tanh((jax.nn.standardize(s) * p["g"]) @ p["w"]).sum(-1, keepdims=True) * p["v"]

    for inner, pays in ((MOST, True), (MOST + 1, False)):
        layers = {"g": shape(9, D), "v": shape(9, D), "w": shape(9, D, inner)}
        for x in (shape(1, 3), shape(8, 70, 3)):
            report = jax_lnfold.analyze(
                scanned, {"stem": shape(3, D), "layers": layers}, x, optimize="cpu"
            )
            assert len(report.affine) == pays


def test_a_plan_is_followed_whatever_it_was_made_for() -> None:
    p = jax.tree.map(lambda s: jnp.ones(s.shape), params((2 * MOST,)))
    plan = analysed(p, fold_affine=True).plan
    folded = jax_lnfold.fold(
        branches, p, jnp.ones((ROWS, 3)), plan=plan, center=True, optimize="cpu"
    )
    assert len(folded.report.affine) == 1
