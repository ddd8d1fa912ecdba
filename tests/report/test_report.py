"""A reader of a report learns what blocks each LayerNorm, where, and what could be done."""

from __future__ import annotations

import io
import pickle
import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

import jax_lnfold
from jax_lnfold.report.report import Report
from jax_lnfold.report.table import Row, grouped, merged
from jax_lnfold.trees import leaf_paths
from tests.helpers.contracts import unbroken
from tests.models.zoo import BY_NAME, NORMS, ZOO

TESTS = Path(__file__).parents[1]
PRE_LN, GATE, UNTIE = "inside the branch (pre-LN)", "gate by one number per token", "(untie it)"
JOINED = "normalise before positions are joined"
SCALE = r"norm|\"scale\""
MERGE, LINEAR_LAST, QUIET, RETURN = (
    "merge this scale",
    "end with a linear",
    "read the",
    "return the",
)


@cache
def report_of(name: str, spelling: str = "one_pass") -> Report:
    model = BY_NAME[name].build(spelling)
    shapes = jax.eval_shape(lambda tree: tree, (model.params, *model.inputs))
    return jax_lnfold.analyze(model.apply_fn, *shapes)


class Blocked(NamedTuple):
    """LayerNorms (their paths match `norms`) that are left because of one kind of operation.

    Its source line matches `code`; `advice` is a part of the advice, which is empty if this is.
    """

    norms: str
    primitive: str
    module: str
    code: str
    advice: str = ""


BLOCKED: dict[str, list[Blocked]] = {
    # A LayerNorm's scale writes into the stream after it.
    "bert": [
        Blocked(r"block_0\.residual/attn_norm", "mul", "Bert/embed_norm", SCALE, PRE_LN),
        Blocked(r"mlp_norm", "mul", r".*attn_norm", SCALE, PRE_LN),
        Blocked(r"block_1\.residual/attn_norm", "mul", r".*block_0.*mlp_norm", SCALE, PRE_LN),
    ],
    "bart": [
        Blocked(r"coder/block_0.*attn_norm", "mul", r"Bart/..coder_embed_norm", SCALE, PRE_LN),
        Blocked(r"encoder/.*mlp_norm", "mul", r".*attn_norm", SCALE, PRE_LN),
        Blocked(r"decoder/.*cross_norm", "mul", r".*attn_norm", SCALE, PRE_LN),
        Blocked(r"decoder/.*mlp_norm", "mul", r".*cross_norm", SCALE, PRE_LN),
        Blocked(r"block_1.*attn_norm", "mul", r".*block_0.*mlp_norm", SCALE, PRE_LN),
    ],
    "swin_v2": [Blocked("Swin/final_norm", "mul", r".*mlp_norm", SCALE, PRE_LN)],
    # Patch merging notices a shift of one token out of four; nothing but its removal helps.
    "swin": [
        Blocked(r"Swin/stage_0_.*_norm", "mul", "Swin/patch_norm", SCALE, JOINED),
        Blocked(r"Swin/merge_1/norm", "reduce_sum", "Swin/merge_1/norm", "norm", JOINED),
        Blocked(
            r"Swin/(stage_1_.*|merge_2/)norm", "reduce_sum", "Swin/merge_2/norm", "norm", JOINED
        ),
    ],
    # A gate per channel, computed from data.
    "dit": [
        Blocked(
            r".*(mlp_norm|block_1.*attn_norm|final_norm)",
            "mul",
            r"DiT/blocks/block_\d",
            "gate",
            GATE,
        )
    ],
    "convnext": [
        Blocked(r".*stage_._./norm", "conv_general_dilated", r".*/depthwise", "Conv"),
        Blocked(r"ConvNeXt/(down|final)_norm.*", "mul", r".*/scale", "gamma", MERGE),
    ],
    "mixer_wide": [Blocked(".*", "mul", r".*attn/mix", r"\.act", LINEAR_LAST)],
    "bloom": [Blocked("CausalLM/embed_norm", "dot_general", r".*attend", "attend", UNTIE)],
}


def test_every_model_with_norms_left_is_here() -> None:
    assert BLOCKED.keys() == {str(case) for case in ZOO if case.folded < case.norms}


