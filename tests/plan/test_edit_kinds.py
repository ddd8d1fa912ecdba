"""Kinds of edits say all there is to say of them: words, versions, and what they multiply by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jax_lnfold import FoldPlan, PlanFormatError
from jax_lnfold.axes.axis_set import AxisSet
from jax_lnfold.cli.commands import main
from jax_lnfold.placement.planning import FINDERS
from jax_lnfold.plan.editing import edit_leaf
from jax_lnfold.plan.edits.affine import AffineEdit, AffineReader
from jax_lnfold.plan.edits.center import CenterEdit
from jax_lnfold.plan.edits.queries import QueryEdit
from jax_lnfold.plan.edits.scale import ScaleEdit
from jax_lnfold.plan.file import LeafSpec
from jax_lnfold.plan.leaf import Factor, Multiplier, Recipe
from jax_lnfold.plan.plan import KINDS

SHAPES = {"w": (3, 4), "v": (4, 5), "b": (5,), "g": (4,), "c": (4,), "h": (3,), "k": (3, 2)}
SHAPES |= {"a": (4,)}
LEAVES = tuple(LeafSpec(path, shape) for path, shape in SHAPES.items())
CENTERED = tuple(CenterEdit("w", AxisSet.over((3, 4), [axis])) for axis in (0, 1))
SHIFTED = AffineEdit("g", "c", (AffineReader("v", (0,), "b", (0,)),))
PLAIN = AffineEdit("h", None, (AffineReader("k", (0,)),), 0)
MERGED = ScaleEdit("c", (("w", (1,)),))
KEYS = QueryEdit("g", "c", "a", None, (0,))

# --- words ---------------------------------------------------------------------------------------


def test_plans_tell_the_kinds_in_use() -> None:
    taken_up = FoldPlan(LEAVES, CENTERED, affine=(SHIFTED, PLAIN))
    assert taken_up.told() == ["1 parameter centered", "3 scales and shifts taken up"]
    assert FoldPlan(LEAVES, CENTERED[:1], (MERGED,)).told()[1:] == ["1 scale merged"]
    keys = FoldPlan(LEAVES, (), queries=(KEYS,)).told()
    assert keys == ["2 scales and shifts of keys merged into those of queries"]
    assert FoldPlan(LEAVES, ()).told() == []


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (FoldPlan(LEAVES, CENTERED), "1 parameter centered: 96 bytes in 1 leaf of after."),
        (FoldPlan(LEAVES, (), affine=(SHIFTED,)), "2 scales and shifts taken up: 264 bytes in 4"),
        (FoldPlan(LEAVES, ()), "nothing to edit: 0 bytes in 0 leaves of after."),
    ],
)
def test_the_command_line_tells_them_all(
    plan: FoldPlan,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    save_file({path: np.ones(shape) for path, shape in SHAPES.items()}, "before.safetensors")
    Path("plan.json").write_text(plan.to_json())
    assert main(["center", "plan.json", "before.safetensors", "after.safetensors"]) == 0
    assert capsys.readouterr().out.startswith(said)


# --- versions ------------------------------------------------------------------------------------


def test_plans_have_the_version_of_what_is_newest_in_them() -> None:
    assert [FoldPlan(LEAVES, CENTERED, affine=a).version for a in ((), (SHIFTED,))] == [2, 3]
    assert FoldPlan(LEAVES, (), affine=(SHIFTED, PLAIN)).version == 4
    assert FoldPlan(LEAVES, (), affine=(PLAIN,), queries=(KEYS,)).version == 6


@pytest.mark.parametrize("version", range(12))
def test_versions_of_the_kinds_are_read(version: int) -> None:
    sections = ", ".join(f'"{name}": []' for name in ("leaves", *KINDS))
    text = f'{{{sections}, "version": {version}}}'
    if version in {v for kind in KINDS.values() for v in kind.VERSIONS}:
        assert FoldPlan.from_json(text) == FoldPlan((), ())
        assert 2 <= version <= 10
    else:
        with pytest.raises(
            PlanFormatError, match="2 and 3 and 4 and 5 and 6 and 7 and 8 and 9 and 10;"
        ):
            FoldPlan.from_json(text)


def test_kinds_are_found_with_the_centerings_or_by_a_finder() -> None:
    """Copies are found by what makes the tree that the others are about; means are chosen later."""
    assert {*KINDS} == {
        "edits",
        "scales",
        "untied",
        "means",
        "dropped",
        "assumed",
        "hidden",
        *FINDERS,
    }


# --- what leaves are multiplied by ---------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Minus(Multiplier):
    """It takes no leaf."""

    takes: ClassVar[int] = 0

    def value(self, sources: Sequence[Any], shape: Any, dtype: Any, xp: Any) -> Any:
        assert not sources
        return xp.full((1,) * len(shape), -1, dtype)


@dataclass(frozen=True, slots=True)
class Difference(Multiplier):
    """It takes two leaves, and has the fields of a `Factor`."""

    axes: tuple[int, ...]
    plus: int = 0
    takes: ClassVar[int] = 2

    def value(self, sources: Sequence[Any], shape: Any, dtype: Any, xp: Any) -> Any:
        one, other = (xp.asarray(source, dtype) for source in sources)
        return (one - other).reshape(*(n if d in self.axes else 1 for d, n in enumerate(shape)))


X, G, H = (np.random.default_rng(0).normal(size=n) for n in ((3, 4), (4,), (3,)))
A = np.random.default_rng(1).normal(size=3)
ALONG = AxisSet.over((3, 4), [1])
FACTORS = (Factor((1,), 1), Minus(), Difference((0,)), Factor((0,)))
SOURCES = (G, H, A, A)


@pytest.mark.parametrize("sets", [(), (ALONG,)])
@pytest.mark.parametrize("kind", ["numpy", "jax", "donated", "traced"])
def test_every_multiplier_takes_its_leaves(kind: str, sets: tuple[AxisSet, ...]) -> None:
    recipe = Recipe(factors=FACTORS, sets=sets)
    if kind == "numpy":
        found, overflow = edit_leaf(X, SOURCES, recipe, False)
    elif kind == "traced":
        found = jax.jit(lambda x, *s: edit_leaf(x, s, recipe, False)[0])(X, *SOURCES)
        overflow = False
    else:
        given = jnp.array(X), [*map(jnp.asarray, SOURCES)]
        found, overflow = edit_leaf(*given, recipe, kind == "donated")
    want = -X * (G + 1) * ((H - A) * A)[:, None]
    want = want - want.mean(1, keepdims=True) if sets else want
    np.testing.assert_allclose(found, want, rtol=1e-13, atol=1e-14)
    assert not overflow


def test_multipliers_of_other_kinds_are_no_factor() -> None:
    """Compiled edits are kept by their recipe: alike recipes must do alike."""
    factor, other = Factor((0,)), Difference((0,))
    assert factor != other
    assert Recipe(factors=(factor,)) != Recipe(factors=(other,))
    assert factor == Factor((0,), 0)
    assert [f.plain for f in (factor, Factor((0,), 1), Minus(), other)] == [True, *[False] * 3]


def test_a_product_of_low_precision_is_rounded_once() -> None:
    """Only a plain leaf may be multiplied in the dtype of what it scales."""
    x, h, a = (jnp.asarray(v, jnp.bfloat16) for v in (X, H, A))
    wide = [np.asarray(v, np.float32) for v in (x, h, a)]
    found, _ = edit_leaf(x, (h, a), Recipe(factors=(Difference((0,)),)), False)
    want = wide[0] * (wide[1] - wide[2])[:, None]
    np.testing.assert_array_equal(found, jnp.asarray(want, jnp.bfloat16))
    rounded = jnp.asarray(h - a)[:, None] * x
    assert (np.asarray(found) != np.asarray(rounded)).any()
