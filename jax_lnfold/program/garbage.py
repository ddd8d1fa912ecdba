"""Python's garbage collector during an analysis."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """Collect no garbage meanwhile, if that is done at all.

    An analysis makes many objects that stay. While they add up, the collector would look at all
    objects of the process again and again, those of jax included: for deep models that took as
    long as the rest, and more than in proportion to their depth.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
