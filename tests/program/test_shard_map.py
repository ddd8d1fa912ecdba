"""Programs written per device: collectives, feature-sharded LayerNorms, tensor parallel models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.extend.core import Literal, jaxpr_as_fun
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jax_lnfold
from jax_lnfold.program.devices import collect, per_device, spread
from tests.helpers.contracts import (
    check_contracts,
    count_equations,
    counts,
    fold_checked,
    relative_difference,
    removed_sums,
)

AXES = ("data", "model")
LANES = (("data", 2), ("model", 4))
MESH = jax.make_mesh((2, 4), AXES, axis_types=(AxisType.Auto,) * 2)
RNG = np.random.default_rng(0)


def draw(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.standard_normal(shape) / 2 + 0.1)


Body = Callable[..., Any]
GRID = draw(6, 24)
BOTH = P("data", "model")

# name: (what a device does, layout of the operand, layout of the result)
PER_DEVICE: dict[str, tuple[Body, Any, Any]] = {
    "psum": (lambda x: jax.lax.psum(x, "model"), BOTH, P("data", None)),
    "psum of all": (lambda x: jax.lax.psum(x, AXES) * 2, BOTH, P()),
    "pmean": (lambda x: jax.lax.pmean(x, "data"), BOTH, P(None, "model")),
    "pmax": (lambda x: jax.lax.pmax(x, "model"), BOTH, P("data", None)),
    "pmin of all": (lambda x: jax.lax.pmin(x, AXES), BOTH, P()),
    "all_gather": (lambda x: jax.lax.all_gather(x, "data", axis=1).sum(0), BOTH, BOTH),
    "all_gather tiled": (
        lambda x: jax.lax.all_gather(x, ("model", "data"), axis=0, tiled=True).sum(0),
        BOTH,
        P(("data", "model")),
    ),
    "psum_scatter": (
        lambda x: jax.lax.psum_scatter(x.reshape(3, 4, 6), "model", scatter_dimension=1),
        P("data", None),
        BOTH,
    ),
    "psum_scatter tiled": (
        lambda x: jax.lax.psum_scatter(x, ("model", "data"), scatter_dimension=1, tiled=True),
        P(None, None),
        P(None, ("model", "data")),
    ),
    "ppermute": (
        lambda x: jax.lax.ppermute(x, "model", [(0, 1), (1, 2), (2, 3), (3, 0)]),
        BOTH,
        BOTH,
    ),
    "all_to_all": (lambda x: jax.lax.all_to_all(x, "data", 1, 0, tiled=True), BOTH, BOTH),
    "axis_index": (lambda x: x.T + jax.lax.axis_index("model"), BOTH, P("model", "data")),
    "local": (
        lambda x: jnp.where(x > 0, x @ x.T @ x, 1.0)[:, None].sum(1) - jnp.float64(2),
        BOTH,
        BOTH,
    ),
}


@pytest.mark.parametrize(("body", "before", "after"), PER_DEVICE.values(), ids=PER_DEVICE)
def test_lanes_are_the_devices(body: Body, before: Any, after: Any) -> None:
    """Every operation on all lanes at once computes what the devices do."""
    run = jax.shard_map(body, mesh=MESH, in_specs=(before,), out_specs=after)
    (eqn,) = jax.make_jaxpr(run)(GRID).eqns
    inner = eqn.params["jaxpr"]
    values = dict(
        zip(inner.invars, jaxpr_as_fun(spread(jax.typeof(GRID), before, LANES))(GRID), strict=True)
    )
    for e in inner.eqns:
        closed = per_device(e, LANES)
        assert closed is not None, e.primitive
        operands = [values[a] for a in e.invars if not isinstance(a, Literal)]
        values.update(zip(e.outvars, jaxpr_as_fun(closed)(*operands), strict=True))
    shards = values[inner.outvars[0]]
    closed, rows = collect(jax.typeof(shards), after, LANES)
    (whole,) = jaxpr_as_fun(closed)(shards)
    want = np.asarray(run(GRID))
    for row in np.asarray(whole).reshape(-1, *want.shape):
        np.testing.assert_allclose(row, want, rtol=1e-12)
    assert whole.ndim == want.ndim + rows


D, H = 12, 8
PARAMS = {
    "embed": draw(5, D),
    "bias": draw(D),
    "scale": draw(2, D),
    "up": draw(2, D, H),
    "down": draw(2, H, D),
}
INPUT = draw(6, 3, 5)


def one_pass(x: jax.Array, axes: Any = "model") -> jax.Array:
    """LayerNorm over a feature axis spread over devices: local sums, then a `psum`."""
    count = x.shape[-1] * (4 if axes == "model" else 2)
    total, squares = jax.lax.psum((x.sum(-1), (x * x).sum(-1)), axes)
    mean = total / count
    root = jax.lax.rsqrt(squares / count - mean * mean + 1e-6)
    return (x - mean[..., None]) * root[..., None]


def two_pass(x: jax.Array, axes: Any = "model") -> jax.Array:
    centered = x - jax.lax.pmean(x.mean(-1, keepdims=True), axes)
    variance = jax.lax.pmean((centered**2).mean(-1, keepdims=True), axes)
    return centered / jnp.sqrt(variance + 1e-6)


BATCH = P("data")


def sharded(body: Body, specs: Any, out: Any, x: Any = BATCH, **options: Any) -> Body:
    """The jitted function of (params, x) that runs `body` on every device."""
    return jax.jit(jax.shard_map(body, mesh=MESH, in_specs=(specs, x), out_specs=out, **options))


# The stream's features are spread over the mesh axis `model`, and so is every writer's output.
FEATURES = {
    "embed": P(None, "model"),
    "bias": P("model"),
    "scale": P(None, "model"),
    "up": P(None, "model", None),
    "down": P(None, None, "model"),
}


def after_psum(then: Body) -> Body:
    """Hidden units from what the features of each device contribute to them."""
    return lambda part: then(jax.lax.psum(part, "model"))


SUMMED_GELU = after_psum(jax.nn.gelu)


def feature_sharded(norm: Body, hidden: Body = SUMMED_GELU, **options: Any) -> Body:
    def body(p: Any, x: jax.Array) -> jax.Array:
        s = x @ p["embed"] + p["bias"]
        for i in range(2):
            s = s + hidden((norm(s) * p["scale"][i]) @ p["up"][i]) @ p["down"][i]
        return norm(s)

    return sharded(body, FEATURES, P("data", None, "model"), **options)


def count_psums(fn: Body, *args: Any) -> int:
    return sum(count_equations(name, fn, *args) for name in ("psum", "psum_invariant"))


def removed_psums(apply: Body, params: Any, folded: jax_lnfold.Folded, x: Any) -> int:
    return count_psums(apply, params, x) - count_psums(folded.apply, folded.params, x)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("norm", [one_pass, two_pass])
def test_a_feature_sharded_norm_loses_its_psum(norm: Body, check_vma: bool) -> None:
    apply = feature_sharded(norm, check_vma=check_vma)
    folded = fold_checked(apply, PARAMS, INPUT)
    report = folded.report
    assert counts(report) == (3, 3, 0)
    assert {(n.shape, n.axes, n.mesh_axes) for n in report.norms} == {((3, 3, 3), (2,), ("model",))}
    assert "2, model" in str(report)
    assert {str(e) for e in report.edits} == {
        "embed centered along axis 1",
        "bias centered along axis 0",
        "down centered along axis 2",
    }
    for x in (INPUT, draw(2, 7, 5)):
        check_contracts(apply, PARAMS, folded, x)
        assert removed_psums(apply, PARAMS, folded, x) == 3


# All devices of a row have the same hidden units, so that `down` writes the stream as one matrix.
SAME_UNITS: dict[str, Body] = {
    "softmax": after_psum(jax.nn.softmax),
    "reduce_max": after_psum(lambda h: h - h.max(-1, keepdims=True)),
    "reduce_max of all": after_psum(lambda h: h - h.max()),
    "reduce_min": after_psum(lambda h: h / (1 + h.min(-1, keepdims=True) ** 2)),
    "reduce_prod": after_psum(lambda h: h * h.prod(-1, keepdims=True)),
    "reduce_or": after_psum(lambda h: jnp.where((h > 1).any(-1, keepdims=True), h, -h)),
    "reduce_and": after_psum(lambda h: jnp.where((h > -1).all(-1, keepdims=True), h, -h)),
    "argmax": after_psum(lambda h: jax.nn.one_hot(h.argmax(-1), H, dtype=h.dtype)),
    "argmin": after_psum(lambda h: h * (1 + h.argmin(-1, keepdims=True))),
    "pmax": lambda part: jnp.tanh(jax.lax.pmax(part, "model")),
    "pmax of other devices": after_psum(
        lambda h: h - jax.lax.pmax(h.max(-1, keepdims=True), "data")
    ),
    "pmin": lambda part: (
        jax.lax.psum(part, "model") - jax.lax.pmin(part.max(-1, keepdims=True), "model")
    ),
}
# Near misses: every device multiplies its columns of `down` by hidden units of its own.
OWN_UNITS: dict[str, Body] = {
    "softmax": jax.nn.softmax,
    "reduce_max": lambda part: jax.lax.psum(part, "model") - part.max(-1, keepdims=True),
    "reduce_or": lambda part: jnp.where(
        (part > 0.3).any(-1, keepdims=True), jax.lax.psum(part, "model"), 1.0
    ),
    "argmax": lambda part: jax.nn.one_hot(part.argmax(-1), H, dtype=part.dtype),
    "softmax by device": after_psum(
        lambda h: jax.nn.softmax(h * jax.lax.axis_index("model").astype(h.dtype))
    ),
    "psum of other devices": lambda part: jax.nn.softmax(jax.lax.psum(part, "data")),
    "pmax of other devices": lambda part: (
        jax.lax.psum(part, "model") - jax.lax.pmax(part.max(), "data")
    ),
}


@pytest.mark.parametrize("name", SAME_UNITS)
def test_reduced_alike_on_all_devices(name: str) -> None:
    """What a softmax subtracts is the same on devices that have the same scores."""
    apply = feature_sharded(two_pass, SAME_UNITS[name])
    report = fold_checked(apply, PARAMS, INPUT).report
    assert counts(report) == (3, 3, 0)
    assert "down centered along axis 2" in {str(e) for e in report.edits}


def centered(*names: str) -> Any:
    """The parameters with some of them centered along their features, whoever notices."""
    return PARAMS | {k: PARAMS[k] - PARAMS[k].mean(-1, keepdims=True) for k in names}


def flax_norm(s: jax.Array) -> jax.Array:
    """Both of its sums travel in one array."""
    norm = nn.LayerNorm(axis_name="model", use_scale=False, use_bias=False)
    return norm.apply({}, s)  # type: ignore[return-value]


def in_a_loop(s: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda _, row: (None, jax.jit(flax_norm)(row)), None, s)[1]


@pytest.mark.parametrize("check_vma", [True, False])
def test_sums_that_travel_in_one_array(check_vma: bool) -> None:
    apply = feature_sharded(flax_norm, check_vma=check_vma)
    folded = fold_checked(apply, PARAMS, INPUT)
    report = folded.report
    assert counts(report) == (3, 3, 0)
    assert count_equations("stack", apply, PARAMS, INPUT) == 3
    assert count_equations("stack", folded.apply, folded.params, INPUT) == 0
    assert removed_sums(apply, PARAMS, folded, INPUT) == 3
    assert removed_psums(apply, PARAMS, folded, INPUT) == 0  # of half the size


def test_sums_that_travel_in_one_array_inside_of_calls() -> None:
    apply = feature_sharded(in_a_loop, check_vma=False)
    folded = fold_checked(apply, PARAMS, INPUT)
    assert [norm.folded for norm in folded.report.norms] == [True] * 3
    assert count_equations("stack", folded.apply, folded.params, INPUT) == 0


def stacked_sums(s: jax.Array) -> jax.Array:
    return jnp.stack([s.mean(-1), jnp.square(s).mean(-1)])


def normed(s: jax.Array, mean: jax.Array, square: jax.Array) -> jax.Array:
    return (s - mean[..., None]) * jax.lax.rsqrt(square - mean**2 + 1e-6)[..., None]


def from_sums(read: Callable[[jax.Array], Sequence[jax.Array]]) -> Body:
    return lambda s: normed(s, *read(stacked_sums(s)))


def pmean(y: jax.Array) -> jax.Array:
    return jax.lax.pmean(y, "model")


# How the means are read from both local sums, and whether they are taken apart.
APART: dict[str, tuple[Body, bool]] = {
    "parts": (from_sums(pmean), True),
    "scaled before": (from_sums(lambda y: pmean(y * 2.0) / 2.0), True),
    "halves": (from_sums(lambda y: (pmean(0.5 * y)[0] * 2, pmean(y)[-1])), False),
    "read twice": (from_sums(lambda y: (pmean(y)[0], pmean(y)[1])), False),
    "sum of both": (from_sums(lambda y: (pmean(y)[0], pmean(y).sum(0) - pmean(y)[0])), False),
    "squared": (from_sums(lambda y: (pmean(y) ** 2) ** 0.5), False),
    "scaled apart": (from_sums(lambda y: pmean(y * jnp.array([1, 2.0])[:, None, None])), False),
    "reversed": (from_sums(lambda y: pmean(y[::-1])[::-1]), False),
    "divisor": (from_sums(lambda y: 1.0 / pmean(1.0 / y)), False),
}


@pytest.mark.parametrize(("norm", "apart"), APART.values(), ids=APART)
def test_what_is_taken_apart(norm: Body, apart: bool) -> None:
    apply = feature_sharded(norm, check_vma=False)
    folded = fold_checked(apply, PARAMS, INPUT)
    assert (count_equations("stack", folded.apply, folded.params, INPUT) == 0) == apart
    assert folded.report.n_folded == 3 * apart


@pytest.mark.parametrize("name", OWN_UNITS)
def test_reduced_on_each_device(name: str) -> None:
    """Centering `down` would shift the stream differently on each device: that is noticed."""
    apply = feature_sharded(two_pass, OWN_UNITS[name], check_vma=False)
    report = fold_checked(apply, PARAMS, INPUT).report
    assert [norm.folded for norm in report.norms] == [True, False, False]
    assert {e.key_path for e in report.edits} == {"embed", "bias"}
    changed = apply(centered("down"), INPUT), apply(PARAMS, INPUT)
    assert relative_difference(*changed) > 1e-2


@pytest.mark.parametrize(
    ("read", "folded"),
    [
        (lambda s: s - jax.lax.pmax(s.max(-1, keepdims=True), "model"), True),
        (lambda s: s - s.max(-1, keepdims=True), True),
        (lambda s: s - s.max(1, keepdims=True), False),
        (lambda s: s - jax.lax.pmax(s, "data"), False),
        (lambda s: jax.lax.pmax(s.max(-1, keepdims=True), "model"), False),
        (lambda s: jax.nn.softmax(s * jax.lax.pmax(s, "model")), False),
    ],
)
def test_a_maximum_of_the_stream(read: Body, folded: bool) -> None:
    """Less its maximum over some features, the stream is what it was; anything else notices."""

    def body(p: Any, x: jax.Array) -> jax.Array:
        s = x @ p["embed"] + p["bias"]
        return two_pass(s) + read(s)

    specs = {k: FEATURES[k] for k in ("embed", "bias")}
    apply = sharded(body, specs, P("data", None, "model"), check_vma=False)
    params = {k: PARAMS[k] for k in specs}
    assert fold_checked(apply, params, INPUT).report.n_folded == folded
    moved = {k: centered("embed", "bias")[k] for k in specs}
    assert (relative_difference(apply(moved, INPUT), apply(params, INPUT)) < 1e-12) == folded


@pytest.mark.parametrize("check_vma", [True, False])
def test_attention_of_a_weight_stationary_stack(check_vma: bool) -> None:
    """Features over all devices, kernels over both mesh axes: no device has a whole token."""
    heads, width = 4, 16
    kernels = {
        "qkv": P(None, None, "data", "model"),
        "out": P(None, "model", "data"),
        "up": P(None, "data", "model"),
        "down": P(None, "model", "data"),
    }
    sizes = {"qkv": (2, 3, width, width), "out": (2, width, width)}
    sizes |= {"up": (2, width, 32), "down": (2, 32, width)}
    stream = ("data", "model")
    specs = kernels | {"table": P(None, stream), "bias": P(None, stream)}
    params = {k: draw(*n) for k, n in sizes.items()} | {"table": draw(11, width)}
    params |= {"bias": draw(2, width)}

    def normed(s: jax.Array) -> jax.Array:
        return jax.lax.all_gather(two_pass(s, stream), "model", axis=2, tiled=True)

    def body(p: Any, ids: jax.Array) -> jax.Array:
        s = p["table"][ids]
        for i in range(2):
            q, k, v = jax.lax.psum(jnp.einsum("btf,nfg->nbtg", normed(s), p["qkv"][i]), "data")
            q, k, v = (y.reshape(*y.shape[:2], heads // 4, -1) for y in (q, k, v))
            y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
            wrote = y.reshape(*y.shape[:2], -1) @ p["out"][i]
            s = s + jax.lax.psum_scatter(wrote, "model", scatter_dimension=2, tiled=True)
            h = jax.nn.gelu(jax.lax.psum(normed(s) @ p["up"][i], "data"))
            wrote = h @ p["down"][i]
            s = s + jax.lax.psum_scatter(wrote, "model", scatter_dimension=2, tiled=True)
            s = s + p["bias"][i]
        return two_pass(s, stream)

    apply = sharded(body, specs, P(None, None, stream), P(), check_vma=check_vma)
    ids = jnp.array([[3, 1, 4], [1, 5, 9]])
    folded = fold_checked(apply, params, ids)
    report = folded.report
    assert counts(report) == (5, 5, 0)
    assert {e.key_path for e in report.edits} == {"table", "out", "down", "bias"}
    assert {norm.mesh_axes for norm in report.norms} == {stream}
    assert removed_psums(apply, params, folded, ids) == 5


def test_gradients_of_a_feature_sharded_model() -> None:
    apply = feature_sharded(one_pass)
    folded = jax_lnfold.fold(apply, PARAMS, INPUT)
    want, got = (
        jax.jit(jax.grad(lambda x, f=f, p=p: jnp.sum(jnp.sin(f(p, x)))))(INPUT)
        for f, p in ((apply, PARAMS), (folded.apply, folded.params))
    )
    assert relative_difference(got, want) < 1e-11


def test_a_scanned_feature_sharded_model() -> None:
    def body(p: Any, x: jax.Array) -> jax.Array:
        def layer(s: jax.Array, w: Any) -> Any:
            hidden = jax.lax.psum((one_pass(s) * w["scale"]) @ w["up"], "model")
            return s + jax.nn.gelu(hidden) @ w["down"], None

        layers = {k: p[k] for k in ("scale", "up", "down")}
        s, _ = jax.lax.scan(layer, x @ p["embed"] + p["bias"], layers)
        return one_pass(s)

    apply = sharded(body, FEATURES, P("data", None, "model"))
    folded = fold_checked(apply, PARAMS, INPUT)
    assert [(n.count, n.folded) for n in folded.report.norms] == [(2, True), (1, True)]
    assert removed_psums(apply, PARAMS, folded, INPUT) == 2


def test_a_stream_written_by_psum_scatter() -> None:
    """Two-dimensional weight-stationary layout: writers are summed over one axis and cut."""
    specs = {**FEATURES, "embed": P("data", None), "down": P(None, "model", None)}

    def body(p: Any, x: jax.Array) -> jax.Array:
        whole = jax.lax.psum(x, "model") / 4 @ p["embed"]
        s = jax.lax.psum_scatter(whole, "model", scatter_dimension=2, tiled=True)
        hidden = jax.lax.psum(one_pass(s) @ p["up"][0], "model")
        mine = jax.lax.dynamic_slice_in_dim(hidden, 2 * jax.lax.axis_index("model"), 2, 2)
        wrote = jax.nn.gelu(mine) @ p["down"][0]
        s = s + jax.lax.psum_scatter(wrote, "model", scatter_dimension=2, tiled=True)
        return one_pass(s)

    apply = sharded(body, {**specs, "embed": P()}, P("data", None, "model"))
    report = fold_checked(apply, PARAMS, INPUT).report
    assert counts(report) == (2, 2, 0)


@pytest.mark.parametrize(
    ("spread", "shifted", "folded"),
    [("model", False, 1), (AXES, False, 1), ("model", True, 0), (AXES, True, 0)],
)
def test_rows_of_a_table_whose_features_are_spread(spread: Any, shifted: bool, folded: int) -> None:
    """All devices look up the same rows, or (`shifted`) each its own: then rows are mixed."""

    def body(p: Any, ids: jax.Array) -> jax.Array:
        x = p["table"][ids + jax.lax.axis_index("model") if shifted else ids]
        c = x - jax.lax.pmean(x.mean(-1, keepdims=True), spread)
        variance = jax.lax.pmean((c * c).mean(-1, keepdims=True), spread)
        return c * jax.lax.rsqrt(variance + 1e-6)

    spec = P(None, spread)
    run = sharded(body, {"table": spec}, P(None, None, spread), P())
    report = fold_checked(run, {"table": draw(11, 24)}, jnp.array([[3, 0, 7], [5, 5, 1]])).report
    assert (report.n_folded, report.n_inserted) == (folded, 0)


# Megatron: the stream is the same on all devices of a row, heads and hidden units are spread.
MEGATRON = {
    "embed": P(),
    "bias": P(),
    "scale": P(),
    "up": P(None, None, "model"),
    "down": P(None, "model", None),
}


def standardize(x: jax.Array) -> jax.Array:
    return jax.nn.standardize(x, epsilon=1e-6)


def megatron(p: Any, x: jax.Array) -> jax.Array:
    s = x @ p["embed"] + p["bias"]
    for i in range(2):
        hidden = jax.nn.gelu((standardize(s) * p["scale"][i]) @ p["up"][i])
        s = s + jax.lax.psum(hidden @ p["down"][i], "model")
    return s


def normed_inside(**options: Any) -> Body:
    out, x = (P(), P()) if options else (P("data"), BATCH)
    return sharded(lambda p, x: standardize(megatron(p, x)), MEGATRON, out, x, **options)


def normed_behind(p: Any, x: jax.Array) -> jax.Array:
    return standardize(sharded(megatron, MEGATRON, P("data"))(p, x))


@pytest.mark.parametrize(
    "apply",
    [normed_inside(), normed_inside(axis_names={"model"}), normed_behind],
    ids=["whole", "only some mesh axes are manual", "norm after the shard_map"],
)
def test_tensor_parallel_model(apply: Body) -> None:
    report = fold_checked(apply, PARAMS, INPUT).report
    assert counts(report) == (3, 3, 0)
    assert {n.mesh_axes for n in report.norms} == {()}


def test_a_scale_after_the_psum_goes_into_the_layer_before_it() -> None:
    def body(p: Any, x: jax.Array) -> jax.Array:
        s = x @ p["embed"] + p["bias"]
        hidden = jax.nn.gelu(standardize(s) @ p["up"][0])
        s = s + jax.lax.psum(hidden @ p["down"], "model") * p["gamma"]
        return standardize(s)

    params = PARAMS | {"down": PARAMS["down"][0], "gamma": draw(D)}
    specs = MEGATRON | {"down": P("model", None), "gamma": P()}
    folded = fold_checked(sharded(body, specs, P("data")), params, INPUT)
    assert (folded.report.n_folded, folded.report.n_inserted) == (2, 0)
    assert [(s.key_path, s.targets) for s in folded.report.scales] == [("gamma", (("down", (1,)),))]


def test_a_norm_of_every_shard_centers_groups_of_columns() -> None:
    """Without a `psum` each device normalises its own features: four groups."""

    def body(p: Any, x: jax.Array) -> jax.Array:
        return standardize(x @ p["embed"] + p["bias"])

    specs, params = ({k: tree[k] for k in ("embed", "bias")} for tree in (FEATURES, PARAMS))
    folded = fold_checked(sharded(body, specs, P("data", None, "model")), params, INPUT)
    assert {str(e) for e in folded.report.edits} == {
        "embed centered along axis 1 in 4 groups",
        "bias centered along axis 0 in 4 groups",
    }
    sums = np.asarray(folded.params["embed"]).reshape(5, 4, 3).sum(-1)
    np.testing.assert_allclose(sums, 0, atol=1e-13)


@pytest.mark.parametrize("check_vma", [True, False])
def test_a_tied_table_is_centered_after_the_look_up(check_vma: bool) -> None:
    specs = {"table": P(), "up": P(None, None, "model"), "down": P(None, "model", None)}
    params = {"table": draw(11, D), "up": PARAMS["up"], "down": PARAMS["down"]}

    def body(p: Any, ids: jax.Array) -> jax.Array:
        s = p["table"][ids]
        for i in range(2):
            hidden = jax.nn.gelu(standardize(s) @ p["up"][i])
            s = s + jax.lax.psum(hidden @ p["down"][i], "model")
        return standardize(s) @ p["table"].T

    apply = sharded(body, specs, P("data"), check_vma=check_vma)
    ids = jnp.arange(24).reshape(8, 3) % 11
    folded = fold_checked(apply, params, ids)
    report = folded.report
    assert counts(report) == (3, 3, 1)
    assert report.insertions[0].after.startswith("`gather` (test_shard_map.py:")
    assert [e.key_path for e in report.edits] == ["down"]
    loss = jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(folded.apply(folded.plan.center(p), ids)))))
    want = jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(apply(p, ids)))))(params)
    assert relative_difference(loss(params), want) < 1e-11


def stream_is_returned(p: Any, x: jax.Array) -> Any:
    s = megatron(p, x)
    return standardize(s), s


def mean_over_the_batch_too(p: Any, x: jax.Array) -> jax.Array:
    """The sum over the devices with other samples mixes the means of different tokens."""
    s = megatron(p, x)
    return (s - jax.lax.pmean(s.mean(-1, keepdims=True), "data")) / jnp.sqrt(
        jax.lax.pmean(jnp.square(s).mean(-1, keepdims=True), "data") + 1e-6
    )


def nonlinear_collective(p: Any, x: jax.Array) -> jax.Array:
    s = megatron(p, x)
    return standardize(s) + jax.lax.pmax(s, "model")


def branch_on_every_device(p: Any, x: jax.Array) -> jax.Array:
    """Devices may take different branches: opaque."""
    s = jax.lax.cond(x[0, 0, 0] > 0, lambda s: 2 * s, lambda s: s, megatron(p, x))
    return standardize(s)


@pytest.mark.parametrize(
    ("body", "blocker"),
    [
        (stream_is_returned, "`shard_map`"),
        (mean_over_the_batch_too, "(test_shard_map.py:"),
        (nonlinear_collective, "`pmax` (test_shard_map.py:"),
        (branch_on_every_device, "`cond` (test_shard_map.py:"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_is_left_alone(body: Body, blocker: str) -> None:
    out = (P("data"), P("data")) if body is stream_is_returned else P("data")
    report = fold_checked(sharded(body, MEGATRON, out, check_vma=False), PARAMS, INPUT).report
    assert (report.n_folded, report.n_inserted) == (0, 0)
    assert report.norms
    assert all(blocker in n.reason for n in report.norms)


def test_a_psum_over_the_wrong_axis_is_no_layer_norm() -> None:
    def body(p: Any, x: jax.Array) -> jax.Array:
        return one_pass(x @ p["embed"] + p["bias"], "data")

    specs, params = ({k: tree[k] for k in ("embed", "bias")} for tree in (FEATURES, PARAMS))
    report = fold_checked(sharded(body, specs, P("data", None, "model")), params, INPUT).report
    assert report.n_folded == 0
