"""Kernels as they are met: of Pallas for GPUs and TPUs in interpret mode, and a call of C++."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.gpu.layer_norm import layer_norm as gpu_layer_norm
from jax.experimental.pallas.ops.gpu.rms_norm import rms_norm as gpu_rms_norm

import jax_lnfold
from jax_lnfold.rules import check_rule, ffi_target, linear, register
from tests.helpers.contracts import counts, fold_checked, relative_difference
from tests.kernels.kernels import pallas_norm

RNG = np.random.default_rng(0)


def draw(*shape: int) -> Any:
    return jnp.asarray(RNG.normal(size=shape))


PARAMS = {
    "embed": draw(4, 6),
    "norm": (draw(6), draw(6)),
    "w": draw(6, 6),
    "last": (draw(6), draw(6)),
    "head": draw(6, 3),
}


def model(p: Any, x: Any, norm: Any) -> Any:
    h = x @ p["embed"]
    h = h + jnp.tanh(norm(h, *p["norm"])) @ p["w"]
    return norm(h, *p["last"]) @ p["head"]


def test_pallas_kernel_in_float64() -> None:
    folded = fold_checked(partial(model, norm=pallas_norm), PARAMS, draw(2, 3, 4))
    assert counts(folded.report) == (2, 2, 0)
    assert {n.kernel for n in folded.report.norms} == {"pallas_rows"}
    kernels = str(jax.make_jaxpr(folded.apply)(folded.params, draw(2, 3, 4)))
    assert kernels.count("pallas_call") == 2


def test_pallas_kernel_trains() -> None:
    fn, x = partial(model, norm=pallas_norm), draw(2, 3, 4)
    folded = jax_lnfold.fold(fn, PARAMS, x)
    got, want = (
        folded.plan.center(jax.jit(jax.grad(lambda p, f=f: jnp.sum(f(p, x) ** 2)))(folded.params))
        for f in (folded.apply, fn)
    )
    assert relative_difference(got, want) < 1e-12


def test_the_kernels_of_jax_for_gpus() -> None:
    """Their accumulators are float32, so that is how exact they are."""
    interpreted = {"interpret": True, "backward_pass_impl": "xla"}
    norm = jax_lnfold.layer_norm(
        lambda x, g, b: gpu_layer_norm(x, g, b, **interpreted),
        rms=lambda x, g, b: gpu_rms_norm(x, g, b, **interpreted),
        scale="g",
        shift="b",
        name="gpu_layer_norm",
        tolerance=1e-4,
    )
    p, x = jax.tree.map(lambda a: a.astype("float32"), (PARAMS, draw(2, 3, 4)))
    folded = fold_checked(partial(model, norm=norm), p, x, rtol=2e-5)
    assert counts(folded.report) == (2, 2, 0)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The C++ kernels, compiled."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    made = tmp_path_factory.mktemp("ffi") / "layer_norm.so"
    source = Path(__file__).parent / "layer_norm.cc"
    options = ["-shared", "-fPIC", "-std=c++17", f"-I{jax.ffi.include_dir()}"]
    subprocess.run([compiler, *options, "-o", str(made), str(source)], check=True)
    found = ctypes.cdll.LoadLibrary(str(made))
    for name in ("NormaliseRows", "MultiplyRows"):
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(found, name)), platform="cpu")
    return found


def rows(x: Any, g: Any, b: Any, center: bool) -> Any:
    call = jax.ffi.ffi_call(
        "NormaliseRows", jax.ShapeDtypeStruct(x.shape, x.dtype), vmap_method="sequential"
    )
    return call(x, g, b, center=np.bool_(center))


def multiplied(x: Any, w: Any) -> Any:
    shape = jax.ShapeDtypeStruct((x.shape[0], w.shape[1]), x.dtype)
    return jax.ffi.ffi_call("MultiplyRows", shape, vmap_method="sequential")(x, w)


def test_calls_of_cpp(library: Any) -> None:
    norm = jax_lnfold.layer_norm(
        partial(rows, center=True), rms=partial(rows, center=False), scale=1, shift=2, name="cpp"
    )
    folded = fold_checked(partial(model, norm=norm), PARAMS, draw(2, 3, 4))
    assert counts(folded.report) == (2, 2, 0)
    register(ffi_target("MultiplyRows"), linear("nk,km->nm"))
    found = check_rule(multiplied, (3, 4), (4, 5))
    assert min(found.pulls, found.pushes, found.axes) > 0

    def products(p: Any, x: Any) -> Any:
        return norm(multiplied(x, p["embed"]), *p["norm"]) @ p["head"]

    folded = fold_checked(products, PARAMS, draw(5, 4))
    assert counts(folded.report) == (1, 1, 0)
    assert not folded.report.opaque
