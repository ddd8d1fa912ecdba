"""Random networks whose norms and linear layers are often kernels that nobody looks into.

They are known by what is declared of them: LayerNorms by `layer_norm`, linear layers by a rule.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

import jax_lnfold
from jax_lnfold.rules import linear, register
from tests.kernels.kernels import hidden, primitive_of
from tests.models.networks import SIZES, Builder, Inputs, Network, Step
from tests.models.norm_spellings import rms, two_pass

Array = Any
Axes = int | tuple[int, ...]


def _lookup(ids: Array, table: Array) -> Array:
    return jnp.take(table, ids, axis=0, mode="clip")


def _convolution(x: Array, w: Array) -> Array:
    spec = ("NWC", "WIO", "NWC")
    return lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=spec)


PRODUCT = primitive_of("product_kernel", lambda x, w: x @ w)
LOOKUP = primitive_of("lookup_kernel", _lookup)
CONVOLUTION = primitive_of("convolution_kernel", _convolution)
register(PRODUCT, linear("bnk,km->bnm"))
register(LOOKUP, linear("bn,vd->bnd", [1]))
register(CONVOLUTION, linear("bnk,wkm->bjm"))


@cache
def kernel_norm(axis: Axes) -> Callable[[Array], Array]:
    """A LayerNorm over these axes."""
    fn, twin = (partial(spelled, axis=axis) for spelled in (two_pass, rms))
    # Of two numbers the gradient is all epsilon, which only a reference says.
    norm = jax_lnfold.layer_norm(hidden(fn), rms=hidden(twin), reference=fn, name="kernel_norm")
    axes = axis if isinstance(axis, tuple) else (axis,)
    return lambda x: fn(x) if all(x.shape[d] == 1 for d in axes) else norm(x)


def _scaled(x: Array, g: Array, b: Array, norm: Any = two_pass) -> Array:
    return norm(x, -1) * g + b


def _added(x: Array, y: Array, g: Array, b: Array, norm: Any = two_pass) -> tuple[Array, Array]:
    total = x + y
    return _scaled(total, g, b, norm), total


def _read(x: Array, g: Array, b: Array, w: Array, c: Array, norm: Any = two_pass) -> Array:
    return _scaled(x, g, b, norm) @ w + c


scaled_norm = jax_lnfold.layer_norm(
    hidden(_scaled), rms=hidden(partial(_scaled, norm=rms)), scale=1, shift=2
)
add_norm, norm_linear = (
    jax_lnfold.layer_norm(hidden(fn), rms=hidden(partial(fn, norm=rms)), reference=fn)
    for fn in (_added, _read)
)


class KernelBuilder(Builder):
    """Builds networks as `Builder` does, with kernels in the place of many parts."""

    def norm(self, axis: Axes = -1) -> Callable[[Array], Array]:
        if self.index(3) == 0:
            return super().norm(axis)
        self.drawn.append("kernel_norm")
        return kernel_norm(axis)

    def make_dense(self, n: int) -> Step:
        i, w, b = self.pick(n), self.kernel(self.d, self.d), self.bias(self.d)
        return lambda p, a, v: PRODUCT.bind(v[i], w(p)) + b(p)

    def make_block(self, n: int) -> Step:
        i, w, norm = self.pick(n), self.kernel(self.d, self.d), self.norm()
        return lambda p, a, v: v[i] + PRODUCT.bind(norm(v[i]), w(p))

    def make_embedding(self, n: int) -> Step:
        table = self.table(7, self.d)
        return lambda p, a, v: LOOKUP.bind(a.ids, table(p))

    def make_convolution(self, n: int) -> Step:
        i, w = self.pick(n), self.kernel(3, self.d, self.d)
        return lambda p, a, v: CONVOLUTION.bind(v[i], w(p))

    def make_fused(self, n: int) -> Step:
        """A sum and its norm by one kernel, and a norm with the linear layer behind it."""
        i, j, returned = self.pick(n), self.pick(n), self.index(2)
        g, c, w = self.scale(self.d), self.shift(self.d), self.kernel(self.d, self.d)
        b = self.bias(self.d)

        def step(p: Any, a: Inputs, v: list[Array]) -> Array:
            normed, total = add_norm(v[i], v[j], g(p), c(p))
            read = norm_linear(total, g(p), c(p), w(p), b(p))
            return read + total if returned else read + PRODUCT.bind(normed, w(p))

        return step

    def make_affine(self, n: int) -> Step:
        """Scale and shift in a kernel, which a linear layer reads."""
        if self.index(2):
            return super().make_affine(n)
        i, residual = self.pick(n), self.index(2)
        product = self.one_of([PRODUCT.bind, jnp.matmul])
        g, c, w = self.scale(self.d), self.shift(self.d), self.kernel(self.d, self.d)
        b = self.bias(self.d)

        def step(p: Any, a: Inputs, v: list[Array]) -> Array:
            return residual * v[i] + product(scaled_norm(v[i], g(p), c(p)), w(p)) + b(p)

        return step


def random_kernel_network(number: int, least: int = 3, most: int = 11) -> Network:
    """The network of this number."""
    rng = np.random.default_rng(number)
    return KernelBuilder(rng, SIZES[number % len(SIZES)], smooth=False).network(
        least, most, statistics=False
    )
