"""Rules for primitives, by family; importing this package fills the registry."""

from . import contraction, elementwise, reduction, structural
from .registry import RULES, Context, Opaque, Pull, Push, Rule, register, rule_for

__all__ = [
    "RULES",
    "Context",
    "Opaque",
    "Pull",
    "Push",
    "Rule",
    "contraction",
    "elementwise",
    "reduction",
    "register",
    "rule_for",
    "structural",
]
