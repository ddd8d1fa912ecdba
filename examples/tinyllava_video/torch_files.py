"""Arrays in files that PyTorch wrote. Nothing in such a file is ever run."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from .errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

PICKLE = b"\x80"
"""What pickles begin with, and so files from before PyTorch 1.6."""


def torch_arrays(file: Path) -> Iterator[tuple[str, Tensor]]:
    """All arrays by their keys, mapped into memory.

    Raises:
        InputError: PyTorch is missing, or the file is damaged, old, or holds something else.
    """
    held = _loaded(file)
    if isinstance(held, Mapping) and isinstance(held.get("state_dict"), Mapping):
        held = held["state_dict"]
    if not isinstance(held, Mapping):
        raise InputError(
            f"directory: {file} holds a {type(held).__name__}; there should be arrays by name"
        )
    for key, array in held.items():
        if not (isinstance(key, str) and hasattr(array, "untyped_storage")) or array.is_sparse:
            raise InputError(
                f"directory: {file} holds {key!r}, which is no plain array by name; save the "
                "model's state_dict() and nothing else"
            )
        yield key, array.detach()


def part_of(array: Tensor, index: tuple[slice, ...]) -> np.ndarray:
    """A copy of a part."""
    part: Any = array[index]
    if str(part.dtype) == "torch.bfloat16":  # which NumPy alone does not know
        import torch

        return part.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16).copy()
    return part.numpy().copy()


def write_torch(file: Path, arrays: Mapping[str, Callable[[], np.ndarray]]) -> None:
    """Writes a file that both this and the public code read."""
    import torch

    held = {}
    for key, read in arrays.items():
        array = np.ascontiguousarray(read())
        if array.dtype == ml_dtypes.bfloat16:
            held[key] = torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
        else:
            held[key] = torch.from_numpy(array.copy())
    torch.save(held, file)


def _loaded(file: Path) -> Any:
    try:
        import torch
    except ImportError as error:
        raise InputError(
            f"directory: {file} needs PyTorch; `pip install torch`, or convert it to safetensors"
        ) from error
    if not zipfile.is_zipfile(file):
        with file.open("rb") as opened:
            old = opened.read(1) == PICKLE
        raise InputError(
            f"directory: {file} is in the format from before PyTorch 1.6, which is not read; "
            "convert it to safetensors"
            if old
            else f"directory: {file} is damaged or cut short; download it again"
        )
    try:
        return torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError:
        # PyTorch's own message says how to run what is in there.
        raise InputError(
            f"directory: {file} holds more than arrays: loading all of it would run code, so none "
            "was loaded; take the safetensors files of this model, or a file of its state_dict()"
        ) from None
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, AttributeError):
        raise InputError(f"directory: {file} is damaged; download it again") from None
