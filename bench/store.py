"""Results on disk: rows of one JSON file, written one by one, so that a run can be resumed."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

import jax_lnfold

Row = dict[str, Any]


class Store:
    """The rows of a file, known by the values of `keys`; those of other versions are dropped."""

    def __init__(self, path: Path, keys: Sequence[str]) -> None:
        """Read what is there."""
        self.path, self.keys = path, keys
        self.versions = {"jax": jax.__version__, "jax_lnfold": jax_lnfold.__version__}
        known = json.loads(path.read_text()) if path.exists() else {}
        self.rows: list[Row] = known.get("rows", []) if self._is_same(known) else []

    def _is_same(self, known: dict[str, Any]) -> bool:
        return known.get("versions") == self.versions

    def has(self, *values: Any) -> bool:
        """Whether there is a row with these values of the keys."""
        return any(self._key(row) == values for row in self.rows)

    def drop(self, *values: Any) -> None:
        """Forget the rows whose first keys have these values, in the file with the next `add`."""
        self.rows = [row for row in self.rows if self._key(row)[: len(values)] != values]

    def _key(self, row: Row) -> tuple[Any, ...]:
        return tuple(row[k] for k in self.keys)

    def add(self, values: Sequence[Any], **figures: Any) -> None:
        """Add a row and write the file."""
        self.rows.append(dict(zip(self.keys, values, strict=True)) | figures)
        data = {"versions": self.versions, "machine": machine(), "rows": self.rows}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".part")
        unfinished.write_text(as_lines(data))
        unfinished.replace(self.path)


def as_lines(data: dict[str, Any]) -> str:
    """JSON with a line per row."""
    head = json.dumps({k: v for k, v in data.items() if k != "rows"}, indent=1)
    rows = ",\n".join("  " + json.dumps(row) for row in data["rows"])
    return f'{head.removesuffix("}").rstrip()},\n "rows": [\n{rows}\n ]\n}}\n'


def machine() -> dict[str, Any]:
    """The processor, by the name that the system gives it, its cores, and jax's device."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor()
    device = jax.devices()[0]
    about = {"device": device.device_kind, "platform": device.platform}
    return {"cpu": name, "cores": os.cpu_count()} | about
