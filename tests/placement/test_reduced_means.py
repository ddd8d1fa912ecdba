"""What feeds a LayerNorm that keeps its mean is centered on request, where nobody notices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_lnfold
from jax_lnfold import FoldError, FoldPlan, PlanMismatchError, measure
from tests.helpers.contracts import check_contracts, fold_checked
from tests.models.zoo import BY_NAME

RNG = np.random.default_rng(0)
D, HIDDEN = 6, 7


def draw(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.standard_normal(shape) / 2 + 0.1)


def norm(p: Any, x: jax.Array) -> jax.Array:
    c = x - x.mean(-1, keepdims=True)
    return p["g"] * c / jnp.sqrt(jnp.square(c).mean(-1, keepdims=True) + 1e-3) + p["s"]


def block() -> dict[str, Any]:
    return {
        "in": draw(D, HIDDEN),
        "out": draw(HIDDEN, D),
        "bias": draw(D),
        "g": 1 + draw(D) / 4,
        "s": draw(D),
    }


def branch(p: Any, x: jax.Array) -> jax.Array:
    return jnp.sin(x @ p["in"]) @ p["out"] + p["bias"]


def post_ln(params: Any, x: jax.Array) -> jax.Array:
    for p in params:
        x = norm(p, x + branch(p, x))
    return x


def edited(plan: FoldPlan) -> set[str]:
    return {edit.key_path for edit in (*plan.edits, *plan.means)}


PARAMS, X = [block(), block()], draw(3, 4, D)
WRITERS = {"0/out", "0/bias", "1/out", "1/bias"}


def test_the_last_layers_of_branches_are_centered() -> None:
    """The stream itself, made by the scale before, cannot be; contract 2 holds all the same."""
    folded = fold_checked(post_ln, PARAMS, X, reduce_means=True)
    assert edited(folded.plan) == WRITERS
    assert folded.report.n_folded == folded.report.n_inserted == 0
    assert edited(jax_lnfold.fold(post_ln, PARAMS, X).plan) == set()
    first, second = measure(folded, PARAMS, X).norms
    for each in (first, second):
        assert each.before is not None
        assert each.after is not None
        assert each.after.share < 0.9 * each.before.share
    assert folded.plan.is_centered(folded.params)


def test_nothing_remains_of_the_second_mean_if_the_scale_is_uniform() -> None:
    """Then all there is to the stream's mean is that of the shift, which the bias takes out."""
    params = [block(), block()]
    params[0] |= {"g": jnp.full(D, 1.25)}
    folded = fold_checked(post_ln, params, X, reduce_means=True)
    second = measure(folded, params, X).norms[1]
    assert second.after.maximum < 1e-28 < 1e-5 < second.before.share


def test_biases_take_out_the_means_of_shifts() -> None:
    """By as much as the shift has, with the sign that it is added with; the rest stays zero."""
    (mean,) = jax_lnfold.plan_fold(post_ln, PARAMS, X, reduce_means=True).means
    assert mean.key_path == "1/bias"
    np.testing.assert_allclose(mean.means, -PARAMS[0]["s"].mean(), rtol=1e-12)

    def negated(params: Any, x: jax.Array) -> jax.Array:
        first, second = params
        y = norm(first, x)
        return norm(second, (y + second["in"][0, 0]) - branch(second, y) - second["s"])

    folded = fold_checked(negated, PARAMS, X, reduce_means=True)
    p = PARAMS[1]
    (mean,) = folded.plan.means
    total = PARAMS[0]["s"].mean() - p["s"].mean()
    np.testing.assert_allclose(mean.means, total, rtol=1e-12)
    at_zero = jax_lnfold.fold(negated, PARAMS, X, plan=centered_only(negated), center=True)
    both = [measure(f, PARAMS, X).norms[1].after.share for f in (folded, at_zero)]
    assert both[0] < both[1]


def centered_only(fn: Any) -> FoldPlan:
    """From shapes alone nobody knows the mean of a shift."""
    shapes = jax.eval_shape(lambda tree: tree, (PARAMS, X))
    plan = jax_lnfold.plan_fold(fn, *shapes, reduce_means=True)
    assert not plan.means
    return plan


