"""Means of leaves, fitted to data, make small what remains of the means of LayerNorms."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from sklearn.datasets import load_digits

import jax_lnfold
from jax_lnfold import FoldError, FoldPlan, fitting, measure, regress
from jax_lnfold._compat import consts_of
from jax_lnfold.measurement.normal_equations import Normal, ridge
from jax_lnfold.measurement.token_means import TokenMeans
from jax_lnfold.options import check_options
from jax_lnfold.placement.free_means import free_means
from jax_lnfold.placement.planning import make_plan, placement_of
from jax_lnfold.plan.edits.means import MeanEdit
from jax_lnfold.program.tracing import trace
from jax_lnfold.trees import leaf_paths
from tests.helpers.contracts import check_contracts
from tests.models.zoo import BY_NAME

D, HIDDEN = 6, 7


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape) / 2 + 0.1)


def norm(p: Any, x: jax.Array) -> jax.Array:
    c = x - x.mean(-1, keepdims=True)
    return p["g"] * c / jnp.sqrt(jnp.square(c).mean(-1, keepdims=True) + 1e-3) + p["s"]


def block(seed: int) -> dict[str, Any]:
    return {
        "in": draw(D, HIDDEN, seed=seed),
        "out": draw(HIDDEN, D, seed=seed),
        "bias": draw(D, seed=seed),
        "g": 1 + draw(D, seed=seed + 10) / 4,
        "s": draw(D, seed=seed + 20),
    }


def branch(p: Any, x: jax.Array) -> jax.Array:
    return jnp.sin(x @ p["in"]) @ p["out"] + p["bias"]


def post_ln(params: Any, x: jax.Array) -> jax.Array:
    for p in params:
        x = norm(p, x + branch(p, x))
    return x


PARAMS, X, OTHER = [block(0), block(1)], draw(60, 4, D), draw(30, 4, D, seed=1)


def shares(fn: Any, params: Any, plan: FoldPlan, *batches: Any) -> np.ndarray:
    """The shares of the mean of LayerNorms that do not fold, after all edits."""
    inputs = batches[0] if isinstance(batches[0], tuple) else batches[:1]
    folded = jax_lnfold.fold(fn, params, *inputs, plan=plan, center=True)
    norms = zip(measure(folded, params, *batches).norms, folded.report.norms, strict=True)
    return np.concatenate([n.after.share.ravel() for n, r in norms if not r.folded])


def centered(found: FoldPlan, fn: Any, params: Any, *inputs: Any) -> FoldPlan:
    shapes = jax.eval_shape(lambda tree: tree, (params, *inputs))  # all means are zero
    plan = jax_lnfold.plan_fold(fn, *shapes, reduce_means=True)
    assert {e.key_path for e in plan.edits} == {e.key_path for e in (*found.edits, *found.means)}
    return plan


def test_what_remains_falls() -> None:
    """On other data, exactly as the fit says on its own; the functions are what they were."""
    found = regress(post_ln, PARAMS, X)
    assert {edit.key_path for edit in found.plan.means} == {"0/out", "0/bias", "1/out", "1/bias"}
    folded = jax_lnfold.fold(post_ln, PARAMS, X, plan=found.plan, center=True)
    check_contracts(post_ln, PARAMS, folded, X)
    before = shares(post_ln, PARAMS, centered(found.plan, post_ln, PARAMS, X), OTHER)
    after = shares(post_ln, PARAMS, found.plan, OTHER)
    assert (after < before / 3).all()
    assert FoldPlan.from_json(found.plan.to_json()) == found.plan
    for told in found.norms:
        assert 0 < told.fitted < told.centered
        assert told.regressed < told.centered / 3
        assert (told.tokens, told.held_out) == (192, 48)
    assert "held-out tokens, of a fit to 384 tokens" in str(found)


def test_the_fit_is_least_squares() -> None:
    """Against the normal equations spelled out, on the tokens that it used."""
    found = regress(lambda p, x: post_ln([p], x), PARAMS[0], X)
    x, p = np.asarray(X).reshape(-1, D), {k: np.asarray(v) for k, v in PARAMS[0].items()}
    features = np.concatenate([np.sin(x @ p["in"]), np.ones((len(x), 1))], axis=1)
    fitted = np.arange(len(x)) % 5 != 4
    mean = x.mean(1)
    v = np.linalg.lstsq(features[fitted], -mean[fitted], rcond=None)[0]
    h = x + (np.sin(x @ p["in"]) @ (p["out"] - p["out"].mean(1, keepdims=True)))
    h = h + p["bias"] - p["bias"].mean()
    left = (mean + features @ v)[fitted]
    least = np.square(left).sum() / np.square(h).mean(1)[fitted].sum()
    (told,) = found.norms
    assert least <= told.fitted <= 1.02 * least
    means = {edit.key_path: np.asarray(edit.means) for edit in found.plan.means}
    got = np.concatenate([means["out"], means["bias"]])
    left = (mean + features @ got)[~fitted]
    # x**2 is taken of what is centered
    want = np.square(left).sum() / np.square(h).mean(1)[~fitted].sum()
    np.testing.assert_allclose(told.regressed, want, rtol=1e-10)


def test_many_batches_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the ridge, which is chosen by batches if there are several."""
    monkeypatch.setattr(fitting, "FOLDS", 1)
    one, many = (regress(post_ln, PARAMS, *b) for b in ((X,), (X[:13], X[13:26], X[26:39])))
    assert one.plan != many.plan
    one = regress(post_ln, PARAMS, X[:39])
    for a, b in zip(one.plan.means, many.plan.means, strict=True):
        np.testing.assert_allclose(a.means, b.means, rtol=1e-8, atol=1e-10)
    assert [(n.tokens, n.held_out) for n in one.norms] == [
        (n.tokens, n.held_out) for n in many.norms
    ]


