"""Tables of the results, written into a README between markers, and figures beside them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from .costs import PARTS
from .measures import (
    APART,
    FOLDED,
    ORDER,
    REFERENCE,
    Content,
    agreement,
    differences,
    finals,
    runs,
)

BEGIN = "<!-- results: written by `python -m bench.training`, do not edit -->"
END = "<!-- end of results -->"


# --- Markdown ------------------------------------------------------------------------------------


def markdown(content: Content) -> str:
    """Everything that the README says in numbers."""
    parts = [_setting(content), _metrics(content), _differences(content)]
    parts += [_agreement(content), _costs(content), _verdict(content)]
    return "\n\n".join(part for part in parts if part)


def _setting(content: Content) -> str:
    software = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    machine = content["hardware"]
    return (
        f"Measured on {machine['processor']} ({machine['cores']} cores, of which one was used), "
        f"with {software}. Of seeds the mean ± the sample standard deviation."
    )


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head)]
    lines += [["---"] * len(lines[0])]
    lines += [list(row) for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _metric(task: Content) -> str:
    unit = f", {task['unit']}" if task["unit"] else ""
    return f"{task['metric']}{unit}, {'higher' if task['higher_is_better'] else 'lower'} is better"


def _variants(content: Content) -> list[str]:
    found = {run["variant"] for run in content["runs"]}
    return [v for v in ORDER if v in found]


def _metrics(content: Content) -> str:
    variants = _variants(content)
    rows = []
    for name, task in content["tasks"].items():
        row = [f"{name} ({_metric(task)})"]
        for variant in variants:
            all_runs = runs(content, name, variant)
            bad = sum(run["diverged"] for run in all_runs.values())
            note = f" ({bad} of {len(all_runs)} diverged)" if bad else ""
            row.append(finals(content, name, variant).text() + note)
        rows.append(row)
    return "**Held-out metric at the end**\n\n" + _table(["task", *variants], rows)


def _differences(content: Content) -> str:
    others = [v for v in _variants(content) if v != REFERENCE]
    rows = [
        [name, *(differences(content, name, v).text(signed=True) for v in others)]
        for name in content["tasks"]
    ]
    head = ["task", *(f"{v} - {REFERENCE}" for v in others)]
    return f"**Difference to `{REFERENCE}`, seed by seed**\n\n" + _table(head, rows)


def _agreement(content: Content) -> str:
    rows = []
    for name, task in content["tasks"].items():
        if not (single := agreement(content, name)):
            continue
        steps = task["settings"]["steps"]
        apart = ", ".join("never" if a.apart is None else str(a.apart) for a in single)
        if all(a.apart is None for a in single):
            apart = "never"
        double = agreement(content, name, "float64")
        rows.append(
            [
                name,
                f"{apart} (of {steps})",
                f"{max(a.largest for a in single):.1e}",
                f"{max(a.final for a in single):.2g}",
                *([f"{double[0].largest:.1e}", f"{double[0].final:.1e}"] if double else "——"),
            ]
        )
    if not rows:
        return ""
    head = [
        "task",
        f"steps until the training losses differ by {APART:g} of the loss, per seed",
        "largest such difference",
        "largest difference of the final metric",
        "float64: largest difference of the losses",
        "float64: of the final metric",
    ]
    return f"**How close `{FOLDED}` stays to `{REFERENCE}`**\n\n" + _table(head, rows)


def _costs(content: Content) -> str:
    found = content["programs"]
    if not found:
        return ""
    head = ["task", "variant", "LayerNorms folded", "ms"]
    head += [f"time, relative to `{REFERENCE}` (95 % interval)", "flops, relative"]
    head += ["bytes accessed, relative", "reductions in the program"]
    titles = {"step": "Cost of a training step", "gradient": "Of this, loss and gradients alone"}
    return "\n\n".join(
        f"**{titles[part]}**\n\n"
        + _table(head, (_cost(t, v, part, found[t]) for t in found for v in ORDER if v in found[t]))
        for part in PARTS
    )


def _cost(task: str, variant: str, part: str, found: Content) -> list[str]:
    norms, p, base = found[variant], found[variant][part], found[REFERENCE][part]
    low, middle, high = p["time_ratio"]
    return [
        task,
        variant,
        f"{norms['folded']} of {norms['layernorms']}" if norms["layernorms"] else "none there",
        f"{1e3 * p['seconds']:.1f}",
        "1" if p is base else f"{middle:.3f} ({low:.3f} to {high:.3f})",
        f"{p['flops'] / base['flops']:.4f}",
        f"{p['bytes'] / base['bytes']:.4f}",
        str(p["reductions"]),
    ]


def _verdict(content: Content) -> str:
    """What the criteria below say, task by task."""
    lines = []
    for variant in _variants(content)[1:]:
        verdicts = []
        for name in content["tasks"]:
            d = differences(content, name, variant)
            if d.n < 2:
                continue
            par = abs(d.mean) <= max(d.interval, 0.1 * finals(content, name, REFERENCE).std)
            better = (d.mean > 0) == content["tasks"][name]["higher_is_better"]
            word = "better" if better else "worse"
            verdicts.append(f"{name}: {'no clear difference' if par else word}")
        if verdicts:
            lines.append(f"- Metric of `{variant}` against `{REFERENCE}`: {', '.join(verdicts)}.")
    for part in PARTS:
        verdicts = []
        for name, found in content["programs"].items():
            if FOLDED in found:
                low, middle, high = found[FOLDED][part]["time_ratio"]
                word = "faster" if high < 1 else "slower" if low > 1 else "no clear difference"
                verdicts.append(f"{name}: {word} ({100 * (middle - 1):+.1f} %)")
        if verdicts:
            what = {"step": "Training step", "gradient": "Loss and gradients"}[part]
            lines.append(f"- {what} of `{FOLDED}`: {', '.join(verdicts)}.")
    if not lines:
        return ""
    return (
        "**In words.** *No clear difference*: the 95 % confidence interval of the mean difference "
        "holds zero, "
        f"or the difference is under a tenth of the deviation of `{REFERENCE}`. "
        "*Faster*, *slower*: the 95 % interval of the ratio of times is on one side of 1.\n\n"
    ) + "\n".join(lines)


# --- files ---------------------------------------------------------------------------------------


def insert(text: str, generated: str) -> str:
    """The README with this between its markers; without markers it goes to the end.

    Raises:
        SystemExit: only one marker is there.
    """
    block = f"{BEGIN}\n\n{generated}\n\n{END}"
    if BEGIN not in text and END not in text:
        return f"{text.rstrip()}\n\n{block}\n".lstrip()
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"error: the README needs both markers: {BEGIN} and {END}")
    return before + block + after


def write(out: Path, content: Content, plots: bool = True) -> list[Path]:
    """Writes README.md and a figure per task beside the results; returns the files."""
    readme = out.with_name("README.md")
    old = readme.read_text() if readme.exists() else "# Results\n"
    part = readme.with_name(f".{readme.name}.{os.getpid()}")
    figures = []
    if plots:
        from .plots import draw

        figures = [draw(content, name, out.with_name(f"{name}.svg")) for name in content["tasks"]]
    generated = markdown(content)
    if figures:
        links = (f"![{path.stem}: curves of training]({path.name})" for path in figures)
        generated += "\n\n" + "\n\n".join(links)
    part.write_text(insert(old, generated))
    os.replace(part, readme)
    return [readme, *figures]
