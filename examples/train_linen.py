"""Train a Flax linen model whose LayerNorms are RMSNorms from the first step on.

``python examples/train_linen.py`` learns digits; ``--reparameterised`` shows the other form.
"""

import sys

import jax
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits

import jax_lnfold


class Net(nn.Module):
    """A residual network with LayerNorms."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """From images ``[batch, 64]`` to logits ``[batch, 10]``."""
        x = nn.Dense(96)(x)
        for _ in range(3):
            x = x + nn.Dense(96)(nn.gelu(nn.Dense(192)(nn.LayerNorm()(x))))
        return nn.Dense(10)(nn.LayerNorm()(x))


def main(reparameterised: bool = False, steps: int = 300) -> float:
    """Train and return the accuracy on the last 360 digits."""
    x, y = load_digits(return_X_y=True)
    x = np.float32(x / 16)
    model = Net()
    folded = jax_lnfold.fold(model.apply, model.init(jax.random.key(0), x[:1]), x[:1])
    plan, adam = folded.plan, optax.adamw(2e-3)
    center, tx = plan.center, adam  # the parameters move freely, the model sees them centered
    if not reparameterised:  # the parameters stay centered
        first, last = jax_lnfold.center_gradients(plan), jax_lnfold.center_updates(plan)
        center, tx = lambda params: params, optax.chain(first, adam, last)
    state = TrainState.create(apply_fn=folded.apply, params=folded.params, tx=tx)

    @jax.jit
    def step(state: TrainState, x: jax.Array, y: jax.Array) -> TrainState:
        def loss(params: dict) -> jax.Array:
            logits = state.apply_fn(center(params), x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    for batch in np.random.default_rng(0).integers(0, len(x) - 360, (steps, 64)):
        state = step(state, x[batch], y[batch])
    params = center(state.params)  # a checkpoint for the LayerNorm model as well:
    np.testing.assert_allclose(model.apply(params, x), folded.apply(params, x), atol=1e-2)
    return float((model.apply(params, x[-360:]).argmax(-1) == y[-360:]).mean())


if __name__ == "__main__":
    print(f"accuracy {main('--reparameterised' in sys.argv):.1%}")
