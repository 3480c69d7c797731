"""Compare test runs: their means side by side, and their differences case by case."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import bootstrap

from common.errors import InputError
from evaluation.metrics import ABSENT, FALSE_ORGAN, MISSED, mean
from evaluation.tables import (
    COLUMNS,
    SAMED,
    CaseResult,
    Means,
    class_means,
    outcome_counts,
    total_means,
)
from evaluation.test_runs import TestRun

FEWEST_GROUPS = 5  # with fewer scans, a confidence interval means nothing
COMPARED = ("dsc", "nsd", "hd95_mm", "hd95_voxels", *SAMED)
Scored = tuple[float | None, float | None]  # one score of the same case in two runs


@dataclass(frozen=True)
class Difference:
    """A score of two runs, over the cases that define it in both runs."""

    first: float | None  # mean of the first run
    second: float | None  # mean of the second run
    difference: float | None  # mean of second - first
    interval: tuple[float, float] | None  # 95 %; None: too few groups
    each: tuple[float, ...]  # second - first in each case

    @property
    def pairs(self) -> int:
        """The number of cases that define the score in both runs."""
        return len(self.each)

    @property
    def better(self) -> int:
        """1 if the interval lies above 0, -1 if it lies below 0, else 0."""
        if self.interval is None or self.interval[0] <= 0 <= self.interval[1]:
            return 0
        return 1 if self.interval[0] > 0 else -1


def overview(runs: Sequence[TestRun]) -> dict[str, Any]:
    """Put the means of all runs side by side and mark the best ones.

    Returns:
        `scores`: the names of the scores shown. `rows`: a row for each class of any run, then a
        row for the totals. A row holds `name`; `scores`: for each score, the value of each run and
        whether it is the best; `counts`: the number of cases where each run misses the class, and
        where it falsely finds the class.
    """
    in_mm = all(total_means(run.results)["hd95_mm"] is not None for run in runs)
    scores = ("dsc", "hd95_mm" if in_mm else "hd95_voxels")
    columns = [_class_columns(run) for run in runs]
    rows = []
    for name in dict.fromkeys(name for run in runs for name in run.class_names):
        found = [column.get(name, ({}, {})) for column in columns]
        rows.append(
            {
                "name": name,
                "scores": {s: _marked(s, [means.get(s) for means, _ in found]) for s in scores},
                "counts": [
                    [counts.get(outcome) for _, counts in found]
                    for outcome in (MISSED, FALSE_ORGAN)
                ],
            }
        )
    totals = [total_means(run.results) for run in runs]
    sums = [
        [sum(row["counts"][kind][index] or 0 for row in rows) for index in range(len(runs))]
        for kind in (0, 1)
    ]
    rows.append(
        {
            "name": "mean",
            "scores": {s: _marked(s, [total[s] for total in totals]) for s in scores},
            "counts": sums,
        }
    )
    return {"scores": scores, "rows": rows}


def _class_columns(run: TestRun) -> dict[str, tuple[Means, dict[str, int]]]:
    """Return the means and the outcome counts of each class of a run, by its name."""
    columns = zip(class_means(run.results), outcome_counts(run.results), strict=True)
    return dict(zip(run.class_names, columns, strict=True))


def _marked(score: str, values: Sequence[float | None]) -> list[tuple[float | None, bool]]:
    """Pair each value with whether it is the best; no value is if all look alike when rounded."""
    _, factor, more = COLUMNS[score]
    shown = [None if value is None else round(factor * value, 2) for value in values]
    known = {value for value in shown if value is not None}
    best = (max if more else min)(known) if len(known) > 1 else None
    return [(v, best is not None and s == best) for v, s in zip(values, shown, strict=True)]


@dataclass(frozen=True)
class Matched:
    """The cases and classes that two runs share."""

    names: list[str]  # classes that both runs have
    pairs: list[tuple[CaseResult, CaseResult]]  # both results of each case, in the first's order
    places: list[tuple[int, int]]  # of each class among the classes of both runs

    @property
    def groups(self) -> list[str]:
        """The scan that each case belongs to."""
        return [first.group or second.independent for first, second in self.pairs]

    def scored(self, score: str) -> list[list[Scored]]:
        """Return a score of both runs, for each class and each case."""
        return [
            [(getattr(a.scores[i], score), getattr(b.scores[j], score)) for a, b in self.pairs]
            for i, j in self.places
        ]


def match(first: TestRun, second: TestRun) -> Matched:
    """Return what two runs share.

    Raises:
        InputError: they share no class or no case, or their labels differ.
    """
    names = [name for name in first.class_names if name in second.class_names]
    by_case = {result.case: result for result in second.results}
    pairs = [(result, by_case[result.case]) for result in first.results if result.case in by_case]
    if not names or not pairs:
        raise InputError(
            f"{first.path} and {second.path} have no {'case' if names else 'class'} in common; "
            "compare runs on the same test data"
        )
    for result, other in pairs:
        if _voxels(first, result, names) != _voxels(second, other, names):
            raise InputError(
                f"{first.path} and {second.path} were tested on different labels of {result.case}; "
                "compare runs on the same test data"
            )
    places = [(first.class_names.index(name), second.class_names.index(name)) for name in names]
    return Matched(names, pairs, places)


def compare(first: TestRun, second: TestRun) -> dict[str, Any]:
    """Return paired differences, second - first, of each class that both runs have.

    Raises:
        InputError: the runs share no class or no case, or their labels differ.
    """
    shared = match(first, second)
    pairs, places, groups = shared.pairs, shared.places, shared.groups
    cases = [{result.case for result in run.results} for run in (first, second)]
    same_tolerance = first.definitions.get("nsd") == second.definitions.get("nsd")
    compared = [score for score in COMPARED if score != "nsd" or same_tolerance]
    table = {score: shared.scored(score) for score in compared}
    rows = [
        {"name": name, "scores": {s: paired(by_class[i], groups) for s, by_class in table.items()}}
        for i, name in enumerate(shared.names)
    ]
    overall = {s: paired(over_classes(by_class), groups) for s, by_class in table.items()}
    return {
        "rows": [*rows, {"name": "all organs", "scores": overall}],
        "overall": overall,
        "scores": [score for score in compared if overall[score].pairs],
        "same_tolerance": same_tolerance,
        "pairs": len(pairs),
        "groups": len(set(groups)),
        "removed": _changed(pairs, places, FALSE_ORGAN, ABSENT),
        "added": _changed(pairs, places, ABSENT, FALSE_ORGAN),
        "alone": sorted(cases[0] ^ cases[1]),
    }


def over_classes(by_class: Sequence[Sequence[Scored]]) -> list[Scored]:
    """Return the means of both runs for each case, over the classes that both runs define."""
    return [mean_of_pairs(case) for case in zip(*by_class, strict=True)]


def mean_of_pairs(pairs: Iterable[Scored]) -> Scored:
    """Return both means over the pairs that define the score in both runs."""
    known = [pair for pair in pairs if None not in pair]
    return mean(first for first, _ in known), mean(second for _, second in known)


def _changed(
    pairs: Sequence[tuple[CaseResult, CaseResult]],
    places: Sequence[tuple[int, int]],
    before: str,
    after: str,
) -> int:
    """Count how often a class changes its outcome from `before` to `after` between the runs."""
    outcomes = [(a.scores[i].outcome, b.scores[j].outcome) for a, b in pairs for i, j in places]
    return outcomes.count((before, after))


def _voxels(run: TestRun, result: CaseResult, names: Sequence[str]) -> list[int] | None:
    """Return the number of voxels of each class in the label; None if it is unknown."""
    if result.confusion is None:
        return None
    real = np.sum(result.confusion, axis=0)
    return [int(real[1 + run.class_names.index(name)]) for name in names]


def paired(values: Sequence[Scored], groups: Sequence[str] | None = None) -> Difference:
    """Average the cases that both runs define, and estimate how certain their difference is.

    Args:
        values: one score of both runs for each case.
        groups: the scan that each case belongs to; None: all cases are different scans. The
            interval is from a percentile bootstrap over scans with a fixed seed.
    """
    groups = range(len(values)) if groups is None else groups
    kept = [(pair, group) for pair, group in zip(values, groups, strict=True) if None not in pair]
    if not kept:
        return Difference(first=None, second=None, difference=None, interval=None, each=())
    known = np.array([pair for pair, _ in kept], dtype=float)
    first, second = known.mean(axis=0).tolist()
    each = known[:, 1] - known[:, 0]
    _, places = np.unique([group for _, group in kept], return_inverse=True)
    sums, counts = np.bincount(places, each), np.bincount(places)
    interval = None
    if len(counts) >= FEWEST_GROUPS:
        found = bootstrap(
            (sums, counts),
            lambda sums, counts, axis: sums.sum(axis) / counts.sum(axis),
            paired=True,
            vectorized=True,
            method="percentile",
            n_resamples=9999,
            rng=0,
        ).confidence_interval
        interval = (float(found.low), float(found.high))
    return Difference(
        first=first,
        second=second,
        difference=float(each.mean()),
        interval=interval,
        each=tuple(each.tolist()),
    )
