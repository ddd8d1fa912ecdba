"""Numbers to test a declaration with: where the norm is given no mean, shifted, large and small."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..axes.axis_set import AxisSet
from ..centering import group_means, widened
from ..errors import FoldError
from ..program.declared import DeclaredCall

LARGE = {8: 2.0**2, 16: 2.0**6, 32: 2.0**16}
"""Spreads, by bits, at which an epsilon that a formula leaves out makes no difference."""
SMALL: dict[int, tuple[float, ...]] = {8: (), 16: (2.0**-8,), 32: (2.0**-10, 2.0**-20)}
"""Spreads at which it makes one if another function has another epsilon."""
SHARE = 0.75
"""Of ones in the first mask that has zeros; the second one has ones where that has zeros."""
BLOCK = 2**20 - 3
"""So many random numbers are drawn; larger arrays repeat them."""
Sets = dict[int, tuple[AxisSet, ...]]
"""What of the operands has to be zero-mean so that the norm is given no mean."""


def masks(call: DeclaredCall, given: Mapping[int, Any]) -> Iterator[dict[int, Any]]:
    """The operands that are no floating-point numbers: as given, or ones, then zeros and ones."""
    others = {
        i: aval
        for i, aval in enumerate(call.program.in_avals)
        if not jnp.issubdtype(aval.dtype, jnp.floating)
    }
    known = {i: x for i, x in given.items() if i in others and _has_numbers(x)}
    keys = {i: a for i, a in others.items() if jnp.issubdtype(a.dtype, jax.dtypes.prng_key)}
    known |= {i: _keys(call, aval) for i, aval in keys.items() if i not in known}
    free = {i: aval for i, aval in others.items() if i not in known}
    yield known | {i: np.ones(aval.shape, aval.dtype) for i, aval in free.items()}
    if free:
        drawn = np.random.default_rng(1).random(BLOCK) < SHARE
        for numbers in (drawn, ~drawn):
            yield known | {i: np.resize(numbers, a.shape).astype(a.dtype) for i, a in free.items()}


def _has_numbers(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray | np.generic)


def _keys(call: DeclaredCall, aval: Any) -> jax.Array:
    """Random keys."""
    keys = jax.random.key(np.zeros((), np.uint32))
    if keys.dtype != aval.dtype:
        raise FoldError(
            f"layer_norm: {call.name} has keys of another implementation than the default one; "
            "pass them to check_layer_norm, or declare it with check=False"
        )
    return jnp.broadcast_to(keys, aval.shape)


def operands(
    call: DeclaredCall, sets: Sets, known: Mapping[int, Any]
) -> tuple[list[Any], list[Any]]:
    """Random operands for which the norm is given no mean, and the same shifted."""
    rng, zero, shifted = np.random.default_rng(0), [], []
    for i, aval in enumerate(call.program.in_avals):
        if i in known:
            zero.append(known[i])
            shifted.append(known[i])
            continue
        if i not in sets:
            moved = x = _filled(rng.uniform(0.5, 1.5, BLOCK), aval)
        else:
            x, shift = (_filled(rng.normal(size=BLOCK), aval) for _ in range(2))
            for along in sets[i]:
                x, shift = x - group_means(x, along, np), group_means(shift, along, np)
            moved = x + 2 * shift / (np.sqrt(np.mean(np.square(shift))) or 1)
        zero.append(np.asarray(x, aval.dtype))
        shifted.append(np.asarray(moved, aval.dtype))
    return zero, shifted


def _filled(numbers: np.ndarray, aval: Any) -> np.ndarray:
    """An array of these numbers, again and again if it is larger."""
    return np.resize(numbers.astype(widened(aval.dtype)), aval.shape)


def large(call: DeclaredCall) -> float:
    """A spread that is large against every epsilon."""
    return LARGE[_bits(call)]


def small(call: DeclaredCall) -> tuple[float, ...]:
    """Spreads that are small against some."""
    return SMALL[_bits(call)]


def _bits(call: DeclaredCall) -> int:
    """Of the narrowest range of numbers; that of bfloat16 is as wide as that of float32."""
    kinds = [a.dtype for a in call.program.in_avals if jnp.issubdtype(a.dtype, jnp.floating)]
    range_ = min(float(jnp.finfo(d).max) for d in kinds)
    return 32 if range_ > 1e6 else 16 if np.dtype(np.float16) in kinds else 8


def scaled(sets: Sets, given: Sequence[Any], spread: float) -> list[Any]:
    """The operands, what the norm reads with this spread."""
    return [x * x.dtype.type(spread) if i in sets else x for i, x in enumerate(given)]
