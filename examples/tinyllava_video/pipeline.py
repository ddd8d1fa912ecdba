"""Frames and questions in, answers out, with the model folded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jax_lnfold

from .config import Config
from .errors import InputError
from .generation import Decoding, Generation
from .model import TinyLlavaVideo, functional
from .text import Prompt, decode, encode_prompt, eos_ids

if TYPE_CHECKING:  # a slow import
    from transformers import PreTrainedTokenizerBase

History = Sequence[tuple[str, str]]

SHORTEST = 32
"""Prompts are filled up to that many tokens behind the video, or twice, four times, ... as many."""

PIECE = 8
"""After so many tokens more of an answer is shown."""


@dataclass(frozen=True)
class Answer:
    """A text, and whether it was cut because it is as long as answers may be."""

    text: str
    cut: bool


class Inputs(NamedTuple):
    """A batch of prompts as `TinyLlavaVideo.begin` takes them."""

    before: np.ndarray
    after: np.ndarray
    empty: np.ndarray


def check_ids(ids: Iterable[np.ndarray], config: Config) -> None:
    """Whether the embedding has a row for each of them: JAX reads past its end without a word.

    Raises:
        InputError: it has not.
    """
    largest = max(int(part.max(initial=0)) for part in ids)
    if largest >= config.text.vocab_size:
        raise InputError(
            f"tokenizer: it gives the id {largest}, and the model knows {config.text.vocab_size} "
            "tokens; take the tokenizer that belongs to the checkpoint"
        )


def batch_of(prompts: Sequence[Prompt], config: Config, max_new_tokens: int) -> Inputs:
    """Prompts of unequal lengths, filled up in front of what is behind the video.

    Raises:
        InputError: they leave no room for the answer, or have ids that the model does not know.
    """
    taken = len(prompts[0].before) + config.resampler.num_queries
    longest, room = max(len(p.after) for p in prompts), config.context - taken - max_new_tokens
    if longest > room:
        raise InputError(
            f"prompt: it takes {taken + longest} positions with the video, the answer "
            f"{max_new_tokens}, and the context has {config.context}; shorten the question or the "
            "history, or ask for fewer tokens"
        )
    check_ids((part for p in prompts for part in (p.before, p.after)), config)
    length = min(room, SHORTEST << ((longest - 1) // SHORTEST).bit_length())
    empty = np.array([length - len(p.after) for p in prompts], np.int32)
    after = [np.pad(p.after, (n, 0)) for p, n in zip(prompts, empty, strict=True)]
    return Inputs(np.stack([p.before for p in prompts]), np.stack(after), empty)


class Pipeline:
    """A model with its tokenizer and its way of answering.

    A video is encoded by one program, a prompt is read by a second one, and a third makes the
    answer. All are folded together when the first video comes; with `fold` false they are run as
    they are. `report` is that of the fold. New questions need no new program: prompts are filled up
    to a few lengths. With `donate` true the fold takes the memory of the parameters that it edits:
    `model`, as it was given, cannot be used any more, `self.model` can.
    """

    def __init__(
        self,
        model: TinyLlavaVideo,
        tokenizer: PreTrainedTokenizerBase,
        *,
        fold: bool = True,
        donate: bool = False,
        **options: Any,
    ) -> None:
        """Answers are made as `Decoding` says; `options` are its fields."""
        self.tokenizer, self.config = tokenizer, model.config
        self.fold, self.donate = fold, donate
        self.report: jax_lnfold.Report | None = None
        self.decoding = Decoding(**options, eos=eos_ids(tokenizer))
        self._graph = nnx.graphdef(model)
        encode, self._params = functional(model, "encode_video")
        begin, advance = (
            functional(model, method, decoding=self.decoding)[0] for method in ("begin", "advance")
        )
        self._originals = {"encode": encode, "begin": begin, "advance": advance}
        self._run: dict[str, Any] = {}

    def encode(self, pixels: np.ndarray) -> jax.Array:
        """What answers are read from, for any number of questions: ``[1, queries, hidden]``.

        Args:
            pixels: ``[frames, size, size, 3]`` as `preprocess` gives them.

        Raises:
            InputError: the frames do not fit.
        """
        if not self._run:
            self._prepare(pixels[None])
        return self._run["encode"](self._params, pixels[None])

    def ask(
        self,
        video: jax.Array,
        questions: Sequence[str],
        histories: Sequence[History] | None = None,
        seed: int = 0,
    ) -> list[Answer]:
        """Answers to questions about a video, all at once.

        Args:
            video: from `encode`.
            questions: see `encode_prompt`.
            histories: of each question, those before it and their answers.
            seed: decides what is drawn where answers are sampled.

        Raises:
            InputError: a question or the length of the answer does not fit.
        """
        if not questions:
            return []
        *_, tokens = self._tokens(video, questions, histories, seed, self.decoding.max_new_tokens)
        return [self._answer(row) for row in tokens]

    def stream(
        self, video: jax.Array, question: str, history: History = (), seed: int = 0
    ) -> Iterator[Answer]:
        """The answer to one question as far as it is there, again and again."""
        for tokens in self._tokens(video, [question], [history], seed, PIECE):
            yield self._answer(tokens[0])

    def answer(
        self, pixels: np.ndarray, question: str, history: History = (), seed: int = 0
    ) -> str:
        """The answer to a question about these frames."""
        return self.ask(self.encode(pixels), [question], [history], seed)[0].text

    @property
    def model(self) -> TinyLlavaVideo:
        """The model with the parameters that are used; folded ones serve any code of the model."""
        return nnx.merge(self._graph, self._params)

    def _tokens(
        self,
        video: jax.Array,
        questions: Sequence[str],
        histories: Sequence[History] | None,
        seed: int,
        piece: int,
    ) -> Iterator[np.ndarray]:
        """The tokens of all answers, ``[batch, tokens so far]``."""
        histories = histories or [()] * len(questions)
        prompts = [
            encode_prompt(self.tokenizer, question, history)
            for question, history in zip(questions, histories, strict=True)
        ]
        most = self.decoding.max_new_tokens
        given = batch_of(prompts, self.config, most)
        videos = jnp.broadcast_to(video, (len(prompts), *video.shape[1:]))
        keys = (jax.random.key(seed),) if self.decoding.temperature else ()
        state = self._run["begin"](self._params, videos, *given, *keys)
        for limit in range(piece, most + piece, piece):
            if most > 1:
                state = self._run["advance"](self._params, state, jnp.int32(min(limit, most)))
            yield np.asarray(state.tokens)[:, : int(state.step)]
            if bool(state.done.all()):
                return

    def _answer(self, tokens: np.ndarray) -> Answer:
        ends = np.flatnonzero(np.isin(tokens, self.decoding.eos))
        text = decode(self.tokenizer, tokens[: ends[0]] if len(ends) else tokens)
        return Answer(text, cut=not len(ends) and len(tokens) == self.decoding.max_new_tokens)

    def _prepare(self, pixels: np.ndarray) -> None:
        run = self._originals
        if self.fold:
            try:
                folded = jax_lnfold.fold(
                    run, self._params, self._examples(pixels), donate=self.donate
                )
            except jax_lnfold.TraceError as error:
                raise error.__cause__ or error from None  # what the model says of its inputs
            run = {name: each.apply for name, each in folded.items()}
            self._params, self.report = folded.params, folded.report
        # The cache is as large as many layers: `advance` writes into the one that it is given.
        donated = {"advance": (1,)}
        self._run = {n: jax.jit(f, donate_argnums=donated.get(n, ())) for n, f in run.items()}

    def _examples(self, pixels: np.ndarray) -> dict[str, tuple[Any, ...]]:
        """Inputs of each function, as far as shapes matter."""
        shape = partial(jax.eval_shape, self._originals["encode"], self._params)
        prompts = [encode_prompt(self.tokenizer, "?")]
        given: tuple[Any, ...] = (
            shape(pixels),
            *batch_of(prompts, self.config, self.decoding.max_new_tokens),
        )
        if self.decoding.temperature:
            given += (jax.random.key(0),)
        state: Generation = jax.eval_shape(self._originals["begin"], self._params, *given)
        return {"encode": (pixels,), "begin": given, "advance": (state, jnp.int32(1))}
