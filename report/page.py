"""Test runs as one HTML page, alone or side by side."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader
from scipy.stats import bootstrap

from datasets.registry import label_colours
from metrics import mean
from report.charts import as_data, draw_boxes
from report.tables import (
    OUTCOMES,
    CaseResult,
    TestRun,
    case_means,
    class_means,
    outcome_counts,
    total_means,
)
from safe_io import InputError, atomic_path

TEMPLATE = Path(__file__).with_suffix(".html")
MOST_SLICES = 12  # of the worst ones shown
FEWEST_PAIRS = 5  # cases for a confidence interval to mean anything
COLUMNS = {  # score -> heading, factor, whether more is better; honest ones first
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
COMPARED = ("dsc", "nsd", "hd95_mm", "hd95_voxels", *SAMED)


@dataclass(frozen=True)
class Difference:
    """A score of two runs over the cases that define it in both."""

    first: float | None
    second: float | None
    difference: float | None  # second - first, mean over the pairs
    interval: tuple[float, float] | None  # 95 %; None: too few pairs
    pairs: int


def write_page(path: Path, runs: Sequence[TestRun]) -> None:
    """Write the page of one run, or of several side by side.

    Raises:
        InputError: several runs that have no class in common, or a picture that is missing.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    page = environment.get_template(TEMPLATE.name).render(
        runs=[describe(run, name) for run, name in zip(runs, run_names(runs), strict=True)],
        comparisons=[
            {"first": run_names(runs)[0], "second": name, **compare(runs[0], run)}
            for run, name in zip(runs[1:], run_names(runs)[1:], strict=True)
        ],
        columns=COLUMNS,
        samed=SAMED,
        outcomes=OUTCOMES,
        fewest_pairs=FEWEST_PAIRS,
    )
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def run_names(runs: Sequence[TestRun]) -> list[str]:
    """What tells the runs apart: their folders, without what all have in common."""
    folders = [run.path.resolve().parent for run in runs]
    parts = [
        folder.parent.name if folder.name == "test" and folder.parent.name else folder.name
        for folder in folders
    ]
    if len(set(parts)) == len(parts):
        return parts
    return [f"{index}: {part}" for index, part in enumerate(parts, start=1)]


def describe(run: TestRun, name: str) -> dict[str, Any]:
    """Everything of one run that the page shows."""
    colours = [f"#{bytes(rgb).hex()}" for rgb in label_colours(len(run.class_names))[1:]]
    rows = zip(run.class_names, colours, class_means(run.results), outcome_counts(run.results),
               strict=True)  # fmt: skip
    in_mm = total_means(run.results)["hd95_mm"] is not None
    distance = ("hd95_mm", "HD95 mm") if in_mm else ("hd95_voxels", "HD95 voxels")
    return {
        "name": name,
        "total": total_means(run.results),
        # what no case defines, as mm of pictures, has no column
        "shown": [n for n in COLUMNS if n in SAMED or total_means(run.results)[n] is not None],
        "classes": [
            {"name": n, "colour": c, "mean": row, "outcomes": counts} for n, c, row, counts in rows
        ],
        "cases": [
            {"name": result.case, "mean": row, "scores": result.scores}
            for result, row in zip(run.results, case_means(run.results), strict=True)
        ],
        "definitions": run.definitions,
        "boxes": [
            as_data(draw_boxes(run.results, run.class_names, *what))
            for what in (("dsc", "DSC %", 100), (*distance, 1))
            if len(run.results) > 1  # one case has no spread
        ],
        "worst": worst(run),
        "confusion": confused(run),
        "settings": run.settings,
    }


def worst(run: TestRun) -> list[dict[str, Any]]:
    """The slices of all cases with the most wrong voxels, their pictures as data."""
    every = [(one, result.case) for result in run.results for one in result.worst]
    every.sort(key=lambda pair: -pair[0].wrong)
    shown = []
    for one, case in every[:MOST_SLICES]:
        try:
            picture = (run.path.parent / one.picture).read_bytes()
        except OSError as error:
            raise InputError(
                f"{run.path} names the picture {one.picture}, which cannot be read "
                f"({error.strerror}); run test.py again"
            ) from None
        data = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
        shown.append({"case": case, "slice": one, "data": data})
    return shown


