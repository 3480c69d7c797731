"""The rows of a table of ablations with what their runs have found; nothing is read here."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from ablation.differences import SeedDifference
from ablation.measured import Cost
from ablation.published import Published
from ablation.table import Cell, Row, Table
from evaluation.metrics import FALSE_ORGAN, MISSED, mean
from evaluation.tables import SAMED, CaseResult, Means, class_means, outcome_counts
from evaluation.test_runs import TestRun

SCORES = ("dsc", "hd95_mm", "hd95_voxels", *SAMED)


@dataclass(frozen=True)
class Spread:
    """A quantity of a row: one value of each seed that defines it."""

    by_seed: dict[int, float]

    @property
    def mean(self) -> float | None:
        """The mean over the seeds; None if no seed defines it."""
        return mean(self.by_seed.values())

    @property
    def sd(self) -> float | None:
        """The standard deviation over the seeds (n - 1); None for less than two."""
        values = list(self.by_seed.values())
        return statistics.stdev(values) if len(values) > 1 else None


@dataclass(frozen=True)
class CellResult:
    """One cell: what it found and cost, or why it has no results."""

    cell: Cell
    test: TestRun | None
    cost: Cost | None
    total: Means  # means over cases, then classes, as published; empty: no results
    missing: str | None  # why it has no results that count
    report: str | None  # path of its page from the folder of the table


@dataclass(frozen=True)
class RowResult:
    """One row over its seeds."""

    row: Row
    cells: list[CellResult]
    published: Published | None
    differences: dict[str, SeedDifference] = field(
        default_factory=dict
    )  # by score; not of the base

    @property
    def done(self) -> list[CellResult]:
        """The cells that have results."""
        return [cell for cell in self.cells if cell.test is not None]

    @property
    def tests(self) -> dict[int, TestRun]:
        """The test runs by seed."""
        return {cell.cell.seed: cell.test for cell in self.cells if cell.test is not None}

    def score(self, name: str) -> Spread:
        """Return a score over the seeds."""
        totals = {cell.cell.seed: cell.total.get(name) for cell in self.done}
        return Spread({seed: value for seed, value in totals.items() if value is not None})

    def organs(self, score: str) -> list[float | None]:
        """Return a score of every class, averaged over the seeds that define it."""
        columns = [[row[score] for row in class_means(t.results)] for t in self.tests.values()]
        return [mean(values) for values in zip(*columns, strict=True)]

    def outcomes(self, outcome: str) -> float | None:
        """Return how many organs of all cases have an outcome, averaged over the seeds."""
        return mean(_count(test.results, outcome) for test in self.tests.values())

    @property
    def missed(self) -> float | None:
        """Organs that are missed, of all cases together."""
        return self.outcomes(MISSED)

    @property
    def false(self) -> float | None:
        """Organs that are found where there are none, of all cases together."""
        return self.outcomes(FALSE_ORGAN)

    def cost(self, name: str) -> float | None:
        """Return a cost, the median over the seeds that know it."""
        values = [getattr(cell.cost, name) for cell in self.done]
        known = [value for value in values if value is not None]
        return statistics.median(known) if known else None


@dataclass(frozen=True)
class Summary:
    """The result of a table."""

    table: Table
    rows: list[RowResult]
    notes: list[str]  # what a reader must know before comparing numbers

    @property
    def cells(self) -> list[CellResult]:
        """All cells, in the order of the table."""
        return [cell for row in self.rows for cell in row.cells]

    @property
    def missing(self) -> list[CellResult]:
        """The cells without results that count."""
        return [cell for cell in self.cells if cell.missing is not None]

    @property
    def reference(self) -> TestRun | None:
        """A test run of the table, for its cases and classes; None: there is none."""
        return next((cell.test for cell in self.cells if cell.test is not None), None)

    @property
    def distance(self) -> str:
        """The name of the HD95 by the stricter rule: in mm, or in voxels if no case has a size."""
        known = [row.score("hd95_mm").mean for row in self.rows if row.done]
        return "hd95_mm" if known and None not in known else "hd95_voxels"

    def text(self) -> str:
        """Return the tables as a terminal shows them."""
        from ablation.formats import as_text  # which imports this file

        return as_text(self)


def data_name(test: TestRun) -> str | None:
    """Return the name of the data set that a run was tested on; None: it is not recorded."""
    spec = test.settings["flags"].get("spec")
    name = spec.get("name") if isinstance(spec, dict) else None
    return name if isinstance(name, str) else None


def _count(results: Sequence[CaseResult], outcome: str) -> int:
    return sum(counts[outcome] for counts in outcome_counts(results))
