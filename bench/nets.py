"""Nets trained here, of which no edit removes all means: text as post-LN, as Swin, as DiT."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .training import models
from .training.partial_tasks import PARTIAL
from .training.run import Program, program
from .training.tasks import TASKS, Task

SPREAD = {"text": 300}  # more steps, in which scales learn faster
FASTER = 50.0  # as if they had been trained for much longer
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
    made = program(task, task.settings, task.load(), "layernorm")
    params = _trained(made, made.init(0), folder / f"{name}.npz", tell)
    if steps := SPREAD.get(name):
        rates = optax.masked(optax.scale(FASTER), _scales)
        faster = optax.chain(task.settings.optimizer(), rates)
        settings = replace(task.settings, steps=steps)
        more = replace(made, settings=settings, optimizer=faster)
        params = _trained(more, params, folder / f"{name}_spread.npz", tell)
    return made.apply, jax.tree.map(np.asarray, params)


def _scales(params: Any) -> Any:
    is_scale = jax.tree_util.DictKey("scale")
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1] == is_scale, params)


def _trained(made: Program, params: Any, path: Path, tell: Callable[[str], None]) -> Any:
    """The parameters after all steps, of which those are kept in a file that were taken."""
    settings, given = made.settings, made.data.train
    carry, start = (params, made.optimizer.init(params)), 0
    if path.exists():
        kept = np.load(path)
        start, structure = int(kept["steps"]), jax.tree.structure(carry)
        carry = jax.tree.unflatten(structure, [kept[f"arr_{i}"] for i in range(len(kept) - 1)])
    arrays = {k: jnp.asarray(v) for k, v in given.items()}
    advance = jax.jit(made.scan, donate_argnums=2)
    drawn = np.random.default_rng(0).integers(
        made.task.examples(given), size=(settings.steps, settings.batch), dtype=np.int32
    )
    for first in range(start, settings.steps, EVERY):
        steps = np.arange(first, min(first + EVERY, settings.steps), dtype=np.int32)
        carry, loss = advance(arrays, jax.random.key(0), carry, (drawn[steps], steps))
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part.npz")
        np.savez(part, *map(np.asarray, jax.tree.leaves(carry)), steps=steps[-1] + 1)
        part.replace(path)
        tell(f"{path.stem}: {steps[-1] + 1} of {settings.steps} steps, loss {float(loss):.4g}")
    return carry[0]
