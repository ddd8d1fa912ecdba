"""Reports as dictionaries, lists, text and numbers, as JSON has them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np


def plain(x: Any) -> Any:
    """The same with dictionaries for dataclasses, and lists for tuples and arrays."""
    if is_dataclass(x):
        return {field.name: plain(getattr(x, field.name)) for field in fields(x)}
    if isinstance(x, Mapping):
        return {str(key): plain(value) for key, value in x.items()}
    if isinstance(x, tuple | list):
        return [plain(item) for item in x]
    return x.tolist() if isinstance(x, np.ndarray | np.generic) else x
