"""Training under the column-centered constraint is training of the LayerNorm model."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from optax.contrib import schedule_free, schedule_free_eval_params

import jax_lnfold
from jax_lnfold import CenterState, Folded, FoldError, TreeError, center_gradients, center_updates
from tests.helpers.contracts import relative_difference, snapshot
from tests.models.zoo import BY_NAME, vision
from tests.models.zoo.base import recipe

PyTree = Any
Run = Callable[[PyTree, Any], tuple[PyTree, jax.Array]]
OPTIMIZERS = {
    "sgd": partial(optax.sgd, 0.05),
    "momentum": partial(optax.sgd, 0.02, momentum=0.9),
    "adamw": partial(optax.adamw, 0.003, weight_decay=0.1),
}


class Net(nn.Module):
    """A pre-LN network of `depth` blocks with a final LayerNorm."""

    depth: int = 1
    width: int = 12
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dense = partial(nn.Dense, dtype=self.dtype)
        x = dense(self.width, name="stem")(x)
        for i in range(self.depth):
            h = nn.LayerNorm(name=f"norm_{i}", dtype=self.dtype)(x)
            x = x + dense(self.width, name=f"down_{i}")(nn.gelu(dense(17, name=f"up_{i}")(h)))
        return dense(5, name="head")(nn.LayerNorm(name="last", dtype=self.dtype)(x))


def net(dtype: Any = jnp.float64, **config: Any) -> tuple[nn.Module, PyTree, jax.Array]:
    model, x = Net(dtype=dtype, **config), jax.random.normal(jax.random.key(1), (8, 7), dtype)
    params = jax.jit(model.init)(jax.random.key(2), x)
    rng = np.random.default_rng(3)

    def perturbed(p: jax.Array) -> jax.Array:
        return jnp.asarray(p + 0.1 * rng.normal(size=p.shape), dtype)

    return model, jax.tree.map(perturbed, params), x


def steps(loss: Callable[[PyTree], jax.Array], tx: Any, params: PyTree, count: int) -> Any:
    """`count` steps in one `scan`: the last parameters and state, all parameters on the way."""

    @jax.jit
    def run(params: PyTree) -> Any:
        def step(carry: Any, _: None) -> Any:
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), (params, value)

        return jax.lax.scan(step, (params, tx.init(params)), None, count)

    return run(params)


def trained(apply: Any, inputs: Any, tx: Any, params: PyTree, count: int) -> Any:
    return steps(lambda p: cross_entropy(apply(p, *inputs)), tx, params, count)


def cross_entropy(logits: jax.Array) -> jax.Array:
    labels = jnp.arange(logits.shape[0]) % logits.shape[-1]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@cache
def vit() -> tuple[Any, Folded]:
    model = recipe(partial(vision.vit, depth=1), *vision.IMAGES)()
    return model, jax_lnfold.fold(model.apply_fn, model.params, *model.inputs)


@pytest.mark.parametrize(
    "name", [n if n == "adamw" else pytest.param(n, marks=pytest.mark.slow) for n in OPTIMIZERS]
)
def test_four_ways_to_train_agree_step_for_step(name: str) -> None:
    """LayerNorm and folded model, reparameterised and with centered updates, for 200 steps."""
    if name == "adamw":
        model, folded = vit()
        apply_fn, inputs = model.apply_fn, model.inputs
    else:
        model, params, x = net(depth=2)
        apply_fn, inputs, folded = model.apply, (x,), jax_lnfold.fold(model.apply, params, x)
    plan, optimizer = folded.plan, OPTIMIZERS[name]()
    both = optax.chain(center_gradients(plan), optimizer, center_updates(plan))
    last = optax.chain(optimizer, center_updates(plan))
    ways = {
        "LayerNorm, reparameterised": (apply_fn, plan.center, optimizer),
        "folded, reparameterised": (folded.apply, plan.center, optimizer),
        "LayerNorm, centered updates": (apply_fn, lambda p: p, last),
        "folded, centered gradients and updates": (folded.apply, lambda p: p, both),
    }
    trajectories = {}
    for way, (apply, center, tx) in ways.items():

        def loss(p: PyTree, apply: Any = apply, center: Any = center) -> jax.Array:
            return cross_entropy(apply(center(p), *inputs))

        (_, _), (params, losses) = steps(loss, tx, folded.params, 200)
        trajectories[way] = jax.jit(jax.vmap(plan.center))(params), losses
    first = trajectories.pop("LayerNorm, reparameterised")
    assert float(first[1][-1]) < 0.5 * float(first[1][0]), "it learns"
    for way, found in trajectories.items():
        assert relative_difference(found, first) < 1e-9, way


def test_without_centered_gradients_adam_takes_another_way() -> None:
    model, folded = vit()
    results = {}
    for first in (optax.identity(), center_gradients(folded.plan)):
        tx = optax.chain(first, optax.adam(0.003), center_updates(folded.plan))
        (params, _), _ = trained(folded.apply, model.inputs, tx, folded.params, 5)
        results[len(results)] = params
        assert relative_difference(folded.plan.center(params), params) < 1e-12
        twin = jax.jit(model.apply_fn)(params, *model.inputs)
        assert relative_difference(jax.jit(folded.apply)(params, *model.inputs), twin) < 1e-11
    assert relative_difference(results[0], results[1]) > 1e-4


@pytest.mark.parametrize(
    "dtype",
    [*(pytest.param(d, marks=pytest.mark.slow) for d in ("float64", "float32")), "bfloat16"],
)
def test_the_constraint_holds_after_10000_steps(dtype: Any) -> None:
    model, params, x = net(dtype, depth=1, width=6)
    folded = jax_lnfold.fold(model.apply, params, x)
    assert folded.report.n_folded == 2
    tx = optax.chain(optax.adamw(3e-3), center_updates(folded.plan))
    eps = float(jnp.finfo(dtype).eps)

    def loss(logits: jax.Array) -> jax.Array:
        return cross_entropy(logits.astype(jnp.promote_types(dtype, jnp.float32)))

    @jax.jit
    def run(params: PyTree) -> Any:
        def step(_: int, carry: Any) -> Any:
            params, state = carry
            grads = jax.grad(lambda p: cross_entropy(folded.apply(p, x).astype(jnp.float32)))(
                params
            )
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, 10_000, step, (params, tx.init(params)))

    params, state = run(folded.params)
    assert relative_difference(params, folded.params) > 0.1
    assert 0 < float(state[-1].drift) <= 1
    tx.init(params)  # does not complain
    kernel = np.asarray(params["params"]["down_0"]["kernel"], np.float64)
    means = np.abs(kernel.mean(axis=1)) / np.abs(kernel).mean(axis=1)
    assert means.max() < 2 * eps
    assert relative_difference(folded.apply(params, x), model.apply(params, x)) < 200 * eps


def test_fine_tuning_keeps_equality_with_the_layernorm_model() -> None:
    model, folded = vit()
    for last, same in ((center_updates(folded.plan), True), (optax.identity(), False)):
        tx = optax.chain(optax.adam(1e-3), last)
        _, (params, _) = trained(folded.apply, model.inputs, tx, folded.params, 30)
        got, want = (
            jax.jit(jax.vmap(lambda p, f=f: f(p, *model.inputs)))(params)
            for f in (folded.apply, model.apply_fn)
        )
        difference = relative_difference(got, want)
        assert difference < 1e-11 if same else difference > 1e-3, "without the constraint they part"


def test_merged_scales_stay_one() -> None:
    model = BY_NAME["dinov2"].build()
    folded = jax_lnfold.fold(model.apply_fn, model.params, *model.inputs)
    tx = optax.chain(optax.adam(1e-2), center_updates(folded.plan))
    (params, _), _ = trained(folded.apply, model.inputs, tx, folded.params, 10)
    edits = folded.plan.leaf_edits()
    scales = [path for path, edit in edits.items() if edit.recipe.fill == 1.0]
    leaves = dict(jax_lnfold.trees.leaf_paths(params))
    assert len(scales) == 4
    assert all((np.asarray(leaves[path]) == 1).all() for path in scales)
    twin = jax.jit(model.apply_fn)(params, *model.inputs)
    assert relative_difference(jax.jit(folded.apply)(params, *model.inputs), twin) < 1e-11
    with pytest.raises(TreeError, match="not centered"):
        tx.init(jax.tree.map(lambda p: p * 1.01, folded.params))


# --- parameters that are served and are not those that are trained -------------------------------


def gated(p: PyTree, x: jax.Array) -> jax.Array:
    """A scale to merge, a norm with a scale, and a residual."""
    h = (x @ p["stem"]) * p["gate"]
    y = nn.standardize(h) * p["scale"]
    return nn.standardize(h + jnp.tanh(y @ p["up"]) @ p["down"]) @ p["head"]


@cache
def gated_fold() -> tuple[Folded, jax.Array]:
    rng = np.random.default_rng(4)
    shapes = {"stem": (7, 12), "gate": (12,), "scale": (12,), "up": (12, 17), "down": (17, 12)}
    shapes |= {"head": (12, 5)}
    params = {k: jnp.asarray(rng.normal(0.4, 0.6, shape)) for k, shape in shapes.items()}
    x = jnp.asarray(rng.normal(size=(8, 7)))
    folded = jax_lnfold.fold(gated, params, x)
    assert (folded.report.n_folded, len(folded.plan.scales)) == (2, 1)
    return folded, x


def served_by(name: str, plan: jax_lnfold.FoldPlan) -> tuple[Any, Callable[..., PyTree]]:
    """The optimiser, and what it serves: of its state, the last parameters and those before."""
    first, last = center_gradients(plan), center_updates(plan)
    rms = optax.chain(optax.scale_by_rms(), optax.add_decayed_weights(0.1), optax.sgd(0.02))
    adam = optax.chain(first, optax.adamw(0.02, weight_decay=0.1), last)
    free = partial(schedule_free, learning_rate=0.02)

    def averaged(state: Any, params: PyTree, before: PyTree) -> PyTree:
        return jax.tree.map(lambda p: p[40:].mean(0), before)

    def smoothed(state: Any, params: PyTree, before: PyTree) -> PyTree:
        start = jax.tree.map(lambda p: p[0], before)
        return jax.lax.scan(
            lambda ema, p: (optax.incremental_update(p, ema, 0.1), None), start, before
        )[0]

    def debiased(state: Any, params: PyTree, before: PyTree) -> PyTree:
        ema = optax.ema(0.9)
        start = ema.init(params), params

        def step(carry: Any, p: PyTree) -> Any:
            new, state = ema.update(p, carry[0])
            return (state, new), None

        return jax.lax.scan(step, start, before)[0][1]

    return {
        "schedule-free around": lambda: (
            free(optax.chain(first, rms, last)),
            lambda state, params, _: schedule_free_eval_params(state, params),
        ),
        "schedule-free inside": lambda: (
            optax.chain(first, free(rms), last),
            lambda state, params, _: schedule_free_eval_params(state[1], params),
        ),
        "average": lambda: (adam, averaged),
        "moving average": lambda: (adam, smoothed),
        "debiased average": lambda: (adam, debiased),
        "average of updates": lambda: (
            optax.chain(first, optax.adam(0.02), optax.ema(0.9), last),
            lambda state, params, _: params,
        ),
    }[name]()


AVERAGES = ("average", "moving average", "debiased average", "average of updates")


@pytest.mark.parametrize("name", ["schedule-free around", "schedule-free inside", *AVERAGES])
def test_served_parameters(name: str) -> None:
    """Averages of what is centered are; what a chain keeps to itself is not, unless centered."""
    folded, x = gated_fold()
    tx, served_of = served_by(name, folded.plan)
    served = {}
    for way, apply in (("LayerNorm", gated), ("folded", folded.apply)):

        def loss(p: PyTree, apply: Any = apply) -> jax.Array:
            return cross_entropy(apply(p, x))

        (params, state), (before, losses) = steps(loss, tx, folded.params, 80)
        assert float(losses[-1]) < 0.5 * float(losses[0])
        served[way] = served_of(state, params, before)
    got, want = served["folded"], served["LayerNorm"]
    assert relative_difference(got, want) < 1e-9, "one training"
    difference = relative_difference(folded.apply(got, x), gated(got, x))
    assert difference > 1e-3 if name == "schedule-free inside" else difference < 1e-11
    centered = folded.plan.center(got)
    assert relative_difference(folded.apply(centered, x), gated(got, x)) < 1e-11


def test_lookahead_takes_the_centering_inside() -> None:
    folded, x = gated_fold()
    adam, last = optax.adam(0.02), center_updates(folded.plan)
    tx = optax.lookahead(optax.chain(center_gradients(folded.plan), adam, last), 5, 0.5)
    params = optax.LookaheadParams.init_synced(folded.params)
    found: dict[Any, optax.LookaheadParams] = {}
    for apply in (gated, folded.apply):

        def step(carry: Any, _: None, apply: Any = apply) -> Any:
            params, state = carry
            grads = jax.grad(lambda p: cross_entropy(apply(p, x)))(params.fast)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        (found[apply], _), _ = jax.lax.scan(step, (params, tx.init(params)), None, 33)
    assert relative_difference(found[folded.apply], found[gated]) < 1e-9
    for tree in (found[gated].slow, found[gated].fast):
        assert relative_difference(folded.apply(tree, x), gated(tree, x)) < 1e-11
        assert relative_difference(tree, folded.params) > 1e-2
    with pytest.raises(TreeError, match=r"^params: leaf 'fast/down' is not in the plan"):
        optax.chain(optax.lookahead(adam, 5, 0.5), last).init(params)


# --- optax around it -----------------------------------------------------------------------------


def labels(params: PyTree) -> PyTree:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "head" if "head" in jax.tree_util.keystr(path) else "body", params
    )


PARTS = {"head": optax.sgd(0.1), "body": optax.adam(1e-2)}
FROZEN = {"head": optax.adam(1e-2), "body": optax.set_to_zero()}


def is_matrix(params: PyTree) -> PyTree:
    return jax.tree.map(lambda p: p.ndim > 1, params)


def not_norms(params: PyTree) -> PyTree:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "scale" not in jax.tree_util.keystr(path), params
    )


def scheduled(last: Any) -> Any:
    """A chain whose learning rate is injected."""
    return optax.inject_hyperparams(
        lambda learning_rate: optax.chain(optax.adam(learning_rate), last)
    )


Chain = Callable[[optax.GradientTransformation], optax.GradientTransformation]
# Chains that end in centered updates.
AROUND: dict[str, Chain] = {
    "multi_transform": lambda last: optax.chain(optax.multi_transform(PARTS, labels), last),
    "frozen": lambda last: optax.chain(optax.multi_transform(FROZEN, labels), last),
    "masked decay": lambda last: optax.chain(
        optax.masked(optax.add_decayed_weights(0.1), is_matrix), optax.sgd(0.1), last
    ),
    "masked where nothing is centered": lambda last: optax.chain(
        optax.adam(1e-2), optax.masked(last, not_norms)
    ),
    "accumulation outside": lambda last: optax.MultiSteps(
        optax.chain(optax.adam(1e-2), last), 3
    ).gradient_transformation(),
    "accumulation inside": lambda last: optax.chain(
        optax.MultiSteps(optax.adam(1e-2), 3).gradient_transformation(), last
    ),
    "inject_hyperparams": lambda last: scheduled(last)(
        learning_rate=optax.linear_schedule(1e-2, 1e-3, 10)
    ),
    "apply_if_finite": lambda last: optax.apply_if_finite(optax.chain(optax.adam(1e-2), last), 3),
    "a common factor behind": lambda last: optax.chain(optax.adam(1e-2), last, optax.scale(0.5)),
}


@pytest.mark.parametrize("name", AROUND)
def test_within_other_transformations(name: str) -> None:
    model, params, x = net()
    folded = jax_lnfold.fold(model.apply, params, x)
    tx = AROUND[name](center_updates(folded.plan))
    (params, _), _ = trained(folded.apply, (x,), tx, folded.params, 12)
    assert relative_difference(folded.apply(params, x), model.apply(params, x)) < 1e-9
    moved = relative_difference(params["params"]["stem"], folded.params["params"]["stem"])
    assert (moved == 0) == (name == "frozen"), "what is frozen keeps its bits"


def test_sharded_parameters_stay_where_they_are() -> None:
    model, params, x = net(width=16)
    folded = jax_lnfold.fold(model.apply, params, x)
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "model"))
    spread = NamedSharding(mesh, PartitionSpec(None, "model"))
    whole = NamedSharding(mesh, PartitionSpec())
    placed = jax.device_put(
        folded.params,
        jax.tree.map(lambda p: spread if p.ndim == 2 and p.shape[1] == 16 else whole, params),
    )
    tx = optax.chain(optax.adam(1e-2), center_updates(folded.plan))
    state = jax.jit(tx.init)(placed)

    @jax.jit
    def step(params: PyTree, state: Any) -> Any:
        grads = jax.grad(lambda p: cross_entropy(folded.apply(p, x)))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    alone, alone_state = folded.params, tx.init(folded.params)
    for _ in range(3):
        placed, state = step(placed, state)
        alone, alone_state = step(alone, alone_state)
    assert relative_difference(placed, alone) < 1e-12
    kernel = placed["params"]["down_0"]["kernel"]
    assert kernel.sharding.is_equivalent_to(spread, 2)


def test_train_state_of_linen() -> None:
    model, variables, x = net()

    def apply(params: PyTree, x: jax.Array) -> jax.Array:
        return model.apply({"params": params}, x)

    folded = jax_lnfold.fold(apply, variables["params"], x)
    tx = optax.chain(optax.adamw(1e-2), center_updates(folded.plan))
    state = TrainState.create(apply_fn=folded.apply, params=folded.params, tx=tx)

    @jax.jit
    def step(state: TrainState) -> TrainState:
        grads = jax.grad(lambda p: cross_entropy(state.apply_fn(p, x)))(state.params)
        return state.apply_gradients(grads=grads)

    for _ in range(3):
        state = step(state)
    assert relative_difference(state.params, folded.params) > 1e-3
    assert relative_difference(state.apply_fn(state.params, x), apply(state.params, x)) < 1e-11


class NnxNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        make = partial(nnx.Linear, rngs=rngs, param_dtype=jnp.float64)
        self.stem, self.up = make(7, 12), make(12, 17)
        self.down, self.head = make(17, 12), make(12, 5)
        norm = partial(nnx.LayerNorm, rngs=rngs, param_dtype=jnp.float64)
        self.first, self.last = norm(12), norm(12)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.stem(x)
        x = x + self.down(nnx.gelu(self.up(self.first(x))))
        return self.head(self.last(x))


def test_optimizer_of_nnx() -> None:
    model = NnxNet(nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (8, 7), jnp.float64)
    graph, state = nnx.split(model)
    folded = jax_lnfold.fold(lambda state, x: nnx.merge(graph, state)(x), state, x)
    assert folded.report.n_folded == 2
    nnx.update(model, folded.params)
    tx = optax.chain(optax.adamw(1e-2), center_updates(folded.plan))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model: NnxNet, optimizer: nnx.Optimizer) -> None:
        def loss(model: NnxNet) -> jax.Array:
            return cross_entropy(folded.apply(nnx.state(model), x))

        optimizer.update(model, nnx.grad(loss)(model))

    before = snapshot(nnx.state(model))
    for _ in range(3):
        step(model, optimizer)
    assert relative_difference(jax.tree.map(np.asarray, nnx.state(model)), before) > 1e-3
    got = folded.apply(nnx.state(model), x)
    assert relative_difference(got, model(x)) < 1e-11


def test_a_plan_from_shapes() -> None:
    model, params, x = net()
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    plan = jax_lnfold.plan_fold(model.apply, shapes, x)
    assert plan == jax_lnfold.fold(model.apply, params, x).plan
    center_updates(plan).init(shapes)
    center_updates(plan).init(plan.center(params))


# --- what goes wrong -----------------------------------------------------------------------------


def test_numbers_that_are_not_finite_stay_where_they_are() -> None:
    model, params, x = net()
    folded = jax_lnfold.fold(model.apply, params, x)
    tx = center_updates(folded.plan)
    updates = jax.tree.map(jnp.ones_like, folded.params)
    rng = np.random.default_rng(0)
    updates = jax.tree.map(lambda u: jnp.asarray(rng.normal(size=u.shape)), updates)
    clean, _ = tx.update(updates, tx.init(folded.params), folded.params)
    spoilt = updates["params"]["stem"]["kernel"].at[2, 3].set(jnp.nan).at[4, 5].set(jnp.inf)
    updates["params"]["stem"]["kernel"] = spoilt
    got, _ = tx.update(updates, tx.init(folded.params), folded.params)
    kernel = np.array(got["params"]["stem"].pop("kernel"))
    want = np.array(clean["params"]["stem"].pop("kernel"))
    assert np.argwhere(~np.isfinite(kernel)).tolist() == [[2, 3], [4, 5]]
    rows = [i for i in range(7) if i not in (2, 4)]
    np.testing.assert_array_equal(kernel[rows], want[rows])
    np.testing.assert_array_equal(kernel[[2, 4]], np.array(spoilt)[[2, 4]])
    assert relative_difference(got, clean) == 0


def test_columns_that_are_not_moved_keep_their_bits() -> None:
    model, params, x = net(jnp.float32)
    folded = jax_lnfold.fold(model.apply, params, x)
    tx = center_updates(folded.plan)
    updates = jax.tree.map(jnp.zeros_like, folded.params)
    kernel = updates["params"]["stem"]["kernel"].at[3, 1].set(1.0)
    updates["params"]["stem"]["kernel"] = kernel
    got, _ = tx.update(updates, tx.init(folded.params), folded.params)
    kernel = np.array(got["params"]["stem"]["kernel"])
    assert not kernel[[0, 1, 2, 4, 5, 6]].any()
    assert kernel[3, 1] == pytest.approx(11 / 12)
    del got["params"]["stem"]
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(got))


def broken(what: str) -> None:
    model, params, x = net()
    folded = jax_lnfold.fold(model.apply, params, x)
    plan, good = folded.plan, folded.params
    tx = center_updates(plan)
    zeros = jax.tree.map(jnp.zeros_like, good)
    other = jax.tree.map(lambda p: p, good)
    inner = other["params"]
    if what == "not a plan":
        center_updates(folded)  # type: ignore[arg-type]
    elif what == "gradients, not a plan":
        center_gradients(good)
    elif what == "no params":
        tx.update(zeros, tx.init(good))
    elif what == "not centered":
        tx.init(params)
    elif what == "moved off":
        inner["stem"]["kernel"] = inner["stem"]["kernel"] + 1e-6
        tx.update(zeros, tx.init(good), other)
    elif what == "another tree":
        tx.init({"encoder": good})
    elif what == "another name":
        inner["trunk"] = inner.pop("stem")
        tx.init(other)
    elif what == "another shape":
        inner["stem"]["kernel"] = jnp.zeros((7, 13))
        tx.init(other)
    elif what == "no array":
        inner["stem"]["kernel"] = "kernel"
        tx.init(other)
    elif what == "integers":
        inner["stem"]["kernel"] = jnp.zeros((7, 12), int)
        tx.init(other)
    elif what == "masked":
        optax.masked(tx, lambda p: jax.tree.map(lambda x: x.ndim > 1, p)).init(good)
    elif what == "in a part":
        optax.multi_transform({"head": optax.sgd(0.1), "body": optax.chain(tx)}, labels).init(good)
        parts = {"head": optax.chain(optax.sgd(0.1), tx), "body": optax.set_to_zero()}
        optax.multi_transform(parts, labels).init(good)
    elif what == "updates of another tree":
        tx.update({"encoder": zeros}, tx.init(good), good)
    elif what == "gradients of another tree":
        center_gradients(plan).update({"encoder": zeros}, optax.EmptyState())


@pytest.mark.parametrize(
    ("what", "error", "words"),
    [
        ("not a plan", FoldError, r"plan: a Folded is no FoldPlan; call center_updates\("),
        ("gradients, not a plan", FoldError, r"plan: a dict is no FoldPlan; call center_gradients"),
        ("no params", FoldError, r"params: .* tx.update\(grads, state, params\)"),
        ("not centered", TreeError, r"params: leaf .* is not centered .* start from folded.params"),
        ("moved off", TreeError, r"'params/stem/kernel' is not centered .* last in the outermost"),
        ("another tree", TreeError, r"params: leaf 'encoder/.*' is not in the plan"),
        ("another name", TreeError, r"params: leaf 'params/trunk/bias' is not in the plan"),
        ("another shape", TreeError, r"leaf 'params/stem/kernel' has shape \(7, 13\)"),
        ("no array", TreeError, r"leaf 'params/stem/kernel' is a str"),
        ("integers", TreeError, r"leaf 'params/stem/kernel' holds no floating-point"),
        ("masked", TreeError, r"lacks leaf 'params/down_0/bias', which the plan centers \(masked"),
        ("in a part", TreeError, r"lacks leaf .* multi_transform\?\); put center_updates last"),
        ("updates of another tree", TreeError, r"updates: leaf 'encoder/.*' is not in the plan"),
        ("gradients of another tree", TreeError, r"updates: leaf 'encoder/.*' is not in the plan"),
    ],
)
def test_refused(what: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        broken(what)


def test_drift_tells_what_came_behind() -> None:
    """Adam behind the centering moves parameters off; under `jit` only the state can say so."""
    model, params, x = net()
    folded = jax_lnfold.fold(model.apply, params, x)
    drifts = []
    for tail in (optax.identity(), optax.scale_by_adam()):
        tx = optax.chain(optax.sgd(0.01), center_updates(folded.plan), tail)
        (_, state), _ = trained(folded.apply, (x,), tx, folded.params, 3)
        (center,) = [s for s in state if isinstance(s, CenterState)]
        drifts.append(float(center.drift))
    assert drifts[0] <= 1 < 1000 < drifts[1]
