"""Tables of a test run: the scores of each case and class by both rules for empty masks.

The `samed` scores follow the original's rule and compare with published numbers; the scores of
the stricter rule stand beside them. As published, totals are means over the cases of each class,
then over classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from common.names import write_table
from common.writing import write_json as write_json_file
from evaluation.metrics import ABSENT, BOTH, FALSE_ORGAN, MISSED, NSD_TOLERANCE, ClassScore, mean

SCORES = tuple(field.name for field in fields(ClassScore) if field.name != "outcome")
FACTS = ("slices", "spacing", "sides", "group")  # facts of a case besides its scores
OUTCOMES = (BOTH, FALSE_ORGAN, MISSED, ABSENT)
COLUMNS = {  # score: heading, factor, whether more is better; the stricter scores first
    "dsc": ("DSC %", 100, True),
    "nsd": ("NSD %", 100, True),
    "hd95_mm": ("HD95 mm", 1, False),
    "hd95_to_label_mm": ("HD95 mm to truth", 1, False),
    "hd95_to_prediction_mm": ("HD95 mm to predicted", 1, False),
    "assd_mm": ("ASSD mm", 1, False),
    "hd95_voxels": ("HD95 voxels", 1, False),
    "samed_dsc": ("DSC %", 100, True),
    "samed_hd95": ("HD95 voxels", 1, False),
}
SAMED = ("samed_dsc", "samed_hd95")
DEFINITIONS = {
    "dsc": "Dice similarity coefficient, 0…1 (100 %); a false or missed organ scores 0, an absent "
    "organ is left out of the means",
    "hd95_voxels": "95th percentile of both directed sets of surface distances pooled (medpy's "
    "hd95), in voxels; only where prediction and label both have the organ",
    "hd95_mm": "the same in mm; not defined if the volume stores no spacing",
    "assd_mm": "average symmetric surface distance in mm: the mean of both sets pooled",
    "hd95_to_label_mm": "95th percentile of the distances from the prediction's surface to the "
    "label's surface, in mm; large where the prediction has too much",
    "hd95_to_prediction_mm": "95th percentile of the distances from the label's surface to the "
    "prediction's surface, in mm; large where the prediction has too little",
    "nsd": "normalised surface Dice, 0…1 (100 %): the share of the surface voxels of both masks "
    "that lie within {tolerance:g} mm of the other mask's surface (voxels are counted, not surface "
    "area); a false or missed organ scores 0",
    "samed_dsc": "as published: a false organ scores 1, a missed or absent organ 0",
    "samed_hd95": "as published: HD95 in voxels, 0 where either mask is empty",
    "totals": "the mean over the cases of each class, then over the classes",
}


@dataclass(frozen=True)
class WorstSlice:
    """A slice with a large error."""

    index: int
    wrong: int  # voxels whose predicted class differs from the label
    foreground: int  # voxels that are not background in label or prediction
    picture: str  # path from the folder of results.json; shows image, truth and prediction
    # Older versions did not write these.
    organ: str | None = None  # the organ with the largest error
    organ_wrong: int | None = None  # voxels that are this organ in only one of both masks
    error: float | None = None  # of this organ, 0…1 (see `evaluation.overlays.worst_slices`)
    place: str | None = None  # in the patient, as `S 120.0 mm`

    @property
    def rank(self) -> float:
        """What worst slices are sorted by, the largest first."""
        return self.wrong / max(1, self.foreground) if self.error is None else self.error


@dataclass(frozen=True)
class CaseResult:
    """The scores of one volume and its facts."""

    case: str
    scores: list[ClassScore]  # classes 1…N in order
    confusion: list[list[int]] | None = None  # voxels of each predicted (row) and true class
    worst: list[WorstSlice] = field(default_factory=list)  # the worst first
    slices: int | None = None  # None means unknown, here and below
    spacing: tuple[float, ...] | None = None  # mm along (slice, row, column)
    sides: str | None = None  # of the patient at the left, right, top, bottom of pictures, as RLAP
    group: str | None = None  # the scan that the case is a slice of, or the case itself

    @property
    def independent(self) -> str:
        """The scan that the case belongs to; cases of different scans are independent."""
        return self.group or self.case


Means = dict[str, float | None]  # by the names in SCORES; None if no case defines the score


def class_means(results: Sequence[CaseResult]) -> list[Means]:
    """Return the mean over the cases, for each class."""
    return [_means(column) for column in zip(*(result.scores for result in results), strict=True)]


def case_means(results: Sequence[CaseResult]) -> list[Means]:
    """Return the mean over the classes, for each case."""
    return [_means(result.scores) for result in results]


def total_means(results: Sequence[CaseResult]) -> Means:
    """Return the means over the cases of each class, averaged over the classes, as published."""
    rows = class_means(results)
    return {name: mean(row[name] for row in rows) for name in SCORES}


def outcome_counts(results: Sequence[CaseResult]) -> list[dict[str, int]]:
    """Count the cases with each outcome, for each class."""
    counts = [
        Counter(score.outcome for score in column)
        for column in zip(*(result.scores for result in results), strict=True)
    ]
    return [{outcome: count[outcome] for outcome in OUTCOMES} for count in counts]


def nsd_caveat(results: Sequence[CaseResult], tolerance: float | None) -> str | None:
    """Return a warning if the tolerance of NSD is below the voxel spacing, else None."""
    spacings = [max(result.spacing) for result in results if result.spacing]
    coarse = [spacing for spacing in spacings if tolerance is not None and spacing > tolerance]
    if not coarse:
        return None
    return (
        f"NSD's tolerance of {tolerance:g} mm is below the largest voxel spacing of {len(coarse)} "
        f"of {counted(len(results), 'case')} (up to {max(coarse):g} mm): along an axis with "
        "coarser voxels, only surfaces that meet exactly count as near"
    )


def counted(number: int, noun: str) -> str:
    """Return `1 case`, `2 cases` and so on."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def format_table(results: Sequence[CaseResult], class_names: Sequence[str]) -> str:
    """Return the printed tables: one row for each class, then one row for each case."""
    columns: dict[str, Callable[[Means], str]] = {
        "DSC %": lambda row: _number(row["dsc"], 100),
        "HD95 vox": lambda row: _number(row["hd95_voxels"]),
        "HD95 mm": lambda row: _number(row["hd95_mm"]),
        "ASSD mm": lambda row: _number(row["assd_mm"]),
        "NSD %": lambda row: _number(row["nsd"], 100),
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
        "HD95: 95th percentile of both directed sets of surface distances pooled, where both masks "
        "have the organ.\n-: not defined. Scores in mm are not defined without a spacing; means in "
        "mm leave such cases out.\nDSC: a false or missed organ scores 0, an absent organ is left "
        "out.\nsamed: the published rule, in voxels. A false organ scores DSC 1 and HD95 0, a "
        "missed or absent organ 0 and 0."
    )
    return f"{align(per_class)}\n\n{align(per_case)}\n\n{notes}"


