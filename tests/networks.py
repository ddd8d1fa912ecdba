"""Random networks for hypothesis: anything wired to anything, as real programs.

Every step appends one array of shape (B, N, D) to the values so far, so that all of them can be
combined; inside a step anything may happen. Choices are hypothesis's, so that a failure shrinks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from jax import lax

Array = Any  # NumPy arrays outside, tracers inside
Params = dict[str, Array]
Step = Callable[[Params, "Inputs", list[Array]], Array]
Draw = Callable[[st.SearchStrategy[Any]], Any]

SIZES = [(2, 5, 3, 4), (1, 4, 2, 5), (3, 2, 4, 3)]
"""Batch, tokens, heads, width of a head: few, so that compiled operations are reused."""
VOCABULARY = 7


class Inputs(NamedTuple):
    """What a network reads besides its parameters: tokens, their numbers, a dropout mask."""

    x: Array
    ids: Array
    mask: Array


@dataclass(frozen=True)
class Network:
    """A function of (params, x, ids, mask) with its parameters and inputs."""

    steps: tuple[Step, ...]
    params: Params
    inputs: Inputs
    last: int
    leaks: tuple[int, ...]
    tied: str | None
    digits: float
    """Relative precision to which results can be compared."""

    def apply(self, params: Params, x: Array, ids: Array, mask: Array) -> Any:
        inputs, values = Inputs(x, ids, mask), [x]
        for step in self.steps:
            values.append(step(params, inputs, values))
        stream = values[self.last]
        final = (stream - stream.mean(-1, keepdims=True)) / (stream.std(-1, keepdims=True) + 0.1)
        logits = final @ (params["head"] if self.tied is None else params[self.tied].T)
        # The constant gives the outputs a scale: a norm of a constant stream is all rounding.
        return 1 + logits, [values[i] for i in self.leaks]

    def __repr__(self) -> str:
        steps = [f"{i + 1}: {s.__name__}" for i, s in enumerate(self.steps)]
        return f"Network(x{self.inputs.x.shape}, {', '.join(steps)}, last={self.last})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """What hypothesis prints: no arrays."""
        printer.text(repr(self))


@st.composite
def networks(draw: Draw, least: int = 4, most: int = 13) -> Network:
    """Networks of `least` to `most` steps."""
    return Builder(draw).network(draw(st.integers(least, most)))


def examples(number: int, count: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test of hypothesis on `count` examples, the ones with this number."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        once = settings(
            max_examples=count,
            database=None,
            deadline=None,
            phases=[Phase.generate],  # to shrink a network takes minutes
            suppress_health_check=list(HealthCheck),
        )
        return seed(number)(once(test))

    return decorate


class Builder:
    def __init__(self, draw: Draw) -> None:
        self.draw = draw
        self.b, self.n, self.h, self.hd = self.one_of(SIZES)
        self.d = self.h * self.hd
        self.rng = np.random.default_rng(self.index(2**16))
        self.params: Params = {}
        self.digits = 1e-9

    def index(self, n: int) -> int:
        return self.draw(st.integers(0, n - 1))

    def one_of(self, options: Sequence[Any]) -> Any:
        return self.draw(st.sampled_from(options))

    def network(self, count: int) -> Network:
        makers = [getattr(self, name) for name in dir(type(self)) if name.startswith("make_")]
        # Sums and linear layers are what streams are made of.
        favoured = [self.make_sum, self.make_dense, self.make_block]
        steps = []
        for k in range(count):
            maker = self.one_of(favoured if self.index(2) else makers)
            step = maker(k + 1)
            step.__name__ = maker.__name__.removeprefix("make_")
            steps.append(self.wrapped(step))
        shape = (self.b, self.n, self.d)
        inputs = Inputs(
            self.array(*shape),
            self.rng.integers(0, VOCABULARY, shape[:2]),
            self.rng.random(shape) < 0.7,
        )
        self.params["head"] = self.array(self.d, 3)
        tables = [k for k, v in self.params.items() if v.shape == (VOCABULARY, self.d)]
        return Network(
            steps=tuple(steps),
            params=self.params,
            inputs=inputs,
            last=count - self.index(2),
            leaks=tuple(self.index(count + 1) for _ in range(max(0, self.index(9) - 6))),
            tied=self.one_of(tables) if tables and self.index(4) == 0 else None,
            digits=self.digits,
        )

    def wrapped(self, step: Step) -> Step:
        """The step as it is, or inside a call."""
        kind = self.one_of(["plain", "plain", "plain", "jit", "checkpoint"])
        if kind == "plain":
            return step
        call = {"jit": jax.jit, "checkpoint": jax.checkpoint}[kind]

        def inside(p: Params, inputs: Inputs, values: list[Array]) -> Array:
            return call(step)(p, inputs, values)

        inside.__name__ = f"{kind}({step.__name__})"
        return inside

    def array(self, *shape: int) -> np.ndarray:
        """A NumPy array: its edit needs no compilation."""
        return self.rng.standard_normal(shape) / 2 + 0.1

    def param(self, *shape: int) -> str:
        same = [k for k, v in self.params.items() if v.shape == shape]
        if same and self.index(6) == 0:
            return self.one_of(same)
        name = f"p{len(self.params)}"
        self.params[name] = self.array(*shape)
        return name

    def pick(self, n: int) -> int:
        """A value so far, later ones preferred."""
        return max(self.index(n), self.index(n))

    def norm(self, axis: int | tuple[int, ...] = -1) -> Callable[[Array], Array]:
        """A LayerNorm in some spelling, or something that only looks like one."""
        return partial(self.one_of(NORMS), axis=axis)

    # Streams.

    def make_sum(self, n: int) -> Step:
        i, j, sign = self.pick(n), self.pick(n), self.one_of([1.0, -1.0, 0.5])
        return lambda p, a, v: v[i] + sign * v[j]

    def make_dense(self, n: int) -> Step:
        i, w, b = self.pick(n), self.param(self.d, self.d), self.param(self.d)
        return lambda p, a, v: v[i] @ p[w] + p[b]

    def make_block(self, n: int) -> Step:
        i, w, norm = self.pick(n), self.param(self.d, self.d), self.norm()
        return lambda p, a, v: v[i] + norm(v[i]) @ p[w]

    def make_norm(self, n: int) -> Step:
        i, g, b = self.pick(n), self.param(self.d), self.param(self.d)
        norm = self.norm(self.one_of([-1, -1, -1, 1, (1, 2), 0]))
        kind = self.index(3)

        def step(p: Params, a: Inputs, v: list[Array]) -> Array:
            y = norm(v[i])
            return y if kind == 0 else y * p[g] if kind == 1 else y * (1 + p[g]) + p[b]

        return step

    def make_layer_scale(self, n: int) -> Step:
        i, w, g, b = self.pick(n), self.param(self.d, self.d), self.param(self.d), self.param(1)
        biased = self.index(2)
        return lambda p, a, v: v[i] + (v[i] @ p[w] + (p[b] if biased else 0)) * p[g]

    # Linear layers.

    def make_heads_out(self, n: int) -> Step:
        i, w = self.pick(n), self.param(self.h, self.hd, self.d)
        shape = (self.b, self.n, self.h, self.hd)
        return lambda p, a, v: jnp.einsum("bnhd,hde->bne", v[i].reshape(shape), p[w])

    def make_low_rank(self, n: int) -> Step:
        i, w, u = self.pick(n), self.param(self.d, 2), self.param(2, self.d)
        first = self.index(2)
        return lambda p, a, v: v[i] @ (p[w] @ p[u]) if first else (v[i] @ p[w]) @ p[u]

    def make_embedding(self, n: int) -> Step:
        table, kind = self.param(VOCABULARY, self.d), self.index(4)

        def step(p: Params, a: Inputs, v: list[Array]) -> Array:
            rows = [
                lambda: p[table][a.ids],
                lambda: jax.nn.one_hot(a.ids, VOCABULARY, dtype=p[table].dtype) @ p[table],
                lambda: jnp.take(p[table], a.ids, axis=0, mode="clip"),
                lambda: jnp.take(p[table], a.ids, axis=0, mode="fill", fill_value=0.0),
            ]
            return rows[kind]()

        return step

    def make_convolution(self, n: int) -> Step:
        i, groups, stride = self.pick(n), self.one_of([1, self.h, self.d]), self.one_of([1, 1, 2])
        kernel, tokens = self.param(3, self.d // groups, self.d), self.n

        def step(p: Params, a: Inputs, v: list[Array]) -> Array:
            y = lax.conv_general_dilated(
                v[i],
                p[kernel],
                (stride,),
                "SAME",
                dimension_numbers=("NWC", "WIO", "NWC"),
                feature_group_count=groups,
            )
            return y if stride == 1 else jnp.repeat(y, 2, axis=1)[:, :tokens]

        return step

    def make_token_mix(self, n: int) -> Step:
        i, w, b = self.pick(n), self.param(self.n, self.n), self.param(self.n)
        return lambda p, a, v: (v[i].swapaxes(1, 2) @ p[w] + p[b]).swapaxes(1, 2)

    def make_experts(self, n: int) -> Step:
        """One of two linear layers per token."""
        i, w, b = self.pick(n), self.param(2, self.d, self.d), self.param(2, self.d)

        def step(p: Params, a: Inputs, v: list[Array]) -> Array:
            chosen = jax.nn.one_hot(a.ids % 2, 2, dtype=p[w].dtype)
            each = jnp.einsum("bnd,kde->bnke", v[i], p[w]) + p[b]
            return jnp.einsum("bnke,bnk->bne", each, chosen)

        return step

    # Features split, merged, cut and joined.

    def make_head_norm(self, n: int) -> Step:
        i, norm, swap = self.pick(n), self.norm(self.one_of([-1, -1, (2, 3), 2])), self.index(3)
        shape, flat = (self.b, self.n, self.h, self.hd), (self.b, self.n, self.d)

        def step(p: Params, a: Inputs, v: list[Array]) -> Array:
            heads = v[i].reshape(shape)
            heads = heads.swapaxes(2, 3) if swap == 0 else heads
            return norm(heads).reshape(flat)

        return step

    def make_attention(self, n: int) -> Step:
        i, w, norm = self.pick(n), self.param(self.d, 3 * self.d), self.norm()
        normed, shape, joint = self.index(3), (self.b, self.n, self.h, self.hd), self.index(2)

        def step(p: Params, a: Inputs, v: list[Array]) -> Array:
            fused = v[i] @ p[w]
            if joint:
                q, k, u = (x.reshape(shape) for x in jnp.split(fused, 3, axis=-1))
            else:
                q, k, u = jnp.moveaxis(fused.reshape(*shape[:2], 3, *shape[2:]), 2, 0)
            q, k = (norm(q), norm(k)) if normed else (q, k)
            scores = jax.nn.softmax(jnp.einsum("bnhd,bmhd->bhnm", q, k), axis=-1)
            return jnp.einsum("bhnm,bmhd->bnhd", scores, u).reshape(*shape[:2], -1)

        return step

    def make_slices(self, n: int) -> Step:
        """Norms of parts of the features, possibly of overlapping ones."""
        i, w = self.pick(n), self.param(self.d, self.d)
        cut, overlap = 1 + self.index(self.d - 1), self.index(4) == 0
        one, two = self.norm(), self.norm()
        start = max(0, cut - 2) if overlap else cut

        def step(p: Params, a: Inputs, v: list[Array]) -> Array:
            y = v[i] @ p[w]
            left, right = one(y[..., :cut]), two(y[..., start:])
            return jnp.concatenate([left, right[..., cut - start :]], axis=-1)

        return step

    def make_merge(self, n: int) -> Step:
        """Two tokens side by side, normalised together (patch merging)."""
        i, j, w, norm = self.pick(n), self.pick(n), self.param(2 * self.d, self.d), self.norm()
        return lambda p, a, v: norm(jnp.concatenate([v[i], jnp.roll(v[j], 1, 1)], -1)) @ p[w]

    def make_features(self, n: int) -> Step:
        i, kind = self.pick(n), self.index(8)
        b, t, h, hd, d = self.b, self.n, self.h, self.hd, self.d

        def step(p: Params, a: Inputs, v: list[Array]) -> Array:
            x = v[i]
            moved = [
                lambda: jnp.roll(x, hd, axis=-1),
                lambda: jnp.flip(x, -1),
                lambda: x.reshape(b, t, h, hd).swapaxes(2, 3).reshape(b, t, d),
                lambda: jnp.concatenate([x[..., :hd], x[..., :-hd]], axis=-1),
                lambda: jnp.repeat(x[..., ::h], h, axis=-1)[..., :d],
                lambda: jnp.pad(x, ((0, 0), (0, 0), (2, 0)))[..., :d],
                lambda: x.reshape(b, d, t).swapaxes(1, 2),
                lambda: jnp.sort(x, axis=-1),
            ]
            return moved[kind]()

        return step

    def make_tokens(self, n: int) -> Step:
        i, kind, table = self.pick(n), self.index(10), self.param(1, self.n, self.d)
        tokens = self.n

        def step(p: Params, a: Inputs, v: list[Array]) -> Array:
            x, extra = v[i], jnp.broadcast_to(p[table], v[i].shape)
            moved = [
                lambda: jnp.roll(x, 2, axis=1),
                lambda: jnp.concatenate([x[:, :1], jnp.flip(x[:, 1:], 1)], axis=1),
                lambda: jnp.broadcast_to(x.mean(1, keepdims=True), x.shape),
                lambda: jnp.cumsum(x, axis=1),
                lambda: x + p[table],
                lambda: jnp.pad(x, ((0, 0), (2, 0), (0, 0)))[:, :tokens],
                lambda: x.at[:, 0].set(extra[:, 1]),
                lambda: jnp.concatenate([extra[:, :1], x], axis=1)[:, :tokens],
                lambda: lax.dynamic_update_slice(x, extra[:, :1], (0, a.ids[0, 0] % tokens, 0)),
                lambda: x.at[:, 1:].add(extra[:, 1:]),
            ]
            return moved[kind]()

        return step

    # Gates, masks, nonlinearities, reductions.

    def make_gate(self, n: int) -> Step:
        i, w = self.pick(n), self.param(self.d, self.one_of([1, self.h, self.d]))
        d = self.d

        def step(p: Params, a: Inputs, v: list[Array]) -> Array:
            gate = jax.nn.sigmoid(v[0] @ p[w])
            return v[i] * jnp.repeat(gate, d // gate.shape[-1], axis=-1)

        return step

    def make_mask(self, n: int) -> Step:
        i, j, kind = self.pick(n), self.pick(n), self.index(5)
        b = self.param(self.d)

        def step(p: Params, a: Inputs, v: list[Array]) -> Array:
            x = v[i] + p[b]
            return [
                lambda: jnp.where(a.mask, x / 0.7, 0.0),  # dropout
                lambda: jnp.where(a.mask[:, :1, :1], x / 0.7, 0.0),  # stochastic depth
                lambda: jnp.where(a.mask[..., :1], x, v[j]),
                lambda: x * a.mask[:, :, :1],
                lambda: jnp.where(a.mask, x, -jnp.inf).max(1, keepdims=True, initial=-9.0) + x,
            ][kind]()

        return step

    def make_nonlinearity(self, n: int) -> Step:
        i = self.pick(n)
        kinds = [jax.nn.gelu, jnp.tanh, jax.nn.relu, jnp.abs, lax.stop_gradient]
        f = self.one_of([*kinds, lambda x: jnp.round(x + 0.123)])  # not at a half
        return lambda p, a, v: f(v[i])

    def make_reduction(self, n: int) -> Step:
        i, b, kind = self.pick(n), self.param(self.d), self.index(9)

        def step(p: Params, a: Inputs, v: list[Array]) -> Array:
            x = v[i]
            return [
                lambda: jax.nn.softmax(x, axis=-1),
                lambda: jax.nn.softmax(x, axis=1),
                lambda: x - x.max(-1, keepdims=True),
                lambda: x - x.mean(-1, keepdims=True),
                lambda: jnp.cumsum(x, axis=-1) / 4,
                lambda: x / (1 + jnp.linalg.norm(x, axis=-1, keepdims=True)),
                lambda: x + jax.nn.logsumexp(x, axis=-1, keepdims=True),
                lambda: x * (x.max(-1, keepdims=True) > 0.5),
                # The bias settles ties, which rounding would settle otherwise.
                lambda: jax.nn.one_hot(jnp.argmax(x + p[b], -1), x.shape[-1], dtype=x.dtype),
            ][kind]()

        return step

    # Loops, branches, types.

    def make_scan(self, n: int) -> Step:
        """A stream through stacked layers, with a second carry that may read it."""
        i, j, kind = self.pick(n), self.pick(n), self.index(6)
        w, g, norm = self.param(3, self.d, self.d), self.param(3, self.d), self.norm()

        def body(carry: Any, layer: Any) -> Any:
            (s, other), (kernel, scale) = carry, layer
            new = s + norm(s) @ kernel
            if kind == 1:
                return (new, other + s), None
            if kind == 2:
                return (new @ kernel, jnp.tanh(other)), new
            if kind == 3:
                return (other + norm(s) @ kernel, s), other
            if kind == 4:
                return (lax.cond(kernel[0, 0] > 0, jnp.tanh, lambda v: v, new), s), None
            if kind == 5:
                return (s + (norm(s) @ kernel) * scale, other), None
            return (new, other), new

        def step(p: Params, a: Inputs, v: list[Array]) -> Array:
            start = (v[i], v[j])
            (s, other), rows = lax.scan(body, start, (p[w], p[g]), reverse=kind == 0)
            return s + other if rows is None or kind == 3 else rows.sum(0)

        return step

    def make_loop(self, n: int) -> Step:
        """The same layer a number of times that the data may decide."""
        i, w, norm, kind = self.pick(n), self.param(self.d, self.d), self.norm(), self.index(3)

        def step(p: Params, a: Inputs, v: list[Array]) -> Array:
            def layer(s: Array) -> Array:
                return s + norm(s) @ p[w]

            if kind == 0:
                return lax.fori_loop(0, 2, lambda k, s: layer(s), v[i])
            times = a.ids[0, 0] % 3
            keep_on = [lambda c: c[0] < times, lambda c: (c[0] < 3) & (c[1].sum() < 40)][kind - 1]
            return lax.while_loop(keep_on, lambda c: (c[0] + 1, layer(c[1])), (0, v[i]))[1]

        return step

    def make_branch(self, n: int) -> Step:
        i, w, kind = self.pick(n), self.param(self.d, self.d), self.index(3)

        def step(p: Params, a: Inputs, v: list[Array]) -> Array:
            other = [lambda s: s @ p[w], lambda s: s + 0.5 * s, jnp.tanh][kind]
            return lax.cond(a.ids[0, 0] > 2, other, lambda s: jnp.flip(s, 1), v[i])

        return step

    def make_single_precision(self, n: int) -> Step:
        """A layer that computes in float32, or keeps its parameters so."""
        i, norm, kind, name = self.pick(n), self.norm(), self.index(3), f"p{len(self.params)}"
        self.params[name] = self.array(self.d, self.d).astype(np.float32)
        self.digits = 0.05  # norms of nearly constant values magnify rounding

        def step(p: Params, a: Inputs, v: list[Array]) -> Array:
            if kind == 0:
                return v[i] + norm(v[i]) @ p[name]
            if kind == 1:
                return v[i] + (norm(v[i]).astype(jnp.float32) @ p[name]).astype(v[i].dtype)
            return norm(v[i].astype(jnp.float32) @ p[name]).astype(v[i].dtype)

        return step

    def make_per_sample(self, n: int) -> Step:
        """Written for one sample or one token, and mapped."""
        i, w, norm, axis = self.pick(n), self.param(self.d, self.d), self.norm(), self.index(2)
        return lambda p, a, v: v[i] + jax.vmap(lambda s: norm(s) @ p[w], axis, axis)(v[i])


def _one_pass(x: Array, axis: Any) -> Array:
    mean = x.mean(axis, keepdims=True)
    second = jnp.mean(x * x, axis, keepdims=True) - mean**2
    return (x - mean) * lax.rsqrt(second + 0.1)


def _two_pass(x: Array, axis: Any) -> Array:
    return (x - x.mean(axis, keepdims=True)) / jnp.sqrt(x.var(axis, keepdims=True) + 0.1)


def _own_variance(x: Array, axis: Any) -> Array:
    c = x - x.mean(axis, keepdims=True)
    return c / jnp.sqrt(jnp.square(c).mean(axis, keepdims=True) + 0.1)


def _unbiased(x: Array, axis: Any) -> Array:
    ddof = 0 if axis == -1 and x.shape[-1] == 1 else 1
    return (x - x.mean(axis, keepdims=True)) / (x.std(axis, keepdims=True, ddof=ddof) + 0.3)


def _flax(x: Array, axis: Any) -> Array:
    axes = axis if isinstance(axis, tuple) else (axis,)
    norm = nn.LayerNorm(0.1, use_bias=False, use_scale=False, reduction_axes=axes)
    return norm.apply({}, x)


def _distributed(x: Array, axis: Any) -> Array:
    a = lax.rsqrt(jnp.var(x, axis, keepdims=True) + 0.1)
    return x * a - x.mean(axis, keepdims=True) * a


def _single_statistics(x: Array, axis: Any) -> Array:
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return ((wide - wide.mean(axis, keepdims=True)) / (wide.std(axis, keepdims=True) + 0.3)).astype(
        x.dtype
    )


def _rms(x: Array, axis: Any) -> Array:
    return x * lax.rsqrt(jnp.mean(x * x, axis, keepdims=True) + 0.1)


def _rms_of_centered(x: Array, axis: Any) -> Array:
    """The mean is taken out of the value, not out of the variance."""
    second = jnp.mean(x * x, axis, keepdims=True)
    return (x - x.mean(axis, keepdims=True)) * lax.rsqrt(second + 0.1)


def _masked(x: Array, axis: Any) -> Array:
    kept = x > x.mean(axis, keepdims=True) - 0.1
    mean = x.mean(axis, keepdims=True, where=kept)
    return (x - mean) * lax.rsqrt(x.var(axis, keepdims=True, where=kept) + 0.1)


NORMS: list[Callable[..., Array]] = [
    _one_pass,
    _two_pass,
    lambda x, axis: nn.standardize(x, axis=axis, epsilon=0.1),
    _own_variance,
    _unbiased,
    _flax,
    _distributed,
    _single_statistics,
    _rms,
    _rms_of_centered,
    _masked,
]
