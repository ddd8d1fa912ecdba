"""Rules for primitives, by family; importing this package fills the registry."""

from . import contraction, control, elementwise, joining, lookups, moves, reduction
from .registry import RULES, Context, Opaque, Pull, Push, Rule, register, rule_for

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
    "joining",
    "lookups",
    "moves",
    "reduction",
    "register",
    "rule_for",
]
