"""The command line: what it prints and writes, its exit codes, and its errors."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jax
import numpy as np
import pytest
import safetensors.numpy

import jax_lnfold
from jax_lnfold import FoldPlan, fold
from jax_lnfold.cli.commands import main
from jax_lnfold.cli.target import load

MODULE = """
import jax
import jax.numpy as jnp

def layer_norm(x):
    c = x - x.mean(-1, keepdims=True)
    return c * jax.lax.rsqrt((c * c).mean(-1, keepdims=True) + 1e-5)

def model(p, x):
    s = x @ p["stem"] + p["bias"]
    s = s + (layer_norm(s) @ p["layer"]) * p["scale"]
    return layer_norm(s) @ p["head"]

def of(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)

PARAMS = {"stem": of(7, 6), "bias": of(6), "layer": of(6, 6), "scale": of(6), "head": of(6, 3)}

def target():
    return model, PARAMS, (of(2, 7),)

def one_input():
    return model, PARAMS, of(2, 7)

def one_tree():
    return (lambda p, x: model(p, x["x"])), PARAMS, {"x": of(2, 7)}

def one_list():
    return (lambda p, x: model(p, x[0])), PARAMS, [of(2, 7)]

def two_inputs():
    return (lambda p, x, y: model(p, x + y)), PARAMS, (of(2, 7), of(2, 7))

def two_functions():
    functions = {"encode": model, "score": lambda p, x: model(p, x).sum()}
    return functions, PARAMS, {"encode": (of(2, 7),), "score": of(3, 7)}

def left():
    return (lambda p, x: model(p, x) + layer_norm(jnp.tanh(x)).sum()), PARAMS, of(2, 7)

def none():
    return (lambda p, x: x @ p["stem"]), PARAMS, of(2, 7)

def scaled():
    return (lambda p, x: (layer_norm(x @ p["stem"]) * p["scale"]) @ p["head"]), PARAMS, of(2, 7)

def _tied(p, tokens):
    s = p["table"][tokens]
    s = s + layer_norm(s) @ p["layer"]
    return layer_norm(s) @ p["table"].T

def tied():
    return _tied, {"table": of(5, 6), "layer": of(6, 6)}, jax.ShapeDtypeStruct((2, 7), int)

def _post(p, x):
    x = layer_norm(x) * p["scale"] + p["shift"]
    return layer_norm(x + jnp.sin(x) @ p["layer"] + p["bias"])

def post():
    p = {"scale": jnp.ones(6), "shift": jnp.arange(6.0), "layer": jnp.eye(6), "bias": jnp.ones(6)}
    return _post, p, of(2, 6)

class Nested:
    target = staticmethod(target)

def fails():
    raise ValueError("no weights\\nhere")

def fails_inside():
    return jnp.ones((2, 3)) @ jnp.ones((4, 5))

def fails_in_trace():
    return model, PARAMS, of(2, 8)

def pair():
    return model, PARAMS

def triple_of_nonsense():
    return PARAMS, model, of(2, 7)

def interrupted():
    raise KeyboardInterrupt

