"""One of two processes that fold, check, train and save one model together; `test_processes` starts
both with the address, the number of this one, and an empty folder.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jax_lnfold


def start(address: str, number: int) -> None:
    """Four devices here, four there."""
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, 2, number)
    assert len(jax.devices()) == 8
    assert len(jax.local_devices()) == 4


def over_devices(*axes: str) -> NamedSharding:
    """On all devices of both processes: the first axis cut, or whole copies."""
    mesh = jax.make_mesh((8,), ("m",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec(*axes))


class Model(nn.Module):
    """A stream of width 16, with two blocks."""

    dropped: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        h = nn.Dense(16)(x)
        for _ in range(2):
            y = nn.Dense(16)(nn.relu(nn.Dense(24)(nn.LayerNorm()(h))))
            h = h + nn.Dropout(self.dropped, deterministic=not self.dropped)(y)
        y = nn.Dense(8)(nn.LayerNorm()(h))
        return jax.lax.with_sharding_constraint(y, over_devices("m"))


def spread(x: Any) -> jax.Array:
    """The array over the devices of both processes, along its first axis where that can be cut."""
    host = np.asarray(x)
    even = host.ndim and host.shape[0] % 8 == 0
    sharding = over_devices("m") if even else over_devices()
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def whole(tree: Any) -> Any:
    """The values of a tree of arrays, all of them in each process."""
    return multihost_utils.process_allgather(tree, tiled=True)


def gap(a: Any, b: Any) -> float:
    """The largest difference of two trees."""
    gaps = jax.tree.map(lambda x, y: np.max(np.abs(x - y), initial=0), whole(a), whole(b))
    return max(jax.tree.leaves(gaps))


@partial(jax.jit, static_argnums=1)
def cast(tree: Any, dtype: Any) -> Any:
    """The tree in another dtype."""
    return jax.tree.map(lambda x: x.astype(dtype), tree)


def model() -> tuple[Callable[..., Any], Any, jax.Array]:
    """The function, its parameters and an input, the same in both processes."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, 16))
    shapes = jax.eval_shape(Model().init, jax.random.key(1), x)
    host = jax.tree.map(lambda s: 0.5 * rng.normal(size=s.shape), shapes)
    return Model().apply, jax.tree.map(spread, host), spread(x)


def check_fold() -> jax_lnfold.Folded:
    """Nothing is gathered; report and analysis are those of one process."""
    fn, params, x = model()
    folded = jax_lnfold.fold(fn, params, x)
    assert folded.report.n_folded == 3
    assert "3 of 3 LayerNorms folded" in str(folded.report), str(folded.report)
    assert jax_lnfold.analyze(fn, params, x).n_folded == 3
    for old, new in zip(*map(jax.tree.leaves, (params, folded.params)), strict=True):
        assert new.sharding == old.sharding
    assert not folded.params["params"]["Dense_0"]["kernel"].is_fully_addressable
    want = jax.jit(fn)(params, x)
    assert gap(jax.jit(folded.apply)(folded.params, x), want) < 1e-12
    assert gap(jax.jit(fn)(folded.params, x), want) < 1e-12
    return folded


def check_plan(folded: jax_lnfold.Folded) -> None:
    """Centering, and giving up what is centered."""
    fn, params, x = model()
    assert gap(folded.plan.center(params), folded.params) == 0
    given = jax_lnfold.fold(fn, params, x, donate=True)
    assert gap(given.params, folded.params) < 1e-15
    assert params["params"]["Dense_0"]["kernel"].is_deleted()


def check_training(folded: jax_lnfold.Folded) -> None:
    """One step under the constraint is a step of the original."""
    fn, _, x = model()
    tx = optax.chain(optax.sgd(0.1), jax_lnfold.center_updates(folded.plan))
    state = jax.jit(tx.init)(folded.params)

    @jax.jit
    def step(params: Any, state: Any, x: jax.Array) -> tuple[Any, Any]:
        grads = jax.grad(lambda p: jnp.square(folded.apply(p, x)).mean())(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    trained, state = step(folded.params, state, x)
    assert gap(trained, folded.params) > 1e-4
    check = jax_lnfold.verify(fn, trained, folded, x, edited=trained)
    assert check.drift <= 1
    assert check.difference < 1e-12, str(check)


def check_verify(folded: jax_lnfold.Folded) -> None:
    """Both processes know the largest of all errors."""
    fn, params, x = model()
    params, x, edited = cast((params, x, folded.params), jnp.float32)
    check = jax_lnfold.verify(fn, params, folded, x, edited=edited)
    assert check.drift <= 1
    assert check.not_widened == ()
    true = gap(jax.jit(fn)(params, x), jax.jit(fn)(*cast((params, x), jnp.float64)))
    np.testing.assert_allclose(check.original_error, true, rtol=1e-3)
    assert 0 < check.folded_error < 1e-5 * check.scale


def check_measure(folded: jax_lnfold.Folded) -> None:
    """Both processes know the means of all tokens."""
    fn, params, x = model()
    found = jax_lnfold.measure(folded, params, x, x)
    alone = jax_lnfold.measure(fn, *whole((params, x)))
    for norm, want in zip(found.norms, alone.norms, strict=True):
        assert norm.tokens == 16 == 2 * want.tokens
        np.testing.assert_allclose(norm.before.share, want.before.share, rtol=1e-9)
        np.testing.assert_allclose(norm.before.maximum, want.before.maximum, rtol=1e-9)
        assert want.before.share > 1e-3
        assert norm.after.maximum < 1e-26


def check_dropout() -> None:
    """An approximate fold measures what it neglects."""
    _, params, x = model()

    def fn(params: Any, x: jax.Array, key: jax.Array) -> jax.Array:
        return Model(0.1).apply(params, x, rngs={"dropout": key})

    key = jax.random.key(3)
    folded = jax_lnfold.fold(fn, params, x, key, approximate={"dropout"})
    assert folded.report.dropouts == 2
    outputs = [jax.jit(f)(p, x, key) for f, p in ((fn, params), (folded.apply, folded.params))]
    true = gap(*outputs) / np.max(np.abs(whole(outputs[0])))
    np.testing.assert_allclose(folded.report.deviation, true, rtol=1e-9)
    assert folded.report.deviation > 1e-4


def check_checkpoint(folded: jax_lnfold.Folded, folder: Path) -> None:
    """Written by both processes; `test_processes` has it centered on the command line."""
    _, params, _ = model()
    with ocp.StandardCheckpointer() as saver:
        saver.save(folder / "source", params)
        saver.wait_until_finished()
    if jax.process_index() == 0:
        (folder / "plan.json").write_text(folded.plan.to_json())
    np.savez(folder / f"centered{jax.process_index()}.npz", *jax.tree.leaves(whole(folded.params)))


def main() -> None:
    """All checks, in the same order in both processes."""
    start(sys.argv[1], int(sys.argv[2]))
    folded = check_fold()
    check_plan(folded)
    check_training(folded)
    check_verify(folded)
    check_measure(folded)
    check_dropout()
    check_checkpoint(folded, Path(sys.argv[3]))
    print("all checked")


if __name__ == "__main__":
    main()
