"""LayerNorms that do without a mean on request: measured against programs written without it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jax_lnfold
from jax_lnfold import FoldError, FoldPlan, TreeError, center_updates, verify
from jax_lnfold.plan.edits.drop import DropEdit
from tests.helpers.contracts import relative_difference, unbroken
from tests.helpers.derivative_rules import with_jvp

D, HIDDEN = 6, 7
MEAN: dict[str, Any] = {"approximate": {"mean"}}


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape) / 2 + 0.1)


def norm(p: Any, x: jax.Array, keep: bool = True) -> jax.Array:
    c = x - x.mean(-1, keepdims=True) if keep else x
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


def post_ln(params: Any, x: jax.Array, without: Collection[int] = ()) -> jax.Array:
    """The first LayerNorm reads a linear layer, and folds exactly."""
    x = norm(params["first"], x @ params["embed"])
    for i, p in enumerate(params["blocks"]):
        with jax.named_scope(f"block_{i}"):
            x = norm(p, x + branch(p, x), i not in without)
    return x @ params["head"]


PARAMS = {
    "embed": draw(3, D),
    "first": {"g": 1 + draw(D, seed=9) / 4, "s": draw(D, seed=8)},
    "blocks": [block(0), block(1), block(2)],
    "head": draw(D, 4, seed=3),
}
BATCHES = [draw(20, 4, 3, seed=i) for i in range(6)]
"""The fifth one is held out."""
HELD = BATCHES[4]


def fold(fn: Any = post_ln, params: Any = PARAMS, *inputs: Any, **options: Any) -> Any:
    """With all batches, unless others are given."""
    options = {"calibrate": BATCHES, **MEAN, **options}
    return jax_lnfold.fold(fn, params, *(inputs or (HELD,)), **options)


def error(got: Any, want: Any) -> float:
    got, want = np.asarray(got), np.asarray(want)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def left_out(folded: Any) -> list[str]:
    return [n.path for n in folded.report.norms if n.dropped]


@pytest.fixture(scope="module")
def some() -> Any:
    """A budget that two of three means fit in, with what logits say."""
    everything = fold(budget=math.inf)
    alone = sorted(everything.report.approximation.damages.values())
    return fold(budget=alone[1] * 1.5, logits=lambda y: y)


# --- what is left out, and what it does ----------------------------------------------------------


def test_the_program_is_that_without_the_means(some: Any) -> None:
    """The function on the edited tree is the original; the program is one with RMSNorms."""
    at = [i for i in range(3) if f"block_{i}" in left_out(some)]
    assert 0 < len(at) < 3
    assert [n.approximate for n in some.report.norms] == [False, *(i in at for i in range(3))]
    for x in (HELD, draw(5, 3, seed=70)):
        want = post_ln(PARAMS, x)
        assert relative_difference(post_ln(some.params, x), want) < 1e-12
        assert relative_difference(some(x), post_ln(some.params, x, at)) < 1e-12
        assert error(some(x), want) > 1e-6


def test_what_is_measured(some: Any) -> None:
    """Against the same by hand, on the batch that was held out."""
    told, want = some.report.approximation, post_ln(PARAMS, HELD)
    assert (told.fitted, told.held_out) == (5, 1)
    np.testing.assert_allclose(told.deviation, error(some(HELD), want), rtol=1e-6)
    assert told.deviation <= told.budget
    assert told.exact < 1e-14
    for i in range(3):
        alone = error(post_ln(some.params, HELD, [i]), want)
        np.testing.assert_allclose(told.damages[f"block_{i}"], alone, rtol=1e-6)
    p, q = (jax.nn.log_softmax(y) for y in (want, some(HELD)))
    divergence = (jnp.exp(p) * (p - q)).sum(-1).mean()
    np.testing.assert_allclose(told.divergence, divergence, rtol=1e-5)
    assert told.agreement == (want.argmax(-1) == some(HELD).argmax(-1)).mean()


def test_the_cheapest_go_first(some: Any) -> None:
    damages = some.report.approximation.damages
    dropped = {*left_out(some)}
    assert max(damages[n] for n in dropped) < min(damages[n] for n in damages.keys() - dropped)
    one_more = sorted(damages, key=damages.__getitem__)[: len(dropped) + 1]
    x = post_ln(some.params, HELD, [int(name[-1]) for name in one_more])
    assert error(x, post_ln(PARAMS, HELD)) > some.report.approximation.budget


def test_fitting_pays() -> None:
    """Of all means left out, less error than with centered layers, and those less than as given."""
    fitted, centered = fold(budget=math.inf), fold(budget=math.inf, calibrate=None)
    want = post_ln(PARAMS, BATCHES[5])
    plain = error(post_ln(PARAMS, BATCHES[5], range(3)), want)
    found = [error(f(BATCHES[5]), want) for f in (fitted, centered)]
    assert found[0] < found[1] / 2 < plain / 2
    assert {e.key_path[-4:] for e in centered.plan.means} == {"bias"}  # minus the mean of shifts
    assert centered.report.approximation.deviation is None
    assert "was not measured" in unbroken(centered.report)


def test_a_budget_of_a_cast() -> None:
    told = fold().report.approximation
    cast = jax.tree.map(lambda w: w.astype(jnp.bfloat16).astype(w.dtype), PARAMS)
    want = post_ln(PARAMS, HELD)
    np.testing.assert_allclose(told.budget, error(post_ln(cast, HELD), want), rtol=1e-9)
    assert told.default
    with pytest.raises(FoldError, match="budget: a cast of these weights to bfloat16"):
        fold(params=cast)


def test_no_budget_is_no_approximation() -> None:
    folded, plain = fold(budget=0), jax_lnfold.fold(post_ln, PARAMS, HELD)
    programs = [str(jax.make_jaxpr(f.apply)(f.params, HELD)) for f in (folded, plain)]
    assert programs[0] == programs[1]
    assert folded.plan.dropped == ()
    assert folded.report.approximation.damages
    assert "no mean is left out" in unbroken(folded.report)


def test_batches_that_are_held_out() -> None:
    told = fold(calibrate=BATCHES[:3], budget=0).report.approximation
    assert (told.fitted, told.held_out) == (2, 1)
    told = fold(calibrate=iter([BATCHES[0][:2]] * 10), budget=0).report.approximation
    assert (told.fitted, told.held_out) == (8, 2)


def test_outputs_are_taken_one_by_one() -> None:
    """A large output does not hide a small one."""

    def two(params: Any, x: jax.Array) -> Any:
        y = post_ln(params, x)
        return {"large": 1e6 + y * 0, "small": y, "kinds": y.argmax(-1)}

    told = fold(two, budget=math.inf).report.approximation
    one = fold(budget=math.inf).report.approximation
    np.testing.assert_allclose(told.deviation, one.deviation, rtol=1e-6)


def test_without_example_inputs_it_is_the_first_batch() -> None:
    folded = jax_lnfold.fold(post_ln, PARAMS, calibrate=BATCHES, budget=math.inf, **MEAN)
    assert folded.report.norms[0].shape == (20, 4, D)


# --- in loops, and next to explicit centerings ---------------------------------------------------


def in_loop(params: Any, x: jax.Array, keep: bool = True) -> jax.Array:
    def body(x: jax.Array, p: Any) -> tuple[jax.Array, None]:
        return jax.jit(lambda p, x: norm(p, x + branch(p, x), keep))(p, x), None

    return jax.lax.scan(body, x, params)[0]


def test_layers_of_a_loop() -> None:
    params = jax.tree.map(lambda *x: jnp.stack(x), *PARAMS["blocks"])
    batches = [draw(9, D, seed=i) for i in range(2)]
    folded = fold(in_loop, params, batches[1], calibrate=batches, budget=math.inf)
    want = in_loop(folded.params, batches[1], keep=False)
    assert relative_difference(folded(batches[1]), want) < 1e-12
    told = folded.report.approximation
    np.testing.assert_allclose([*told.damages.values()], told.deviation, rtol=1e-9)
    assert told.exact < 1e-14


def returns_stream(params: Any, x: jax.Array, keep: bool = True) -> Any:
    """The stream is centered explicitly, for three LayerNorms, and returned as it was."""
    start = x = jax.jit(jnp.sin)(x @ params["embed"])
    for p in params["blocks"]:
        x = x + branch(p, y := norm(p, x))
    return start, norm(params["first"], y + branch(params["blocks"][0], y), keep)


def test_explicit_centerings_and_what_is_returned() -> None:
    folded = fold(returns_stream, budget=math.inf)
    assert folded.report.n_inserted == 1
    assert folded.report.approximation.exact < 1e-14
    want = returns_stream(folded.params, HELD, keep=False)
    assert relative_difference(folded(HELD), want) < 1e-12
    assert folded.report.n_dropped == 1


# --- near misses: what keeps its mean ------------------------------------------------------------


def reads_mean(p: Any, x: jax.Array) -> Any:
    mean = x.mean(-1, keepdims=True)
    c = x - mean
    return p["g"] * c / jnp.sqrt(jnp.square(c).mean(-1, keepdims=True) + 1e-3) + mean


def returns_centered(p: Any, x: jax.Array) -> Any:
    c = x - x.mean(-1, keepdims=True)
    return c, p["g"] * c / jnp.sqrt(jnp.square(c).mean(-1, keepdims=True) + 1e-3)


def two_of_one_mean(p: Any, x: jax.Array) -> Any:
    c = x - x.mean(-1, keepdims=True)
    variance = jnp.square(c).mean(-1, keepdims=True)
    return p["g"] * c / jnp.sqrt(variance + 1e-3) + p["s"] * c / jnp.sqrt(variance + 0.5)


def returns_variance(p: Any, x: jax.Array) -> Any:
    c = x - x.mean(-1, keepdims=True)
    variance = jnp.square(c).mean(-1, keepdims=True)
    return p["g"] * c / jnp.sqrt(variance + 1e-3), variance


def returns_deviation(p: Any, x: jax.Array) -> Any:
    c = x - x.mean(-1, keepdims=True)
    deviation = jnp.sqrt(jnp.square(c).mean(-1, keepdims=True) + 1e-3)
    return p["g"] * c / deviation, deviation


def scales_the_input_too(p: Any, x: jax.Array) -> Any:
    """The input is divided by the deviation, with its mean."""
    c = x - x.mean(-1, keepdims=True)
    root = jax.lax.rsqrt(jnp.square(c).mean(-1, keepdims=True) + 1e-3)
    return p["g"] * c * root, x * root


def with_rule(p: Any, x: jax.Array) -> Any:
    return with_jvp(lambda x: norm(p, x))(x)


def over_devices(p: Any, x: jax.Array) -> Any:
    spec = jax.sharding.PartitionSpec()
    mesh = jax.make_mesh((2,), ("d",))
    return jax.shard_map(norm, mesh=mesh, in_specs=(spec, spec), out_specs=spec)(p, x)


def mean_by_product(p: Any, x: jax.Array) -> Any:
    c = x - x @ jnp.full((D, D), 1 / D)
    return p["g"] * c / jnp.sqrt(jnp.square(c).mean(-1, keepdims=True) + 1e-3)


TOO = "something else reads its mean or its deviation, too"
KEPT: dict[str, tuple[Callable[..., Any], str]] = {
    "mean": (reads_mean, TOO),
    "centered": (returns_centered, TOO),
    "shared": (two_of_one_mean, TOO),
    "variance": (returns_variance, TOO),
    "deviation": (returns_deviation, TOO),
    "input": (scales_the_input_too, TOO),
    "rule": (with_rule, "a derivative rule of its own"),
    "shard_map": (over_devices, "inside of a shard_map"),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_keeps_its_mean(name: str) -> None:
    """On an input that has one: exact, and the report says why."""
    fn, why = KEPT[name]
    p, x = PARAMS["blocks"][0], draw(5, D)
    for budget in (math.inf, 0.5):
        calibrate = None if budget == math.inf else [x, 2 * x]
        folded = fold(fn, p, x, calibrate=calibrate, budget=budget)
        assert not folded.plan.dropped
        assert relative_difference(folded(x), fn(p, x)) < 1e-14
        assert why in "".join(folded.report.approximation.kept.values())
    assert "Cannot do without a mean" in unbroken(folded.report)


def test_the_same_without_what_is_in_the_way_loses_it() -> None:
    p, x = PARAMS["blocks"][0], draw(5, D)
    folded = fold(norm, p, x, calibrate=None, budget=math.inf)
    assert relative_difference(folded(x), norm(p, x, keep=False)) < 1e-14
    assert error(folded(x), norm(p, x)) > 0.01


def test_exact_folds_that_rest_on_a_mean_stay_exact() -> None:
    """Without scale and shift the second LayerNorm folds, as the first one has made its input."""
    p, x = PARAMS["blocks"][0], draw(5, D)
    bare = {"g": 1.0, "s": 0.0}

    def fn(p: Any, x: jax.Array) -> jax.Array:
        y = norm(bare, x)
        return norm(bare, y + branch(p, y)) @ p["in"]

    folded = fold(fn, p, x, calibrate=None, budget=math.inf)
    assert [n.folded for n in folded.report.norms] == [False, True]
    assert not any(n.approximate for n in folded.report.norms)
    assert relative_difference(folded(x), fn(p, x)) < 1e-12
    (why,) = folded.report.approximation.kept.values()
    assert why == "other LayerNorms fold because it removes its mean"


# --- plans ---------------------------------------------------------------------------------------


def test_plans_say_what_is_left_out(some: Any) -> None:
    plan = FoldPlan.from_json(some.plan.to_json())
    assert plan == some.plan
    assert plan.version == 8
    with pytest.raises(FoldError, match=r"plan: leaves out the means of 2 .* plan.exact"):
        jax_lnfold.fold(post_ln, PARAMS, HELD, plan=plan, center=True)
    again = jax_lnfold.fold(post_ln, PARAMS, HELD, plan=plan, center=True, **MEAN)
    programs = [str(jax.make_jaxpr(f.apply)(f.params, HELD)) for f in (some, again)]
    assert programs[0] == programs[1]
    assert left_out(again) == left_out(some)
    assert "was not measured" in unbroken(again.report)
    exact = jax_lnfold.fold(post_ln, PARAMS, HELD, plan=plan.exact, center=True)
    assert relative_difference(exact(HELD), post_ln(PARAMS, HELD)) < 1e-12
    assert exact.plan.version == 7


def test_plans_in_other_programs(some: Any) -> None:
    """Of what is not there nothing is left out; nor of what something else reads there."""

    def one(params: Any, x: jax.Array) -> jax.Array:
        return norm(params["first"], x @ params["embed"])

    def also(params: Any, x: jax.Array) -> Any:
        x = norm(params["first"], x @ params["embed"])
        for i, p in enumerate(params["blocks"]):
            with jax.named_scope(f"block_{i}"):
                x = x + branch(p, x)
                means, x = x.mean(-1, keepdims=True), x
                c = x - means
                x = p["g"] * c / jnp.sqrt(jnp.square(c).mean(-1, keepdims=True) + 1e-3) + p["s"]
                x = x + 0 * means
        return x @ params["head"]

    for fn in (one, also):
        folded = jax_lnfold.fold(fn, PARAMS, HELD, plan=some.plan, center=True, **MEAN)
        assert left_out(folded) == []
        assert relative_difference(folded(HELD), fn(PARAMS, HELD)) < 1e-12


@pytest.mark.parametrize("name", ["", 3, None])
def test_broken_plans(some: Any, name: Any) -> None:
    from dataclasses import replace

    with pytest.raises(FoldError, match="is not the name of a LayerNorm"):
        replace(some.plan, dropped=(DropEdit(name),))


# --- training, models, keywords, verify ----------------------------------------------------------


def test_training_without_means() -> None:
    """All LayerNorms are RMSNorms, and what feeds them stays centered: drift is rounding."""
    x, y = jnp.concatenate(BATCHES), jnp.sin(jnp.concatenate(BATCHES)).sum(-1)
    folded = jax_lnfold.fold(post_ln, PARAMS, x, budget=math.inf, **MEAN)
    assert folded.report.n_folded == len(folded.report.norms) == 4
    tx = optax.chain(optax.adam(1e-2), center_updates(folded.plan))

    def loss(params: Any, fn: Any = folded.apply) -> jax.Array:
        return jnp.square(fn(params, x).sum(-1) - y).mean()

    def step(carry: Any, _: Any) -> Any:
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    start = folded.params, tx.init(folded.params)
    (params, state), losses = jax.jit(lambda c: jax.lax.scan(step, c, None, 60))(start)
    assert losses[-1] < losses[0] / 3
    assert state[1].drift <= 1
    assert folded.plan.is_centered(params)
    np.testing.assert_allclose(
        folded.apply(params, HELD), post_ln(params, HELD, range(3)), rtol=1e-9, atol=1e-9
    )


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, *, offset: jax.Array, double: bool = False) -> jax.Array:
        y = nn.Dense(6, param_dtype=float)(x) + offset
        y = jnp.sin(nn.LayerNorm(param_dtype=float)(y))
        y = y + nn.Dense(6, param_dtype=float)(y)
        return nn.LayerNorm(param_dtype=float)(y) * (2 if double else 1)


def test_keywords() -> None:
    x, offset = draw(4, 5), draw(6)
    variables = Linen().init(jax.random.key(0), x, offset=offset)
    folded = jax_lnfold.fold(
        Linen(), variables, x, calibrate=[x, x + 1], budget=1.0, offset=offset, double=True, **MEAN
    )
    want = Linen().apply(variables, x + 1, offset=offset, double=True)
    got = folded(x + 1, offset=offset, double=True)
    np.testing.assert_allclose(error(got, want), folded.report.approximation.deviation, rtol=1e-6)
    assert folded.report.n_dropped == 1


class Nnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(6, 7, rngs=rngs, param_dtype=float)
        self.down = nnx.Linear(7, 6, rngs=rngs, param_dtype=float)
        self.norm = nnx.LayerNorm(6, rngs=rngs, param_dtype=float)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(x + self.down(jnp.sin(self.up(x))))


class Eqx(eqx.Module):
    up: eqx.nn.Linear
    norm: eqx.nn.LayerNorm

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.norm(x + jnp.sin(self.up(x)))


@pytest.mark.parametrize("kind", ["nnx", "equinox"])
def test_models(kind: str) -> None:
    if kind == "nnx":
        model, batches = Nnx(nnx.Rngs(0)), [draw(30, 6, seed=i) for i in range(3)]
    else:
        keys, batches = jax.random.split(jax.random.key(0)), [draw(6, seed=i) for i in range(3)]
        model = Eqx(eqx.nn.Linear(6, 6, key=keys[0]), eqx.nn.LayerNorm(6))
    x = batches[2]
    options = {"calibrate": batches, "logits": lambda y: y, **MEAN}
    folded = jax_lnfold.fold(model, x, budget=10.0, **options)
    told = folded.report.approximation
    assert folded.report.n_dropped == 1
    np.testing.assert_allclose(error(folded(x), model(x)), told.deviation, rtol=1e-4)
    assert 0 <= told.agreement <= 1
    exact = jax_lnfold.fold(model, budget=0.0, **options)  # inputs are those of a batch
    assert error(exact(x), model(x)) < 1e-6


def test_verify(some: Any) -> None:
    found = verify(post_ln, PARAMS, some, BATCHES[5])
    assert found.left_out == 2
    np.testing.assert_allclose(
        found.deviation, error(some(BATCHES[5]), post_ln(PARAMS, BATCHES[5]))
    )
    words = (
        f"; the mean left out of 2 LayerNorms, relative error of the outputs {found.deviation:.2g}"
    )
    assert words in unbroken(found)
    plain = verify(post_ln, PARAMS, jax_lnfold.fold(post_ln, PARAMS, HELD), HELD)
    assert "left out" not in str(plain)


# --- bad input -----------------------------------------------------------------------------------

NAN = [BATCHES[0], HELD.at[0, 0].set(jnp.nan)]
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no batches": ({"calibrate": None}, "calibrate: no batch; pass two or more"),
    "empty": ({"calibrate": []}, "calibrate: no batch; pass two or more"),
    "one batch": ({"calibrate": BATCHES[:1]}, "calibrate: one batch only; pass two or more"),
    "array": ({"calibrate": BATCHES[0]}, "calibrate: a .* is no list of batches"),
    "number": ({"calibrate": 3}, "calibrate: no list of batches"),
    "other shape": (
        {"calibrate": [BATCHES[0], BATCHES[1][:3]]},
        r"calibrate\[1\]: input '0' is \(3, 4, 3\) float64",
    ),
    "other leaf": ({"calibrate": [BATCHES[0], "x"]}, r"calibrate\[1\]: leaf .* is a str"),
    "other dtype than the example": (
        {"calibrate": [x.astype("f4") for x in BATCHES[:2]]},
        "calibrate: batches have another structure",
    ),
    "other structure than the example": (
        {"calibrate": [(x, x) for x in BATCHES[:2]]},
        "calibrate: batches have another structure",
    ),
    "nan": ({"calibrate": NAN}, "calibrate: the outputs of apply_fn for a batch are NaN"),
    "nan where means are fitted": (
        {"calibrate": NAN[::-1]},
        r"calibrate: in a batch, what the LayerNorm .* reads is infinite or NaN, so that no means",
    ),
    "negative": ({"budget": -1e-9}, "budget: -1e-09 is no relative error"),
    "nan budget": ({"budget": math.nan}, "budget: nan is no relative error"),
    "text": ({"budget": "1%"}, "budget: '1%' is no relative error"),
    "bool": ({"budget": True}, "budget: True is no relative error"),
    "logits": ({"logits": 3}, "logits: a int is no function"),
    "logits fail": ({"logits": lambda y: y["no"]}, r"logits: failed on the outputs"),
    "logits scalar": ({"logits": lambda y: y.sum()}, "logits: picks no real array"),
    "not asked": ({"approximate": ()}, 'calibrate: is for means .* approximate={"mean"}'),
    "not asked for a budget": (
        {"approximate": {"dropout"}, "calibrate": None, "budget": 1.0},
        "budget: is for means",
    ),
    "untie": ({"untie": True}, "untie: not together with"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    options, words = BAD[name]
    with pytest.raises((FoldError, TreeError), match=words):
        fold(**{"budget": 1.0, **options})


def test_functions_that_do_not_fit() -> None:
    x = draw(4, 6)
    with pytest.raises(FoldError, match="apply_fn: returns no floating-point array"):
        fold(lambda p, x: norm(p, x).argmax(-1), PARAMS["blocks"][0], x, calibrate=[x, x])
    with pytest.raises(FoldError, match="example_inputs: missing"):
        jax_lnfold.fold(norm, PARAMS["blocks"][0], budget=math.inf, **MEAN)
    with pytest.raises(FoldError, match='approximate: "mean" is for fold of one function'):
        jax_lnfold.fold({"f": norm}, PARAMS["blocks"][0], {"f": x}, budget=math.inf, **MEAN)
    for look in (jax_lnfold.analyze, jax_lnfold.plan_fold):
        with pytest.raises(FoldError, match='approximate: "mean" is for fold of one function'):
            look(norm, PARAMS["blocks"][0], x, **MEAN)


def test_norms_over_one_element() -> None:
    """It has no mean to leave out: the LayerNorm is none."""
    p = {"g": draw(1), "s": draw(1)}
    x = draw(4, 6)
    folded = fold(lambda p, x: norm(p, x[:, :1]), p, x, calibrate=[x, x], budget=1.0)
    assert folded.report.norms == ()
    assert folded.plan.dropped == ()
