"""Take the means out of a post-LN encoder that cannot lose them exactly, then repair the rest.

Run with ``python examples/repair_post_ln.py``; it takes a few minutes on two CPU cores and
downloads nothing. A post-LN encoder learns scikit-learn's digits. Its LayerNorms keep a mean,
because the scale of the LayerNorm before is not the same for all features. All means are left out
anyway: naively, that is from the weights as they are, and by ``fold(..., approximate={"mean"})``,
which centers and fits what feeds the LayerNorms first. Then both are trained for some steps to say
what the LayerNorms said (distillation), the folded one under the constraint of `center_updates`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import jax_lnfold

PyTree: TypeAlias = Any
Apply: TypeAlias = Callable[[PyTree, jax.Array], jax.Array]
Split: TypeAlias = tuple[np.ndarray, np.ndarray]

BATCH_SIZE = 64
LEARNING_RATE = 3e-3
REPAIR_RATE = 1e-2  # of plain gradient descent: steps of Adam would be as long where all is well
NOISE = 0.4  # Pixels span [-1, 1].
ROWS = ("LayerNorm", "means left out", "  repaired", "folded", "  repaired ")


class Block(nn.Module):
    """A post-LN transformer block: a LayerNorm behind each sum."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps tokens of shape ``[batch, tokens, width]`` to the same shape."""
        x = nn.LayerNorm()(x + nn.MultiHeadDotProductAttention(self.heads)(x))
        hidden = nn.gelu(nn.Dense(4 * x.shape[-1])(x))
        return nn.LayerNorm()(x + nn.Dense(x.shape[-1])(hidden))


class Encoder(nn.Module):
    """An encoder as BERT's, which classifies images by the mean of its tokens."""

    depth: int = 3
    width: int = 48
    heads: int = 4

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images of shape ``[batch, height, width, channels]`` to logits."""
        x = nn.Conv(self.width, kernel_size=(2, 2), strides=(2, 2))(images)
        x = x.reshape(len(images), -1, self.width)
        x = x + self.param("positions", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        x = nn.LayerNorm()(x)
        for _ in range(self.depth):
            x = Block(self.heads)(x)
        return nn.Dense(10)(x.mean(axis=1))


def load_data(seed: int) -> tuple[Split, Split]:
    """Images of shape ``[n, 8, 8, 1]`` in [-1, 1] and labels, 80 % to train on, 20 % to test."""
    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8, 1) / 8 - 1).astype(np.float32)
    found = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=seed)
    return (found[0], found[2]), (found[1], found[3])


def batches(data: Split, steps: int, seed: int) -> Iterator[Split]:
    """Images with noise, and labels, drawn anew for each step."""
    images, labels = data
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        at = rng.choice(len(labels), BATCH_SIZE, replace=False)
        noise = rng.normal(size=images[at].shape).astype(np.float32)
        yield images[at] + np.float32(NOISE) * noise, labels[at]


def train(
    params: PyTree,
    optimizer: optax.GradientTransformation,
    loss: Callable[[PyTree, jax.Array, jax.Array], jax.Array],
    data: Iterator[Split],
    steps: int,
    title: str,
) -> PyTree:
    """Parameters after some steps."""
    state = optimizer.init(params)

    @jax.jit
    def step(params: PyTree, state: PyTree, *batch: jax.Array) -> tuple[PyTree, PyTree]:
        updates, state = optimizer.update(jax.grad(loss)(params, *batch), state, params)
        return optax.apply_updates(params, updates), state

    # `disable=None` shows the bar on a terminal only, not in logs and pipes.
    for batch in tqdm(data, total=steps, desc=title, unit="step", leave=False, disable=None):
        params, state = step(params, state, *batch)
    return params


def repaired(
    apply: Apply,
    params: PyTree,
    teacher: Callable[[jax.Array], jax.Array],
    data: Split,
    steps: int,
    seed: int,
    *constraint: optax.GradientTransformation,
) -> PyTree:
    """Parameters whose logits are nearer to the teacher's, by some steps of distillation."""

    def loss(params: PyTree, images: jax.Array, labels: jax.Array) -> jax.Array:
        del labels
        return jnp.square(apply(params, images) - teacher(images)).mean()

    rate = optax.cosine_decay_schedule(REPAIR_RATE, steps)
    optimizer = optax.chain(optax.sgd(rate, momentum=0.9), *constraint)
    return train(params, optimizer, loss, batches(data, steps, seed), steps, "repair")


