"""Trees of parameters and inputs: key paths, and checks of what their leaves are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from ._compat import is_tracer
from .errors import TreeError
from .printable import printable

MISSING: Any = object()
"""What stands for parameters that were not passed."""
FLOATS = ("bfloat16", "float16", "float32", "float64")
"""Dtypes of leaves that can be edited; eight bits and fewer hold no digits to spare."""


def leaf_paths(tree: Any, name: str = "params") -> list[tuple[str, Any]]:
    """Leaves in tree order with their key paths, written ``a/b/kernel``.

    If two leaves would have the same key path, all are numbered: ``3:a/b/kernel``.

    Raises:
        TreeError: the argument `name` is not a pytree that can be flattened again and again.
    """
    hint = "use keys that can be sorted, and register other nodes correctly with jax.tree_util"
    try:
        leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
        steady = structure == jax.tree.structure(tree)
    except Exception as error:
        why = f"{type(error).__name__}: {first_line(error)}"
        raise TreeError(f"{name}: cannot be flattened or compared ({why}); {hint}") from error
    if not steady:
        raise TreeError(f"{name}: has another structure whenever it is flattened; {hint}")
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    if len({*paths}) < len(paths):
        paths = [f"{i}:{path}" for i, path in enumerate(paths)]
    return [(path, x) for path, (_, x) in zip(paths, leaves, strict=True)]


def unboxed(path: str) -> str:
    """A key path without the ``/value`` that boxes of leaves add (`nnx.Variable`, `nn.meta`)."""
    return path.removesuffix("/value")


def alike_paths(
    wanted: Iterable[str], found: Iterable[str], plain: Callable[[str], str] = unboxed
) -> dict[str, list[str]]:
    """What each key path of `wanted` may be called in `found`, if it is there.

    That is the same key path or, where there is none, all with the same `plain` form, of which a
    caller takes the only one: with boxes around leaves and without them, in both directions. What
    is the very name of one key path does not stand for another one.
    """
    wanted, by_plain = dict.fromkeys(wanted), dict[str, list[str]]()
    names = dict.fromkeys(found)
    for name in names:
        by_plain.setdefault(plain(name), []).append(name)
    return {
        path: [path]
        if path in names
        else [name for name in by_plain.get(plain(path), ()) if name not in wanted]
        for path in wanted
    }


def check_leaves(tree: Any, name: str, abstract: bool = False) -> list[tuple[str, Any]]:
    """The `leaf_paths` of a tree in which every leaf is a number or an array.

    If `abstract`, types without values and arrays that have been deleted will do.

    Raises:
        TreeError: a leaf of the argument `name` is something else.
    """
    found = leaf_paths(tree, name)
    for path, x in found:
        if isinstance(x, jax.ShapeDtypeStruct):
            if not abstract:
                raise TreeError(
                    f"{name}: leaf {path!r} is a ShapeDtypeStruct, which has no values; pass "
                    "arrays, or use jax_lnfold.analyze"
                )
        elif not is_numeric(x):
            dtype = f" of dtype {x.dtype}" if isinstance(x, np.ndarray) else ""
            raise TreeError(
                f"{name}: leaf {path!r} is a {type(x).__name__}{dtype}; pass a tree of arrays and "
                "bind everything else to the function, as in functools.partial(f, train=False)"
            )
        elif not abstract and isinstance(x, jax.Array) and not is_tracer(x) and x.is_deleted():
            raise TreeError(
                f"{name}: leaf {path!r} has been deleted, as donated arrays are; pass a copy made "
                "before that"
            )
    return found


def check_devices(params: Any, inputs: tuple[Any, ...]) -> None:
    """Raise a `TreeError` if arrays are committed to different devices."""
    known = None
    for name, tree in (("params", params), ("inputs", inputs)):
        for path, x in leaf_paths(tree, name):
            devices = committed_to(x)
            known = known or devices
            if devices != known and devices is not None:
                raise TreeError(
                    f"{name}: leaf {path!r} is on other devices than the leaves before it; put "
                    "params and inputs together with jax.device_put"
                )


def is_numeric(x: Any) -> bool:
    """Whether `x` is a number or an array of a dtype that jax has."""
    if isinstance(x, jax.Array) or is_tracer(x):
        return True
    if not isinstance(x, (bool, int, float, complex, np.ndarray, np.generic)):
        return False
    try:
        jax.typeof(x)
    except (TypeError, ValueError, OverflowError):  # or masked
        return False
    return True


def is_editable(dtype: Any) -> bool:
    """Whether numbers of a dtype can be edited: rounding them again must be no loss to speak of."""
    return dtype.name in FLOATS


def committed_to(x: Any) -> frozenset[Any] | None:
    """The devices that an array is committed to, None if it may move."""
    if not isinstance(x, jax.Array) or is_tracer(x) or not x.committed:
        return None
    return frozenset(x.sharding.device_set)


def rebuilt(structure: Any, leaves: list[Any], name: str) -> Any:
    """The tree of the argument `name` with other leaves; a `TreeError` where that fails."""
    try:
        return structure.unflatten(leaves)
    except Exception as error:
        raise TreeError(
            f"{name}: cannot be put together again from its leaves ({type(error).__name__}: "
            f"{first_line(error)}); correct how its nodes are registered with jax.tree_util: "
            "they must take tracers for arrays"
        ) from error


def first_line(error: Exception) -> str:
    """What an exception has to say, in one line."""
    return printable((str(error).strip().splitlines() or ["no message"])[0][:300])
