"""Run every test in double precision, so that contracts can be checked to 1e-12.

Eight simulated devices stand in for a real mesh.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from importlib.metadata import version

FLAGS = "--xla_force_host_platform_device_count=8"
if version("jax").startswith("0.10."):  # later ones do not know it; halves the time to compile
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", FLAGS)

import jax  # noqa: E402
import pytest  # noqa: E402

gc.set_threshold(100_000, 50, 100)  # the default takes a tenth of the time of all tests
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_disable_most_optimizations", True)  # most of the time is compilation


@pytest.fixture
def explicit_ranks() -> Iterator[None]:
    """No broadcast adds axes silently; the zoo does, as the models it is modelled on do."""
    with jax.numpy_rank_promotion("raise"):
        yield
