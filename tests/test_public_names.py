"""What `jax_lnfold` offers: its names, and that whatever a user holds in hand has one."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jax_lnfold
from jax_lnfold import FoldPlan, Report
from tests.models.zoo import ZOO

PUBLIC = {*jax_lnfold.__all__}
INNER = {"Event"}  # what pictures are drawn from


def test_nothing_else_is_shown() -> None:
    assert {*dir(jax_lnfold)} == PUBLIC | {"__version__"}
    assert all(hasattr(jax_lnfold, name) for name in dir(jax_lnfold))


def test_no_name_is_a_module_and_something_else() -> None:
    modules = pkgutil.walk_packages(jax_lnfold.__path__, "jax_lnfold.")
    names = {module.name.rpartition(".")[2] for module in modules}
    assert PUBLIC & names == {"rules"}, "which is a public module"


def held(x: Any) -> Iterator[type]:
    """The classes of this package that can be reached from an object through its fields."""
    if type(x).__module__.startswith("jax_lnfold"):
        yield type(x)
    if is_dataclass(x):
        for field in fields(x):
            yield from held(getattr(x, field.name))
    elif isinstance(x, (tuple, list)):
        for item in x:
            yield from held(item)
    elif isinstance(x, dict):
        yield from held([*x.items()])


@pytest.mark.parametrize("name", ["bert", "dinov2"])
def test_what_a_report_holds_has_a_public_name(name: str) -> None:
    model = next(case for case in ZOO if str(case) == name).build()
    options = {"fold_affine": True, "defer_scale": True, "untie": True}
    report = jax_lnfold.analyze(model.apply_fn, model.params, *model.inputs, **options)
    assert {c.__name__ for c in held(report)} - PUBLIC <= INNER


def test_fields_of_plans_and_reports_have_public_types() -> None:
    """Also of what no example holds."""
    types = " ".join(str(f.type) for c in (FoldPlan, Report) for f in fields(c))
    named = {*types.replace("[", " ").replace(",", " ").replace("]", " ").split()}
    classes = {n for n in named if n[0].isupper()} - {"None", "Programs"}
    assert classes - PUBLIC == INNER
    assert len(classes) > 12


def test_cost_is_public() -> None:
    layer_norm = lambda p, x: jax.nn.standardize(x @ p)  # noqa: E731
    report = jax_lnfold.analyze(layer_norm, jnp.ones((3, 5)), jnp.ones((2, 3)))
    assert type(report.cost) is jax_lnfold.Cost
