"""Break the library on purpose, one small change at a time, and see whether the tests notice.

    python -m tests.tools.mutation                               # every module that makes claims
    python -m tests.tools.mutation --module rules/contraction     # one of them
    python -m tests.tools.mutation --module axes/axis_set --function _pair --list

A mutant that survives shows a test that is missing, or code that does nothing. Every mutant is a
fork of this process, which has imported JAX but neither started it nor loaded the library; it runs
the tests that reach the changed statement. (The well-known tools change files on disk and start
anew for every mutant, or fork after the tests have started JAX.)
"""

from __future__ import annotations

import argparse
import ast
import builtins
import copy
import hashlib
import json
import math
import multiprocessing
import os
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from itertools import accumulate, chain
from multiprocessing.connection import wait
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any, NamedTuple

import flax.nnx  # noqa: F401  imported before the forks
import jax
import pytest
from rich.progress import track

from tests.tools.mutants import Mutant, mutants, path_of, tree

ROOT = Path(__file__).parents[2]
RULES = "contraction control elementwise joining reduction moves lookups registry"
OTHERS = """
program/primitives program/devices axes/axis_set axes/broadcast axes/labels axes/reshape
analysis/shift_algebra analysis/shift_rules analysis/shift_tracker analysis/claims analysis/facts
analysis/layer_norms placement/zero_mean placement/proof placement/layer_scale
"""
MODULES = [*(f"rules/{name}" for name in RULES.split()), *OTHERS.split()]
STAGES = [
    stage.split()
    for stage in (
        "rules/test_rules_known axes/test_axes analysis/test_response",
        "rules/test_rules",
        "whole/test_traps program/test_loops placement/test_mincut rewrite/test_rewrite "
        "placement/test_scales whole/test_sharing",
        "analysis/test_spellings program/test_shard_map",
        "whole/test_random_programs",
    )
]
BUDGET = 20.0  # seconds of processor time per mutant and stage, the shortest tests first
PATIENCE = 20  # a mutant may take that many times its processor time by the clock: others run, too
CACHE = Path(tempfile.gettempdir()) / "jax_lnfold-mutation"
EXCUSED: dict[tuple[str, str, str], str] = {
    ("axes/broadcast", "project", "FREE  ->  ALL  in  e if n == m else FREE"): (
        "the operand has size 1 there, where `AxisSet.of` spells ALL as FREE"
    ),
    (
        "rules/moves",
        "_pull_broadcast",
        "FREE  ->  ALL  in  along.entries[o] if along.shape[o] == n else FREE",
    ): "the operand has size 1 there, where `AxisSet.of` spells ALL as FREE",
    ("rules/elementwise", "_pull_mul", "0  ->  1  in  ctx.dtype(0)"): "both have one dtype",
    ("rules/elementwise", "_push_mul", "0  ->  1  in  ctx.dtype(0)"): "both have one dtype",
    ("axes/axis_set", "AxisSet.disjoint", "(a, b)  ->  (b, a)"): "symmetric",
    (
        "axes/axis_set",
        "AxisSet.embed",
        "n > MAX_LABELS  ->  n >= MAX_LABELS",
    ): "a limit on memory only",
}
"""(module, function, change) -> why nobody can notice it."""


class Replaced(NamedTuple):
    """Imports modules of the library from syntax trees."""

    trees: dict[str, ast.Module]

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        module = name.removeprefix("jax_lnfold.").replace(".", "/")
        if not name.startswith("jax_lnfold.") or module not in self.trees:
            return None
        spec = PathFinder.find_spec(name, path)
        code = compile(self.trees[module], path_of(module), "exec")
        spec.loader.get_code = lambda _: code  # type: ignore[union-attr]
        return spec


class Recorder:
    """Writes down each test's processor time (of all threads), and which statements it runs."""

    def __init__(self, path: Path) -> None:
        self.path, self.ran, self.imported = path, set[str](), set[str]()
        self.began, self.failed = 0.0, list[str]()
        self.tests: dict[str, tuple[float, list[str]]] = {}

    def pytest_sessionstart(self) -> None:
        builtins.__dict__["__ran__"] = self.ran.add

    def pytest_collection_finish(self) -> None:
        self.imported = {*self.ran}  # concerns every test
        self.ran.clear()

    def pytest_runtest_logstart(self) -> None:
        self.ran.clear()
        self.began = time.process_time()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed += [report.nodeid] if report.failed else []

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        seconds = time.process_time() - self.began
        self.tests[nodeid] = (seconds, sorted(self.ran | self.imported))

    def pytest_sessionfinish(self) -> None:
        self.path.write_text(json.dumps({"failed": self.failed, "tests": self.tests}))