def write_csv(path: Path, results: Sequence[CaseResult], class_names: Sequence[str]) -> None:
    """Write one line for each case and class; a score that is not defined is empty."""
    rows: list[list[Any]] = [["case", "class", "name", "outcome", *SCORES]]
    for result in results:
        classes = enumerate(zip(class_names, result.scores, strict=True), start=1)
        rows += [
            [result.case, index, name, s.outcome, *(getattr(s, key) for key in SCORES)]
            for index, (name, s) in classes
        ]
    write_table(path, rows)


def write_json(
    path: Path,
    results: Sequence[CaseResult],
    class_names: Sequence[str],
    settings: dict[str, Any],
    tolerance: float = NSD_TOLERANCE,
) -> None:
    """Write definitions, totals, means, all scores and the settings of the run as JSON."""
    classes = zip(class_names, class_means(results), outcome_counts(results), strict=True)
    cases = zip(results, case_means(results), strict=True)
    content = {
        "definitions": {k: text.format(tolerance=tolerance) for k, text in DEFINITIONS.items()},
        "nsd_tolerance": tolerance,
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
                "confusion": result.confusion,
                "worst": [asdict(worst_slice) for worst_slice in result.worst],
                **{name: getattr(result, name) for name in FACTS},
            }
            for result, row in cases
        ],
        **settings,
    }
    write_json_file(path, content)


def _means(scores: Iterable[ClassScore]) -> Means:
    scores = list(scores)
    return {name: mean(getattr(score, name) for score in scores) for name in SCORES}


def _number(value: float | None, factor: float = 1) -> str:
    return "-" if value is None else f"{value * factor:.2f}"


def align(rows: Sequence[Sequence[str]]) -> str:
    """Lay out columns of equal width: names to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join([first.strip().ljust(widths[0]), *others]).rstrip())
    lines.insert(1, "-" * sum(widths) + "-" * 2 * (len(widths) - 1))
    return "\n".join(lines)
