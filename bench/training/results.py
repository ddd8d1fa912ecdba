"""Results on disk: written atomically after every run, and never mixed with other settings."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

from .data import Data, digest
from .tasks import Settings, Task

Key: TypeAlias = tuple[str, str, Any, int]  # task, variant, dtype, seed

FORMAT = 1
PACKAGES = "jax jaxlib flax optax numpy scikit-learn".split()


class Results:
    """A results file; it need not exist yet."""

    def __init__(self, path: Path) -> None:
        """Reads what is there."""
        self.path = path
        self.content: dict[str, Any] = {
            "format": FORMAT,
            "versions": versions(),
            "hardware": hardware(),
            "tasks": {},
            "programs": {},
            "runs": [],
        }
        if path.exists():
            self.content = read(path)

    @property
    def done(self) -> set[Key]:
        """Runs that are finished."""
        return {(r["task"], r["variant"], r["dtype"], r["seed"]) for r in self.content["runs"]}

    def describe(self, name: str, task: Task, settings: Settings, data: Data) -> None:
        """Notes the settings of a task.

        Raises:
            SystemExit: the file has runs of other settings, data or versions.
        """
        new = {
            "title": task.title,
            "metric": task.metric,
            "unit": task.unit,
            "higher_is_better": task.higher_is_better,
            "settings": dataclasses.asdict(settings),
            "train_examples": task.examples(data.train),
            "test_examples": len(next(iter(data.test.values()))),
            "data": digest(data),
        }
        old = self.content["tasks"].setdefault(name, new)
        other = [key for key in new if old.get(key) != new[key]]
        if self.content["versions"] != versions():
            other.append("versions")
        if other:
            raise SystemExit(
                f"error: {self.path} has runs of {name} with other {', '.join(other)}; "
                "pass another --out, or delete it"
            )

    def add(self, key: Key, run: dict[str, Any]) -> None:
        """Keeps a finished run."""
        task, variant, dtype, seed = key
        named = {"task": task, "variant": variant, "dtype": dtype, "seed": seed}
        self.content["runs"].append(named | run)
        self.save()

    def save(self) -> None:
        """Replaces the file in one go."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            part.write_text(_text(self.content))
            os.replace(part, self.path)
        finally:
            part.unlink(missing_ok=True)


def read(path: Path) -> dict[str, Any]:
    """The contents of a results file.

    Raises:
        SystemExit: there is none, or it is something else.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise SystemExit(f"error: {path} does not exist; run without --report-only") from None
    except ValueError as error:
        raise SystemExit(f"error: {path} is not JSON: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise SystemExit(f"error: {path} is no results file of format {FORMAT}")
    return content


def versions() -> dict[str, str]:
    """What the numbers depend on."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def hardware() -> dict[str, Any]:
    """The processor, as the operating system calls it."""
    name = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    return {"processor": name, "cores": os.cpu_count()}


def _text(content: dict[str, Any]) -> str:
    """JSON with a line per run."""
    runs = ",\n".join("  " + json.dumps(run, allow_nan=False) for run in content["runs"])
    head = json.dumps({k: v for k, v in content.items() if k != "runs"}, indent=1, allow_nan=False)
    return f'{head.rstrip().removesuffix("}").rstrip()},\n "runs": [\n{runs}\n ]\n}}\n'
