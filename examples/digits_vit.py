"""Train a small Vision Transformer on scikit-learn's digits, then fold its LayerNorms.

Run with ``python examples/digits_vit.py``; it takes about a minute on two CPU cores and downloads
nothing. The model is an ordinary Flax ViT that knows nothing of folding: conv patch embedding,
class token, learned positions, L pre-LN blocks and a final LayerNorm. Every writer into its
residual stream is linear, so all 2L + 1 LayerNorms can become RMSNorms.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

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

BATCH_SIZE = 64
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.05
NOISE = 0.4  # Pixels span [-1, 1]. With so few images this is worth 2-3 % of test accuracy.
REQUIRED_ACCURACY = 0.95


class Block(nn.Module):
    """A pre-LN transformer block: attention, then an MLP, each on a residual branch."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps tokens of shape ``[batch, tokens, width]`` to the same shape."""
        x = x + nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x))
        hidden = nn.gelu(nn.Dense(4 * x.shape[-1])(nn.LayerNorm()(x)))
        return x + nn.Dense(x.shape[-1])(hidden)


class ViT(nn.Module):
    """A Vision Transformer that classifies by its class token."""

    depth: int = 4
    width: int = 64
    heads: int = 4
    patch: int = 2
    classes: int = 10

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images of shape ``[batch, height, width, channels]`` to logits."""
        patch = (self.patch, self.patch)
        x = nn.Conv(self.width, kernel_size=patch, strides=patch)(images)
        x = x.reshape(len(images), -1, self.width)
        init = nn.initializers.normal(0.02)
        cls = self.param("cls", init, (1, 1, self.width))
        x = jnp.concatenate([jnp.broadcast_to(cls, (len(images), 1, self.width)), x], axis=1)
        x = x + self.param("positions", init, (1, *x.shape[1:]))
        for _ in range(self.depth):
            x = Block(self.heads)(x)
        return nn.Dense(self.classes)(nn.LayerNorm()(x)[:, 0])


class Digits(NamedTuple):
    """Grey 8x8 images in [-1, 1], of shape ``[n, 8, 8, 1]``, and their labels."""

    images: np.ndarray
    labels: np.ndarray


class Comparison(NamedTuple):
    """What the original and the folded model predict for the same images."""

    accuracy: float
    folded_accuracy: float
    n_equal: int


def load_data(seed: int = 0) -> tuple[Digits, Digits]:
    """Splits the bundled digits, class by class, into 80 % to train on and 20 % to test with."""
    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8, 1) / 8 - 1).astype(np.float32)
    x_train, x_test, y_train, y_test = train_test_split(
        images, labels, test_size=0.2, stratify=labels, random_state=seed
    )
    return Digits(x_train, y_train), Digits(x_test, y_test)


def train(model: nn.Module, data: Digits, epochs: int, seed: int = 0) -> PyTree:
    """Trains ``model`` from scratch and returns its variables."""
    rng = np.random.default_rng(seed)
    init_key, noise_key = jax.random.split(jax.random.key(seed))
    steps_per_epoch = len(data.labels) // BATCH_SIZE
    steps = epochs * steps_per_epoch
    schedule = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, steps // 10, steps)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=WEIGHT_DECAY)
    )
    params = jax.jit(model.init)(init_key, data.images[:1])
    state = optimizer.init(params)

    def loss_fn(params: PyTree, images: jax.Array, labels: jax.Array) -> jax.Array:
        logits = model.apply(params, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @jax.jit
    def step(
        params: PyTree, state: PyTree, images: jax.Array, labels: jax.Array, key: jax.Array
    ) -> tuple[PyTree, PyTree, jax.Array]:
        images = images + NOISE * jax.random.normal(key, images.shape, images.dtype)
        loss, grads = jax.value_and_grad(loss_fn)(params, images, labels)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    # `disable=None` shows the bar on a terminal only, not in logs and pipes.
    with tqdm(total=steps, desc="training", unit="step", disable=None) as bar:
        for _ in range(epochs):
            order = rng.permutation(len(data.labels))[: steps_per_epoch * BATCH_SIZE]
            for batch in order.reshape(steps_per_epoch, BATCH_SIZE):
                noise_key, key = jax.random.split(noise_key)
                params, state, loss = step(
                    params, state, data.images[batch], data.labels[batch], key
                )
                bar.update()
            bar.set_postfix(loss=f"{loss:.3f}")
    return params


def compare(
    model: nn.Module, params: PyTree, folded: jax_lnfold.Folded, data: Digits
) -> Comparison:
    """Classifies ``data`` with the original and with the folded model."""
    original = np.argmax(jax.jit(model.apply)(params, data.images), axis=-1)
    after = np.argmax(jax.jit(folded.apply)(folded.params, data.images), axis=-1)
    return Comparison(
        accuracy=float(np.mean(original == data.labels)),
        folded_accuracy=float(np.mean(after == data.labels)),
        n_equal=int(np.sum(original == after)),
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Trains, folds and compares; exits with a message if a result is not as promised."""
    parser = argparse.ArgumentParser(description="Train a small ViT on digits and fold it.")
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0, help="of the split and of the training")
    args = parser.parse_args(argv)

    train_data, test_data = load_data(args.seed)
    model = ViT()
    params = train(model, train_data, args.epochs, args.seed)

    folded = jax_lnfold.fold(model.apply, params, test_data.images)
    print(folded.report)

    n = len(test_data.labels)
    result = compare(model, params, folded, test_data)
    print(f"\nTest accuracy: original {result.accuracy:.2%}, folded {result.folded_accuracy:.2%}.")
    print(f"Equal predictions: {result.n_equal} of {n}.")

    check = jax_lnfold.verify(model.apply, params, folded, test_data.images)
    print(
        f"Largest difference of the logits from float64: original {check.original_error:.1e}, "
        f"folded {check.folded_error:.1e}; from each other: {check.difference:.1e}."
    )

    if result.n_equal != n:
        sys.exit(f"error: folding changed {n - result.n_equal} of {n} predictions")
    if result.accuracy <= REQUIRED_ACCURACY:
        sys.exit(f"error: accuracy {result.accuracy:.2%} is not above {REQUIRED_ACCURACY:.0%}")


if __name__ == "__main__":
    main()
