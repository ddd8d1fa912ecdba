"""Nets trained here, of which no edit removes all means: text as post-LN, as Swin, as DiT."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .training import models
from .training.partial_tasks import PARTIAL
from .training.run import program
from .training.tasks import TASKS, Task

EVERY = 50  # steps after which a state is kept


def _longer(task: Task, **sizes: Any) -> Task:
    return replace(task, settings=replace(task.settings, **sizes))


TEXT = replace(TASKS["language"], title="Characters of Python's library", model=models.PostGPT)
NETS = {
    "text": _longer(TEXT, depth=6, width=192, heads=6, batch=8, steps=1800, learning_rate=1e-3),
    "swin": _longer(PARTIAL["swin"], depth=2, steps=600),
    "dit": _longer(PARTIAL["dit"], width=64, steps=1500),
}


def trained(
    task: Task, name: str, folder: Path, tell: Callable[[str], None]
) -> tuple[Callable[..., jax.Array], Any]:
    """The function of a net and its weights; its training goes on where `folder` says it was."""
    settings, given = task.settings, task.load()
    made = program(task, settings, given, "layernorm")
    path = folder / f"{name}.npz"
    params = made.init(0)
    carry, start = (params, made.optimizer.init(params)), 0
    if path.exists():
        kept = np.load(path)
        start, structure = int(kept["steps"]), jax.tree.structure(carry)
        carry = jax.tree.unflatten(structure, [kept[f"arr_{i}"] for i in range(len(kept) - 1)])
    arrays = {k: jnp.asarray(v) for k, v in given.train.items()}
    advance = jax.jit(made.scan, donate_argnums=2)
    drawn = np.random.default_rng(0).integers(
        task.examples(given.train), size=(settings.steps, settings.batch), dtype=np.int32
    )
    for first in range(start, settings.steps, EVERY):
        steps = np.arange(first, min(first + EVERY, settings.steps), dtype=np.int32)
        carry, loss = advance(arrays, jax.random.key(0), carry, (drawn[steps], steps))
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part.npz")
        np.savez(part, *map(np.asarray, jax.tree.leaves(carry)), steps=steps[-1] + 1)
        part.replace(path)
        tell(f"{name}: {steps[-1] + 1} of {settings.steps} steps, loss {float(loss):.4g}")
    return made.apply, jax.tree.map(np.asarray, carry[0])
