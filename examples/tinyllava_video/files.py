"""Arrays in the files of a checkpoint, read in parts: safetensors and PyTorch's own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
from safetensors.numpy import save_file

from .errors import InputError
from .torch_files import part_of, torch_arrays

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Of safetensors; others are no weights of this model."""

SAFETENSORS, TORCH = "model.safetensors", "pytorch_model.bin"

PARTS = {
    "vision_tower": "vision_tower._vision_tower.",
    "language_model": "language_model.",
    "connector": "connector.",
}
"""Folders that the first stage of training leaves, and how keys begin that theirs lack."""


class Stored(NamedTuple):
    """An array in a file. `read` takes slices and gives a copy of that part."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[tuple[slice, ...]], np.ndarray]


def open_arrays(directory: Path) -> dict[str, Stored]:
    """All arrays of a checkpoint by their keys; nothing but headers is read.

    Raises:
        InputError: there are no weights, or a file of them is missing or damaged.
    """
    for name, opened in ((SAFETENSORS, _safetensors), (TORCH, _torch)):
        files = _files(directory, name)
        if files:
            return {key: array for file in files for key, array in opened(file)}
    if all((directory / part).is_dir() for part in PARTS):
        parts = ((begins, open_arrays(directory / part)) for part, begins in PARTS.items())
        return {begins + key: array for begins, held in parts for key, array in held.items()}
    raise InputError(
        f"directory: {directory} has no weights; there should be {SAFETENSORS} or {TORCH}, or an "
        f"index ({_index(SAFETENSORS)}) and its files"
    )


def _index(name: str) -> str:
    return f"{name}.index.json"


def _files(directory: Path, name: str) -> list[Path]:
    if (directory / name).is_file():
        return [directory / name]
    if not (index := directory / _index(name)).is_file():
        return []
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(x, str) for x in weight_map.values()):
        raise InputError(f"directory: {index} has no weight_map of files; download it again")
    files = [directory / file for file in sorted(set(weight_map.values()))]
    if missing := [file.name for file in files if not file.is_file()]:
        raise InputError(
            f"directory: {directory} lacks {shortened(missing)}, which {index.name} names; "
            "download what is missing"
        )
    return files


def _safetensors(file: Path) -> Iterator[tuple[str, Stored]]:
    try:
        opened = safetensors.safe_open(file, framework="numpy")
    except (safetensors.SafetensorError, OSError) as error:
        raise InputError(f"directory: {file} is damaged ({error}); download it again") from error
    for key in opened.keys():  # noqa: SIM118 - it is no mapping
        part = opened.get_slice(key)
        dtype = part.get_dtype()
        yield key, Stored(tuple(part.get_shape()), DTYPES.get(dtype, dtype), part.__getitem__)


def _torch(file: Path) -> Iterator[tuple[str, Stored]]:
    for key, array in torch_arrays(file):
        dtype = str(array.dtype).removeprefix("torch.")
        yield key, Stored(tuple(array.shape), dtype, partial(part_of, array))


def write_arrays(
    directory: Path, arrays: dict[str, Callable[[], np.ndarray]], sizes: dict[str, int], most: int
) -> None:
    """Writes safetensors files of at most so many bytes (or one array) each, with an index.

    `arrays` are made one file at a time; `sizes` are their bytes.
    """
    shards: list[list[str]] = [[]]
    for key, size in sizes.items():
        if shards[-1] and sum(sizes[k] for k in shards[-1]) + size > most:
            shards.append([])
        shards[-1].append(key)
    stem, suffix = SAFETENSORS.split(".")
    numbered = f"{stem}-{{:05}}-of-{len(shards):05}.{suffix}"
    names = [numbered.format(i + 1) for i in range(len(shards))]
    if len(shards) == 1:
        names = [SAFETENSORS]
    else:
        weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_json(directory / _index(SAFETENSORS), index)
    for name, keys in zip(names, shards, strict=True):
        # Without this note `transformers` refuses a file. The writer takes bytes as they lie.
        parts = {key: np.ascontiguousarray(arrays[key]()) for key in keys}
        save_file(parts, directory / name, metadata={"format": "pt"})


def is_weights(file: Path) -> bool:
    """Whether a file holds weights, or the index of such files."""
    name = file.name.removesuffix(".index.json")
    return name.endswith(tuple(Path(x).suffix for x in (SAFETENSORS, TORCH)))


def read_json(file: Path) -> dict[str, Any]:
    """An object in a file.

    Raises:
        InputError: the file cannot be read, or holds something else.
    """
    try:
        value = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"directory: {file} cannot be read ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"directory: {file} holds a {type(value).__name__}, not an object")
    return value


def write_json(file: Path, value: dict[str, Any]) -> None:
    """Writes it for people to read, too."""
    file.write_text(json.dumps(value, indent=2) + "\n", "utf-8")


def shortened(items: list[str], most: int = 5) -> str:
    """A list in words, its end counted."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + more
