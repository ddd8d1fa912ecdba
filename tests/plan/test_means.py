"""Leaves that get chosen means: numbers against plain formulas, files, other traces, training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

import jax_lnfold
import jax_lnfold.plan.leaf
import jax_lnfold.plan.together
from jax_lnfold import FoldPlan, PlanFormatError, PlanMismatchError, TreeError, center_updates
from jax_lnfold.axes.axis_set import AxisSet
from jax_lnfold.axes.labels import FREE, Labels
from jax_lnfold.checkpoints.center import center_checkpoint
from jax_lnfold.plan.edits.affine import AffineEdit, AffineReader
from jax_lnfold.plan.edits.center import CenterEdit
from jax_lnfold.plan.edits.means import MeanEdit
from jax_lnfold.plan.edits.scale import ScaleEdit
from jax_lnfold.plan.file import LeafSpec
from tests.helpers.contracts import check_contracts
from tests.models.zoo import BY_NAME

RNG = np.random.default_rng(0)
SHAPE = (5, 3, 8)
CASES = {"rows": [2], "columns": [0], "middle": [1], "outer": [0, 2], "all": [0, 1, 2], "none": []}
ROUNDING = {"float64": 1e-15, "float32": 1e-6, "bfloat16": 2e-2}


def edit_of(path: str, shape: tuple[int, ...], axes: Sequence[int], size: float = 1.0) -> MeanEdit:
    along = AxisSet.over(shape, axes)
    count = int(np.prod([n for n, e in zip(shape, along.entries, strict=True) if e == FREE]))
    rng = np.random.default_rng([len(path), *shape, *axes])
    return MeanEdit(path, along, tuple((size * rng.normal(-1, 1, count)).tolist()))


def plan_of(*edits: MeanEdit) -> FoldPlan:
    leaves = tuple(LeafSpec(edit.key_path, edit.along.shape) for edit in edits)
    return FoldPlan(leaves, (), means=edits)


def by_hand(x: Any, axes: Sequence[int], means: Sequence[float]) -> np.ndarray:
    x = np.asarray(x, np.float64)
    kept = [1 if d in axes else n for d, n in enumerate(x.shape)]
    mean = x.mean(tuple(axes), keepdims=True) if axes else x
    return x - mean + np.reshape(means, kept)


# --- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["numpy", "blocks", "jax", "donated", "traced"])
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("case", CASES)
def test_numbers(case: str, dtype: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against NumPy; a second edit finds nothing to do, other means do."""
    if kind == "blocks":
        monkeypatch.setattr(jax_lnfold.plan.leaf, "_BLOCK", 7)
    edit = edit_of("w", SHAPE, CASES[case])
    x = np.random.default_rng(1).normal(0.3, 1, SHAPE).astype(dtype)
    given = x if kind in ("numpy", "blocks") else jnp.asarray(x)
    plan = plan_of(edit)
    if kind == "traced":
        found = jax.jit(plan.center)({"w": given})["w"]
    else:
        found = plan.center({"w": given}, donate=kind == "donated")["w"]
    assert (found.shape, found.dtype) == (x.shape, x.dtype)
    assert isinstance(given, np.ndarray) or given.is_deleted() == (kind == "donated")
    want = by_hand(x, CASES[case], edit.means)
    assert abs(np.asarray(found, np.float64) - want).max() <= ROUNDING[dtype] * abs(want).max()
    assert plan.is_centered({"w": found})
    assert plan.center({"w": found})["w"] is found
    assert not plan.is_centered({"w": x})
    other = plan_of(replace(edit, means=(*edit.means[:-1], edit.means[-1] + 0.5)))
    assert not other.is_centered({"w": found})
    assert not FoldPlan(plan.leaves, (CenterEdit("w", edit.along),)).is_centered({"w": found})


@pytest.mark.parametrize("x", [2.0, np.array(2.0), jnp.asarray(2.0)])
def test_a_number_has_one(x: Any) -> None:
    plan = plan_of(MeanEdit("w", AxisSet.over((), []), (0.5,)))
    assert not plan.is_centered({"w": x})
    found = plan.center({"w": x})
    assert found["w"] == 0.5
    assert plan.is_centered(found)


