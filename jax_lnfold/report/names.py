"""What LayerNorms are called: after their module, or their place in the tree, or their line."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..analysis.facts import Facts
from ..analysis.layer_norms import LayerNorm
from ..placement.norm_parameters import parameter_of
from ..placement.place import Placement
from ..program.graph import Graph
from ..trees import unboxed

_NO_NAME = re.compile(r"(\w+\()*(eqx\.nn\.\w+)?\)*")
"""Scopes that say what is called, but not which of them: ``vmap()``, a class of Equinox."""
TOP = "(top level)"
"""The name of what nothing is known about."""


@dataclass(frozen=True, slots=True)
class Name:
    """What a LayerNorm is called.

    `text` is its name, `beside` what stands next to that. If its `module` has a name, that is it:
    the scopes of Flax, Haiku and `jax.named_scope`. Else it is the `part` of the parameter tree
    that holds its scale or shift, whose key path is `key_path`, or `line`, ``file.py:line``.
    `kernel` is what the function is called that was declared to be it.
    """

    text: str
    beside: str
    module: str
    part: str
    key_path: str
    line: str
    kernel: str = ""

    @property
    def title(self) -> str:
        """The name with what stands next to it."""
        return f"{self.text} ({self.beside})" if self.beside else self.text


def names_of(placement: Placement) -> tuple[Name, ...]:
    """The names of all LayerNorms; those of one name have the same module and parameters."""
    facts = Facts(placement.graph)  # its own: what is asked for names is no part of the analysis
    names = [_name(placement.graph, norm, parameter_of(facts, norm)) for norm in placement.norms]
    kernels = [_kernel(placement.graph, norm) for norm in placement.norms]
    names = [replace(n, kernel=kernel) for n, kernel in zip(names, kernels, strict=True)]
    names = _told_apart(names, [unboxed(name.key_path) for name in names])
    names = _told_apart(names, [name.line for name in names])
    seen: Counter[str] = Counter()
    numbers = []
    for name in names:
        seen[name.text] += 1
        numbers.append("" if name.key_path else f"#{seen[name.text]}")
    return tuple(_told_apart(names, numbers))


def _name(graph: Graph, norm: LayerNorm, leaf: int | None) -> Name:
    """The name by which a LayerNorm goes as long as there is no other one of that name."""
    assert norm.root is not None
    function, module = graph.function_of(norm.root), norm.module
    scopes = module.removeprefix(function).split("/")
    line = norm.root.location().where
    key_path = "" if leaf is None else graph.leaves[leaf]
    key = unboxed(key_path)
    part = key.rpartition("/")[0]
    if not all(map(_NO_NAME.fullmatch, scopes)):
        return Name(module, "", module, part, key_path, line)
    # What lies at the root of the tree is in no part of it.
    own = part or ("" if function else line or key)
    beside = line if part else key if own != key else ""
    text = "/".join(word for word in (function, own) if word) or TOP
    return Name(text, beside or (line if function else ""), "", part, key_path, line)


def _kernel(graph: Graph, norm: LayerNorm) -> str:
    site = norm.root and graph.declared_at(norm.root)
    return graph.declared[site].name if site else ""


def _told_apart(names: Sequence[Name], details: Sequence[str]) -> list[Name]:
    """Names that are alike with their details behind them, where these differ."""
    different: dict[str, set[str]] = {}
    for name, detail in zip(names, details, strict=True):
        different.setdefault(name.text, set()).add(detail)
    return [
        _with_detail(name, detail) if detail and len(different[name.text]) > 1 else name
        for name, detail in zip(names, details, strict=True)
    ]


def _with_detail(name: Name, detail: str) -> Name:
    beside = "" if name.beside == detail else name.beside
    if name.part and not name.module and detail.startswith(f"{name.part}/"):
        return replace(name, text=name.text + detail.removeprefix(name.part), beside=beside)
    words = detail if detail.startswith("#") else f"({detail})"
    return replace(name, text=f"{name.text} {words}", beside=beside)
