"""A parameter tree with copies of some leaves, which lookups read instead of the leaves."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from .errors import TreeError
from .printable import printable
from .trees import alike_paths, leaf_paths

_OWN, _COPIES = "params", "copies"
_NUMBER = re.compile(r"^\d+:")


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True, eq=False)
class Untied:
    """A tree of parameters, and copies of some of its leaves by key path.

    A pytree whose key paths are those of `params` behind ``params/`` and those of the copied leaves
    behind ``copies/``: ``copies/params/embed/embedding``. Functions that are folded with
    ``untie=True`` look up rows in the copies, and read the leaves for everything else.

    Example:
        >>> import jax, jax_lnfold
        >>> def model(table, tokens):  # a head that is tied to the embedding
        ...     return jax.nn.standardize(table[tokens]) @ table.T
        >>> table = jax.random.normal(jax.random.key(0), (16, 8))
        >>> tokens = jax.numpy.arange(16)
        >>> folded = jax_lnfold.fold(model, {"e": table}["e"], tokens, untie=True)
        >>> isinstance(folded.params, jax_lnfold.Untied), [*folded.params.copies]
        (True, [''])
        >>> bool((folded.params.params == table).all())  # what the original function takes
        True
    """

    params: Any
    copies: dict[str, Any]

    def tree_flatten_with_keys(self) -> tuple[Iterable[Any], None]:
        """The tree, and the copies by key path."""
        named = (_OWN, self.params), (_COPIES, self.copies)
        return [(jax.tree_util.GetAttrKey(name), x) for name, x in named], None

    @classmethod
    def tree_unflatten(cls, _: None, children: Iterable[Any]) -> Untied:
        """Another tree with copies of the same leaves."""
        return cls(*children)

    def check(self) -> None:
        """Raise a `TreeError` unless each copy has shape and dtype of a leaf of `params`."""
        leaves = dict(leaf_paths(self.params))
        for path, copy in self.copies.items():
            if path not in leaves:
                raise TreeError(
                    f"params: there is a copy of {path!r}, but no such leaf; make the tree with "
                    "plan.extend"
                )
            if _type_of(copy) != _type_of(leaves[path]):
                raise TreeError(
                    f"params: the copy of {path!r} has another shape or dtype than the leaf; cast "
                    "both, or make the tree with plan.extend"
                )


def extended(params: Any, copied: Sequence[str]) -> Any:
    """The tree with copies of these leaves, which share their memory until they are edited.

    A tree that has copies of them already is returned as it is.

    Raises:
        TreeError: there is no such leaf.
    """
    found = dict(leaf_paths(params))
    here = alike_paths([f"{_COPIES}/{path}" for path in copied], found)
    if all(here.values()):
        return params
    names = alike_paths(copied, found)
    if lost := [path for path, alike in names.items() if len(alike) != 1]:
        raise TreeError(
            f"params: leaf {printable(lost[0])!r}, which is to be copied, is missing; pass a tree "
            "like that which was folded"
        )
    return Untied(params, {name: found[name] for (name,) in names.values()})


def without_sharing(params: Any) -> Any:
    """The tree with memory of its own for every copy, if it has copies."""
    if not isinstance(params, Untied):
        return params
    leaves = dict(leaf_paths(params.params))
    copies = {p: x.copy() if x is leaves[p] else x for p, x in params.copies.items()}
    return Untied(params.params, copies)


def extended_paths(leaves: Sequence[str], copied: Collection[str]) -> tuple[str, ...]:
    """The key paths of a tree with copies, from those of the tree and of the copied leaves."""
    plain = [f"{_OWN}/{path}" if path else _OWN for path in _plain(leaves)]
    plain += [f"{_COPIES}/{path}" for path in sorted(copied)]
    return tuple(f"{i}:{path}" for i, path in enumerate(plain)) if _numbered(leaves) else (*plain,)


def copied_in(paths: Sequence[str]) -> tuple[str, ...]:
    """The key paths, in the tree itself, of the leaves that a tree of these key paths copies."""
    plain, own = _plain(paths), f"{_OWN}/"
    trees = [path for path in plain if f"{path}/".startswith(own)]
    leaves = tuple(path.removeprefix(own) if path != _OWN else "" for path in trees)
    if _numbered(paths):
        leaves = tuple(f"{i}:{path}" for i, path in enumerate(leaves))
    copied = tuple(path.removeprefix(f"{_COPIES}/") for path in plain[len(trees) :])
    fits = {*copied} <= {*leaves} and extended_paths(leaves, copied) == (*paths,)
    return copied if fits else ()


def _type_of(x: Any) -> tuple[Any, Any]:
    dtype = x.dtype if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x).dtype
    return np.shape(x), dtype


def _numbered(paths: Sequence[str]) -> bool:
    """Whether key paths are numbered, as those of a tree are in which two would be the same."""
    numbered = all(path.startswith(f"{i}:") for i, path in enumerate(paths))
    return numbered and len({_NUMBER.sub("", path) for path in paths}) < len(paths)


def _plain(paths: Sequence[str]) -> list[str]:
    return [_NUMBER.sub("", path) for path in paths] if _numbered(paths) else [*paths]
