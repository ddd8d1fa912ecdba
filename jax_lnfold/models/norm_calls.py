"""Which module made which LayerNorm of a program: every call of one runs in a scope of its own."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count

import jax

from ..placement.place import Placement

_SCOPE = re.compile(r"jax_lnfold_norm_(\d+)_(\d+)")


class NormCalls:
    """Scopes for the calls of modules, by the key path of each module."""

    def __init__(self) -> None:
        """Start without modules."""
        self._paths: list[str] = []
        self._calls = count()

    @contextmanager
    def scope(self, path: str) -> Iterator[None]:
        """A scope that no other call has; to be entered where the module at `path` is called."""
        if path not in self._paths:
            self._paths.append(path)
        with jax.named_scope(f"jax_lnfold_norm_{self._paths.index(path)}_{next(self._calls)}"):
            yield

    def folded(self, placement: Placement) -> dict[str, int]:
        """The modules of which each call is one LayerNorm, and folded, with the number of these."""
        equations: dict[tuple[str, ...], Counter[int]] = defaultdict(Counter)
        for op in placement.graph.ops:
            # Only what the call itself computes: jax traces functions that it calls just once.
            if (found := _SCOPE.search(str(op.eqn.source_info.name_stack))) is not None:
                equations[found.groups()][id(op.eqn)] += 1
        folded = Counter(
            found.groups()
            for norm, is_folded in zip(placement.norms, placement.folded, strict=True)
            if is_folded and (found := _SCOPE.search(norm.module)) is not None
        )
        # A call in a function that jax has traced once stands at several places, each a norm.
        left = {call[0] for call, each in equations.items() if folded[call] != max(each.values())}
        numbers: Counter[str] = Counter()
        for (module, _), number in folded.items():
            if module not in left:
                numbers[self._paths[int(module)]] += number
        return dict(numbers)
