"""Marks: scopes by which calls are known again in a trace, and which no report shows."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager
from typing import Any

import jax

_MARK = re.compile(r"jax_lnfold_mark_(\w+?)_end")


def mark(name: str) -> AbstractContextManager[Any]:
    """A scope that marks the equations traced within; `name` is made of letters, digits and _."""
    return jax.named_scope(f"jax_lnfold_mark_{name}_end")


def marks_in(names: str) -> tuple[str, ...]:
    """The marks in a stack of names."""
    return tuple(_MARK.findall(names))


def without_marks(names: str) -> str:
    """The stack of names as it was without them."""
    return "/".join(part for part in names.split("/") if not _MARK.search(part))