@pytest.mark.parametrize("dtype", [*ROUNDING, "float16"])
@pytest.mark.parametrize("host", [True, False], ids=["NumPy", "jax"])
@pytest.mark.parametrize("size", [1e-6, 1.0, 300.0])
@pytest.mark.parametrize("shape", [(96, 768), (768, 3), (40, 2)])
def test_a_second_edit_changes_nothing(
    shape: tuple[int, int], size: float, host: bool, dtype: str
) -> None:
    """Also where the means are much larger, or smaller, than what is around them."""
    plan = plan_of(edit_of("w", shape, [1], size))
    for seed in range(8):
        x = np.random.default_rng(seed).normal(0.1, 1, shape).astype(dtype)
        once = plan.center({"w": x if host else jnp.asarray(x)})
        assert plan.center(once)["w"] is once["w"]


def test_scaled_first() -> None:
    """After the factors; what a kernel had of means before is gone, and its bias took up that."""
    edit = edit_of("w", (4, 6), [1])
    leaves = tuple(LeafSpec(*s) for s in (("b", (6,)), ("c", (4,)), ("g", (4,)), ("w", (4, 6))))
    tree = {path.key_path: RNG.normal(size=path.shape) for path in leaves}
    merged = FoldPlan(leaves, (), (ScaleEdit("g", (("w", (0,)),)),), means=(edit,))
    want = by_hand(tree["w"] * tree["g"][:, None], [1], edit.means)
    np.testing.assert_allclose(merged.center(tree)["w"], want, atol=1e-14)
    taken = AffineEdit("g", "c", (AffineReader("w", (0,), "b", (0,)),))
    found = FoldPlan(leaves, (), affine=(taken,), means=(edit,)).center(tree)
    np.testing.assert_allclose(found["w"], want, atol=1e-14)
    np.testing.assert_allclose(found["b"], tree["b"] + tree["c"] @ tree["w"], atol=1e-14)


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["numpy", "jax", "donated"])
def test_means_that_do_not_fit_the_dtype(kind: str, dtype: str) -> None:
    """Whether they are too large by themselves, or with what is around them."""
    largest = float(jnp.finfo(dtype).max)
    x = np.zeros((2, 4), dtype)
    x[1] = np.asarray([1, -1, 1, -1], dtype) * (largest / 4)
    along = AxisSet.over((2, 4), [1])
    for mean, fits in ((largest / 2, True), (0.9 * largest, False), (largest * 8, False)):
        tree = {"w": x if kind == "numpy" else jnp.asarray(x)}
        plan = plan_of(MeanEdit("w", along, (0.0, mean)))
        if fits:
            found = np.asarray(plan.center(tree, donate=kind == "donated")["w"], np.float64)
            np.testing.assert_allclose(found[1], largest / 2 + x[1].astype(np.float64), rtol=1e-2)
            continue
        with pytest.raises(TreeError, match="leaf 'w' would overflow"):
            plan.center(tree, donate=kind == "donated")


def test_leaves_that_are_spread_over_devices() -> None:
    """Over the axis that is averaged, and over the one that has the means."""
    mesh = Mesh(np.asarray(jax.devices()[:8]), ("d",))
    edit = edit_of("w", (16, 24), [1])
    x = RNG.normal(size=(16, 24)).astype(np.float32)
    for spec in (PartitionSpec("d"), PartitionSpec(None, "d")):
        sharding = NamedSharding(mesh, spec)
        found = plan_of(edit).center({"w": jax.device_put(x, sharding)})
        assert found["w"].sharding == sharding
        np.testing.assert_allclose(found["w"], by_hand(x, [1], edit.means), atol=2e-6)
        assert plan_of(edit).center(found)["w"] is found["w"]


