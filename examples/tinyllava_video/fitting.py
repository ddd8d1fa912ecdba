"""Training with RMSNorms from the first step on: parameters stay centered, or adapters are."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.lax import stop_gradient
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.progress import track

import jax_lnfold

from .model import TinyLlavaVideo

Tree = Any


class Batch(NamedTuple):
    """Clips and conversations about them, of which the model learns a part."""

    pixels: np.ndarray  # float32 [batch, frames, size, size, 3]
    before: np.ndarray  # int32 [batch, tokens]
    after: np.ndarray  # int32 [batch, tokens]
    learnt: np.ndarray  # bool [batch, tokens], of `after`


class Trained(NamedTuple):
    """The model after training, the fold, and the loss of every step."""

    model: TinyLlavaVideo
    folded: jax_lnfold.Folded
    losses: list[float]
    drift: float  # from the constraint, in units of what rounding explains


class Adapter(NamedTuple):
    """What is added to a kernel: ``a @ b`` times a number (LoRA, Hu et al., arXiv 2106.09685)."""

    a: jax.Array  # [inputs, rank]
    b: jax.Array  # [rank, outputs]


ALPHA = 16
"""Adapters count times this by their rank, as in the public recipe."""


def next_logits(graph: nnx.GraphDef) -> Callable[[Tree, Batch], jax.Array]:
    """A function of parameters and a batch: the logits that say what `after` is."""

    def logits(params: Tree, given: Batch) -> jax.Array:
        found = nnx.merge(graph, params)(given.pixels, given.before, given.after)
        return found[:, -given.after.shape[1] - 1 : -1]

    return logits


def loss_of(logits: jax.Array, given: Batch) -> jax.Array:
    """Cross-entropy of what is learnt, on average over all of it."""
    each = optax.softmax_cross_entropy_with_integer_labels(logits, given.after)
    return (each * given.learnt).sum() / jnp.maximum(given.learnt.sum(), 1)


def of_parts(params: Tree, parts: Sequence[str]) -> Tree:
    """Which parameters belong to these parts of the model."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: any(f"'{part}'" in jax.tree_util.keystr(path[:1]) for part in parts), params
    )


def adapters_for(params: Tree, rank: int, seed: int) -> dict[str, Adapter]:
    """Of all linear layers of the language model's blocks; they add nothing yet."""
    found, key = {}, jax.random.key(seed)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path)
        if name.startswith("['language_model']['layers']") and "'kernel'" in name:
            key, new = jax.random.split(key)
            inputs, outputs = leaf.shape
            a = jax.random.normal(new, (inputs, rank), leaf.dtype) * inputs**-0.5
            found[name] = Adapter(a, jnp.zeros((rank, outputs), leaf.dtype))
    return found


def adapted(params: Tree, adapters: dict[str, Adapter]) -> Tree:
    """Parameters with the adapters added."""

    def add(path: Any, leaf: jax.Array) -> jax.Array:
        if (adapter := adapters.get(jax.tree_util.keystr(path))) is None:
            return leaf
        return leaf + ALPHA / adapter.a.shape[1] * adapter.a @ adapter.b

    return jax.tree_util.tree_map_with_path(add, params) if adapters else params


def fit(
    model: TinyLlavaVideo,
    source: Iterator[Batch],
    steps: int,
    *,
    parts: Sequence[str],
    rate: optax.ScalarOrSchedule,
    mesh: Mesh,
    rank: int = 0,
    seed: int = 0,
) -> Trained:
    """Some steps of AdamW on a mesh that has an axis ``data``.

    Args:
        model: its parameters are already where they should be.
        source: batches, the size of which the axis divides.
        steps: how many.
        parts: what is trained of the model; all else is frozen.
        rate: of learning.
        mesh: batches are split along its axis ``data``.
        rank: if not 0, blocks of the language model learn adapters of that rank. These need not be
            centered themselves: their sum with the kernels is, in every step.
        seed: of the adapters.
    """
    graph, params = nnx.split(model)
    spread = partial(jax.device_put, device=NamedSharding(mesh, P("data")))
    folded = jax_lnfold.fold(next_logits(graph), params, spread(next(source)))
    params, learns = folded.params, of_parts(params, parts)
    adapters = adapters_for(params, rank, seed) if rank else {}
    tx = optax.chain(
        jax_lnfold.center_gradients(folded.plan),
        optax.masked(optax.adamw(rate, weight_decay=0.0), learns),
        jax_lnfold.center_updates(folded.plan),
    )
    small = optax.adamw(rate, weight_decay=0.0)

    def whole(params: Tree, adapters: dict[str, Adapter]) -> Tree:
        return folded.plan.center(adapted(params, adapters)) if adapters else params

    @partial(jax.jit, donate_argnums=(0, 1, 2, 3))
    def step(
        params: Tree, state: Tree, adapters: Tree, other: Tree, given: Batch
    ) -> tuple[Tree, Tree, Tree, Tree, jax.Array]:
        def loss(params: Tree, adapters: Tree) -> jax.Array:
            frozen = jax.tree.map(lambda x, yes: x if yes else stop_gradient(x), params, learns)
            return loss_of(folded.apply(whole(frozen, adapters), given), given)

        value, (slopes, others) = jax.value_and_grad(loss, argnums=(0, 1))(params, adapters)
        updates, state = tx.update(slopes, state, params)
        more, other = small.update(others, other, adapters)
        params, adapters = optax.apply_updates(params, updates), optax.apply_updates(adapters, more)
        return params, state, adapters, other, value

    state, other, losses = jax.jit(tx.init)(params), small.init(adapters), []
    for _ in track(range(steps), "Training", disable=not sys.stderr.isatty()):
        given = spread(next(source))
        params, state, adapters, other, loss = step(params, state, adapters, other, given)
        losses.append(float(loss))
    trained = jax.jit(whole)(params, adapters)
    return Trained(nnx.merge(graph, trained), folded, losses, float(state[-1].drift))
