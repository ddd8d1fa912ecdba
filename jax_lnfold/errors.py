"""Errors of the library: each says where, why, and what to do about it."""


class FoldError(Exception):
    """Base class of every error that `jax_lnfold` raises on purpose."""


class TraceError(FoldError):
    """`apply_fn` could not be traced with the given parameters and inputs."""


class TreeError(FoldError):
    """A tree of parameters or inputs does not have the structure, shapes or leaves needed."""


class NotAnalysedError(FoldError):
    """A result was asked for before the first call had supplied the example inputs."""


class PlanMismatchError(FoldError):
    """A trace does not support the parameter edits of the plan, so its result would be wrong."""


class PlanFormatError(FoldError):
    """A plan is not readable: broken JSON, another version, or parts that do not fit together."""


class Bug(FoldError):
    """The library contradicts itself: it has noticed before anything was changed, and stops."""

    def __str__(self) -> str:
        """The problem, and what to do."""
        return f"{super().__str__()}; this is a bug of jax_lnfold, please report it"
