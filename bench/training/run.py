"""Trains one task in one variant from one seed."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jax_lnfold

from .data import Data
from .models import Kind
from .tasks import Settings, Task

PyTree: TypeAlias = Any
Dtype: TypeAlias = Literal["float32", "float64"]

# Which norms the model is made with; one is folded.
VARIANTS: dict[str, Kind] = {
    "layernorm": "layernorm",
    "cbwc_rmsnorm": "layernorm",
    "rmsnorm": "rmsnorm",
    "none": "none",
}
FOLDED = "cbwc_rmsnorm"
EVAL_BATCH = 128
DIGITS = {"float32": 7, "float64": 15}  # significant ones, that are kept
# Of initial values, which are computed once.
FAST_TO_COMPILE = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


class Norms(NamedTuple):
    """LayerNorms of the model, and what became of them."""

    layernorms: int
    folded: int
    inserted: int


@dataclasses.dataclass(frozen=True)
class Program:
    """A variant of a task: where it starts and one step of its training."""

    task: Task
    settings: Settings
    data: Data
    variant: str
    shapes: PyTree  # of the parameters
    init: Callable[[int], PyTree]  # parameters of a seed
    center: Callable[[PyTree], PyTree]
    apply: Callable[..., jax.Array]
    optimizer: optax.GradientTransformation
    norms: Norms

    def step(
        self, arrays: PyTree, key: jax.Array, carry: PyTree, drawn: tuple[jax.Array, jax.Array]
    ) -> tuple[PyTree, jax.Array]:
        """One step with the examples `drawn` (their numbers, and the number of the step)."""
        params, state = carry
        loss, gradients = self.gradient(arrays, key, params, drawn)
        updates, state = self.optimizer.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), loss

    def gradient(
        self, arrays: PyTree, key: jax.Array, params: PyTree, drawn: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, PyTree]:
        """Loss and gradients, as of `step`."""
        index, number = drawn
        batch = self.task.draw(arrays, index, jax.random.fold_in(key, number))

        def loss_fn(params: PyTree) -> jax.Array:
            return self.task.loss(self.apply(params, *self.task.inputs(batch)), batch)

        return jax.value_and_grad(loss_fn)(params)

    def scan(
        self, arrays: PyTree, key: jax.Array, carry: PyTree, drawn: tuple[jax.Array, jax.Array]
    ) -> tuple[PyTree, jax.Array]:
        """Steps one after the other, and their mean loss."""
        carry, losses = jax.lax.scan(lambda c, d: self.step(arrays, key, c, d), carry, drawn)
        return carry, losses.mean()

    def evaluate(self, params: PyTree, arrays: PyTree) -> tuple[jax.Array, jax.Array]:
        """Loss and metric on the held-out examples."""
        n = len(next(iter(arrays.values())))
        size = min(n, EVAL_BATCH)
        full = n // size * size
        parts = {k: x[:full].reshape(-1, size, *x.shape[1:]) for k, x in arrays.items()}

        def measure(batch: PyTree) -> jax.Array:
            logits = self.apply(params, *self.task.inputs(batch))
            score = self.task.score(logits, batch).mean()
            return jnp.stack([self.task.loss(logits, batch), score])

        means = jax.lax.map(measure, parts).mean(axis=0)
        if full < n:
            rest = measure({k: x[full:] for k, x in arrays.items()})
            means = (full * means + (n - full) * rest) / n
        return means[0], means[1]


def program(task: Task, settings: Settings, data: Data, variant: str) -> Program:
    """The variant's program; all LayerNorms of the folded one must be RMSNorms."""
    with jax.enable_x64(False):
        return _program(task, settings, data, variant)


