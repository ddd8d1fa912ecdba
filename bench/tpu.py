"""Ahead-of-time compilation for TPU on a machine without one, and the compiler's estimates.

Needs `libtpu` (``pip install "jax[tpu]"``). Nothing is run: the figures are what the compiler
expects, the same on every run.
"""

from __future__ import annotations

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
_COLLECTIVE = re.compile(r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)\(")


@dataclass(frozen=True, slots=True)
class Estimate:
    """What the compiler expects of one call: cycles of all fusions, bytes, operations, fusions."""

    cycles: int
    bytes: float
    flops: float
    fusions: int
    collectives: int


def set_up_environment() -> None:
    """What libtpu wants to know where there is no TPU; call it before jax is used."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")


def devices(kind: str) -> list[Any]:
    """Devices of a topology to compile for; a `RuntimeError` where libtpu is missing."""
    from jax.experimental import topologies

    return list(
        topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[kind]).devices
    )


def estimate(function: Callable[..., Any], *arguments: Any, kind: str) -> Estimate:
    """Compile `function` of shapes (trees of arrays or `ShapeDtypeStruct`) for one chip."""
    chip = NamedSharding(Mesh(np.array(devices(kind)[:1]), ("chip",)), PartitionSpec())
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=chip), arguments
    )
    return read(jax.jit(function).lower(*shapes).compile())


def read(compiled: Any) -> Estimate:
    """The estimates in a compiled program."""
    text, cost = compiled.as_text(), compiled.cost_analysis() or {}
    return Estimate(
        cycles=sum(map(int, _CYCLES.findall(text))),
        bytes=cost.get("bytes accessed", 0.0),
        flops=cost.get("flops", 0.0),
        fusions=text.count(" fusion("),
        collectives=len(_COLLECTIVE.findall(text)),
    )
