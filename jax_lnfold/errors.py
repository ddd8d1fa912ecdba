"""Errors of the library: each says where, why, and what to do about it."""


class FoldError(Exception):
    """Base class of every error that `jax_lnfold` raises on purpose.

    Its text reads "argument: problem; fix".

    Example:
        >>> import jax_lnfold
        >>> jax_lnfold.fold("model", {})
        Traceback (most recent call last):
        jax_lnfold.errors.FoldError: apply_fn: ...
    """


class TraceError(FoldError):
    """`apply_fn` could not be traced with the given parameters and inputs.

    Example:
        >>> import jax.numpy as jnp, jax_lnfold
        >>> jax_lnfold.fold(lambda params, x: x @ params, jnp.ones((4, 8)), jnp.ones((3, 5)))
        Traceback (most recent call last):
        jax_lnfold.errors.TraceError: apply_fn: ...
    """


class TreeError(FoldError):
    """A tree of parameters or inputs does not have the structure, shapes or leaves needed.

    Example:
        >>> import jax_lnfold
        >>> jax_lnfold.fold(lambda params, x: x, {"w": "text"}, 1.0)
        Traceback (most recent call last):
        jax_lnfold.errors.TreeError: params: ...
    """


class NotAnalysedError(FoldError):
    """A result was asked for before the first call had supplied the example inputs.

    Example:
        >>> import jax.numpy as jnp, jax_lnfold
        >>> jax_lnfold.fold(lambda params, x: x * params, jnp.ones(3)).plan
        Traceback (most recent call last):
        jax_lnfold.errors.NotAnalysedError: plan: ...
    """


class PlanMismatchError(FoldError):
    """A trace does not support the parameter edits of the plan, so its result would be wrong.

    Example:
        >>> import jax, jax.numpy as jnp, jax_lnfold
        >>> def encode(params, x):
        ...     return jax.nn.standardize(x @ params)
        >>> def raw(params, x):  # returns what the LayerNorm of the other one reads
        ...     return x @ params
        >>> folded = jax_lnfold.fold(encode, jnp.eye(4), jnp.ones((3, 4)))
        >>> jax_lnfold.fold(raw, folded.params, jnp.ones((3, 4)), plan=folded.plan)
        Traceback (most recent call last):
        jax_lnfold.errors.PlanMismatchError: plan: ...
    """


class PlanFormatError(FoldError):
    """A plan is not readable: broken JSON, another version, or parts that do not fit together.

    Example:
        >>> import jax_lnfold
        >>> jax_lnfold.FoldPlan.from_json('{"version": 1}')
        Traceback (most recent call last):
        jax_lnfold.errors.PlanFormatError: text: plan version 1, ...
    """


class Bug(FoldError):
    """The library contradicts itself: it has noticed before anything was changed, and stops."""

    def __str__(self) -> str:
        """The problem, and what to do."""
        return f"{super().__str__()}; this is a bug of jax_lnfold, please report it"