def shared_bias(params: Any, x: jax.Array) -> jax.Array:
    """Two LayerNorms behind different shifts: one mean is not right for both."""
    first, second = params
    x = norm(first, x + branch(second, x))
    return norm(second, x + branch(second, x))


def masked_shift(params: Any, x: jax.Array) -> jax.Array:
    """The shift is not there for every token."""
    first, second = params
    kept = jnp.abs(x[..., :1]) < 0.5
    y = norm({**first, "s": 0.0}, x) + jnp.where(kept, first["s"], 0.0)
    return norm(second, y + branch(second, y))


def edited_shift(params: Any, x: jax.Array) -> jax.Array:
    """The shift is a bias of the same branch, and centered itself."""
    first, second = params
    y = norm({**first, "s": 0.0}, x)
    return norm(second, y + branch(second, y) + first["s"])


@pytest.mark.parametrize("fn", [shared_bias, masked_shift, edited_shift])
def test_what_is_no_constant_stays(fn: Any) -> None:
    folded = fold_checked(fn, PARAMS, X, reduce_means=True)
    assert "1/bias" in edited(folded.plan)
    assert folded.plan.means == ()


def test_plans_are_followed_elsewhere() -> None:
    """The file is as ever; another function that notices is refused."""
    plan = jax_lnfold.plan_fold(post_ln, PARAMS, X, reduce_means=True)
    assert plan.version == 7
    assert FoldPlan.from_json(plan.to_json()) == plan
    followed = jax_lnfold.fold(post_ln, PARAMS, X[0], plan=plan, center=True)
    check_contracts(post_ln, PARAMS, followed, X)
    report = jax_lnfold.analyze(post_ln, PARAMS, X, reduce_means=True)
    assert edited(report.plan) == WRITERS
    with pytest.raises(PlanMismatchError):
        jax_lnfold.fold(lambda p, x: x + branch(p[0], x), PARAMS, X, plan=plan, center=True)


def returns_branch(params: Any, x: jax.Array) -> Any:
    y = branch(params[0], x)
    return norm(params[0], x + y), y


def reads_stream(params: Any, x: jax.Array) -> jax.Array:
    h = x + branch(params[0], x)
    return norm(params[0], h) + h @ params[1]["in"][:, :D]


def shares_kernel(params: Any, x: jax.Array) -> jax.Array:
    p = params[0]
    x = norm(p, x + branch(p, x))
    return norm(params[1], x + branch(params[1], x)) + jnp.sin(x @ p["in"]) @ p["out"]


def gated(params: Any, x: jax.Array) -> jax.Array:
    p = params[0]
    return norm(p, x + jnp.sin(x) * branch(p, x))


def over_tokens(params: Any, x: jax.Array) -> jax.Array:
    """Two tokens are normalised together: a shift of each is noticed, one of both is not."""
    p = params[0]
    h = (x + branch(p, x)).reshape(3, 2, 2 * D)
    c = h - h.mean(-1, keepdims=True)
    return c / jnp.sqrt(jnp.square(c).mean(-1, keepdims=True) + 1e-3)


NEAR: dict[str, tuple[Callable[..., Any], set[str]]] = {
    "returned": (returns_branch, set()),
    "read besides": (reads_stream, set()),
    "used besides": (shares_kernel, {"0/bias", "1/out", "1/bias"}),
    "gated": (gated, set()),
    "over tokens": (over_tokens, {"0/bias"}),
}


@pytest.mark.parametrize("name", NEAR)
def test_what_somebody_notices_stays(name: str) -> None:
    fn, wanted = NEAR[name]
    folded = fold_checked(fn, PARAMS, X, reduce_means=True)
    assert edited(folded.plan) == wanted


def merged(*last: Callable[[jax.Array], jax.Array]) -> Callable[..., jax.Array]:
    """A stream of tokens on a map, four of which are normalised together, as in Swin."""

    def fn(params: Any, x: jax.Array) -> jax.Array:
        first, second = params
        x = x + branch(first, x)
        x = x + branch(second, norm(second, x)) + first["s"]
        corners = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        parts = [f(part) for f, part in zip((same, same, *last), corners, strict=True)]
        return jax.nn.standardize(jnp.concatenate(parts, axis=-1))

    return fn