@pytest.mark.parametrize("tokens", [4, 6, 9, 12])
def test_few_tokens_do_no_harm(tokens: int) -> None:
    """Fewer tokens than means, or as many: other data is not much worse than centered."""
    for seed in range(3):
        x = draw(1, tokens, D, seed=seed + 5)
        found = regress(post_ln, PARAMS, x)
        before = shares(post_ln, PARAMS, centered(found.plan, post_ln, PARAMS, x), OTHER)
        after = shares(post_ln, PARAMS, found.plan, OTHER)
        assert (after < 2 * before).all()


def test_noise_is_not_fitted() -> None:
    """Features that say nothing about the mean: zeros stay where the fit does not hold."""
    rng = np.random.default_rng(0)
    normal, held = Normal.empty(30), Normal.empty(30)
    for part, n in ((normal, 40), (held, 10)):
        part.add(rng.normal(size=(30, n)), rng.normal(size=n), np.ones(n))
    v = ridge([normal])
    assert held.share(v) < 2 * held.share(np.zeros(30))
    plain = -np.linalg.lstsq(normal.matrix, normal.vector, rcond=None)[0]
    assert normal.share(plain) < normal.share(v) <= normal.share(np.zeros(30)) + 1e-12
    assert held.share(plain) > 1.5 * held.share(v)


def test_a_mean_that_can_be_cancelled_is() -> None:
    """Linear in the features: nothing is left but rounding."""
    p = PARAMS[0] | {"out": draw(D, D)}

    def fn(p: Any, x: jax.Array) -> jax.Array:
        return norm(p, x + x @ p["out"] + p["bias"])

    found = regress(fn, p, X)
    assert found.norms[0].centered > 1e-3
    assert shares(fn, p, found.plan, OTHER).max() < 1e-12


def in_loop(params: Any, x: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda x, p: (norm(p, x + branch(p, x)), None), x, params)[0]


def test_layers_of_a_loop() -> None:
    """There are means for each iteration."""
    fn, stack = in_loop, jax.tree.map(lambda *x: jnp.stack(x), *[block(s) for s in range(3)])
    found = regress(fn, stack, X)
    assert {e.key_path: len(e.means) for e in found.plan.means} == {"out": 3 * HIDDEN, "bias": 3}
    folded = jax_lnfold.fold(fn, stack, X, plan=found.plan, center=True)
    check_contracts(fn, stack, folded, X)
    after, before = (
        shares(fn, stack, plan, OTHER) for plan in (found.plan, centered(found.plan, fn, stack, X))
    )
    assert after.shape == (3,)
    assert (after < before / 3).all()


