"""What a stage is given, and the rows that it yields."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

NEEDS_CUDA = "needs CUDA"


@dataclass(frozen=True)
class Setting:
    """Where and how large a stage has to run.

    Args:
        small: sizes for a CPU; the stage shows that it runs, and its figures mean nothing.
    """

    device: torch.device
    small: bool


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        what: the quantity, with its conditions.
        value: a number, a text if there is no number, or None if it was not found.
        bound: the condition on the value as text; empty: there is none.
        passed: None: a figure without a bound, or, with no value, not run; `note` says why.
    """

    what: str
    value: float | str | None
    unit: str = ""
    bound: str = ""
    passed: bool | None = None
    note: str = ""

    @property
    def verdict(self) -> str:
        """PASS, FAIL, figure or not run."""
        if self.passed is not None:
            return "PASS" if self.passed else "FAIL"
        return "not run" if self.value is None else "figure"


def not_run(what: str, why: str = NEEDS_CUDA) -> Row:
    """Return the row of something that was not run."""
    return Row(what, None, note=why)


def at_most(what: str, value: float, bound: float, unit: str = "", note: str = "") -> Row:
    """Return the row of a value that must not exceed a bound; NaN fails."""
    return Row(what, float(value), unit, f"≤ {bound:g}", bool(value <= bound), note)


def at_least(what: str, value: float, bound: float, unit: str = "", note: str = "") -> Row:
    """Return the row of a value that must reach a bound; NaN fails."""
    return Row(what, float(value), unit, f"≥ {bound:g}", bool(value >= bound), note)


def holds(what: str, true: bool, note: str = "") -> Row:
    """Return the row of a condition."""
    return Row(what, "yes" if true else "no", bound="yes", passed=bool(true), note=note)


def to_json(row: Row) -> dict[str, Any]:
    """Return a row as JSON can hold it; a number that is not finite becomes text and fails."""
    if not isinstance(row.value, (str, type(None))):
        row = replace(row, value=float(row.value))
        if not math.isfinite(row.value):
            row = replace(row, value=str(row.value), passed=False)
    return asdict(row)


def from_json(fields: dict[str, Any]) -> Row:
    """Return the row that `to_json` wrote."""
    return Row(**fields)
