"""Parameter leaves as layers read them: few of them, so that any two roles may meet in one leaf."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import jax.numpy as jnp
import numpy as np

Params = dict[str, Any]  # NumPy arrays outside, tracers inside


@dataclass(frozen=True)
class Leaf:
    """A leaf, moved or in part, or several side by side: a function of all parameters."""

    name: str
    names: tuple[str, ...]
    """Of the whole leaves."""
    read: Callable[..., Any]

    def __call__(self, params: Params) -> Any:
        return self.read(*(params[name] for name in self.names))


class Pool:
    """Gives out arrays of the shapes asked for, mostly such as have been given out before.

    Of one shape there are at most `spare` leaves. Everything else is read from a leaf that has
    another role, or another shape: a bias from a row of a table, a kernel from its transpose.
    """

    def __init__(self, rng: np.random.Generator, spare: int) -> None:
        self.rng, self.spare = rng, spare
        self.params: Params = {}

    def array(self, *shape: int) -> np.ndarray:
        """A NumPy array: its edit needs no compilation."""
        return self.rng.standard_normal(shape) / 2 + 0.1

    def leaf(self, shape: tuple[int, ...]) -> Leaf:
        """A new leaf, one of this shape, or a view of others."""
        own = [_whole(name) for name, x in self.params.items() if x.shape == shape]
        views = [*self._views(shape), *self._joined(shape)]
        view = [views[self.rng.integers(len(views))]] if views else []
        new: list[Leaf | None] = [None] * max(0, self.spare - len(own))
        options = [*new, *own, *view]
        return options[self.rng.integers(len(options))] or self.new(shape)

    def new(self, shape: tuple[int, ...]) -> Leaf:
        name = f"p{len(self.params)}"
        self.params[name] = self.array(*shape)
        return _whole(name)

    def _views(self, shape: tuple[int, ...]) -> Iterator[Leaf]:
        """Leaves of other shapes, transposed, reshaped or in part."""
        for name, x in self.params.items():
            row, column = (self.rng.integers(x.shape[d]) for d in (0, -1))
            if x.ndim > 1 and x.shape == shape[::-1]:
                yield Leaf(f"{name}.T", (name,), lambda x: x.T)
            if x.size == prod(shape) and x.shape != shape:
                yield Leaf(f"{name}.reshape", (name,), lambda x: x.reshape(shape))
            if x.shape[1:] == shape:
                yield Leaf(f"{name}[{row}]", (name,), lambda x, k=row: x[k])
            if x.ndim > 1 and x.shape[:-1] == shape:
                yield Leaf(f"{name}[..., {column}]", (name,), lambda x, k=column: x[..., k])
            if x.shape == 2 * shape:
                yield Leaf(f"diagonal({name})", (name,), jnp.diagonal)
            if x.ndim == len(shape) == 1 and x.size > prod(shape):
                yield Leaf(f"{name}[:{shape[0]}]", (name,), lambda x: x[: shape[0]])

    def _joined(self, shape: tuple[int, ...]) -> Iterator[Leaf]:
        """Leaves stacked for a loop, or put side by side as in a fused projection."""
        rows = [name for name, x in self.params.items() if x.shape == shape[1:]]
        if rows:
            names = tuple(map(str, self.rng.choice(rows, shape[0])))
            yield Leaf(f"stack({' '.join(names)})", names, lambda *rows: jnp.stack(rows))
        for n in (2, 3):
            part = (*shape[:-1], shape[-1] // n)
            parts = [name for name, x in self.params.items() if x.shape == part]
            if parts and len(shape) == 2 and shape[-1] % n == 0:
                names = tuple(map(str, self.rng.choice(parts, n)))
                text = f"concatenate({' '.join(names)})"
                yield Leaf(text, names, lambda *parts: jnp.concatenate(parts, -1))


def _whole(name: str) -> Leaf:
    return Leaf(name, (name,), lambda x: x)
