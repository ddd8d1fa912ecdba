"""The whole model: frames and a prompt in, logits or answers out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from .config import Config
from .decoder import Decoder
from .errors import InputError
from .resampler import Resampler
from .siglip import SiglipTower


class TinyLlavaVideo(nnx.Module):
    """Vision tower, connector and language model."""

    def __init__(self, config: Config, rngs: nnx.Rngs) -> None:
        """Make it with random weights; `nnx.eval_shape` of it takes no memory."""
        self.config = config
        self.vision_tower = SiglipTower(config.vision, rngs)
        sizes = config.vision.hidden_size, config.text.hidden_size
        self.connector = Resampler(config.resampler, *sizes, rngs)
        self.language_model = Decoder(config.text, rngs)

    def encode_video(self, pixels: jax.Array) -> jax.Array:
        """Maps ``[batch, frames, size, size, 3]`` in -1 to 1 to ``[batch, queries, hidden]``.

        Raises:
            InputError: the frames have another size, or too few tokens for the groups.
        """
        batch, frames, *image = pixels.shape
        dtype = self.connector.linear.kernel.dtype
        x = self.vision_tower.features(pixels.reshape(batch * frames, *image).astype(dtype))
        return self.connector(x.reshape(batch, -1, x.shape[-1]))

    def embed_prompt(self, pixels: jax.Array, before: jax.Array, after: jax.Array) -> jax.Array:
        """Embeddings of the text before and after the video (ids ``[batch, n]``) around it.

        Raises:
            InputError: the frames do not fit, or all together is longer than the context.
        """
        self._checked_length(before, after)
        first, last = map(self.language_model.embed, (before, after))
        video = self.encode_video(pixels).astype(first.dtype)
        return jnp.concatenate((first, video, last), axis=1)

    def __call__(self, pixels: jax.Array, before: jax.Array, after: jax.Array) -> jax.Array:
        """Logits at every position, ``[batch, before + queries + after, vocabulary]``."""
        x = self.embed_prompt(pixels, before, after)
        return self.language_model.logits(self.language_model.hidden_states(x)[0][-1])

    def generate(
        self,
        pixels: jax.Array,
        before: jax.Array,
        after: jax.Array,
        key: jax.Array | None = None,
        *,
        max_new_tokens: int,
        eos: tuple[int, ...] = (),
        temperature: float = 0.0,
        top_p: float = 1.0,
    ) -> jax.Array:
        """Tokens of the answers, int32 ``[batch, max_new_tokens]``.

        With `temperature` 0 the likeliest token is taken, otherwise `key` draws one from the
        likeliest that together have the probability `top_p`. After a token of `eos` an answer is
        filled up with that token; when all have one, the loop ends.

        Raises:
            InputError: the inputs do not fit, or the answer has no room in the context.
        """
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens: {max_new_tokens} is given; ask for at least one")
        if temperature < 0 or not 0 < top_p <= 1:
            raise InputError(
                f"temperature: {temperature} and top_p: {top_p} are given; the first must not be "
                "negative, the second must be above 0 and at most 1"
            )
        if temperature and key is None:
            raise InputError("key: sampling needs one; pass jax.random.key(seed)")
        length, batch = self._checked_length(before, after, max_new_tokens), len(before)
        lm, choose = self.language_model, partial(next_token, temperature=temperature, top_p=top_p)
        x = self.embed_prompt(pixels, before, after)
        states, cache = lm.hidden_states(x, lm.empty_cache(batch, length + max_new_tokens))
        ends = jnp.asarray(eos or (-1,), jnp.int32)

        def pick(states: list[jax.Array], step: jax.Array | int) -> jax.Array:
            drawn = None if key is None else jax.random.fold_in(key, step)
            return choose(lm.logits(states[-1][:, -1]), drawn)

        def advance(carry: tuple[Any, ...]) -> tuple[Any, ...]:
            step, tokens, done, cache = carry
            last = jax.lax.dynamic_index_in_dim(tokens, step - 1, axis=1)
            states, cache = lm.hidden_states(lm.embed(last), cache, length + step - 1)
            new = jnp.where(done, last[:, 0], pick(states, step))
            tokens = jax.lax.dynamic_update_index_in_dim(tokens, new, step, axis=1)
            return step + 1, tokens, done | jnp.isin(new, ends), cache

        def goes_on(carry: tuple[Any, ...]) -> jax.Array:
            step, _, done, _ = carry
            return (step < max_new_tokens) & ~done.all()

        first = pick(states, 0)
        tokens = jnp.broadcast_to(first[:, None], (batch, max_new_tokens))
        carry = jnp.int32(1), tokens, jnp.isin(first, ends), cache
        step, tokens, _, _ = jax.lax.while_loop(goes_on, advance, carry)
        left = jnp.arange(max_new_tokens) >= step
        final = jax.lax.dynamic_index_in_dim(tokens, step - 1, axis=1)
        return jnp.where(left, final, tokens)

    def _checked_length(self, before: jax.Array, after: jax.Array, answer: int = 0) -> int:
        """The length of the prompt, if it leaves room for an answer."""
        length = before.shape[1] + self.config.resampler.num_queries + after.shape[1]
        if length + answer > self.config.context:
            raise InputError(
                f"prompt: it takes {length} positions with the video, the answer {answer}, and the "
                f"context has {self.config.context}; shorten the question or the history, or ask "
                "for fewer tokens"
            )
        return length


def next_token(
    logits: jax.Array, key: jax.Array | None, *, temperature: float, top_p: float
) -> jax.Array:
    """A token for each row of ``[batch, vocabulary]``, int32 ``[batch]`` (see `generate`)."""
    if not temperature:
        return logits.argmax(-1).astype(jnp.int32)
    logits = logits / temperature
    if top_p < 1:
        ordered = -jnp.sort(-logits, axis=-1)
        before = jnp.cumsum(nnx.softmax(ordered), axis=-1) - nnx.softmax(ordered)
        least = jnp.where(before < top_p, ordered, jnp.inf).min(-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.random.categorical(key, logits).astype(jnp.int32)


class OneKey:
    """Stands in for `nnx.Rngs` where only shapes matter.

    That would count in the trace, in time quadratic in the layers.
    """

    def params(self) -> jax.Array:
        """The same key every time."""
        return jax.random.key(0)


def abstract(config: Config) -> TinyLlavaVideo:
    """The model with shapes and dtypes in place of its parameters."""
    return nnx.eval_shape(lambda: TinyLlavaVideo(config, OneKey()))


def functional(
    model: TinyLlavaVideo, method: str = "__call__", **options: Any
) -> tuple[Callable[..., Any], nnx.State]:
    """A method of the model as a function of ``(params, *inputs)``, and the parameters."""
    graph, params = nnx.split(model)

    def apply(params: Any, *inputs: Any) -> Any:
        return getattr(nnx.merge(graph, params), method)(*inputs, **options)

    return apply, params
