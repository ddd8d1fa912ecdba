"""Leaf stores: the arrays of a checkpoint on disk, read and replaced one at a time."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np

from .errors import FoldError
from .trees import FLOATS, first_line, leaf_paths


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


def open_store(path: Path) -> LeafStore:
    """The arrays of a safetensors file, a directory of such files, or an Orbax checkpoint.

    Raises:
        FoldError: there is no such checkpoint at `path`, or it is damaged.
        OSError: a file cannot be read.
    """
    if not path.exists():
        raise FoldError(f"source: {path} does not exist; pass the path of a checkpoint")
    if path.suffix == ".json":
        raise FoldError(f"source: {path} is an index; pass its directory, {path.parent}")
    if path.is_file():
        return SafetensorsStore(path, path)
    trees = [file.parent for pattern in _TREES for file in sorted(path.glob(pattern))]
    if len(trees) == 1:
        return OrbaxStore(path, trees[0])
    if not trees:
        files = sorted(path.glob(_INDEX)) or sorted(path.glob("*.safetensors"))
        if len(files) == 1:
            return SafetensorsStore(path, files[0])
        trees = files or [file.parents[1] for file in sorted(path.glob("*/*/_METADATA"))]
    hint = f"pass one of {', '.join(map(str, trees[-3:]))}" if trees else "see center --help"
    raise FoldError(
        f"source: {path} is not one checkpoint, be it safetensors with an index or Orbax; {hint}"
    )


_INDEX = "*.safetensors.index.json"
_TREES = ("_METADATA", "*/_METADATA")  # an Orbax tree, or a step with such trees as its items


@contextmanager
def _damaged(what: str) -> Iterator[None]:
    """Turns an error of a library that reads or writes `what` into a `FoldError`."""
    try:
        yield
    except (FoldError, OSError):
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {first_line(error)}"
        raise FoldError(f"source: {what} ({why}); pass a complete checkpoint") from error


def copy_files(source: Path, dest: Path, skip: Callable[[Path], bool] = lambda _: False) -> None:
    """Copy contents only: linked files become files, and read-only ones can be written."""
    if source.is_file():
        shutil.copyfile(source, dest)
        return
    for folder, folders, files in os.walk(source, followlinks=True):
        folders[:] = [name for name in folders if not skip(Path(folder, name))]
        into = dest / Path(folder).relative_to(source)
        into.mkdir()
        for file in (Path(folder, name) for name in files):
            if not skip(file):
                shutil.copyfile(file, into / file.name)


# --- safetensors ---------------------------------------------------------------------------------

_SAFETENSORS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


class _Place(NamedTuple):
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
        with _damaged(f"{path} is not a readable safetensors file"):
            self._places = _indexed(path) if path.suffix == ".json" else dict(_places(path))
        self.leaves = {name: place.leaf for name, place in self._places.items()}

    def read(self, name: str) -> np.ndarray:
        """One array."""
        file, start, leaf = self._places[name]
        flat = np.fromfile(file, np.uint8, leaf.nbytes, offset=start)
        return flat.view(jnp.dtype(leaf.dtype)).reshape(leaf.shape)

    def write(self, name: str, value: np.ndarray) -> None:
        """Overwrite the bytes of one array."""
        with self._places[name].file.open("r+b") as file:
            file.seek(self._places[name].start)
            file.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)

    def copy(self, dest: Path, without: Collection[str]) -> None:
        """Copy the file, or the directory."""
        copy_files(self._root, dest)


def _places(path: Path) -> Iterator[tuple[str, _Place]]:
    """The arrays of a file: 8 bytes with the length of the header, the header in JSON, the data."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        if not 8 < start <= size:
            raise ValueError("it has no header")
        header = json.loads(file.read(start - 8))
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        dtype: str = entry["dtype"]
        leaf = StoredLeaf(tuple(entry["shape"]), _SAFETENSORS.get(dtype, dtype))
        fits = leaf.dtype not in FLOATS or leaf.nbytes == end - begin
        if not (fits and 0 <= begin <= end <= size - start):
            raise ValueError(f"the bytes of {name!r} are not all there")
        yield name, _Place(path, start + begin, leaf)


