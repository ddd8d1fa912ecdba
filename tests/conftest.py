"""Run every test in double precision, so that contracts can be checked to 1e-12.

Eight simulated devices stand in for a real mesh.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import pytest

gc.set_threshold(100_000, 50, 100)  # the default takes a tenth of the time of all tests
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_disable_most_optimizations", True)  # most of the time is compilation


@pytest.fixture
def explicit_ranks() -> Iterator[None]:
    """No broadcast adds axes silently; the zoo does, as the models it is modelled on do."""
    with jax.numpy_rank_promotion("raise"):
        yield
