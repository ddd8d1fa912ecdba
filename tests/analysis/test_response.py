"""What the algebra says about a shift, against the shift itself, on random expressions."""

from __future__ import annotations

from fractions import Fraction
from math import prod

import numpy as np
import pytest

from jax_lnfold.analysis.shift_algebra import (
    STOPPED_SHIFT,
    Refused,
    Sum,
    Tracked,
    X,
    product,
    scaled,
    stopped,
    summed,
    total,
)

SHAPE = (2, 3, 4)
Both = tuple[np.ndarray, np.ndarray]


class Expression:
    """A random expression in x of `SHAPE` and its copy: the algebra's view beside the numbers.

    Sums keep their axes with size 1, as values that vary along no axis but their own.
    """

    def __init__(self, rng: np.random.Generator, both: Both, shifts: Both) -> None:
        self.rng, self.refused = rng, 0
        (x, copy), (u, v) = both, shifts
        self.made = [(root(), x, x + u), (stopped(root()), copy, copy + v)]
        for _ in range(9):
            try:
                self.made.append(self.step())
            except Refused:
                self.refused += 1

    def step(self) -> tuple[Tracked, np.ndarray, np.ndarray]:
        (s, a, b), (t, c, d) = (self.made[i] for i in self.rng.integers(len(self.made), size=2))
        kind = self.rng.integers(4)
        if kind == 0:
            return product(s, t), a * c, b * d
        if kind == 1:
            return total(s, t), a + c, b + d
        if kind == 2:
            factor = Fraction(int(self.rng.integers(-3, 4)), int(self.rng.integers(1, 5)))
            return scaled(s, factor), a * float(factor), b * float(factor)
        axes = tuple(d for d in range(3) if a.shape[d] > 1 and self.rng.random() < 0.5)
        count = prod(a.shape[d] for d in axes)
        after = summed(s, frozenset(axes), count)
        return after, a.sum(axes, keepdims=True), b.sum(axes, keepdims=True)


def root() -> Tracked:
    return Tracked({(1, ()): Fraction(1)}, {X: Fraction(1)}, (0, 1, 2))


def value(factor: Sum, both: Both) -> np.ndarray:
    """A sum of x or of its copy."""
    x = both[factor.stopped]
    return x.sum(factor.axes, keepdims=True) if factor.axes else x


def evaluate(t: Tracked, both: Both, shifts: Both) -> np.ndarray:
    """The response as a number per element."""
    change, (u, v) = np.zeros(()), shifts
    for (degree, factors), number in t.response.items():
        behind = factors.count(STOPPED_SHIFT)
        values = (value(f, both) for f in factors if isinstance(f, Sum))
        term = u ** (degree - behind) * v**behind * prod(values, start=np.ones(()))
        change = change + float(number) * term
    return change


@pytest.mark.parametrize("seed", range(40))
def test_response_is_the_change(seed: int) -> None:
    """The shift differs between samples, as a shift along the other axes may."""
    rng = np.random.default_rng(seed)
    both = rng.normal(0.5, 1, SHAPE), rng.normal(0.5, 1, SHAPE)
    # A shift is uniform along the axes that are summed over: here all of them.
    shifts = rng.normal(0.5, 1, (1, 1, 1)), rng.normal(0.5, 1, (1, 1, 1))
    checked = 0
    for _ in range(20):
        expression = Expression(rng, both, shifts)
        for tracked, before, after in expression.made[1:]:
            change = evaluate(tracked, both, shifts)
            scale = max(1.0, np.abs(before).max(), np.abs(after).max())
            np.testing.assert_allclose(
                *np.broadcast_arrays(change, after - before), rtol=0, atol=1e-10 * scale
            )
            checked += len(tracked.response) > 1
    assert checked > 10


@pytest.mark.parametrize("seed", range(5))
def test_form_is_the_value(seed: int) -> None:
    rng = np.random.default_rng(seed)
    both = rng.normal(0.5, 1, SHAPE), rng.normal(0.5, 1, SHAPE)
    shift = np.ones((1, 1, 1))
    for tracked, made, _ in Expression(rng, both, (shift, shift)).made:
        if tracked.form is not None:
            terms = (float(n) * value(f, both) for f, n in tracked.form.items())
            np.testing.assert_allclose(*np.broadcast_arrays(sum(terms, np.zeros(())), made))


@pytest.mark.parametrize("seed", range(5))
def test_a_copy_is_the_expression_of_the_copy(seed: int) -> None:
    """Behind `stop_gradient` nothing is left of x and its shift."""
    rng = np.random.default_rng(seed)
    x, copy, u, v = (rng.normal(0.5, 1, shape) for shape in (SHAPE, SHAPE, (1,) * 3, (1,) * 3))
    for tracked, _, _ in Expression(rng, (x, copy), (u, v)).made:
        want = evaluate(tracked, (copy, copy), (v, v))
        got = evaluate(stopped(tracked), (x, copy), (u, v))
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-10)
        assert stopped(stopped(tracked)) == stopped(tracked)


def test_what_is_refused() -> None:
    x = root()
    mean = summed(x, frozenset({1}), 3)
    with pytest.raises(Refused, match="multiplies"):
        product(product(x, x), x)
    with pytest.raises(Refused, match="sums powers"):
        summed(product(x, mean), frozenset({1, 2}), 12)