def confused(run: TestRun) -> list[list[float | None]] | None:
    """Of the voxels of every true class (row), the share predicted as each (column), %."""
    if any(result.confusion is None for result in run.results):
        return None
    counts = np.sum([result.confusion for result in run.results], axis=0).T
    return [[100 * v / sum(row) if sum(row) else None for v in row] for row in counts.tolist()]


def compare(first: TestRun, second: TestRun) -> dict[str, Any]:
    """Paired differences, second - first, of every class that both runs have.

    Raises:
        InputError: no class or no case in common, or other labels.
    """
    names = [name for name in first.class_names if name in second.class_names]
    cases = [result.case for result in first.results]
    others = {result.case: result for result in second.results}
    both = [case for case in cases if case in others]
    if not names or not both:
        raise InputError(
            f"{first.path} and {second.path} have no {'case' if names else 'class'} in common; "
            "compare runs on the same test data"
        )
    firsts = {result.case: result for result in first.results}
    pairs = [(firsts[case], others[case]) for case in both]
    for one, other in pairs:
        if _voxels(first, one, names) != _voxels(second, other, names):
            raise InputError(
                f"{first.path} and {second.path} were tested on different labels of {one.case}; "
                "compare runs on the same test data"
            )

    def of_class(score: str, name: str) -> Difference:
        places = first.class_names.index(name), second.class_names.index(name)
        return paired(
            [
                tuple(getattr(r.scores[i], score) for r, i in zip(pair, places, strict=True))
                for pair in pairs
            ]
        )

    def of_case(run: TestRun, result: CaseResult, score: str) -> float | None:
        indices = [run.class_names.index(name) for name in names]
        return mean(getattr(result.scores[index], score) for index in indices)

    same_tolerance = first.definitions.get("nsd") == second.definitions.get("nsd")
    compared = [score for score in COMPARED if score != "nsd" or same_tolerance]
    rows = [{"name": n, "scores": {s: of_class(s, n) for s in compared}} for n in names]
    overall = {
        s: paired([(of_case(first, a, s), of_case(second, b, s)) for a, b in pairs])
        for s in compared
    }
    return {
        "rows": rows,
        "overall": overall,
        "scores": [score for score in compared if overall[score].pairs],
        "same_tolerance": same_tolerance,
        "pairs": len(both),
        "alone": sorted(set(cases) ^ others.keys()),
    }


def _voxels(run: TestRun, result: CaseResult, names: Sequence[str]) -> list[int] | None:
    """How many voxels of each class the labels have; None: not known."""
    if result.confusion is None:
        return None
    real = np.sum(result.confusion, axis=0)
    return [int(real[1 + run.class_names.index(name)]) for name in names]


def paired(values: Sequence[tuple[float | None, float | None]]) -> Difference:
    """Means over the cases where both are defined, and what the mean difference may be.

    The interval is the percentile bootstrap's over cases, with a fixed seed.
    """
    known = np.array([pair for pair in values if None not in pair], dtype=float).reshape(-1, 2)
    if not len(known):
        return Difference(None, None, None, None, 0)
    one, other = known.mean(axis=0).tolist()
    differences = known[:, 1] - known[:, 0]
    interval = None
    if len(known) >= FEWEST_PAIRS:
        found = bootstrap(
            (differences,), np.mean, method="percentile", n_resamples=9999, rng=0
        ).confidence_interval
        interval = (float(found.low), float(found.high))
    return Difference(one, other, float(differences.mean()), interval, len(known))


def number(value: float | None, factor: float = 1, sign: bool = False) -> str:
    """`87.59`, with a sign for differences; – where it is not defined."""
    if value is None:
        return "–"
    return f"{value * factor:+.2f}" if sign else f"{value * factor:.2f}"
