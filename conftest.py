"""How tests run: in double precision, so that contracts can be checked to 1e-12, on the CPU.

Eight simulated devices stand in for a real mesh. Set ``JAX_PLATFORMS`` to run tests on others.

``python -m pytest`` runs what guards the engine; with ``--all``, also what is `WIDE`, or marked so.
Files and rooms that are named on the command line run as a whole.
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

TESTS = ROOT / "tests"
WIDE = [
    ROOT / "examples",
    *(TESTS / room for room in ("bench", "examples", "frameworks", "measurement")),
    *(TESTS / "placement" / f"test_{name}.py" for name in ("affine", "queries")),
    *(TESTS / "plan" / f"test_{name}.py" for name in ("centered_twice", "fitting", "means")),
    TESTS / "program" / "test_dropout.py",
    TESTS / "rewrite" / "test_defer.py",
    *(
        TESTS / "whole" / f"test_{name}.py"
        for name in "joint_models kept low_precision processes regress settings together training "
        "transformations untie verify".split()
    ),
]
"""Options that ask for more than a fold, long runs, frameworks, benchmarks and examples."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--all``."""
    parser.addoption("--all", action="store_true", help="run what is wide, too")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out wide files and rooms."""
    around = [path for path in WIDE if collection_path.is_relative_to(path)]
    return True if any(is_left_out(path, config) for path in around) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests that are marked as wide."""
    wide = {item for item in items if item.get_closest_marker("wide")}
    left_out = [item for item in items if item in wide and is_left_out(item.path, config)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in {*left_out}]


def is_left_out(path: Path, config: pytest.Config) -> bool:
    """Whether something wide is not asked for, by ``--all`` or by a name on the command line.

    Such a name is that of the path, or of something in it, or of a room around it.
    """
    if config.getoption("--all"):
        return False
    asked = [Path(config.invocation_params.dir, arg.partition("::")[0]) for arg in config.args]
    rooms = [arg for arg in asked if arg not in (ROOT, TESTS)]
    return not any(a.is_relative_to(path) for a in asked) and not any(
        map(path.is_relative_to, rooms)
    )


# --- memory --------------------------------------------------------------------------------------

MOST_MEMORY = 1_000  # MiB of a process, before it forgets the programs that it has compiled
MEMORY = Path("/proc/self/statm")


def pytest_runtest_teardown() -> None:
    """Keep the thousands of programs that tests compile from filling the memory."""
    if MEMORY.exists() and resident() > MOST_MEMORY:
        jax.clear_caches()
        if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)  # else what is free stays with the process


def resident() -> float:
    """The memory of this process in MiB, on Linux."""
    pages = int(MEMORY.read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@pytest.fixture
def explicit_ranks() -> Iterator[None]:
    """No broadcast adds axes silently; the zoo does, as the models it is modelled on do."""
    with jax.numpy_rank_promotion("raise"):
        yield