def _indexed(index: Path) -> dict[str, _Place]:
    weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    if outside := [file for file in weight_map.values() if Path(file).name != file]:
        raise ValueError(f"its file {outside[0]!r} is in another directory")
    places = {file: dict(_places(index.parent / file)) for file in sorted({*weight_map.values()})}
    return {name: places[file][name] for name, file in weight_map.items()}


# --- Orbax ---------------------------------------------------------------------------------------


_BATCH = 16_000_000
"""Bytes that are put into an OCDBT database at once."""


class OrbaxStore:
    """Arrays in a tree saved by Orbax, which stores each as a zarr array (version 2 or 3)."""

    leaves: dict[str, StoredLeaf]

    def __init__(self, root: Path, path: Path) -> None:
        """`path` is the directory that holds ``_METADATA``, `root` all that is copied."""
        try:
            import orbax.checkpoint as ocp
            import tensorstore
        except ImportError as error:
            raise FoldError(
                f"source: {path} is an Orbax checkpoint, and Orbax is not installed; "
                "run pip install orbax-checkpoint"
            ) from error
        self._ts = tensorstore
        self._root = root.resolve()
        self._folder = self._root / path.relative_to(root)  # which may be a link to elsewhere
        self._database = (path / "manifest.ocdbt").exists()
        with _damaged(f"{path} is not a readable Orbax checkpoint"):
            handler: Any = ocp.PyTreeCheckpointHandler()
            saved = handler.metadata(self._folder)
            self._driver = "zarr3" if saved.use_zarr3 else "zarr"
            found = leaf_paths(saved.tree, "source")
            arrays = {key: x for key, x in found if getattr(x, "shape", None) is not None}
            self._names = {key: x.name for key, x in arrays.items()}
            self.leaves = {
                key: StoredLeaf(tuple(x.shape), str(jnp.dtype(x.dtype)))
                for key, x in arrays.items()
            }

    def read(self, name: str) -> np.ndarray:
        """One array."""
        with _damaged(f"leaf {name!r} cannot be read"):
            return self._array(name).read().result()

    def write(self, name: str, value: np.ndarray) -> None:
        """Replace the chunks of one array."""
        with _damaged(f"leaf {name!r} cannot be written"):
            self._array(name).write(value).result()

    def copy(self, dest: Path, without: Collection[str]) -> None:
        """Copy files; from an OCDBT database all but the chunks of the arrays `without`."""
        if not self._database:
            copy_files(self._root, dest)
            return
        copy_files(self._root, dest, lambda x: x.parent == self._folder and _in_database(x))
        into = dest / self._folder.relative_to(self._root)
        arrays, left = {*self._names.values()}, {self._names[name] for name in without}
        with _damaged(f"{self._folder} cannot be copied"):
            old = self._ts.KvStore.open(_database(self._folder)).result()
            new = self._ts.KvStore.open(_database(into)).result()
            batch, size = self._ts.Transaction(), 0
            for key in old.list().result():
                if _array_of(key.decode(), arrays) in left:
                    continue
                value = old.read(key).result().value
                new.with_transaction(batch).write(key, value).result()
                if (size := size + len(value)) > _BATCH:
                    batch.commit_sync()
                    batch, size = self._ts.Transaction(), 0
            batch.commit_sync()

    def _array(self, name: str) -> Any:
        inside = f"{self._names[name]}/"
        if self._database:
            place = _database(self._folder) | {"path": inside}
        else:
            place = {"driver": "file", "path": f"{self._folder}/{inside}"}
        # Orbax calls a chunk that is not there a damaged one, even if it is all zeros.
        spec = {"driver": self._driver, "kvstore": place, "store_data_equal_to_fill_value": True}
        return self._ts.open(spec, open=True).result()


def _database(folder: Path) -> dict[str, Any]:
    return {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}}


def _array_of(key: str, arrays: Collection[str]) -> str:
    """The array whose chunk a key of the database is; empty for its shape and dtype."""
    *parts, last = key.split("/")
    if last in (".zarray", ".zattrs", "zarr.json"):
        return ""
    above = ("/".join(parts[:i]) for i in range(len(parts), 0, -1))
    return next((name for name in above if name in arrays), "")


def _in_database(file: Path) -> bool:
    return file.name in ("d", "manifest.ocdbt") or file.name.startswith("ocdbt.process_")