number = 3
"""
NAMES = iter(range(1000))


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module in the current directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(tmp_path)])
    name = f"target_module_{next(NAMES)}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    return name


def line_of(words: str) -> int:
    return next(i for i, line in enumerate(MODULE.splitlines(), 1) if words in line)


Capture = pytest.CaptureFixture[str]

# --- report --------------------------------------------------------------------------------------


def test_report_of_several_functions(module: str, capsys: Capture) -> None:
    assert main(["report", f"{module}:two_functions", "--no-cost"]) == 0
    out, err = capsys.readouterr()
    assert "4 of 4 LayerNorms folded, 3 parameters centered, 1 scale merged" in out
    assert out.index("encode") < out.index("score")
    assert not err
    assert main(["plan", f"{module}:two_functions"]) == main(["plan", f"{module}:target"]) == 0
    both, alone = re.split(r"(?<=\n\})\n", capsys.readouterr().out)[:2]
    assert FoldPlan.from_json(both) == FoldPlan.from_json(alone)


@pytest.mark.parametrize("name", ["target", "one_input", "one_tree", "one_list", "two_inputs"])
def test_report(module: str, name: str, capsys: Capture) -> None:
    assert main(["report", f"{module}:{name}", "--no-cost"]) == 0
    out, err = capsys.readouterr()
    assert "2 of 2 LayerNorms folded, 3 parameters centered, 1 scale merged" in out
    assert "\x1b" not in out
    assert not err


def test_report_of_a_nested_function(module: str, capsys: Capture) -> None:
    assert main(["report", f"{module}:Nested.target", "--no-cost"]) == 0
    assert "2 of 2 LayerNorms folded" in capsys.readouterr().out


def test_report_is_as_wide_as_the_terminal(
    module: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    widths = []
    for columns in (60, 200):
        monkeypatch.setenv("COLUMNS", str(columns))
        assert main(["report", f"{module}:left", "--no-cost"]) == 0
        widths.append(max(map(len, capsys.readouterr().out.splitlines())))
    assert widths[0] <= 60 < 100 < widths[1] <= 200


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_report_in_colour(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert main(["report", f"{module}:target", "--no-cost"]) == 0
    assert "\x1b[32mfolded" in sys.stdout.getvalue()


@pytest.mark.parametrize(("name", "code"), [("target", 0), ("left", 3), ("none", 0)])
def test_check(module: str, name: str, code: int, capsys: Capture) -> None:
    assert main(["report", f"{module}:{name}", "--no-cost"]) == 0
    told = capsys.readouterr().out
    assert main(["report", f"{module}:{name}", "--no-cost", "--check"]) == code
    assert capsys.readouterr().out == told


@pytest.mark.parametrize("limit", [0, 10**9])
def test_cost(module: str, limit: int, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told however long compilation takes if it is asked for, else if it takes no time."""
    monkeypatch.setattr(jax_lnfold.report.report, "COSTED_WHEN_SHOWN", limit)
    words = str(jax_lnfold.analyze(*_model(module)).cost).split()
    assert len(words) > 3
    for flags, is_told in ((["--cost"], True), ([], limit > 0), (["--no-cost"], False)):
        assert main(["report", f"{module}:target", *flags]) == 0
        out = " ".join(capsys.readouterr().out.split())
        assert (" ".join(words) in out) == is_told
        assert ("(`report --cost` on the command line)" in out) == (not flags and not is_told)


