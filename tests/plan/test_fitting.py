"""A plan on other trees than the one it was made for: boxes around leaves, parts of ensembles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import jax_lnfold
from jax_lnfold import PlanMismatchError, TraceError, TreeError, center_updates
from jax_lnfold.trees import alike_paths
from tests.helpers.contracts import assert_identical, fold_checked, relative_difference, snapshot
from tests.models.norm_spellings import layer_norm as norm
from tests.models.zoo import perturb

Array = jax.Array
Params = dict[str, Any]


def test_key_paths_are_alike_with_boxes_and_without() -> None:
    assert alike_paths(["a/w"], ["a/w", "b/w"]) == {"a/w": ["a/w"]}
    assert alike_paths(["a/w/value", "b"], ["a/w", "b/value"]) == {
        "a/w/value": ["a/w"],
        "b": ["b/value"],
    }
    assert alike_paths(["a/value/w"], ["a/w", "value/a/w"]) == {"a/value/w": []}, "only at the end"
    query = ["query", "value"]
    assert alike_paths(query, ["query/value", "value/value"]) == {
        "query": ["query/value"],
        "value": ["value/value"],
    }
    assert alike_paths(["q", "q/value"], ["q"]) == {"q": ["q"], "q/value": []}, "it is taken"


def test_key_paths_are_alike_in_other_spellings() -> None:
    def slashes(name: str) -> str:
        return name.replace(".", "/")

    assert alike_paths(["a/w"], ["a.w", "a/w"], slashes) == {"a/w": ["a/w"]}, "the very name first"
    assert alike_paths(["a/b/w"], ["a.b/w", "a/b.w"], slashes) == {"a/b/w": ["a.b/w", "a/b.w"]}


# --- boxes ---------------------------------------------------------------------------------------


class Gated(nn.Module):
    """A gate to merge and a norm to fold, kernels in boxes if there are names for their axes."""

    boxed: bool

    @nn.compact
    def __call__(self, x: Array) -> Array:
        init = nn.initializers.normal(0.3, jnp.float64)
        if self.boxed:
            init = nn.with_logical_partitioning(init, ("in", "out"))
        x = nn.Dense(12, kernel_init=init, param_dtype=float)(x)
        gate = self.param("gate", nn.initializers.normal(1.0, float), (12,))
        return nn.Dense(4, param_dtype=float)(nn.LayerNorm(param_dtype=float)(x * gate))


@pytest.mark.parametrize("boxed", [True, False])
def test_plan_fits_with_boxes_and_without(boxed: bool) -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 7)))
    apply = Gated(boxed).apply
    params = perturb(Gated(boxed).init(jax.random.key(0), x))
    plain = nn.meta.unbox(params)
    other = (
        plain
        if boxed
        else jax.tree.unflatten(
            jax.tree.structure(Gated(True).init(jax.random.key(0), x)), jax.tree.leaves(plain)
        )
    )
    folded = fold_checked(apply, params, x)
    assert (folded.report.n_folded, len(folded.plan.scales)) == (1, 1)
    before = snapshot(other)
    new = folded.plan.center(other)
    assert_identical(other, before)
    assert jax.tree.structure(new) == jax.tree.structure(other)
    assert_identical(jax.tree.leaves(new), snapshot(jax.tree.leaves(folded.params)))
    assert relative_difference(folded.apply(new, x), apply(params, x)) < 1e-12
    tx = optax.chain(optax.adam(1e-2), center_updates(folded.plan))
    updates, _ = tx.update(new, tx.init(new), new)
    moved = optax.apply_updates(new, updates)
    assert relative_difference(apply(moved, x), folded.apply(moved, x)) < 1e-12
    assert relative_difference(moved, new) > 1e-3
    # The updates in boxes, the parameters without them, or the other way round.
    mixed, _ = center_updates(folded.plan).update(
        jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(updates)),
        center_updates(folded.plan).init(new),
        new,
    )
    assert jax.tree.structure(mixed) == jax.tree.structure(params)
    inner = new["params"]
    renamed = {"params": {**inner, "Dense_0": {"weight": inner["Dense_0"]["kernel"]}}}
    with pytest.raises(TreeError, match=r"missing params/Dense_0/bias.*unknown params/Dense_0/wei"):
        folded.plan.center(renamed)


class Noisy(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.stem = nnx.Linear(7, 12, rngs=rngs, param_dtype=jnp.float64)
        self.norm = nnx.LayerNorm(12, rngs=rngs, param_dtype=jnp.float64)
        self.drop = nnx.Dropout(0.1, rngs=rngs, deterministic=True)
        self.head = nnx.Linear(12, 4, rngs=rngs, param_dtype=jnp.float64)

    def __call__(self, x: Array) -> Array:
        return self.head(self.drop(self.norm(self.stem(x))))


def test_plan_of_a_model_centers_its_parameters_alone() -> None:
    graph, state = nnx.split(Noisy(nnx.Rngs(0)))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 7)))
    folded = jax_lnfold.fold(lambda state, x: nnx.merge(graph, state)(x), state, x)
    assert folded.report.n_folded == 1
    alone, want = (nnx.to_pure_dict(nnx.filter_state(s, nnx.Param)) for s in (state, folded.params))
    assert_identical(folded.plan.center(alone), snapshot(want))
    del alone["head"]
    assert_identical(folded.plan.center(alone)["stem"], snapshot(want["stem"]))
    with pytest.raises(TreeError, match=r"missing .*head.*; pass a tree of the same structure"):
        folded.apply(alone, x)  # which needs them all
    with pytest.raises(TreeError, match=r"missing none; unknown tail/"):
        folded.plan.center({**alone, "tail": alone["norm"]})
    del alone["stem"]
    with pytest.raises(TreeError, match=r"missing stem/bias/value, stem/kernel/value; unknown no"):
        folded.plan.center(alone)


# --- other sizes ---------------------------------------------------------------------------------


def critics(p: Params, x: Array) -> Array:
    """A gate, a norm per head of queries, one of all that comes after it, and its scale."""
    h = (jnp.einsum("bi,eio->ebo", x, p["w"]) + p["b"]) * p["gate"]
    q = norm((norm(h) @ p["q"]).reshape(*h.shape[:2], 3, 4)).reshape(*h.shape[:2], 12)
    return (norm(h + q @ p["u"]) * p["g"]) @ p["v"]


def vmapped(p: Params, x: Array) -> Array:
    return jax.vmap(lambda p: critics(jax.tree.map(lambda a: a[None], p), x)[0])(p)


SHAPES = {"w": (7, 10), "b": (1, 10), "gate": (1, 10), "q": (10, 12), "u": (12, 10)}
SHAPES |= {"g": (1, 10), "v": (10, 3)}


def ensemble(members: int) -> tuple[Params, Array]:
    rng = np.random.default_rng(members)
    params = {k: jnp.asarray(rng.normal(0.4, 1, (members, *s))) for k, s in SHAPES.items()}
    return params, jnp.asarray(rng.normal(size=(6, 7)))


ALL_OF_IT = {"fold_affine": True, "defer_scale": True, "deferred_cost": 0}


@pytest.mark.parametrize("chosen", [[7, 2], [3], [*range(10), 0, 4]], ids=len)
@pytest.mark.parametrize(("apply", "options"), [(critics, {}), (vmapped, {}), (critics, ALL_OF_IT)])
def test_some_members_of_an_ensemble(
    apply: Callable[..., Array], options: dict[str, Any], chosen: list[int]
) -> None:
    params, x = ensemble(10)
    folded = fold_checked(apply, params, x, **options)
    assert (folded.report.n_folded, len(folded.plan.scales)) == (3, 1)
    some, new = (
        jax.tree.map(lambda a: a[jnp.array(chosen)], tree) for tree in (params, folded.params)
    )
    want = apply(some, x)
    assert relative_difference(folded.apply(new, x), want) < 1e-12
    new = folded.plan.center(some)
    assert jax.tree.map(jnp.shape, new) == jax.tree.map(jnp.shape, some)
    assert relative_difference(apply(new, x), want) < 1e-12
    assert relative_difference(jax.jit(folded.apply)(new, x), want) < 1e-12
    tx = center_updates(folded.plan)
    moved, _ = tx.update(jax.tree.map(jnp.cos, new), tx.init(new), new)
    after = optax.apply_updates(new, moved)
    assert relative_difference(folded.apply(after, x), apply(after, x)) < 1e-12
    with pytest.raises(TreeError, match=r"^updates: have other shapes than params"):
        tx.update(jax.tree.map(jnp.cos, folded.params), tx.init(new), new)


@pytest.mark.parametrize(
    ("name", "axis"), [("w", -1), ("b", -1), ("gate", -1), ("q", -1), ("w", 0), ("gate", 0)]
)
def test_sizes_that_matter(name: str, axis: int) -> None:
    """The width, the heads, and members of a gate that others take up, or of what takes it up."""
    params, x = ensemble(10)
    plan = jax_lnfold.plan_fold(critics, params, x)
    other = {**params, name: jnp.concatenate([params[name]] * 2, axis)}
    for use in (plan.center, center_updates(plan).init):
        with pytest.raises(TreeError, match=r"params: leaf '\w+' has shape .* fold .* again"):
            use(other)


def test_sizes_that_do_not_fit_each_other() -> None:
    """What a plan can edit leaf by leaf need not be parameters of the function."""
    params, x = ensemble(10)
    folded = jax_lnfold.fold(critics, params, x)
    for name in "qv":
        other = {**params, name: params[name][:2]}
        assert folded.plan.center(other)[name].shape == other[name].shape
        with pytest.raises(TraceError, match=r"^apply_fn: "):
            folded.apply(other, x)


def test_an_axis_of_one_element_says_nothing() -> None:
    """Over several it would be averaged."""

    def apply(p: Params, x: Array) -> Array:
        h = x @ p["w"].reshape(7, -1)
        return norm(h) @ p["v"]

    params, x = ensemble(1)
    p = {"w": params["w"].reshape(7, 1, 10), "v": params["v"][0]}
    folded = fold_checked(apply, p, x)
    assert folded.report.n_folded == 1
    wide = {"w": jnp.concatenate([p["w"]] * 3, 1), "v": jnp.concatenate([p["v"]] * 3)}
    for use in (folded.plan.center, lambda tree: folded.apply(tree, x)):
        with pytest.raises(TreeError, match=r"leaf 'w' has shape \(7, 3, 10\)"):
            use(wide)


def test_every_size_is_proved_anew() -> None:
    def apply(p: Params, x: Array) -> Any:
        """Few members show what is before the norm."""
        h = jnp.einsum("bi,eio->ebo", x, p["w"])
        y = norm(h) @ p["v"]
        return (y, h) if len(p["w"]) < 3 else (y, y)

    params, x = ensemble(5)
    params = {k: params[k] for k in "wv"}
    folded = fold_checked(apply, params, x)
    assert folded.report.n_folded == 1
    four, two = (jax.tree.map(lambda a, n=n: a[:n], folded.params) for n in (4, 2))
    assert relative_difference(folded.apply(four, x), apply(four, x)) < 1e-12
    with pytest.raises(PlanMismatchError, match=r"^inputs: .*'w' would be noticed"):
        folded.apply(two, x)


def test_fewer_layers_of_a_loop() -> None:
    def apply(p: Params, x: Array) -> Array:
        def layer(h: Array, p: Params) -> tuple[Array, None]:
            y = jnp.tanh((norm(h) * p["g"] + p["c"]) @ p["up"] + p["b"])
            return h + (y @ p["down"]) * p["gate"], None

        h, _ = jax.lax.scan(layer, x @ p["stem"], p["layers"])
        return norm(h) @ p["head"]

    rng = np.random.default_rng(0)
    shapes = {"up": (6, 10, 9), "b": (6, 9), "down": (6, 9, 10), "gate": (6, 10)}
    shapes |= {"g": (6, 10), "c": (6, 10)}
    layers = {k: jnp.asarray(rng.normal(0.3, 1, s)) for k, s in shapes.items()}
    p: Params = {"layers": layers, "stem": jnp.asarray(rng.normal(0.3, 1, (7, 10)))}
    p["head"], x = jnp.asarray(rng.normal(size=(10, 3))), jnp.asarray(rng.normal(size=(5, 7)))
    folded = fold_checked(apply, p, x, fold_affine=True)
    (merge,) = folded.plan.affine
    assert (folded.report.n_folded, len(folded.plan.scales), merge.shift) == (2, 1, "layers/c")
    for count in (1, 2, 4):
        fewer = {**p, "layers": jax.tree.map(lambda a, n=count: a[:n], layers)}
        new = folded.plan.center(fewer)
        assert relative_difference(apply(new, x), apply(fewer, x)) < 1e-12
        assert relative_difference(folded.apply(new, x), apply(fewer, x)) < 1e-12