@pytest.mark.parametrize("name", BLOCKED)
def test_what_blocks_each_norm_of_the_zoo(name: str) -> None:
    left = [norm for norm in report_of(name).norms if not norm.folded]
    assert left
    for norm in left:
        assert norm.blocker is not None
        expected = [b for b in BLOCKED[name] if re.fullmatch(f".*{b.norms}", norm.path)]
        assert len(expected) == 1, norm.path
        (blocked,) = expected
        assert norm.blocker.primitive == blocked.primitive
        assert re.fullmatch(blocked.module, norm.blocker.module)
        line = Path(norm.blocker.file).read_text().splitlines()[norm.blocker.line - 1]
        assert Path(norm.blocker.file).is_relative_to(TESTS)
        assert re.search(blocked.code, line)
        assert f"{Path(norm.blocker.file).name}:{norm.blocker.line}" in norm.reason
        assert blocked.advice in norm.advice
        assert bool(blocked.advice) == bool(norm.advice)


# --- what is shown -------------------------------------------------------------------------------


class Tower(nn.Module):
    """Pre-LN layers; the stream is returned, too, if it `leaks`."""

    depth: int
    leaks: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> Any:
        x = nn.Dense(12, name="stem")(x)
        for i in range(self.depth):
            x = x + nn.Dense(12, name=f"dense_{i}")(nn.LayerNorm(name=f"norm_{i}")(x))
        y = nn.LayerNorm(name="last")(x)
        return (y, x) if self.leaks else y


def tower_report(depth: int = 24, leaks: bool = False) -> Report:
    tower, x = Tower(depth, leaks), jnp.ones((2, 5, 7), jnp.float32)
    params = jax.eval_shape(tower.init, jax.random.key(0), x)
    return jax_lnfold.analyze(tower.apply, params, x)


def test_repeated_layers_are_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "110")
    head, *rows = str(tower_report()).splitlines()
    assert head.split() == ["LayerNorm", "input", "axes", "variance", "outcome"]
    assert rows[0].split() == ["Tower/norm_{0-23}", "x24", "2x5x12", "2", "one-pass", "folded"]
    assert rows[1].split() == ["Tower/last", "2x5x12", "2", "one-pass", "folded"]
    assert rows[2].startswith("25 of 25 LayerNorms folded, 50 parameters centered (")
    assert rows[3].startswith("Read `report.cost` ")
    assert " ".join(rows[3:]).endswith("see what XLA says they cost.")


def test_the_reason_is_said_once() -> None:
    report = tower_report(3, leaks=True)
    text = unbroken(report)
    assert text.count("left (1)") == 2, "one row for three layers, one for the last norm"
    assert text.count("makes a value that is an output") == 1
    assert "Return the normalised values instead of the stream itself." in text
    assert all(RETURN in norm.advice for norm in report.norms)


def test_bytes_of_edited_parameters() -> None:
    report = tower_report(2)
    assert report.edited_bytes == 4 * (7 * 12 + 12 + 2 * (12 * 12 + 12))
    assert "(1.63 kB)" in str(report)
    dino = report_of("dinov2")  # scales and the layers they are merged into count once
    edited = {edit.key_path for edit in (*dino.edits, *dino.scales)}
    tree = BY_NAME["dinov2"].build().params
    leaves = {path: leaf for path, leaf in leaf_paths(tree) if path in edited}
    assert dino.edited_bytes == sum(leaf.nbytes for leaf in leaves.values())


def test_why_a_centering_is_inserted() -> None:
    text = unbroken(report_of("gpt2"))
    (insertion,) = report_of("gpt2").insertions
    assert insertion.after.startswith("`add` (CausalLM/embed, language.py:")
    assert "a parameter that feeds it cannot be centered, as `dot_general` (" in insertion.reason
    assert "untie it" in insertion.advice
    assert f"{insertion.reason}. To do without, {insertion.advice}." in text
    (insertion,) = report_of("whisper_encoder").insertions
    assert insertion.reason.startswith("`mul` (WhisperEncoder, layers.py:")
    assert insertion.advice == "end with a linear layer after this nonlinearity"


