"""Which arrays share their memory with no other one, so that they may give it up."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Span = tuple[str, int, int]
"""Whose memory it is, where it begins, and where it ends."""


def unshared(leaves: Sequence[Any], which: Collection[int]) -> set[int]:
    """Those among `which` that may be written to, and share memory with no leaf.

    NumPy's views of something else, and files, are not; JAX arrays may always be.
    """
    own = {i for i in which if isinstance(leaves[i], jax.Array) or _is_own(leaves[i])}
    if not own:
        return set()
    spans = sorted((*span, i) for i, x in enumerate(leaves) for span in _spans(x))
    shared, last = set[int](), ("", -1, -1, -1)
    for of, begin, stop, i in spans:
        if of == last[0] and begin < last[2]:
            shared |= {i, last[3]} if i != last[3] else set()
        if of != last[0] or stop > last[2]:
            last = of, begin, stop, i
    return own - shared


def _is_own(x: Any) -> bool:
    return type(x) is np.ndarray and x.flags.owndata and x.flags.writeable


def _spans(x: Any) -> Iterator[Span]:
    """Where a leaf is in memory: jax may keep to that of NumPy, or of another array of its own."""
    if isinstance(x, jax.Array):
        if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            alone = len(x.sharding.device_set) == 1  # its shard would be another array
            for part in [x] if alone else [shard.data for shard in x.addressable_shards]:
                (device,) = part.devices()
                begin = part.unsafe_buffer_pointer()
                yield "" if device.platform == "cpu" else str(device.id), begin, begin + part.nbytes
    elif isinstance(x, np.ndarray) and x.size:
        steps = [(n - 1) * step for n, step in zip(x.shape, x.strides, strict=True)]
        below, above = (sum(s for s in steps if (s < 0) == down) for down in (True, False))
        yield "", x.ctypes.data + below, x.ctypes.data + above + x.itemsize
