"""What layers and models of every framework are asked."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jax_lnfold
from tests.helpers.contracts import (
    check_contracts,
    count_reductions,
    counts,
    fold_checked,
    removed_sums,
    snapshot,
)

Apply = Callable[..., Any]
Edits = dict[str, tuple[int, ...]]


def draw(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape))


def ramp(leaf: Any) -> jax.Array:
    """Numbers from 1 to 2 in the shape and dtype of a leaf: statistics away from zero."""
    return jnp.linspace(1, 2, leaf.size, dtype=leaf.dtype).reshape(leaf.shape)


def writer(path: str, kernel: int = 1, bias: int = 0) -> Edits:
    """The edits of a linear layer of Flax, given the axes along which it is centered."""
    return {f"{path}/kernel": (kernel,), f"{path}/bias": (bias,)}


def check_folds(
    apply: Apply, params: Any, *inputs: Any, sizes: tuple[int, ...], sums: tuple[int, ...] = (3,)
) -> None:
    """The only LayerNorm folds, and of its `sums` over axes of `sizes` one is left.

    That is the sum of squares: a mean of `jnp.var` goes as well.
    """
    folded = jax_lnfold.fold(apply, params, *inputs)
    assert counts(folded.report) == (1, 1, 0)
    assert count_reductions(apply, params, *inputs, sizes=sizes) in sums
    assert count_reductions(folded.apply, folded.params, *inputs, sizes=sizes) == 1


def check_left(apply: Apply, params: Any, *inputs: Any, obstacle: str) -> None:
    """No LayerNorm folds, because of the obstacle."""
    report = jax_lnfold.analyze(apply, params, *inputs)
    assert report.norms
    assert (report.n_folded, report.n_inserted, report.edits) == (0, 0, ())
    assert obstacle in report.norms[-1].reason


def check_taken_up(taken: int, apply: Apply, params: Any, *inputs: Any, **options: Any) -> None:
    """The only scale is taken up, or it is not."""
    report = fold_checked(apply, params, *inputs, fold_affine=True, **options).report
    assert (len(report.affine), len(report.affine_left)) == (taken, 1 - taken)


class Fold(NamedTuple):
    """A body, how often its LayerNorms run, and the parameters besides `embed` that are edited."""

    body: Any
    counts: tuple[int, ...]
    edits: Edits


def check_folds_whole(
    apply: Apply, params: Any, runs: tuple[int, ...], x: Any, other: Any
) -> jax_lnfold.Report:
    """All LayerNorms fold, which run so often, and the one behind them; `other` is of new shape."""
    before = snapshot(params)
    folded = jax_lnfold.fold(apply, params, x)
    check_contracts(apply, params, folded, other, before=before)
    norms = folded.report.norms
    assert [(n.count, n.folded) for n in norms] == [(c, True) for c in (*runs, 1)]
    assert folded.report.n_inserted == 0
    assert removed_sums(apply, params, folded, x) == len(norms)
    return folded.report


def assert_left(
    file: str, apply: Apply, params: Any, *inputs: Any, norms: int, primitive: str
) -> None:
    """No LayerNorm folds, because of `primitive` in this file, and no parameter is touched."""
    folded = jax_lnfold.fold(apply, params, *inputs)
    report = folded.report
    assert counts(report) == (norms, 0, 0)
    assert (report.edits, report.scales) == ((), ())
    leaves = zip(jax.tree.leaves(folded.params), jax.tree.leaves(params), strict=True)
    assert all(new is old for new, old in leaves)
    for norm in report.norms:
        assert_blames(norm, primitive, file)


def assert_blames(norm: Any, primitive: str, file: str) -> None:
    """The reason why a norm is left names a primitive, and a line of the file."""
    assert re.search(rf"`{primitive}` \(.*{file}\.py:\d+\)", norm.reason), norm.reason


def check_as_accurate(
    apply: Apply, params: Any, folded: jax_lnfold.Folded, x: Any, exact: Any
) -> None:
    """In bfloat16 both programs, on folded parameters, are about as accurate as they were."""

    def error(y: jax.Array) -> float:
        assert y.dtype == jnp.bfloat16
        return float(jnp.sqrt(jnp.mean((y.astype(jnp.float64) - exact) ** 2)))

    original = error(apply(params, x))
    assert error(folded(x)) <= 1.5 * original
    assert error(apply(folded.params, x)) <= 1.5 * original
