"""Ahead-of-time compilation for NVIDIA GPUs on a machine without one, and XLA's estimates.

Needs XLA's GPU compiler, which runs on a CPU (see `bench/README.md`). Nothing is run. Products and
convolutions become calls of cuBLAS and cuDNN, of which the compiler knows nothing: they are
counted, and time is that of all other kernels by XLA's model of the device.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import jax

from .tpu import result_bytes

DEVICES = {
    "h100": {
        "cores": 132,
        "capability": (9, 0),
        "bandwidth": 3_352_320_000_000,
        "clock": 1.98,
        "memory": 84_929_347_584,
        "cache": 52_428_800,
        "shared": (233_472, 232_448),
        "name": "NVIDIA H100 80GB HBM3",
    },
    "a100": {
        "cores": 108,
        "capability": (8, 0),
        "bandwidth": 2_039_000_000_000,
        "clock": 1.41,
        "memory": 85_095_874_560,
        "cache": 41_943_040,
        "shared": (167_936, 166_912),
        "name": "NVIDIA A100-SXM4-80GB",
    },
}
"""Published facts: bytes a second, GHz, bytes; shared memory per core, and what one block takes."""
COMPILER_OPTIONS = {
    "xla_gpu_collect_cost_model_stats": True,
    "xla_gpu_enable_analytical_sol_latency_estimator": False,  # knows no A100; only orders kernels
    "xla_gpu_autotune_level": 0,  # without a device nothing can be timed
    "xla_gpu_enable_triton_gemm": False,  # the same products for all variants
}
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%(\S+) = (\(.*?\)|\S+) ([a-z-]+)\((.*)$", re.MULTILINE)
_WORKSPACE = re.compile(r", [su]8\[\d+\]\{0\}")  # of a library, not always used
_OPERAND = re.compile(r"%([\w.-]+)")
_COSTS = re.compile(r'"reification_cost":\[(.*?)\]')
_COST = re.compile(r'"exec_time_us":([\d.eE+-]+).*?"name":"([^"]*)"')


@dataclass(frozen=True, slots=True)
class GpuEstimate:
    """What XLA expects of one call.

    `microseconds` and `fusions` are of the kernels that XLA writes itself, `products` the calls of
    libraries; `kernels` are both, and `bytes` what they read and write.
    """

    microseconds: float
    kernels: int
    fusions: int
    products: int
    bytes: int


def set_up_environment() -> None:
    """Keep jax from looking for a GPU here; call it before jax is used."""
    jax.config.update("jax_platforms", "cpu")  # the variable was read when jax was imported


def devices(kind: str) -> list[Any]:
    """One device of a kind; a `RuntimeError` where the compiler is missing."""
    from jax.experimental import topologies

    found = topologies.get_topology_desc(
        platform="cuda", target_config=description(kind), topology="1x1x1"
    )
    return list(found.devices)


def description(kind: str) -> str:
    """A device as the compiler wants it described (a protocol buffer, as text)."""
    facts = DEVICES[kind]
    (major, minor), (per_core, per_block) = facts["capability"], facts["shared"]
    return (
        "gpu_device_info { threads_per_block_limit: 1024 threads_per_warp: 32 "
        f"shared_memory_per_block: 49152 shared_memory_per_core: {per_core} "
        f"threads_per_core_limit: 2048 core_count: {facts['cores']} "
        f"fpus_per_core: {128 if major == 9 else 64} "
        "block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535 "
        f"memory_bandwidth: {facts['bandwidth']} l2_cache_size: {facts['cache']} "
        f"clock_rate_ghz: {facts['clock']} device_memory_size: {facts['memory']} "
        f"shared_memory_per_block_optin: {per_block} "
        f"cuda_compute_capability {{ major: {major} minor: {minor} }} "
        "registers_per_core_limit: 65536 registers_per_block_limit: 65536 } "
        'platform_name: "CUDA" dnn_version_info { major: 9 minor: 7 } '
        "runtime_version { major: 12 minor: 8 patch: 0 } "
        f'device_description_str: "{facts["name"]}"'
    )


def no_compiler(kind: str) -> str:
    """Why nothing can be compiled for this GPU, or nothing."""
    try:
        devices(kind)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return f"no compiler for CUDA ({reason}); bench/README.md says what to install"
    return ""


def compiled(lowered: Any) -> GpuEstimate:
    """Compile a program that was lowered for one of these devices."""
    return read(lowered.compile(compiler_options=COMPILER_OPTIONS))


def read(compiled: Any) -> GpuEstimate:
    """The estimates in a compiled program; a `ValueError` if it has loops, whose turns vary."""
    entry = compiled.as_text().partition("\nENTRY ")[2]  # other computations are inside of kernels
    if " while(" in entry:
        raise ValueError("kernels of a loop run many times; write the model without one")
    sizes = {
        name: result_bytes(_WORKSPACE.sub("", shape), with_operands=False)
        for name, shape, *_ in _INSTRUCTION.findall(entry)
    }
    fusions, products, moved, time = 0, 0, 0, 0.0
    for name, _, code, rest in _INSTRUCTION.findall(entry):
        if code not in ("fusion", "custom-call"):
            continue  # nothing is started for it
        operands = _OPERAND.findall(rest[: rest.index(")")])
        moved += sizes[name] + sum(map(sizes.__getitem__, operands))
        if code == "custom-call":
            products += 1
            continue
        fusions += 1
        costs = {model: float(number) for number, model in _COST.findall(_COSTS.search(rest)[1])}
        time += costs.get("indexing-cost-model", costs.get("", 0.0))
    return GpuEstimate(time, fusions + products, fusions, products, moved)
