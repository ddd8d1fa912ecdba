"""The operator C_S: the means of groups of positions (theory, section 1)."""

from __future__ import annotations

from math import gcd, prod, sqrt
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .axes.axis_set import AxisSet
from .axes.labels import ALL, FREE

Shape = tuple[int, ...]


def widened(*dtypes: Any) -> np.dtype[Any]:
    """The first of float32 and float64, or of complex64 and complex128, that holds these numbers.

    As `jax.numpy.promote_types` says it, which asks how a user wants to promote, though.
    """
    double = any(jnp.finfo(dtype).bits > 32 for dtype in dtypes)
    if any(jnp.issubdtype(dtype, jnp.complexfloating) for dtype in dtypes):
        return np.dtype(np.complex128 if double else np.complex64)
    return np.dtype(np.float64 if double else np.float32)


def group_means(x: Any, along: AxisSet, xp: Any, part: Shape | None = None) -> Any:
    """The mean of every group, at each of its positions; zero outside the region."""
    if all(isinstance(e, str) for e in along.entries):
        return xp.mean(x, axis=along.axes, keepdims=True) if along.axes else x
    means = x
    for d, entry in enumerate(along.entries):
        if entry == ALL:
            means = xp.mean(means, axis=d, keepdims=True)
        elif entry != FREE:
            held = len(along.labels(d)) if part is None else part[d]
            means = _label_means(means, along.labels(d), d, xp, held)
    return means


def rounding_of_means(
    x: Any, dtype: Any, along: AxisSet, xp: Any, part: Shape | None = None
) -> Any:
    """How large the mean of every group may be by the rounding of ``x`` to `dtype` alone.

    That is the unit roundoff times the root mean square: means of rounding errors get near it, as
    numbers of one binade from which one number is taken are all rounded by the same. If ``x`` has
    no more digits, it is the square root of n as much, for the sum of n numbers is rounded, too.
    """
    unit = float(jnp.finfo(dtype).eps) / 2
    if jnp.finfo(x.dtype).nmant <= jnp.finfo(dtype).nmant:
        unit *= sqrt(prod(along.shape[d] for d in along.axes))
    largest = abs(x).max(initial=0)  # squares of larger numbers might overflow
    scale = xp.where(largest > 0, largest, xp.ones((), largest.dtype))
    with np.errstate(under="ignore"):
        squares = group_means(xp.square(abs(x) / scale), along, xp, part)
    return unit * scale * xp.sqrt(squares)


def _label_means(x: Any, labels: np.ndarray, axis: int, xp: Any, held: int) -> Any:
    """The mean over equal labels along one axis, zero where the label is -1.

    Runs of equal labels are summed up first. None reaches beyond the `held` positions of one
    device, so that devices exchange these sums only.
    """
    size, count = len(labels), int(labels.max()) + 1
    width = gcd(size, held, *(np.flatnonzero(np.diff(labels)) + 1).tolist())
    runs = x.reshape(*x.shape[:axis], size // width, width, *x.shape[axis + 1 :])
    sums = runs.sum(axis=axis + 1)
    of = labels[::width].reshape(-1, *[1] * (x.ndim - axis - 1))

    def add_group(group: Any, means: Any) -> Any:
        member = of == group
        total = xp.where(member, sums, xp.zeros((), x.dtype)).sum(axis=axis, keepdims=True)
        return xp.where(member, total / (width * member.sum()).astype(x.dtype), means)

    means = xp.zeros_like(sums)
    if np.count_nonzero(of >= 0) == count:  # one run each
        means = xp.where(of >= 0, sums / width, means)
    elif xp is np or count <= 4:  # compilers fuse the few
        for group in range(count):
            means = add_group(group, means)
    else:
        means = jax.lax.fori_loop(0, count, add_group, means)
    return xp.repeat(means, width, axis=axis)