def test_one_program_for_all_numbers() -> None:
    edits = [edit_of("w", (3, 7), [1], size) for size in (1, 2, 3)]
    before = jax_lnfold.plan.together._compiled.cache_info().misses
    for edit in edits:
        found = plan_of(edit).center({"w": jnp.ones((3, 7))})["w"]
        np.testing.assert_allclose(found.mean(1), edit.means, atol=1e-14)
    assert jax_lnfold.plan.together._compiled.cache_info().misses <= before + 1


# --- plans and their files -----------------------------------------------------------------------

EDITS = (edit_of("b", (6,), [0]), edit_of("w", (4, 6), [1]))
PLAN = plan_of(*EDITS)


def test_files() -> None:
    """Numbers come back bit by bit; nothing older reads them."""
    text = PLAN.to_json()
    assert FoldPlan.from_json(text) == PLAN
    data = json.loads(text)
    assert (data["version"], PLAN.version) == (7, 7)
    assert data["means"][0]["means"] == [*EDITS[0].means]
    assert PLAN.told() == ["2 parameters with chosen means"]
    assert "w with chosen means along axis 1" in str(EDITS[1])
    older = FoldPlan.from_json(json.dumps({**data, "version": 4}))
    assert older.means == ()


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (MeanEdit("w", AxisSet.over((4, 6), [1]), (0.0,) * 3), "has 4 groups"),
        (MeanEdit("w", AxisSet.over((4, 6), [1]), (0.0,) * 3 + (np.inf,)), "not all finite"),
        (MeanEdit("w", AxisSet.over((4, 6), [1]), (0.0,) * 3 + (float("nan"),)), "not all finite"),
        (MeanEdit("w", AxisSet.over((4, 6), [1]), (0, 0, 0, 1)), "not all finite floats"),  # type: ignore[arg-type]
        (MeanEdit("w", AxisSet.over((4, 5), [1]), (0.0,) * 4), "no leaf 'w' of shape"),
        (MeanEdit("v", AxisSet.over((4, 6), [1]), (0.0,) * 4), "different leaves"),
        (
            MeanEdit("w", AxisSet((4, 6), (FREE, Labels((0, 0, 0, 1, 1, 1)))), (0.0,) * 8),
            "only whole axes",
        ),
    ],
)
def test_edits_that_fit_no_leaf(edit: MeanEdit, why: str) -> None:
    with pytest.raises(PlanFormatError, match=why):
        FoldPlan((LeafSpec("w", (4, 6)),), (), means=(edit,))


def test_a_leaf_has_one_kind() -> None:
    centered = tuple(CenterEdit("w", AxisSet.over((4, 6), [axis])) for axis in (0, 1))
    for edits, means, why in (
        (centered[:1], EDITS[1:], "gets means, and is centered"),
        (centered[1:], EDITS[1:], "gets means, and is centered"),
        ((), (EDITS[1], edit_of("w", (4, 6), [0])), "not different leaves"),
    ):
        with pytest.raises(PlanFormatError, match=why):
            FoldPlan(PLAN.leaves, edits, means=means)
    assert len(FoldPlan(PLAN.leaves, centered, means=EDITS[:1]).leaf_edits()) == 2


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("means", [0.5] * 3),
        ("means", [True] * 4),
        ("means", "0000"),
        ("means", [1e999] * 4),
        ("along", {"shape": [4, 6], "entries": ["free", [0, 0, 0, 1, 1, 1]]}),
        ("along", {"shape": [4, 6], "entries": ["free"]}),
    ],
)
def test_broken_files(key: str, value: Any) -> None:
    data = json.loads(PLAN.to_json())
    data["means"][1][key] = value
    with pytest.raises(PlanFormatError, match="broken plan"):
        FoldPlan.from_json(json.dumps(data))


def test_leaves_of_other_sizes() -> None:
    """There is no mean for a row that the plan does not know; boxes do not matter."""
    with pytest.raises(TreeError, match=r"'w' has shape \(3, 6\), and the plan has a mean for"):
        PLAN.center({"b": np.ones(6), "w": np.ones((3, 6))})
    found = PLAN.center({"b": {"value": np.ones(6)}, "w": {"value": np.ones((4, 6))}})
    np.testing.assert_allclose(found["w"]["value"].mean(1), EDITS[1].means, atol=1e-15)