def between(p: Any, x: jax.Array) -> jax.Array:
    """Sums over neighbours, masks, scales of tokens, lookups: whatever is linear."""
    y = branch(p, x) * (jnp.abs(x).sum(-1, keepdims=True) > 2)
    y = y + jnp.roll(y, 1, axis=1) / (1 + jnp.abs(x[..., :1]))
    return norm(p, x + y + p["table"][jnp.arange(4)])


WITH_TABLE = PARAMS[0] | {"table": draw(5, D, seed=7)}


def test_between_layer_and_norm() -> None:
    found = regress(between, WITH_TABLE, X)
    assert {e.key_path for e in found.plan.means} == {"out", "bias", "table"}
    folded = jax_lnfold.fold(between, WITH_TABLE, X, plan=found.plan, center=True)
    check_contracts(between, WITH_TABLE, folded, X)
    (told,) = found.norms
    assert shares(between, WITH_TABLE, found.plan, OTHER) < 0.6 * told.centered


def convolved(p: Any, x: jax.Array) -> jax.Array:
    """A convolution, its output scaled by a number per token, and an `einsum` over heads."""
    y = jax.lax.conv_general_dilated(
        jnp.sin(x), p["conv"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )
    y = jnp.einsum("btc,chd->bthd", jnp.cos(x), p["heads"]).sum(2) + y / (1 + x[..., :1] ** 2)
    return norm(p, x + y)


WITH_CONV = PARAMS[0] | {"conv": draw(3, D, D), "heads": draw(D, 2, D)}
ZOO = ["bert", "bart", "mixer_wide"]


@pytest.mark.parametrize("name", ["post_ln", "loop", "between", "convolved", *ZOO])
def test_means_are_affine(name: str) -> None:
    """The derivatives say what edited parameters do, by any numbers, to 1e-10."""
    stack = jax.tree.map(lambda *x: jnp.stack(x), *[block(seed) for seed in range(3)])
    known = {
        "post_ln": (post_ln, PARAMS, X),
        "loop": (in_loop, stack, X),
        "between": (between, WITH_TABLE, X),
        "convolved": (convolved, WITH_CONV, X),
    }
    if name in known:
        fn, params, *inputs = known[name]
    else:
        model = BY_NAME[name].build()
        fn, params, inputs = model.apply_fn, model.params, [*model.inputs]
    traced = trace(fn, params, tuple(inputs))
    full, plain = (
        placement_of(traced, check_options(2.0, (), False, reduce_means=asked))
        for asked in (True, False)
    )
    free, plan = free_means(full, plain), make_plan(full)
    assert free.feeds
    rng, shifts = np.random.default_rng(0), dict[str, Any]()
    edits = []
    for leaf, along in free.groups.items():
        v = rng.normal(size=[1 if d in along.axes else n for d, n in enumerate(along.shape)])
        shifts[full.graph.leaves[leaf]] = jnp.asarray(v)
        edits.append(MeanEdit(full.graph.leaves[leaf], along, tuple(v.ravel().tolist())))
    rest = tuple(e for e in plan.edits if e.key_path not in shifts)
    given = replace(plan, edits=rest, means=tuple(edits))
    watched = TokenMeans(traced.closed, full, {*free.feeds}, free.through)

    def means(params: Any, shifts: dict[str, Any]) -> Any:
        leaves = [x + shifts.get(path, 0) for path, x in leaf_paths(params)]
        found = watched(consts_of(traced.closed), [*leaves, *jax.tree.leaves(inputs)])
        return {i: tokens.means for i, tokens in found.items()}

    zeros = jax.tree.map(jnp.zeros_like, shifts)
    start = plan.center(params)
    at_zero, by_slopes = jax.jit(lambda p: jax.jvp(lambda v: means(p, v), (zeros,), (shifts,)))(
        start
    )
    after = jax.jit(lambda p: means(p, zeros))(given.center(params))
    assert after.keys() == free.feeds.keys()
    for i, found in after.items():
        assert jnp.abs(by_slopes[i]).max() > 1e-3
        np.testing.assert_allclose(at_zero[i] + by_slopes[i], found, rtol=0, atol=1e-10)


def in_while(params: Any, x: jax.Array) -> jax.Array:
    def body(state: Any) -> Any:
        return state[0] + 1, norm(params[0], state[1] + branch(params[0], state[1]))

    return jax.lax.while_loop(lambda s: s[0] < 2, body, (0, x))[1]


def all_fold(params: Any, x: jax.Array) -> jax.Array:
    return norm(params[0], branch(params[0], x))


def shared_with_a_while(params: Any, x: jax.Array) -> jax.Array:
    p = params[0]
    return in_while(params, norm(p, x + branch(p, x)))


@pytest.mark.parametrize("fn", [in_while, all_fold, shared_with_a_while])
def test_what_cannot_be_looked_at_stays_centered(fn: Any) -> None:
    found = regress(fn, PARAMS, X)
    assert found.plan == jax_lnfold.plan_fold(fn, PARAMS, X, reduce_means=True)
    assert str(found)


def test_too_many_means(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jax_lnfold.fitting.MOST_MEANS", HIDDEN)
    found = regress(post_ln, PARAMS, X)
    assert found.plan.means == ()
    assert "has 8 means" in str(found)


def test_some_of_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jax_lnfold.measurement.derivatives.MOST_NUMBERS", 8 * 2 * 100)
    found = regress(post_ln, PARAMS, X)
    assert [n.tokens + n.held_out for n in found.norms] == [80, 80]
    assert (
        shares(post_ln, PARAMS, found.plan, OTHER) < [n.centered / 3 for n in found.norms]
    ).all()


def test_numbers_that_are_not_finite() -> None:
    found = regress(post_ln, PARAMS, X.at[0, 0, 0].set(jnp.nan))
    assert found.plan.means == ()
    assert "infinite or NaN" in str(found)


def test_a_norm_of_one_element_is_none() -> None:
    def fn(p: Any, x: jax.Array) -> jax.Array:
        return norm(p, x + p["bias"])

    p = {"bias": draw(1), "g": draw(1), "s": draw(1)}
    assert "No LayerNorm keeps a mean" in str(regress(fn, p, draw(8, 1)))


def test_excluded_leaves_get_no_means() -> None:
    found = regress(post_ln, PARAMS, X, exclude={"0/out"})
    assert {edit.key_path for edit in found.plan.means} == {"0/bias", "1/out", "1/bias"}


# --- keywords and models -------------------------------------------------------------------------


def test_keywords() -> None:
    """Flags and arrays: the same plan as of a function in which they are bound."""

    def fn(params: Any, x: jax.Array, *, offset: jax.Array, depth: int = 2) -> jax.Array:
        return post_ln(params[:depth], x + offset)

    given = {"offset": draw(D, seed=9), "depth": 1}
    found = regress(fn, PARAMS, X[:30], OTHER, **given)
    bound = regress(lambda p, x: fn(p, x, **given), PARAMS, X[:30], OTHER)
    assert found.plan == bound.plan
    assert {edit.key_path for edit in found.plan.means} == {"0/out", "0/bias"}
    folded = jax_lnfold.fold(fn, PARAMS, X, plan=found.plan, center=True, **given)
    got = folded(X, **given)
    np.testing.assert_allclose(got, fn(PARAMS, X, **given), rtol=0, atol=1e-12)


class Nnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(D, HIDDEN, rngs=rngs, param_dtype=float)
        self.down = nnx.Linear(HIDDEN, D, rngs=rngs, param_dtype=float)
        self.norm = nnx.LayerNorm(D, rngs=rngs, param_dtype=float)

    def __call__(self, x: jax.Array, scale: float = 1.0) -> jax.Array:
        return self.norm(x + scale * self.down(jnp.sin(self.up(x))))


class Eqx(eqx.Module):
    up: eqx.nn.Linear
    down: eqx.nn.Linear
    norm: eqx.nn.LayerNorm

    def __call__(self, x: jax.Array, scale: float = 1.0) -> jax.Array:
        each = lambda x: self.norm(x + scale * self.down(jnp.sin(self.up(x))))  # noqa: E731
        return jax.vmap(jax.vmap(each))(x)


def _equinox() -> Eqx:
    up, down = jax.random.split(jax.random.key(0))
    return Eqx(
        eqx.nn.Linear(D, HIDDEN, key=up), eqx.nn.Linear(HIDDEN, D, key=down), eqx.nn.LayerNorm(D)
    )


@pytest.mark.parametrize("model", [Nnx(nnx.Rngs(0)), _equinox()])
def test_models_that_hold_their_parameters(model: Any) -> None:
    found = regress(model, X, (X[::-1],), scale=0.5)
    assert len(found.plan.means) == 2
    folded = jax_lnfold.fold(model, X, plan=found.plan, center=True, scale=0.5)
    np.testing.assert_allclose(folded(OTHER, scale=0.5), model(OTHER, scale=0.5), atol=1e-6)
    (only,) = measure(folded.model, OTHER, scale=0.5).norms
    (told,) = found.norms
    assert only.before.share < told.centered / 3
    assert jax_lnfold.FoldPlan.from_json(found.plan.to_json()) == found.plan


def test_bad_input() -> None:
    with pytest.raises(FoldError, match="batches: there is none"):
        regress(post_ln, PARAMS)
    with pytest.raises(FoldError, match=r"batches: there is none.*regress\(model, \*batches\)"):
        regress(Nnx(nnx.Rngs(0)))
    with pytest.raises(FoldError, match=r"params: missing; pass regress\(fn, params, \*batches\)"):
        regress(post_ln)
    with pytest.raises(FoldError, match="shift: a bytearray is no array, and cannot be bound"):
        regress(post_ln, PARAMS, X, shift=bytearray())
    with pytest.raises(FoldError, match=r"batches\[1\]: input"):
        regress(post_ln, PARAMS, X, X[:3])
    with pytest.raises(FoldError, match="apply_fn: a dict is no single function"):
        regress({"f": post_ln}, PARAMS, X)
    with pytest.raises(FoldError, match="being traced; call regress outside"):
        jax.jit(lambda x: regress(post_ln, PARAMS, x).norms)(X)
    with pytest.raises(FoldError, match="exclude"):
        regress(post_ln, PARAMS, X, exclude={"nothing"})


def test_bert() -> None:
    model = BY_NAME["bert"].build()
    fn, params = jax.jit(model.apply_fn), model.params
    rng = np.random.default_rng(0)

    def batch() -> tuple[Any, ...]:
        return tuple(
            jnp.asarray(rng.permutation(np.asarray(x).ravel()).reshape(x.shape))
            if jnp.issubdtype(x.dtype, jnp.integer)
            else x
            for x in model.inputs
        )

    found = regress(fn, params, *[batch() for _ in range(30)])
    assert found.plan.means
    folded = jax_lnfold.fold(fn, params, *model.inputs, plan=found.plan, center=True)
    for inputs in (model.inputs, model.other_inputs):
        check_contracts(fn, params, folded, *inputs)
    plain, other = centered(found.plan, fn, params, *model.inputs), [batch() for _ in range(4)]
    without = jax_lnfold.fold(fn, params, *model.inputs)
    assert [n.folded for n in folded.report.norms] == [n.folded for n in without.report.norms]
    before, after = (shares(fn, params, plan, *other) for plan in (plain, found.plan))
    assert (after < before / 2).all()
    assert after.sum() < before.sum() / 5


# --- a trained model -----------------------------------------------------------------------------


def encoder(params: Any, pixels: jax.Array) -> jax.Array:
    """Post-LN, of the rows of an image; logits."""
    x = pixels @ params["embed"] + params["place"]
    x = norm(params["norm"], x)
    for p in params["blocks"]:
        q, k, v = jnp.split(x @ p["qkv"], 3, axis=-1)
        weights = jax.nn.softmax(q @ k.swapaxes(-1, -2) / q.shape[-1] ** 0.5)
        x = norm(p["first"], x + weights @ v @ p["proj"] + p["proj_bias"])
        hidden = jax.nn.gelu(x @ p["up"] + p["up_bias"])
        x = norm(p["second"], x + hidden @ p["down"] + p["down_bias"])
    return x.mean(1) @ params["head"]


def encoder_params(width: int, hidden: int, depth: int) -> Any:
    rng = np.random.default_rng(0)

    def dense(n: int, m: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=(n, m)) / n**0.5, jnp.float32)

    def affine() -> dict[str, jax.Array]:
        return {"g": jnp.ones(width, jnp.float32), "s": jnp.zeros(width, jnp.float32)}

    blocks = [
        {
            "qkv": dense(width, 3 * width),
            "proj": dense(width, width),
            "proj_bias": jnp.zeros(width, jnp.float32),
            "up": dense(width, hidden),
            "up_bias": jnp.zeros(hidden, jnp.float32),
            "down": dense(hidden, width),
            "down_bias": jnp.zeros(width, jnp.float32),
            "first": affine(),
            "second": affine(),
        }
        for _ in range(depth)
    ]
    place, head = dense(8, width), dense(width, 10)
    return {
        "embed": dense(8, width),
        "place": place,
        "norm": affine(),
        "blocks": blocks,
        "head": head,
    }


def test_a_trained_encoder() -> None:
    """On images that neither the training nor the fit has seen."""
    images, labels = load_digits(return_X_y=True)
    images = jnp.asarray(images.reshape(-1, 8, 8) / 16, jnp.float32)
    params = encoder_params(24, 40, 2)
    tx = optax.adam(3e-3)

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(encoder(params, x), y).mean()

    @jax.jit
    def step(carry: Any, at: jax.Array) -> Any:
        params, state = carry
        grads = jax.grad(loss)(params, images[at], jnp.asarray(labels)[at])
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    order = np.random.default_rng(0).integers(0, 1200, (400, 64))
    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), order)
    test, expected = images[1200:], labels[1200:]
    assert (np.asarray(encoder(params, test)).argmax(-1) == expected).mean() > 0.85

    found = regress(encoder, params, images[:300], images[300:600])
    plain = centered(found.plan, encoder, params, test)
    assert found.plan.means
    before, after = (shares(encoder, params, plan, test) for plan in (plain, found.plan))
    assert (after < before).all()
    assert (after[[1, 3]] < before[[1, 3]] / 4).all()  # behind layers that see the token itself
    assert after.sum() < before.sum() / 2

    wide = jax.tree.map(lambda x: x.astype(jnp.float64), params)
    folded = jax_lnfold.fold(encoder, wide, test[:50], plan=found.plan, center=True)
    check_contracts(encoder, wide, folded, test[:50].astype(jnp.float64))


