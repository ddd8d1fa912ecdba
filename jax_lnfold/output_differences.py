"""Differences between the outputs of two programs, measured where these are.

Arrays may be spread over several processes: no array is fetched, only one number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp


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
