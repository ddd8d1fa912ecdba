"""The text of conversations, its token ids around the video, and answers from ids."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

from examples.tinyllava_video.errors import InputError
from examples.tinyllava_video.text import (
    byte_tokenizer,
    decode,
    encode_prompt,
    eos_ids,
    load_tokenizer,
)

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


def run(code: str) -> tuple[str, str]:
    """What Python prints in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout, done.stderr


# The text.


PLACED = ["What is it?", "<image>\nWhat is it?", "What is it?\n<image>", " \n What <image>is it?\t"]
TEXT_ONLY = ["{{ 7 * 7 }}", "{% if %}", '"quoted" \\n', "a  b\n\nc", "<b>&amp;</b>", "猫は?"]


@pytest.mark.parametrize(
    ("question", "asked"),
    [*((q, PLACED[0]) for q in PLACED), *((q, q) for q in TEXT_ONLY)],
)
def test_first_question(tokenizer: Any, question: str, asked: str) -> None:
    """The video is in front, wherever the placeholder was, or without one.

    The template neither runs nor changes questions.
    """
    prompt = encode_prompt(tokenizer, question)
    assert prompt.text == f"{SYSTEM}USER: <image>\n{asked} ASSISTANT:"


def test_later_questions(tokenizer: Any) -> None:
    """Only the first question has the video; answers are as they were."""
    history = [("Who? <image>", "A cat."), ("  Where ", " On the\n\nroof. ")]
    prompt = encode_prompt(tokenizer, "\nWhy?\n", history)
    assert prompt.text == SYSTEM + (
        "USER: <image>\nWho? ASSISTANT: A cat.<|endoftext|>"
        "USER: Where ASSISTANT:  On the\n\nroof. <|endoftext|>"
        "USER: Why? ASSISTANT:"
    )
    assert encode_prompt(tokenizer, "Why?", iter(history)).text == prompt.text
    assert encode_prompt(tokenizer, "Why?", map(list, history)).text == prompt.text


def test_a_template_of_the_tokenizer_does_not_matter() -> None:
    other = byte_tokenizer()
    other.chat_template = "{{ messages[0]['content'] }}"
    assert encode_prompt(other, "Why?").text == SYSTEM + "USER: <image>\nWhy? ASSISTANT:"


@pytest.mark.parametrize(
    ("question", "history", "message"),
    [
        ("", (), "question: there is no question in ''; write one"),
        (" \n", (), r"question: there is no question in ' \n'; write one"),
        (" <image> ", (), "question: there is no question in ' <image> '; write one"),
        ("<im<image>age>", (), "question: there is no question in"),
        ("<image><image>a", (), "question: contains <image> 2 times; there is one video"),
        (None, (), "question: a question must be a string, not None"),
        (b"a", (), "question: a question must be a string, not b'a'"),
        ("<image>b", [("a", "b")], "question: contains <image> but is not the first question"),
        ("c", [("a", "b"), ("<image>", "")], "history[1]: contains <image> but is not the first"),
        ("c", [("<image><image>a", "b")], "history[0]: contains <image> 2 times"),
        ("c", [("a", "b"), ("  ", "")], "history[1]: there is no question in '  '"),
        ("c", [("a", "a <image>")], "history[0]: the answer contains <image>; take it out"),
        ("c", [("a", None)], "history[0]: the answer must be a string, not None"),
        ("c", [("a", "b"), (3, "b")], "history[1]: a question must be a string, not 3"),
        ("c", [("a", "b", "c")], "history: must be pairs of a question and its answer"),
        ("c", ["abc"], "history: must be pairs of a question and its answer"),
        ("c", 7, "history: must be pairs of a question and its answer"),
    ],
)
def test_bad_conversations(tokenizer: Any, question: Any, history: Any, message: str) -> None:
    with pytest.raises(InputError, match="^" + re.escape(message)):
        encode_prompt(tokenizer, question, history)


@pytest.mark.parametrize("text", ["<image", "image>", "<Image>", "<video>", "< image >"])
def test_what_only_looks_like_the_placeholder(tokenizer: Any, text: str) -> None:
    history = [(f"a {text}", f"b {text}")]
    prompt = encode_prompt(tokenizer, f"c {text}", history)
    assert prompt.text == SYSTEM + (
        f"USER: <image>\na {text} ASSISTANT: b {text}<|endoftext|>USER: c {text} ASSISTANT:"
    )


