"""How tests run: in double precision, so that contracts can be checked to 1e-12, on the CPU.

Eight simulated devices stand in for a real mesh. Set ``JAX_PLATFORMS`` to run tests on others.

``python -m pytest`` runs what guards the engine; with ``--all``, also what is `WIDE`. Whatever is
named on the command line runs in any case.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

FLAGS = "--xla_force_host_platform_device_count=8"
if version("jax").startswith("0.10."):  # later ones do not know it; halves the time to compile
    FLAGS += " --xla_cpu_use_fusion_emitters=false"
# More may come from whoever calls, as --xla_cpu_max_isa=AVX2.
os.environ["XLA_FLAGS"] = f"{FLAGS} {os.environ.get('XLA_FLAGS', '').replace(FLAGS, '')}".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile most programs more than once, and again in the next run.
ROOT = Path(__file__).parent
COMPILED = ROOT / ".pytest_cache" / f"compiled-{platform.node()}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(COMPILED))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax  # noqa: E402
import pytest  # noqa: E402

gc.set_threshold(100_000, 50, 100)  # the default takes a tenth of the time of all tests
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_disable_most_optimizations", True)  # most of the time is compilation

# --- which tests run -----------------------------------------------------------------------------

WIDE = [
    ROOT / "examples",
    *(ROOT / "tests" / room for room in ("bench", "examples", "frameworks", "measurement")),
    *(
        ROOT / "tests" / "whole" / f"test_{name}.py"
        for name in "joint_models processes regress settings training transformations".split()
    ),
]
"""Long runs, frameworks, benchmarks and examples."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--all``."""
    parser.addoption(
        "--all", action="store_true", help="also run long tests, frameworks, benchmarks, examples"
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out what is wide, unless all tests are asked for, or it is named."""
    if config.getoption("--all"):
        return None
    asked = [Path(config.invocation_params.dir, arg.partition("::")[0]) for arg in config.args]
    named = (path for path in WIDE if any(arg.is_relative_to(path) for arg in asked))
    left_out = {*WIDE} - {*named}
    return True if any(collection_path.is_relative_to(path) for path in left_out) else None


# --- memory --------------------------------------------------------------------------------------

MOST_MEMORY = 1_000  # MiB of a process, before it forgets the programs that it has compiled
MEMORY = Path("/proc/self/statm")


def pytest_runtest_teardown() -> None:
    """Keep the thousands of programs that tests compile from filling the memory."""
    if MEMORY.exists() and resident() > MOST_MEMORY:
        jax.clear_caches()
        ctypes.CDLL(None).malloc_trim(0)  # else what is free stays with the process


def resident() -> float:
    """The memory of this process in MiB, on Linux."""
    pages = int(MEMORY.read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.fixture
def explicit_ranks() -> Iterator[None]:
    """No broadcast adds axes silently; the zoo does, as the models it is modelled on do."""
    with jax.numpy_rank_promotion("raise"):
        yield
