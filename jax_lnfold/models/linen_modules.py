"""Flax linen: a module is a description, whose function is its `apply`."""

from __future__ import annotations

import sys
from typing import Any

from ..errors import FoldError


def is_linen(x: Any) -> bool:
    """Whether it is a linen module."""
    if "flax.linen" not in sys.modules:
        return False
    from flax import linen as nn

    return isinstance(x, nn.Module)


def apply_of(x: Any) -> Any:
    """``module.apply`` for a linen module, everything else as it is.

    Raises:
        FoldError: the module is bound to variables, which would then be given twice.
    """
    if not is_linen(x):
        return x
    if x.scope is not None:
        raise FoldError(
            f"apply_fn: this {type(x).__name__} is bound; pass module and variables one by one, as "
            "module.unbind() returns them"
        )
    return x.apply
