"""Tasks of models that cannot be folded exactly: means are left out, and only kept small."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import data, partial_models
from .tasks import Batch, Settings, Task, class_loss, noisy, right

KEPT = 0.9  # of the numbers of a branch, where some are dropped


def _keyed(arrays: Batch, index: jax.Array, key: jax.Array) -> Batch:
    batch = noisy(arrays, index, key)
    return batch | {"key": jax.random.fold_in(key, 1), "kept": jnp.float32(KEPT)}


def _dropout_inputs(batch: Batch) -> tuple[jax.Array, ...]:
    """Held-out examples have no key: nothing is dropped."""
    nothing = jax.random.key(0), jnp.float32(1)
    return batch["images"], batch.get("key", nothing[0]), batch.get("kept", nothing[1])


def noisy_digits() -> data.Data:
    """Digits of which those that are held out have noise and its level."""
    train, test, classes = data.digits()
    rng = np.random.default_rng(0)
    level = rng.uniform(size=len(test["labels"])).astype(np.float32)
    noise = rng.normal(size=test["images"].shape).astype(np.float32)
    return data.Data(train, test | {"level": level, "noise": noise}, classes)


def _with_noise(arrays: Batch, index: jax.Array, key: jax.Array) -> Batch:
    batch = {name: x[index] for name, x in arrays.items()}
    first, second = jax.random.split(key)
    level = jax.random.uniform(first, (len(index),))
    return batch | {"level": level, "noise": jax.random.normal(second, batch["images"].shape)}


def _dit_inputs(batch: Batch) -> tuple[jax.Array, ...]:
    """``cos * image + sin * noise``, the level and the label."""
    angle = jnp.pi / 2 * batch["level"][:, None, None, None]
    images = jnp.cos(angle) * batch["images"] + jnp.sin(angle) * batch["noise"]
    return images.astype(batch["images"].dtype), batch["level"], batch["labels"]


def _missed(noise: jax.Array, batch: Batch) -> jax.Array:
    return jnp.square(noise - batch["noise"]).mean(axis=(1, 2, 3))


def _mean_missed(noise: jax.Array, batch: Batch) -> jax.Array:
    return _missed(noise, batch).mean()


SETTINGS = Settings(
    depth=3, width=32, heads=4, batch=64, steps=300, learning_rate=3e-3, eval_every=50
)


def _digits(title: str, model: Any, **other: Any) -> Task:
    common: dict[str, Any] = {
        "metric": "accuracy",
        "unit": "%",
        "higher_is_better": True,
        "settings": SETTINGS,
        "load": data.digits,
        "draw": noisy,
        "inputs": lambda batch: (batch["images"],),
        "loss": class_loss,
        "score": right,
        "approximate": True,
    }
    return Task(title=f"Digits: {title}", model=model, **{**common, **other})


PARTIAL = {
    "post_ln": _digits("post-LN encoder", partial_models.PostLN),
    "dropout": _digits(
        "ViT with dropout", partial_models.Dropout, draw=_keyed, inputs=_dropout_inputs
    ),
    "mlp": _digits("MLP, norms behind activations", partial_models.MLP),
    "conv": _digits("convolutional net as ConvNeXt", partial_models.ConvNet),
    "dit": _digits(
        "denoising as DiT",
        partial_models.DiT,
        metric="squared error of the noise",
        unit="",
        higher_is_better=False,
        load=noisy_digits,
        draw=_with_noise,
        inputs=_dit_inputs,
        loss=_mean_missed,
        score=_missed,
    ),
    "swin": _digits(
        "windows as Swin", partial_models.Swin, settings=replace(SETTINGS, depth=2, batch=32)
    ),
}