def figures(apply: Apply, params: PyTree, want: jax.Array, test: Split) -> list[float]:
    """Accuracy in per cent; error of the logits, relative, and KL from those of LayerNorms."""
    got = jax.jit(apply)(params, test[0])
    p, q = jax.nn.log_softmax(want), jax.nn.log_softmax(got)
    return [
        100 * float(np.mean(np.argmax(got, axis=-1) == test[1])),
        float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want)),
        max(0.0, float((jnp.exp(p) * (p - q)).sum(-1).mean())),
    ]


def run(model: nn.Module, seed: int, steps: int, repair: int) -> tuple[np.ndarray, Any]:
    """The figures of a seed, a line for each of `ROWS`, and the report of the fold."""
    data, test = load_data(seed)

    def loss(params: PyTree, images: jax.Array, labels: jax.Array) -> jax.Array:
        logits = model.apply(params, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    params = jax.jit(model.init)(jax.random.key(seed), data[0][:1])
    rate = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, max(1, steps // 10), steps)
    optimizer = optax.adamw(rate)
    params = train(params, optimizer, loss, batches(data, steps, seed), steps, f"seed {seed}")

    # Images of the training set, one batch in five of which the error is measured on.
    calibrate = [images for images, _ in batches(data, 10, seed + 1)]
    folded = jax_lnfold.fold(
        model.apply,
        params,
        approximate={"mean"},
        calibrate=calibrate,
        budget=math.inf,  # all means, whatever that does: it is repaired
        logits=lambda logits: logits,
    )

    def teacher(images: jax.Array) -> jax.Array:
        return model.apply(params, images)

    kept = jax_lnfold.center_updates(folded.plan)
    distil = (teacher, data, repair, seed + 2)
    found: list[tuple[Any, PyTree]] = [
        (model.apply, params),
        (folded.apply, params),  # as trained: neither centered nor fitted
        (folded.apply, repaired(folded.apply, params, *distil)),
        (folded.apply, folded.params),
        (folded.apply, repaired(folded.apply, folded.params, *distil, kept)),
    ]
    want = jax.jit(model.apply)(params, test[0])
    return np.array([figures(*each, want, test) for each in found]), folded.report


def table(found: np.ndarray) -> str:
    """Means and standard deviations over the seeds, of an array ``[seeds, rows, figures]``."""
    lines = [f"{'':16}{'accuracy, %':>18}{'error of logits':>22}{'KL divergence':>22}"]
    several = len(found) > 1
    mean = found.mean(axis=0)
    std = found.std(axis=0, ddof=1) if several else np.zeros_like(mean)
    for row, m, s in zip(ROWS, mean, std, strict=True):
        cells = [f"{m[0]:.2f} ± {s[0]:.2f}", *(f"{m[k]:.1e} ± {s[k]:.0e}" for k in (1, 2))]
        lines.append(f"{row.rstrip():16}{cells[0]:>18}{cells[1]:>22}{cells[2]:>22}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, folds, repairs and prints a table."""
    parser = argparse.ArgumentParser(description="Fold a post-LN encoder approximately; repair it.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=800, help="of training")
    parser.add_argument("--repair", type=int, default=200, help="steps of distillation")
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--width", type=int, default=48)
    args = parser.parse_args(argv)

    model = Encoder(args.depth, args.width)
    found = []
    for seed in range(args.seeds):
        figures_of_seed, report = run(model, seed, args.steps, args.repair)
        if not seed:
            print(report, end="\n\n")
        found.append(figures_of_seed)
    print(f"Test images, mean and standard deviation of {args.seeds} seeds:\n")
    print(table(np.array(found)))


if __name__ == "__main__":
    main()
