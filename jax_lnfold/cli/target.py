"""Models named on the command line: ``package.module:function``."""

from __future__ import annotations

import importlib
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from .._compat import PACKAGE
from ..errors import FoldError
from ..folded_functions import are_functions
from ..trees import first_line


class Model(NamedTuple):
    """What a target returns, with the inputs as a tuple."""

    apply_fn: Callable[..., Any] | Mapping[str, Callable[..., Any]]
    params: Any
    inputs: tuple[Any, ...]


def load(target: str) -> Model:
    """Import the module of ``package.module:function`` and call the function.

    The current directory is searched first. What the function returns as inputs is the tuple of
    all inputs, or a single one if it is no plain tuple.

    Raises:
        FoldError: one of these steps fails; the message says which, and where.
    """
    module_name, _, name = target.partition(":")
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        function = importlib.import_module(module_name)
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{module_name}.".startswith(f"{missing}."):
            raise FoldError(
                f"target: no module {missing!r} in {here} or installed; pass "
                "package.module:function, from the directory of the package"
            ) from None
        raise FoldError(f"target: importing {module_name!r} failed ({_told(error)})") from error
    for part in name.split("."):
        if not hasattr(function, part):
            raise FoldError(f"target: {module_name!r} has no {name!r}; check the spelling")
        function = getattr(function, part)
    if not callable(function):
        raise FoldError(
            f"target: {target} is a {type(function).__name__} that cannot be called; name a "
            "function that returns (apply_fn, params, inputs)"
        )
    try:
        returned = function()
    except FoldError:
        raise
    except Exception as error:
        raise FoldError(f"target: {target} failed ({_told(error)})") from error
    return _model(target, returned)


def _model(target: str, returned: Any) -> Model:
    if (
        not isinstance(returned, tuple)
        or len(returned) != 3
        or not (callable(returned[0]) or are_functions(returned[0]))
    ):
        what = type(returned).__name__
        if isinstance(returned, tuple):
            what = f"({', '.join(type(x).__name__ for x in returned)})"
        raise FoldError(
            f"target: {target} returned {what} instead of (apply_fn, params, inputs); return what "
            "you would pass to jax_lnfold.fold"
        )
    apply_fn, params, inputs = returned
    return Model(apply_fn, params, inputs if type(inputs) is tuple else (inputs,))


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def place_of_error(error: BaseException | None) -> str:
    """Where an exception was raised: the last frame outside of installed packages, if any."""
    frames = traceback.extract_tb(error.__traceback__) if error else []
    installed = (*sysconfig.get_paths().values(), PACKAGE, "<")
    own = [frame for frame in frames if not frame.filename.startswith(installed)]
    for frame in (own or frames)[-1:]:
        return f"\n  at {frame.filename}:{frame.lineno}, in {frame.name}"
    return ""
