"""Formats of checkpoints: which one a path holds, and how to convert what is not read."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from zipfile import BadZipFile, ZipFile

from ..errors import FoldError
from .leaf_store import READABLE, LeafStore
from .orbax import OrbaxStore
from .safetensors import SafetensorsStore

_INDEX = "*.safetensors.index.json"
_TREES = ("_METADATA", "*/_METADATA")  # an Orbax tree, or a step with such trees as its items


def open_store(path: Path) -> LeafStore:
    """The arrays of a safetensors file, a directory of such files, or an Orbax checkpoint.

    Raises:
        FoldError: there is no such checkpoint at `path`, or it is damaged.
        OSError: a file cannot be read.
    """
    if not path.exists():
        raise FoldError(f"source: {path} does not exist; pass the path of a checkpoint")
    if path.match(_INDEX):
        raise FoldError(f"source: {path} is an index; pass its directory, {path.parent}")
    if path.is_file():
        try:
            return SafetensorsStore(path, path)
        except FoldError as error:
            if words := _conversion(path):
                raise FoldError(f"source: {words}") from error
            raise
    trees = [file.parent for pattern in _TREES for file in path.glob(pattern)]
    files = [*path.glob(_INDEX)] or [*path.glob("*.safetensors")]
    if len(trees + files) == 1:
        return OrbaxStore(path, trees[0]) if trees else SafetensorsStore(path, files[0])
    raise FoldError(f"source: {path} is not one checkpoint; {_choice(path, trees + files)}")


def _choice(path: Path, found: list[Path]) -> str:
    """What to do about a directory that holds these checkpoints."""
    deeper = {file.parents[1] for file in path.glob("*/*/_METADATA")}
    if some := ", ".join(map(str, sorted(found or deeper, key=_steps_last)[-3:])):
        parts = path in found or any(file.match(_INDEX) for file in found)
        return f"leave one of {some} in it" if parts else f"pass one of {some}"
    if any(path.glob("*/.zarray")):
        return "no _METADATA says what its arrays are: restore it with Orbax, and save that anew"
    files = (file for file in sorted(path.iterdir()) if file.is_file())
    return next(filter(None, map(_conversion, files)), READABLE)


def _steps_last(path: Path) -> tuple[bool, int, Path]:
    is_step = path.name.isdecimal()
    return is_step, int(path.name) if is_step else 0, path


# --- what is not read ----------------------------------------------------------------------------

_FLAT = "safetensors.flax.save_file(flax.traverse_util.flatten_dict({}, sep='.'), OUT)"
_READ = "flax.serialization.msgpack_restore(open(IN, 'rb').read())"
_PYTORCH = "weights of PyTorch", "safetensors.torch.save_file(torch.load(IN), OUT)"
_PICKLE = "a pickle", _FLAT.format("pickle.load(open(IN, 'rb'))")
_MSGPACK = "Flax's msgpack", _FLAT.format(_READ)
_NPZ = "NumPy's npz", "safetensors.numpy.save_file(dict(numpy.load(IN)), OUT)"
_NPY = "one array of NumPy", "safetensors.numpy.save_file({'key.path': numpy.load(IN)}, OUT)"
_HDF5 = "HDF5", "safetensors.numpy.save_file({'key.path': h5py.File(IN)['its/name'][()], ...}, OUT)"
_STARTS = (
    (rb"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19", _PYTORCH),  # as it wrote before it took to zip
    (rb"\x80[\x02-\x05]", _PICKLE),
    (rb"([\x81-\x8f]|\xde..|\xdf....)[\xa0-\xbf\xd9]", _MSGPACK),  # a map whose first key is text
    (rb"\x93NUMPY", _NPY),
    (rb"\x89HDF\r\n", _HDF5),
)
_INSIDE = {".npy": _NPZ, "/data.pkl": _PYTORCH, ".h5": _HDF5}


def _conversion(file: Path) -> str:
    """What a file is by its first bytes, and how to convert it; empty if that is not known."""
    with file.open("rb") as opened:
        start = opened.read(16)
    known = [found for magic, found in _STARTS if re.match(magic, start, re.DOTALL)]
    with suppress(BadZipFile), ZipFile(file) as archive:
        names = archive.namelist()
        known += [_INSIDE[end] for end in _INSIDE for name in names if name.endswith(end)]
    if not known or start[8:9] == b"{":  # which is safetensors, however damaged
        return ""
    what, how = known[0]
    how = how.replace("OUT", "'model.safetensors'").replace("IN", repr(str(file)))
    return f"{file} is {what}; center reads safetensors and Orbax, so convert it: {how}"
