"""Headers of safetensors files, read at least as strictly as by the format's own library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8"), 8),
    **dict.fromkeys(("F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}
"""By dtype, as the format spells it."""

_LONGEST, _LARGEST = 100_000_000, 2**64  # the longest header, and what no number may reach


class Entry(NamedTuple):
    """One array of a file, the first of whose bytes is `start`."""

    dtype: str
    shape: tuple[int, ...]
    start: int


def read_header(path: Path) -> dict[str, Entry]:
    """The arrays of a file: 8 bytes with the length of the header, the header in JSON, the data.

    Raises:
        ValueError: it is no such file, or the arrays are not just all of the data, one by one.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        if not 8 < start <= min(size, 8 + _LONGEST):
            raise ValueError("it has no header")
        data = file.read(start - 8)
    header = strict_json(data, parse_int=_size, parse_float=_size, parse_constant=_size)
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    notes = header.pop("__metadata__", None)
    if notes is not None and not (
        isinstance(notes, dict) and all(isinstance(x, str) for x in notes.values())
    ):
        raise ValueError("its __metadata__ are not strings by name")
    found: dict[str, Entry] = {}
    end = 0
    for (begin, stop), name in sorted((_offsets(name, x), name) for name, x in header.items()):
        if begin != end:
            problem = "overlap with others" if begin < end else "come after a hole"
            raise ValueError(f"the bytes of {name!r} {problem}")
        dtype, shape = header[name]["dtype"], tuple(header[name]["shape"])
        if _n_bits(name, dtype, shape) != 8 * (stop - begin):
            raise ValueError(
                f"{name!r} of dtype {dtype} and shape {shape} has {stop - begin} bytes"
            )
        found[name] = Entry(dtype, shape, start + begin)
        end = stop
    if start + end != size:
        problem = "is cut off" if start + end > size else "goes on after its last array"
        raise ValueError(f"it {problem}: {size} bytes instead of {start + end}")
    return found


def _offsets(name: str, entry: Any) -> tuple[int, int]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name!r} is not described by dtype, shape and data_offsets")
    offsets, shape = entry["data_offsets"], entry["shape"]
    if not (_are_sizes(offsets) and _are_sizes(shape) and len(offsets) == 2):
        raise ValueError(f"shape or data_offsets of {name!r} are no integers")
    begin, end = offsets
    if end < begin:
        raise ValueError(f"the bytes of {name!r} end before they begin")
    return begin, end


def _are_sizes(data: Any) -> bool:
    return isinstance(data, list) and all(type(n) is int and 0 <= n < _LARGEST for n in data)


def _n_bits(name: str, dtype: Any, shape: tuple[int, ...]) -> int:
    bits = _BITS.get(dtype) if isinstance(dtype, str) else None
    if bits is None:
        raise ValueError(f"{name!r} has the unknown dtype {dtype!r}")
    for n in shape:  # from the left, as a zero further right makes up for nothing
        if (bits := bits * n) >= 8 * _LARGEST:
            raise ValueError(f"{name!r} of shape {shape} is too large")
    return bits


def strict_json(data: bytes, **hooks: Any) -> Any:
    """What JSON in UTF-8 says, if it says nothing twice; `hooks` are those of `json.loads`.

    Raises:
        ValueError: `data` is something else.
    """
    return json.loads(data.decode("utf-8"), object_pairs_hook=_object, **hooks)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r} is there twice")
        for text in (name, value):
            if isinstance(text, str):
                text.encode("utf-8")  # half a surrogate pair is no text
        found[name] = value
    return found


def _size(text: str) -> int:
    if not text.isdigit():
        raise ValueError(f"{text[:20]} is no size")
    return int(text)
