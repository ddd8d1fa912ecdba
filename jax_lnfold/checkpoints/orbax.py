"""Arrays in checkpoints saved by Orbax, read with TensorStore, which it brings along."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FoldError
from .leaf_store import StoredLeaf, copy_files, damaged
from .safetensors_header import strict_json
from .signals import undisturbed

_BATCH = 16_000_000
"""Bytes that are put into an OCDBT database at once."""


class OrbaxStore:
    """Arrays in a tree saved by Orbax, which stores each as a zarr array (version 2 or 3)."""

    leaves: dict[str, StoredLeaf]

    def __init__(self, root: Path, path: Path) -> None:
        """`path` is the directory that holds ``_METADATA``, `root` all that is copied."""
        try:
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
        with damaged(f"{path} is not a readable Orbax checkpoint"):
            about = strict_json((path / "_METADATA").read_bytes())
            self._driver = "zarr3" if about.get("use_zarr3") else "zarr"
            self._names = _array_names(about["tree_metadata"])
            opened = {key: self._open(name) for key, name in self._names.items()}
            arrays = {key: opening.result() for key, opening in opened.items()}
        self.leaves = {key: StoredLeaf(tuple(x.shape), x.dtype.name) for key, x in arrays.items()}

    def read(self, name: str) -> np.ndarray:
        """One array."""
        with damaged(f"leaf {name!r} cannot be read"):
            return self._open(self._names[name]).result().read().result()

    def write(self, name: str, value: np.ndarray) -> None:
        """Replace the chunks of one array."""
        with damaged(f"leaf {name!r} cannot be written"):
            self._open(self._names[name]).result().write(value).result()

    def copy(self, dest: Path, without: Collection[str]) -> None:
        """Copy files; from an OCDBT database all but the chunks of the arrays `without`."""
        if not self._database:
            copy_files(self._root, dest)
            return
        copy_files(self._root, dest, lambda x: x.parent == self._folder and _in_database(x))
        into = dest / self._folder.relative_to(self._root)
        arrays, left = {*self._names.values()}, {self._names[name] for name in without}
        with damaged(f"{self._folder} cannot be copied"):
            old = self._ts.KvStore.open(self._spec()).result()
            new = self._ts.KvStore.open(_database(into)).result()
            kept = (key for key in self._keys() if _array_of(key, arrays) not in left)
            more = True
            while more:
                with undisturbed():
                    more = self._copy_some(kept, old, new)

    def _copy_some(self, keys: Iterator[str], old: Any, new: Any) -> bool:
        """Copy values from one database to another; whether there may be more of them."""
        batch, size = self._ts.Transaction(), 0
        for key in keys:
            value = old.read(key).result().value
            new.with_transaction(batch).write(key, value).result()
            if (size := size + len(value)) > _BATCH:
                break
        batch.commit_sync()
        return size > _BATCH

    def _open(self, name: str) -> Any:
        """A future of an array."""
        spec = {
            "driver": self._driver,
            "kvstore": self._spec(f"{name}/"),
            # A chunk that is not there is a damaged one: those that are all zeros are written, too.
            "store_data_equal_to_fill_value": True,
            "fill_missing_data_reads": False,
        }
        return self._ts.open(spec, open=True)

    def _keys(self) -> list[str]:
        store = self._ts.KvStore.open(self._spec()).result()
        return [key.decode() for key in store.list().result()]

    def _spec(self, inside: str = "") -> dict[str, Any]:
        if self._database:
            return _database(self._folder) | {"path": inside}
        return {"driver": "file", "path": f"{self._folder}/{inside}"}


def _array_names(tree: dict[str, Any]) -> dict[str, str]:
    """The name of every array of a tree by its key path, as Orbax describes and stores them.

    Orbax itself reads many at once, and prints a traceback for each that cannot be read.
    """
    kinds = ("jax.Array", "np.ndarray")
    arrays = [
        x["key_metadata"] for x in tree.values() if x["value_metadata"]["value_type"] in kinds
    ]
    keys = [[str(part["key"]) for part in path] for path in arrays]
    names = {"/".join(path): ".".join(path) for path in keys}
    if len({*names.values()}) < len(keys):
        raise ValueError("two of its leaves have one name")
    for name in filter(None, names.values()):  # which is a path on disk, unless in a database
        if {*name.split("/")} & {"", ".", ".."}:
            raise ValueError(f"its array {name!r} is in another directory")
    return names


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
