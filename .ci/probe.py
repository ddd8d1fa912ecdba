"""Tries an installed `jax_lnfold` without Flax and optax: import, fold, save, command line."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import metadata, requires
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp

import jax_lnfold

TARGET = """
import jax, jax.numpy as jnp

def target():
    def model(p, x):
        return jax.nn.standardize(x @ p["stem"]) @ p["head"]
    shape = lambda *n: jax.ShapeDtypeStruct(n, jnp.float32)
    return model, {"stem": shape(3, 5), "head": shape(5, 2)}, (shape(4, 3),)
"""


def main() -> None:
    """Raises if something is missing that the base dependencies should bring."""
    installed = Path(jax_lnfold.__file__).resolve()
    assert "site-packages" in installed.parts, f"{installed} is not what was installed"
    assert not any(map(find_spec, ("flax", "optax", "pytest"))), "more than the base is installed"
    assert metadata("jax_lnfold")["Version"] == jax_lnfold.__version__
    assert requires("jax_lnfold")
    assert (installed.parent / "py.typed").exists()

    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "stem": jax.random.normal(keys[0], (3, 5)),
        "head": jax.random.normal(keys[1], (5, 2)),
    }
    x = jax.random.normal(keys[2], (4, 3))

    def model(p: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        return jax.nn.standardize(x @ p["stem"]) @ p["head"]

    folded = jax_lnfold.fold(model, params, x)
    assert folded.report.n_folded == 1
    assert jnp.allclose(folded(x), model(params, x), atol=1e-5)
    assert jax_lnfold.FoldPlan.from_json(folded.plan.to_json()) == folded.plan
    assert "1 of 1 LayerNorm folded" in str(folded.report)

    Path("own_model.py").write_text(TARGET)
    script = Path(sys.executable).with_name("jax-lnfold")
    for command in ([script], [sys.executable, "-m", "jax_lnfold"]):
        told = subprocess.run(
            [*command, "report", "own_model:target"], check=True, capture_output=True, text=True
        )
        assert "1 of 1 LayerNorm folded" in told.stdout


if __name__ == "__main__":
    main()
