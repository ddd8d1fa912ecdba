"""Random networks: anything wired to anything, as real programs.

Every step appends one array of shape (B, N, D) to the values so far, so that all of them can be
combined; inside a step anything may happen. A network follows from its number alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial, partialmethod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tests.models.leaves import Leaf, Params, Pool
from tests.models.norm_spellings import NORMS, SCALED, SMOOTH

Array = Any  # NumPy arrays outside, tracers inside
Step = Callable[[Params, "Inputs", list[Array]], Array]

SIZES = [(2, 5, 3, 4), (1, 4, 2, 5), (3, 2, 4, 3)]
"""Batch, tokens, heads, width of a head: few, so that compiled operations are reused.

The number of a network decides which ones it has.
"""
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
    head: Leaf
    last: int
    leaks: tuple[int, ...]
    digits: float
    """Relative precision to which results can be compared."""
    roles: tuple[tuple[str, str], ...]
    """As what the leaves are read, with their names; a role is there once for each use."""

    def apply(self, params: Params, x: Array, ids: Array, mask: Array) -> Any:
        inputs, values = Inputs(x, ids, mask), [x]
        for step in self.steps:
            values.append(step(params, inputs, values))
        stream = values[self.last]
        final = (stream - stream.mean(-1, keepdims=True)) / (stream.std(-1, keepdims=True) + 0.1)
        # The constant gives the outputs a scale: a norm of a constant stream is all rounding.
        return 1 + final @ self.head(params), [values[i] for i in self.leaks]

    def astype(self, dtype: Any) -> Network:
        """The same program with all its numbers in this dtype."""
        params = {name: x.astype(dtype) for name, x in self.params.items()}
        return replace(
            self, params=params, inputs=self.inputs._replace(x=self.inputs.x.astype(dtype))
        )

    def shrunk(self, fails: Callable[[Network], bool]) -> Network:
        """With fewer steps and outputs, but still failing."""
        network = self
        candidates = [lambda n: replace(n, leaks=())]
        candidates += [partial(_without, k) for k in reversed(range(len(self.steps)))]
        for smaller in candidates:
            if fails(tried := smaller(network)):
                network = tried
        return network

    def __repr__(self) -> str:
        kept = [(k, s) for k, s in enumerate(self.steps, 1) if s is not _nothing]
        steps = ", ".join(f"{k}: {s.__name__}" for k, s in kept)
        shown = f"x{self.inputs.x.shape}, {steps}, head={self.head.name}, last={self.last}"
        return f"Network({shown}, leaks={self.leaks})"


def _nothing(p: Params, a: Inputs, v: list[Array]) -> Array:
    return a.x


def _without(k: int, network: Network) -> Network:
    return replace(network, steps=(*network.steps[:k], _nothing, *network.steps[k + 1 :]))


def random_network(
    number: int, least: int = 3, most: int = 11, smooth: bool = False, statistics: bool = False
) -> Network:
    """The network of this number, of `least` to `most` steps.

    A `smooth` one has no jumps, no loop that the data ends and no dtypes of its own, so that it
    has gradients, and rounding changes it little. In one with `statistics`, more than LayerNorms
    often reads their means and deviations.
    """
    rng = np.random.default_rng(number)
    return Builder(rng, SIZES[number % len(SIZES)], smooth).network(least, most, statistics)


class Reader(NamedTuple):
    """A linear layer behind a norm: what it computes from its leaves and scaled, shifted values."""

    kind: str
    leaves: tuple[Leaf, Leaf]
    run: Callable[[Array, Array, Array, Array], Array]


class Builder:
    def __init__(
        self, rng: np.random.Generator, sizes: tuple[int, int, int, int], smooth: bool
    ) -> None:
        self.rng, self.smooth = rng, smooth
        self.b, self.n, self.h, self.hd = sizes
        self.d = self.h * self.hd
        self.pool = Pool(rng, spare=self.one_of([1, 2, 4, 16, 16, 16]))
        self.single: Params = {}
        self.drawn: list[str] = []  # of the step that is being made
        self.roles: list[tuple[str, str]] = []
        self.digits = 1e-9

    def index(self, n: int) -> int:
        return int(self.rng.integers(n))

    def one_of(self, options: Sequence[Any]) -> Any:
        return options[self.index(len(options))]

    def network(self, least: int, most: int, statistics: bool) -> Network:
        count = least + self.index(most - least + 1)
        skipped = {"make_single_precision"} if self.smooth else set()
        names = {name for name in dir(type(self)) if name.startswith("make_")} - skipped
        makers = [getattr(self, name) for name in sorted(names)]
        # Sums, linear layers and what they read are what streams are made of.
        favoured = [self.make_sum, self.make_dense, self.make_block, self.make_layer_scale]
        favoured += self.one_of([2, 8]) * [self.make_affine]
        favoured += 6 * statistics * [self.with_statistics]
        steps = []
        for k in range(count):
            usual = favoured if k else [self.make_dense, self.make_embedding]
            maker = self.one_of(usual if self.index(3) else makers)
            self.drawn = []
            step = maker(k + 1)
            step.__name__ = f"{maker.__name__.split('_', 1)[1]}({' '.join(self.drawn)})"
            steps.append(self.wrapped(step))
        shape = (self.b, self.n, self.d)
        inputs = Inputs(
            self.pool.array(*shape),
            self.rng.integers(0, VOCABULARY, shape[:2]),
            self.rng.random(shape) < 0.7,
        )
        head = self.kernel(self.d, self.one_of([3, 3, VOCABULARY]))
        return Network(
            steps=tuple(steps),
            params=self.pool.params | self.single,
            inputs=inputs,
            head=head,
            last=count - self.index(2),
            leaks=tuple(self.index(count + 1) for _ in range(max(0, self.index(9) - 6))),
            digits=self.digits,
            roles=tuple(self.roles),
        )

    def wrapped(self, step: Step) -> Step:
        """The step as it is, or inside a call."""
        kind = self.one_of(["plain", "plain", "plain", "jit", "checkpoint"])
        if kind == "plain":
            return step
        call = {"jit": jax.jit, "checkpoint": jax.checkpoint}[kind]

        def inside(p: Params, inputs: Inputs, values: list[Array]) -> Array:
            return call(step)(p, inputs, values)

        inside.__name__ = f"{kind} {step.__name__}"
        return inside

    def leaf(self, role: str, *shape: int) -> Leaf:
        leaf = self.pool.leaf(shape)
        self.drawn.append(leaf.name)
        self.roles += [(role, name) for name in leaf.names]
        return leaf

    kernel, bias = partialmethod(leaf, "kernel"), partialmethod(leaf, "bias")
    scale, shift = partialmethod(leaf, "scale"), partialmethod(leaf, "shift")
    table, gate = partialmethod(leaf, "table"), partialmethod(leaf, "gate")
    constant = partialmethod(leaf, "constant")

    def pick(self, n: int) -> int:
        """A value so far, later ones preferred."""
        value = max(self.index(n) for _ in range(3))
        self.drawn.append(f"v{value}")
        return value

    def norm(self, axis: int | tuple[int, ...] = -1) -> Callable[[Array], Array]:
        """A LayerNorm in some spelling, or something that only looks like one."""
        norm = self.one_of(SMOOTH if self.smooth else NORMS)
        self.drawn.append(norm.__name__.strip("_"))
        return partial(norm, axis=axis)

    def kind(self, smooth: int, jumps: int = 0) -> int:
        """One of the first `smooth` kinds, or of the `jumps` after them."""
        kind = self.index(smooth if self.smooth else smooth + jumps)
        self.drawn.append(f"kind {kind}")
        return kind

    # Streams.

    def make_sum(self, n: int) -> Step:
        i, j, sign = self.pick(n), self.pick(n), self.one_of([1.0, -1.0, 0.5])
        if self.index(4) == 0:
            scalar = self.constant(1)
            return lambda p, a, v: v[i] + scalar(p) * v[j]
        return lambda p, a, v: v[i] + sign * v[j]

    def make_dense(self, n: int) -> Step:
        i, w, b = self.pick(n), self.kernel(self.d, self.d), self.bias(self.d)
        return lambda p, a, v: v[i] @ w(p) + b(p)

    def make_block(self, n: int) -> Step:
        i, w, norm = self.pick(n), self.kernel(self.d, self.d), self.norm()
        return lambda p, a, v: v[i] + norm(v[i]) @ w(p)

    def make_norm(self, n: int) -> Step:
        i, g, b = self.pick(n), self.scale(self.d), self.shift(self.d)
        norm = self.norm(self.one_of([-1, -1, -1, 1, (1, 2), 0]))
        kind = self.kind(3)

        def step(p: Params, a: Inputs, v: list[Array]) -> Array:
            y = norm(v[i])
            return y if kind == 0 else y * g(p) if kind == 1 else y * (1 + g(p)) + b(p)

        return step

    def make_layer_scale(self, n: int) -> Step:
        i, w, b = self.pick(n), self.kernel(self.d, self.d), self.constant(1)
        g, biased = self.one_of([self.scale, self.gate])(self.d), self.index(2)
        return lambda p, a, v: v[i] + (v[i] @ w(p) + (b(p) if biased else 0)) * g(p)

    def make_affine(self, n: int) -> Step:
        """A norm with scale and shift that linear layers read."""
        i, norm, scaled = self.pick(n), self.norm(), self.one_of(SCALED)
        where = self.one_of(["here", "here", "here", "branches", "loop", "scan", "each sample"])
        stack = (3,) if where == "scan" else ()
        scale, shift = self.scale(*stack, self.d), self.shift(*stack, self.d)
        readers: list[Reader] = []
        for _ in range(self.one_of([1, 1, 2, 2, 3])):
            readers.append(self.reader(readers, *stack))
        residual = self.index(2)
        self.drawn += [scaled.__name__.strip("_"), where]
        leaves = [scale, shift, *(leaf for r in readers for leaf in r.leaves)]

        def layer(x: Array, arrays: Sequence[Array], chosen: int | None = None) -> Array:
            g, c, *rest = arrays
            both = scaled(norm, x, g, c)
            pairs = zip(readers, rest[::2], rest[1::2], strict=True)
            results = [r.run(kernel, bias, *both) for r, kernel, bias in pairs]
            return residual * x + (sum(results) if chosen is None else results[chosen])

        def step(p: Params, a: Inputs, v: list[Array]) -> Array:
            x, arrays = v[i], [leaf(p) for leaf in leaves]
            if where == "branches":
                one, other = (partial(layer, arrays=arrays, chosen=k) for k in (0, -1))
                return lax.cond(a.ids[0, 0] > 2, one, other, x)
            if where == "loop":
                return lax.fori_loop(0, 2, lambda _, s: layer(s, arrays), x)
            if where == "scan":
                return lax.scan(lambda s, rows: (layer(s, rows), None), x, arrays)[0]
            return (jax.vmap(layer, (0, None)) if where == "each sample" else layer)(x, arrays)

        return step

    def with_statistics(self, n: int) -> Step:
        """A norm whose mean, centered values or deviation something else reads, or another norm."""
        i, w, kind = self.pick(n), self.kernel(self.d, self.d), self.kind(8)

        def step(p: Params, a: Inputs, v: list[Array]) -> Array:
            x = v[i]
            mean = x.mean(-1, keepdims=True)
            c = x - mean
            deviation = jnp.sqrt(jnp.square(c).mean(-1, keepdims=True) + 0.1)
            y = c / deviation
            return [
                lambda: y @ w(p),
                lambda: y + mean,
                lambda: y @ w(p) + jnp.tanh(mean),
                lambda: c @ w(p) + y,
                lambda: (y @ w(p)) * deviation,
                lambda: (x / deviation) @ w(p) + jnp.tanh(y),
                lambda: jnp.tanh(y) + c / jnp.sqrt(jnp.square(c).mean(-1, keepdims=True) + 0.5),
                # What this one removes, the next one need not.
                lambda: jax.nn.standardize(y - 0.5 * jnp.roll(y, 1, axis=1), epsilon=0.1) @ w(p),
            ][kind]()

        return step

    def reader(self, earlier: Sequence[Reader], *stack: int) -> Reader:
        """A linear layer behind a norm, often with the kernel or the bias of an earlier one."""
        kind = self.one_of(["no bias", "heads", *4 * ["dense"], "transposed", "kernel first"])
        shifted, bent = self.index(4), self.index(2)
        kept = self.index(3) if earlier and self.index(2) else None
        if kept is not None and "heads" in (kind, earlier[-1].kind):
            kind = earlier[-1].kind  # no other has these shapes
        out = (self.h, self.hd) if kind == "heads" else (self.d,)
        w = earlier[-1].leaves[0] if kept in (0, 1) else self.kernel(*stack, self.d, *out)
        b = earlier[-1].leaves[1] if kept in (1, 2) else self.bias(*stack, *out)
        self.drawn += [kind, "of what is shifted" if shifted else "of what is scaled"]

        def run(kernel: Array, bias: Array, scaled: Array, with_shift: Array) -> Array:
            y = with_shift if shifted else scaled
            result = {
                "no bias": lambda: y @ kernel,
                "heads": lambda: jnp.einsum("...d,dhk->...hk", y, kernel) + bias,
                "dense": lambda: y @ kernel + bias,
                "transposed": lambda: bias + y @ kernel.T,
                "kernel first": lambda: jnp.einsum("de,...d->...e", kernel, y) + bias,
            }[kind]().reshape(y.shape)
            return jnp.tanh(result) if bent else result

        return Reader(kind, (w, b), run)

    # Linear layers.

    def make_heads_out(self, n: int) -> Step:
        i, w = self.pick(n), self.kernel(self.h, self.hd, self.d)
        shape = (self.b, self.n, self.h, self.hd)
        return lambda p, a, v: jnp.einsum("bnhd,hde->bne", v[i].reshape(shape), w(p))

    def make_low_rank(self, n: int) -> Step:
        i, w, u = self.pick(n), self.kernel(self.d, 2), self.kernel(2, self.d)
        first = self.index(2)
        return lambda p, a, v: v[i] @ (w(p) @ u(p)) if first else (v[i] @ w(p)) @ u(p)

    def make_embedding(self, n: int) -> Step:
        table, kind = self.table(VOCABULARY, self.d), self.kind(4)

        def step(p: Params, a: Inputs, v: list[Array]) -> Array:
            rows = [
                lambda: table(p)[a.ids],
                lambda: jax.nn.one_hot(a.ids, VOCABULARY, dtype=table(p).dtype) @ table(p),
                lambda: jnp.take(table(p), a.ids, axis=0, mode="clip"),
                lambda: jnp.take(table(p), a.ids, axis=0, mode="fill", fill_value=0.0),
            ]
            return rows[kind]()

        return step

    def make_convolution(self, n: int) -> Step:
        i, groups, stride = self.pick(n), self.one_of([1, self.h, self.d]), self.one_of([1, 1, 2])
        kernel, tokens = self.kernel(3, self.d // groups, self.d), self.n

        def step(p: Params, a: Inputs, v: list[Array]) -> Array:
            y = lax.conv_general_dilated(
                v[i],
                kernel(p),
                (stride,),
                "SAME",
                dimension_numbers=("NWC", "WIO", "NWC"),
                feature_group_count=groups,
            )
            return y if stride == 1 else jnp.repeat(y, 2, axis=1)[:, :tokens]

        return step

    def make_token_mix(self, n: int) -> Step:
        i, w, b = self.pick(n), self.kernel(self.n, self.n), self.bias(self.n)
        return lambda p, a, v: (v[i].swapaxes(1, 2) @ w(p) + b(p)).swapaxes(1, 2)

    def make_experts(self, n: int) -> Step:
        """One of two linear layers per token."""
        i, w, b = self.pick(n), self.kernel(2, self.d, self.d), self.bias(2, self.d)

        def step(p: Params, a: Inputs, v: list[Array]) -> Array:
            chosen = jax.nn.one_hot(a.ids % 2, 2, dtype=w(p).dtype)
            each = jnp.einsum("bnd,kde->bnke", v[i], w(p)) + b(p)
            return jnp.einsum("bnke,bnk->bne", each, chosen)

        return step

    # Features split, merged, cut and joined.

    def make_head_norm(self, n: int) -> Step:
        i, norm, swap = self.pick(n), self.norm(self.one_of([-1, -1, (2, 3), 2])), self.kind(3)
        shape, flat = (self.b, self.n, self.h, self.hd), (self.b, self.n, self.d)

        def step(p: Params, a: Inputs, v: list[Array]) -> Array:
            heads = v[i].reshape(shape)
            heads = heads.swapaxes(2, 3) if swap == 0 else heads
            return norm(heads).reshape(flat)

        return step

    def make_attention(self, n: int) -> Step:
        i, w, norm = self.pick(n), self.kernel(self.d, 3 * self.d), self.norm()
        normed, shape, joint = self.index(3), (self.b, self.n, self.h, self.hd), self.index(2)

        def step(p: Params, a: Inputs, v: list[Array]) -> Array:
            fused = v[i] @ w(p)
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
        i, w = self.pick(n), self.kernel(self.d, self.d)
        cut, overlap = 1 + self.index(self.d - 1), self.index(4) == 0
        one, two = self.norm(), self.norm()
        start = max(0, cut - 2) if overlap else cut

        def step(p: Params, a: Inputs, v: list[Array]) -> Array:
            y = v[i] @ w(p)
            left, right = one(y[..., :cut]), two(y[..., start:])
            return jnp.concatenate([left, right[..., cut - start :]], axis=-1)

        return step

    def make_merge(self, n: int) -> Step:
        """Two tokens side by side, normalised together (patch merging)."""
        i, j, w, norm = self.pick(n), self.pick(n), self.kernel(2 * self.d, self.d), self.norm()
        return lambda p, a, v: norm(jnp.concatenate([v[i], jnp.roll(v[j], 1, 1)], -1)) @ w(p)

    def make_features(self, n: int) -> Step:
        i, kind = self.pick(n), self.kind(8)
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
        i, kind, table = self.pick(n), self.kind(10), self.table(1, self.n, self.d)
        tokens = self.n

        def step(p: Params, a: Inputs, v: list[Array]) -> Array:
            x, extra = v[i], jnp.broadcast_to(table(p), v[i].shape)
            moved = [
                lambda: jnp.roll(x, 2, axis=1),
                lambda: jnp.concatenate([x[:, :1], jnp.flip(x[:, 1:], 1)], axis=1),
                lambda: jnp.broadcast_to(x.mean(1, keepdims=True), x.shape),
                lambda: jnp.cumsum(x, axis=1),
                lambda: x + table(p),
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
        i, w = self.pick(n), self.gate(self.d, self.one_of([1, self.h, self.d]))
        d = self.d

        def step(p: Params, a: Inputs, v: list[Array]) -> Array:
            gate = jax.nn.sigmoid(v[0] @ w(p))
            return v[i] * jnp.repeat(gate, d // gate.shape[-1], axis=-1)

        return step

    def make_mask(self, n: int) -> Step:
        i, j, kind = self.pick(n), self.pick(n), self.kind(6)
        b = self.constant(self.d)

        def step(p: Params, a: Inputs, v: list[Array]) -> Array:
            x = v[i] + b(p)
            return [
                lambda: jnp.where(a.mask, x / 0.7, 0.0),  # dropout
                lambda: jnp.where(a.mask[:, :1, :1], x / 0.7, 0.0),  # stochastic depth
                lambda: jnp.where(a.mask[..., :1], x, v[j]),
                lambda: x * a.mask[:, :, :1],
                lambda: jnp.where(a.mask[:, :1], v[i], b(p)),
                lambda: jnp.where(a.mask, x, -jnp.inf).max(1, keepdims=True, initial=-9.0) + x,
            ][kind]()

        return step

    def make_nonlinearity(self, n: int) -> Step:
        i = self.pick(n)
        kinds = [jax.nn.gelu, jnp.tanh, jax.nn.relu, jnp.abs, lax.stop_gradient]
        f = [*kinds, lambda x: jnp.round(x + 0.123)][self.kind(5, jumps=1)]  # not at a half
        return lambda p, a, v: f(v[i])

    def make_reduction(self, n: int) -> Step:
        i, b, kind = self.pick(n), self.bias(self.d), self.kind(7, jumps=2)

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
                lambda: jax.nn.one_hot(jnp.argmax(x + b(p), -1), x.shape[-1], dtype=x.dtype),
            ][kind]()

        return step

    # Loops, branches, types.

    def make_scan(self, n: int) -> Step:
        """A stream through stacked layers, with a second carry that may read it."""
        i, j, kind = self.pick(n), self.pick(n), self.kind(6)
        w, g, norm = self.kernel(3, self.d, self.d), self.scale(3, self.d), self.norm()

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
            (s, other), rows = lax.scan(body, start, (w(p), g(p)), reverse=kind == 0)
            return s + other if rows is None or kind == 3 else rows.sum(0)

        return step

    def make_loop(self, n: int) -> Step:
        """The same layer a number of times that the data may decide."""
        i, w, norm = self.pick(n), self.kernel(self.d, self.d), self.norm()
        kind = self.kind(1, jumps=2)

        def step(p: Params, a: Inputs, v: list[Array]) -> Array:
            def layer(s: Array) -> Array:
                return s + norm(s) @ w(p)

            if kind == 0:
                return lax.fori_loop(0, 2, lambda k, s: layer(s), v[i])
            times = a.ids[0, 0] % 3
            keep_on = [lambda c: c[0] < times, lambda c: (c[0] < 3) & (c[1].sum() < 40)][kind - 1]
            return lax.while_loop(keep_on, lambda c: (c[0] + 1, layer(c[1])), (0, v[i]))[1]

        return step

    def make_branch(self, n: int) -> Step:
        i, w, kind = self.pick(n), self.kernel(self.d, self.d), self.kind(3)

        def step(p: Params, a: Inputs, v: list[Array]) -> Array:
            other = [lambda s: s @ w(p), lambda s: s + 0.5 * s, jnp.tanh][kind]
            return lax.cond(a.ids[0, 0] > 2, other, lambda s: jnp.flip(s, 1), v[i])

        return step

    def make_single_precision(self, n: int) -> Step:
        """A layer that computes in float32, or keeps its parameters so."""
        i, norm, kind, name = self.pick(n), self.norm(), self.kind(3), f"single{n}"
        self.single[name] = self.pool.array(self.d, self.d).astype(np.float32)
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
        i, w, norm, axis = self.pick(n), self.kernel(self.d, self.d), self.norm(), self.index(2)
        return lambda p, a, v: v[i] + jax.vmap(lambda s: norm(s) @ w(p), axis, axis)(v[i])
