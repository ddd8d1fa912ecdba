"""What a user asks jax to be strict about: folding does nothing that these settings refuse."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jax_lnfold
from jax_lnfold import Folded, center_gradients, center_updates
from tests.helpers.contracts import assert_identical, fold_checked, snapshot
from tests.models.zoo import ZOO, Case

Array = jax.Array
PyTree = Any
DTYPES = ("bfloat16", "float32", "float64")
QUICK = {"dinov2", "qk_norm_stacked", "bloom"}
"""Between them they merge scales, center in groups and insert centerings."""


@pytest.fixture
def strict() -> Iterator[None]:
    with ExitStack() as settings:
        settings.enter_context(jax.numpy_dtype_promotion("strict"))
        settings.enter_context(jax.numpy_rank_promotion("raise"))
        settings.enter_context(jax.checking_leaks())
        settings.enter_context(jax.debug_nans(True))
        yield


def lenient(apply_fn: Callable[..., Any]) -> Callable[..., Any]:
    """The model promotes as it likes: all that is strict is what is done to it."""

    def apply(*args: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return apply_fn(*args)

    return apply


def in_dtype(tree: PyTree, dtype: str) -> PyTree:
    return jax.tree.map(
        lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


def train(folded: Folded, inputs: tuple[Array, ...]) -> PyTree:
    """One step, of which it is only asked that it can be traced."""
    plan = folded.plan
    tx = optax.chain(center_gradients(plan), optax.sgd(1e-2), center_updates(plan))

    def loss(params: PyTree) -> Array:
        outputs = jax.tree.leaves(folded.apply(params, *inputs))
        floats = (x for x in outputs if jnp.issubdtype(x.dtype, jnp.floating))
        return sum((jnp.sum(x.astype("float64")) for x in floats), jnp.zeros((), "float64"))

    def step(params: PyTree) -> PyTree:
        updates, _ = tx.update(jax.grad(loss)(plan.center(params)), tx.init(params), params)
        return optax.apply_updates(params, updates)

    return jax.make_jaxpr(step)(folded.params)


CASES = [c if str(c) in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in ZOO]


@pytest.mark.usefixtures("strict")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_zoo_is_folded_and_trained_under_strict_settings(case: Case) -> None:
    model = lenient(case.build)()
    for dtype in DTYPES[:1] if str(case) in QUICK else DTYPES:
        params, inputs = in_dtype((model.params, model.inputs), dtype)
        fold = partial(jax_lnfold.fold, lenient(model.apply_fn))
        for some in (params, jax.tree.map(np.asarray, params)):
            all_of_it = fold(
                some, *inputs, fold_affine=True, defer_scale=True, deferred_cost=0, explicit_cost=1
            )
            jax.make_jaxpr(all_of_it.apply)(all_of_it.params, *inputs)
        train(fold(params, *inputs), inputs)
        fold(jax.tree.map(jnp.copy, params), *inputs, donate=True, fold_affine=True)


def norm(x: Array) -> Array:
    c = x - x.mean(-1, keepdims=True)
    eps = jnp.asarray(1e-5, x.dtype)
    return c * jax.lax.rsqrt((c * c).mean(-1, keepdims=True) + eps)


def clean(p: dict[str, Array], x: Array) -> Array:
    """Every operand has one dtype: a merge, means in groups, an explicit centering, two scales."""
    h = norm((x @ p["w"] * p["gate"]).reshape(5, 3, 4)).reshape(5, 12)
    r = jax.nn.relu(h @ p["u"])
    return sum((norm(r + a) * p["g"] + p["c"]) @ p["v"] + p["b"] for a in (r, r * 2, r * 3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_strict_model_folds_as_with_the_settings_of_everyone(dtype: str, request: Any) -> None:
    rng = np.random.default_rng(0)
    shapes = {"w": (7, 12), "gate": (1, 12), "u": (12, 10), "g": (1, 10), "c": (1, 10)}
    shapes |= {"v": (10, 3), "b": (1, 3)}
    params = {name: jnp.asarray(rng.normal(0.5, 1, s), dtype) for name, s in shapes.items()}
    x = jnp.asarray(rng.normal(size=(5, 7)), dtype)
    options: dict[str, Any] = {"fold_affine": True, "defer_scale": True, "deferred_cost": 0}
    fold = partial(fold_checked, clean, params, x, rtol=50 * float(jnp.finfo(dtype).eps))
    before = fold(**options)
    request.getfixturevalue("strict")
    after = fold(**options)
    assert after.plan == before.plan
    assert (after.report.n_folded, after.report.n_inserted) == (4, 1)
    assert (len(after.plan.scales), len(after.plan.affine), len(after.report.deferred)) == (1, 1, 3)
    assert_identical(after.params, snapshot(before.params))
    assert_identical(jax.jit(after.plan.center)(params), snapshot(before.params))
    train(after, (x,))
