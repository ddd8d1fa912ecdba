"""Functions with rules of their own that compute the true derivative."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

Fn = Callable[..., Any]


def with_jvp(f: Fn) -> Fn:
    ruled = jax.custom_jvp(f)
    ruled.defjvp(lambda primals, tangents: jax.jvp(f, primals, tangents))
    return ruled


def with_vjp(f: Fn) -> Fn:
    ruled = jax.custom_vjp(f)
    ruled.defvjp(lambda *args: jax.vjp(f, *args), lambda pull, g: pull(g))
    return ruled
