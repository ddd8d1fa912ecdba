"""The public functions as a user meets them: shapes, trees, transformations, plans."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import FrozenDict

import jax_lnfold
from jax_lnfold import FoldPlan
from tests.helpers.contracts import check_contracts, fold_checked, relative_difference, snapshot
from tests.models.zoo import perturb


class Tower(nn.Module):
    """Pre-LN MLP blocks on a stream, with a head on the sum of tokens."""

    train: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(12)(x)
        for _ in range(2):
            x = x + nn.Dense(12)(nn.gelu(nn.Dense(20)(nn.LayerNorm()(x))))
        return nn.Dense(3)(nn.LayerNorm()(x).sum(1))


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape))


@pytest.fixture(scope="module")
def tower() -> tuple[Callable[..., Any], Any, jax.Array]:
    model, x = Tower(), normal(2, 5, 7)
    return model.apply, perturb(model.init(jax.random.key(0), x)), x


def test_every_signature_is_traced_once(tower: Any) -> None:
    apply, params, x = tower
    traces = []

    def counted(params: Any, x: jax.Array) -> jax.Array:
        traces.append(x.shape)
        return apply(params, x)

    folded = jax_lnfold.fold(counted, params, x)
    run = folded.apply
    for _ in range(20):
        run(folded.params, x)
        run(folded.params, normal(3, 4, 7))
    assert traces == [(2, 5, 7), (3, 4, 7)]
    jax.jit(run)(folded.params, x)
    assert len(traces) == 2
    run(folded.params, x.astype(jnp.float32))
    assert len(traces) == 3


def test_lazy_fold_analyses_on_the_first_call(tower: Any) -> None:
    apply, params, x = tower
    folded = jax_lnfold.fold(apply, params)
    with pytest.raises(jax_lnfold.NotAnalysedError, match=r"params: .*folded\(\*inputs\)"):
        _ = folded.params
    assert relative_difference(folded(x), apply(params, x)) < 1e-12
    assert folded.report.n_folded == 3
    check_contracts(apply, params, folded, normal(1, 6, 7))


def test_gradients_and_vmap(tower: Any) -> None:
    apply, params, x = tower
    folded = jax_lnfold.fold(apply, params, x)

    def loss(run: Callable[..., Any], params: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(run(params, x)))

    want = jax.grad(partial(loss, apply), argnums=1)(params, x)
    got = jax.jit(jax.grad(partial(loss, folded.apply), argnums=1))(folded.params, x)
    assert relative_difference(got, want) < 1e-11

    # As a function of unedited parameters the two are one: so are their derivatives.
    def through_plan(params: Any, x: jax.Array) -> Any:
        return folded.apply(folded.plan.center(params), x)

    want = jax.grad(partial(loss, apply))(params, x)
    got = jax.grad(partial(loss, through_plan))(params, x)
    assert relative_difference(got, want) < 1e-10

    batch = normal(4, 2, 5, 7)
    got = jax.vmap(folded.apply, (None, 0))(folded.params, batch)
    assert relative_difference(got, jax.vmap(apply, (None, 0))(params, batch)) < 1e-12


def test_plan_edits_other_trees_of_the_model(tower: Any) -> None:
    apply, params, x = tower
    folded = jax_lnfold.fold(apply, params, x)
    newer = perturb(params, seed=5)
    before = snapshot(newer)
    plan = FoldPlan.from_json(folded.plan.to_json())
    assert plan == folded.plan
    for center in (plan.center, jax.jit(plan.center)):
        edited = center(newer)
        assert relative_difference(folded.apply(edited, x), apply(newer, x)) < 1e-12
        assert relative_difference(apply(edited, x), apply(newer, x)) < 1e-12
        assert relative_difference(center(edited), edited) < 1e-14, "centering is a projection"
    assert all(map(np.array_equal, jax.tree.leaves(newer), jax.tree.leaves(before)))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"version": 99}', '{"version": 1}'])
def test_broken_plans_are_refused(text: str) -> None:
    with pytest.raises(jax_lnfold.PlanFormatError, match="text: "):
        FoldPlan.from_json(text)


def test_wrong_leaf_shape_is_refused(tower: Any) -> None:
    apply, params, x = tower
    folded = jax_lnfold.fold(apply, params, x)
    wide = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), folded.params)
    for use in (folded.plan.center, lambda tree: folded.apply(tree, x)):
        with pytest.raises(jax_lnfold.TreeError, match=r"params: leaf '.*' has shape"):
            use(wide)


@jax.tree_util.register_dataclass
@dataclass
class Weights:
    w: jax.Array
    v: jax.Array
    unread: jax.Array
    steps: jax.Array


def plain(params: Any, x: jax.Array) -> jax.Array:
    s = x @ params.w
    s = s - s.mean(-1, keepdims=True)
    return (s / jnp.sqrt(jnp.mean(s * s, -1, keepdims=True) + 1e-5)) @ params.v


def test_trees_of_every_kind(tower: Any) -> None:
    apply, params, x = tower
    frozen = fold_checked(apply, FrozenDict(params), x)
    assert isinstance(frozen.params, FrozenDict)
    weights = Weights(normal(7, 12), normal(12, 2), normal(3), jnp.arange(4))
    folded = fold_checked(plain, weights, x)
    assert [str(edit) for edit in folded.report.edits] == ["w centered along axis 1"]
    assert folded.params.unread is weights.unread
    assert folded.params.steps is weights.steps

    graph, state = nnx.split(
        nnx.Sequential(nnx.Linear(7, 12, rngs=nnx.Rngs(0)), nnx.LayerNorm(12, rngs=nnx.Rngs(1)))
    )
    state = perturb(state)
    folded = fold_checked(lambda state, x: nnx.merge(graph, state)(x), state, x)
    assert folded.report.n_folded == 1
    assert isinstance(folded.params, type(state))


def test_numpy_trees_stay_numpy(tower: Any) -> None:
    apply, params, x = tower
    host = jax.tree.map(np.asarray, params)
    folded = fold_checked(apply, host, x)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(folded.params))


def test_equal_signatures_in_other_precisions_are_not_mixed_up(tower: Any) -> None:
    apply, params, x = tower
    folded = jax_lnfold.fold(apply, params, x)
    with jax.enable_x64(False):
        single = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), folded.params)
        assert folded.apply(single, jnp.asarray(x, jnp.float32)).dtype == jnp.float32
    assert folded.apply(folded.params, x).dtype == jnp.float64


def test_shape_that_breaks_a_fact_raises(tower: Any) -> None:
    """A function that leaks its stream for long inputs notices the edit there."""

    def leaky(params: Any, x: jax.Array) -> Any:
        stream = x @ params["w"]
        out = nn.standardize(stream) @ params["v"]
        return (out, stream) if x.shape[1] > 5 else (out, out)

    params = {"w": normal(7, 12), "v": normal(12, 2)}
    folded = fold_checked(leaky, params, normal(2, 5, 7))
    assert folded.report.n_folded == 1
    check_contracts(leaky, params, folded, normal(3, 4, 7))
    with pytest.raises(jax_lnfold.PlanMismatchError, match=r"'w' would be noticed: `dot_general`"):
        folded.apply(folded.params, normal(2, 6, 7))


def test_donated_leaves_give_up_their_memory(tower: Any) -> None:
    apply, params, x = tower
    mine = jax.tree.map(jnp.copy, params)
    want = apply(params, x)
    folded = jax_lnfold.fold(apply, mine, x, donate=True)
    assert relative_difference(folded.apply(folded.params, x), want) < 1e-12
    edited = {edit.key_path for edit in folded.report.edits}
    flat = jax.tree_util.tree_flatten_with_path(mine)[0]
    deleted = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in flat
        if leaf.is_deleted()
    }
    assert deleted == edited


def test_explicit_centering_has_its_price(tower: Any) -> None:
    """Two norms of a data stream: worth one centering below a cost of 2, a tie at 2."""

    def apply(params: Any, x: jax.Array) -> jax.Array:
        return nn.standardize(x) @ params["a"] + nn.standardize(x) @ params["b"]

    params = {"a": normal(7, 3), "b": normal(7, 3) + 1}
    x = normal(2, 5, 7)
    for cost, counts in ((1.9, (2, 1)), (2.0, (0, 0)), (2.1, (0, 0))):
        report = fold_checked(apply, params, x, explicit_cost=cost).report
        assert (report.n_folded, report.n_inserted) == counts


def test_nothing_is_inserted_inside_a_derivative_rule() -> None:
    """The rule of `half` would compute uncentered values while differentiating."""

    @jax.custom_jvp
    def half(x: jax.Array) -> jax.Array:
        return jnp.tanh(x) / 2

    half.defjvp(lambda p, t: (half(*p), (1 - jnp.tanh(p[0]) ** 2) * t[0] / 2))

    def apply(params: Any, x: jax.Array) -> jax.Array:
        s = half(x)
        return sum(nn.standardize(s) @ params[k] for k in "abc")

    params = {k: normal(7, n) for k, n in zip("abc", (1, 1, 1), strict=True)}
    x = normal(2, 5, 7)
    folded = fold_checked(apply, params, x)
    assert (folded.report.n_folded, folded.report.n_inserted) == (0, 0)
    grads = [
        jax.grad(lambda x, f=f, p=p: jnp.sum(jnp.cos(f(p, x))))(x)
        for f, p in ((apply, params), (folded.apply, folded.params))
    ]
    assert relative_difference(grads[1], grads[0]) < 1e-12


def test_verify_reports_both_errors(tower: Any) -> None:
    apply, params, x = tower
    single = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    x = x.astype(jnp.float32)
    folded = jax_lnfold.fold(apply, single, x)
    check = jax_lnfold.verify(apply, single, folded, x)
    assert 0 < check.original_error < 1e-4 * check.scale
    assert 0 < check.folded_error < 1e-4 * check.scale
    assert check.difference <= check.original_error + check.folded_error
    folded._params = jax.tree.map(lambda leaf: leaf + 0.1, folded.params)
    assert jax_lnfold.verify(apply, single, folded, x).folded_error > 1e-3


def test_sharded_leaves_stay_where_they_are() -> None:
    """Eight simulated devices need a process of their own."""
    script = """
        import jax, jax.numpy as jnp, numpy as np
        from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
        from flax import linen as nn
        import jax_lnfold

        mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))
        place = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
        rng = np.random.default_rng(0)
        params = {
            "w": place(rng.standard_normal((6, 16)), "a", "b"),
            "c": place(rng.standard_normal(16), "b"),
            "v": place(rng.standard_normal((16, 4)), "b", None),
        }
        x = rng.standard_normal((2, 5, 6))
        apply = lambda p, x: nn.standardize(x @ p["w"] + p["c"]) @ p["v"]
        folded = jax_lnfold.fold(apply, params, x)
        assert folded.report.n_folded == 1, folded.report
        for name, leaf in folded.params.items():
            assert leaf.sharding == params[name].sharding, name
        np.testing.assert_allclose(folded(x), apply(params, x), rtol=1e-12, atol=1e-12)
        assert np.abs(np.mean(folded.params["w"], 1)).max() < 1e-15
        print("checked on", len(jax.devices()))
    """
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_ENABLE_X64": "1"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**os.environ, **flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "checked on 8", done.stderr[-2000:]


def test_report_reads_well(tower: Any) -> None:
    apply, params, x = tower

    def leaks(params: Any, x: jax.Array) -> Any:
        y = apply(params["tower"], x)
        s = x @ params["w"]
        return y, nn.standardize(s), s.argmax(-1), jnp.tanh(s)

    report = jax_lnfold.analyze(leaks, {"tower": params, "w": normal(7, 12)}, x)
    text = str(report)
    assert "Tower/LayerNorm_{0-2} x3" in text
    assert "3 of 4 LayerNorms folded, 6 parameters centered (" in text
    (left,) = (norm for norm in report.norms if not norm.folded)
    assert "`tanh` (test_api.py:" in left.reason
    assert (left.axes, left.shape, left.count) == ((2,), (2, 5, 12), 1)
    assert "No LayerNorm found" in str(jax_lnfold.analyze(lambda p, x: x @ p, normal(7, 3), x))


@pytest.mark.parametrize("numbers", [np, jnp], ids=["numpy", "computed"])
def test_constant_positions_are_centered_for_nothing(numbers: Any) -> None:
    """Sinusoids cost less than the mean of one small LayerNorm, also if the program makes them."""

    def apply(params: Any, x: jax.Array) -> jax.Array:
        angles = numbers.arange(40)[:, None] / 10.0 ** numbers.arange(12)
        stream = (x @ params["w"] + numbers.sin(angles))[:, :2]
        return nn.standardize(stream) @ params["v"]

    report = fold_checked(apply, {"w": normal(7, 12), "v": normal(12, 2)}, normal(1, 40, 7)).report
    assert (report.n_folded, report.n_inserted, report.constants) == (1, 0, 1)
    summary = " ".join(str(report).split())
    assert "1 constant centered, 0 explicit centerings inserted." in summary
    assert "To do without" not in summary
    assert "inserted" not in {event.kind for event in report.events}


@pytest.mark.parametrize("given", ["parameter", "key"])
def test_what_a_call_computes_is_no_constant(given: str) -> None:
    """Positions from a parameter, or from a key that is an input, are centered in every call."""

    def apply(params: Any, x: jax.Array, key: jax.Array) -> jax.Array:
        positions = jnp.sin(params["f"]) if given == "parameter" else jax.random.normal(key, (4, 6))
        return nn.standardize(x @ params["w"] + positions) @ params["v"]

    params = {"w": normal(7, 6), "v": normal(6, 2), "f": normal(4, 6)}
    report = fold_checked(apply, params, normal(3, 4, 7), jax.random.key(0)).report
    assert (report.n_folded, report.n_inserted, report.constants) == (1, 1, 0)
    assert "1 explicit centering inserted" in " ".join(str(report).split())


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint], ids=["", "jit", "remat"])
def test_constants_of_the_program_are_centered(wrap: Callable[..., Any]) -> None:
    table = np.random.default_rng(0).standard_normal((5, 12))
    key = jax.random.key(0)

    def body(params: Any, x: jax.Array) -> jax.Array:
        noise = jax.random.normal(key, (5, 1))
        return nn.standardize((x @ params["w"]) * noise + table) @ params["v"]

    before = table.copy()
    params = {"w": normal(7, 12), "v": normal(12, 2)}
    report = fold_checked(wrap(body), params, normal(2, 5, 7)).report
    assert (report.n_folded, report.n_inserted, len(report.edits)) == (1, 0, 1)
    assert report.constants == 1
    assert np.array_equal(table, before)


def over_all_tokens(params: Any, x: jax.Array) -> jax.Array:
    return nn.standardize(x @ params["w"], axis=(1, 2)) @ params["v"]


def over_features(params: Any, x: jax.Array) -> jax.Array:
    return nn.standardize(x @ params["w"] + params["p"][: x.shape[1]]) @ params["v"]


@pytest.mark.parametrize("apply", [over_all_tokens, over_features])
def test_a_plan_made_at_length_one_is_proved_at_others(apply: Callable[..., Any]) -> None:
    """One token's mean is that of all tokens: only where it is not, other lengths are refused."""
    params = {"w": normal(7, 12), "v": normal(12, 2), "p": normal(9, 12)}
    folded = fold_checked(apply, params, normal(2, 1, 7))
    assert folded.report.n_folded == 1
    longer = normal(3, 5, 7)
    if apply is over_all_tokens:
        with pytest.raises(jax_lnfold.PlanMismatchError, match=r"'w' would be noticed"):
            folded(longer)
    else:
        assert relative_difference(folded(longer), apply(params, longer)) < 1e-12


