"""Rules for primitives, by family; importing this package fills the registry."""

from . import contraction, control, elementwise, joining, reduction, structural
from .registry import (
    RULES,
    Context,
    Opaque,
    Pull,
    Push,
    Rule,
    is_nonlinear,
    no_push,
    register,
    rule_for,
)

__all__ = [
    "RULES",
    "Context",
    "Opaque",
    "Pull",
    "Push",
    "Rule",
    "contraction",
    "control",
    "elementwise",
    "is_nonlinear",
    "joining",
    "no_push",
    "reduction",
    "register",
    "rule_for",
    "structural",
]
