"""Differences between the outputs of two programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def float_outputs(tree: Any) -> list[np.ndarray]:
    """The floating-point leaves of a tree of arrays, in float64."""
    arrays = (x for x in jax.tree.leaves(tree) if hasattr(x, "dtype"))
    return [np.asarray(x, np.float64) for x in arrays if jnp.issubdtype(x.dtype, jnp.floating)]


def largest(a: Sequence[np.ndarray]) -> float:
    """The largest magnitude."""
    return max((float(np.max(np.abs(x), initial=0.0)) for x in a), default=0.0)


def largest_difference(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> float:
    """The largest magnitude of ``a - b``."""
    return largest([x - y for x, y in zip(a, b, strict=True)])
