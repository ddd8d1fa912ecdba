"""Trains the resampler and the language model with RMSNorms from the first step on.

``python -m examples.tinyllava_video.train`` shows tiny models clips of a handwritten digit that
crosses the picture, and asks which digit it is and where it goes. The tower does not learn, as in
the public recipe. All parameters are spread over the devices, and so is the batch:
``XLA_FLAGS=--xla_force_host_platform_device_count=8`` simulates eight of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from sklearn.datasets import load_digits

from .config import CONFIGS, Config, named
from .fitting import Batch, Trained, fit
from .model import TinyLlavaVideo
from .text import byte_tokenizer, encode_prompt, eos_ids
from .weights import distribute

QUESTION = "Which digit is it, and where does it go?"
WAYS = {"right": (0, 1), "left": (0, -1), "down": (1, 0), "up": (-1, 0)}


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
        before, asked = (np.tile(part, (size, 1)) for part in (prompt.before, prompt.after))
        after = np.concatenate((asked, answers), axis=1)
        learnt = np.arange(after.shape[1]) >= asked.shape[1]
        yield Batch(np.stack(pixels), before, after, np.tile(learnt, (size, 1)))


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Images of 8 by 8 pixels from 0 to 16, and what they show."""
    data = load_digits()
    return data.images, data.target


def train(config: Config, steps: int, *, mesh: Mesh, batch: int = 8, seed: int = 0) -> Trained:
    """Some steps on a mesh of the axes ``data`` and ``model``."""
    model = distribute(TinyLlavaVideo(config, nnx.Rngs(seed)), mesh)
    source, parts = batches(config, batch, seed), ("connector", "language_model")
    return fit(model, source, steps, parts=parts, rate=3e-3, mesh=mesh)


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