# Its ids.


def test_ids_of_bytes(tokenizer: Any) -> None:
    """One for each byte, and what is between the two parts is the placeholder."""
    prompt = encode_prompt(tokenizer, "Où?", [("a", "b")])
    assert prompt.before.dtype == prompt.after.dtype == np.int32
    before, after = prompt.text.split("<image>")
    assert before == SYSTEM + "USER: "
    assert len(prompt.before) == len(before)
    assert len(prompt.after) == len("\na ASSISTANT: b") + 1 + len("USER: Où? ASSISTANT:".encode())
    assert tokenizer.decode(prompt.before) == before
    assert tokenizer.decode(prompt.after) == after
    assert (prompt.after == 256).sum() == 1, "the end of the first answer"


def test_only_the_first_part_keeps_the_token_that_begins_texts() -> None:
    plain, begins = byte_tokenizer(), byte_tokenizer()
    begins.add_special_tokens({"bos_token": "<s>"})
    begins.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", begins.bos_token_id)]
    )
    assert begins("a").input_ids[0] == begins.bos_token_id == 257
    expected, found = (encode_prompt(kind, "What?") for kind in (plain, begins))
    np.testing.assert_array_equal(found.before, [257, *expected.before])
    np.testing.assert_array_equal(found.after, expected.after)


def test_each_part_for_itself() -> None:
    """Not cut from the ids of the whole, where merges reach over the border."""
    merging = merging_tokenizer([("Ġ", "<"), (">", "Ċ"), (":", "Ġ")])
    prompt = encode_prompt(merging, "What?")
    before, after = prompt.text.split("<image>")
    np.testing.assert_array_equal(prompt.before, merging(before).input_ids)
    np.testing.assert_array_equal(prompt.after, merging(after).input_ids)
    assert merging.convert_ids_to_tokens([int(prompt.before[-1])]) == [":Ġ"]
    assert merging.convert_ids_to_tokens([int(prompt.after[0])]) == ["Ċ"]
    assert ">Ċ" in merging.tokenize(prompt.text)


def merging_tokenizer(merges: list[tuple[str, str]]) -> Any:
    backend = byte_tokenizer().backend_tokenizer
    vocabulary = backend.get_vocab(with_added_tokens=False)
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    backend.model = models.BPE(vocabulary, merges)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


# From ids.


def test_every_byte_round_trips(tokenizer: Any) -> None:
    assert len(tokenizer) == 257
    symbols = tokenizer.convert_ids_to_tokens(list(range(257)))
    assert len(set(symbols)) == 257
    assert tokenizer.convert_tokens_to_ids(symbols) == list(range(257))
    planes = range(1, 0x800), range(0x800, 0xD800, 97), range(0xE000, 0xFFF0, 97)
    text = "".join(map(chr, [*chain(*planes), 0x1F600, 0x10FFFF]))
    text += " . , ' s 're  \r\n\t é e\u0301"
    ids = tokenizer(text).input_ids
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    assert len(set(ids)) == len(set(text.encode())) > 235, "one to one; some are never in UTF-8"


def test_decode(tokenizer: Any) -> None:
    ids = [*tokenizer("  A cat .\n").input_ids, 256]
    assert decode(tokenizer, ids) == "A cat ."
    assert decode(tokenizer, np.array(ids, np.int32)) == "A cat ."
    assert decode(tokenizer, iter(ids[:-1])) == "A cat ."
    assert decode(tokenizer, [256]) == decode(tokenizer, []) == ""
    cleaned = byte_tokenizer()  # as Phi-2's files ask for, whatever version writes the answer
    cleaned.init_kwargs["clean_up_tokenization_spaces"] = True
    text = tokenizer("Is n't it , you 're here ? Yes ! A ' b ' c . 's").input_ids
    assert decode(cleaned, text) == "Isn't it, you're here? Yes! A'b'c.'s"
    assert decode(tokenizer, text) == "Is n't it , you 're here ? Yes ! A ' b ' c . 's"
    assert decode(tokenizer, tokenizer("é").input_ids[:1]) == "\ufffd", "half a letter"


