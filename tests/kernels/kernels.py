"""Kernels that nobody looks into, for tests: LayerNorms with their twins, a product, fused ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.extend.core import Primitive
from jax.interpreters import mlir

import jax_lnfold

Array = jax.Array


def normalised(x: Array, mean: bool, eps: float = 1e-6) -> Array:
    c = x - x.mean(-1, keepdims=True) if mean else x
    return c * jax.lax.rsqrt((c * c).mean(-1, keepdims=True) + eps)


def primitive_of(name: str, fn: Callable[..., Any]) -> Primitive:
    """A primitive that computes a function, and has no rule anywhere."""
    made = Primitive(name)
    made.def_impl(fn)
    made.def_abstract_eval(lambda *avals: jax.make_jaxpr(fn)(*avals).out_avals[0])
    mlir.register_lowering(made, mlir.lower_fun(fn, multiple_results=False))
    return made


def hidden(fn: Any) -> Any:
    """The function behind a primitive that has no rule: the identity on the result."""

    @jax.custom_vjp
    def veil(*args: Any) -> Any:
        return jax.tree.map(lambda y: jnp.sinh(jnp.arcsinh(y)), fn(*args))

    def forward(*args: Any) -> Any:
        return veil(*args), args

    def backward(args: Any, slopes: Any) -> Any:
        return jax.vjp(fn, *args)[1](slopes)

    veil.defvjp(forward, backward)
    return veil


def with_affine(x: Array, scale: Array, shift: Array, mean: bool = True) -> Array:
    return normalised(x, mean) * scale + shift


ln = hidden(with_affine)
rms = hidden(partial(with_affine, mean=False))
norm = jax_lnfold.layer_norm(ln, rms=rms, scale=1, shift=2, name="hidden_norm")


def added(x: Array, residual: Array, scale: Array, shift: Array, mean: bool = True) -> Any:
    h = x + residual
    return with_affine(h, scale, shift, mean), h


add_norm = jax_lnfold.layer_norm(
    hidden(added),
    rms=hidden(partial(added, mean=False)),
    reference=added,
    name="add_norm",
)


def projected(x: Array, scale: Array, shift: Array, w: Array, b: Array, mean: bool = True) -> Array:
    return with_affine(x, scale, shift, mean) @ w + b


norm_linear = jax_lnfold.layer_norm(
    hidden(projected),
    rms=hidden(partial(projected, mean=False)),
    reference=projected,
    name="norm_linear",
)


class KernelNorm(nn.Module):
    """The LayerNorm of the zoo, computed by the declared kernel."""

    epsilon: float = 1e-6
    use_scale: bool = True
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        n = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, n) if self.use_scale else jnp.ones(n)
        bias = self.param("bias", nn.initializers.zeros, n) if self.use_bias else jnp.zeros(n)
        return norm(x, scale, bias)


# --- Pallas --------------------------------------------------------------------------------------


def row_kernel(x_ref: Any, g_ref: Any, b_ref: Any, y_ref: Any, *, mean: bool) -> None:
    """As for a TPU: a block of rows with all their features."""
    x = x_ref[...]
    if mean:
        x = x - jnp.mean(x, -1, keepdims=True)
    r = jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
    y_ref[...] = x * r * g_ref[...] + b_ref[...]


def rows(x: Array, scale: Array, shift: Array, mean: bool) -> Array:
    flat = x.reshape(-1, x.shape[-1])
    n, d = flat.shape
    whole = pl.BlockSpec((1, d), lambda i: (0, 0))
    call = pl.pallas_call(
        partial(row_kernel, mean=mean),
        grid=(n // 2,),
        in_specs=[pl.BlockSpec((2, d), lambda i: (i, 0)), whole, whole],
        out_specs=pl.BlockSpec((2, d), lambda i: (i, 0)),
        out_shape=jax.ShapeDtypeStruct((n, d), x.dtype),
        interpret=True,
    )
    return call(flat, scale[None], shift[None]).reshape(x.shape)


def with_derivative(mean: bool) -> Any:
    """The Pallas kernel with the derivative of the plain spelling, as kernels have one by hand."""
    kernel = jax.custom_vjp(partial(rows, mean=mean))
    plain = partial(with_affine, mean=mean)
    kernel.defvjp(
        lambda *args: (rows(*args, mean=mean), args),
        lambda args, slopes: jax.vjp(plain, *args)[1](slopes),
    )
    return kernel


pallas_norm = jax_lnfold.layer_norm(
    with_derivative(True), rms=with_derivative(False), scale=1, shift=2, name="pallas_rows"
)


def product_kernel(x_ref: Any, w_ref: Any, y_ref: Any) -> None:
    y_ref[...] = x_ref[...] @ w_ref[...]


def pallas_product(x: Array, w: Array) -> Array:
    shape = jax.ShapeDtypeStruct((x.shape[0], w.shape[1]), x.dtype)
    return pl.pallas_call(product_kernel, out_shape=shape, interpret=True)(x, w)


def lookup_kernel(ids_ref: Any, table_ref: Any, y_ref: Any) -> None:
    y_ref[...] = table_ref[...][ids_ref[...]]


def pallas_lookup(ids: Array, table: Array) -> Array:
    shape = jax.ShapeDtypeStruct((*ids.shape, table.shape[1]), table.dtype)
    return pl.pallas_call(lookup_kernel, out_shape=shape, interpret=True)(ids, table)


def patch_kernel(x_ref: Any, w_ref: Any, y_ref: Any) -> None:
    """A convolution whose windows, of 2 by 2, do not overlap."""
    b, h, w, _ = x_ref.shape
    x = x_ref[...].reshape(b, h // 2, 2, w // 2, 2, -1)
    y_ref[...] = jnp.einsum("bjxkyi,xyio->bjko", x, w_ref[...])


def pallas_patches(x: Array, w: Array) -> Array:
    b, height, width, _ = x.shape
    shape = jax.ShapeDtypeStruct((b, height // 2, width // 2, w.shape[-1]), x.dtype)
    return pl.pallas_call(patch_kernel, out_shape=shape, interpret=True)(x, w)
