"""A bug of the library says that it is one, before anything is changed."""

from __future__ import annotations

import pickle
import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jax_lnfold
from jax_lnfold.__main__ import main
from jax_lnfold.axes.axis_set import AxisSet
from jax_lnfold.errors import Bug
from jax_lnfold.placement.place import place
from jax_lnfold.placement.proof import prove
from jax_lnfold.program.tracing import Traced, trace
from jax_lnfold.rewrite.rewriter import rewrite

PARAMS = {"first": jnp.ones((3, 4)), "last": jnp.ones((4, 2))}
X = jnp.ones((5, 3))
REPORT_THIS = r"; this is a bug of jax_lnfold, please report it$"


def model(p: Any, x: jax.Array) -> jax.Array:
    return jax.nn.standardize(x @ p["first"]) @ p["last"]


def traced() -> Traced:
    return trace(model, PARAMS, (X,))


def test_it_asks_to_be_reported_and_survives_a_pickle() -> None:
    bug = Bug("apply_fn: no plan")
    assert str(bug) == "apply_fn: no plan; this is a bug of jax_lnfold, please report it"
    copy = pickle.loads(pickle.dumps(bug))
    assert (type(copy), str(copy)) == (Bug, str(bug))
    assert issubclass(Bug, jax_lnfold.FoldError)


def test_an_unproved_mean_is_a_bug() -> None:
    placement = place(traced().graph())
    roots = [(norm.x, norm.along) for norm in placement.norms]
    assert len(roots) == 1
    prove(placement.search, placement.zero, placement.explicit, roots)
    with pytest.raises(Bug, match=rf"^apply_fn: a removed mean is not proved \(.*\){REPORT_THIS}"):
        prove(placement.search, (), placement.explicit, roots)


def test_a_lost_centering_is_a_bug() -> None:
    program = traced()
    placement = place(program.graph())
    rewrite(program.closed, placement)
    nowhere = {len(placement.graph.avals): (AxisSet.over((5, 4), [1]),)}
    with pytest.raises(Bug, match=rf"^apply_fn: a centering found no place.*{REPORT_THIS}"):
        rewrite(program.closed, replace(placement, explicit=nowhere))


def test_the_command_line_says_it_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def err(*args: Any) -> Any:
        raise Bug("apply_fn: a removed mean is not proved")

    module = ModuleType("a_model")
    module.__dict__["target"] = lambda: (model, PARAMS, X)
    monkeypatch.setitem(sys.modules, "a_model", module)
    assert main(["plan", "a_model:target"]) == 0
    monkeypatch.setattr(jax_lnfold.placement.place, "prove", err)
    capsys.readouterr()
    assert main(["plan", "a_model:target"]) == 1
    out, err_text = capsys.readouterr()
    assert (out, err_text.count("\n")) == ("", 1)
    assert err_text.endswith("this is a bug of jax_lnfold, please report it\n")