def fork(
    trees: Callable[[], dict[str, ast.Module]],
    stages: Sequence[Sequence[str]],
    *plugins: Recorder,
    seconds: float = math.inf,
) -> ForkProcess:
    """A silent child that runs tests stage by stage and exits with the status of the last run.

    The system ends it after so many seconds of processor time.
    """

    def work() -> None:
        if seconds < math.inf:
            resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(seconds), math.ceil(seconds)))
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        os.chdir(ROOT)
        jax.config.update("jax_compilation_cache_dir", str(CACHE))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # most of the time, otherwise
        sys.path.insert(0, str(ROOT))
        sys.meta_path.insert(0, Replaced(trees()))  # type: ignore[arg-type]
        options = ["-o", "addopts=", "-m", "not slow", "-p", "no:cacheprovider", "--tb=no"]
        options += [] if plugins else ["-x"]
        status = (int(pytest.main([*options, *tests], plugins)) for tests in stages if tests)
        os._exit(next((s for s in status if s), 0))

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def marked(module: str) -> ast.Module:
    """The module, with every statement of every function noting that it ran."""
    made = copy.deepcopy(tree(module))
    functions = [n for n in ast.walk(made) if isinstance(n, ast.FunctionDef)]
    for node in {id(n): n for f in functions for n in ast.walk(f)}.values():
        for field in ("body", "orelse", "finalbody"):
            block = getattr(node, field, None)
            if isinstance(block, list):
                notes = (ast.parse(f"__ran__('{module}:{s.lineno}')").body[0] for s in block)
                setattr(node, field, [*chain(*zip(notes, block, strict=True))])
    return ast.fix_missing_locations(made)


@cache
def measured(stage: int) -> dict[str, tuple[float, list[str]]]:
    """Seconds and statements of each test, measured once per version of library and tests."""
    tests = [ROOT / "tests" / f"{name}.py" for name in STAGES[stage]]
    helpers = [
        ROOT / name for name in ("tests/rules/rule_examples.py", "jax_lnfold/rules/partitions.py")
    ]
    read = (p.read_bytes() for p in (*tests, *helpers, *map(path_of, MODULES)))
    digest = hashlib.sha256(b"".join(read)).hexdigest()[:16]
    path = CACHE / f"{digest}.json"
    CACHE.mkdir(exist_ok=True)
    if not path.exists():
        print(f"running {' '.join(STAGES[stage])} without a change", file=sys.stderr)
        fork(lambda: {m: marked(m) for m in MODULES}, [[*map(str, tests)]], Recorder(path)).join()
    known = json.loads(path.read_text())
    if known["failed"] or not known["tests"]:
        path.unlink()
        sys.exit(f"without any change, these tests fail: {known['failed']}")
    return known["tests"]


def tests_for(mutant: Mutant, stage: int) -> list[str]:
    """Tests that run the changed statement, the fast ones and those about its primitive first."""
    place = f"{mutant.module}:{mutant.statement}"
    every = [(seconds, name, ran) for name, (seconds, ran) in measured(stage).items()]
    hit = [(s, name) for s, name, ran in every if not mutant.statement or place in ran]
    hit.sort(key=lambda t: (not mutant.word or f"[{mutant.word}" not in t[1], t[0]))
    spent = accumulate(s for s, _ in hit)
    return [name for (_, name), total in zip(hit, spent, strict=True) if total < BUDGET]


def verdicts(given: Sequence[Mutant], stages: int, jobs: int) -> Iterator[tuple[Mutant, bool]]:
    """Every mutant, and whether the tests noticed it."""
    for stage in range(stages):
        measured(stage)
    waiting, running = [*given], dict[int, tuple[Mutant, ForkProcess, float]]()
    while waiting or running:
        while waiting and len(running) < jobs:
            mutant = waiting.pop(0)
            tests = [tests_for(mutant, stage) for stage in range(stages)]
            usual = sum(measured(s)[name][0] for s, names in enumerate(tests) for name in names)
            most = 60 + 3 * usual
            process = fork(lambda m=mutant: {m.module: m.install()}, tests, seconds=most)
            running[process.sentinel] = (mutant, process, time.monotonic() + PATIENCE * most)
        wait([*running], timeout=1)
        for sentinel, (mutant, process, deadline) in [*running.items()]:
            if not process.is_alive() or time.monotonic() > deadline:
                process.kill()
                process.join()
                del running[sentinel]
                yield mutant, process.exitcode != 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--module", choices=MODULES, metavar="MODULE", help="mutate only this one")
    parser.add_argument("--function", default="", help="mutate functions with this in their name")
    parser.add_argument(
        "--lines", type=int, nargs=2, default=(0, 10**9), metavar="LINE", help="first and last line"
    )
    parser.add_argument("--stages", type=int, default=len(STAGES), help="run so many stages")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time")
    parser.add_argument("--sample", type=int, metavar="N", help="only N of them, drawn by chance")
    parser.add_argument("--list", action="store_true", help="only list the mutants")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    args = parser.parse_args()
    first, last = args.lines
    given = [
        m
        for module in ([args.module] if args.module else MODULES)
        for m in mutants(module)
        if args.function in m.function and first <= m.line <= last
    ]
    if args.sample is not None and args.sample < len(given):
        given = random.Random(0).sample(given, args.sample)
    if args.list:
        print("\n".join(map(str, given)))
        return 0
    counts = {m.module: Counter[str]() for m in given}
    results = []
    tried = verdicts([m for m in given if m.key not in EXCUSED], args.stages, args.jobs)
    tried = chain(((m, True) for m in given if m.key in EXCUSED), tried)
    for mutant, noticed in track(tried, "Mutants", len(given), disable=not sys.stderr.isatty()):
        verdict = "excused" if mutant.key in EXCUSED else "killed" if noticed else "survived"
        counts[mutant.module][verdict] += 1
        results.append({"mutant": str(mutant), "verdict": verdict})
        if verdict == "survived":
            print(f"survived: {mutant}", flush=True)
        if args.json:
            args.json.write_text(json.dumps(results, indent=1))
    for module, count in counts.items():
        print(f"{module}: {count.total()} mutants, {dict(count)}")
    return int(any(r["verdict"] == "survived" for r in results))


if __name__ == "__main__":
    sys.exit(main())
