"""What `fold` returns for a model that holds its parameters: a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from ..batches import inputs_of
from ..errors import FoldError
from ..folded import Folded
from ..folded_functions import FoldedFunctions
from ..plan.plan import FoldPlan
from ..program.calls import with_keywords
from ..report.report import Report
from ..report.summary import in_short
from ..trees import MISSING
from .folded_classes import folded_class
from .kind import Method, ModelKind, State, kind_of, methods_of


@dataclass(frozen=True, repr=False)
class FoldedModel:
    """A folded model: the `model` itself, the `plan` and the `report`.

    `model` is of a subclass of the original's class and has its attributes, with edited
    parameters; the caller's model is as before. Its methods run folded programs: those that were
    folded, and others as far as they tolerate the plan (`PlanMismatchError` if one does not). It is
    split, merged, copied, saved, pickled and trained like the original. Parts of it, such as
    ``model.block``, are those of the original and compute what they say, on edited parameters.

    Example:
        >>> import jax, jax_lnfold
        >>> from flax import nnx
        >>> rngs = nnx.Rngs(0)
        >>> model = nnx.Sequential(nnx.Linear(4, 8, rngs=rngs), nnx.LayerNorm(8, rngs=rngs))
        >>> folded = jax_lnfold.fold(model, jax.numpy.ones((3, 4)))
        >>> folded.report.n_folded, isinstance(folded.model, nnx.Sequential)
        (1, True)
    """

    model: Any
    plan: FoldPlan
    report: Report

    @property
    def params(self) -> Any:
        """The edited parameters, with the key paths of the plan: `nnx.State`, or a model."""
        kind = kind_of(self.model)
        assert kind is not None
        return kind.split(self.model)[0]

    def __repr__(self) -> str:
        """The class of the model, and what became of its LayerNorms, in one line."""
        return f"<FoldedModel {type(self.model).__name__}: {in_short(self.report)}>"

    def __call__(self, *inputs: Any, **keywords: Any) -> Any:
        """Short for ``folded.model(*inputs, **keywords)``."""
        return self.model(*inputs, **keywords)


@dataclass(frozen=True)
class Model:
    """A model that was taken apart, to be folded as functions of its parameters."""

    kind: ModelKind
    owner: type
    params: Any
    inputs: tuple[Any, ...]
    state: State
    methods: tuple[str, ...] | None  # None: its call

    @property
    def functions(self) -> Any:
        """What `fold` takes for this model."""
        if self.methods is None:
            return Method(self.kind, self.owner, "__call__")
        return {name: Method(self.kind, self.owner, name) for name in self.methods}

    def folded(self, result: Folded | FoldedFunctions) -> FoldedModel:
        """The model with the parameters and programs that `fold` returned for its functions."""
        one = isinstance(result, Folded)
        programs = {"__call__": result} if one else dict(result)
        kept = {name: each.without_params() for name, each in programs.items()}
        runs = ModelPrograms(self.kind, self.owner, kept)
        model = self.kind.merge(runs.folded_class, result.params, self.state)
        return FoldedModel(model, result.plan, result.report)


class ModelPrograms:
    """The folded programs of a model's methods, made when they are called first."""

    def __init__(self, kind: ModelKind, owner: type, programs: dict[str, Folded]) -> None:
        """Programs of the methods that were folded, which hold no parameters."""
        self.kind, self.owner, self._programs = kind, owner, programs
        self.folded_class = folded_class(self, owner, methods_of(kind, owner))

    def call(self, name: str, model: Any, inputs: tuple[Any, ...], keywords: Any) -> Any:
        """What the method of this name returns; it changes the state of the model as it would."""
        params, state = self.kind.split(model)
        folded = self._programs.get(name)
        if folded is None:
            proved = next(iter(self._programs.values()))
            folded = proved.of_another(Method(self.kind, self.owner, name))
            self._programs[name] = folded
        result, changes = folded.apply(params, state, *inputs, **keywords)
        self.kind.update(model, changes)
        return result

    def __reduce__(self) -> Any:
        """The class is made again."""
        return ModelPrograms, (self.kind, self.owner, self._programs)


def taken_apart(apply_fn: Any, params: Any, inputs: tuple[Any, ...]) -> Model | None:
    """The model that was passed for a function, or whose methods were; None if there is none.

    Raises:
        FoldError: it cannot be called.
    """
    if (kind := kind_of(apply_fn)) is not None:
        own, state = kind.split(apply_fn)
        if not jax.tree.leaves(own):  # a function in the clothes of a model, as of eqx.filter_jit
            return None
        if not callable(apply_fn):
            raise FoldError(
                f"apply_fn: a {type(apply_fn).__name__} has no __call__; pass its methods by name, "
                "{'encode': Model.encode}, with the model for params"
            )
        given = () if params is MISSING else (params, *inputs)
        return Model(kind, type(apply_fn), own, (state, *given), state, None)
    if (kind := kind_of(params)) is None or not isinstance(apply_fn, Mapping):
        return None
    methods = methods_of(kind, type(params))
    if any(methods.get(name) is not function for name, function in apply_fn.items()):
        return None  # functions of the model as a tree
    own, state = kind.split(params)
    return Model(kind, type(params), own, _with_state(state, inputs), state, tuple(apply_fn))


def on_batches(
    apply_fn: Any, params: Any, batches: Sequence[Any], keywords: Mapping[str, Any]
) -> tuple[Any, Any, list[tuple[Any, ...]]]:
    """A function of parameters, these, and its inputs for each batch: of a model, with its state.

    Raises:
        FoldError: a model cannot be called, or a keyword cannot be bound.
    """
    model = taken_apart(apply_fn, params, tuple(batches))
    state: tuple[Any, ...] = ()
    if model is not None:
        apply_fn, params, (own, *batches) = model.functions, model.params, model.inputs
        state = (own,)
    inputs = [with_keywords((*state, *inputs_of(batch)), keywords) for batch in batches]
    return apply_fn, params, inputs


def _with_state(state: State, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Inputs of several functions, each with the state before its own."""
    if len(inputs) != 1 or not isinstance(inputs[0], Mapping):
        return inputs  # the checks of a mapping say what is missing
    each = inputs[0].items()
    return ({n: (state, *(x if isinstance(x, tuple) else (x,))) for n, x in each},)
