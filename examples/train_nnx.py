"""Train a Flax NNX model whose LayerNorms are RMSNorms from the first step on.

``python examples/train_nnx.py`` learns digits; ``--reparameterised`` shows the other form.
"""

import sys

import jax
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import jax_lnfold


class Net(nnx.Module):
    """A residual network with LayerNorms: one block of width 96."""

    def __init__(self, rngs: nnx.Rngs) -> None:  # noqa: D107
        sizes = (64, 96), (96, 192), (192, 96), (96, 10)
        self.dense = nnx.List([nnx.Linear(*size, rngs=rngs) for size in sizes])
        self.norms = nnx.List([nnx.LayerNorm(96, rngs=rngs) for _ in range(2)])

    def __call__(self, x: jax.Array) -> jax.Array:  # noqa: D102
        x = self.dense[0](x)
        x = x + self.dense[2](nnx.gelu(self.dense[1](self.norms[0](x))))
        return self.dense[3](self.norms[1](x))


def main(reparameterised: bool = False, steps: int = 300) -> float:
    """Train and return the accuracy on the last 360 digits."""
    x, y = load_digits(return_X_y=True)
    graph, state = nnx.split(model := Net(nnx.Rngs(0)))
    folded = jax_lnfold.fold(lambda state, x: nnx.merge(graph, state)(x), state, x[:1])
    nnx.update(model, folded.params)
    center, tx = folded.plan.center, optax.adamw(2e-3)  # the model sees parameters centered
    if not reparameterised:  # the parameters stay centered
        first = jax_lnfold.center_gradients(folded.plan)
        last = jax_lnfold.center_updates(folded.plan)
        center, tx = lambda state: state, optax.chain(first, tx, last)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model: Net, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> None:
        def loss(model: Net) -> jax.Array:
            found = folded.apply(center(nnx.state(model)), x)
            return optax.softmax_cross_entropy_with_integer_labels(found, y).mean()

        optimizer.update(model, nnx.grad(loss)(model))

    for batch in np.random.default_rng(0).integers(0, len(x) - 360, (steps, 64)):
        step(model, optimizer, x[batch], y[batch])
    nnx.update(model, center(nnx.state(model)))  # the LayerNorm model computes the same:
    np.testing.assert_allclose(model(x), folded.apply(nnx.state(model), x), atol=1e-2)
    return float((model(x[-360:]).argmax(-1) == y[-360:]).mean())


if __name__ == "__main__":
    print(f"accuracy {main('--reparameterised' in sys.argv):.1%}")
