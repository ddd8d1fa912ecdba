"""Tables of the results, written into a README between markers, and figures beside them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from scipy import stats

Content: TypeAlias = dict[str, Any]

BEGIN = "<!-- results: written by `python -m bench.training`, do not edit -->"
END = "<!-- end of results -->"
REFERENCE, FOLDED = "layernorm", "cbwc_rmsnorm"
ORDER = (REFERENCE, FOLDED, "rmsnorm", "none")
SMALL = 5e-5  # deviations below are written with exponents
APART = 1e-3  # of the training loss, as a share of it


class Spread(NamedTuple):
    """Mean and sample standard deviation over seeds."""

    n: int
    mean: float
    std: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Of what was measured; the deviation of a single value is not known."""
        x = np.array(list(values), float)
        mean = float(x.mean()) if len(x) else np.nan
        return cls(len(x), mean, float(x.std(ddof=1)) if len(x) > 1 else np.nan)

    @property
    def interval(self) -> float:
        """Half of the 95 % confidence interval of the mean, by Student's t."""
        if self.n < 2:
            return np.nan
        return float(stats.t.ppf(0.975, self.n - 1)) * self.std / self.n**0.5

    def text(self, signed: bool = False) -> str:
        """Mean and deviation with the digits that the deviation allows."""
        if not self.n:
            return "—"
        if self.std == self.mean == 0:
            return "0 ± 0"
        if 0 < self.std < SMALL:
            mean = "0" if abs(self.mean) < self.std / 2 else f"{self.mean:.0e}"
            return f"{mean} ± {self.std:.0e}"
        digits = 4
        if np.isfinite(self.std) and self.std > 0:
            digits = int(np.clip(1 - np.floor(np.log10(self.std)), 0, 4))
        value = f"{self.mean:{'+' if signed else ''}.{digits}f}"
        return f"{value} ± {self.std:.{digits}f}" if np.isfinite(self.std) else value


class Agreement(NamedTuple):
    """How close the folded run of a seed stays to the one with LayerNorms."""

    apart: int | None  # steps until the training losses differ by `APART`
    largest: float  # difference of the training losses on the way, as a share of the loss
    final: float  # difference of the final metrics


def runs(content: Content, task: str, variant: str, dtype: str = "float32") -> dict[int, Any]:
    """Runs by seed."""
    return {
        run["seed"]: run
        for run in content["runs"]
        if (run["task"], run["variant"], run["dtype"]) == (task, variant, dtype)
    }


def finals(content: Content, task: str, variant: str) -> Spread:
    """The final metric over the seeds that did not diverge."""
    found = (run["final"] for run in runs(content, task, variant).values() if not run["diverged"])
    return Spread.of(x for x in found if x is not None)


def differences(content: Content, task: str, variant: str) -> Spread:
    """The final metric less that of the LayerNorms, seed by seed."""
    first, second = (runs(content, task, v) for v in (REFERENCE, variant))
    pairs = [(first[s]["final"], second[s]["final"]) for s in sorted(first.keys() & second.keys())]
    return Spread.of(b - a for a, b in pairs if a is not None and b is not None)


def agreement(content: Content, task: str, dtype: str = "float32") -> list[Agreement]:
    """Of each seed that has both runs."""
    first, second = (runs(content, task, v, dtype) for v in (REFERENCE, FOLDED))
    every = content["tasks"][task]["settings"]["log_every"]
    found = []
    for seed in sorted(first.keys() & second.keys()):
        a, b = (np.array(r[seed]["train_loss"], float) for r in (first, second))
        relative = np.abs(b - a) / np.abs(a)
        above = np.flatnonzero(relative > APART)
        final = abs((second[seed]["final"] or 0) - (first[seed]["final"] or 0))
        apart = (int(above[0]) + 1) * every if len(above) else None
        found.append(Agreement(apart, float(relative.max()), final))
    return found


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
    rows = []
    for name, found in content["programs"].items():
        base = found[REFERENCE]
        for variant in (v for v in ORDER if v in found):
            p = found[variant]
            low, middle, high = p["time_ratio"]
            folded = f"{p['folded']} of {p['layernorms']}" if p["layernorms"] else "none there"
            rows.append(
                [
                    name,
                    variant,
                    folded,
                    f"{1e3 * p['seconds_per_step']:.1f}",
                    "1" if p is base else f"{middle:.3f} ({low:.3f} to {high:.3f})",
                    f"{p['flops'] / base['flops']:.4f}",
                    f"{p['bytes'] / base['bytes']:.4f}",
                    str(p["reductions"]),
                ]
            )
    if not rows:
        return ""
    head = ["task", "variant", "LayerNorms folded", "ms per training step"]
    head += [f"time, relative to `{REFERENCE}` (quartiles)", "flops, relative"]
    head += ["bytes accessed, relative", "reductions in the program"]
    return "**Cost of a training step (optimiser included)**\n\n" + _table(head, rows)


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
            verdicts.append(f"{name}: {'on a par' if par else word}")
        if verdicts:
            lines.append(f"- Metric of `{variant}` against `{REFERENCE}`: {', '.join(verdicts)}.")
    verdicts = []
    for name, found in content["programs"].items():
        if FOLDED in found:
            low, middle, high = found[FOLDED]["time_ratio"]
            word = "faster" if high < 1 else "slower" if low > 1 else "no difference"
            verdicts.append(f"{name}: {word} ({100 * (middle - 1):+.1f} %)")
    if verdicts:
        lines.append(f"- Training step of `{FOLDED}` against it: {', '.join(verdicts)}.")
    if not lines:
        return ""
    return (
        "**In words.** *On a par*: the 95 % confidence interval of the mean difference holds zero, "
        f"or the difference is under a tenth of the deviation of `{REFERENCE}`. "
        "*Faster*, *slower*: both quartiles of the ratio are on one side of 1.\n\n"
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
