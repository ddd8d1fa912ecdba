"""LayerNorms in many spellings, without scale and shift, and what only looks like one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jax import lax

Array = Any


def layer_norm(x: Array, axes: Any = -1) -> Array:
    """The usual one."""
    c = x - x.mean(axes, keepdims=True)
    return c * lax.rsqrt((c * c).mean(axes, keepdims=True) + 1e-5)


def _one_pass(x: Array, axis: Any) -> Array:
    mean = x.mean(axis, keepdims=True)
    second = jnp.mean(x * x, axis, keepdims=True) - mean**2
    return (x - mean) * lax.rsqrt(second + 0.1)


def two_pass(x: Array, axis: Any) -> Array:
    return (x - x.mean(axis, keepdims=True)) / jnp.sqrt(x.var(axis, keepdims=True) + 0.1)


def _own_variance(x: Array, axis: Any) -> Array:
    c = x - x.mean(axis, keepdims=True)
    return c / jnp.sqrt(jnp.square(c).mean(axis, keepdims=True) + 0.1)


def _unbiased(x: Array, axis: Any) -> Array:
    ddof = 0 if axis == -1 and x.shape[-1] == 1 else 1
    return (x - x.mean(axis, keepdims=True)) / (x.std(axis, keepdims=True, ddof=ddof) + 0.3)


def _flax(x: Array, axis: Any) -> Array:
    axes = axis if isinstance(axis, tuple) else (axis,)
    norm = nn.LayerNorm(0.1, use_bias=False, use_scale=False, reduction_axes=axes)
    return norm.apply({}, x)


def _standardize(x: Array, axis: Any) -> Array:
    return nn.standardize(x, axis=axis, epsilon=0.1)


def _distributed(x: Array, axis: Any) -> Array:
    a = lax.rsqrt(jnp.var(x, axis, keepdims=True) + 0.1)
    return x * a - x.mean(axis, keepdims=True) * a


def _single_statistics(x: Array, axis: Any) -> Array:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return ((wide - wide.mean(axis, keepdims=True)) / (wide.std(axis, keepdims=True) + 0.3)).astype(
        x.dtype
    )


def rms(x: Array, axis: Any) -> Array:
    return x * lax.rsqrt(jnp.mean(x * x, axis, keepdims=True) + 0.1)


def _rms_of_centered(x: Array, axis: Any) -> Array:
    """The mean is taken out of the value, not out of the variance."""
    second = jnp.mean(x * x, axis, keepdims=True)
    return (x - x.mean(axis, keepdims=True)) * lax.rsqrt(second + 0.1)


def _masked(x: Array, axis: Any) -> Array:
    kept = x > x.mean(axis, keepdims=True) - 0.1
    mean = x.mean(axis, keepdims=True, where=kept)
    return (x - mean) * lax.rsqrt(x.var(axis, keepdims=True, where=kept) + 0.1)


def _mean_stopped(x: Array, axis: Any) -> Array:
    """Its values, not its gradients, are those of a LayerNorm."""
    mean = lax.stop_gradient(x.mean(axis, keepdims=True))
    return (x - mean) * lax.rsqrt(x.var(axis, keepdims=True) + 0.1)


def _variance_stopped(x: Array, axis: Any) -> Array:
    variance = lax.stop_gradient(x.var(axis, keepdims=True))
    return (x - x.mean(axis, keepdims=True)) * lax.rsqrt(variance + 0.1)


def _statistics_of_stopped(x: Array, axis: Any) -> Array:
    still = lax.stop_gradient(x)
    mean, variance = still.mean(axis, keepdims=True), still.var(axis, keepdims=True)
    return (x - mean) / jnp.sqrt(variance + 0.1)


def _stopped(x: Array, axis: Any) -> Array:
    return lax.stop_gradient(two_pass(x, axis))


SMOOTH: list[Callable[..., Array]] = [
    _one_pass,
    two_pass,
    _standardize,
    _own_variance,
    _unbiased,
    _flax,
    _distributed,
    _single_statistics,
    rms,
    _rms_of_centered,
    _mean_stopped,
    _variance_stopped,
    _statistics_of_stopped,
    _stopped,
]
NORMS = [*SMOOTH, _masked]


# With scale and shift: what is only scaled, and what is shifted besides.

Scaled = tuple[Array, Array]


def _plain(norm: Callable[[Array], Array], x: Array, g: Array, c: Array) -> Scaled:
    y = norm(x) * g
    return y, y + c


def _one_plus(norm: Callable[[Array], Array], x: Array, g: Array, c: Array) -> Scaled:
    y = norm(x) * (1 + g)
    return y, y + c


def _shift_first(norm: Callable[[Array], Array], x: Array, g: Array, c: Array) -> Scaled:
    y = (g + 1) * norm(x)
    return y, c + y


def _product_twice(norm: Callable[[Array], Array], x: Array, g: Array, c: Array) -> Scaled:
    mean = x.mean(-1, keepdims=True)
    scale = lax.rsqrt(x.var(-1, keepdims=True) + 0.1) * g
    return x * scale - mean * scale, x * scale + (c - mean * scale)


def _never_shifted(norm: Callable[[Array], Array], x: Array, g: Array, c: Array) -> Scaled:
    y = norm(x) * g
    return y, y


SCALED = [*3 * [_plain], _one_plus, _shift_first, _product_twice, _never_shifted]