def test_costs_are_compared_or_not(module: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as exited:
        main(["report", f"{module}:target", "--cost", "--no-cost"])
    assert exited.value.code == 2
    assert "not allowed with argument" in capsys.readouterr().err


def test_no_cost(
    module: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compiled(*args: Any) -> None:
        raise RuntimeError("it was compiled")

    monkeypatch.setattr(jax_lnfold.report.report, "measure", compiled)
    assert main(["report", f"{module}:target", "--no-cost", "--html", "r.html"]) == 0
    assert "cost" not in capsys.readouterr().out
    assert "cost" not in (tmp_path / "r.html").read_text()
    monkeypatch.setattr(jax_lnfold.report.report, "COSTED_WHEN_SHOWN", 0)
    assert main(["report", f"{module}:target", "--html", "r.html"]) == 0
    assert "it was compiled" not in capsys.readouterr().out + (tmp_path / "r.html").read_text()
    assert main(["report", f"{module}:target", "--cost", "--html", "r.html"]) == 0
    assert "it was compiled" in capsys.readouterr().out
    assert "it was compiled" in (tmp_path / "r.html").read_text()


def _model(module: str) -> tuple[Any, Any, Any]:
    apply_fn, params, (x,) = load(f"{module}:target")
    return apply_fn, params, x


def test_html(module: str, tmp_path: Path) -> None:
    assert main(["report", f"{module}:left", "--no-cost", "--html", "r.html"]) == 0
    page = (tmp_path / "r.html").read_text()
    assert page.startswith("<!doctype html>")
    assert f"<title>{module}:left</title>" in page
    assert page.count("<table>") == 1
    assert page.index("</table>") < page.index("<svg")
    assert "http" not in page.replace("http://www.w3.org/", "")


# --- plan and draw -------------------------------------------------------------------------------


def test_plan(module: str, tmp_path: Path, capsys: Capture) -> None:
    assert main(["plan", f"{module}:target"]) == 0
    text = capsys.readouterr().out
    assert main(["plan", f"{module}:target", "-o", "plan.json"]) == 0
    assert not capsys.readouterr().out
    assert (tmp_path / "plan.json").read_text() == text
    apply_fn, shapes, x = _model(module)
    rng = np.random.default_rng(0)
    params = {name: rng.normal(size=s.shape).astype(np.float32) for name, s in shapes.items()}
    assert FoldPlan.from_json(text) == fold(apply_fn, params, x).plan


def test_fold_affine(module: str, capsys: Capture) -> None:
    for flags, taken_up in (([], 0), (["--fold-affine"], 1)):
        assert main(["plan", f"{module}:scaled", *flags]) == 0
        assert len(FoldPlan.from_json(capsys.readouterr().out).affine) == taken_up
        assert main(["report", f"{module}:scaled", "--no-cost", *flags]) == 0
        assert ("1 scale or shift taken up" in capsys.readouterr().out) == taken_up


def test_untie(module: str, capsys: Capture) -> None:
    for flags, untied in (([], 0), (["--untie"], 1)):
        assert main(["plan", f"{module}:tied", *flags]) == 0
        assert len(FoldPlan.from_json(capsys.readouterr().out).untied) == untied
        assert main(["report", f"{module}:tied", "--no-cost", *flags]) == 0
        assert ("`table` untied by a copy" in capsys.readouterr().out) == untied
        assert main(["draw", f"{module}:tied", *flags]) == 0
        assert ("centering" in capsys.readouterr().out) == (not untied)


def test_assume_values(module: str, capsys: Capture) -> None:
    for flags, assumed in (([], set()), (["--assume-values"], {"scale", "shift"})):
        assert main(["plan", f"{module}:post", *flags]) == 0
        plan = FoldPlan.from_json(capsys.readouterr().out)
        assert {edit.key_path for edit in plan.assumed} == assumed
        assert main(["report", f"{module}:post", "--no-cost", *flags]) == 0
        assert ("Exact as long as these stay so" in capsys.readouterr().out) == bool(assumed)
    assert main(["report", f"{module}:target", "--no-cost", "--assume-values"]) == 0
    assert "Nothing is assumed of 5 parameters" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit, match="2"):
        main(["plan", f"{module}:post", "--untie", "--assume-values"])
    assert "--assume-values: not allowed with argument --untie" in capsys.readouterr().err


def test_draw(module: str, tmp_path: Path, capsys: Capture) -> None:
    assert main(["draw", f"{module}:target"]) == 0
    svg = capsys.readouterr().out
    assert ElementTree.fromstring(svg).tag.endswith("svg")
    for name, start in (("a.svg", svg[:20]), ("a.dot", "digraph")):
        assert main(["draw", f"{module}:target", "-o", name]) == 0
        assert (tmp_path / name).read_text().startswith(start)
    assert not capsys.readouterr().out


# --- center --------------------------------------------------------------------------------------


@pytest.fixture
def files(module: str, tmp_path: Path) -> dict[str, np.ndarray]:
    """Writes plan.json and a.safetensors."""
    assert main(["plan", f"{module}:target", "-o", "plan.json"]) == 0
    rng = np.random.default_rng(0)
    shapes = __import__(module).PARAMS.items()
    arrays = {name: rng.normal(size=s.shape).astype(np.float32) for name, s in shapes}
    safetensors.numpy.save_file(arrays, "a.safetensors")
    return arrays


CENTER = ["center", "plan.json", "a.safetensors", "b.safetensors"]


def test_center(files: dict[str, np.ndarray], capsys: Capture) -> None:
    assert main(CENTER) == 0
    out, err = capsys.readouterr()
    assert out == (
        "3 parameters centered, 1 scale merged: 360 bytes in 4 leaves of b.safetensors\n"
    )
    assert not err
    got = safetensors.numpy.load_file("b.safetensors")
    want = FoldPlan.from_json(Path("plan.json").read_text()).center(files)
    assert {name: x.tobytes() for name, x in got.items()} == {
        name: x.tobytes() for name, x in want.items()
    }
    assert got["layer"].tobytes() != files["layer"].tobytes()


def test_center_with_a_prefix(files: dict[str, np.ndarray], capsys: Capture) -> None:
    moved = {f"ema.{name}": x for name, x in files.items()}
    safetensors.numpy.save_file(moved, "a.safetensors")
    assert main(CENTER) == 1
    out, err = capsys.readouterr()
    assert "with --prefix ema they would all fit" in err
    assert not out
    assert main([*CENTER, "--prefix", "ema"]) == 0
    assert {*safetensors.numpy.load_file("b.safetensors")} == {*moved}


def test_progress(files: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert main(CENTER) == 0
    assert "Centering" in sys.stderr.getvalue()
    assert "100%" in sys.stderr.getvalue()


def too_large(files: dict[str, np.ndarray]) -> None:
    largest = np.full((7, 6), np.finfo(np.float32).max)
    largest[:, 0] *= -1
    safetensors.numpy.save_file({**files, "stem": largest.astype(np.float32)}, "a.safetensors")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda _: Path("plan.json").write_text("{}"),
            "text: plan version None, this library reads versions 2 and 3",
        ),
        (lambda _: Path("plan.json").write_bytes(b"\xff\xfe"), "plan: plan.json is not text"),
        (
            lambda _: Path("plan.json").unlink(),
            "No such file or directory: 'plan.json'; check the path",
        ),
        (lambda _: Path("b.safetensors").mkdir(), "dest: b.safetensors exists"),
        (too_large, "source: leaf 'stem' would overflow"),
    ],
)
def test_center_fails(
    files: dict[str, np.ndarray], spoil: Callable[[Any], Any], message: str, capsys: Capture
) -> None:
    spoil(files)
    before = {*Path.cwd().iterdir()}
    assert main(CENTER) == 1
    out, err = capsys.readouterr()
    assert err.startswith("jax_lnfold: ")
    assert message in err
    assert "Traceback" not in err
    assert not out
    assert {*Path.cwd().iterdir()} == before