def test_checkpoints(tmp_path: Path) -> None:
    """Bit by bit what `FoldPlan.center` gives; a second time nothing changes."""
    tree = {"b": RNG.normal(size=6).astype(np.float32), "w": RNG.normal(size=(4, 6))}
    paths = [tmp_path / f"{i}.safetensors" for i in range(3)]
    save_file(tree, paths[0])
    for source, dest in pairwise(paths):
        assert center_checkpoint(FoldPlan.from_json(PLAN.to_json()), source, dest).leaves == 2
    want = PLAN.center(tree)
    for path in paths[1:]:
        found = load_file(path)
        assert all(np.array_equal(found[name], want[name]) for name in tree)


# --- in programs ---------------------------------------------------------------------------------

D, HIDDEN = 6, 7


def norm(p: Any, x: jax.Array) -> jax.Array:
    c = x - x.mean(-1, keepdims=True)
    return p["g"] * c / jnp.sqrt(jnp.square(c).mean(-1, keepdims=True) + 1e-3) + p["s"]


def branch(p: Any, x: jax.Array) -> jax.Array:
    return jnp.sin(x @ p["in"]) @ p["out"] + p["bias"]


def post_ln(p: Any, x: jax.Array) -> jax.Array:
    return norm(p, x + branch(p, x))


def pre_ln(p: Any, x: jax.Array) -> jax.Array:
    return norm(p, branch(p, x))


PARAMS = {
    "in": jnp.asarray(RNG.normal(size=(D, HIDDEN))),
    "out": jnp.asarray(RNG.normal(size=(HIDDEN, D))),
    "bias": jnp.asarray(RNG.normal(size=D)),
    "g": jnp.asarray(RNG.normal(size=D)),
    "s": jnp.asarray(RNG.normal(size=D)),
}
X = jnp.asarray(RNG.normal(size=(3, 4, D)))


def centered_plan(fn: Any, params: Any, *inputs: Any, **options: Any) -> FoldPlan:
    """From shapes, so that all means are zero."""
    shapes = jax.eval_shape(lambda tree: tree, (params, *inputs))
    return jax_lnfold.plan_fold(fn, *shapes, **options)


def with_means(plan: FoldPlan, size: float = 1.0) -> FoldPlan:
    """Random means in place of zeros."""
    means = tuple(
        edit_of(edit.key_path, edit.along.shape, edit.along.axes, size) for edit in plan.edits
    )
    return replace(plan, edits=(), means=means)


def test_any_means_are_unnoticed() -> None:
    plan = with_means(centered_plan(post_ln, PARAMS, X, reduce_means=True))
    assert {edit.key_path for edit in plan.means} == {"out", "bias"}
    folded = jax_lnfold.fold(post_ln, PARAMS, X, plan=plan, center=True)
    for x in (X, X[0]):
        check_contracts(post_ln, PARAMS, folded, x)
    assert plan.is_centered(folded.params)
    assert folded.plan == plan


def test_no_norm_rests_on_a_leaf_with_means() -> None:
    """Centered, it folds; with means, as many of them as you like, it must keep its own."""
    plan = centered_plan(pre_ln, PARAMS, X)
    assert jax_lnfold.fold(pre_ln, PARAMS, X, plan=plan, center=True).report.n_folded == 1
    edits = {edit.key_path: edit for edit in with_means(plan).means}
    assert {*edits} == {"out", "bias"}
    for paths in (("out", "bias"), ("out",), ("bias",)):
        centered = tuple(edit for edit in plan.edits if edit.key_path not in paths)
        given = replace(plan, edits=centered, means=tuple(edits[path] for path in paths))
        folded = jax_lnfold.fold(pre_ln, PARAMS, X, plan=given, center=True)
        check_contracts(pre_ln, PARAMS, folded, X)
        assert not [n for n in folded.report.norms if n.folded and not folded.report.n_inserted]


def returned(p: Any, x: jax.Array) -> Any:
    y = branch(p, x)
    return norm(p, x + y), y


