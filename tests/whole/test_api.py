"""The public functions as a user meets them: shapes, trees, transformations, plans."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_lnfold
from tests.helpers.contracts import check_contracts, fold_checked, relative_difference
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


def test_leaves_that_are_not_edited_are_the_same_objects() -> None:
    weights = Weights(normal(7, 12), normal(12, 2), normal(3), jnp.arange(4))
    folded = fold_checked(plain, weights, normal(2, 5, 7))
    assert [str(edit) for edit in folded.report.edits] == ["w centered along axis 1"]
    assert folded.params.unread is weights.unread
    assert folded.params.steps is weights.steps


def test_equal_signatures_in_other_precisions_are_not_mixed_up(tower: Any) -> None:
    apply, params, x = tower
    folded = jax_lnfold.fold(apply, params, x)
    with jax.enable_x64(False):
        single = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), folded.params)
        assert folded.apply(single, jnp.asarray(x, jnp.float32)).dtype == jnp.float32
    assert folded.apply(folded.params, x).dtype == jnp.float64


def test_shape_that_breaks_a_fact_raises() -> None:
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


def test_explicit_centering_has_its_price() -> None:
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


def test_sharded_leaves_stay_where_they_are() -> None:
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))
    leaves = {"w": ((6, 16), P("a", "b")), "c": ((16,), P("b")), "v": ((16, 4), P("b", None))}
    params = {k: jax.device_put(normal(*n), NamedSharding(mesh, s)) for k, (n, s) in leaves.items()}
    folded = fold_checked(
        lambda p, x: nn.standardize(x @ p["w"] + p["c"]) @ p["v"], params, normal(2, 5, 6)
    )
    assert folded.report.n_folded == 1
    for name, leaf in folded.params.items():
        assert leaf.sharding == params[name].sharding, name
    assert np.abs(np.mean(folded.params["w"], 1)).max() < 1e-15


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
