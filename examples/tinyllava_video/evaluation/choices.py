"""Which choice an answer names."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping

TAGGED = re.compile(r"<answer>\s*(.*?)\s*</answer>")
MARKS = ",.!?;:'"
"""Taken off both ends of an answer, one after the other."""


def chosen(answer: str, choices: Mapping[str, str]) -> str | None:
    """The letter that an answer begins with, or else the last that it names; None if it names none.

    A letter is named in brackets, or else standing alone; in an answer of more than five words,
    which names none, also by the text of its choice. Where several are named, the last counts.
    """
    text = answer.strip()
    for mark in MARKS:
        text = text.strip(mark)
    if text[:1] in choices:
        return text[0]
    text = f" {text} "
    lower = text.lower()
    places = {letter: text.rfind(f"({letter})") for letter in choices}
    if max(places.values()) < 0:
        places = {letter: text.rfind(f" {letter} ") for letter in choices}
    if max(places.values()) < 0 and len(text.split()) > 5:
        places = {letter: lower.rfind(said.lower()) for letter, said in choices.items()}
    best = max(places, key=lambda letter: places[letter])
    return best if places[best] >= 0 else None


def chosen_after_thinking(answer: str, choices: Mapping[str, str]) -> str | None:
    """The same of a model that thinks first: what counts is between the tags of its answer."""
    found = TAGGED.search(answer)
    text = found[1].strip() if found else ""
    if text[:1].upper() in choices:
        return text[0].upper()
    named = (x for x in choices if f"({x})" in text or f"({x.lower()})" in text)
    return next(named, None)


def or_drawn(letter: str | None, choices: Mapping[str, str], rng: random.Random) -> str:
    """The letter, or one at random, as the authors count answers that name none."""
    return rng.choice([*choices]) if letter is None else letter


def says(answer: str, truth: str) -> bool:
    """Whether an open answer counts: the shorter of both is in the longer one."""
    one, other = answer.lower(), truth.lower()
    return other in one if len(one) > len(other) else one in other
