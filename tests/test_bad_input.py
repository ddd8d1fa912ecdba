"""What is not a model, or not its parameters, is refused by name; odd leaves are left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contracts import (
    assert_identical,
    check_contracts,
    fold_checked,
    relative_difference,
    snapshot,
)

import jax_lnfold
from jax_lnfold import FoldError

Array = jax.Array
Params = dict[str, Any]

pytestmark = pytest.mark.usefixtures("explicit_ranks")

B, T, DIN, D, OUT = 2, 5, 9, 12, 7


def layer_norm(x: Array) -> Array:
    c = x - x.mean(-1, keepdims=True)
    return c * jax.lax.rsqrt((c * c).mean(-1, keepdims=True) + 1e-5)


def model(p: Params, x: Array) -> Array:
    return layer_norm(x @ p["w"] + p["b"]) @ p["v"]


def make_params() -> Params:
    rng = np.random.default_rng(0)
    shapes = {"w": (DIN, D), "b": (1, 1, D), "v": (D, OUT)}
    return {name: jnp.asarray(rng.normal(0.4, 1.0, shape)) for name, shape in shapes.items()}


def make_input(*shape: int) -> Array:
    return jnp.asarray(np.random.default_rng(1).normal(size=shape or (B, T, DIN)))


def abstract(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


# --- calls that cannot be answered ---------------------------------------------------------------


def reads_a_value(p: Params, x: Array) -> Array:
    return model(p, x) if x[0, 0, 0] > 0 else model(p, -x)


def converts_to_numpy(p: Params, x: Array) -> Array:
    return model(p, jnp.asarray(np.tanh(np.asarray(x))))


@pytest.mark.parametrize("entry", [jax_lnfold.fold, jax_lnfold.analyze])
@pytest.mark.parametrize("apply_fn", [reads_a_value, converts_to_numpy])
def test_function_that_cannot_be_traced(
    entry: Callable[..., Any], apply_fn: Callable[..., Any]
) -> None:
    with pytest.raises(FoldError, match="traced") as caught:
        entry(apply_fn, make_params(), make_input())
    assert caught.value.__cause__ is not None, "what jax had to say is lost"


@pytest.mark.parametrize("entry", [jax_lnfold.fold, jax_lnfold.analyze])
@pytest.mark.parametrize("apply_fn", [None, "model", {"apply": model}], ids=type)
def test_function_that_is_none(entry: Callable[..., Any], apply_fn: Any) -> None:
    with pytest.raises(FoldError, match="callable"):
        entry(apply_fn, make_params(), make_input())


@pytest.mark.parametrize("inputs", [(), (make_input(), make_input())], ids=["too few", "too many"])
def test_analyze_with_another_number_of_inputs(inputs: tuple[Array, ...]) -> None:
    with pytest.raises(FoldError, match="model"):
        jax_lnfold.analyze(model, make_params(), *inputs)
    assert jax_lnfold.analyze(model, make_params(), make_input()).n_folded == 1


def test_analyze_without_inputs_where_none_are_needed() -> None:
    x = make_input()
    assert jax_lnfold.analyze(lambda p: model(p, x), make_params()).n_folded == 1


def test_inputs_that_do_not_fit() -> None:
    with pytest.raises(FoldError):
        jax_lnfold.fold(model, make_params(), make_input(B, T, DIN + 1))


def test_shapes_are_enough_to_analyze_but_not_to_fold() -> None:
    params, x = make_params(), make_input()
    of_shapes = jax_lnfold.analyze(model, abstract(params), abstract(x))
    of_values = jax_lnfold.analyze(model, params, x)
    assert of_shapes.n_folded == of_values.n_folded == 1
    assert [e.key_path for e in of_shapes.edits] == [e.key_path for e in of_values.edits]
    assert of_shapes.norms == of_values.norms
    for some in (abstract(params), {**params, "w": abstract(params["w"])}):
        with pytest.raises(FoldError, match="w"):
            jax_lnfold.fold(model, some, x)


def test_shapes_of_inputs_are_enough_to_fold() -> None:
    params, x = make_params(), make_input()
    folded = jax_lnfold.fold(model, params, abstract(x))
    assert folded.report.n_folded == 1
    check_contracts(model, params, folded, x)


# --- folding at the first call -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["params", "report", "plan"])
def test_nothing_to_see_before_the_first_call(name: str) -> None:
    params, x = make_params(), make_input()
    before = snapshot(params)
    folded = jax_lnfold.fold(model, params)
    with pytest.raises(FoldError, match="call"):
        getattr(folded, name)
    assert relative_difference(folded(x), model(params, x)) < 1e-12
    assert getattr(folded, name) is not None
    assert folded.report.n_folded == 1
    check_contracts(model, params, folded, x, before=before)


def test_first_call_with_bad_inputs_spoils_nothing() -> None:
    params, x = make_params(), make_input()
    folded = jax_lnfold.fold(model, params)
    with pytest.raises(FoldError):
        folded(make_input(B, T, DIN + 1))
    with pytest.raises(FoldError, match="call"):
        _ = folded.params
    assert relative_difference(folded(x), model(params, x)) < 1e-12
    assert folded.report.n_folded == 1


# --- another tree --------------------------------------------------------------------------------

OTHER_TREES: dict[str, Callable[[Params], Any]] = {
    "a leaf missing": lambda p: {"w": p["w"], "b": p["b"]},
    "a leaf more": lambda p: {**p, "extra": p["b"]},
    "a leaf renamed": lambda p: {"w": p["w"], "b": p["b"], "u": p["v"]},
    "nested deeper": lambda p: {"params": p},
    "a list": lambda p: list(p.values()),
    "a leaf that is none": lambda p: {**p, "b": None},
    "nothing": lambda p: {},
}


@pytest.mark.parametrize("change", OTHER_TREES.values(), ids=OTHER_TREES)
def test_tree_of_another_structure(change: Callable[[Params], Any]) -> None:
    folded = fold_checked(model, make_params(), make_input())
    other = change(make_params())
    with pytest.raises(FoldError, match="structure"):
        folded.apply(other, make_input())
    with pytest.raises(FoldError, match="structure"):
        folded.plan.center(other)
    check_contracts(model, make_params(), folded, make_input())


def test_other_weights_of_the_same_structure() -> None:
    """A plan made for one checkpoint serves the next, also after a detour through text."""
    folded = fold_checked(model, make_params(), make_input())
    other = jax.tree.map(lambda leaf: jnp.cos(3 * leaf) + 1.0, make_params())
    before = snapshot(other)
    again = jax_lnfold.FoldPlan.from_json(folded.plan.to_json())
    want = model(other, make_input())
    for plan in (folded.plan, again):
        new = plan.center(other)
        assert relative_difference(folded.apply(new, make_input()), want) < 1e-12
        assert relative_difference(model(new, make_input()), want) < 1e-12
    assert_identical(other, before)


# --- odd leaves ----------------------------------------------------------------------------------


def test_integer_and_complex_leaves_are_not_touched() -> None:
    def apply(p: Params, x: Array) -> tuple[Array, Array]:
        wave = jnp.fft.ifft(jnp.fft.fft(x, axis=1) * p["spectrum"], axis=1).real
        return model(p, x[:, p["order"]] + wave), p["count"] + 1

    rng = np.random.default_rng(2)
    params = {
        **make_params(),
        "order": jnp.asarray([3, 1, 4, 0, 2]),
        "spectrum": jnp.asarray(rng.normal(size=(1, T, 1)) + 1j * rng.normal(size=(1, T, 1))),
        "count": jnp.int32(3),
        "flag": jnp.asarray(True),
    }
    folded = fold_checked(apply, params, make_input())
    assert (folded.report.n_folded, folded.report.n_inserted) == (1, 0)
    untouched = ("order", "spectrum", "count", "flag")
    for name in untouched:
        assert_identical(folded.params[name], snapshot(params[name]))
    assert not any(name in edit.key_path for edit in folded.report.edits for name in untouched)


@pytest.mark.parametrize("kind", ["int8", "complex"])
def test_writer_that_cannot_be_edited(kind: str) -> None:
    """An integer kernel, or one in the complex plane, stays as it is."""

    def apply(p: Params, x: Array) -> Array:
        w = p["w"] * 0.1 if kind == "int8" else p["w"]
        return layer_norm((x @ w).real + p["b"]) @ p["v"]

    params = make_params()
    rng = np.random.default_rng(3)
    params["w"] = (
        jnp.asarray(rng.integers(-9, 12, (DIN, D)), jnp.int8)
        if kind == "int8"
        else params["w"] + 1j * jnp.asarray(rng.normal(size=(DIN, D)))
    )
    folded = fold_checked(apply, params, make_input())
    assert folded.report.n_folded <= 1
    if kind == "int8":
        assert_identical(folded.params["w"], snapshot(params["w"]))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite(value: float) -> None:
    """They spoil what they spoiled before, and nothing else."""

    def apply(p: Params, x: Array, ids: Array) -> dict[str, Array]:
        rows = layer_norm(p["table"][ids] + p["b"])
        return {"rows": rows @ p["v"], "columns": model(p, x)}

    params = make_params()
    params["table"] = jnp.asarray(np.random.default_rng(4).normal(size=(OUT, D)))
    params["table"] = params["table"].at[3, 2].set(value)
    params["w"] = params["w"].at[0, 1].set(value)
    ids = jnp.asarray([[0, 3, 1, 2, 6], [4, 5, 5, 2, 0]])
    x = make_input()
    folded = fold_checked(apply, params, x, ids)
    assert (folded.report.n_folded, folded.report.n_inserted) == (2, 0)
    rows = np.asarray(folded(x, ids)["rows"])
    bad = np.asarray(ids == 3)
    assert np.isnan(rows[bad]).all()
    assert np.isfinite(rows[~bad]).all()


@pytest.mark.parametrize("array", [np.asarray, jnp.asarray], ids=["numpy", "jax"])
def test_mean_does_not_overflow_where_the_weights_do_not(array: Callable[..., Any]) -> None:
    largest = np.finfo(np.float16).max
    params = {name: array(np.asarray(leaf, np.float16)) for name, leaf in make_params().items()}
    signs = np.where(np.arange(D) < 3, -1, 1)
    params["w"] = array((0.5 * largest * signs * np.ones((DIN, 1))).astype(np.float16))
    folded = jax_lnfold.fold(model, params, make_input().astype(jnp.float16))
    assert folded.report.n_folded == 1
    want = 0.5 * float(largest) * (signs - signs.mean())
    assert relative_difference(folded.params["w"], np.tile(want, (DIN, 1))) < 1e-3


@pytest.mark.parametrize("kind", ["numpy", "read-only numpy", "jax", "mixed"])
def test_arrays_of_the_caller_are_not_changed(kind: str) -> None:
    params: Params = {name: np.array(leaf) for name, leaf in make_params().items()}
    if kind == "read-only numpy":
        for leaf in params.values():
            leaf.flags.writeable = False
    if kind in ("jax", "mixed"):
        params["w"] = jnp.asarray(params["w"])
    if kind == "jax":
        params = jax.tree.map(jnp.asarray, params)
    leaves = dict(params)
    folded = fold_checked(model, params, make_input())
    assert folded.report.n_folded == 1
    for name, leaf in leaves.items():
        assert params[name] is leaf
        assert type(folded.params[name]) is type(leaf) or isinstance(folded.params[name], jax.Array)


# --- nothing to do -------------------------------------------------------------------------------


def no_norm(p: Params, x: Array) -> Array:
    return jax.nn.gelu(x @ p["w"] + p["b"]) @ p["v"]


def norm_of_the_input(p: Params, x: Array) -> Array:
    return layer_norm(x)


def no_use_of_params(p: Params, x: Array) -> Array:
    return jnp.sin(x)


def constant(p: Params, x: Array) -> Array:
    return jnp.ones(3)


@pytest.mark.parametrize(
    ("apply_fn", "norms"),
    [(no_norm, 0), (norm_of_the_input, 1), (no_use_of_params, 0), (constant, 0)],
)
def test_nothing_to_fold(apply_fn: Callable[..., Any], norms: int) -> None:
    params = make_params()
    folded = fold_checked(apply_fn, params, make_input())
    report = folded.report
    assert (report.n_folded, report.n_inserted, report.edits) == (0, 0, ())
    assert len(report.norms) == norms
    assert_identical(folded.params, snapshot(params))
    assert "LayerNorm" in str(report)


def test_leaf_that_is_never_read() -> None:
    params = {**make_params(), "unused": jnp.full((DIN, D), 3.0)}
    folded = fold_checked(model, params, make_input())
    assert folded.report.n_folded == 1
    assert_identical(folded.params["unused"], snapshot(params["unused"]))


@pytest.mark.parametrize("params", [{}, None, ()], ids=repr)
def test_params_without_leaves(params: Any) -> None:
    folded = fold_checked(norm_of_the_input, params, make_input())
    assert folded.report.n_folded == 0
    assert folded.params == params


def test_params_of_one_leaf() -> None:
    w = make_params()["w"]
    folded = fold_checked(lambda w, x: layer_norm(x @ w), w, make_input())
    assert (folded.report.n_folded, folded.report.n_inserted) == (1, 0)
    assert isinstance(folded.params, jax.Array)


# --- shapes at the edge --------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2])
def test_few_features(width: int) -> None:
    """Over one feature the mean is the value itself: zero times infinity must not appear."""

    def apply(p: Params, x: Array) -> Array:
        s = layer_norm(x @ p["w"][:, :width] + p["b"][..., :width])
        return (s + 1.0) @ p["v"][:width]

    folded = fold_checked(apply, make_params(), make_input())
    assert folded.report.n_inserted == 0
    assert np.isfinite(np.asarray(folded(make_input()))).all()


@pytest.mark.parametrize("shape", [(0, T, DIN), (B, 0, DIN), (1, 1, DIN)], ids=str)
def test_no_tokens_or_one(shape: tuple[int, ...]) -> None:
    folded = fold_checked(model, make_params(), make_input(*shape))
    assert folded.report.n_folded == 1 or 0 in shape  # no element, no cost
    check_contracts(model, make_params(), folded, make_input())


def test_shape_for_which_the_facts_do_not_hold() -> None:
    """The program is traced anew for every shape, and so are the proofs."""

    def apply(p: Params, x: Array) -> Array:
        s = x @ p["w"] + p["b"]
        return (layer_norm(s) if x.shape[1] > 1 else jax.nn.gelu(s)) @ p["v"]

    params = make_params()
    folded = fold_checked(apply, params, make_input())
    assert folded.report.n_folded == 1
    with pytest.raises(FoldError):
        folded.apply(folded.params, make_input(B, 1, DIN))
    check_contracts(apply, params, folded, make_input(B + 1, T + 1, DIN))


def test_scalars_and_python_numbers_as_leaves() -> None:
    def apply(p: Params, x: Array) -> Array:
        return model(p, x * p["gain"]) * p["temperature"]

    params = {**make_params(), "gain": 2.0, "temperature": jnp.asarray(0.5)}
    x = make_input()
    folded = jax_lnfold.fold(apply, params, x)
    assert folded.report.n_folded == 1
    assert params["gain"] == 2.0
    assert relative_difference(folded.apply(folded.params, x), apply(params, x)) < 1e-12
    assert relative_difference(apply(folded.params, x), apply(params, x)) < 1e-12
