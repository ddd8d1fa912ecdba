"""Leaf stores: the arrays of a checkpoint on disk, read and replaced one at a time."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import jax.numpy as jnp
import numpy as np

from ..errors import FoldError
from ..trees import first_line

READABLE = "pass a complete checkpoint of safetensors or Orbax"


@dataclass(frozen=True, slots=True)
class StoredLeaf:
    """Shape and dtype of one array of a checkpoint."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes of the array in memory, if its dtype is one of `FLOATS`."""
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize


class LeafStore(Protocol):
    """A checkpoint whose arrays can be replaced one by one, with shape and dtype kept."""

    leaves: dict[str, StoredLeaf]
    """By the names under which the checkpoint holds them."""

    def read(self, name: str) -> np.ndarray:
        """One array."""
        ...

    def write(self, name: str, value: np.ndarray) -> None:
        """Replace one array by another one of the same shape and dtype."""
        ...

    def copy(self, dest: Path, without: Collection[str]) -> None:
        """Copy the checkpoint; the arrays `without` may be left to be written."""
        ...


@contextmanager
def damaged(what: str) -> Iterator[None]:
    """Turns an error of a library that reads or writes `what` into a `FoldError`."""
    try:
        yield
    except (FoldError, OSError):
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {first_line(error)}"
        raise FoldError(f"source: {what} ({why}); {READABLE}") from error


def copy_files(source: Path, dest: Path, skip: Callable[[Path], bool] = lambda _: False) -> None:
    """Copy contents only: linked files become files, and read-only ones can be written.

    Raises:
        FoldError: a linked directory holds the place where the link is, or `dest`.
    """
    if source.is_file():
        shutil.copyfile(source, dest)
    else:
        _copy_folder(source, dest, skip, {*real_path(source).parents, *real_path(dest).parents})


def _copy_folder(source: Path, dest: Path, skip: Callable[[Path], bool], around: Set[Path]) -> None:
    if (real := real_path(source)) in around:
        raise FoldError(f"source: {source} leads back to {real}, without end; remove this link")
    dest.mkdir()
    for inside in sorted(source.iterdir()):
        if skip(inside):
            continue
        if inside.is_dir():
            _copy_folder(inside, dest / inside.name, skip, around | {real})
        else:
            shutil.copyfile(inside, dest / inside.name)


def real_path(path: Path) -> Path:
    """The path without symbolic links, as far as these lead anywhere."""
    return Path(os.path.realpath(path))
