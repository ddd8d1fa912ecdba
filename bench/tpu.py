"""Ahead-of-time compilation for TPU on a machine without one, and the compiler's estimates.

Needs `libtpu` (``pip install "jax[tpu]"``). Nothing is run: the figures are what the compiler
expects, the same on every run.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

TOPOLOGIES = {"v5e": "v5e:2x2", "v6e": "v6e:2x2"}
_CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')
_COLLECTIVE = re.compile(
    r" = (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\("
)
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+)[a-z0-9]*)\[([\d,]*)\]")


@dataclass(frozen=True, slots=True)
class Estimate:
    """What the compiler expects of one call: cycles of all fusions, bytes, operations, fusions.

    Collectives with the bytes of their results on one device.
    """

    cycles: int
    bytes: float
    flops: float
    fusions: int
    collectives: int
    collective_bytes: int = 0


def set_up_environment() -> None:
    """What libtpu wants to know where there is no TPU; call it before jax is used."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


def devices(kind: str) -> list[Any]:
    """Devices of a topology, or of a kind of chip; a `RuntimeError` where libtpu is missing."""
    from jax.experimental import topologies

    name = TOPOLOGIES.get(kind, kind)
    return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)


def no_libtpu(kind: str) -> str:
    """Why nothing can be compiled for this TPU, or nothing."""
    try:
        devices(kind)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return f'no libtpu ({reason}); run `pip install "jax[tpu]"`'
    return ""


def has_compiler(kind: str) -> bool:
    """Whether there is a compiler for this kind of device."""
    return kind == "cpu" or not no_libtpu(kind)


def lowered(function: Callable[..., Any], *arguments: Any, kind: str) -> Any:
    """`function` of shapes, to be compiled for one chip of this kind."""
    return lowered_for(devices(kind)[0], function, *arguments)


def lowered_for(device: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    """`function` of shapes (trees of arrays or `ShapeDtypeStruct`), to be compiled for a device."""
    chip = NamedSharding(Mesh(np.array([device]), ("chip",)), PartitionSpec())
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=chip), arguments
    )
    return jax.jit(function).lower(*shapes)


def estimate(function: Callable[..., Any], *arguments: Any, kind: str) -> Estimate:
    """Compile `function` of shapes for one chip."""
    return read(lowered(function, *arguments, kind=kind).compile())


def read(compiled: Any) -> Estimate:
    """The estimates in a compiled program."""
    text, cost = compiled.as_text(), compiled.cost_analysis() or {}
    found = collectives(text)
    return Estimate(
        cycles=sum(map(int, _CYCLES.findall(text))),
        bytes=cost.get("bytes accessed", 0.0),
        flops=cost.get("flops", 0.0),
        fusions=text.count(" fusion("),
        collectives=len(found),
        collective_bytes=sum(size for _, size in found),
    )


def collectives(text: str) -> list[tuple[str, int]]:
    """(name, bytes of the results on one device) of each collective in compiled HLO.

    One of a tuple counts once, with all its bytes.
    """
    return [
        (name, result_bytes(shapes, with_operands=bool(start) and name != "all-reduce"))
        for shapes, name, start in _COLLECTIVE.findall(text)
    ]


def result_bytes(shapes: str, with_operands: bool) -> int:
    """Bytes of the arrays in a type; where operands come first, of its latter half."""
    sizes = [
        math.prod(map(int, filter(None, dims.split(",")))) * (int(bits) if bits else 8) // 8
        for _, bits, dims in _ARRAY.findall(shapes)
        if dims or not with_operands  # scalars are the state of an asynchronous operation
    ]
    return sum(sizes[len(sizes) // 2 :] if with_operands else sizes)