# --- several derivatives in one pass -------------------------------------------------------------


def reversed_features(params: Any, x: jax.Array) -> jax.Array:
    """The mean is the same, but no feature of a token depends on its own one of the leaf."""
    p = params[0]
    return norm(p, x + branch(p, x)[..., ::-1])


def in_heads(params: Any, x: jax.Array) -> jax.Array:
    """The leaf has its features along two axes, and the token along one."""
    p = params[0]
    out = p["out"].reshape(HIDDEN, 2, -1)
    return norm(p, x + jnp.einsum("...h,hnd->...nd", jnp.sin(x @ p["in"]), out).reshape(x.shape))


@pytest.mark.parametrize(
    ("fn", "mixes"), [(post_ln, False), (in_heads, False), (reversed_features, True)]
)
def test_derivatives_in_one_pass(fn: Any, mixes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are those in one direction at a time; where they would not be, that is seen."""

    def means(most: float) -> np.ndarray:
        monkeypatch.setattr("jax_lnfold.measurement.derivatives.MIXED", most)
        edits = regress(fn, PARAMS, X).plan.means
        assert edits
        return np.concatenate([edit.means for edit in edits])

    one_at_a_time, checked, unchecked = (means(most) for most in (-1.0, 0.05, np.inf))
    np.testing.assert_allclose(checked, one_at_a_time, rtol=1e-9)
    assert np.allclose(unchecked, one_at_a_time, rtol=1e-9) != mixes
