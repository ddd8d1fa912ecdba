"""Arrays in safetensors files, which need nothing but NumPy."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from .leaf_store import StoredLeaf, copy_files, damaged
from .safetensors_header import read_header, strict_json

_SAFETENSORS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


class _Span(NamedTuple):
    """Where the bytes of an array begin."""

    file: Path
    start: int
    leaf: StoredLeaf


class SafetensorsStore:
    """Arrays in a safetensors file, or in those that an index lists."""

    leaves: dict[str, StoredLeaf]

    def __init__(self, root: Path, path: Path) -> None:
        """`path` is the file or, if it ends in ``.json``, the index; `root` all that is copied."""
        self._root = root
        with damaged(f"{path} is not an index of the files beside it"):
            self._spans = _indexed(path) if path.suffix == ".json" else _spans(path)
        self.leaves = {name: span.leaf for name, span in self._spans.items()}

    def read(self, name: str) -> np.ndarray:
        """One array."""
        file, start, leaf = self._spans[name]
        flat = np.fromfile(file, np.uint8, leaf.nbytes, offset=start)
        return flat.view(jnp.dtype(leaf.dtype)).reshape(leaf.shape)

    def write(self, name: str, value: np.ndarray) -> None:
        """Overwrite the bytes of one array."""
        with self._spans[name].file.open("r+b") as file:
            file.seek(self._spans[name].start)
            file.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)

    def copy(self, dest: Path, without: Collection[str]) -> None:
        """Copy the file, or the directory."""
        copy_files(self._root, dest)


def _spans(path: Path) -> dict[str, _Span]:
    with damaged(f"{path} is not a readable safetensors file"):
        return {
            name: _Span(path, start, StoredLeaf(shape, _SAFETENSORS.get(dtype, dtype)))
            for name, (dtype, shape, start) in read_header(path).items()
        }


def _indexed(index: Path) -> dict[str, _Span]:
    """The arrays that an index names, if the files beside it hold each of them once."""
    weight_map = strict_json(index.read_bytes())["weight_map"]
    spans: dict[str, _Span] = {}
    beside = {file.name: file for file in sorted(index.parent.glob("*.safetensors"))}
    for file in sorted({*weight_map.values()}):
        if Path(file).name != file or file == "..":
            raise ValueError(f"its file {file!r} is in another directory")
        found = _spans(beside.pop(file, index.parent / file))
        if wrong := [name for name in found if weight_map.get(name) != file]:
            raise ValueError(f"its file {file!r} holds {wrong[0]!r}, which is not listed there")
        spans |= found
    if missing := weight_map.keys() - spans.keys():
        raise ValueError(f"its files lack {min(missing)!r}")
    for file in beside.values():  # which a program might load instead
        if twice := spans.keys() & _spans(file).keys():
            raise ValueError(f"{file.name!r}, which it does not name, holds {min(twice)!r}, too")
    return spans
