"""How tokens of an answer are chosen, and an answer in the making."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from .decoder import KV, Gap
from .errors import InputError


@dataclass(frozen=True)
class Decoding:
    """With `temperature` 0 the likeliest token is taken.

    Otherwise one is drawn from the `top_k` likeliest (0: from all; 50, as in the public code, which
    leaves that to `transformers`), and of those from the likeliest that together have the
    probability `top_p`. A token of `eos` ends an answer.
    """

    max_new_tokens: int = 512
    eos: tuple[int, ...] = ()
    temperature: float = 0.0
    top_k: int = 50
    top_p: float = 1.0

    def __post_init__(self) -> None:
        """Only what can be."""
        if self.max_new_tokens < 1:
            raise InputError(
                f"max_new_tokens: {self.max_new_tokens} is given; ask for at least one"
            )
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0:
            raise InputError(
                f"temperature: {self.temperature}, top_p: {self.top_p} and top_k: {self.top_k} are "
                "given; the first and the last must not be negative, the second must be above 0 "
                "and at most 1"
            )

    def next_token(self, logits: jax.Array, key: jax.Array | None) -> jax.Array:
        """A token for each row of ``[batch, vocabulary]``, int32 ``[batch]``."""
        if not self.temperature:
            return logits.argmax(-1).astype(jnp.int32)
        logits = logits / self.temperature
        ordered = -jnp.sort(-logits, axis=-1)
        if 0 < self.top_k < logits.shape[-1]:
            least = ordered[..., self.top_k - 1, None]
            logits, ordered = (jnp.where(x < least, -jnp.inf, x) for x in (logits, ordered))
        if self.top_p < 1:
            before = jnp.cumsum(nnx.softmax(ordered), axis=-1) - nnx.softmax(ordered)
            least = jnp.where(before < self.top_p, ordered, jnp.inf).min(-1, keepdims=True)
            logits = jnp.where(logits < least, -jnp.inf, logits)
        return jax.random.categorical(key, logits).astype(jnp.int32)


class Generation(NamedTuple):
    """Answers in the making: the first `step` tokens of each row are there."""

    step: jax.Array  # int32
    tokens: jax.Array  # int32 [batch, max_new_tokens]
    done: jax.Array  # bool [batch]
    cache: list[KV]
    length: jax.Array  # int32, of the prompt
    gap: Gap | None
    key: jax.Array | None

    def drawn(self) -> jax.Array | None:
        """The key for the next token."""
        return None if self.key is None else jax.random.fold_in(self.key, self.step)

    def completed(self) -> jax.Array:
        """All tokens; each row is filled up with its last one."""
        left = jnp.arange(self.tokens.shape[1]) >= self.step
        last = jax.lax.dynamic_index_in_dim(self.tokens, self.step - 1, axis=1)
        return jnp.where(left, last, self.tokens)
