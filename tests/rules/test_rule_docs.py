"""Every rule says what it does: in words, by its formula, and by examples that are true."""

from __future__ import annotations

import doctest
import re
import sys
from collections.abc import Callable
from importlib import import_module
from pkgutil import walk_packages
from typing import Any

import pytest

from jax_lnfold import rules
from jax_lnfold.analysis import shift_algebra as response
from jax_lnfold.analysis import shift_example
from jax_lnfold.analysis import shift_rules as arithmetic
from jax_lnfold.program.graph import Op
from jax_lnfold.rules import RULES, example

FORMULA = re.compile(r"``[^`]*=[^`]*``")
READS = re.compile(r"Reads\s([^.]*)\.")
MODULES = [arithmetic, response, shift_example] + [
    import_module(m.name) for m in walk_packages(rules.__path__, f"{rules.__name__}.")
]
NAMES = {**vars(rules), **vars(example), **vars(shift_example)}
EXAMPLES = {
    test.name: test
    for module in MODULES
    for test in doctest.DocTestFinder().find(module, globs=NAMES)
    if test.examples
}


def documented(answer: Callable[..., Any]) -> Callable[..., Any]:
    """The function whose docstring speaks for a rule: itself, or the one that makes it."""
    return getattr(sys.modules[answer.__module__], answer.__qualname__.split(".")[0])


ANSWERS = {
    f"{fn.__module__}.{fn.__name__}": fn
    for rule in RULES.values()
    for answer in (rule.pull, rule.push, rule.uniform, rule.axes)
    if answer is not None
    for fn in [documented(answer)]
}
RESPONSES = {
    f"{arithmetic.__name__}.{fn.__qualname__}": fn
    for fn in vars(arithmetic.Arithmetic).values()
    if "Tracked" in getattr(fn, "__annotations__", {}).get("return", "")
}
DOCUMENTED = ANSWERS | RESPONSES


def test_rules_are_found() -> None:
    assert len(ANSWERS) > 50
    assert len(RESPONSES) > 4


@pytest.mark.parametrize("name", DOCUMENTED)
def test_a_rule_has_words_a_formula_and_an_example(name: str) -> None:
    text = DOCUMENTED[name].__doc__ or ""
    words = text.split("\n", 1)[0]
    assert len(words.split()) > 2
    assert not FORMULA.search(words), "a formula in place of words"
    assert FORMULA.search(text), "no formula"
    assert name in EXAMPLES, "no example"


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_true_and_read_the_parameters_named(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: set[str] = set()

    class Noted(dict[str, Any]):
        """Parameters that note which of them are read."""

        def __getitem__(self, key: str) -> Any:
            read.add(key)
            return super().__getitem__(key)

        def get(self, key: str, default: Any = None) -> Any:
            read.add(key)
            return super().get(key, default)

    monkeypatch.setattr(Op, "params", property(lambda op: Noted(op.eqn.params)))
    printed: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    failed, _ = runner.run(EXAMPLES[name], out=printed.append)
    assert not failed, "".join(printed)
    told = READS.search(EXAMPLES[name].docstring or "")
    named = set(re.findall(r"`(\w+)`", told[1])) if told else set()
    assert named <= read
    if name in ANSWERS:  # around a response are other equations, with parameters
        assert read <= named
