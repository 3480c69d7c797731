"""What a test run reports, as tables: every case and class by both rules for empty masks.

`samed` numbers follow the original's rules and compare with published ones; the honest ones stand
beside them. Totals are means over the cases of each class, then over the classes, as published.
"""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from metrics import ABSENT, BOTH, FALSE_ORGAN, MISSED, ClassScore, mean
from safe_io import atomic_path

SCORES = tuple(field.name for field in fields(ClassScore) if field.name != "outcome")
OUTCOMES = (BOTH, FALSE_ORGAN, MISSED, ABSENT)
DEFINITIONS = {
    "dsc": "Dice similarity coefficient, 0…1; a false or missed organ scores 0, an absent one is "
    "left out of the means",
    "hd95_voxels": "95th percentile of both directed surface-distance sets pooled (medpy's hd95), "
    "in voxels; only where prediction and label both have the organ",
    "hd95_mm": "the same in mm; none where the volume stores no spacing",
    "assd_mm": "average symmetric surface distance in mm: the mean of both sets pooled",
    "samed_dsc": "as published: a false organ scores 1, a missed or absent one 0",
    "samed_hd95": "as published: HD95 in voxels, 0 where either mask is empty",
    "totals": "the mean over the cases of each class, then over the classes",
}


@dataclass(frozen=True)
class CaseResult:
    """The scores of one volume, of the classes 1…N in order."""

    case: str
    scores: list[ClassScore]


Means = dict[str, float | None]  # by the names of SCORES; None where no case defines it


def class_means(results: Sequence[CaseResult]) -> list[Means]:
    """Of each class, the mean over the cases."""
    return [_means(column) for column in zip(*(result.scores for result in results), strict=True)]


def case_means(results: Sequence[CaseResult]) -> list[Means]:
    """Of each case, the mean over the classes."""
    return [_means(result.scores) for result in results]


def total_means(results: Sequence[CaseResult]) -> Means:
    """The mean over the classes of their means over the cases, in the published order."""
    rows = class_means(results)
    return {name: mean(row[name] for row in rows) for name in SCORES}


def outcome_counts(results: Sequence[CaseResult]) -> list[dict[str, int]]:
    """Of each class, in how many cases it was found, falsely found, missed or absent."""
    counts = [
        Counter(score.outcome for score in column)
        for column in zip(*(result.scores for result in results), strict=True)
    ]
    return [{outcome: count[outcome] for outcome in OUTCOMES} for count in counts]


def format_table(results: Sequence[CaseResult], class_names: Sequence[str]) -> str:
    """The tables that are printed: one row a class, then one row a case."""
    columns: dict[str, Callable[[Means], str]] = {
        "DSC %": lambda row: _number(row["dsc"], 100),
        "HD95 vox": lambda row: _number(row["hd95_voxels"]),
        "HD95 mm": lambda row: _number(row["hd95_mm"]),
        "ASSD mm": lambda row: _number(row["assd_mm"]),
        "samed DSC %": lambda row: _number(row["samed_dsc"], 100),
        "samed HD95": lambda row: _number(row["samed_hd95"]),
    }

    def line(name: str, row: Means, after: Sequence[object] = ()) -> list[str]:
        return [name, *(show(row) for show in columns.values()), *map(str, after)]

    per_class = [["class", *columns, *OUTCOMES]]
    rows = zip(class_names, class_means(results), outcome_counts(results), strict=True)
    per_class += [line(name, row, list(counts.values())) for name, row, counts in rows]
    per_class.append(line("mean", total_means(results), [""] * len(OUTCOMES)))
    per_case = [["case", *columns]]
    per_case += [
        line(result.case, row) for result, row in zip(results, case_means(results), strict=True)
    ]
    notes = (
        "HD95: 95th percentile of both directed surface-distance sets pooled, where both masks "
        "have the organ.\n-: not defined; in mm, also where the spacing is unknown (such cases are "
        "left out of mm means).\nDSC: a false or missed organ scores 0, an absent one is left "
        "out.\nsamed: the published rules, in voxels: a false organ scores DSC 1 and HD95 0, a "
        "missed or absent one 0 and 0."
    )
    return f"{_align(per_class)}\n\n{_align(per_case)}\n\n{notes}"


def write_csv(path: Path, results: Sequence[CaseResult], class_names: Sequence[str]) -> None:
    """One line for every case and class; empty where a score is not defined."""
    with (
        atomic_path(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(["case", "class", "name", "outcome", *SCORES])
        for result in results:
            for index, (name, score) in enumerate(
                zip(class_names, result.scores, strict=True), start=1
            ):
                values = [getattr(score, key) for key in SCORES]
                writer.writerow([result.case, index, name, score.outcome, *values])


def write_json(
    path: Path,
    results: Sequence[CaseResult],
    class_names: Sequence[str],
    settings: dict[str, Any],
) -> None:
    """Everything: definitions, totals, means, every score, and the settings of the run."""
    classes = zip(class_names, class_means(results), outcome_counts(results), strict=True)
    cases = zip(results, case_means(results), strict=True)
    content = {
        "definitions": DEFINITIONS,
        "total": total_means(results),
        "classes": [
            {"class": index, "name": name, "mean": row, "outcomes": counts}
            for index, (name, row, counts) in enumerate(classes, start=1)
        ],
        "cases": [
            {
                "case": result.case,
                "mean": row,
                "scores": dict(zip(class_names, map(asdict, result.scores), strict=True)),
            }
            for result, row in cases
        ],
        **settings,
    }
    with atomic_path(path) as temporary:
        text = json.dumps(content, indent=2, allow_nan=False, default=str)
        temporary.write_text(text + "\n", encoding="utf-8")


def _means(scores: Iterable[ClassScore]) -> Means:
    scores = list(scores)
    return {name: mean(getattr(score, name) for score in scores) for name in SCORES}


def _number(value: float | None, factor: float = 1) -> str:
    return "-" if value is None else f"{value * factor:.2f}"


def _align(rows: list[list[str]]) -> str:
    """Columns of equal width: names to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join([first.strip().ljust(widths[0]), *others]).rstrip())
    lines.insert(1, "-" * sum(widths) + "-" * 2 * (len(widths) - 1))
    return "\n".join(lines)