# --- what XLA says -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit", "gpt2", "bert", "swin_v2", "mixer_narrow"])
def test_reductions_saved_by_xla(name: str) -> None:
    report = report_of(name)
    before, after = report.cost.reductions
    assert before - after == report.n_folded - report.n_inserted
    assert report.cost.platform == jax.default_backend()
    assert f"{before - after} of {before} reductions and " in str(report)  # known by now


def test_cost_of_a_model_whose_only_work_is_its_norm() -> None:
    def apply(w: jax.Array, x: jax.Array) -> jax.Array:
        return nn.standardize(x @ w)

    cost = jax_lnfold.analyze(apply, jnp.ones((70, 120)), jnp.ones((50, 70))).cost
    assert cost.reductions == (2, 1)
    assert 0 < cost.bytes[1] <= cost.bytes[0]
    assert cost.flops[0] - cost.flops[1] >= 50 * 120, "the sum of 50 times 120 numbers at least"


def test_large_programs_are_not_compiled_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # no line is broken
    report = tower_report(2)
    for limit, backend in ((report.n_operations - 1, "cpu"), (10**9, "gpu")):
        monkeypatch.setattr("jax_lnfold.report.report.COSTED_WHEN_SHOWN", limit)
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(jax, "default_backend", lambda backend=backend: backend)
            for text in (str(report), report._repr_html_()):
                assert "to compile both programs" in text
                assert "reductions" not in text
    assert "cost" not in vars(report)
    monkeypatch.setattr("jax_lnfold.report.report.COSTED_WHEN_SHOWN", report.n_operations)
    assert "3 of 6 reductions" in report.lines()[-1]
    report = tower_report(2)
    assert len(report.lines(False)) + 1 == len(report.lines(True))
    assert "cost" in vars(report)
    assert report.cost.reductions == (6, 3)
    assert "3 of 6 reductions" in str(report)


def test_a_terminal_shows_that_it_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    for shown in (False, True):
        stream = io.StringIO()
        monkeypatch.setattr(stream, "isatty", lambda shown=shown: shown)
        monkeypatch.setattr("sys.stderr", stream)
        monkeypatch.setenv("TERM", "xterm")
        assert tower_report(1).cost.reductions == (4, 2)
        assert ("Compiling both programs" in stream.getvalue()) == shown
        assert bool(stream.getvalue()) == shown


def test_nothing_is_compiled_for_a_line_that_is_not_shown() -> None:
    report = jax_lnfold.analyze(
        lambda w, x: nn.standardize(jnp.tanh(x @ w)), jnp.ones((7, 12)), jnp.ones((2, 7))
    )
    for text in (str(report), report._repr_html_(), report.to_svg()):
        assert "XLA" not in text
    assert "cost" not in vars(report)
    assert "XLA" in report.lines(True)[-1]
    folded = tower_report(2)
    assert "XLA" in str(folded)
    assert "cost" in vars(folded)


def test_a_report_without_its_programs() -> None:
    report = tower_report(2)
    bare = pickle.loads(pickle.dumps(report))
    with pytest.raises(jax_lnfold.NotAnalysedError, match="cost: the programs are not at hand"):
        _ = bare.cost
    assert "XLA's cost analysis is not to be had: cost: the programs" in str(bare)
    assert bare.to_svg() == report.to_svg()
    assert report.cost == pickle.loads(pickle.dumps(report)).cost

    def inside(w: jax.Array, x: jax.Array) -> jax.Array:
        folded = jax_lnfold.fold(lambda w, x: nn.standardize(x @ w) * x[0, 0], w, x)
        reports.append(folded.report)
        return folded(x)

    reports: list[Report] = []
    jax.jit(inside)(jnp.ones((7, 5)), jnp.ones((2, 7)))
    assert reports[0].cost.reductions[0] >= 1, "a trace that closes over no tracer may be compiled"


def test_stream_read_by_a_layer() -> None:
    def apply(params: Any, x: jax.Array) -> jax.Array:
        s = x @ params["w"]
        return nn.standardize(s) @ params["v"] + s @ params["u"]

    params = {"w": jnp.ones((7, 12)), "v": jnp.ones((12, 3)), "u": jnp.ones((12, 3))}
    (norm,) = jax_lnfold.analyze(apply, params, jnp.ones((2, 5, 7))).norms
    assert norm.blocker is not None
    assert norm.blocker.primitive == "dot_general"
    assert norm.advice.startswith("let this operation read the stream through a LayerNorm")