def same(x: jax.Array) -> jax.Array:
    return x


def turned(params: Any, x: jax.Array) -> jax.Array:
    """Tokens beside those at the transposed place: only what all tokens share is one number."""
    x = x + branch(params[0], x)
    return jax.nn.standardize(jnp.concatenate([x, x.swapaxes(1, 2)], axis=-1))


def doubled(params: Any, x: jax.Array) -> jax.Array:
    """Every token beside itself: its own mean is that of both."""
    x = x + branch(params[0], x)
    return jax.nn.standardize(jnp.concatenate([x, x], axis=-1))


SHARED = {"0/bias", "1/bias", "0/s"}
ON_MAPS: dict[str, tuple[Callable[..., jax.Array], set[str]]] = {
    "merged": (merged(same, same), SHARED),
    "one negated": (merged(same, lambda x: -x), set()),
    "one scaled": (merged(same, lambda x: 2 * x), set()),
    "one without": (merged(same, jnp.cos), set()),
    "turned": (turned, {"0/bias"}),
    "doubled": (doubled, {"0/bias", "0/out"}),
}


@pytest.mark.parametrize("name", ON_MAPS)
def test_what_all_tokens_share_may_be_centered_where_tokens_are_merged(name: str) -> None:
    """Each token's own mean, which a kernel writes, would be noticed by the norm of several."""
    fn, wanted = ON_MAPS[name]
    folded = fold_checked(fn, PARAMS, draw(2, 4, 4, D), reduce_means=True)
    assert edited(folded.plan) == wanted
    check_contracts(fn, PARAMS, folded, draw(3, 6, 6, D))


def test_excluded_parameters_stay() -> None:
    folded = fold_checked(post_ln, PARAMS, X, reduce_means=True, exclude={"0/out"})
    assert edited(folded.plan) == WRITERS - {"0/out"}


def test_layers_of_a_loop() -> None:
    """Stacked parameters are centered layer by layer, and the mean falls in each."""
    stack = jax.tree.map(lambda *x: jnp.stack(x), *[block() for _ in range(3)])

    def fn(params: Any, x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, p: (norm(p, x + branch(p, x)), None), x, params)[0]

    folded = fold_checked(fn, stack, X, reduce_means=True)
    assert edited(folded.plan) == {"out", "bias"}
    (only,) = measure(folded, stack, X).norms
    assert only.before.share.shape == (3,)
    assert (only.after.share < only.before.share).all()


@pytest.mark.parametrize(
    "name", ["bert", "bart", "mixer_wide", "convnext", "swin", "swin_v2", "dit"]
)
def test_models(name: str) -> None:
    """The same LayerNorms fold, and the same function is computed, at two shapes."""
    model = BY_NAME[name].build()
    apply_fn = jax.jit(model.apply_fn)
    plain = jax_lnfold.fold(apply_fn, model.params, *model.inputs)
    folded = jax_lnfold.fold(apply_fn, model.params, *model.inputs, reduce_means=True)
    for inputs in (model.inputs, model.other_inputs):
        check_contracts(apply_fn, model.params, folded, *inputs)
    assert [n.folded for n in folded.report.norms] == [n.folded for n in plain.report.norms]
    assert folded.report.insertions == plain.report.insertions
    assert {*plain.plan.edits} <= {*folded.plan.edits}
    if name in ("bert", "bart", "mixer_wide", "dit"):
        norms = measure(folded, model.params, model.inputs).norms
        assert all(n.after.share < n.before.share for n in norms)
    if name in ("bert", "bart", "mixer_wide", "swin"):
        assert len(folded.plan.edits) > len(plain.plan.edits)


@pytest.mark.parametrize("name", ["vit", "gpt2", "qk_norm_stacked"])
def test_where_all_fold_there_is_nothing_left_to_do(name: str) -> None:
    model = BY_NAME[name].build()
    plans = [
        jax_lnfold.plan_fold(model.apply_fn, model.params, *model.inputs, reduce_means=asked)
        for asked in (False, True)
    ]
    assert plans[0] == plans[1]


def test_bad_option() -> None:
    with pytest.raises(FoldError, match="reduce_means: 1 is not a bool"):
        jax_lnfold.fold(post_ln, PARAMS, X, reduce_means=1)
