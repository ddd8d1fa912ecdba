"""What a caller of `fold` passes to have means left out: data, a budget, what the logits are."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any, NamedTuple

from .batches import inputs_of
from .errors import FoldError
from .trees import first_line


class Calibration(NamedTuple):
    """What a caller of `fold` wants left out: batches of data, the budget, what the logits are."""

    batches: tuple[tuple[Any, ...], ...]
    budget: float | None
    logits: Callable[[Any], Any] | None

    def of_calls(self, state: tuple[Any, ...], picked: Callable[[Any], Any]) -> Calibration:
        """The same for a function that takes a state first, and returns more than is `picked`."""
        batches, logits = tuple((*state, *batch) for batch in self.batches), self.logits
        return Calibration(
            batches, self.budget, logits and (lambda outputs: logits(picked(outputs)))
        )


def check_calibration(asked: bool, calibrate: Any, budget: Any, logits: Any) -> Calibration | None:
    """What a caller wants left out, None if nothing; raises a `FoldError` if it has no meaning."""
    given = {"calibrate": calibrate, "budget": budget, "logits": logits}
    if not asked:
        for name, value in given.items():
            if value is not None:
                raise FoldError(
                    f'{name}: is for means that are left out; pass approximate={{"mean"}}, too, or '
                    "leave it out"
                )
        return None
    if logits is not None and not callable(logits):
        raise FoldError(
            f"logits: a {type(logits).__name__} is no function of the outputs; pass one that picks "
            "the logits, such as lambda outputs: outputs"
        )
    return Calibration(_batches(calibrate), _budget(budget), logits)


def _batches(calibrate: Any) -> tuple[tuple[Any, ...], ...]:
    if calibrate is None:
        return ()
    if hasattr(calibrate, "shape") or isinstance(calibrate, (str, dict)):
        raise FoldError(
            f"calibrate: a {type(calibrate).__name__} is no list of batches; pass [batch, ...], "
            "each of them a tuple of inputs, or a single input"
        )
    try:
        return tuple(inputs_of(batch) for batch in calibrate)
    except TypeError as error:
        raise FoldError(
            f"calibrate: no list of batches ({first_line(error)}); pass [batch, ...]"
        ) from error


def _budget(budget: Any) -> float | None:
    if budget is None:
        return None
    is_number = isinstance(budget, Real) and not isinstance(budget, bool)
    if not is_number or not float(budget) >= 0:  # NaN is not
        raise FoldError(
            f"budget: {budget!r} is no relative error; pass a number from 0 on, such as 5e-3, or "
            "None for what a cast of the weights to bfloat16 does"
        )
    return float(budget)
