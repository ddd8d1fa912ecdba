"""Trains the resampler and the language model with RMSNorms from the first step on.

``python -m examples.tinyllava_video.train`` shows tiny models clips of a handwritten digit that
crosses the picture, and asks which digit it is and where it goes. The tower does not learn, as in
the public recipe. All parameters are spread over the devices, and so is the batch:
``XLA_FLAGS=--xla_force_host_platform_device_count=8`` simulates eight of them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
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
from sklearn.datasets import load_digits

import jax_lnfold

from .config import CONFIGS, Config, named
from .model import TinyLlavaVideo
from .text import byte_tokenizer, encode_prompt, eos_ids
from .weights import distribute

Tree = Any
QUESTION = "Which digit is it, and where does it go?"
WAYS = {"right": (0, 1), "left": (0, -1), "down": (1, 0), "up": (-1, 0)}


class Batch(NamedTuple):
    """Clips, what is asked about them, and the answers that are to be learnt."""

    pixels: np.ndarray  # float32 [batch, frames, size, size, 3]
    before: np.ndarray  # int32 [batch, tokens]
    after: np.ndarray  # int32 [batch, tokens]
    answer: np.ndarray  # int32 [batch, tokens], filled up with the end


class Trained(NamedTuple):
    """The model after training, the fold, and the loss of every step."""

    model: TinyLlavaVideo
    folded: jax_lnfold.Folded
    losses: list[float]
    drift: float  # from the constraint, in units of what rounding explains


def clip(image: np.ndarray, way: tuple[int, int], frames: int, size: int) -> np.ndarray:
    """A digit of 8 by 8 pixels that crosses a dark picture, float32 ``[frames, size, size, 3]``."""
    digit, room = np.kron(image / 8 - 1, np.ones((2, 2))), size - 16
    found = np.full((frames, size, size), -1.0, np.float32)
    for n, shown in enumerate(found):
        there = n / (frames - 1) - 0.5
        y, x = (round(room * (0.5 + there * step)) for step in way)
        shown[y : y + 16, x : x + 16] = digit
    return np.repeat(found[..., None], 3, axis=-1)


def batches(config: Config, size: int, seed: int = 0) -> Iterator[Batch]:
    """Clips without end, of scikit-learn's digits."""
    rng, tokenizer, (images, labels) = np.random.default_rng(seed), byte_tokenizer(), digits()
    prompt, (end, *_) = encode_prompt(tokenizer, QUESTION), eos_ids(tokenizer)
    longest = max(map(len, WAYS)) + 4
    while True:
        pixels, answers = [], np.full((size, longest), end, np.int32)
        for row in answers:
            n, way = rng.integers(len(images)), rng.choice(list(WAYS))
            side = config.vision.image_size
            pixels.append(clip(images[n], WAYS[way], config.num_frames, side))
            ids = tokenizer(f" {labels[n]} {way}").input_ids
            row[: len(ids)] = ids
        before, after = (np.tile(part, (size, 1)) for part in (prompt.before, prompt.after))
        yield Batch(np.stack(pixels), before, after, answers)


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Images of 8 by 8 pixels from 0 to 16, and what they show."""
    data = load_digits()
    return data.images, data.target


def answer_logits(graph: nnx.GraphDef) -> Callable[[Tree, Batch], jax.Array]:
    """A function of parameters and a batch: the logits from which its answers are read."""

    def logits(params: Tree, given: Batch) -> jax.Array:
        after = jnp.concatenate((given.after, given.answer[:, :-1]), axis=1)
        found = nnx.merge(graph, params)(given.pixels, given.before, after)
        return found[:, -given.answer.shape[1] :]

    return logits


def train(config: Config, steps: int, *, mesh: Mesh, batch: int = 8, seed: int = 0) -> Trained:
    """Some steps of AdamW on a mesh of the axes ``data`` and ``model``."""
    model = distribute(TinyLlavaVideo(config, nnx.Rngs(seed)), mesh)
    graph, params = nnx.split(model)
    learns = jax.tree_util.tree_map_with_path(
        lambda path, _: "vision_tower" not in jax.tree_util.keystr(path), params
    )

    source = batches(config, batch, seed)
    spread = partial(jax.device_put, device=NamedSharding(mesh, P("data")))
    folded = jax_lnfold.fold(answer_logits(graph), params, spread(next(source)))
    params = folded.params
    tx = optax.chain(
        jax_lnfold.center_gradients(folded.plan),
        optax.masked(optax.adamw(3e-3), learns),
        jax_lnfold.center_updates(folded.plan),
    )

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Tree, state: Tree, given: Batch) -> tuple[Tree, Tree, jax.Array]:
        def loss(params: Tree) -> jax.Array:
            frozen = jax.tree.map(lambda x, yes: x if yes else stop_gradient(x), params, learns)
            found = folded.apply(frozen, given)
            return optax.softmax_cross_entropy_with_integer_labels(found, given.answer).mean()

        value, gradients = jax.value_and_grad(loss)(params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    state, losses = jax.jit(tx.init)(params), []
    for _ in track(range(steps), "Training", disable=not sys.stderr.isatty()):
        params, state, loss = step(params, state, spread(next(source)))
        losses.append(float(loss))
    return Trained(nnx.merge(graph, params), folded, losses, float(state[-1].drift))


def main() -> None:
    """Train and say what came of it."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.tinyllava_video.train", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--config", choices=[c for c in CONFIGS if "tiny" in c], default="tiny-phi")
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    devices = np.array(jax.devices())
    across = 4 if len(devices) % 4 == 0 else 1
    mesh = Mesh(devices.reshape(-1, across), ("data", "model"))
    found = train(named(options.config), options.steps, mesh=mesh)
    print(found.folded.report)
    print(f"loss {found.losses[0]:.3f} -> {found.losses[-1]:.3f} on {len(devices)} devices")


if __name__ == "__main__":
    main()
