"""Which module made which LayerNorm of a program: every call of one is marked."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

from ..placement.place import Placement
from ..program.marks import mark, marks_in

_KIND = "norm"


class NormCalls:
    """Marks of the calls of modules, by the key path of each module."""

    def __init__(self) -> None:
        """Start without modules."""
        self._paths: list[str] = []
        self._calls = count()

    @contextmanager
    def mark(self, path: str) -> Iterator[None]:
        """A mark that no other call has, for a call of the module at `path`."""
        if path not in self._paths:
            self._paths.append(path)
        with mark(f"{_KIND}_{self._paths.index(path)}_{next(self._calls)}"):
            yield

    def marked(self, norm: type, path: str) -> type:
        """A subclass of a class of LayerNorms, for the module at `path`, that marks its calls."""
        calls = self

        class Marked(norm):
            def __call__(self, *inputs: Any, **keywords: Any) -> Any:
                with calls.mark(path):
                    return super().__call__(*inputs, **keywords)

        return Marked

    def folded(self, placement: Placement) -> dict[str, int]:
        """The modules of which each call is one LayerNorm, and folded, with the number of these."""
        equations: dict[str, Counter[int]] = defaultdict(Counter)
        for op in placement.graph.ops:
            # Only what the call itself computes: jax traces functions that it calls just once.
            for call in _calls(marks_in(str(op.eqn.source_info.name_stack))):
                equations[call][id(op.eqn)] += 1
        folded = Counter(
            call
            for norm, is_folded in zip(placement.norms, placement.folded, strict=True)
            if is_folded and norm.root is not None
            for call in _calls(norm.root.marks)
        )
        # A call in a function that jax has traced once stands at several places, each a norm.
        left = {
            self._path(call)
            for call, each in equations.items()
            if folded[call] != max(each.values())
        }
        numbers: Counter[str] = Counter()
        for call, number in folded.items():
            numbers[self._path(call)] += number
        return {path: number for path, number in numbers.items() if path not in left}

    def _path(self, call: str) -> str:
        _, module, _ = call.split("_")
        return self._paths[int(module)]


def _calls(marks: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(mark for mark in marks if mark.startswith(_KIND))
