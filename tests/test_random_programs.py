"""Random networks: whatever is wired together, a fold computes the same function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contracts import fold_checked
from flax import linen as nn

B, N, H, HEAD = 2, 5, 3, 4
D = H * HEAD

Params = dict[str, jax.Array]
Value = Any
Step = Callable[[Params, list[Value]], Value]


class Builder:
    """Draws steps that each append one array of shape (B, N, D) to the values so far."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.params: Params = {}
        self.steps: list[Step] = []
        makers = [getattr(self, name) for name in dir(self) if name.startswith("make_")]
        for _ in range(self.rng.integers(4, 14)):
            # Sums and linear layers are what streams are made of.
            favoured = [self.make_sum, self.make_linear, self.make_norm_block]
            pool = favoured if self.rng.random() < 0.5 else makers
            self.steps.append(pool[self.rng.integers(len(pool))](len(self.steps) + 1))
        self.head = self.param(D, 3)
        self.last = len(self.steps) - int(self.rng.integers(0, 2))
        self.leaks = [int(i) for i in self.rng.integers(0, len(self.steps) + 1, 3)]
        self.leaks = self.leaks if self.rng.random() < 0.2 else []

    def param(self, *shape: int, reuse: float = 0.15) -> str:
        same = [k for k, v in self.params.items() if v.shape == shape]
        if same and self.rng.random() < reuse:
            return same[self.rng.integers(len(same))]
        name = f"p{len(self.params)}"
        self.params[name] = jnp.asarray(self.rng.standard_normal(shape) / 2 + 0.1)
        return name

    def pick(self, n: int) -> int:
        """A value so far, later ones preferred."""
        return int(max(self.rng.integers(0, n, 2)))

    def norm(self, along: str = "features") -> Callable[[Value], Value]:
        kind = self.rng.integers(5)
        axis = {"features": -1, "tokens": 1, "both": (1, 2)}[along]

        def apply(v: Value) -> Value:
            mean = v.mean(axis, keepdims=True)
            if kind == 0:
                return (v - mean) / jnp.sqrt(v.var(axis, keepdims=True) + 0.1)
            if kind == 1:
                second = jnp.mean(v * v, axis, keepdims=True) - mean**2
                return (v - mean) * jax.lax.rsqrt(second + 0.1)
            if kind == 2:
                return nn.standardize(v, axis=axis, epsilon=0.1)
            if kind == 3:
                a = jax.lax.rsqrt(jnp.var(v, axis, keepdims=True) + 0.1)
                return v * a - mean * a
            return v * jax.lax.rsqrt(jnp.mean(v * v, axis, keepdims=True) + 0.1)  # RMSNorm

        return apply

    def make_sum(self, n: int) -> Step:
        i, j, sign = self.pick(n), self.pick(n), self.rng.choice([1.0, -1.0, 0.5])
        return lambda p, v: v[i] + sign * v[j]

    def make_linear(self, n: int) -> Step:
        i, w, b = self.pick(n), self.param(D, D), self.param(D)
        return lambda p, v: v[i] @ p[w] + p[b]

    def make_norm_block(self, n: int) -> Step:
        i, w, norm = self.pick(n), self.param(D, D), self.norm()
        return lambda p, v: v[i] + norm(v[i]) @ p[w]

    def make_norm(self, n: int) -> Step:
        i, g = self.pick(n), self.param(D)
        norm = self.norm(str(self.rng.choice(["features", "features", "tokens", "both"])))
        affine = self.rng.random() < 0.5
        return lambda p, v: norm(v[i]) * p[g] if affine else norm(v[i])

    def make_head_norm(self, n: int) -> Step:
        i, norm, joint = self.pick(n), self.norm(), self.rng.random() < 0.3

        def step(p: Params, v: list[Value]) -> Value:
            heads = v[i].reshape(B, N, H, HEAD)
            heads = heads.transpose(0, 1, 3, 2) if joint else heads
            return norm(heads).reshape(B, N, D)

        return step

    def make_fused(self, n: int) -> Step:
        i, w, norm = self.pick(n), self.param(D, 3 * D), self.norm()

        def step(p: Params, v: list[Value]) -> Value:
            q, k, u = jnp.split(v[i] @ p[w], 3, axis=-1)
            q, k = (norm(a.reshape(B, N, H, HEAD)) for a in (q, k))
            scores = jax.nn.softmax(jnp.einsum("bnhd,bmhd->bhnm", q, k), axis=-1)
            return jnp.einsum("bhnm,bmhd->bnhd", scores, u.reshape(B, N, H, HEAD)).reshape(B, N, D)

        return step

    def make_gate(self, n: int) -> Step:
        i, w = self.pick(n), self.param(D, int(self.rng.choice([1, H, D])))

        def step(p: Params, v: list[Value]) -> Value:
            gate = jax.nn.sigmoid(v[0] @ p[w])
            return v[i] * jnp.repeat(gate, D // gate.shape[-1], axis=-1)

        return step

    def make_layer_scale(self, n: int) -> Step:
        i, w, g = self.pick(n), self.param(D, D), self.param(D)
        return lambda p, v: v[i] + (v[i] @ p[w]) * p[g]

    def make_nonlinearity(self, n: int) -> Step:
        i = self.pick(n)
        f = [jax.nn.gelu, jnp.tanh, jax.nn.relu, jnp.abs][self.rng.integers(4)]
        return lambda p, v: f(v[i])

    def make_tokens(self, n: int) -> Step:
        i, kind = self.pick(n), self.rng.integers(8)
        table = self.param(1, N, D)

        def step(p: Params, v: list[Value]) -> Value:
            x = v[i]
            moved = {
                0: lambda: jnp.roll(x, 2, axis=1),
                1: lambda: jnp.concatenate([x[:, :1], jnp.flip(x[:, 1:], 1)], axis=1),
                2: lambda: jnp.broadcast_to(x.mean(1, keepdims=True), x.shape),
                3: lambda: jnp.cumsum(x, axis=1),
                4: lambda: x + p[table],
                5: lambda: jnp.pad(x, ((0, 0), (2, 0), (0, 0)))[:, :N],
                6: lambda: x.at[:, 0].set(p[table][:, 1]),
                7: lambda: jnp.where(v[0][..., :1] > 0, x, p[table]),
            }
            return moved[int(kind)]()

        return step

    def make_features(self, n: int) -> Step:
        i, kind = self.pick(n), self.rng.integers(7)

        def step(p: Params, v: list[Value]) -> Value:
            x = v[i]
            moved = {
                0: lambda: jnp.roll(x, HEAD, axis=-1),
                1: lambda: jnp.flip(x, -1),
                2: lambda: x.reshape(B, N, H, HEAD).swapaxes(2, 3).reshape(B, N, D),
                3: lambda: jnp.concatenate([x[..., :HEAD], x[..., :-HEAD]], axis=-1),
                4: lambda: x - x.max(-1, keepdims=True),
                5: lambda: jax.nn.softmax(x, axis=-1),
                6: lambda: jnp.cumsum(x, axis=-1),
            }
            return moved[int(kind)]()

        return step

    def make_merge(self, n: int) -> Step:
        """Two tokens side by side, normalised together (patch merging)."""
        i, w, norm = self.pick(n), self.param(2 * D, D), self.norm()

        def step(p: Params, v: list[Value]) -> Value:
            pairs = jnp.concatenate([v[i], jnp.roll(v[i], 1, axis=1)], axis=-1)
            return norm(pairs) @ p[w]

        return step

    def make_convolution(self, n: int) -> Step:
        i, groups = self.pick(n), int(self.rng.choice([1, H, D]))
        kernel = self.param(3, D // groups, D)

        def step(p: Params, v: list[Value]) -> Value:
            return jax.lax.conv_general_dilated(
                v[i],
                p[kernel],
                (1,),
                "SAME",
                dimension_numbers=("NWC", "WIO", "NWC"),
                feature_group_count=groups,
            )

        return step

    def make_token_mix(self, n: int) -> Step:
        i, w, b = self.pick(n), self.param(N, N), self.param(N)
        return lambda p, v: (v[i].swapaxes(1, 2) @ p[w] + p[b]).swapaxes(1, 2)

    def make_loop(self, n: int) -> Step:
        """A stream through stacked layers, with a second carry that may read it."""
        i, j, kind = self.pick(n), self.pick(n), int(self.rng.integers(5))
        w, norm = self.param(3, D, D), self.norm()

        def body(carry: Any, layer: Value) -> Any:
            s, other = carry
            new = s + norm(s) @ layer
            if kind == 1:
                return (new, other + s), None
            if kind == 2:
                return (new @ layer, jnp.tanh(other)), new
            if kind == 3:
                return (other + norm(s) @ layer, s), other
            if kind == 4:
                return (jax.lax.cond(layer[0, 0] > 0, jnp.tanh, lambda v: v, new), s), None
            return (new, other), new

        def step(p: Params, v: list[Value]) -> Value:
            (s, other), rows = jax.lax.scan(body, (v[i], v[j]), p[w], reverse=kind == 0)
            return s + other if rows is None or kind == 3 else rows.sum(0)

        return step

    def make_branch(self, n: int) -> Step:
        i, w, kind = self.pick(n), self.param(D, D), int(self.rng.integers(3))

        def step(p: Params, v: list[Value]) -> Value:
            other = [lambda s: s @ p[w], lambda s: s + 0.5 * s, jnp.tanh][kind]
            return jax.lax.cond(v[0].sum() > 0, other, lambda s: jnp.flip(s, 1), v[i])

        return step

    def apply(self, params: Params, x: jax.Array) -> Any:
        values: list[Value] = [x]
        for step in self.steps:
            values.append(step(params, values))
        stream = values[self.last]
        final = (stream - stream.mean(-1, keepdims=True)) / (stream.std(-1, keepdims=True) + 0.1)
        # The constant gives the outputs a scale: a norm of a constant stream is all rounding.
        return 1 + final @ params[self.head], [values[i] for i in self.leaks]


def check(seed: int) -> tuple[int, int, int]:
    """Fold one random program; LayerNorms found, folded, and centerings inserted."""
    program = Builder(seed)
    x = jnp.asarray(np.random.default_rng(seed).standard_normal((B, N, D)))
    report = fold_checked(program.apply, program.params, x, rtol=1e-9).report
    return len(report.norms), report.n_folded, report.n_inserted


@pytest.mark.parametrize("seed", range(60))
def test_random_program(seed: int) -> None:
    norms, folded, inserted = check(seed)
    assert norms >= 1
    assert folded <= norms
    assert inserted <= folded


@pytest.mark.slow
def test_many_random_programs() -> None:
    counts = np.sum([check(seed) for seed in range(1000, 3000)], axis=0)
    norms, folded, _ = counts
    assert 0.2 < folded / norms < 0.95, "the programs should have something to find and to refuse"