def test_center_interrupted(
    files: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def stop(*args: Any, **kw: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("jax_lnfold.checkpoints.center.edit_leaf", stop)
    before = {*Path.cwd().iterdir()}
    assert main(CENTER) == 130
    assert capsys.readouterr() == ("", "jax_lnfold: interrupted\n")
    assert {*Path.cwd().iterdir()} == before


SIGNALS = """
import os, shutil, sys, threading
from signal import SIG_DFL, SIG_IGN, SIGHUP, SIGTERM, getsignal, signal
from jax_lnfold.checkpoints import center as checkpoints
from jax_lnfold.cli import commands as cli
from jax_lnfold.checkpoints.safetensors import SafetensorsStore

edit_leaf, rmtree, seen = checkpoints.edit_leaf, shutil.rmtree, []

def center(case, *numbers, again=()):
    def stop(*args, **kw):
        seen.append(getsignal(SIGTERM) is SIG_DFL)
        for number in numbers:
            os.kill(os.getpid(), number)
        return edit_leaf(*args, **kw)

    def stop_again(*args, **kw):
        for number in again:
            os.kill(os.getpid(), number)
        return rmtree(*args, **kw)

    checkpoints.edit_leaf, shutil.rmtree = stop, stop_again
    before = getsignal(SIGTERM), getsignal(SIGHUP)
    code = cli.main(sys.argv[1:])
    assert before == (getsignal(SIGTERM), getsignal(SIGHUP))
    print(case, code, *sorted(os.listdir()))
    if os.path.exists("b.safetensors"):
        os.unlink("b.safetensors")

signal(SIGHUP, SIG_DFL)  # whoever started this may ignore it
center("terminated", SIGTERM)
center("hung up", SIGHUP)
center("twice", SIGTERM, again=(SIGTERM, SIGHUP))

def write(*args):
    os.kill(os.getpid(), SIGTERM)
    seen.append("not yet stopped")
    return store_write(*args)

store_write, SafetensorsStore.write = SafetensorsStore.write, write
center("writing")
assert seen.count("not yet stopped") == 1, "the first array is written, and no other one"
SafetensorsStore.write = store_write
signal(SIGHUP, SIG_IGN)
center("nohup", SIGHUP)
signal(SIGTERM, lambda *_: seen.append("own"))
center("own", SIGTERM)
assert "own" in seen
signal(SIGTERM, SIG_DFL)
seen.clear()
thread = threading.Thread(target=center, args=("thread",))
thread.start()
thread.join()
assert seen and all(seen)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="signals of POSIX")
def test_signals(files: dict[str, np.ndarray]) -> None:
    """Those that end a process leave nothing behind; those that it ignores or handles, do not."""
    run = [sys.executable, "-c", SIGNALS, *CENTER]
    path = f"{Path(jax_lnfold.__file__).parents[1]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    env = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(run, capture_output=True, text=True, check=False, env=env)
    here = " ".join(sorted(os.listdir()))
    there = " ".join(sorted({*os.listdir(), "b.safetensors"}))
    lines = [line for line in done.stdout.splitlines() if "centered" not in line]
    assert lines == [
        f"terminated 143 {here}",
        f"hung up 129 {here}",
        f"twice 143 {here}",
        f"writing 143 {here}",
        f"nohup 0 {there}",
        f"own 0 {there}",
        f"thread 0 {there}",
    ], done.stderr
    ended = [f"jax_lnfold: ended by {name}" for name in ("SIGTERM", "SIGHUP", "SIGTERM", "SIGTERM")]
    assert done.stderr.splitlines() == ended


ODD = "\x1b[31m\n\x07\x9b\u202e\ud800"
"""Colours, a bell, another way to write escapes, text that runs backwards, no text at all."""


def test_odd_names(files: dict[str, np.ndarray], capsys: Capture) -> None:
    """Names from plans and checkpoints reach the terminal as text only."""
    for name in ("stem", f"stem{ODD}"):
        leaf = {"key_path": f"{name}{ODD}", "shape": [7, 6]}
        edit = {"key_path": f"{name}{ODD}", "along": {"shape": [7, 6], "entries": ["free", "all"]}}
        plan = {"version": 2, "leaves": [leaf], "edits": [edit], "scales": []}
        Path("plan.json").write_text(json.dumps(plan))
        for prefix in ("", ODD, f"x={ODD}"):
            assert main([*CENTER, "--prefix", prefix]) == 1
            err = capsys.readouterr().err
            assert err.endswith("\n")
            assert err[:-1].isprintable()
            assert "\\x1b[31m\\n\\x07\\x9b\\u202e\\ud800' " in err
    Path("plan.json").write_text(f'{{"version": "{ODD[:5]}"}}')
    for argv in (CENTER, ["center", ODD[:-1], ODD[:-1], "c"], ["plan", f"{ODD}:target"]):
        assert main(argv) == 1
        assert capsys.readouterr().err[:-1].isprintable()


def test_odd_names_of_files(files: dict[str, np.ndarray], capsys: Capture) -> None:
    assert main(["plan", f"{next(iter(Path.cwd().glob('*.py'))).stem}:target", "-o", "p.json"]) == 0
    dest = os.fsdecode(b"\x1b[2J\xff")
    assert main(["center", "p.json", "a.safetensors", dest]) == 0
    assert capsys.readouterr().out.endswith(r" of \x1b[2J\udcff" + "\n")
    assert os.path.exists(dest)


# --- targets -------------------------------------------------------------------------------------

FAILURES = {
    "number": "number is a int that cannot be called; name a function that returns",
    "nothing": "has no 'nothing'; check the spelling",
    "Nested.nothing": "has no 'Nested.nothing'",
    "pair": "returned (function, dict) instead of (apply_fn, params, inputs)",
    "triple_of_nonsense": "returned (dict, function, ShapeDtypeStruct) instead of",
    "of": "returned ShapeDtypeStruct instead of",
}


@pytest.mark.parametrize("name", FAILURES)
def test_wrong_target(module: str, name: str, capsys: Capture) -> None:
    assert main(["plan", f"{module}:{name}"]) == 1
    out, err = capsys.readouterr()
    assert err.startswith("jax_lnfold: target: ")
    assert FAILURES[name] in err
    assert len(err.splitlines()) == 1
    assert not out


PLACES = {
    "fails": ("ValueError: no weights)", 'raise ValueError("no'),
    "fails_inside": ("TypeError: ", "return jnp.ones((2, 3)) @"),
    "fails_in_trace": ("apply_fn: cannot be traced (TypeError", 's = x @ p["stem"] + p["bias"]'),
}


@pytest.mark.parametrize("name", PLACES)
def test_failing_target(module: str, name: str, tmp_path: Path, capsys: Capture) -> None:
    words, line = PLACES[name]
    assert main(["report", f"{module}:{name}"]) == 1
    message, place = capsys.readouterr().err.splitlines()
    assert words in message
    assert f"{tmp_path / module}.py:{line_of(line)}, in " in place


def test_failing_modules(module: str, tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / f"{module}_a.py").write_text("x = 1\ny = x / 0\n")
    (tmp_path / f"{module}_b.py").write_text("import surely_not_there\n")
    (tmp_path / f"{module}_c.py").write_text("def (\n")
    for suffix, words in {
        "_a": "ZeroDivisionError: division by zero",
        "_b": "ModuleNotFoundError: No module named 'surely_not_there'",
        "_c": "SyntaxError",
        ".d": "no module '",
        "_e": "no module '",
    }.items():
        assert main(["plan", f"{module}{suffix}:target"]) == 1
        assert words in capsys.readouterr().err, suffix
    main(["plan", f"{module}_a:target"])
    assert f"{module}_a.py:2" in capsys.readouterr().err


def test_interrupted_target(module: str, capsys: Capture) -> None:
    assert main(["plan", f"{module}:interrupted"]) == 130
    assert capsys.readouterr().err == "jax_lnfold: interrupted\n"


# --- usage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "required: COMMAND"),
        (["report"], "required: TARGET"),
        (["report", "module"], "'module' has no colon; pass package.module:function"),
        (["report", ":f"], "has no colon"),
        (["fold", "a:b"], "invalid choice"),
        (["draw", "a:b", "-o", "a.gif"], "'a.gif' ends in none of .svg, .dot and .png"),
        (["center", "plan.json", "a"], "required: DEST"),
    ],
)
def test_usage(argv: list[str], message: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["", "report", "plan", "draw", "center"])
def test_help(command: str, capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert f"example: python -m jax_lnfold {command or 'report'}" in text
    assert "exit codes: 0 done; 1 " in text
    assert ("TARGET is `package.module:function`" in text) == (
        command in {"report", "plan", "draw"}
    )
    assert max(map(len, text.splitlines())) <= 100


def test_the_script_that_pip_installs(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/jax-lnfold", "report", "--help"])
    with pytest.raises(SystemExit, match="0"):
        main()
    text = capsys.readouterr().out
    assert text.startswith("usage: jax-lnfold report ")
    assert "example: jax-lnfold report my_model:target" in text
    assert "python -m jax_lnfold" not in text


def test_version(capsys: Capture) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    told = f"jax_lnfold {jax_lnfold.__version__} (jax {jax.__version__}, Python 3."
    assert capsys.readouterr().out.startswith(told)


def test_as_a_module() -> None:
    package = Path(jax_lnfold.__file__).parents[1]
    run = [sys.executable, "-m", "jax_lnfold", "--help"]
    done = subprocess.run(run, capture_output=True, text=True, check=False, cwd=package)
    assert done.returncode == 0
    assert not done.stderr
    for command in ("report", "plan", "draw", "center"):
        assert f"\n    {command} " in done.stdout


@pytest.mark.parametrize("command", ["plan", "report"])
def test_nobody_reads_on(
    module: str, command: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    options = ["--no-cost"] * (command == "report")
    with os.fdopen(writer, "w") as stdout, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        try:
            code = main([command, f"{module}:target", *options])
        except SystemExit as stop:  # rich ends the program so
            code = stop.code
    assert code == 1
    assert not capsys.readouterr().err
