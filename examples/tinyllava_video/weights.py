"""Weights of public checkpoints into the model, and back into their format.

A checkpoint is a folder as on the Hugging Face hub: `config.json`, and safetensors files or
PyTorch's own. What `save` writes is one, too, so that folded weights serve the public code as well.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path as FilePath

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding
from rich.console import Console
from rich.progress import track

from .config import Config, Variant, variant
from .errors import InputError
from .files import (
    DTYPES,
    PARTS,
    Stored,
    is_weights,
    open_arrays,
    shortened,
    write_arrays,
    write_json,
)
from .keys import IGNORED, TIED, Entry, entries
from .model import TinyLlavaVideo, abstract
from .public_config import config_dict, config_from

__all__ = ["check", "check_destination", "config_from", "distribute", "load", "save"]

TIED_ROWS = 4096
"""How many rows of two copies of the embedding are compared at a time."""


def check(directory: str | FilePath, config: Config | None = None) -> Config:
    """The configuration of a checkpoint that `load` can read; no weights are read.

    Raises:
        InputError: the folder is no checkpoint of this model.
    """
    return _opened(FilePath(directory), config)[0]


def load(
    directory: str | FilePath,
    config: Config | None = None,
    *,
    dtype: jax.typing.DTypeLike | None = None,
    mesh: Mesh | None = None,
    axis: str = "model",
) -> TinyLlavaVideo:
    """The model with the weights of a checkpoint.

    All keys and shapes are checked before anything is read. Then one parameter after the other is
    read and placed; with a mesh every device is given its part alone.

    Args:
        directory: the folder of the checkpoint.
        config: the model; what `config.json` says unless it is given.
        dtype: of all parameters; unless it is given each has the one that it is stored in.
        mesh: devices to split the parameters over; otherwise they go to the default device.
        axis: of the mesh. Linear layers are split along their outputs or, the second of two, along
            their inputs, embeddings along the vocabulary; vectors are not split, nor what does not
            divide.

    Raises:
        InputError: the folder is no checkpoint of this model, a file is damaged, a number is too
            large for `dtype`, or the mesh cannot be used.
    """
    if mesh is not None:
        _check_mesh(mesh, axis)
    config, stored = _opened(FilePath(directory), config)
    return placed(directory, config, stored, dtype=dtype, mesh=mesh, axis=axis)


def placed(
    where: str | FilePath,
    config: Config,
    stored: Mapping[str, Stored],
    *,
    dtype: jax.typing.DTypeLike | None = None,
    mesh: Mesh | None = None,
    axis: str = "model",
) -> TinyLlavaVideo:
    """The model with arrays that `check_arrays` passed; the rest is as for `load`.

    Raises:
        InputError: as `load`; what was read is called `where`.
    """
    if mesh is not None:
        _check_mesh(mesh, axis)
    model = abstract(config)
    wanted = entries(model)
    _check_tied(where, config, stored)
    shown = track(
        wanted.items(),
        "Loading weights",
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    arrays = {
        path: _placed(stored[entry.key], entry, dtype, _sharding(entry, mesh, axis))
        for path, entry in shown
    }
    nnx.update(model, nnx.from_flat_state(arrays))
    return model


def save(
    model: TinyLlavaVideo,
    directory: str | FilePath,
    *,
    source: str | FilePath | None = None,
    max_shard_bytes: int = 2 << 30,
) -> None:
    """Writes the model as a public checkpoint, in the dtypes that its parameters have.

    Args:
        model: its parameters may be folded, and on many devices.
        directory: is made if need be; there must be no weights in it.
        source: the checkpoint that the model comes from. Everything in it but the weights (its
            `config.json`, the tokenizer) is copied: the public code needs that.
        max_shard_bytes: of one safetensors file, and what is in memory at once.

    Raises:
        InputError: there are weights already, `source` is one of another model, or the format
            cannot express the configuration.
    """
    directory, config = FilePath(directory), model.config
    check_destination(directory, config, source)
    leaves = dict(nnx.to_flat_state(nnx.state(model)))
    wanted = {entry.key: (leaves[path][...], entry) for path, entry in entries(model).items()}
    directory.mkdir(parents=True, exist_ok=True)
    write_arrays(
        directory,
        {key: partial(as_stored, *pair) for key, pair in wanted.items()},
        {key: array.nbytes for key, (array, _) in wanted.items()},
        max_shard_bytes,
    )
    # Last, so that a folder that lacks weights is not taken for a checkpoint.
    if source is None:
        write_json(directory / "config.json", config_dict(config))
    else:
        copy_others(FilePath(source), directory)


def check_destination(
    directory: str | FilePath, config: Config, source: str | FilePath | None = None
) -> None:
    """Whether `save` can write a model of this configuration there.

    Raises:
        InputError: it cannot.
    """
    directory = FilePath(directory).absolute()
    config_dict(config)
    there = next(path for path in (directory, *directory.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise InputError(f"directory: {directory} cannot be made in {there}; give another one")
    inside = [directory, *(directory / part for part in PARTS)]
    if any(is_weights(file) for place in inside if place.is_dir() for file in place.iterdir()):
        raise InputError(f"directory: {directory} holds weights already; give another one")
    if source is not None and _public(config_from(source)) != _public(config):
        raise InputError(f"source: {source} is a checkpoint of another model")


def _public(config: Config) -> Config:
    """Without what may change from run to run."""
    return replace(config, context=0, num_frames=0, max_frames=0)


def copy_others(source: FilePath, directory: FilePath, without: str = "") -> None:
    """All files but weights, and but the one of this name."""
    for file in source.iterdir():
        if file.is_file() and not is_weights(file) and file.name != without:
            shutil.copy2(file, directory / file.name)


def distribute(model: TinyLlavaVideo, mesh: Mesh, axis: str = "model") -> TinyLlavaVideo:
    """A copy of the model on many devices, split as `load` splits it.

    Raises:
        InputError: the mesh cannot be used.
    """
    _check_mesh(mesh, axis)
    copy, wanted = abstract(model.config), entries(model)
    arrays = {
        path: jax.device_put(leaf[...], _sharding(wanted[path], mesh, axis))
        for path, leaf in nnx.to_flat_state(nnx.state(model))
    }
    nnx.update(copy, nnx.from_flat_state(arrays))
    return copy


# --- what a checkpoint must hold -----------------------------------------------------------------


def _opened(directory: FilePath, config: Config | None) -> tuple[Config, dict[str, Stored]]:
    """The configuration, and the arrays, of which only headers are read."""
    given, config = config, config or config_from(directory)
    stored = open_arrays(directory)
    if (found := _found_variant(stored)) not in (None, variant(config)):
        if given:
            raise InputError(
                f"config: it is of the variant {variant(config)!r}, but the checkpoint in "
                f"{directory} is of {found!r}; leave config out, or give the other one"
            )
        raise InputError(
            f"directory: the config.json in {directory} describes the variant {variant(config)!r}, "
            f"but the weights are of {found!r}; download the one that belongs to them"
        )
    check_arrays(directory, config, stored)
    return config, stored


def check_arrays(where: str | FilePath, config: Config, stored: Mapping[str, Stored]) -> None:
    """Whether the arrays that were found are those of this model.

    Raises:
        InputError: keys, shapes or dtypes differ; all that do are said at once.
    """
    shapes = {entry.key: entry.stored_shape for entry in entries(abstract(config)).values()}
    if config.text.tie_word_embeddings and TIED[0] in stored:
        shapes[TIED[0]] = shapes[TIED[1]]
    problems = {
        "missing": [key for key in shapes if key not in stored],
        "unexpected": [k for k in stored if k not in shapes and not k.endswith(IGNORED)],
        "of another shape": [
            f"{key} {stored[key].shape} instead of {shape}"
            for key, shape in shapes.items()
            if key in stored and stored[key].shape != shape
        ],
        "of a dtype that is not read": [
            f"{key} {stored[key].dtype}"
            for key in shapes
            if key in stored and stored[key].dtype not in DTYPES.values()
        ],
    }
    if said := [f"{len(x)} {kind}: {shortened(x)}" for kind, x in problems.items() if x]:
        raise InputError(
            f"directory: {where} does not hold the weights of this model; " + "; ".join(said)
        )


def _found_variant(stored: Mapping[str, Stored]) -> Variant | None:
    norms: dict[str, Variant] = {"norm": "qwen2", "final_layernorm": "phi"}
    found = {v for norm, v in norms.items() if f"language_model.model.{norm}.weight" in stored}
    return found.pop() if len(found) == 1 else None


def _check_tied(where: str | FilePath, config: Config, stored: Mapping[str, Stored]) -> None:
    """A copy of the embedding must be one: bit by bit, some rows at a time."""
    if not config.text.tie_word_embeddings or TIED[0] not in stored:
        return
    one, other = (stored[key] for key in TIED)
    for start in range(0, one.shape[0], TIED_ROWS):
        rows = (slice(start, min(start + TIED_ROWS, one.shape[0])), slice(None))
        if one.read(rows).tobytes() != other.read(rows).tobytes():
            raise InputError(
                f"directory: in {where} {TIED[0]} differs from {TIED[1]}, but the "
                "configuration ties them; set tie_word_embeddings to false if they are two"
            )


# --- from files to devices and back --------------------------------------------------------------


def _check_mesh(mesh: Mesh, axis: str) -> None:
    if axis not in mesh.axis_names:
        raise InputError(f"axis: the mesh has {', '.join(mesh.axis_names)}, but no {axis!r}")
    if mesh.axis_types[mesh.axis_names.index(axis)] != AxisType.Auto:
        raise InputError(
            f"mesh: its axis {axis!r} is not partitioned automatically; make it with "
            "jax.make_mesh(..., axis_types=(jax.sharding.AxisType.Auto, ...))"
        )


def _sharding(entry: Entry, mesh: Mesh | None, axis: str) -> Sharding | None:
    if mesh is None:
        return None
    parts: list[str | None] = [None] * len(entry.shape)
    if entry.split is not None and entry.shape[entry.split] % mesh.shape[axis] == 0:
        parts[entry.split] = axis
    return NamedSharding(mesh, PartitionSpec(*parts))


def _placed(
    stored: Stored, entry: Entry, dtype: jax.typing.DTypeLike | None, sharding: Sharding | None
) -> jax.Array:
    def read(index: tuple[slice, ...]) -> np.ndarray:
        part = stored.read(entry.stored_index(index)).transpose(entry.axes)
        return part if dtype is None else _cast(part, dtype, entry.key)

    if sharding is None:
        return jnp.asarray(read((slice(None),) * len(entry.shape)))
    return jax.make_array_from_callback(entry.shape, sharding, read)


def _cast(part: np.ndarray, dtype: jax.typing.DTypeLike, key: str) -> np.ndarray:
    with np.errstate(over="ignore"):  # said below
        cast = part.astype(dtype)
    if np.isinf(cast).sum() > np.isinf(part).sum():
        raise InputError(f"dtype: {key} holds numbers too large for {cast.dtype}")
    return cast


def as_stored(array: jax.Array, entry: Entry) -> np.ndarray:
    """A parameter as it lies in a checkpoint."""
    return np.asarray(array).transpose(entry.back)
