"""The four tasks: data, model, loss and metric, and their sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from . import data, models
from .models import Kind

Batch: TypeAlias = dict[str, jax.Array]

NOISE = 0.4  # of digits, whose pixels span [-1, 1]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sizes and hyperparameters; the same for all variants."""

    depth: int
    width: int
    heads: int
    batch: int
    steps: int
    learning_rate: float
    weight_decay: float = 0.01
    warmup: float = 0.1  # share of the steps; a cosine to zero follows
    log_every: int = 10  # steps of which the mean training loss is a point of the curve
    eval_every: int = 100

    def tiny(self) -> Settings:
        """Two steps of a small model, to try the command."""
        return dataclasses.replace(
            self, depth=1, width=8, heads=2, batch=4, steps=2, log_every=1, eval_every=2
        )

    def optimizer(self) -> optax.GradientTransformation:
        """AdamW with a warm-up."""
        rate = optax.warmup_cosine_decay_schedule(
            0.0, self.learning_rate, max(1, int(self.warmup * self.steps)), self.steps
        )
        return optax.adamw(rate, weight_decay=self.weight_decay)


@dataclasses.dataclass(frozen=True)
class Task:
    """What to learn from which data, and how to measure it."""

    title: str
    metric: str
    higher_is_better: bool
    settings: Settings
    load: Callable[[], data.Data]
    model: Callable[..., nn.Module]
    draw: Callable[[Batch, jax.Array, jax.Array], Batch]  # arrays, examples, key
    inputs: Callable[[Batch], tuple[jax.Array, ...]]
    loss: Callable[[jax.Array, Batch], jax.Array]
    score: Callable[[jax.Array, Batch], jax.Array]  # logits: the metric, per example
    unit: str = ""
    approximate: bool = False  # means that no edit removes are left out
    window: int = 0  # characters that an example spans where the text is one long array
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    def build(self, settings: Settings, kind: Kind, classes: int) -> nn.Module:
        """The model with norms of this kind."""
        sizes = {"depth": settings.depth, "width": settings.width, "heads": settings.heads}
        return self.model(**sizes, classes=classes, kind=kind, **self.extra)

    def examples(self, arrays: data.Arrays) -> int:
        """How many examples to draw from."""
        (array, *_) = arrays.values()
        return len(array) - self.window


LENGTH = 64


def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def _take(arrays: Batch, index: jax.Array, key: jax.Array) -> Batch:
    del key
    return {name: x[index] for name, x in arrays.items()}


def noisy(arrays: Batch, index: jax.Array, key: jax.Array) -> Batch:
    """Images with noise, and labels."""
    batch = _take(arrays, index, key)
    x = batch["images"]
    return batch | {"images": x + NOISE * jax.random.normal(key, x.shape, x.dtype)}


def _windows(arrays: Batch, index: jax.Array, key: jax.Array) -> Batch:
    del key
    return {"text": arrays["text"][index[:, None] + jnp.arange(LENGTH + 1)]}


def class_loss(logits: jax.Array, batch: Batch) -> jax.Array:
    """The mean cross entropy."""
    return _cross_entropy(logits, batch["labels"]).mean()


def right(logits: jax.Array, batch: Batch) -> jax.Array:
    """100 where the class is the right one."""
    return 100.0 * (logits.argmax(-1) == batch["labels"])


def _text_loss(logits: jax.Array, batch: Batch) -> jax.Array:
    return _cross_entropy(logits, batch["text"][:, 1:]).mean()


def _bits(logits: jax.Array, batch: Batch) -> jax.Array:
    return _cross_entropy(logits, batch["text"][:, 1:]).mean(axis=1) / np.log(2)


def _word_loss(logits: jax.Array, batch: Batch) -> jax.Array:
    wanted = batch["target"][:, 1:]
    losses = _cross_entropy(logits, wanted)
    return jnp.where(wanted != data.PAD, losses, 0).sum() / (wanted != data.PAD).sum()


def _exact(logits: jax.Array, batch: Batch) -> jax.Array:
    """Whether greedy decoding gives the word.

    It does if and only if each letter is the likeliest one after the right letters before it.
    """
    wanted = batch["target"][:, 1:]
    return 100.0 * jnp.all((logits.argmax(-1) == wanted) | (wanted == data.PAD), axis=1)


TASKS = {
    "images": Task(
        title="Images: scikit-learn's digits, ViT",
        metric="accuracy",
        unit="%",
        higher_is_better=True,
        settings=Settings(depth=4, width=48, heads=4, batch=64, steps=900, learning_rate=3e-3),
        load=data.digits,
        model=models.ViT,
        draw=noisy,
        inputs=lambda batch: (batch["images"],),
        loss=class_loss,
        score=right,
    ),
    "language": Task(
        title="Language model: characters of Python's library, GPT",
        metric="bits per character",
        higher_is_better=False,
        settings=Settings(depth=3, width=64, heads=4, batch=16, steps=900, learning_rate=3e-3),
        load=partial(data.characters, LENGTH),
        model=models.GPT,
        draw=_windows,
        inputs=lambda batch: (batch["text"][:, :-1],),
        loss=_text_loss,
        score=_bits,
        window=LENGTH,
    ),
    "translation": Task(
        title="Sequence to sequence: words backwards, encoder and decoder",
        metric="exact match",
        unit="%",
        higher_is_better=True,
        settings=Settings(depth=2, width=48, heads=4, batch=64, steps=450, learning_rate=3e-3),
        load=data.words,
        model=models.Translator,
        draw=_take,
        inputs=lambda batch: (batch["source"], batch["target"][:, :-1]),
        loss=_word_loss,
        score=_exact,
    ),
    "text": Task(
        title="Text classification: area of the library of a line, encoder",
        metric="accuracy",
        unit="%",
        higher_is_better=True,
        settings=Settings(depth=3, width=48, heads=4, batch=64, steps=900, learning_rate=3e-3),
        load=data.lines,
        model=models.Classifier,
        draw=_take,
        inputs=lambda batch: (batch["text"],),
        loss=class_loss,
        score=right,
        extra={"vocabulary": data.BUCKETS},
    ),
}