def with_jvp_rule(f: Callable[..., Any]) -> Callable[..., Any]:
    ruled = jax.custom_jvp(f)
    ruled.defjvp(lambda p, t: (ruled(*p), t[0]))
    return ruled


def with_vjp_rule(f: Callable[..., Any]) -> Callable[..., Any]:
    ruled = jax.custom_vjp(f)
    ruled.defvjp(lambda x: (f(x), None), lambda _, g: (g,))
    return ruled


@pytest.mark.parametrize("ruled", [with_jvp_rule, with_vjp_rule])
def test_constant_that_a_derivative_rule_reads_is_left_alone(ruled: Callable[..., Any]) -> None:
    table = np.random.default_rng(0).standard_normal((5, 12))
    add_table = ruled(lambda x: x + table)

    def apply(params: Any, x: jax.Array) -> jax.Array:
        return nn.standardize(add_table(x @ params["w"])) @ params["v"]

    params, x = {"w": normal(7, 12), "v": normal(12, 2)}, normal(2, 5, 7)
    folded = fold_checked(apply, params, x)
    assert (folded.report.n_folded, folded.report.n_inserted) == (0, 0)
    want, got = (
        jax.value_and_grad(lambda x, f=f, p=p: jnp.sum(jnp.sin(f(p, x))))(x)
        for f, p in ((apply, params), (folded.apply, folded.params))
    )
    assert relative_difference(got, want) < 1e-12


def test_opaque_operations_are_counted() -> None:
    """Callbacks and primitives of others; those known to be nonlinear are no mystery."""
    strange = jax.extend.core.Primitive("strange")
    strange.def_impl(jnp.sin)
    strange.def_abstract_eval(lambda s: s)

    def host(s: jax.Array) -> jax.Array:
        return jax.pure_callback(np.sin, jax.ShapeDtypeStruct(s.shape, s.dtype), s)

    def apply(w: jax.Array, x: jax.Array) -> Any:
        s = x @ w
        known = jnp.sort(s).max() + jnp.argmax(jnp.tanh(s))
        return jax.nn.standardize(strange.bind(strange.bind(s)) + host(s)) + known

    w, x = jnp.ones((7, 12)), jnp.ones((2, 5, 7))
    report = jax_lnfold.analyze(apply, w, x)
    assert report.opaque == {"strange": 1, "pure_callback": 1}
    assert "Opaque operations met: strange (1), pure_callback (1)." in str(report)
    assert jax_lnfold.analyze(lambda w, x: jax.nn.standardize(jnp.tanh(x @ w)), w, x).opaque == {}
