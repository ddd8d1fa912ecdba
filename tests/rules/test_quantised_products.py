"""Products that quantise: exact where the weight stays as it is, refused where it is rounded."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_lnfold
from jax_lnfold import FoldError, rules
from tests.helpers.contracts import counts, fold_checked, relative_difference
from tests.kernels.kernels import norm, primitive_of

RNG = np.random.default_rng(0)
LEVELS = 127


def draw(*shape: int) -> Any:
    return jnp.asarray(RNG.normal(size=shape))


def quantised(x: Any, axis: int) -> Any:
    """To 8 bits and back, with the largest number along an axis for a scale."""
    scale = jnp.abs(x).max(axis, keepdims=True).clip(1e-9) / LEVELS
    return jnp.round(x / scale) * scale


def of_activations(x: Any, w: Any) -> Any:
    return quantised(x, -1) @ w


def of_both(x: Any, w: Any) -> Any:
    return quantised(x, -1) @ quantised(w, 0)


def straight_through(x: Any, w: Any) -> Any:
    """As in training that knows of quantisation: rounded, with the derivative of the product."""
    rounded = w + jax.lax.stop_gradient(quantised(w, 0) - w)
    return x @ rounded


def model(product: Any) -> Any:
    def run(p: Any, x: Any) -> Any:
        h = product(x, p["embed"])
        h = h + product(jnp.tanh(norm(h, p["g"], p["b"])), p["w"])
        return norm(h, p["b"], p["g"]) @ p["head"]

    return run


PARAMS = {"embed": draw(4, 6), "g": draw(6), "b": draw(6), "w": draw(6, 6), "head": draw(6, 3)}
X = draw(5, 4)


def test_quantised_activations_leave_it_linear_in_the_weight() -> None:
    kernel = primitive_of("product_of_quantised_activations", of_activations)
    rule = rules.linear("nk,km->nm", [1])
    found = rules.check_rule(kernel.bind, (3, 4), (4, 5), rule=rule)
    assert min(found.pulls, found.pushes, found.axes) > 0
    with pytest.raises(FoldError, match="rule: "):
        rules.check_rule(kernel.bind, (3, 4), (4, 5), rule=rules.linear("nk,km->nm"))
    rules.register(kernel, rule)
    folded = fold_checked(model(kernel.bind), PARAMS, X)
    assert counts(folded.report) == (2, 2, 0)


@pytest.mark.parametrize("product", [of_both, straight_through])
def test_quantised_weights_are_refused_with_the_numbers(product: Any) -> None:
    """Columns of which each is rounded by itself have no mean of zero."""
    kernel = primitive_of("quantised_product", product)
    with pytest.raises(FoldError, match=r"pull: result 0 has a mean of [\d.e-]+ along"):
        rules.check_rule(kernel.bind, (3, 4), (4, 5), rule=rules.linear("nk,km->nm", [1]))


def test_what_a_declaration_against_the_test_costs() -> None:
    """Registered all the same, a fold is off by as much as quantising is, not by rounding."""
    kernel = primitive_of("trusted_quantised_product", of_both)
    rules.register(kernel, rules.linear("nk,km->nm", [1]))
    folded = jax_lnfold.fold(model(kernel.bind), PARAMS, X)
    assert counts(folded.report) == (2, 2, 0)
    want = model(kernel.bind)(PARAMS, X)
    off = relative_difference(folded(X), want)
    quantising = relative_difference(want, model(jnp.matmul)(PARAMS, X))
    assert 1e-6 < off < 3 * quantising < 0.2


@pytest.mark.parametrize("product", [of_both, straight_through])
def test_in_plain_sight_rounded_weights_are_left_alone(product: Any) -> None:
    """The same in jax's own operations, as of qwix: rounding does not carry a mean."""
    folded = fold_checked(model(product), PARAMS, X)
    assert folded.report.n_folded == 0
    exact = fold_checked(model(of_activations), PARAMS, X)
    assert counts(exact.report) == (2, 2, 0)
