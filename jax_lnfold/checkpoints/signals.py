"""Signals that end a command: it removes what it was about to make, and does so undisturbed."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread
from types import FrameType

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # the last is not everywhere
_DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)


class Stopped(KeyboardInterrupt):
    """The process was asked to end, by the signal `number`."""

    def __init__(self, number: int) -> None:
        """`number` as the system knows it."""
        name = signal.Signals(number).name
        super().__init__("interrupted" if name == "SIGINT" else f"ended by {name}")
        self.number = number


class _State:
    """The signal that came first, and how many `undisturbed` parts we are in."""

    number: int | None = None
    depth: int = 0


@contextmanager
def stoppable() -> Iterator[None]:
    """Raise `Stopped` where a signal would end the process at once, if this is the main thread.

    Signals that are ignored (`nohup`) or handled otherwise are left to that.
    """
    if current_thread() is not main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    mine = {number: handler for number, handler in before.items() if handler in _DEFAULTS}
    try:
        for number in mine:
            signal.signal(number, _stop)
        yield
    finally:
        for number, handler in mine.items():
            signal.signal(number, handler)
        _State.number = None


def _stop(number: int, frame: FrameType | None) -> None:
    del frame
    if _State.number is None:  # otherwise we are ending already
        _State.number = number
        if not _State.depth:
            raise Stopped(number)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Where a signal would leave something half done, it is heeded at the end instead."""
    _State.depth += 1
    try:
        yield
    finally:
        _State.depth -= 1
    if _State.number is not None and not _State.depth:
        raise Stopped(_State.number)
