"""What a folded model keeps to itself, and what of it goes into copies and pickles."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable, Hashable
from copy import deepcopy
from functools import partial
from threading import RLock
from typing import Any

from ._compat import at_clear_caches
from .errors import FoldError
from .trees import first_line

LIMIT = 256
"""So many programs of one folded model are kept: those used last."""


class Programs:
    """The programs made for the last signatures, until `jax.clear_caches()`; none in a copy."""

    def __init__(self) -> None:
        """Start without programs."""
        self._lock = RLock()
        self._kept: OrderedDict[Hashable, Any] = OrderedDict()
        self._watch: Any = None

    def get(self, signature: Hashable) -> Any:
        """The program for a signature, None if it is to be made."""
        with self._lock:
            program = self._kept.get(signature)
            if program is not None:
                self._kept.move_to_end(signature)
            return program

    def put(self, signature: Hashable, program: Any) -> None:
        """Keep a program, and let go of the one not used for the longest time."""
        with self._lock:
            if not self._kept:
                self._watch = at_clear_caches(partial(_clear, self._kept, self._lock))
            self._kept[signature] = program
            if len(self._kept) > LIMIT:
                self._kept.popitem(last=False)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, or what is read from a pickle, makes its own."""
        return Programs, ()


def _clear(kept: OrderedDict[Hashable, Any], lock: Any) -> None:
    with lock:
        kept.clear()


class FreshLock:
    """A lock that a thread may take again, of which every copy is another one."""

    def __init__(self) -> None:
        """Start unlocked."""
        self.lock = RLock()

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is not locked."""
        return FreshLock, ()


class ApplyFn:
    """The function that was folded: a pickle that cannot hold it says what to keep instead."""

    def __init__(self, function: Callable[..., Any]) -> None:
        """Hold a function."""
        self.function = function

    def __copy__(self) -> ApplyFn:
        """Functions are copied by `copy`, whether they can be pickled or not."""
        return ApplyFn(self.function)

    def __deepcopy__(self, memo: dict[int, Any]) -> ApplyFn:
        """The same with what a function is bound to."""
        return ApplyFn(deepcopy(self.function, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        """Raise a `FoldError` if the function cannot be pickled."""
        try:
            pickle.dumps(self.function)
        except Exception as error:  # whatever objects say that do not want to be pickled
            raise FoldError(
                f"apply_fn: cannot be pickled ({first_line(error)}); fold a function of a module, "
                "or pickle folded.plan and folded.params, and fold the params where they are read"
            ) from error
        return ApplyFn, (self.function,)
