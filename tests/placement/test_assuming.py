"""LayerNorms that fold as leaves are constant or zero: on request, and only as long as they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file, save_file

import jax_lnfold
from jax_lnfold import FoldError, FoldPlan, PlanFormatError, PlanMismatchError
from jax_lnfold.checkpoints.center import center_checkpoint
from jax_lnfold.placement.assuming import values_of
from tests.helpers.contracts import (
    check_contracts,
    fold_checked,
    relative_difference,
    unbroken,
)
from tests.models.zoo import BY_NAME

RNG = np.random.default_rng(0)
D, HIDDEN = 6, 7


def draw(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.standard_normal(shape) / 2 + 0.1)


def norm(p: Any, x: jax.Array) -> jax.Array:
    c = x - x.mean(-1, keepdims=True)
    return p["g"] * c / jnp.sqrt(jnp.square(c).mean(-1, keepdims=True) + 1e-3) + p["s"]


def block() -> dict[str, Any]:
    weights = {"in": draw(D, HIDDEN), "out": draw(HIDDEN, D), "bias": draw(D)}
    return {**weights, "g": jnp.full(D, 1.25), "s": jnp.zeros(D)}


def post_ln(params: Any, x: jax.Array) -> jax.Array:
    for p in params:
        x = norm(p, x + jnp.sin(x @ p["in"]) @ p["out"] + p["bias"])
    return x


PARAMS, X = [block(), block()], draw(3, 4, D)
EXACT = {"0/g": "constant", "0/s": "centered"}


def assumed(plan: FoldPlan) -> dict[str, str]:
    return {edit.key_path: edit.state for edit in plan.assumed}


def with_leaf(path: str, x: Any, params: Any = PARAMS) -> Any:
    """The parameters with another leaf, ``0/g``."""
    changed = [dict(p) for p in params]
    number, name = path.split("/")
    changed[int(number)][name] = x
    return changed


# --- what folds ----------------------------------------------------------------------------------


def test_post_ln_folds_if_scales_are_constant_and_shifts_zero() -> None:
    """The second norm: the first one's input is one of the function. Nothing else is assumed."""
    assert fold_checked(post_ln, PARAMS, X).report.n_folded == 0
    folded = fold_checked(post_ln, PARAMS, X, assume_values=True)
    assert folded.report.n_folded == 1
    assert assumed(folded.plan) == EXACT
    assert {edit.key_path for edit in folded.plan.edits} == {"1/out", "1/bias"}
    for path in EXACT:
        number, name = path.split("/")
        assert folded.params[int(number)][name] is PARAMS[int(number)][name]
    other = X[:2, :3]  # another trace rests on the plan alone
    check_contracts(post_ln, PARAMS, folded, other)
    assert folded.plan == jax_lnfold.plan_fold(post_ln, PARAMS, X, assume_values=True)


def test_all_else_may_be_anything() -> None:
    plan = jax_lnfold.plan_fold(post_ln, PARAMS, X, assume_values=True)
    params = [
        {name: draw(*x.shape) if f"{i}/{name}" not in EXACT else x for name, x in p.items()}
        for i, p in enumerate(PARAMS)
    ]
    params = with_leaf("0/g", jnp.full(D, -3.5), params)
    shift = draw(D)
    params = with_leaf("0/s", shift - shift.mean(), params)
    folded = fold_checked(post_ln, params, X, plan=plan, center=True)
    assert folded.report.n_folded == 1


@pytest.mark.parametrize(("name", "plain", "exact"), [("bert", 1, 5), ("bart", 2, 12)])
def test_post_ln_models_as_they_are_initialised(name: str, plain: int, exact: int) -> None:
    """With a scale that varies, or a shift that has a mean, each rests on its own leaves."""
    model = BY_NAME[name].build()
    params = jax.tree_util.tree_map_with_path(_initial, model.params)
    assert jax_lnfold.analyze(model.apply_fn, params, *model.inputs).n_folded == plain
    folded = fold_checked(model.apply_fn, params, *model.inputs, assume_values=True)
    assert folded.report.n_folded == len(folded.report.norms) == exact
    norms = {edit.key_path.rpartition("/")[0] for edit in folded.plan.assumed}
    assert len(norms) == exact - plain
    left = jax_lnfold.analyze(model.apply_fn, model.params, *model.inputs, assume_values=True)
    assert (left.n_folded, left.plan.assumed) == (plain, ())


