"""How a row of a table differs from the base row: case by case, over the seeds that both have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from common.errors import InputError, first_few
from evaluation.compare import Difference, Scored, match, mean_of_pairs, over_classes, paired
from evaluation.tables import COLUMNS
from evaluation.test_runs import TestRun

BETTER, WORSE, SAME = "better", "worse", "no difference shown"
TOO_FEW = "too few cases"


@dataclass(frozen=True)
class SeedDifference:
    """A score of a row and of the base row."""

    score: str
    found: Difference  # row - base, over the cases; each case is a mean over the seeds
    by_seed: dict[int, float]  # mean difference of each seed that both rows have

    @property
    def verdict(self) -> str:
        """What the interval says, in words; it is about these cases and these seeds."""
        if self.found.interval is None:
            return TOO_FEW
        if not self.found.better:
            return SAME
        more_is_better = COLUMNS[self.score][2]
        return BETTER if (self.found.better > 0) == more_is_better else WORSE

    @property
    def agreeing(self) -> int:
        """The number of seeds whose own difference has the sign of the mean."""
        mean = self.found.difference or 0.0
        return sum(difference * mean > 0 for difference in self.by_seed.values())


def difference_of(
    base: Mapping[int, TestRun], row: Mapping[int, TestRun], score: str
) -> SeedDifference | None:
    """Compare a row with the base row, over the seeds that both have.

    The score of a class in a case is averaged over the seeds that define it in both rows, then a
    case over its classes; `evaluation.compare.paired` draws the cases (or their scans) again for
    the interval. So the interval does not hold how much other seeds would change the result.

    Args:
        base, row: the test runs by seed, on the same data (`same_data`).

    Returns:
        None: no seed is in both, or no case defines the score in both.
    """
    shared = {seed: match(base[seed], row[seed]) for seed in base if seed in row}
    if not shared:
        return None
    of_seeds = {seed: matched.scored(score) for seed, matched in shared.items()}
    groups = next(iter(shared.values())).groups
    by_class = [
        [mean_of_pairs(pairs) for pairs in zip(*cases, strict=True)]
        for cases in zip(*of_seeds.values(), strict=True)
    ]
    found = paired(over_classes(by_class), groups)
    if not found.pairs:
        return None
    each = {seed: _mean_difference(over_classes(classes)) for seed, classes in of_seeds.items()}
    by_seed = {seed: value for seed, value in each.items() if value is not None}
    return SeedDifference(score, found, by_seed)


def _mean_difference(values: list[Scored]) -> float | None:
    first, second = mean_of_pairs(values)
    return None if first is None or second is None else second - first


def same_data(reference: TestRun, run: TestRun) -> None:
    """Raise an `InputError` if two runs were tested on other cases, classes or labels."""
    if run.class_names != reference.class_names:
        raise InputError(
            f"it was tested with the classes {first_few(run.class_names)}, the reference "
            f"{reference.path} with {first_few(reference.class_names)}"
        )
    cases = [{result.case for result in tested.results} for tested in (reference, run)]
    if cases[0] != cases[1]:
        raise InputError(
            f"it was not tested on the cases of the reference {reference.path}; only one of both "
            f"has {first_few(sorted(cases[0] ^ cases[1]))}"
        )
    match(reference, run)
