"""Keyword arguments of a call: arrays are inputs like all others, what else there is, is bound."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import numpy as np

from ..errors import FoldError


@jax.tree_util.register_pytree_with_keys_class
class Keywords:
    """The last input of a call with keywords: a pytree of the arrays among them.

    What is bound is a part of the tree's structure, so that another value is another signature.
    """

    def __init__(self, arrays: Mapping[str, Any], bound: Mapping[str, Any]) -> None:
        """Hold both kinds; raises a `FoldError` if something bound cannot be compared."""
        self.arrays, self.bound = dict(arrays), dict(bound)
        self._key = tuple((name, _comparable(name, x)) for name, x in sorted(self.bound.items()))

    def tree_flatten_with_keys(self) -> tuple[Any, Hashable]:
        """The arrays, by name; all else is structure."""
        names = tuple(sorted(self.arrays))
        children = tuple((jax.tree_util.DictKey(n), self.arrays[n]) for n in names)
        return children, _Bound(names, self.bound, self._key)

    @classmethod
    def tree_unflatten(cls, structure: _Bound, children: Any) -> Keywords:
        """Other arrays of the same names."""
        made = object.__new__(cls)
        made.arrays = dict(zip(structure.names, children, strict=True))
        made.bound, made._key = structure.bound, structure.key
        return made


class _Bound:
    """What is bound, compared by a key that can be hashed."""

    def __init__(self, names: tuple[str, ...], bound: dict[str, Any], key: Hashable) -> None:
        self.names, self.bound, self.key = names, bound, key

    def __eq__(self, other: object) -> bool:
        same = isinstance(other, _Bound)
        return same and (self.names, self.key) == (other.names, other.key)

    def __hash__(self) -> int:
        return hash((self.names, self.key))


def with_keywords(inputs: tuple[Any, ...], keywords: Mapping[str, Any]) -> tuple[Any, ...]:
    """The inputs of a call, with its keywords as the last one if there are any.

    Raises:
        FoldError: something that is no array cannot be compared with what is passed next time.
    """
    if not keywords:
        return inputs
    arrays = {name: x for name, x in keywords.items() if _is_of_arrays(x)}
    bound = {name: x for name, x in keywords.items() if name not in arrays}
    return (*inputs, Keywords(arrays, bound))


def call(apply_fn: Callable[..., Any], params: Any, inputs: tuple[Any, ...]) -> Any:
    """``apply_fn(params, *inputs)`` with the keywords among them."""
    if not (inputs and isinstance(inputs[-1], Keywords)):
        return apply_fn(params, *inputs)
    *given, last = inputs
    return apply_fn(params, *given, **last.arrays, **last.bound)


def _is_of_arrays(x: Any) -> bool:
    """Whether it is an array or a tree of arrays; numbers of Python are flags."""
    leaves = jax.tree.leaves(x)
    return bool(leaves) and all(
        isinstance(leaf, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct))
        for leaf in leaves
    )


def _comparable(name: str, x: Any) -> Hashable:
    """The same as something that can be hashed."""
    if isinstance(x, (list, tuple)):
        return type(x).__name__, *(_comparable(name, item) for item in x)
    if isinstance(x, (set, frozenset)):
        return frozenset(x)
    if isinstance(x, Mapping):
        return tuple((key, _comparable(name, x[key])) for key in sorted(x, key=repr))
    try:
        hash(x)
    except TypeError as error:
        raise FoldError(
            f"{name}: a {type(x).__name__} is no array, and cannot be bound, as it cannot be "
            f"compared; bind it first: functools.partial(apply_fn, {name}=...)"
        ) from error
    return type(x), x