def _initial(path: Any, x: jax.Array) -> jax.Array:
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if "norm" in name:
        return jnp.ones_like(x) if name.endswith("scale") else jnp.zeros_like(x)
    return x


HEADS = 3


def in_heads(params: Any, x: jax.Array) -> jax.Array:
    """Two norms within heads of two: the first one's scale has an entry for every element."""
    w, g, v = params["w"], params["g"], params["v"]
    y = jax.nn.standardize(jnp.sin(x @ w).reshape(*x.shape[:-1], HEADS, D // HEADS)) * g
    return jnp.tanh(jax.nn.standardize(y + (y.reshape(x.shape) @ v).reshape(y.shape)))


def test_a_scale_for_each_head_is_constant_within_heads() -> None:
    along_heads, within = jnp.ones((1, D // HEADS)), draw(HEADS, 1)
    for g, folds in ((within, True), (along_heads * draw(1, D // HEADS), False)):
        params = {"w": draw(D, D), "v": draw(D, D), "g": jnp.broadcast_to(g, (HEADS, D // HEADS))}
        folded = fold_checked(in_heads, params, X, assume_values=True)
        assert [str(edit) for edit in folded.plan.assumed] == ["g constant along axis 1"] * folds
        assert folded.report.n_folded == folds


def test_rows_of_stacked_scales() -> None:
    """Constant in every layer, another number in each; or the other way round."""

    def scanned(params: Any, x: jax.Array) -> jax.Array:
        def step(x: jax.Array, p: Any) -> tuple[jax.Array, None]:
            return norm(p, x + jnp.sin(x @ p["in"]) @ p["out"] + p["bias"]), None

        return jax.lax.scan(step, norm(params["first"], x), params["rest"])[0]

    rest = jax.tree.map(lambda *rows: jnp.stack(rows), block(), block(), block())
    scales = draw(3, 1) + jnp.zeros((3, D))
    params = {"first": block(), "rest": {**rest, "g": scales}}
    folded = fold_checked(scanned, params, X, assume_values=True)
    assert folded.report.n_folded == 1
    told = [str(edit) for edit in folded.plan.assumed]
    assert "rest/g constant along axis 1" in told
    params["rest"]["g"] = jnp.zeros((3, 1)) + draw(D)
    assert jax_lnfold.analyze(scanned, params, X, assume_values=True).n_folded == 0


# --- near misses ---------------------------------------------------------------------------------


def off_by_one_digit(x: jax.Array) -> jax.Array:
    return x.at[3].set(np.nextafter(float(x[3]), 9.0))


NEAR_MISSES = {
    "one digit": ("0/g", off_by_one_digit(PARAMS[0]["g"])),
    "NaN": ("0/g", jnp.full(D, jnp.nan)),
    "infinite": ("0/g", jnp.full(D, jnp.inf)),
    "integers": ("0/g", jnp.full(D, 2)),
    "no values": ("0/g", jax.ShapeDtypeStruct((D,), jnp.float64)),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_misses_are_left(name: str) -> None:
    report = jax_lnfold.analyze(post_ln, with_leaf(*NEAR_MISSES[name]), X, assume_values=True)
    assert (report.n_folded, report.plan.assumed) == (0, ())
    assert ("Nothing is assumed of 1 parameter, whose values" in unbroken(report)) == (
        name[:2] == "no"
    )


def test_a_scale_is_no_constant_leaf_if_data_are_added_to_it() -> None:
    def summed(params: Any, x: jax.Array) -> jax.Array:
        moved = {**params[0], "g": params[0]["g"] + x[0, 0]}
        return post_ln([moved, params[1]], x)

    assert fold_checked(summed, PARAMS, X, assume_values=True).report.n_folded == 0


def test_leaves_with_several_roles() -> None:
    """A bias that is a scale, too: it is not centered, as it would not be constant any more."""

    def tied(params: Any, x: jax.Array) -> jax.Array:
        first, second = params
        return post_ln([{**first, "g": second["bias"]}, second], x)

    folded = fold_checked(tied, with_leaf("1/bias", jnp.full(D, 0.75)), X, assume_values=True)
    assert folded.report.n_inserted == folded.report.n_folded == 1
    assert assumed(folded.plan) == {"0/s": "centered", "1/bias": "constant"}
    folded = fold_checked(tied, with_leaf("1/bias", jnp.zeros(D)), X, assume_values=True)
    assert (folded.report.n_inserted, folded.report.n_folded) == (0, 1)
    assert assumed(folded.plan) == {"0/s": "centered", "1/bias": "centered"}
    assert folded.plan.assumed[-1].along.trivial, "only zero is constant and has no mean"


def test_nothing_is_assumed_of_what_is_excluded() -> None:
    folded = fold_checked(post_ln, PARAMS, X, assume_values=True, exclude={"0/g"})
    assert (folded.report.n_folded, folded.plan.assumed) == (0, ())
    assert folded.report.unrestricted == (1, 0)


# --- plans ---------------------------------------------------------------------------------------

PLAN = jax_lnfold.plan_fold(post_ln, PARAMS, X, assume_values=True)
ROUNDED = with_leaf("0/g", NEAR_MISSES["one digit"][1])


@pytest.mark.parametrize(
    "use",
    [
        PLAN.center,
        lambda p: jax_lnfold.fold(post_ln, p, X, plan=PLAN),
        lambda p: jax_lnfold.fold(post_ln, p, X, plan=PLAN, center=True),
    ],
)
def test_trees_that_are_otherwise_are_refused(use: Callable[[Any], Any]) -> None:
    why = "^params: leaf '0/g' must be constant along axis 0, on which the plan rests, and is not"
    with pytest.raises(PlanMismatchError, match=why):
        use(ROUNDED)
    with pytest.raises(PlanMismatchError, match="leaf '0/s' must be centered along axis 0"):
        use(with_leaf("0/s", draw(D)))
    with pytest.raises(PlanMismatchError, match="nobody can tell while it is traced; do this out"):
        jax.jit(PLAN.center)(PARAMS)


def test_is_centered_looks_at_what_must_stay() -> None:
    centered = PLAN.center(PARAMS)
    assert PLAN.is_centered(centered)
    for change in (lambda x: x, np.asarray):
        rounded = with_leaf("0/g", change(ROUNDED[0]["g"]), centered)
        assert PLAN.not_centered(rounded) == "0/g"


def test_plan_files() -> None:
    assert PLAN.version == 9
    text = PLAN.to_json()
    assert FoldPlan.from_json(text) == PLAN
    broken = [
        text.replace('"constant"', '"fixed"'),
        text.replace('"key_path": "0/s"', '"key_path": "0/g"'),
        text.replace('"key_path": "0/g",\n   "along"', '"key_path": "1/bias",\n   "along"'),
    ]
    for each in broken:
        assert each != text
        with pytest.raises(PlanFormatError):
            FoldPlan.from_json(each)


def test_checkpoints_are_looked_at(tmp_path: Path) -> None:
    for name, params in (("good", PARAMS), ("bad", ROUNDED)):
        flat = {f"{i}/{k}": np.asarray(x) for i, p in enumerate(params) for k, x in p.items()}
        save_file(flat, tmp_path / f"{name}.safetensors")
    done = center_checkpoint(PLAN, tmp_path / "good.safetensors", tmp_path / "made.safetensors")
    assert done.leaves == 2, "what must stay is not edited"
    made = load_file(tmp_path / "made.safetensors")
    for path, x in jax.tree_util.tree_leaves_with_path(
        PLAN.center(jax.tree.map(np.asarray, PARAMS))
    ):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        np.testing.assert_array_equal(made[name], x)
    with pytest.raises(PlanMismatchError, match=r"^source: leaf '0/g' must be constant"):
        center_checkpoint(PLAN, tmp_path / "bad.safetensors", tmp_path / "none.safetensors")
    assert not (tmp_path / "none.safetensors").exists()


# --- with other things ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_training_keeps_leaves_as_they_must_be(dtype: str) -> None:
    """Scales move, and stay constant to the last bit; both programs stay one function."""
    params, x = jax.tree.map(lambda a: a.astype(dtype), (PARAMS, X))
    folded = jax_lnfold.fold(post_ln, params, x, assume_values=True)
    tx = optax.chain(
        jax_lnfold.center_gradients(folded.plan),
        optax.adam(0.03),
        jax_lnfold.center_updates(folded.plan),
    )

    def loss(params: Any) -> jax.Array:
        return jnp.square(folded.apply(params, x) - 1).sum()

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    trained: Any = folded.params
    state: Any = tx.init(trained)
    for _ in range(5):
        trained, state = step(trained, state)
    g, s = trained[0]["g"], trained[0]["s"]
    assert float(g[0]) != 1.25
    assert (g == g[0]).all()
    assert jnp.abs(s).max() > 1e-3
    assert folded.plan.is_centered(trained)
    assert float(state[-1].drift) <= 1
    if dtype == "float64":
        want = post_ln(trained, X)
        assert relative_difference(folded.apply(trained, X), want) < 1e-12
        original, own = (
            jax.grad(f)(trained)
            for f in (lambda p: post_ln(p, X).sum(), lambda p: folded.apply(p, X).sum())
        )
        projected = [
            jax_lnfold.center_gradients(folded.plan).update(g, optax.EmptyState())[0]
            for g in (original, own)
        ]
        assert relative_difference(*projected) < 1e-11
    with pytest.raises(jax_lnfold.TreeError, match="leaf '0/g' is not"):
        tx.update(
            params,
            tx.init(folded.params),
            with_leaf("0/g", trained[0]["g"].at[0].mul(1.5), trained),
        )


def test_functions_that_are_folded_together() -> None:
    def first(params: Any, x: jax.Array) -> jax.Array:
        return norm(params[0], x)

    functions, inputs = {"all": post_ln, "first": first}, {"all": (X,), "first": (X,)}
    folded = jax_lnfold.fold(functions, PARAMS, inputs, assume_values=True)
    assert assumed(folded.plan) == EXACT
    for name, fn in functions.items():
        check_contracts(fn, PARAMS, folded[name], X)
    assert folded["all"].report.n_folded == 1


def test_scales_that_are_taken_up_are_not_assumed_besides() -> None:
    def pre_ln(params: Any, x: jax.Array) -> Any:
        first, second = params
        y = norm(first, x) @ second["in"]
        return post_ln(params, x), y

    folded = fold_checked(pre_ln, PARAMS, X, assume_values=True, fold_affine=True)
    assert folded.report.n_folded == 1


def test_reports_say_what_a_fold_rests_on() -> None:
    report = jax_lnfold.analyze(post_ln, PARAMS, X, assume_values=True)
    line = "Exact as long as these stay so: 0/g constant along axis 0; 0/s centered along axis 0."
    assert line in unbroken(report)
    assert line in report.to_html()
    assert "Exact as long" not in str(jax_lnfold.analyze(post_ln, PARAMS, X))


def test_numbers_of_leaves() -> None:
    leaves = {
        "a": np.full((2, 3), 0.5),
        "b": jnp.zeros((2, 1)),
        "c": draw(2, 3),
        "d": np.ones(3, int),
    }
    leaves |= {
        "e": draw(2, 1) + jnp.zeros((2, 3)),
        "f": jax.ShapeDtypeStruct((2,), "float32"),
        "g": 2.0,
    }
    found = values_of([*leaves.items()])
    assert found["a"] == (frozenset({0, 1}), False, 0.5)
    assert found["b"] == (frozenset({0, 1}), True, 0.0)
    assert found["c"] == (frozenset(), False, pytest.approx(float(leaves["c"].mean()), 1e-14))
    assert found["e"][:2] == (frozenset({1}), False)
    assert found["f"] is None
    assert found.keys() == {"a", "b", "c", "e", "f", "g"}


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"assume_values": 1}, "assume_values: 1 is not a bool"),
        ({"assume_values": True, "untie": True}, "assume_values: not together with untie"),
        ({"assume_values": True, "plan": PLAN}, "assume_values: a plan is followed as it is"),
        (
            {"assume_values": True, "approximate": {"mean"}, "calibrate": [X, X]},
            "assume_values: not together with approximate",
        ),
    ],
)
def test_bad_input(options: dict[str, Any], why: str) -> None:
    with pytest.raises(FoldError, match=f"^{why}"):
        jax_lnfold.fold(post_ln, PARAMS, X, **options)
