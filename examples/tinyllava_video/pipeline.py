"""Frames and questions in, answers out, with the model folded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from flax import nnx

import jax_lnfold

from .model import TinyLlavaVideo, functional
from .text import decode, encode_prompt, eos_ids

if TYPE_CHECKING:  # a slow import
    from transformers import PreTrainedTokenizerBase


class Pipeline:
    """A model with its tokenizer and its way of answering.

    Video, prompt and the loop that makes the answer are one program, folded as a whole when the
    first question comes; with `fold` false it is run as it is. `report` is that of the fold. With
    `donate` true the fold takes the memory of the parameters that it edits: `model`, as it was
    given, cannot be used any more, `self.model` can.
    """

    def __init__(
        self,
        model: TinyLlavaVideo,
        tokenizer: PreTrainedTokenizerBase,
        *,
        fold: bool = True,
        donate: bool = False,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
    ) -> None:
        """Answers are made as `TinyLlavaVideo.generate` says."""
        self.tokenizer, self.temperature = tokenizer, temperature
        self.fold, self.donate = fold, donate
        self.report: jax_lnfold.Report | None = None
        options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
        eos = eos_ids(tokenizer)
        self._graph = nnx.graphdef(model)
        self._original, self._params = functional(model, "generate", eos=eos, **options)
        self._eos, self._run = eos, None

    def answer(
        self,
        pixels: np.ndarray,
        question: str,
        history: Sequence[tuple[str, str]] = (),
        seed: int = 0,
    ) -> str:
        """The answer to a question about a video.

        Args:
            pixels: ``[frames, size, size, 3]`` as `preprocess` gives them.
            question: see `encode_prompt`.
            history: questions and answers so far.
            seed: decides what is drawn where answers are sampled.

        Raises:
            InputError: the frames, the question or the length of the answer do not fit.
        """
        prompt = encode_prompt(self.tokenizer, question, history)
        inputs: tuple[Any, ...] = (pixels[None], prompt.before[None], prompt.after[None])
        if self.temperature:
            inputs += (jax.random.key(seed),)
        if self._run is None:
            self._prepare(inputs)
        (tokens,) = np.asarray(self._run(self._params, *inputs))
        ends = np.flatnonzero(np.isin(tokens, self._eos))
        return decode(self.tokenizer, tokens[: ends[0]] if len(ends) else tokens)

    @property
    def model(self) -> TinyLlavaVideo:
        """The model with the parameters that are used; folded ones serve any code of the model."""
        return nnx.merge(self._graph, self._params)

    def _prepare(self, inputs: tuple[Any, ...]) -> None:
        run = self._original
        if self.fold:
            try:
                folded = jax_lnfold.fold(run, self._params, *inputs, donate=self.donate)
            except jax_lnfold.TraceError as error:
                raise error.__cause__ or error from None  # what the model says of its inputs
            run, self._params, self.report = folded.apply, folded.params, folded.report
        self._run = jax.jit(run)