def test_what_ends_an_answer() -> None:
    tokenizer = byte_tokenizer()
    assert eos_ids(tokenizer) == (256,)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    assert eos_ids(tokenizer) == (256, 257)
    tokenizer.add_special_tokens({"unk_token": "<|endoftext|>"})
    assert eos_ids(tokenizer) == (256, 257), "as of Qwen2 and Phi-2, where it is also that"


@pytest.mark.parametrize(("end", "ids"), [("</s>", (2,)), (None, ())])
def test_unknown_words_do_not_end_an_answer(end: str | None, ids: tuple[int, ...]) -> None:
    """Those get an id as well, where the tokenizer has no token of the model's."""
    words = models.WordLevel({"<unk>": 0, "a": 1, "</s>": 2}, unk_token="<unk>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), unk_token="<unk>", eos_token=end
    )
    assert tokenizer.convert_tokens_to_ids("<|endoftext|>") == 0
    assert eos_ids(tokenizer) == ids


# From a directory.


def test_saved_and_loaded(tmp_path: Path, tokenizer: Any) -> None:
    """The file of the whole model beside it is neither understood nor needed."""
    tokenizer.save_pretrained(tmp_path)
    classes = {"AutoConfig": "configuration.TinyLlavaConfig"}
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "tinyllava", "auto_map": classes})
    )
    loaded = load_tokenizer(str(tmp_path))
    text = "A cat, déjà vu<|endoftext|>"
    assert loaded(text).input_ids == tokenizer(text).input_ids
    assert eos_ids(loaded) == (256,)
    code = "from examples.tinyllava_video.text import *\n"
    code += f"print(len(load_tokenizer({str(tmp_path)!r})))"
    assert run(code) == ("257\n", "")


def qwen2_files(path: Path) -> None:
    """As the public checkpoint has them."""
    vocabulary = byte_tokenizer().backend_tokenizer.get_vocab(with_added_tokens=False)
    vocabulary |= {"Ġt": 256, "he": 257}
    (path / "vocab.json").write_text(json.dumps(vocabulary))
    (path / "merges.txt").write_text("#version: 0.2\nĠ t\nh e\n", encoding="utf-8")
    special = {"content": "<|endoftext|>", "special": True}
    (path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "Qwen2Tokenizer",
                "eos_token": "<|endoftext|>",
                "pad_token": "<|endoftext|>",
                "added_tokens_decoder": {"258": special},
            }
        )
    )


def test_vocabulary_and_merges(tmp_path: Path) -> None:
    qwen2_files(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.convert_ids_to_tokens(loaded("a the").input_ids) == ["a", "Ġt", "he"]
    assert eos_ids(loaded) == (258,)
    prompt = encode_prompt(loaded, "the")
    assert decode(loaded, prompt.after) == "the ASSISTANT:"
    assert len(prompt.after) == len("\nthe ASSISTANT:") - 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.rmdir(), "there is no directory .*"),
        (lambda path: (path.rmdir(), path.write_text("a")), "there is no directory .*"),
        (lambda path: None, r".* has none; it needs tokenizer\.json, or vocab\.json and merges"),
        (
            lambda path: (path / "config.json").write_text('{"model_type": "qwen2"}'),
            r".* has none; it needs tokenizer\.json",
        ),
        (
            lambda path: (qwen2_files(path), (path / "merges.txt").unlink()),
            r".* has none; it needs tokenizer\.json",
        ),
        (
            lambda path: (
                (path / "tokenizer.json").write_text("{"),
                (path / "tokenizer_config.json").write_text("{}"),
            ),
            r".* has none that can be read \(\w+Error\)",
        ),
    ],
)
def test_no_tokenizer(tmp_path: Path, make: Callable[[Path], object], message: str) -> None:
    (path := tmp_path / "checkpoint").mkdir()
    make(path)
    with pytest.raises(InputError, match=f"^tokenizer: {message}"):
        load_tokenizer(path)


# Imports.


def test_imports_are_quick_and_quiet() -> None:
    """Help and errors do not wait for transformers, which has its say about missing packages."""
    used = "import sys, examples.tinyllava_video.text as text, examples.tinyllava_video.video\n"
    slow = "{'jax', 'torch', 'transformers'}"
    assert run(used + f"print(sorted({slow} & set(sys.modules)))") == ("[]\n", "")
    code = used + "print(text.encode_prompt(text.byte_tokenizer(), 'a').text[-12:])"
    assert run(code) == ("a ASSISTANT:\n", "")
