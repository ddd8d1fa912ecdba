"""Rules for primitives, by family; importing this package fills the registry."""

from . import contraction, control, elementwise, joining, lookups, moves, reduction
from .registry import (
    RULES,
    AxisMap,
    Context,
    Opaque,
    Pull,
    Push,
    Rule,
    axis_map,
    is_nonlinear,
    no_push,
    register,
    rule_for,
)

__all__ = [
    "RULES",
    "AxisMap",
    "Context",
    "Opaque",
    "Pull",
    "Push",
    "Rule",
    "axis_map",
    "contraction",
    "control",
    "elementwise",
    "is_nonlinear",
    "joining",
    "lookups",
    "moves",
    "no_push",
    "reduction",
    "register",
    "rule_for",
]