@pytest.mark.parametrize("spelling", NORMS)
def test_variance_is_told_apart(spelling: str) -> None:
    report = report_of("vit", spelling)
    assert {norm.two_pass for norm in report.norms} == {spelling != "one_pass"}
    assert ("two-pass" in str(report)) == (spelling != "one_pass")


@pytest.mark.parametrize("width", [20, 60, 79, 110, 200, 500])
@pytest.mark.parametrize("name", ["bert", "swin", "gpt2"])
def test_no_line_is_too_wide(name: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    text = str(report_of(name))
    assert max(map(len, text.splitlines())) <= min(max(width, 60), 200)
    assert "\x1b" not in text
    plain = re.sub(r"\s+", "", text)
    for norm in report_of(name).norms:
        assert re.sub(r"\d+", "", norm.path.rsplit("/", 1)[-1]) in re.sub(r"\d+", "", plain)


def test_colour_only_on_a_terminal() -> None:
    report = report_of("bert")
    for colour in (False, True):
        console = Console(force_terminal=colour, color_system="standard" if colour else None)
        with console.capture() as capture:
            console.print(report)
        assert ("\x1b[33mleft" in capture.get()) == colour
        assert "1 of 5 LayerNorms folded" in capture.get()


class Outline(HTMLParser):
    """Checks that tags are balanced, and collects text and attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.classes: list[str | None] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.classes += [value for name, value in attrs if name == "class"]
        assert tag not in ("script", "link", "img"), "needs something else"

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_notebook() -> None:
    html = report_of("bert")._repr_html_()
    outline = Outline(html)
    assert outline.classes.count("folded") == 1
    assert outline.classes.count("left") == 3
    assert "1 of 5 LayerNorms folded" in " ".join(outline.texts)
    assert "http" not in html
    assert "#fff" not in html, "takes the colours of the page"
    html = jax_lnfold.analyze(lambda p, x: x @ p, jnp.ones((7, 3)), jnp.ones((2, 7)))._repr_html_()
    assert "No LayerNorm found" in " ".join(Outline(html).texts)


def test_text_is_escaped() -> None:
    def apply(w: jax.Array, x: jax.Array) -> jax.Array:
        with jax.named_scope("<b>[red]&"):
            return nn.standardize(jnp.tanh(x @ w))

    report = jax_lnfold.analyze(apply, jnp.ones((7, 12)), jnp.ones((2, 7)))
    assert "<b>[red]&" in str(report)
    assert "<b>" not in report._repr_html_()
    assert "<b>[red]&" in "".join(Outline(report._repr_html_()).texts)


@pytest.mark.parametrize(
    ("texts", "one"),
    [
        (["a"], "a"),
        (["a_3/b_1"], "a_3/b_1"),
        (["a_0/b_1", "a_1/b_1", "a_2/b_1"], "a_{0-2}/b_1"),
        (["a_10", "a_8", "a_9"], "a_{8-10}"),
        (["4a_0", "4a_2", "4a_5"], "4a_{0,2,5}"),
    ],
)
def test_merged(texts: list[str], one: str) -> None:
    assert merged(texts) == one


def test_only_rows_that_are_alike_are_grouped() -> None:
    row = Row("a_0/n", "2x5", "1", "one-pass", False, ("`mul` (a_0, f.py:7) scales", ""), ("f", 7))
    others = {
        "another layer": ("a_1/n", ("`mul` (a_1, f.py:7) scales", ""), ("f", 7), 1),
        "another line": ("a_1/n", ("`mul` (a_1, f.py:8) scales", ""), ("f", 8), 2),
        "another name": ("b_1/n", ("`mul` (a_1, f.py:7) scales", ""), ("f", 7), 2),
        "another reason": ("a_1/n", ("`add` (a_1, f.py:7) scales", ""), ("f", 7), 2),
    }
    for path, words, place, count in others.values():
        other = Row(path, "2x5", "1", "one-pass", False, words, place)
        assert len(grouped([row, other])) == count
    assert grouped([row, Row("a_1/n", "2x6", "1", "one-pass", False, row.words, ("f", 7))])[1:]
