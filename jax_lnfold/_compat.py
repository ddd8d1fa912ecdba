"""The only importer of `jax.extend`: everything that moved between jax versions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun

__all__ = [
    "CUSTOM_RULES",
    "ClosedJaxpr",
    "Jaxpr",
    "JaxprEqn",
    "Literal",
    "Var",
    "call_jaxpr",
    "close",
    "consts_of",
    "is_tracer",
    "jaxpr_as_fun",
    "open_jaxpr",
    "source_line",
    "with_call_jaxpr",
]

# Calls that run one jaxpr on their operands: primitive name -> parameter that holds it.
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
}

CUSTOM_RULES = frozenset({"custom_jvp_call", "custom_vjp_call"})
"""Calls whose derivative is not that of their body: values inside must keep their meaning."""

_JAX_PARTS = ("/jax/_src/", "/jaxlib/", "/jax_lnfold/", "<")
_LIBRARY_PARTS = (*_JAX_PARTS, "/site-packages/", "/dist-packages/")


def open_jaxpr(jaxpr: ClosedJaxpr | Jaxpr) -> Jaxpr:
    """The jaxpr without its constants (since jax 0.11 both are one class)."""
    inner: Any = getattr(jaxpr, "jaxpr", jaxpr)
    return inner


def consts_of(jaxpr: ClosedJaxpr | Jaxpr) -> Sequence[Any]:
    """The values of the jaxpr's `constvars`, as far as it carries them."""
    return getattr(jaxpr, "consts", ())


def close(jaxpr: Jaxpr, consts: Sequence[Any]) -> ClosedJaxpr:
    """Bind `consts` to the jaxpr's `constvars`."""
    return ClosedJaxpr(jaxpr, list(consts))


def call_jaxpr(eqn: JaxprEqn) -> ClosedJaxpr | Jaxpr | None:
    """The jaxpr that a call-like equation runs on its operands, None for other equations."""
    name = _CALLS.get(eqn.primitive.name)
    inner = eqn.params.get(name) if name else None
    if inner is None or len(open_jaxpr(inner).invars) != len(eqn.invars):
        return None
    return inner


def with_call_jaxpr(
    eqn: JaxprEqn, jaxpr: Jaxpr, consts: Sequence[Any], invars: Sequence[Any]
) -> JaxprEqn:
    """The call-like equation with another body and other operands."""
    name = _CALLS[eqn.primitive.name]
    old = eqn.params[name]
    body = close(jaxpr, consts) if isinstance(old, ClosedJaxpr) else jaxpr
    return eqn.replace(params={**eqn.params, name: body}, invars=list(invars))


def is_tracer(x: Any) -> bool:
    """Whether `x` stands for a value that is not known yet."""
    return isinstance(x, Tracer)


def source_line(eqns: Sequence[JaxprEqn]) -> str:
    """``file.py:line`` of the code that made the first equation, empty if unknown.

    The user's own code is preferred to that of libraries, and any code to that of jax. Functions
    that jax has traced before know no caller: the calls around an equation follow it in `eqns`.
    """
    for skipped in (_LIBRARY_PARTS, _JAX_PARTS):
        for file, line in (frame for eqn in eqns for frame in _frames(eqn)):
            if not any(part in file for part in skipped):
                return f"{file.rsplit('/', 1)[-1]}:{line}"
    return ""


def _frames(eqn: JaxprEqn) -> Iterator[tuple[str, int]]:
    traceback = getattr(eqn.source_info, "traceback", None)
    for frame in getattr(traceback, "frames", ()):
        yield frame.file_name.replace("\\", "/"), frame.line_num