def gated(p: Any, x: jax.Array) -> jax.Array:
    return norm(p, x + jnp.sin(x) * branch(p, x))


def read_besides(p: Any, x: jax.Array) -> jax.Array:
    h = x + branch(p, x)
    return norm(p, h) + h @ p["in"][:, :D]


@pytest.mark.parametrize("fn", [returned, gated, read_besides])
def test_other_functions_that_notice(fn: Any) -> None:
    plan = with_means(centered_plan(post_ln, PARAMS, X, reduce_means=True))
    with pytest.raises(PlanMismatchError, match="would be noticed"):
        jax_lnfold.fold(fn, PARAMS, X, plan=plan, center=True)


def test_another_trace_that_notices() -> None:
    def fn(p: Any, x: jax.Array) -> jax.Array:
        return post_ln(p, x) if x.ndim == 3 else gated(p, x)

    plan = with_means(centered_plan(fn, PARAMS, X, reduce_means=True))
    folded = jax_lnfold.fold(fn, PARAMS, X, plan=plan, center=True)
    with pytest.raises(PlanMismatchError, match="would be noticed"):
        folded(X[0])


@pytest.mark.parametrize("size", [1.0, 30.0])
def test_bert(size: float) -> None:
    """All that may be centered gets means; the rounding alone grows, as one-pass variances do."""
    model = BY_NAME["bert"].build()
    plan = centered_plan(model.apply_fn, model.params, *model.inputs, reduce_means=True)
    given = with_means(plan, size)
    assert len(given.means) == len(plan.edits) > 4
    folded = jax_lnfold.fold(model.apply_fn, model.params, *model.inputs, plan=given, center=True)
    for inputs in (model.inputs, model.other_inputs):
        check_contracts(model.apply_fn, model.params, folded, *inputs, rtol=1e-12 * size**2)


# --- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_training_keeps_the_means(dtype: str) -> None:
    """Updates have no mean in groups that have one; afterwards there is nothing to edit."""
    plan = with_means(centered_plan(post_ln, PARAMS, X, reduce_means=True), 0.5)
    params = plan.center(jax.tree.map(lambda x: x.astype(dtype), PARAMS))
    tx = optax.chain(optax.adam(1e-2), center_updates(plan))
    state, x = tx.init(params), X.astype(dtype)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        grads = jax.grad(lambda p: jnp.square(post_ln(p, x) - 1).mean())(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    start = params
    for _ in range(5):
        params, state = step(params, state)
        assert float(state[-1].drift) <= 1
        assert plan.is_centered(params)
    assert plan.center(params)["bias"] is params["bias"]
    for edit in plan.means:
        leaf = np.asarray(params[edit.key_path], np.float64)
        tolerance = {"float64": 1e-15, "float32": 1e-6, "bfloat16": 1e-2}[dtype]
        np.testing.assert_allclose(leaf.mean(-1).ravel(), edit.means, atol=tolerance)
        assert np.any(np.asarray(start[edit.key_path]) != np.asarray(params[edit.key_path]))


def test_training_refuses_other_means() -> None:
    plan = with_means(centered_plan(post_ln, PARAMS, X, reduce_means=True))
    centered = jax_lnfold.fold(post_ln, PARAMS, X, reduce_means=True).params
    with pytest.raises(TreeError, match="is not centered as the plan centers it"):
        center_updates(plan).init(centered)
    center_updates(plan).init(plan.center(centered))


def test_gradients_lose_their_means() -> None:
    """Those of the means that are chosen do not come into it."""
    plan = with_means(centered_plan(post_ln, PARAMS, X, reduce_means=True))
    tx = jax_lnfold.center_gradients(plan)
    updates, _ = tx.update(PARAMS, tx.init(PARAMS))
    np.testing.assert_allclose(updates["out"].mean(-1), 0, atol=1e-15)
    np.testing.assert_allclose(
        updates["out"], PARAMS["out"] - PARAMS["out"].mean(-1, keepdims=True), atol=1e-15
    )
