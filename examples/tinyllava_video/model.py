"""The whole model: frames and a prompt in, logits or answers out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from .config import Config
from .decoder import Decoder, Gap
from .errors import InputError
from .generation import Decoding, Generation
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
        return self._joined(self.encode_video(pixels), before, after)

    def _joined(self, video: jax.Array, before: jax.Array, after: jax.Array) -> jax.Array:
        first, last = map(self.language_model.embed, (before, after))
        return jnp.concatenate((first, video.astype(first.dtype), last), axis=1)

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
        **options: Any,
    ) -> jax.Array:
        """Tokens of the answers, int32 ``[batch, max_new_tokens]``; `options` are of `Decoding`.

        After a token of `eos` an answer is filled up with that token; when all have one, the loop
        ends.

        Raises:
            InputError: the inputs do not fit, or the answer has no room in the context.
        """
        decoding = Decoding(**options)
        self._checked_length(before, after, decoding.max_new_tokens)
        video = self.encode_video(pixels)
        state = self.begin(video, before, after, key=key, decoding=decoding)
        if decoding.max_new_tokens == 1:
            return state.tokens
        return self.advance(state, decoding.max_new_tokens, decoding=decoding).completed()

    def begin(
        self,
        video: jax.Array,
        before: jax.Array,
        after: jax.Array,
        empty: jax.Array | None = None,
        key: jax.Array | None = None,
        *,
        decoding: Decoding,
    ) -> Generation:
        """Read a prompt about what `encode_video` gave, and choose the first token.

        `empty` (int32 ``[batch]``) says how many ids at the front of each row of `after` only fill
        it up, so that prompts of unequal length are one batch, and new ones need no new program.

        Raises:
            InputError: the inputs do not fit, or the answer has no room in the context.
        """
        if decoding.temperature and key is None:
            raise InputError("key: sampling needs one; pass jax.random.key(seed)")
        lm, most, batch = self.language_model, decoding.max_new_tokens, len(before)
        length = self._checked_length(before, after, most)
        gap = None if empty is None else Gap(before.shape[1] + video.shape[1], empty)
        x = self._joined(video, before, after)
        states, cache = lm.hidden_states(x, lm.empty_cache(batch, length + most), gap=gap)
        state = Generation(
            step=jnp.int32(0),
            tokens=jnp.zeros((batch, most), jnp.int32),
            done=jnp.zeros(batch, bool),
            cache=cache or [],
            length=jnp.int32(length),
            gap=None if gap is None else Gap(jnp.int32(gap.start), gap.sizes),
            key=key,
        )
        return self._with_next(state, states[-1], decoding)

    def advance(
        self, state: Generation, limit: jax.Array | int, *, decoding: Decoding
    ) -> Generation:
        """Add tokens until there are `limit`, or all answers have ended."""
        lm = self.language_model

        def goes_on(state: Generation) -> jax.Array:
            return (state.step < limit) & ~state.done.all()

        def once(state: Generation) -> Generation:
            last = jax.lax.dynamic_index_in_dim(state.tokens, state.step - 1, axis=1)
            start = state.length + state.step - 1
            states, cache = lm.hidden_states(lm.embed(last), state.cache, start, state.gap)
            return self._with_next(state._replace(cache=cache or []), states[-1], decoding)

        return jax.lax.while_loop(goes_on, once, state)

    def _with_next(self, state: Generation, x: jax.Array, decoding: Decoding) -> Generation:
        """With the token that follows the last of the final hidden states; ended rows repeat."""
        new = decoding.next_token(self.language_model.logits(x[:, -1]), state.drawn())
        last = jax.lax.dynamic_index_in_dim(
            state.tokens, jnp.maximum(state.step - 1, 0), axis=1, keepdims=False
        )
        new = jnp.where(state.done, last, new)
        tokens = jax.lax.dynamic_update_index_in_dim(state.tokens, new, state.step, axis=1)
        ended = state.done | jnp.isin(new, jnp.asarray(decoding.eos or (-1,), jnp.int32))
        return state._replace(step=state.step + 1, tokens=tokens, done=ended)

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
