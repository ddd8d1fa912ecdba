"""What the library needs to know of models that hold their own parameters."""

from __future__ import annotations

import sys
from collections.abc import Callable, Container, Hashable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import jax

from .._compat import open_jaxpr
from ..errors import FoldError
from ..program.passed_on import passes_all_on
from ..trees import leaf_paths
from .norm_calls import NormCalls


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True)
class State:
    """All of a model but its parameters: arrays by key, and the rest, which can be hashed."""

    arrays: dict[str, Any]
    structure: Hashable

    def tree_flatten_with_keys(self) -> tuple[Iterable[Any], Hashable]:
        """The arrays, by key; all else is structure."""
        keys = (*self.arrays,)
        children = [(jax.tree_util.DictKey(key), self.arrays[key]) for key in keys]
        return children, (keys, self.structure)

    @classmethod
    def tree_unflatten(cls, structure: Any, children: Iterable[Any]) -> State:
        """Other arrays with the same keys."""
        keys, rest = structure
        return cls(dict(zip(keys, children, strict=True)), rest)


class LinenModule(Protocol):
    """A description of a model, for type checkers: a linen module."""

    def bind(self, variables: Any, *args: Any, **keywords: Any) -> Any: ...  # noqa: D102
    def __call__(self, *inputs: Any, **keywords: Any) -> Any: ...  # noqa: D102


class NnxModel(Protocol):
    """A model that holds its parameters, for type checkers: one of NNX."""

    def set_attributes(self, *filters: Any, **attributes: Any) -> None: ...  # noqa: D102
    def __call__(self, *inputs: Any, **keywords: Any) -> Any: ...  # noqa: D102


class EquinoxModel(Protocol):
    """A model that holds its parameters, for type checkers: one of Equinox."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def __call__(self, *inputs: Any, **keywords: Any) -> Any: ...  # noqa: D102


class ModelKind(Protocol):
    """How the models of one framework are taken apart and put together."""

    base: type
    """The class of all models; its own methods are none of the model's."""

    def split(self, model: Any) -> tuple[Any, State]:
        """The parameters, a pytree with the key paths of the model, and all else."""
        ...

    def merge(self, owner: type, params: Any, state: State) -> Any:
        """A new model of the class `owner`."""
        ...

    def changes(self, model: Any, state: State) -> dict[str, Any]:
        """The arrays of the state that a call has changed in a model that `merge` made.

        Raises:
            FoldError: there are more or fewer of them than before.
        """
        ...

    def update(self, model: Any, changes: dict[str, Any]) -> None:
        """Put the changed arrays into the caller's model."""
        ...

    def mark_norms(self, model: Any, calls: NormCalls) -> None:
        """Let every LayerNorm of a model that `merge` made mark its calls."""
        ...

    def replace_norms(self, model: Any, norms: Container[str], unshifted: Container[str]) -> None:
        """Make RMSNorms of the LayerNorms at these key paths of a model that `merge` made.

        Those at the key paths in `unshifted` have lost their shift.
        """
        ...

    def add_biases(self, model: Any, wanted: Callable[[str], bool]) -> None:
        """Give linear layers without a bias one of zeros, if their key path is wanted.

        `model` is one that `merge` made.
        """
        ...


@dataclass(frozen=True)
class Method:
    """A method of a model as a pure function of parameters, state and inputs.

    It returns the result and the arrays of the state that have changed.
    """

    kind: ModelKind
    owner: type
    name: str

    def __call__(self, params: Any, state: State, *inputs: Any, **keywords: Any) -> Any:
        """Call the method of a model that is put together for it."""
        model, result = self._run(params, state, inputs, keywords)
        before, after = jax.tree.leaves(params), jax.tree.leaves(self.kind.split(model)[0])
        if any(x is not y for x, y in zip(before, after, strict=True)):
            self._check_unchanged(params, state, inputs, keywords)
        return result, self.kind.changes(model, state)

    def _run(
        self, params: Any, state: State, inputs: tuple[Any, ...], keywords: dict[str, Any]
    ) -> tuple[Any, Any]:
        model = self.kind.merge(self.owner, params, state)
        return model, getattr(self.owner, self.name)(model, *inputs, **keywords)

    def _check_unchanged(
        self, params: Any, state: State, inputs: tuple[Any, ...], keywords: dict[str, Any]
    ) -> None:
        """Raise a `FoldError` unless the parameters that are there after a call are those before.

        Transformations of a framework pass all of them through, so that they are other objects.
        """
        leaves, tree = jax.tree.flatten(params)

        def after(leaves: list[Any]) -> list[Any]:
            model, _ = self._run(tree.unflatten(leaves), state, inputs, keywords)
            return jax.tree.leaves(self.kind.split(model)[0])

        kept = passes_all_on(open_jaxpr(jax.make_jaxpr(after)(leaves)))
        for is_kept, (path, _) in zip(kept, leaf_paths(params), strict=True):
            if not is_kept:
                raise FoldError(
                    f"model: its call changes the parameter {path!r}; keep that in a variable of "
                    "another type than nnx.Param"
                )


def methods_of(kind: ModelKind, owner: type) -> dict[str, Callable[..., Any]]:
    """``__call__`` and the public methods of a model's class, as far as it defines them itself."""
    known, fields = {*kind.base.__mro__}, getattr(owner, "__dataclass_fields__", ())
    defined: dict[str, Any] = {}
    for own in owner.__mro__:
        if own not in known:
            defined = {**vars(own), **defined}
    return {
        name: getattr(owner, name)
        for name, x in defined.items()
        if (name == "__call__" or not name.startswith("_"))
        and name not in fields
        and callable(getattr(owner, name))
        and not isinstance(x, (staticmethod, classmethod, type))
    }


def kind_of(x: Any) -> ModelKind | None:
    """The framework of a model that holds its parameters, None for everything else.

    Frameworks that are not imported have made no model.
    """
    if "flax.nnx" in sys.modules:
        from .nnx_models import NNX

        if isinstance(x, NNX.base):
            return NNX
    if "equinox" in sys.modules:
        from .equinox_models import EQUINOX

        if isinstance(x, EQUINOX.base):
            return EQUINOX
    return None
