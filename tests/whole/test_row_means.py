"""Means of updates by products with ones, as TPUs take them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_lnfold.axes.axis_set import AxisSet
from jax_lnfold.training import _means_by_product, _means_of_update
from tests.helpers.contracts import relative_difference

X = np.random.default_rng(0).normal(0.3, 1, (5, 96))


@pytest.mark.parametrize(("dtype", "error"), [(jnp.float64, 1e-14), (jnp.float32, 3e-7)])
def test_products_are_means_of_rows(dtype: Any, error: float) -> None:
    """What is not finite stays in its row."""
    x = jnp.asarray(X, dtype)
    want = np.asarray(x, np.float64).mean(1, keepdims=True)
    assert relative_difference(_means_by_product(x), want) < error
    spoilt = x.at[2, 3].set(jnp.inf).at[4, 1].set(jnp.nan)
    found = np.isfinite(_means_by_product(spoilt))[:, 0]
    assert found.tolist() == [True, True, False, True, False]


@pytest.mark.parametrize(("axis", "products"), [(1, 1), (0, 0)])
def test_which_platform_takes_products(axis: int, products: int) -> None:
    """A TPU, for sums along the last axis."""
    along = AxisSet.over(X.shape, [axis])
    run = jax.jit(lambda x: _means_of_update(x, along))
    x = jnp.asarray(X, jnp.float32)
    np.testing.assert_allclose(run(x), X.mean(axis, keepdims=True), atol=1e-6)
    counts = {
        platform: run.trace(x).lower(lowering_platforms=(platform,)).as_text().count("dot_general")
        for platform in ("tpu", "cpu", "cuda")
    }
    assert counts == {"tpu": products, "cpu": 0, "cuda": 0}