def _program(task: Task, settings: Settings, data: Data, variant: str) -> Program:
    model = task.build(settings, VARIANTS[variant], data.classes)
    example = task.inputs(
        task.draw(
            {k: v[:256] for k, v in data.train.items()},
            jnp.arange(settings.batch),
            jax.random.key(0),
        )
    )
    initial = jax.jit(model.init, compiler_options=FAST_TO_COMPILE)

    def init(seed: int) -> PyTree:
        return initial(jax.random.key(seed), *example)

    optimizer = settings.optimizer()
    shapes = jax.eval_shape(model.init, jax.random.key(0), *example)
    if variant != FOLDED:
        report = jax_lnfold.analyze(model.apply, shapes, *example)
        norms = Norms(len(report.norms), 0, 0)
        return Program(
            task, settings, data, variant, shapes, init, lambda p: p, model.apply, optimizer, norms
        )
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)  # plans need no weights
    options: Any = {"approximate": {"mean"}, "budget": math.inf} if task.approximate else {}
    folded = jax_lnfold.fold(model.apply, zeros, *example, **options)
    plan, report = folded.plan, folded.report
    without = sum(norm.folded or norm.dropped for norm in report.norms)
    norms = Norms(len(report.norms), without, report.n_inserted)
    assert norms.layernorms == norms.folded > 0, str(report)
    assert task.approximate or norms.inserted == 0, str(report)
    optimizer = optax.chain(
        jax_lnfold.center_gradients(plan), optimizer, jax_lnfold.center_updates(plan)
    )
    return Program(
        task, settings, data, variant, shapes, init, plan.center, folded.apply, optimizer, norms
    )


@dataclasses.dataclass
class Trainer:
    """A program, compiled once for all seeds."""

    program: Program
    dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        """Moves the data and compiles nothing yet."""
        self.train = {k: jnp.asarray(v) for k, v in self.program.data.train.items()}
        self._test = {k: jnp.asarray(v) for k, v in self.program.data.test.items()}
        self._advance: Any = None
        self._evaluate: Any = None

    def __call__(self, seed: int, tick: Callable[[int], None] = lambda _: None) -> dict[str, Any]:
        """Trains from a seed; `tick` is told the steps done."""
        with jax.enable_x64(self.dtype == "float64"):
            return self._run(seed, tick)

    def start(self, seed: int) -> tuple[PyTree, jax.Array]:
        """Parameters and state of the optimiser, and a key."""
        with jax.enable_x64(False):
            params, key = self.program.init(seed), jax.random.key(seed)
        params = jax.tree.map(lambda p: jnp.asarray(np.asarray(p), self.dtype), params)
        params = self.program.center(params)
        return (params, self.program.optimizer.init(params)), key

    def _compile(self, *args: Any) -> None:
        self._advance = jax.jit(self.program.scan, donate_argnums=2).lower(*args).compile()
        self._evaluate = jax.jit(self.program.evaluate)
        jax.block_until_ready(self._evaluate(args[2][0], self._test))

    def _run(self, seed: int, tick: Callable[[int], None]) -> dict[str, Any]:
        settings = self.program.settings
        carry, key = self.start(seed)
        calls = list(self.drawn(seed))
        if self._advance is None:
            self._compile(self.train, key, carry, calls[0])
        losses, times = [], []
        evals: dict[str, list[Any]] = {"steps": [], "loss": [], "metric": []}
        began = time.perf_counter()
        for i, drawn in enumerate(calls, 1):
            at = time.perf_counter()
            carry, loss = self._advance(self.train, key, carry, drawn)
            assert loss.dtype == self.dtype
            losses.append(float(loss))
            times.append((time.perf_counter() - at) / settings.log_every)
            done = i * settings.log_every
            if done % settings.eval_every == 0 or i == len(calls):
                loss, metric = self._evaluate(carry[0], self._test)
                for name, value in (("steps", done), ("loss", loss), ("metric", metric)):
                    evals[name].append(rounded(value, self.dtype))
            tick(done)
        states = [s for s in carry[1] if isinstance(s, jax_lnfold.CenterState)]
        return {
            "final": evals["metric"][-1],
            "diverged": not all(map(math.isfinite, losses)),
            "drift": rounded(states[0].drift) if states else None,
            "seconds_per_step": rounded(np.median(times)),
            "seconds": rounded(time.perf_counter() - began),
            "train_loss": [rounded(x, self.dtype) for x in losses],
            "eval": evals,
        }

    def drawn(self, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Examples of the steps of each call; the same for all variants."""
        settings = self.program.settings
        rng = np.random.default_rng(seed)
        n = self.program.task.examples(self.program.data.train)
        for start in range(0, settings.steps, settings.log_every):
            index = rng.integers(n, size=(settings.log_every, settings.batch), dtype=np.int32)
            yield index, np.arange(start, start + settings.log_every, dtype=np.int32)


def rounded(x: Any, dtype: Dtype = "float32") -> int | float | None:
    """A few digits; nothing for what is not finite, which JSON cannot say."""
    if isinstance(x, int):
        return x
    return float(f"{float(x):.{DIGITS[dtype]}g}") if math.isfinite(float(x)) else None
