"""Classes of folded models: those of the originals, with methods that run the folded programs."""

from __future__ import annotations

import copyreg
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, Protocol


class Runs(Protocol):
    """Runs the folded programs of a model's methods, and keeps the class made for it."""

    folded_class: type

    def call(self, name: str, model: Any, inputs: tuple[Any, ...], keywords: Any) -> Any:
        """What the method of this name returns for a folded model."""
        ...


def folded_class(runs: Runs, owner: type, methods: dict[str, Callable[..., Any]]) -> type:
    """A subclass of a model's class, whose methods are run by `runs`.

    Its instances have the attributes of the original, so that they are saved, split, copied and
    trained like it.
    """
    space = {name: _method(runs, name, function) for name, function in methods.items()}
    space |= {"__module__": owner.__module__, "__doc__": owner.__doc__}
    made = _meta(type(owner))("Folded" + owner.__name__, (owner,), space)
    made._runs = runs
    return made


def _method(runs: Runs, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def method(self: Any, *inputs: Any, **keywords: Any) -> Any:
        return runs.call(name, self, inputs, keywords)

    return method


@cache
def _meta(meta: type) -> type:
    """The class of such classes: they are pickled by what made them, as no module has them."""
    made = type("Folded" + meta.__name__, (meta,), {})
    copyreg.pickle(made, _reduce)  # type: ignore[arg-type]
    return made


def _reduce(cls: Any) -> Any:
    return _class_of, (cls._runs,)


def _class_of(runs: Runs) -> type:
    return runs.folded_class
