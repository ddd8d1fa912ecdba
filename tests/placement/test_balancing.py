"""Shifts of any mean: a bias of the branch takes it out, on request, while the mean stays that."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file, save_file

import jax_lnfold
from jax_lnfold import FoldPlan, PlanFormatError, PlanMismatchError
from jax_lnfold.checkpoints.center import center_checkpoint
from jax_lnfold.trees import leaf_paths
from tests.helpers.contracts import (
    check_contracts,
    fold_checked,
    relative_difference,
    unbroken,
)
from tests.models.zoo import BY_NAME
from tests.placement.test_assuming import (
    PARAMS,
    D,
    X,
    draw,
    norm,
    off_by_one_digit,
    post_ln,
    with_leaf,
)

SHIFT = draw(D)
SHIFTED = with_leaf("0/s", SHIFT)
MEAN = float(np.mean(SHIFT))


def branch(p: Any, x: jax.Array) -> jax.Array:
    return jnp.sin(x @ p["in"]) @ p["out"]


def assumed(plan: FoldPlan) -> dict[str, float]:
    """The means that have to stay."""
    return {edit.key_path: edit.mean for edit in plan.assumed if edit.state == "centered"}


def means(plan: FoldPlan) -> dict[str, float]:
    return {edit.key_path: edit.means[0] for edit in plan.means}


def close(got: dict[str, float], want: dict[str, float]) -> bool:
    return got.keys() == want.keys() and np.allclose([*got.values()], [want[k] for k in got], 1e-12)


# --- what folds ----------------------------------------------------------------------------------


def test_a_shift_of_any_mean() -> None:
    folded = fold_checked(post_ln, SHIFTED, X, assume_values=True)
    plan = folded.plan
    assert folded.report.n_folded == 1
    assert close(assumed(plan), {"0/s": MEAN})
    assert close(means(plan), {"1/bias": -MEAN})
    assert {edit.key_path for edit in plan.edits} == {"1/out"}
    assert folded.params[0]["s"] is SHIFTED[0]["s"]
    check_contracts(post_ln, SHIFTED, folded, X[:2, :3])  # another trace rests on the plan alone
    assert plan == jax_lnfold.plan_fold(post_ln, SHIFTED, X, assume_values=True)
    line = "Exact as long as these stay so: 0/g constant along axis 0; 0/s of the same mean."
    assert line in unbroken(folded.report)


def test_all_but_the_mean_may_be_anything() -> None:
    plan = jax_lnfold.plan_fold(post_ln, SHIFTED, X, assume_values=True)
    params = [{name: draw(*x.shape) for name, x in p.items()} for p in PARAMS]
    params = with_leaf("0/g", jnp.full(D, -3.5), params)
    shift = draw(D)
    params = with_leaf("0/s", shift - shift.mean() + MEAN, params)
    folded = fold_checked(post_ln, params, X, plan=plan, center=True)
    assert folded.report.n_folded == 1


@pytest.mark.parametrize(
    ("name", "exact"), [("bert", 5), pytest.param("bart", 12, marks=pytest.mark.slow)]
)
def test_post_ln_models(name: str, exact: int) -> None:
    """Scales of ones and shifts as they may be: all that folds with shifts of zero."""
    model, rng = BY_NAME[name].build(), np.random.default_rng(1)

    def changed(path: Any, x: jax.Array) -> jax.Array:
        leaf = jax.tree_util.keystr(path, simple=True, separator="/")
        if "norm" not in leaf:
            return x
        scale = leaf.endswith("scale")
        return jnp.ones_like(x) if scale else jnp.asarray(rng.normal(0.2, 0.3, x.shape), x.dtype)

    params = jax.tree_util.tree_map_with_path(changed, model.params)
    folded = fold_checked(model.apply_fn, params, *model.inputs, assume_values=True)
    assert folded.report.n_folded == len(folded.report.norms) == exact
    assert len(folded.plan.means) == sum(mean != 0 for mean in assumed(folded.plan).values()) > 3
    check_contracts(model.apply_fn, params, folded, *model.other_inputs)


def first(p: Any, x: jax.Array) -> jax.Array:
    return norm(p[0] | {"s": 0.0}, x)


SUMS: dict[str, tuple[Callable[..., jax.Array], float]] = {
    "taken from": (lambda p, x, y, s, c: (x - s) + (y + c), MEAN),
    "a bias taken from": (lambda p, x, y, s, c: (x + s) - (y + c), MEAN),
    "negated": (lambda p, x, y, s, c: -(y - (x - -s)) + c, -MEAN),
    "twice": (lambda p, x, y, s, c: (x + s) + s + y + c, -2 * MEAN),
    "half of it": (lambda p, x, y, s, c: x + s + (y + c) + c, -MEAN / 2),
    "moved": (
        lambda p, x, y, s, c: (
            ((x + s).T.reshape(D, -1).T.reshape(x.shape[1], x.shape[0], D).swapaxes(0, 1))
            + y
            + jnp.broadcast_to(c, (4, D)).reshape(4, 2, -1).reshape(1, 4, D)
        ),
        -MEAN,
    ),
    "another shift, too": (
        lambda p, x, y, s, c: x + s + y + c + p[1]["s"] * 1.0,  # of mean zero: it is centered
        -MEAN,
    ),
}


@pytest.mark.parametrize("name", SUMS)
def test_signs(name: str) -> None:
    """Whatever way they are added: the number is what makes the sum zero."""
    fn, want = SUMS[name]

    def model(p: Any, x: jax.Array) -> jax.Array:
        z = first(p, x)
        y = branch(p[1], z + p[0]["s"])
        return jnp.tanh(norm(p[1] | {"s": 1.0}, fn(p, z, y, p[0]["s"], p[1]["bias"])))

    folded = fold_checked(model, SHIFTED, X, assume_values=True)
    assert folded.report.n_folded == 1
    assert close(means(folded.plan), {"1/bias": want})


def test_several_shifts_are_one_number() -> None:
    def model(p: Any, x: jax.Array) -> jax.Array:
        x, z = norm(p[0], x), norm(p[2], x)
        return norm(p[1], x - z + branch(p[1], x * z) + p[1]["bias"])

    params = [*SHIFTED, {"g": jnp.full(D, 0.5), "s": draw(D)}]
    folded = fold_checked(model, params, X, assume_values=True)
    other = float(np.mean(params[2]["s"]))
    assert folded.report.n_folded == 1
    assert close(assumed(folded.plan), {"0/s": MEAN, "2/s": other})
    assert close(means(folded.plan), {"1/bias": other - MEAN})


def test_a_shift_may_be_read_elsewhere() -> None:
    """It is not edited."""

    def model(p: Any, x: jax.Array) -> Any:
        return post_ln(p, x), jnp.tanh(p[0]["s"]), norm(p[0], x)

    folded = fold_checked(model, SHIFTED, X, assume_values=True)
    assert close(means(folded.plan), {"1/bias": -MEAN})


# --- near misses ---------------------------------------------------------------------------------


def without_bias(p: Any, x: jax.Array) -> jax.Array:
    return post_ln([p[0], p[1] | {"bias": 0.0}], x)


def read_directly(p: Any, x: jax.Array) -> Any:
    """A LayerNorm that reads the shift with no bias besides."""
    x = norm(p[0], x)
    return norm(p[1], x), jnp.tanh(x)


def noticed_bias(p: Any, x: jax.Array) -> Any:
    return post_ln(p, x), jnp.tanh(p[1]["bias"])


def scaled_bias(p: Any, x: jax.Array) -> jax.Array:
    x = norm(p[0], x)
    return norm(p[1], x + 0.5 * (branch(p[1], x) + p[1]["bias"]))


def masked_bias(p: Any, x: jax.Array) -> jax.Array:
    x = norm(p[0], x)
    kept = jnp.abs(x[..., :1]) < 0.5
    return norm(p[1], x + jnp.where(kept, branch(p[1], x) + p[1]["bias"], 0.0))


def scaled_stream(p: Any, x: jax.Array) -> jax.Array:
    x = norm(p[0], x)
    return norm(p[1], 2.0 * x + branch(p[1], x) + p[1]["bias"])


def tied(p: Any, x: jax.Array) -> jax.Array:
    """The shift is the bias, which f notices."""
    x = norm(p[0], x)
    return norm(p[1], x + branch(p[1], x) + p[0]["s"])


def split(p: Any, x: jax.Array) -> jax.Array:
    """Parts of a shift, which have other means."""
    x = norm(p[0], x)[..., :4]
    return jax.nn.standardize(x + branch(p[1], x @ p[1]["out"][:4, :])[..., :4] + p[1]["bias"][:4])


def gated(p: Any, x: jax.Array) -> jax.Array:
    """Added for some tokens only, as a product."""
    x = norm(p[0] | {"s": p[0]["s"] * jnp.abs(x[..., :1])}, x)
    return norm(p[1], x + branch(p[1], x) + p[1]["bias"])


ONE_DIGIT = with_leaf("0/g", off_by_one_digit(PARAMS[0]["g"]), SHIFTED)
NEAR: dict[str, tuple[Callable[..., Any], Any, dict[str, Any]]] = {
    "one digit of the scale": (post_ln, ONE_DIGIT, {}),
    "NaN in the shift": (post_ln, with_leaf("0/s", SHIFT.at[2].set(jnp.nan)), {}),
    "no values": (post_ln, with_leaf("0/s", jax.ShapeDtypeStruct((D,), jnp.float64)), {}),
    "a large shift": (post_ln, with_leaf("0/s", jnp.full(D, 1e308).at[0].set(1.0)), {}),
    "bias excluded": (post_ln, SHIFTED, {"exclude": {"1/bias"}}),
    "shift excluded": (post_ln, SHIFTED, {"exclude": {"0/s"}}),
    "no bias": (without_bias, SHIFTED, {}),
    "read directly": (read_directly, SHIFTED, {}),
    "bias noticed": (noticed_bias, SHIFTED, {}),
    "bias scaled": (scaled_bias, SHIFTED, {}),
    "bias masked": (masked_bias, SHIFTED, {}),
    "stream scaled": (scaled_stream, SHIFTED, {}),
    "tied": (tied, SHIFTED, {}),
    "split": (split, SHIFTED, {}),
    "gated": (gated, SHIFTED, {}),
}


@pytest.mark.parametrize("name", NEAR)
def test_near_misses_are_left(name: str) -> None:
    fn, params, options = NEAR[name]
    report = jax_lnfold.analyze(fn, params, X, assume_values=True, **options)
    assert (report.n_folded, report.plan.assumed, report.plan.means) == (0, (), ())


@pytest.mark.parametrize("same", [True, False])
def test_one_bias_for_two_shifts(same: bool) -> None:
    """It takes out one number: that of both shifts, or else only one of the LayerNorms folds."""

    def shared(p: Any, x: jax.Array) -> jax.Array:
        for q in (p[0], p[1]):
            x = norm(q, x)
            x = jnp.tanh(jax.nn.standardize(x + branch(p[1], x) + p[1]["bias"]))
        return x

    params = with_leaf("1/s", SHIFT[::-1] if same else draw(D), SHIFTED)
    folded = fold_checked(shared, params, X, assume_values=True)
    assert folded.report.n_folded == 1 + same
    assert close(means(folded.plan), {"1/bias": -MEAN})


def test_one_of_two_readers_has_no_bias() -> None:
    """Nothing is gained if another LayerNorm would be wrong."""

    def model(p: Any, x: jax.Array) -> Any:
        x = norm(p[0], x)
        return norm(p[1], x + branch(p[1], x) + p[1]["bias"]), jax.nn.standardize(x)

    folded = fold_checked(model, SHIFTED, X, assume_values=True)
    assert folded.report.n_folded == 0
    assert fold_checked(model, PARAMS, X, assume_values=True).report.n_folded == 2


def test_rows_of_stacked_shifts_are_left() -> None:
    def scanned(params: Any, x: jax.Array) -> jax.Array:
        def step(x: jax.Array, p: Any) -> tuple[jax.Array, None]:
            return norm(p, x + branch(p, x) + p["bias"]), None

        return jax.lax.scan(step, norm(params[0], x), params[1])[0]

    rest = jax.tree.map(lambda x: jnp.stack([x, x, x]), SHIFTED[0])
    folded = fold_checked(scanned, [SHIFTED[0], rest], X, assume_values=True)
    assert folded.report.n_folded == 0


# --- random programs -----------------------------------------------------------------------------

LEAVES = 3


def random_post_ln(rng: np.random.Generator) -> tuple[Callable[..., Any], Any]:
    """Sums of streams, branches, biases and shifts in any order, some the same leaf twice."""
    params = {
        kind: [draw(D) if kind != "g" else jnp.full(D, 1.25) for _ in range(LEAVES)]
        for kind in ("bias", "s", "g")
    }
    params["out"] = [draw(D, D) for _ in range(8)]
    if rng.integers(2):
        params["s"][1] = params["s"][0][::-1]  # another leaf of the same mean

    def leaf() -> int:
        return int(rng.integers(LEAVES))

    def term() -> Callable[..., jax.Array]:
        kind, i, j = rng.integers(7), int(rng.integers(8)), leaf()
        bias = lambda p: p["bias"][j]  # noqa: E731
        masked = lambda p, x, y: jnp.where(x[..., :1] > 0, y, 0.0)  # noqa: E731
        return [
            lambda p, x: jnp.sin(x) @ p["out"][i] + bias(p),
            lambda p, x: jnp.sin(x) @ p["out"][i] + bias(p),
            lambda p, x: jnp.cos(x) @ p["out"][i] - bias(p).reshape(2, -1).reshape(1, D),
            lambda p, x: jnp.sin(x) @ p["out"][i],
            lambda p, x: masked(p, x, jnp.sin(x) @ p["out"][i] + bias(p)),
            lambda p, x: 0.5 * (jnp.sin(x) @ p["out"][i] + bias(p)),
            lambda p, x: jnp.sin(x) @ p["out"][i] + p["s"][j],
        ][kind]

    blocks = [
        (leaf(), leaf(), [(rng.choice([-1, 1]), term()) for _ in range(rng.integers(1, 3))])
        for _ in range(3)
    ]
    noticed = [kind for kind in ("bias", "s") if rng.integers(4) == 0]

    def fn(p: Any, x: jax.Array) -> Any:
        for g, s, terms in blocks:
            x = norm({"g": p["g"][g], "s": p["s"][s]}, x)
            for sign, each in terms:
                x = x + each(p, x) if sign > 0 else x - each(p, x)
        return jax.nn.standardize(x), [jnp.tanh(p[kind][0]) for kind in noticed]

    return fn, params


@pytest.mark.parametrize("count", [4, pytest.param(1000, marks=pytest.mark.slow)])
def test_random_programs(count: int) -> None:
    """What folds is exact, in float64, and again for other numbers that the plan allows."""
    balanced = 0
    for seed in range(count):
        rng = np.random.default_rng(seed)
        fn, params = random_post_ln(rng)
        folded = fold_checked(fn, params, X, assume_values=True)
        plan, left = folded.plan, jax_lnfold.analyze(fn, params, X)
        assert folded.report.n_folded >= left.n_folded
        balanced += any(mean for mean in assumed(plan).values())
        others = {path: draw(*x.shape) for path, x in leaf_paths(params)}
        for edit in plan.assumed:
            new = others[path := edit.key_path]
            constant = edit.state == "constant"
            others[path] = jnp.full(D, new[0]) if constant else new - new.mean() + edit.mean
        other = jax.tree.unflatten(jax.tree.structure(params), others.values())
        again = fold_checked(fn, other, X, plan=plan, center=True)
        assert again.report.n_folded == folded.report.n_folded
    assert balanced > count / 5, "the programs should have something to find"


# --- plans ---------------------------------------------------------------------------------------

PLAN = jax_lnfold.plan_fold(post_ln, SHIFTED, X, assume_values=True)


def test_plan_files() -> None:
    assert PLAN.version == 10
    text = PLAN.to_json()
    assert FoldPlan.from_json(text) == PLAN
    old = jax_lnfold.plan_fold(post_ln, PARAMS, X, assume_values=True)
    assert old.version == 9
    assert "mean" not in json.loads(old.to_json())["assumed"][0]
    data = json.loads(text)
    for broken in (
        {"state": "constant"},
        {"mean": float("nan")},
        {"mean": "0.5"},
        {"along": {"shape": [D], "entries": ["free"]}},
    ):
        (shift,) = (edit for edit in data["assumed"] if edit["mean"])
        other = [edit for edit in data["assumed"] if edit is not shift]
        each = {**data, "assumed": [*other, {**shift, **broken}]}
        with pytest.raises(PlanFormatError):
            FoldPlan.from_json(json.dumps(each))


def test_trees_that_are_otherwise_are_refused() -> None:
    why = r"^params: leaf '0/s' must be of mean -?0\.\d+, on which the plan rests, and is not"
    for shift in (SHIFT + 1e-9, SHIFT.at[0].add(1e-9), jnp.zeros(D), SHIFT - MEAN):
        with pytest.raises(PlanMismatchError, match=why):
            PLAN.center(with_leaf("0/s", shift))
    edited = PLAN.center(SHIFTED)
    assert PLAN.is_centered(edited)
    assert PLAN.not_centered(with_leaf("0/s", SHIFT + 1e-9, edited)) == "0/s"
    bias = edited[1]["bias"]
    np.testing.assert_allclose(bias.mean(), -MEAN, rtol=1e-12)
    for other in (bias + 1e-9, bias - bias.mean(), SHIFTED[1]["bias"]):
        assert PLAN.not_centered(with_leaf("1/bias", other, edited)) == "1/bias"


def test_a_plan_whose_means_do_not_cancel_folds_nothing() -> None:
    """Who writes other numbers into a plan gets what is right for them."""
    (edit,) = PLAN.means
    for mean in (-MEAN * (1 + 1e-12), MEAN, 0.0):
        wrong = replace(PLAN, means=(replace(edit, means=(mean,)),))
        folded = fold_checked(post_ln, SHIFTED, X, plan=wrong, center=True)
        assert folded.report.n_folded == 0
    without = replace(PLAN, means=(), edits=PLAN.edits)
    assert fold_checked(post_ln, SHIFTED, X, plan=without, center=True).report.n_folded == 0


@pytest.mark.parametrize("fn", [without_bias, read_directly, scaled_bias, scaled_stream])
def test_other_functions_that_follow_the_plan(fn: Any) -> None:
    """What cancels in one function need not in another."""
    folded = fold_checked(fn, SHIFTED, X, plan=PLAN, center=True)
    assert folded.report.n_folded == 0


def test_functions_that_are_folded_together() -> None:
    """One of them reads the shift without the bias: it keeps its mean, and so do all."""

    def other(p: Any, x: jax.Array) -> jax.Array:
        return norm(p[0], x)

    functions, inputs = {"all": post_ln, "first": other}, {"all": (X,), "first": (X,)}
    folded = jax_lnfold.fold(functions, SHIFTED, inputs, assume_values=True)
    assert close(means(folded.plan), {"1/bias": -MEAN})
    for name, fn in functions.items():
        check_contracts(fn, SHIFTED, folded[name], X)
    assert folded["all"].report.n_folded == 1


def test_with_reduced_means() -> None:
    """Both put means into biases: one for what folds, one for what does not."""

    def model(p: Any, x: jax.Array) -> jax.Array:
        x = post_ln(p[:2], x)
        return norm(p[0], x + branch(p[2], x) + p[2]["bias"])

    params = [*with_leaf("1/g", draw(D), SHIFTED), PARAMS[0] | {"bias": draw(D)}]
    params = with_leaf("1/s", draw(D), params)
    folded = fold_checked(model, params, X, assume_values=True, reduce_means=True)
    assert folded.report.n_folded == 1
    want = {"1/bias": -MEAN, "2/bias": -float(np.mean(params[1]["s"]))}
    assert close(means(folded.plan), want)


def test_scales_that_are_taken_up() -> None:
    """Then the shift becomes zero, and is not assumed besides."""

    def pre_ln(p: Any, x: jax.Array) -> Any:
        return post_ln(p, x), norm(p[0], x) @ p[1]["in"]

    folded = fold_checked(pre_ln, SHIFTED, X, assume_values=True, fold_affine=True)
    assert folded.report.n_folded == 1


def test_checkpoints_are_looked_at(tmp_path: Path) -> None:
    for name, params in (("good", SHIFTED), ("bad", with_leaf("0/s", SHIFT + 1e-9))):
        flat = {f"{i}/{k}": np.asarray(x) for i, p in enumerate(params) for k, x in p.items()}
        save_file(flat, tmp_path / f"{name}.safetensors")
    center_checkpoint(PLAN, tmp_path / "good.safetensors", tmp_path / "made.safetensors")
    made = load_file(tmp_path / "made.safetensors")
    np.testing.assert_allclose(made["1/bias"].mean(), -MEAN, rtol=1e-12)
    with pytest.raises(PlanMismatchError, match=r"^source: leaf '0/s' must be of mean"):
        center_checkpoint(PLAN, tmp_path / "bad.safetensors", tmp_path / "none.safetensors")


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_training_keeps_the_mean(dtype: str) -> None:
    params, x = jax.tree.map(lambda a: a.astype(dtype), (SHIFTED, X))
    folded = jax_lnfold.fold(post_ln, params, x, assume_values=True)
    tx = optax.chain(
        jax_lnfold.center_gradients(folded.plan),
        optax.adam(0.03),
        jax_lnfold.center_updates(folded.plan),
    )

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        slope = jax.grad(lambda p: jnp.square(folded.apply(p, x) - 1).sum())(params)
        updates, state = tx.update(slope, state, params)
        return optax.apply_updates(params, updates), state

    trained: Any = folded.params
    state: Any = tx.init(trained)
    for _ in range(5):
        trained, state = step(trained, state)
    assert jnp.abs(trained[0]["s"] - params[0]["s"]).max() > 1e-2
    assert folded.plan.is_centered(trained)
    assert float(state[-1].drift) <= 1
    got, want = folded.apply(trained, x), post_ln(trained, x)
    assert relative_difference(got, want) < (1e-12 if dtype == "float64" else 1e-5)
