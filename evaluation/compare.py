"""Test runs side by side: what each scores, and how they differ case by case."""

from __future__ import annotations

from collections.abc import Sequence
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
    TestRun,
    class_means,
    outcome_counts,
    total_means,
)

FEWEST_GROUPS = 5  # scans for a confidence interval to mean anything
COMPARED = ("dsc", "nsd", "hd95_mm", "hd95_voxels", *SAMED)
Scored = tuple[float | None, float | None]  # of the same case by two runs


@dataclass(frozen=True)
class Difference:
    """A score of two runs over the cases that define it in both."""

    first: float | None
    second: float | None
    difference: float | None  # second - first, mean over the pairs
    interval: tuple[float, float] | None  # 95 %; None: too few groups
    each: tuple[float, ...]  # of every pair

    @property
    def pairs(self) -> int:
        """How many cases define the score in both."""
        return len(self.each)

    @property
    def better(self) -> int:
        """1 or -1 for more or less where the interval leaves out 0, else 0."""
        if self.interval is None or self.interval[0] <= 0 <= self.interval[1]:
            return 0
        return 1 if self.interval[0] > 0 else -1


def overview(runs: Sequence[TestRun]) -> dict[str, Any]:
    """Means of every class of any run, and which run has the best of each.

    Returns:
        `scores`, and `rows`: a name, for each score the value of every run and whether it is the
        best as it is shown, and how often every run misses the class or finds a false one; the
        last row is that of the totals.
    """
    in_mm = all(total_means(run.results)["hd95_mm"] is not None for run in runs)
    scores = ("dsc", "hd95_mm" if in_mm else "hd95_voxels")
    columns = [
        dict(zip(run.class_names, zip(class_means(run.results), outcome_counts(run.results),
                                      strict=True), strict=True))
        for run in runs
    ]  # fmt: skip
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
    sums = [[sum(n or 0 for n in column) for column in zip(*counts, strict=True)]
            for counts in zip(*(row["counts"] for row in rows), strict=True)]  # fmt: skip
    rows.append(
        {
            "name": "mean",
            "scores": {s: _marked(s, [total[s] for total in totals]) for s in scores},
            "counts": sums,
        }
    )
    return {"scores": scores, "rows": rows}


def _marked(score: str, values: Sequence[float | None]) -> list[tuple[float | None, bool]]:
    """Each value, and whether it is the best of several that do not all look alike."""
    _, factor, more = COLUMNS[score]
    shown = [None if value is None else round(factor * value, 2) for value in values]
    known = {value for value in shown if value is not None}
    best = (max if more else min)(known) if len(known) > 1 else None
    return [(v, best is not None and s == best) for v, s in zip(values, shown, strict=True)]


def compare(first: TestRun, second: TestRun) -> dict[str, Any]:
    """Paired differences, second - first, of every class that both runs have.

    Raises:
        InputError: no class or no case in common, or other labels.
    """
    names = [name for name in first.class_names if name in second.class_names]
    firsts, others = ({result.case: result for result in run.results} for run in (first, second))
    both = [case for case in firsts if case in others]
    if not names or not both:
        raise InputError(
            f"{first.path} and {second.path} have no {'case' if names else 'class'} in common; "
            "compare runs on the same test data"
        )
    pairs = [(firsts[case], others[case]) for case in both]
    for one, other in pairs:
        if _voxels(first, one, names) != _voxels(second, other, names):
            raise InputError(
                f"{first.path} and {second.path} were tested on different labels of {one.case}; "
                "compare runs on the same test data"
            )
    groups = [one.group or other.independent for one, other in pairs]
    places = [(first.class_names.index(name), second.class_names.index(name)) for name in names]
    same_tolerance = first.definitions.get("nsd") == second.definitions.get("nsd")
    compared = [score for score in COMPARED if score != "nsd" or same_tolerance]
    table = {score: _scored(pairs, places, score) for score in compared}
    rows = [
        {"name": name, "scores": {s: paired(by_class[i], groups) for s, by_class in table.items()}}
        for i, name in enumerate(names)
    ]
    overall = {s: paired(_case_means(by_class), groups) for s, by_class in table.items()}
    return {
        "rows": [*rows, {"name": "all organs", "scores": overall}],
        "overall": overall,
        "scores": [score for score in compared if overall[score].pairs],
        "same_tolerance": same_tolerance,
        "pairs": len(both),
        "groups": len(set(groups)),
        "removed": _changed(pairs, places, FALSE_ORGAN, ABSENT),
        "added": _changed(pairs, places, ABSENT, FALSE_ORGAN),
        "alone": sorted(firsts.keys() ^ others.keys()),
    }


def _scored(
    pairs: Sequence[tuple[CaseResult, CaseResult]], places: Sequence[tuple[int, int]], score: str
) -> list[list[Scored]]:
    """Of every class, a score of both runs in every case."""
    return [
        [(getattr(a.scores[i], score), getattr(b.scores[j], score)) for a, b in pairs]
        for i, j in places
    ]


def _case_means(by_class: Sequence[Sequence[Scored]]) -> list[Scored]:
    """Of every case, the means of both runs over the same classes: those that both define."""
    means = []
    for case in zip(*by_class, strict=True):
        known = [pair for pair in case if None not in pair]
        means.append((mean(one for one, _ in known), mean(other for _, other in known)))
    return means


def _changed(
    pairs: Sequence[tuple[CaseResult, CaseResult]],
    places: Sequence[tuple[int, int]],
    before: str,
    after: str,
) -> int:
    """How often a class has one outcome in the first run and another in the second."""
    outcomes = [(a.scores[i].outcome, b.scores[j].outcome) for a, b in pairs for i, j in places]
    return outcomes.count((before, after))


def _voxels(run: TestRun, result: CaseResult, names: Sequence[str]) -> list[int] | None:
    """How many voxels of each class the labels have; None: not known."""
    if result.confusion is None:
        return None
    real = np.sum(result.confusion, axis=0)
    return [int(real[1 + run.class_names.index(name)]) for name in names]


def paired(values: Sequence[Scored], groups: Sequence[str] | None = None) -> Difference:
    """Means over the cases where both are defined, and what the mean difference may be.

    Args:
        groups: the scan that each case is of; None: every case is its own. The interval is the
            percentile bootstrap's over these, with a fixed seed.
    """
    groups = range(len(values)) if groups is None else groups
    kept = [(pair, group) for pair, group in zip(values, groups, strict=True) if None not in pair]
    if not kept:
        return Difference(None, None, None, None, ())
    known = np.array([pair for pair, _ in kept], dtype=float)
    one, other = known.mean(axis=0).tolist()
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
    return Difference(one, other, float(each.mean()), interval, tuple(each.tolist()))
