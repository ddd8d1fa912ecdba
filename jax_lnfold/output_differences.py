"""Differences between the outputs of two programs, measured where these are.

Arrays may be spread over several processes: no array is fetched, only one number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


def float_outputs(tree: Any) -> list[jax.Array]:
    """The real and complex leaves of a tree of arrays."""
    arrays = (x for x in jax.tree.leaves(tree) if hasattr(x, "dtype"))
    return [x for x in arrays if jnp.issubdtype(x.dtype, jnp.inexact)]


def largest(a: Sequence[jax.Array]) -> float:
    """The largest magnitude."""
    with jax.enable_x64(True):
        return float(_largest([*a]))


def largest_difference(a: Sequence[jax.Array], b: Sequence[jax.Array]) -> float:
    """The largest magnitude of ``a - b``; numbers that are the same, infinite ones too, are 0."""
    with jax.enable_x64(True):
        return float(_largest_difference([*a], [*b]))


class Squares(NamedTuple):
    """Of each array, ``sum |a - b|**2`` and ``sum |a|**2`` as float64.

    Infinite numbers are left out where both have the same.
    """

    differences: np.ndarray
    sizes: np.ndarray

    @property
    def error(self) -> float:
        """``|a - b| / |a|`` of the array for which it is largest."""
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = np.sqrt(self.differences / self.sizes)
        return float(np.max(np.where(self.differences == 0, 0, ratios), initial=0))


def squares(a: Sequence[jax.Array], b: Sequence[jax.Array]) -> Squares:
    """How far `b` is off `a`; these can be added for several batches."""
    with jax.enable_x64(True):
        return Squares(*(np.asarray(x) for x in jax.device_get(_squares([*a], [*b]))))


@jax.jit
def _squares(a: list[jax.Array], b: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
    found = [jnp.zeros((2, 0))]
    for x, y in zip(map(_wide, a), map(_wide, b), strict=True):
        same = (x == y) & ~jnp.isfinite(x)
        both = jnp.where(same, 0, x - y), jnp.where(same, 0, x)
        found.append(jnp.stack([jnp.sum(jnp.abs(z) ** 2) for z in both])[:, None])
    first, second = jnp.concatenate(found, axis=1)
    return first, second


class LogitDifference(NamedTuple):
    """Sums over `rows`, each of them logits along the last axis.

    `divergence` is ``KL(softmax(a) || softmax(b))`` in nats, `agreeing` counts those with the
    largest number at the same place.
    """

    divergence: float
    agreeing: float
    rows: int


def logit_difference(a: Sequence[jax.Array], b: Sequence[jax.Array]) -> LogitDifference:
    """How far the distributions of logits `b` are off those of `a`."""
    with jax.enable_x64(True):
        divergence, agreeing = _logit_difference([*a], [*b])
        rows = sum(x.size // max(1, x.shape[-1]) for x in a)
        return LogitDifference(float(divergence), float(agreeing), rows)


@jax.jit
def _logit_difference(a: list[jax.Array], b: list[jax.Array]) -> tuple[jax.Array, jax.Array]:
    divergence, agreeing = jnp.zeros(()), jnp.zeros(())
    for x, y in zip(map(_wide, a), map(_wide, b), strict=True):
        p, q = jax.nn.log_softmax(x), jax.nn.log_softmax(y)
        terms = jnp.exp(p) * jnp.where(p == -jnp.inf, 0, p - q)
        divergence += jnp.sum(terms)
        agreeing += jnp.sum(x.argmax(-1) == y.argmax(-1))
    return divergence, agreeing


@jax.jit
def _largest(arrays: list[jax.Array]) -> jax.Array:
    sizes = [jnp.max(jnp.abs(_wide(x)), initial=0).astype(jnp.float64) for x in arrays]
    return jnp.max(jnp.stack(sizes), initial=0) if sizes else jnp.zeros(())


@jax.jit
def _largest_difference(a: list[jax.Array], b: list[jax.Array]) -> jax.Array:
    pairs = ((_wide(x), _wide(y)) for x, y in zip(a, b, strict=True))
    return _largest([jnp.where(x == y, 0, x - y) for x, y in pairs])


def _wide(x: jax.Array) -> jax.Array:
    is_complex = jnp.issubdtype(x.dtype, jnp.complexfloating)
    return x.astype(jnp.complex128 if is_complex else jnp.float64)
