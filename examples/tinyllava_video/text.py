"""Conversations as token ids around the place where the video goes, and answers from ids."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from .errors import InputError

if TYPE_CHECKING:  # a slow import
    from transformers import PreTrainedTokenizerBase

PLACEHOLDER = "<image>"
"""Where the video goes in a conversation; there is one."""

END_OF_ANSWER = "<|endoftext|>"

_SPACED = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")
"""What loses its spaces, one after the other."""

_VOCABULARIES = [["tokenizer.json"], ["vocab.json", "merges.txt"]]

CHAT_TEMPLATE = (
    '{{ "A chat between a curious user and an artificial intelligence assistant. The assistant '
    "gives helpful, detailed, and polite answers to the user's questions. \" }}"
    '{% for message in messages %}{% if message["role"] == "user" %}'
    '{{ "USER: " + ("<image>\\n" if loop.first else "") + message["content"] + " " }}'
    '{% else %}{{ "ASSISTANT: " + message["content"] + "<|endoftext|>" }}{% endif %}'
    '{% endfor %}{% if add_generation_prompt %}{{ "ASSISTANT:" }}{% endif %}'
)
"""A Jinja template; the public models with Qwen2.5 and with Phi-2 were trained with this text.

Its messages take turns, a user's first, and hold no placeholder.
"""


@dataclass(frozen=True, eq=False)
class Prompt:
    """A conversation whose last answer is still to come.

    Attributes:
        before: int32 (tokens,); the ids in front of the video.
        after: int32 (tokens,); those behind it.
        text: all of it, with the placeholder.
    """

    before: np.ndarray
    after: np.ndarray
    text: str


def load_tokenizer(directory: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint; nothing is downloaded and no code of the checkpoint runs.

    Raises:
        InputError: there is no such directory, or no tokenizer in it.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise InputError(f"tokenizer: there is no directory {directory}")
    # Without a vocabulary transformers 5 makes up an empty one.
    if not any(all((directory / name).is_file() for name in names) for names in _VOCABULARIES):
        choices = ", or ".join(" and ".join(names) for names in _VOCABULARIES)
        raise InputError(f"tokenizer: {directory} has none; it needs {choices}")
    transformers = _transformers()
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it warns of config.json, which is not its own
    try:
        return transformers.AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # whatever its parts raise, from OSError to TypeError
        raise InputError(
            f"tokenizer: {directory} has none that can be read ({type(error).__name__}); is it "
            "whole, with its tokenizer_config.json?"
        ) from error
    finally:
        transformers.logging.set_verbosity(verbosity)


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """One token for each byte of UTF-8, 256 in all, and `END_OF_ANSWER`, which is the last."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytewise = Tokenizer(models.BPE({symbol: n for n, symbol in enumerate(alphabet)}, []))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytewise.decoder = decoders.ByteLevel()
    return _transformers().PreTrainedTokenizerFast(
        tokenizer_object=bytewise,
        eos_token=END_OF_ANSWER,
        clean_up_tokenization_spaces=False,
    )


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, question: str, history: Sequence[tuple[str, str]] = ()
) -> Prompt:
    """Token ids of a conversation, up to where the assistant is to answer.

    The text in front of the video and the text behind it are tokenised each for itself; if the
    tokenizer begins texts with a token, only the first keeps it.

    Args:
        tokenizer: the model's own, or `byte_tokenizer`.
        question: what is asked now; stripped.
        history: questions and answers so far, the first in front. The conversation's first question
            may contain `PLACEHOLDER`, once; wherever that is, and also where there is none, the
            video goes in front of that question.

    Raises:
        InputError: a question is empty, the placeholder is in it twice or is anywhere else, or the
            history is not made of pairs of strings.
    """
    messages = [*_answered(history), ("user", _question("question", question, first=not history))]
    text = _written(tokenizer, messages, open_ended=True)
    before, after = halves(tokenizer, text)
    return Prompt(before, after, text)


def conversation(tokenizer: PreTrainedTokenizerBase, rounds: Sequence[tuple[str, str]]) -> str:
    """The text of a conversation that is over, with the placeholder.

    Raises:
        InputError: see `encode_prompt`.
    """
    return _written(tokenizer, _answered(rounds), open_ended=False)


def halves(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[np.ndarray, np.ndarray]:
    """The ids in front of the placeholder and behind it."""
    before, after = (tokenizer(piece).input_ids for piece in text.split(PLACEHOLDER))
    if after[:1] == [tokenizer.bos_token_id]:
        after = after[1:]
    return np.array(before, np.int32), np.array(after, np.int32)


def _answered(rounds: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Who says what; questions are stripped and lose their placeholder."""
    try:
        rounds = [(asked, answer) for asked, answer in rounds]
    except (TypeError, ValueError):
        raise InputError("history: must be pairs of a question and its answer") from None
    messages = []
    for n, (asked, answer) in enumerate(rounds):
        messages.append(("user", _question(f"history[{n}]", asked, first=n == 0)))
        if not isinstance(answer, str):
            raise InputError(f"history[{n}]: the answer must be a string, not {answer!r}")
        if PLACEHOLDER in answer:
            raise InputError(f"history[{n}]: the answer contains {PLACEHOLDER}; take it out")
        messages.append(("assistant", answer))
    return messages


def _written(
    tokenizer: PreTrainedTokenizerBase, messages: list[tuple[str, str]], *, open_ended: bool
) -> str:
    return tokenizer.apply_chat_template(
        [{"role": role, "content": content} for role, content in messages],
        chat_template=CHAT_TEMPLATE,
        tokenize=False,
        add_generation_prompt=open_ended,
    )


def _question(name: str, text: str, *, first: bool) -> str:
    """Stripped, and without the placeholder."""
    if not isinstance(text, str):
        raise InputError(f"{name}: a question must be a string, not {text!r}")
    if (count := text.count(PLACEHOLDER)) > first:
        problem = f"{count} times; there is one video" if first else "but is not the first question"
        raise InputError(f"{name}: contains {PLACEHOLDER} {problem}; take it out")
    question = text.replace(PLACEHOLDER, "").strip()
    if not question or PLACEHOLDER in question:
        raise InputError(f"{name}: there is no question in {text!r}; write one")
    return question


def decode(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> str:
    """An answer's text, without special tokens and stripped.

    Where the tokenizer's files ask for it (Phi-2's do), or do not say, spaces in front of
    punctuation go, as in the public code. `transformers` 5 warns instead, and leaves them.
    """
    text = tokenizer.decode(
        [int(token) for token in ids], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    if tokenizer.init_kwargs.get("clean_up_tokenization_spaces", True):
        for spaced in _SPACED:
            text = text.replace(spaced, spaced.strip())
    return text.strip()


def eos_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that end an answer: the tokenizer's own and `END_OF_ANSWER`, ascending.

    The public model stops at the latter whatever the tokenizer ends its texts with.
    """
    ids = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END_OF_ANSWER)} - {None}
    # A word that is not in the vocabulary may have the id of another, which does not end answers.
    ends = tokenizer.eos_token, END_OF_ANSWER
    return tuple(sorted(n for n in ids if tokenizer.convert_ids_to_tokens(n) in ends))


def _transformers() -> ModuleType:
    """The package, which otherwise says at once that it misses PyTorch."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    return transformers
