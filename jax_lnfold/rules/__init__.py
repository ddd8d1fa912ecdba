"""Rules for primitives: those of this library by family, and what users need for theirs.

Importing this package fills the registry. `register` gives a rule to a primitive or kernel of your
own, `check_rule` tries it on numbers, and `linear` writes the rule of anything that is linear.

Example:
    >>> from jax_lnfold import rules
    >>> product = rules.linear("nk,km->nm")  # for a kernel of your own: rules.register(kernel, ...)
    >>> isinstance(product, rules.Rule)
    True
"""

from ..axes.axis_set import AxisSet
from . import contraction, control, elementwise, joining, lookups, moves, reduction
from .check import RuleCheck, check_rule
from .own import ffi_target, linear, pallas_kernel, register
from .registry import (
    RULES,
    AxisMap,
    Context,
    Opaque,
    Pull,
    Push,
    Rule,
    axis_map,
    has_rule,
    is_nonlinear,
    no_push,
    rule_of,
)

__all__ = [
    "RULES",
    "AxisMap",
    "AxisSet",
    "Context",
    "Opaque",
    "Pull",
    "Push",
    "Rule",
    "RuleCheck",
    "axis_map",
    "check_rule",
    "contraction",
    "control",
    "elementwise",
    "ffi_target",
    "has_rule",
    "is_nonlinear",
    "joining",
    "linear",
    "lookups",
    "moves",
    "no_push",
    "pallas_kernel",
    "reduction",
    "register",
    "rule_of",
]
